"""Chooses the next tokens from the logits of base, reward and reference model.

The sampler is that of the transformers engine (`tita.align.sampling`), so both engines give the
same answer for the same seed, and report the same about it. vLLM is handed logits of which the
chosen token is the only one that is possible.

Legend: R rows of logits, V tokens of the base's vocabulary.
"""

import math
from collections.abc import Mapping, Sequence

from torch import Tensor

from tita.align.sampling import SourceLogits, choose
from tita.align.vocabulary import Vocabulary
from tita.vllm_plugin.row_table import Row


def choose_tokens(
    rows: Sequence[Row | None],
    logits: Mapping[str, Tensor],
    *,
    vocabularies: Mapping[str, Vocabulary],
) -> Tensor:
    """Logits[R, V] for vLLM; those of rows without a request are the base's.

    Args:
        rows: R rows, or None.
        logits: [R, V] by model, float32; overwritten. All are over the base's vocabulary.
        vocabularies: the maps of models whose tokens differ from the base's.
    """
    base = logits["base"]
    places = [place for place, row in enumerate(rows) if row is not None]
    if not places:
        return base
    known = [row for row in rows if row is not None]
    for row in known:
        row.catch_up()
    # All rows, in the usual case without a copy.
    every = len(places) == len(rows)
    outputs = {"base": SourceLogits(base if every else base[places], list(range(len(known))))}
    for model in logits.keys() - {"base"}:
        numbers = [n for n, row in enumerate(known) if model in row.request.sources]
        if numbers:
            whole = every and len(numbers) == len(known)
            own = logits[model] if whole else logits[model][[places[n] for n in numbers]]
            outputs[model] = SourceLogits(own, numbers, vocabularies.get(model))
    choices = choose(
        [row.request.sequence for row in known], outputs, drafts=[row.drafts for row in known]
    )
    found = base if every else base.clone()
    for place, row, choice in zip(places, known, choices, strict=True):
        row.request.choices[row.position] = choice
        found[place] = -math.inf
        found[place, 0 if choice is None else choice.token] = 0.0
    return found
