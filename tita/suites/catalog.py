"""The evaluation sets by name: source, reader, scorer, and the files they are recognised by."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tita.bench.mmbench import read_mmbench
from tita.bench.questions import BenchmarkItem
from tita.bench.suites import (
    read_gqa,
    read_llava_bench,
    read_mm_vet,
    read_mme,
    read_science_qa,
    read_seed_bench,
    read_textvqa,
    read_vizwiz,
    read_vqav2,
)
from tita.errors import TitaError
from tita.suites.caption_sets import (
    AMBER_SCORER,
    CHAIR_SCORER,
    OBJECT_HALBENCH_SCORER,
    read_amber,
    read_chair,
    read_object_halbench,
)
from tita.suites.choice_sets import (
    MMMU_SCORER,
    MMSTAR_SCORER,
    REAL_WORLD_QA_SCORER,
    read_mmmu,
    read_mmstar,
    read_real_world_qa,
)
from tita.suites.judged_sets import (
    LLAVA_BENCH_SCORER,
    MM_VET_V2_SCORER,
    MMHAL_SCORER,
    read_mm_vet_v2,
    read_mmhal,
)
from tita.suites.scorers import GROUP_SCORER, MEAN_SCORER, Scorer
from tita.suites.yes_no_sets import (
    HALLUSION_SCORER,
    POPE_SCORER,
    read_hallusion,
    read_pope_splits,
)

SetReader = Callable[..., Iterator[BenchmarkItem]]
"""Function of (folder of the published files, out=folder for files of the set)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationSet:
    """One evaluation set."""

    name: str
    title: str
    source: str
    """Paper, and what is followed where published scorers differ."""
    files: tuple[str, ...]
    """Patterns that all have a match in the folder of the published files; without any, the folder
    must have the set's name."""
    read: SetReader
    scorer: Scorer
    max_new_tokens: int = 16
    hallucination: bool = False
    """Whether it is about answers that are not grounded in the image."""
    judged: bool = False
    """Whether a judge model scores it."""


def _llava(read: Callable[[Path], Iterator[BenchmarkItem]]) -> SetReader:
    """A reader of `tita.bench.suites`, which writes no files."""

    def read_set(source: Path, *, out: Path) -> Iterator[BenchmarkItem]:
        del out
        return read(source)

    return read_set


def _mmbench(source: Path, *, out: Path) -> Iterator[BenchmarkItem]:
    return read_mmbench(source, images=out)


_LIST = (
    EvaluationSet(
        name="chair", title="CHAIR", read=read_chair, scorer=CHAIR_SCORER, hallucination=True,
        source="arXiv 1809.02156; every phrase of the synonym list, singular or plural",
        files=("instances_*.json", "captions_*.json", "synonyms.txt"), max_new_tokens=512,
    ),
    EvaluationSet(
        name="object-halbench", title="Object HalBench", read=read_object_halbench,
        scorer=OBJECT_HALBENCH_SCORER, hallucination=True,
        source="arXiv 2312.00849; objects by the synonym list, without the published GPT step",
        files=("obj_halbench*.jsonl", "synonyms*.txt"), max_new_tokens=512,
    ),
    EvaluationSet(
        name="amber", title="AMBER", read=read_amber, scorer=AMBER_SCORER, hallucination=True,
        source="arXiv 2311.07397; without its noun tagger and word vectors",
        files=("annotations.json", "relation.json", "safe_words.txt"), max_new_tokens=512,
    ),
    EvaluationSet(
        name="pope", title="POPE", read=read_pope_splits, scorer=POPE_SCORER, hallucination=True,
        source="arXiv 2305.10355; yes or no by word, mean over the splits",
        files=("*_pope_*.json",),
    ),
    EvaluationSet(
        name="hallusionbench", title="HallusionBench", read=read_hallusion,
        scorer=HALLUSION_SCORER, hallucination=True,
        source="arXiv 2310.14566; yes or no by word, where the paper has a judge",
        files=("HallusionBench*.json",),
    ),
    EvaluationSet(
        name="mmhal-bench", title="MMHal-Bench", read=read_mmhal, scorer=MMHAL_SCORER,
        hallucination=True, judged=True, source="arXiv 2309.14525",
        files=("response_template.json", "eval_gpt4.py"), max_new_tokens=512,
    ),
    EvaluationSet(
        name="mmstar", title="MMStar", read=read_mmstar, scorer=MMSTAR_SCORER,
        source="arXiv 2403.20330", files=("[mM][mM][sS]tar*.*",),
    ),
    EvaluationSet(
        name="realworldqa", title="RealWorldQA", read=read_real_world_qa,
        scorer=REAL_WORLD_QA_SCORER, source="xAI, 2024; open answers as lmms-eval", files=(),
    ),
    EvaluationSet(
        name="mmmu", title="MMMU", read=read_mmmu, scorer=MMMU_SCORER,
        source="arXiv 2311.16502, validation; an unread option is wrong, not drawn at random",
        files=("Accounting/validation-*.parquet",),
    ),
    EvaluationSet(
        name="mm-vet-v2", title="MM-Vet v2", read=read_mm_vet_v2, scorer=MM_VET_V2_SCORER,
        source="arXiv 2408.00765", files=("mm-vet-v2.json",), max_new_tokens=512, judged=True,
    ),
    EvaluationSet(
        name="mm-vet", title="MM-Vet", read=_llava(read_mm_vet), scorer=MEAN_SCORER,
        source="arXiv 2308.02490", files=("mm-vet.json",), max_new_tokens=512, judged=True,
    ),
    EvaluationSet(
        name="llava-bench", title="LLaVA-Bench", read=_llava(read_llava_bench),
        scorer=LLAVA_BENCH_SCORER, source="arXiv 2304.08485", files=("answers_gpt4.jsonl",),
        max_new_tokens=512, judged=True,
    ),
    EvaluationSet(
        name="mme", title="MME", read=_llava(read_mme), scorer=GROUP_SCORER,
        source="arXiv 2306.13394; accuracy+ and accuracy of all tasks",
        files=("existence/", "color/", "count/"),
    ),
    EvaluationSet(
        name="mmbench", title="MMBench", read=_mmbench, scorer=GROUP_SCORER,
        source="arXiv 2307.06281, CircularEval", files=("*[mM][mM][bB]ench*.tsv",),
    ),
    EvaluationSet(
        name="seed-bench", title="SEED-Bench", read=_llava(read_seed_bench), scorer=MEAN_SCORER,
        source="arXiv 2307.16125", files=("SEED-Bench*.json",),
    ),
    EvaluationSet(
        name="scienceqa", title="ScienceQA", read=_llava(partial(read_science_qa)),
        scorer=MEAN_SCORER, source="arXiv 2209.09513", files=("problems.json", "pid_splits.json"),
    ),
    EvaluationSet(
        name="textvqa", title="TextVQA", read=_llava(read_textvqa), scorer=MEAN_SCORER,
        source="arXiv 1904.08920", files=("TextVQA_*.json",),
    ),
    EvaluationSet(
        name="gqa", title="GQA", read=_llava(read_gqa), scorer=MEAN_SCORER,
        source="arXiv 1902.09506", files=("testdev_balanced_questions.json",),
    ),
    EvaluationSet(
        name="vqav2", title="VQAv2", read=_llava(read_vqav2), scorer=MEAN_SCORER,
        source="arXiv 1612.00837", files=("v2_OpenEnded_*_questions.json",),
    ),
    EvaluationSet(
        name="vizwiz", title="VizWiz", read=_llava(read_vizwiz), scorer=MEAN_SCORER,
        source="arXiv 1802.08218", files=(),
    ),
)  # fmt: skip

SETS: Mapping[str, EvaluationSet] = {each.name: each for each in _LIST}
"""All evaluation sets by name."""
SUITES: Mapping[str, tuple[str, ...]] = {
    "hallucination": tuple(SETS),
}
"""Sets by suite: for the question whether a model makes fewer things up, and loses nothing."""
_DEPTH = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundSet:
    """A set whose published files lie in a folder."""

    set: EvaluationSet
    folder: Path


def find_sets(source: Path, *, suite: str) -> list[FoundSet]:
    """The sets of a suite whose files lie in a folder, its subfolders or theirs.

    Raises:
        TitaError: the suite or the folder does not exist, there are no sets, or a set lies there
            twice.
    """
    if suite not in SUITES:
        raise TitaError(f"no suite {suite!r}", remedy=f"choose one of {', '.join(SUITES)}")
    if not source.is_dir():
        raise TitaError("no such folder", where=str(source), remedy="check --source")
    folders = _below(source)
    found = []
    for name in SUITES[suite]:
        named = [folder for folder in folders if _plain(folder.name) == _plain(name)]
        # The outermost folder of the set's name or what has the files in it, else all that do.
        own = _below(named[0]) if named else folders
        matching = [folder for folder in own if _has_files(folder, SETS[name].files)]
        if named:
            matching = (matching or named)[:1]
        if len(matching) > 1:
            places = ", ".join(str(folder.relative_to(source)) for folder in matching)
            raise TitaError(
                f"{SETS[name].title} lies in several folders ({places})",
                where=str(source),
                remedy="keep one of them",
            )
        found += [FoundSet(set=SETS[name], folder=folder) for folder in matching]
    if not found:
        raise TitaError(
            "no files of a known set in the folder or two levels below",
            where=str(source),
            remedy=f"known are {', '.join(SUITES[suite])}; docs/benchmark.md lists their files",
        )
    return found


def _below(root: Path) -> list[Path]:
    """A folder, its subfolders and theirs."""
    folders = level = [root]
    for _ in range(_DEPTH):
        level = [path for folder in level for path in sorted(folder.iterdir()) if path.is_dir()]
        folders = folders + level
    return folders


def _plain(name: str) -> str:
    """A name without case and separators: MM-Vet_v2 is mmvetv2."""
    return "".join(letter for letter in name.lower() if letter.isalnum())


def _has_files(folder: Path, patterns: tuple[str, ...]) -> bool:
    """Whether each pattern has a file, or with a slash at its end a folder."""
    return bool(patterns) and all(
        any(
            path.is_dir() if pattern.endswith("/") else path.is_file()
            for path in folder.glob(pattern)
        )
        for pattern in patterns
    )
