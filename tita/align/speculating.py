"""Speculative alignment: the reward model drafts, the base verifies all drafts in one forward.

The rule of speculative sampling (arXiv 2211.17192) accepts a draft by a coin of its own and draws
anew where it falls: identically distributed, but another answer for every number of drafts. Here
randomness is a function of (seed, position) instead. The combined distribution's choice at a
position is argmax(log p + g) whatever was drafted; a draft is chosen by the reward model with the
same g, and accepted if and only if it is that choice (coupling by shared Gumbel noise, arXiv
2408.07978). So the answer is, token for token, what lockstep says: lossless, and the same under its
seed however many tokens are drafted and whatever else is in the batch. Greedy decoding is the case
without noise.
"""

import time
from typing import TYPE_CHECKING

from tita.align.answers import Outcome, is_last
from tita.align.choosing import draft, say
from tita.align.drafting import Drafting
from tita.align.lane import Lane
from tita.align.rows import Row

if TYPE_CHECKING:
    from torch import Tensor


def speculate(
    row: Row,
    base: Lane,
    reward: Lane,
    *,
    drafting: Drafting,
    num_drafts: int,
    reference: Lane | None = None,
) -> list[Outcome]:
    """One round for the only row of both lanes.

    Args:
        row: the answer; both models have seen all of it but its last token.
        base: the base model's lane.
        reward: the reward model's lane.
        drafting: is told what came of it.
        num_drafts: tokens to draft at most, fewer than the row may still have; with 0 the models go
            in lockstep.
        reference: the reference model's lane, if the row's form compares with it.

    Returns:
        The row's next tokens, at least one.
    """
    own, theirs = _drafted(row, reward, num_drafts=num_drafts, drafting=drafting)
    began, before = time.perf_counter(), base.seconds
    logits = base.extend([row.last, *own[:-1]])
    row.base_s += base.seconds - before
    compared = _compared(row, reference, [row.last, *own[:-1]])
    said: list[Outcome] = []
    for number, token in enumerate(own):
        at = slice(number, number + 1)
        said += say(
            [row],
            logits[at],
            theirs[number],
            guided=[0],
            reference=None if compared is None else compared[at],
            referring=[] if compared is None else [0],
        )
        agreed = row.last == token
        drafting.note_agreement(row.agreement, agreed)
        if is_last(said[-1]) or not agreed:
            break
    drafting.note_base(len(own), time.perf_counter() - began)
    drafting.num_rounds += len(own) > 1
    drafting.num_drafted += len(own) - 1
    drafting.num_accepted += len(said) - 1
    for lane in (base, reward, reference):
        if lane is not None:
            lane.forget(len(own) - len(said))
    return said


def _compared(row: Row, reference: Lane | None, tokens: list[int]) -> "Tensor | None":
    """The reference's logits[Q, V] behind each of Q tokens."""
    if reference is None:
        return None
    before = reference.seconds
    logits = reference.extend(tokens)
    row.reward_s += reference.seconds - before
    return logits


def _drafted(
    row: Row, reward: Lane, *, num_drafts: int, drafting: Drafting
) -> "tuple[list[int], list[Tensor]]":
    """The reward model's own next tokens, and its logits[1, V] behind each.

    All but the last are drafts; the last shows, for nothing, whether it would have been accepted.
    """
    own: list[int] = []
    theirs: list[Tensor] = []
    # Nothing follows the end of a text.
    while len(own) <= num_drafts and not (own and row.ends_with(own[-1])):
        began, before = time.perf_counter(), reward.seconds
        theirs.append(reward.step([own[-1] if own else row.last]))
        row.reward_s += reward.seconds - before
        own.append(draft(row, theirs[-1][0], ahead=own))
        drafting.note_reward(time.perf_counter() - began)
    return own, theirs
