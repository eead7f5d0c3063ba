"""`tita data`: datasets, and any other trees, to and from the store."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tita.cli.app import IgnoreColumn, OutputFormat, StoreUri, new_app
from tita.cli.infer import AspectOption, ImageAspect
from tita.terminal import Output, emit, say

if TYPE_CHECKING:
    from tita.data.validate import ValidationSummary
    from tita.errors import TitaError
    from tita.storage import Manifest

app = new_app("Validate datasets; push, pull and list trees in the store.")

Tree = Annotated[
    str, typer.Argument(help="Name of the tree in the store, for example data/ocrvqa.")
]


@app.command()
def validate(
    path: Annotated[
        Path, typer.Argument(help="Dataset file, or a folder with JSONL and Parquet files.")
    ],
    images: Annotated[
        Path | None,
        typer.Option(help="Folder that image paths are relative to; default: the dataset's."),
    ] = None,
    ignore_column: IgnoreColumn = None,
    model: Annotated[
        str | None, typer.Option(help="Also report rows that are too long for this model.")
    ] = None,
    max_length: Annotated[
        int | None,
        typer.Option(min=1, help="Maximum tokens per row; default: the model's context length."),
    ] = None,
    image_aspect: AspectOption = ImageAspect.AUTO,
    output: OutputFormat = Output.TABLE,
) -> None:
    """Report the errors of every row and image of a dataset. Exits with code 2 if there are any."""
    from tita.data.validate import ValidationSummary, validate_dataset
    from tita.errors import TitaError
    from tita.terminal import progress

    if not path.exists():
        raise TitaError("no such file or folder", where=str(path), remedy="check the path")
    for option, given in (
        ("--max-length", max_length),
        ("--image-aspect", image_aspect != ImageAspect.AUTO),
    ):
        if given and not model:
            raise TitaError("has no effect without a model", where=option, remedy="add --model")
    limit = None
    if model:
        from tita.data.lengths import load_length_limit

        limit = load_length_limit(model, max_length=max_length, image_aspect=image_aspect.value)
    root = images or (path if path.is_dir() else path.parent)
    summary = ValidationSummary()
    kept: list[TitaError] = []
    # A progress bar redirects `sys.stdout` while it is shown.
    out = sys.stdout
    with progress("validating", total=None, unit="rows") as advance:
        for error in validate_dataset(
            path,
            images=root,
            summary=summary,
            limit=limit,
            ignore=ignore_column or (),
            advance=advance,
        ):
            if output is Output.TABLE:
                print(error, file=out)
            elif len(kept) < _MAX_LISTED_ERRORS:
                kept.append(error)
    _print_summary(summary, kept, output=output)
    if summary.num_errors:
        raise typer.Exit(2)


_MAX_LISTED_ERRORS = 10_000
"""Maximum number of errors in a JSON or YAML result, which is written at once."""


def _print_summary(
    summary: "ValidationSummary", errors: "list[TitaError]", *, output: Output
) -> None:
    if output is not Output.TABLE:
        emit(
            {
                "num_questions": summary.num_questions,
                "num_pairs": summary.num_pairs,
                "num_images": summary.num_images,
                "longest": summary.longest or None,
                "layouts": {
                    str(file): counts.describe() for file, counts in summary.layouts.items()
                },
                "unread": [str(file) for file in summary.unread],
                "num_faults": summary.num_errors,
                "kinds": dict(summary.errors.most_common()),
                "faults": [
                    {"where": error.where, "what": error.what, "remedy": error.remedy}
                    for error in errors
                ],
            },
            output=output,
        )
    for file, counts in summary.layouts.items():
        say(f"{file}: {counts.describe()}")
    for file in summary.unread:
        say(f"{file}: not read as part of a folder; give the file itself")
    if len(summary.errors) > 1:
        for kind, number in summary.errors.most_common():
            say(f"{number:>8} x {kind}")
    longest = f", longest {summary.longest} tokens" if summary.longest else ""
    say(
        f"{summary.num_questions} questions, {summary.num_pairs} pairs, "
        f"{summary.num_images} images{longest}, {summary.num_errors} errors"
    )


@app.command()
def push(
    folder: Annotated[Path, typer.Argument(help="A local folder.")],
    tree: Tree,
    store: StoreUri = None,
    output: OutputFormat = Output.TABLE,
) -> None:
    """Copy a folder to the store and print its digest. The tree becomes visible when complete."""
    from tita.storage import open_store

    opened = open_store(store)
    name = _tree_name(tree)
    manifest = opened.push_tree(folder, name)
    say(f"{len(manifest.files)} files, {manifest.size_bytes} bytes in {opened.uri}/{name}")
    if output is Output.TABLE:
        print(manifest.digest)
    else:
        emit(_tree_row(name, manifest), output=output)


@app.command()
def pull(
    tree: Tree,
    into: Annotated[Path, typer.Argument(help="Destination folder; created if it does not exist.")],
    store: StoreUri = None,
    output: OutputFormat = Output.TABLE,
) -> None:
    """Copy a tree to a folder, verify every file, and print its path. Existing files are kept."""
    from tita.storage import open_store

    opened, name = open_store(store), _tree_name(tree)
    path = opened.pull_tree(name, into=into)
    if output is Output.TABLE:
        print(path)
        return
    manifest = opened.read_manifest(name)
    assert manifest is not None
    emit({"path": str(path), **_tree_row(name, manifest)}, output=output)


@app.command("ls")
def list_trees(
    prefix: Annotated[str, typer.Argument(help="Prefix of the names to list.")] = "",
    store: StoreUri = None,
    output: OutputFormat = Output.TABLE,
) -> None:
    """List complete trees with their size and digest."""
    from tita.storage import open_store
    from tita.storage.manifest import MANIFEST

    opened = open_store(store)
    names = [
        info.key.removesuffix(f"/{MANIFEST}")
        for info in opened.list(prefix)
        if info.key.endswith(f"/{MANIFEST}")
    ]
    found = [(name, opened.read_manifest(name)) for name in names]
    rows = [_tree_row(name, manifest) for name, manifest in found if manifest is not None]
    if output is Output.TABLE:
        rows = [row | {"digest": row["digest"][:16]} for row in rows]
        if not rows:
            say("no trees")
    emit(rows, output=output)


def _tree_row(name: str, manifest: "Manifest") -> dict[str, Any]:
    """One row of the output."""
    return {
        "tree": name,
        "files": len(manifest.files),
        "size_bytes": manifest.size_bytes,
        "digest": manifest.digest,
    }


def _tree_name(text: str) -> str:
    from tita.errors import TitaError

    name = text.strip("/")
    if not name:
        raise TitaError("the name of the tree is empty", remedy="write one, such as data/ocrvqa")
    return name
