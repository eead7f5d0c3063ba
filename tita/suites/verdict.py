"""What the comparisons of a suite allow to say: one sentence and notes, in two languages."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from tita.bench.methods import Method
from tita.bench.significance import holm
from tita.suites.comparison import (
    SIGNIFICANCE,
    VALIDATION_SHARE,
    SetComparison,
    SetRuns,
    WeightChoice,
    choose_weight,
    compare_method,
    correct_for_number,
)

Language = Literal["en", "zh"]
Outcome = Literal["gain", "calibration", "mixed", "loss", "none"]
_SHORTER = -0.05
"""Relative change of length from which answers are called shorter."""
_MAX_DESCRIBED = 3
"""Sets whose figures a headline has; of more it has the names."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Findings:
    """The comparisons of a suite at one method, on questions that did not choose it."""

    choice: WeightChoice | None
    """None if the method was given and not chosen."""
    method: Method | None
    """The method of the verdict; None if no weight was better than 0."""
    part: str
    """Part of the questions that is compared: `rest` if a weight was chosen, else all."""
    comparisons: Sequence[SetComparison]
    """One per set, with p-values corrected for the number of sets."""
    controls: Sequence[SetComparison]
    """The controls against the base, one per set and control."""
    over_controls: Mapping[str, bool]
    """By set with a gain: whether the method is better than every control, too."""
    not_compared: Sequence[SetRuns] = ()
    """Sets whose main figure is not defined for both, such as CHAIR_i without any mention."""

    @property
    def gains(self) -> list[SetComparison]:
        """Sets on which the method is better than the base."""
        return [each for each in self.comparisons if each.is_significant and each.gain > 0]

    @property
    def losses(self) -> list[SetComparison]:
        """Sets on which it is worse."""
        return [each for each in self.comparisons if each.is_significant and each.gain < 0]

    @property
    def real_gains(self) -> list[SetComparison]:
        """Gains that the controls, if they were run, do not have."""
        return [each for each in self.gains if self.over_controls.get(each.set.name, True)]

    @property
    def outcome(self) -> Outcome:
        """The verdict in a word."""
        if self.real_gains:
            return "mixed" if self.losses else "gain"
        if self.gains:
            return "calibration"
        return "loss" if self.losses else "none"


def find(sets: Sequence[SetRuns], methods: Sequence[Method]) -> Findings:
    """Compare the guided method with the base; of several weights one is chosen first.

    Args:
        methods: all methods; controls are told by their weight.
    """
    guided = [m for m in methods if not (m.is_base or m.control or m.form or m.best_of > 1)]
    candidates = guided or [m for m in methods if not (m.is_base or m.control)]
    choice = choose_weight(sets, candidates) if len(candidates) > 1 else None
    part = "rest" if choice is not None else ""
    method = choice.method if choice is not None else next(iter(candidates), None)
    if method is None:
        return Findings(
            choice=choice, method=None, part=part, comparisons=(), controls=(), over_controls={}
        )
    found = [compare_method(runs, method, part=part) for runs in sets]
    comparisons = correct_for_number([each for each in found if each is not None])
    controls = [m for m in methods if m.control and _strength(m) == _strength(method)]
    against_base = [compare_method(runs, c, part=part) for c in controls for runs in sets]
    gains = [each for each in comparisons if each.is_significant and each.gain > 0]
    return Findings(
        choice=choice,
        method=method,
        part=part,
        comparisons=comparisons,
        not_compared=[runs for runs, each in zip(sets, found, strict=True) if each is None],
        controls=[each for each in against_base if each is not None],
        over_controls=_over_controls(gains, controls, part=part),
    )


def _strength(method: Method) -> float:
    return method.weight or sum(method.weights.values())


def _over_controls(
    gains: Sequence[SetComparison], controls: Sequence[Method], *, part: str
) -> dict[str, bool]:
    """Whether the method is better than every control on the sets with a gain."""
    tests: list[tuple[str, SetComparison]] = []
    for gain in gains:
        for control in controls:
            found = compare_method(gain.set, gain.method, part=part, against=control.name)
            if found is not None:
                tests.append((gain.set.name, found))
    corrected = holm([found.main.p_value for _, found in tests])
    passed: dict[str, bool] = {}
    for (name, found), p in zip(tests, corrected, strict=True):
        is_better = found.gain > 0 and p < SIGNIFICANCE
        passed[name] = passed.get(name, True) and is_better
    return passed


def headline(findings: Findings, *, language: Language = "en") -> str:
    """One sentence: what the numbers allow to say."""
    method, number = findings.method, len(findings.comparisons)
    zh = language == "zh"
    if method is None:
        return _NO_METHOD[_is_by_weight(findings)][zh]
    if not number:
        return _NOTHING_COMPARED[zh]
    gains, losses, calibrated = (
        _list(some, number=number, language=language)
        for some in (findings.real_gains, findings.losses, findings.gains)
    )
    name = method.name
    none_worse = ""
    if not _MAX_DESCRIBED < len(findings.real_gains) == number:
        none_worse = (
            f"，在 {number} 个测试集上均不更差" if zh else f", and worse on none of {number} sets"
        )
    texts = {
        "gain": (
            f"{name} is better than the base on {gains}{none_worse}.",
            f"{name} 在 {gains} 上优于基础模型{none_worse}。",
        ),
        "mixed": (
            f"{name} is better than the base on {gains}, and worse on {losses}.",
            f"{name} 在 {gains} 上优于基础模型，在 {losses} 上更差。",
        ),
        "calibration": (
            f"The gain of {name} on {calibrated} is calibration: the controls have it too.",
            f"{name} 在 {calibrated} 上的提升来自校准：对照组同样具有这一提升。",
        ),
        "loss": (
            f"{name} is worse than the base on {losses}, and better on none of {number} sets.",
            f"{name} 在 {losses} 上不如基础模型，在 {number} 个测试集上均无提升。",
        ),
        "none": (
            f"No gain: {name} differs from the base on none of {number} sets by more than chance "
            "explains.",
            f"没有提升：{name} 与基础模型在 {number} 个测试集上的差异均未超出偶然范围。",
        ),
    }
    return texts[findings.outcome][zh]


_NO_METHOD = {
    True: (
        "No weight is better than 0 on the part that chooses it: use the base model.",
        "在用于选择的那部分题目上，没有任何权重优于 0：应使用基础模型。",
    ),
    False: (
        "No method is better than the base on the part that chooses it.",
        "在用于选择的那部分题目上，没有任何方法优于基础模型。",
    ),
}
"""By whether the methods are weights."""


_NOTHING_COMPARED = (
    "Nothing can be said: no set has a score for both the base and the method.",
    "无法得出结论：没有测试集同时具有基础模型与该方法的得分。",
)


def _is_by_weight(findings: Findings) -> bool:
    names = findings.choice.gains if findings.choice is not None else ()
    return all(name.startswith("guided") for name in names)


def notes(findings: Findings, *, language: Language = "en") -> list[str]:
    """What a reader must know beside the headline: controls, length, choice of the weight."""
    zh = language == "zh"
    lines = []
    share = f"{100 * VALIDATION_SHARE:.0f} %"
    if findings.choice is not None and findings.method is not None:
        lines.append(
            f"{findings.method.name} 在 {share} 的题目上选出，在其余题目上报告。"
            if zh
            else f"{findings.method.name} was chosen on {share} of every set and is reported on "
            "the rest."
        )
    lines += [
        f"{runs.title}：{runs.scorer.main} 无法对两者计算，因此未比较。"
        if zh
        else f"{runs.title} is not compared: {runs.scorer.main} is not defined for both."
        for runs in findings.not_compared
    ]
    for each in findings.comparisons:
        absent = [name for name in each.set.scorer.mean_of if name not in each.figures]
        if absent:
            names, main, title = ", ".join(absent), each.set.scorer.main, each.set.title
            lines.append(
                f"{title}：{main} 不含 {names}，因为它们无法对两者计算。"
                if zh
                else f"{title}: {main} leaves out {names}, not defined for both."
            )
    if findings.gains and not findings.over_controls:
        lines.append(
            "未运行对照组（--controls），因此提升也可能来自校准，而不是图像。"
            if zh
            else "Controls were not run (--controls), so that a gain may be calibration and not "
            "sight."
        )
    lines += _length_notes(findings.gains, zh=zh)
    for each in findings.comparisons:
        yes = each.figures.get("yes ratio")
        if yes is not None and abs(yes.difference) > 5:
            lines.append(
                f"{each.set.title}：回答“是”的比例从 {yes.a:.0f} % 变为 {yes.b:.0f} %。"
                if zh
                else f"{each.set.title}: the share of yes went from {yes.a:.0f} % to {yes.b:.0f} %."
            )
    return lines


def _length_notes(gains: Sequence[SetComparison], *, zh: bool) -> list[str]:
    """Of sets whose answers became shorter: those that say how much they recall, and others."""
    shorter = [
        (each, -100 * change)
        for each in gains
        if (change := _relative_length(each)) is not None and change < _SHORTER
    ]
    lines = []
    for has_recall in (True, False):
        some = [
            (each, cut)
            for each, cut in shorter
            if bool(_RECALLS & each.figures.keys()) == has_recall
        ]
        if not some:
            continue
        titles = ", ".join(each.set.title for each, _ in some)
        low, high = (f"{bound(cut for _, cut in some):.0f}" for bound in (min, max))
        if zh:
            cut = low if low == high else f"{low} 至 {high}"
            end = "；更短的回答本身就更少幻觉，请对照召回率。" if has_recall else "。"
            lines.append(f"{titles}：回答缩短了 {cut} %{end}")
        else:
            cut = low if low == high else f"{low} to {high}"
            end = " Shorter answers make up less, so read the recall too." if has_recall else ""
            lines.append(f"{titles}: answers are {cut} % shorter.{end}")
    return lines


_RECALLS = {"recall", "cover"}
"""Figures of captions that say how much of an image they name."""


def _relative_length(comparison: SetComparison) -> float | None:
    for name, figure in comparison.figures.items():
        if "length" in name and figure.a:
            return figure.difference / figure.a
    return None


def _list(comparisons: Sequence[SetComparison], *, number: int, language: Language) -> str:
    """Sets by name: a few with their main figures, the names of more, and no name if it is all.

    Args:
        number: of the sets that are compared.
    """
    zh, count = language == "zh", len(comparisons)
    if count <= _MAX_DESCRIBED:
        return ", ".join(describe(each, language=language) for each in comparisons)
    if count == number:
        return f"全部 {number} 个测试集" if zh else f"all {number} sets"
    titles = ", ".join(each.set.title for each in comparisons)
    if zh:
        return f"{number} 个测试集中的 {count} 个（{titles}）"
    return f"{count} of {number} sets ({titles})"


def describe(comparison: SetComparison, *, language: Language = "en") -> str:
    """The set with its main figure, the difference and its interval."""
    name, figure = comparison.set.scorer.main, comparison.main
    to = "至" if language == "zh" else "to"
    interval = f"{figure.low:+.1f} {to} {figure.high:+.1f}"
    return f"{comparison.set.title} ({name} {figure.difference:+.1f}, {interval})"
