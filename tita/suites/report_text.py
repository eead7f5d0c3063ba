"""The words of a suite's report in English and Chinese."""

from collections.abc import Mapping, Sequence
from typing import Any

from tita.suites.verdict import Language

TEXTS: Mapping[str, tuple[str, str]] = {
    "title": ("Does alignment help?", "对齐是否有效？"),
    "subtitle": (
        "{answers} answers to {sets} sets, {methods} methods, the same questions for all",
        "{sets} 个测试集、{methods} 种方法、共 {answers} 条回答，所有方法回答相同的问题",
    ),
    "forest": ("Differences to the base", "与基础模型的差异"),
    "forest caption": (
        "Main figure of each set; to the right is better. 95 % interval, units resampled as pairs. "
        "Green and red: differences beyond chance, corrected. {controls}",
        "各测试集的主要指标，向右为更好。95 % 置信区间，按单元成对重采样。"
        "绿色与红色：校正后超出偶然的差异。{controls}",
    ),
    "controls": ("Grey, controls: {names}.", "灰色为对照组：{names}。"),
    "points": ("points better than the base", "比基础模型好的分数"),
    "curves": ("By weight", "按权重"),
    "curves caption": (
        "All questions. The main figure's gain in points; up is better.",
        "全部题目。主要指标的提升（分），向上为更好。",
    ),
    "weight": ("guidance weight", "引导权重"),
    "gain": ("gain, points", "提升（分）"),
    "methods": ("What it costs, what it brings", "成本与收益"),
    "methods caption": (
        "Mean gain of the main figures in points; tokens, seconds and cost per question. p: the "
        "smallest over the sets, corrected for all methods and sets (Holm).",
        "主要指标的平均提升（分）；每题的 token 数、秒数与费用。p：各测试集中最小者，"
        "按所有方法和测试集校正（Holm）。",
    ),
    "quality cost": (
        "Quality against cost: mean gain by seconds per question.",
        "质量与成本：平均提升与每题秒数。",
    ),
    "seconds": ("seconds per question", "每题秒数"),
    "other methods": (
        "{method} is better than the base on {sets}.", "{method} 在 {sets} 上优于基础模型。",
    ),
    "worse methods": (
        "{method} is worse than the base on {sets}.", "{method} 在 {sets} 上不如基础模型。",
    ),
    "front caption": (
        "No other method beats these in both figures: {names}. Hypervolume {volume} above the "
        "worst values, {x} and {y}.",
        "没有其他方法在两项指标上都优于：{names}。"
        "以最差值 {x} 与 {y} 为参考点的超体积为 {volume}。",
    ),
    "front": ("Front", "前沿"),
    "sets": ("Figures of every set", "各测试集的全部指标"),
    "sets caption": (
        "Paired by unit: questions that depend on each other are one. p: randomization test; "
        "corrected for {number} sets (Holm) in the main figure, the first of each set.",
        "按单元成对比较，相互依赖的题目为一个单元。p：随机化检验；"
        "主要指标（首行）按 {number} 个测试集校正（Holm）。",
    ),
    "flipped": ("Answers that changed", "发生变化的回答"),
    "flipped note": (
        "Questions that one method answers better than the other. Marked: tokens that guidance "
        "changed where they were asked for (--explain), else words that differ.",
        "两种方法得分不同的题目。标出的是引导改变的 token（使用 --explain 时），否则为不同的词。",
    ),
    "left out": (
        "{number} more are in the results files.", "另有 {number} 条见结果文件。"
    ),
    "all sets": ("all sets", "全部测试集"),
    "won and lost": ("won and lost", "变好与变差"),
    "won": ("won", "变好"),
    "lost": ("lost", "变差"),
    "search": ("words", "关键词"),
    "set": ("set", "测试集"),
    "result": ("result", "结果"),
    "reference": ("reference", "参考答案"),
    "count": ("{shown} of {all}", "{shown} / {all}"),
    "more": ("Show more", "显示更多"),
    "missing": (
        "{title}: {number} of {all} questions have no scored answer of {methods}.",
        "{title}：{all} 道题中有 {number} 道没有 {methods} 的有效得分。",
    ),
    "missing whole": (
        "{title}: {number} of {all} questions have no scored answer of {methods}. The groups of "
        "questions that they belong to are left out.",
        "{title}：{all} 道题中有 {number} 道没有 {methods} 的有效得分，其所属的题组未计入。",
    ),
    "choice": ("Choosing the weight", "权重的选择"),
    "choice caption": (
        "Mean gain over the sets on the part that chooses, in units of what chance explains.",
        "在用于选择的部分上各测试集的平均提升，以偶然可解释的幅度为单位。",
    ),
    "nothing flipped": ("No answer changed its score.", "没有回答的得分发生变化。"),
}  # fmt: skip


COLUMNS_ZH: Mapping[str, str] = {
    "method": "方法", "gain": "提升", "input tokens": "输入 token", "output tokens": "输出 token",
    "seconds": "秒", "price": "费用", "times base": "基础模型的倍数", "low": "下限", "high": "上限",
    "set": "测试集", "figure": "指标", "base": "基础模型", "difference": "差异",
    "p corrected": "校正后 p", "units": "单元数",
}  # fmt: skip
"""Names of columns in Chinese; others are names of methods, or the same in both languages."""


def columns(rows: Sequence[Mapping[str, Any]], language: Language) -> list[dict[str, Any]]:
    """The rows with the names of their columns in a language."""
    if language == "en":
        return [dict(row) for row in rows]
    return [{COLUMNS_ZH.get(name, name): value for name, value in row.items()} for row in rows]


def text(name: str, language: Language, **values: object) -> str:
    """A text of the report in a language, with its values."""
    return TEXTS[name][language == "zh"].format(**values)
