"""Maps token ids that differ between two models: the same token is the same string.

Identical vocabularies need no map. Models of one family may differ in tokens added at the end, in
their order, in padding of the output layer, and in the end-of-text token; then the reward model's
logits are reordered by the base's ids. A token that only one model knows:

- only the reward: dropped. It cannot be generated; the reward's other probabilities rise in
  proportion.
- only the base: the base decides alone. Let S be the tokens that both know. By the chain rule
  p(x) = p(x in S) p(x | x in S): the second factor is the reward's, the first stays the base's, as
  does p(x) outside of S. That is a distribution over the base's vocabulary, so each form of
  `guidance` takes it as it is, and no weight raises or lowers what the reward cannot know. To rule
  such tokens out instead would forbid the base words of its own.
- the end of a text is one event with several names: where the models end with different tokens, the
  reward's probability to end goes to the base's end tokens, in the base's proportion.

Legend: B rows, V tokens of the base's output layer, R of the reward's.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tita.errors import TitaError
from tita.vlm.loading import VLM, Models

MIN_KNOWN = 0.9
"""Minimum fraction of the base's tokens that a reward model of the same family knows."""


class Vocabulary:
    """The map from the reward model's token ids to the base's."""

    def __init__(
        self,
        *,
        columns: Tensor,
        reads: list[int],
        base_ends: list[int],
        reward_ends: list[int],
    ) -> None:
        """Args:
        columns: [V] ids in the reward's output layer, -1 for tokens that the reward does not know.
        reads: V ids that the reward model reads for the base's tokens.
        base_ends: end-of-text tokens of the base if the models' differ, else empty.
        reward_ends: end-of-text tokens of the reward if the models' differ, else empty.
        """
        self.reads = reads
        self._columns = columns.clamp(min=0)
        self._known = columns >= 0
        self._base_ends = torch.tensor(base_ends, dtype=torch.long)
        self._reward_ends = torch.tensor(reward_ends, dtype=torch.long)

    def project(self, logits: Tensor) -> Tensor:
        """The reward's logits[..., R] as [..., V], float32: -inf for tokens that it does not know.

        If the end tokens differ, the base's first one gets the probability of all the reward's.
        """
        self._move(logits.device)
        logits = logits.float()
        reordered = logits.index_select(-1, self._columns)
        reordered.masked_fill_(~self._known, -torch.inf)
        if len(self._base_ends):
            reordered[..., self._base_ends] = -torch.inf
            reordered[..., self._base_ends[0]] = logits[..., self._reward_ends].logsumexp(-1)
        return reordered

    def complete(self, base: Tensor, projected: Tensor) -> None:
        """Fill in the base's logits for tokens that the reward does not know, in place.

        Args:
            base: logits[B, V], float32.
            projected: output of `project`, logits[B, V]; overwritten.
        """
        self._move(projected.device)
        ends = self._base_ends
        if len(ends):
            shares = base[:, ends].log_softmax(-1)
            projected[:, ends] = projected[:, ends[:1]] + shares
        both = self._known.clone()
        both[ends] = True
        ours = torch.where(both, base, -torch.inf).logsumexp(-1, keepdim=True)
        projected += ours - projected.logsumexp(-1, keepdim=True)
        torch.where(both, projected, base, out=projected)

    def _move(self, device: torch.device) -> None:
        if self._known.device != device:
            for name in ("_columns", "_known", "_base_ends", "_reward_ends"):
                setattr(self, name, getattr(self, name).to(device))


@dataclass(frozen=True, slots=True)
class Vocabularies:
    """The vocabularies of an engine's models."""

    width: int
    """V: tokens that are sampled from. Beyond are ids that only pad an output layer."""
    maps: dict[str, Vocabulary]
    """By model, for those whose ids differ from the base's."""


def match_vocabularies(models: Models) -> Vocabularies:
    """The maps from the tokens of the other models to the base's.

    Raises:
        TitaError: base and another model share too few tokens, or the reference, which is a reward
            model before DPO, has another vocabulary than the reward model.
    """
    base, reference = models.base, models.reference
    for reward in models.rewards.values():
        if reference is not None and not _are_alike(reward, reference):
            raise TitaError(
                "the reference model has another vocabulary than the reward model",
                where=f"{reference.name} and {reward.name}",
                remedy="give the reward model as it was before DPO",
            )
    vlms = models.by_role()
    alike = {role for role, vlm in vlms.items() if _are_alike(base, vlm)}
    width = min(num_logits(vlms[role]) for role in alike)
    maps: dict[str, Vocabulary] = {}
    for role, vlm in vlms.items():
        if role not in alike:
            known = next((each for each in maps if _are_alike(vlms[each], vlm)), None)
            maps[role] = maps[known] if known else _match(base, vlm, width=width)
    return Vocabularies(width, maps)


def _are_alike(one: VLM, other: VLM) -> bool:
    if one.tokenizer is other.tokenizer:
        return True
    same_words = one.tokenizer.get_vocab() == other.tokenizer.get_vocab()
    return same_words and set(end_tokens(one)) == set(end_tokens(other))


def _match(base: VLM, reward: VLM, *, width: int) -> Vocabulary:
    ours, theirs = base.tokenizer.get_vocab(), reward.tokenizer.get_vocab()
    base_ends, reward_ends = end_tokens(base), end_tokens(reward)
    _check_overlap(ours, theirs, where=f"{base.name} and {reward.name}")
    names = {number: token for token, number in ours.items()}
    alike = {names.get(end) for end in base_ends} == _names(theirs, reward_ends)
    if alike or not base_ends or not reward_ends:
        base_ends = reward_ends = []
    their_width = num_logits(reward)
    columns = torch.full((width,), -1)
    for token, number in ours.items():
        column = theirs.get(token, their_width)
        if number < width and column < their_width and column not in reward_ends:
            columns[number] = column
    reads = columns.tolist()
    for number in (number for number, column in enumerate(reads) if column < 0):
        reads[number] = _closest(names.get(number), base, reward)
    for end in base_ends:
        columns[end], reads[end] = -1, reward_ends[0]
    return Vocabulary(columns=columns, reads=reads, base_ends=base_ends, reward_ends=reward_ends)


def end_tokens(vlm: VLM) -> list[int]:
    """The end-of-text tokens, the most likely one first."""
    configured = vlm.model.generation_config.eos_token_id
    ends = configured if isinstance(configured, list) else [configured]
    found = [end for end in (*ends, vlm.tokenizer.eos_token_id) if end is not None]
    return list(dict.fromkeys(found))


def num_logits(vlm: VLM) -> int:
    """Width of the output layer, padding included."""
    return int(vlm.model.config.get_text_config().vocab_size)


def _names(vocabulary: dict[str, int], numbers: list[int]) -> set[str | None]:
    names = {number: token for token, number in vocabulary.items()}
    return {names.get(number) for number in numbers}


def _check_overlap(ours: dict[str, int], theirs: dict[str, int], *, where: str) -> None:
    unknown = sorted(ours.keys() - theirs.keys(), key=ours.__getitem__)
    num_known = len(ours) - len(unknown)
    if num_known >= MIN_KNOWN * len(ours):
        return
    examples = ", ".join(map(repr, unknown[len(unknown) // 2 :][:3]))
    raise TitaError(
        f"the reward model knows {num_known:,} of the base model's {len(ours):,} tokens "
        f"({num_known / len(ours):.1%}; {MIN_KNOWN:.0%} are needed), and not {examples}",
        where=where,
        remedy="choose a reward model of the base model's family",
    )


def _closest(token: str | None, base: VLM, reward: VLM) -> int:
    """The id that the reward reads for a token that it does not know.

    Both models advance by one token per step, so it must be a single one: the reward's tokenization
    of the text if that is one token, else its unknown token, else the last of its tokens.
    """
    unknown: int | None = reward.tokenizer.unk_token_id
    text: Any = None if token is None else base.tokenizer.convert_tokens_to_string([token])
    spelled: list[int] = reward.tokenizer.encode(text, add_special_tokens=False) if text else []
    if len(spelled) == 1 or (spelled and unknown is None):
        return spelled[-1]
    if unknown is not None:
        return unknown
    return (end_tokens(reward) or [0])[0]
