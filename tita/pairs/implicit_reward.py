"""Ranks answers by the implicit reward of a model that was trained with DPO.

The reward of answer y to prompt x is log p(y | x) of the trained model minus that of its reference,
up to a factor and a term that depends on x alone (arXiv 2305.18290, equation 5).
"""

from collections.abc import Sequence

import torch

from tita.pairs.ranking import Ranking, RankingTask
from tita.vlm.inputs import prepare
from tita.vlm.loading import VLM
from tita.vlm.prompts import Prompt, completion_ids, completion_text, prompt_text, to_turns


class ImplicitRewardRanker:
    """Scores answers by a trained model and the model that its training started from."""

    def __init__(self, *, model: VLM, reference: VLM) -> None:
        self._model = model
        self._reference = reference

    def __call__(self, tasks: Sequence[RankingTask], /) -> list[Ranking]:
        """Rank the answers of all tasks, one task at a time.

        Raises:
            TitaError: a model does not accept a prompt.
        """
        rankings = []
        for task in tasks:
            turns = to_turns(task.question.context, task.question.text, (task.picture,))
            both = (
                sum_log_probs(vlm, Prompt(turns=turns), task.answers)
                for vlm in (self._model, self._reference)
            )
            rankings.append(Ranking(scores=tuple(a - b for a, b in zip(*both, strict=True))))
        return rankings


@torch.inference_mode()
def sum_log_probs(vlm: VLM, prompt: Prompt, answers: Sequence[str]) -> list[float]:
    """The log-probability of each answer, in nats, with the end of its turn.

    Prompt and answers are tokenized as in training, the image is shown once per answer.
    """
    inputs = prepare(vlm, [prompt])
    text = prompt_text(vlm.processor, prompt)
    ids = [
        completion_ids(vlm.processor, text, completion_text(vlm.processor, prompt, answer))
        for answer in answers
    ]
    start, longest = inputs["input_ids"].shape[1], max(map(len, ids))
    tokens = torch.zeros(len(ids), longest, dtype=torch.long)
    mask = torch.zeros_like(tokens)
    for row, answer_ids in enumerate(ids):
        tokens[row, : len(answer_ids)] = torch.tensor(answer_ids)
        mask[row, : len(answer_ids)] = 1
    tokens, mask = tokens.to(vlm.device), mask.to(vlm.device)
    batch = {name: torch.cat([tensor] * len(ids)) for name, tensor in inputs.items()}
    batch["input_ids"] = torch.cat([batch["input_ids"], tokens], dim=1)
    batch["attention_mask"] = torch.cat([batch["attention_mask"], mask], dim=1)
    for name in ("token_type_ids", "mm_token_type_ids"):
        if name in batch:
            batch[name] = torch.cat([batch[name], torch.zeros_like(tokens)], dim=1)
    logits = vlm.model(**batch).logits[:, start - 1 : -1].float()
    found = logits.log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
    return [float(total) for total in (found * mask).sum(-1)]
