"""Questions and images by name: a path here, or a place in the store."""

from pathlib import Path

from tita.errors import TitaError

_LOCAL = ("/", "./", "../", "~")


def local_path(where: str) -> Path:
    """A local path for `where`; what lies in the store is fetched and verified first.

    Raises:
        TitaError: it is neither here nor in the store.
    """
    if where.startswith(_LOCAL):
        return Path(where).expanduser()
    from tita.storage import open_store, resolve

    return resolve(where, store=open_store())


def question_file(where: str) -> Path:
    """The question file that `where` names: a file, or a folder that holds just one.

    Raises:
        TitaError: there is none, or several.
    """
    path = local_path(where)
    if not path.is_dir():
        return path
    found = sorted(path.glob("*.jsonl"))
    if len(found) == 1:
        return found[0]
    names = ", ".join(file.name for file in found) or "none"
    raise TitaError(
        f"a folder with not just one .jsonl file ({names})",
        where=where,
        remedy="name the question file",
    )


def report_folder(out: Path | None, *, where: str, folder: Path) -> Path:
    """Where a report on the results in `folder` is written.

    Raises:
        TitaError: the results lie in the store, whose trees never change, and `out` is missing.
    """
    if out is None:
        if where.startswith(_LOCAL) or folder == Path(where):
            return folder
        raise TitaError(
            "the results lie in the store", where=where, remedy="give --out for the report"
        )
    out.mkdir(parents=True, exist_ok=True)
    return out


def results_path(out: Path) -> Path:
    """`out`, if a results file can grow there.

    Raises:
        TitaError: it names the store, where nothing can be appended.
    """
    if str(out).startswith("s3:/"):
        raise TitaError(
            "a results file grows line by line, which the store cannot do",
            where=str(out),
            remedy="name a local file; `tita-bench eval --publish` puts it into the store",
        )
    return out


def image_folder(images: str | None, *, questions: Path) -> Path:
    """The folder of images: where `images` says, else beside the question file."""
    return questions.parent if images is None else local_path(images)
