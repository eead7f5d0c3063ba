"""Readers of the published files of LLaVA-1.5's evaluation sets (arXiv 2310.03744)."""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path

from tita.bench.items import Item, read_items, write_items
from tita.bench.suites import choice, judged, open_ended, yes_no
from tita.data.dataset import write_image
from tita.errors import TitaError

Reader = Callable[[Path], Iterator[Item]]

SUITES: Mapping[str, Reader] = {
    "gqa": open_ended.read_gqa,
    "llava-bench": judged.read_llava_bench,
    "mm-vet": judged.read_mm_vet,
    "mme": yes_no.read_mme,
    "pope": yes_no.read_pope,
    "scienceqa": choice.read_science_qa,
    "seed-bench": choice.read_seed_bench,
    "textvqa": open_ended.read_textvqa,
    "vizwiz": open_ended.read_vizwiz,
    "vqav2": open_ended.read_vqav2,
}
"""MMBench is the eleventh; its reader also writes images, so it stands apart."""


def suite_names() -> list[str]:
    """Names of all sets, sorted."""
    return sorted([*SUITES, "mmbench"])


def prepare(suite: str, *, source: Path, out: Path) -> int:
    """Turn the published files of a set into our question file; returns the number of questions.

    Args:
        suite: one of `suite_names`; or `unpack`, for any questions with images inside their rows.
        source: folder of the published files; for `unpack` a file or folder of questions.
        out: question file to write. MMBench's and unpacked images go beside it; for the others
            image paths are those of the published images.

    Raises:
        TitaError: an unknown set, a file that is missing, or a record that does not fit.
    """
    if not (source.is_dir() or (suite == "unpack" and source.is_file())):
        raise TitaError("no such folder", where=str(source), remedy="check --source")
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        if suite == "unpack":
            unpack = partial(write_image, into=out.parent)
            return write_items(out, read_items(source, unpack=unpack))
        if suite == "mmbench":
            return write_items(out, choice.read_mmbench(source, images=out.parent))
        if suite not in SUITES:
            raise TitaError(
                f"no question set {suite!r}",
                remedy=f"choose one of {', '.join(suite_names())}, unpack",
            )
        return write_items(out, SUITES[suite](source))
    except (KeyError, TypeError, AttributeError) as error:
        raise TitaError(
            f"a record does not fit {suite}'s published format ({type(error).__name__}: {error})",
            where=str(source),
        ) from error
