"""From columns to figures: success, times, tokens, cost and scores of one run."""

from typing import TYPE_CHECKING, Any

from tita.bench import metrics
from tita.bench.columns import NO, YES, Run
from tita.bench.scoring import METRICS

if TYPE_CHECKING:
    import numpy as np

    Numbers = np.ndarray[Any, Any]

_MME_COGNITION = (
    "commonsense_reasoning",
    "numerical_calculation",
    "text_translation",
    "code_reasoning",
)
_QUANTILES = (50, 90, 95, 99)


def summarise(run: Run) -> dict[str, Any]:
    """Everything that a report says about one run; plain values, None where nothing is known."""
    import numpy as np

    error = run.column("error")
    answered = error < 0
    num_questions, num_answered = len(run.rows), int(answered.sum())
    tokens = {side: _total(run.column(f"{side}_tokens")[answered]) for side in ("input", "output")}
    times = run.column("response_time")
    return {
        "title": run.title,
        "file": run.path.name,
        **run.protocol,
        "links": run.links,
        "num_questions": num_questions,
        "num_answered": num_answered,
        "success_rate": num_answered / num_questions,
        "response_time": distribution(times),
        "time_to_first_token": distribution(run.column("first_token")),
        "time_per_output_token": distribution(run.column("per_token")),
        "input_tokens": tokens["input"],
        "output_tokens": tokens["output"],
        "tokens_changed": run.num_tokens_changed,
        "cost": _cost(run),
        "errors": {
            name: int(np.count_nonzero(error == number)) for number, name in enumerate(run.errors)
        },
        "scores": _scores(run),
    }


def distribution(values: "Numbers") -> dict[str, float] | None:
    """Mean and quantiles (linear interpolation) of what is known; None if nothing is."""
    import numpy as np

    known = values[~np.isnan(values)]
    if not len(known):
        return None
    quantiles = np.percentile(known, _QUANTILES)
    return {
        "num": len(known),
        "mean": float(known.mean()),
        **{f"p{q}": float(value) for q, value in zip(_QUANTILES, quantiles, strict=True)},
    }


def _total(values: "Numbers") -> int | None:
    import numpy as np

    known = values[~np.isnan(values)]
    return int(known.sum()) if len(known) else None


def _cost(run: Run) -> dict[str, Any] | None:
    import numpy as np

    costs = run.column("cost")
    known = costs[~np.isnan(costs)]
    if run.currency is None or not len(known):
        return None
    return {
        "amount": float(known.sum()),
        "currency": run.currency,
        "num_questions": len(known),
    }


def _scores(run: Run) -> list[dict[str, Any]]:
    """One entry a metric, with its protocol; categories within."""
    import numpy as np

    score, metric, category = run.column("score"), run.column("metric"), run.column("category")
    entries = []
    for number, name in enumerate(run.metrics):
        mine = metric == number
        scored = mine & ~np.isnan(score)
        if not name or not scored.any():
            continue
        by_category = {
            kind: _values(run, name, rows)
            for kind, rows in _by_category(run, scored, category).items()
        }
        values = _values(run, name, scored)
        if name == "mme":
            values |= _mme_totals(by_category)
        entries.append(
            {
                "metric": name,
                "values": values,
                "by_category": by_category,
                "num_scored": int(scored.sum()),
                "protocol": _protocol(run, name, num_questions=int(mine.sum())),
            }
        )
    return entries


def _by_category(run: Run, rows: "Numbers", category: "Numbers") -> dict[str, "Numbers"]:
    """Rows of each category; of MM-Vet's `ocr+math` also of each capability by itself."""
    import numpy as np

    codes: dict[str, list[int]] = {}
    for code, kind in enumerate(run.categories):
        for name in dict.fromkeys((kind, *kind.split("+"))):
            codes.setdefault(name, []).append(code)
    masks = {name: rows & np.isin(category, own) for name, own in sorted(codes.items()) if name}
    return {name: mask for name, mask in masks.items() if mask.any()}


def _mme_totals(tasks: dict[str, dict[str, Any]]) -> dict[str, float]:
    """MME's totals are sums over tasks, not means over questions."""
    cognition = sum(tasks[name]["score"] for name in tasks if name in _MME_COGNITION)
    total = sum(task["score"] for task in tasks.values())
    return {"score": total, "perception": total - cognition, "cognition": cognition}


def _protocol(run: Run, metric: str, *, num_questions: int) -> dict[str, Any]:
    judge = run.judge if metric not in METRICS else None
    rule = f"judged by {judge['model']}" if judge else METRICS[metric].rule
    return {
        "suite": run.protocol["suite"],
        "metric": metric,
        "num_questions": num_questions,
        "rule": rule,
        "judge_prompt": judge["prompt"] if judge else None,
        "prompt": run.prompt_endings.get(metric) or "as in the question file",
        "questions_sha256": run.protocol["questions_sha256"],
        "max_new_tokens": run.protocol["max_new_tokens"],
        "temperature": run.protocol["temperature"],
        "model": run.protocol["model_name"],
        "weight": run.protocol["weight"],
    }


def comparable(protocol: dict[str, Any]) -> tuple[Any, ...]:
    """What two scores must share to stand in one column: all but the model and its weight."""
    return tuple(value for key, value in protocol.items() if key not in ("model", "weight"))


def _values(run: Run, metric: str, rows: "Numbers") -> dict[str, Any]:
    """Scores in percent (MME's in its own points) of the questions that the mask `rows` picks."""
    parsed = run.column("parsed")[rows]
    values: dict[str, Any] = {"score": 100 * float(run.column("score")[rows].mean())}
    if metric in METRICS and METRICS[metric].parses:
        values["unparsed"] = int((parsed == 0).sum())
    if metric in ("yes-no", "pope"):
        values |= _yes_no_values(parsed, run.column("label")[rows])
    elif metric == "judge-llava-bench":
        # LLaVA-Bench's relative score (arXiv 2304.08485): the answers' sum over the references'.
        values = {"score": 100 * _ratio_of_sums(run, rows)}
    elif metric == "mme":
        values |= _mme_values(run, rows)
    elif metric == "circular":
        values["vanilla"] = values["score"]
        values["score"] = 100 * _circular(run, rows)
    return values


def _yes_no_values(parsed: "Numbers", label: "Numbers") -> dict[str, Any]:
    said: list[bool | None] = [{YES: True, NO: False}.get(code) for code in parsed.tolist()]
    scores = metrics.pope_scores(said, [code == YES for code in label.tolist()])
    return {
        name: None if value is None else 100 * value
        for name in ("accuracy", "precision", "recall", "f1", "yes_ratio")
        for value in [getattr(scores, name)]
    }


def _mme_values(run: Run, rows: "Numbers") -> dict[str, Any]:
    pairs = zip(run.column("group")[rows].tolist(), run.column("score")[rows].tolist(), strict=True)
    scores = metrics.mme_scores((str(group), score == 1) for group, score in pairs)
    return {
        "accuracy": scores.accuracy,
        "accuracy_plus": scores.accuracy_plus,
        "score": scores.score,
    }


def _circular(run: Run, rows: "Numbers") -> float:
    pairs = zip(run.column("group")[rows].tolist(), run.column("score")[rows].tolist(), strict=True)
    return metrics.circular_accuracy((str(group), score == 1) for group, score in pairs) or 0.0


def _ratio_of_sums(run: Run, rows: "Numbers") -> float:
    rival = float(run.column("rival")[rows].sum())
    return float(run.column("score")[rows].sum()) / rival if rival else 0.0
