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


def image_folder(images: str | None, *, questions: Path) -> Path:
    """The folder of images: where `images` says, else beside the question file."""
    return questions.parent if images is None else local_path(images)
