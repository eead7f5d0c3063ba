"""Questions and images by name: a path here, or a place in the store."""

from pathlib import Path

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


def image_folder(images: str | None, *, questions: Path) -> Path:
    """The folder of images: where `images` says, else beside the question file."""
    return questions.parent if images is None else local_path(images)
