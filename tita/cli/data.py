"""`tita data`: datasets, and any other trees, to and from the store."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tita.cli.app import new_app
from tita.cli.infer import AspectOption, ImageAspect
from tita.terminal import Output, emit, say

if TYPE_CHECKING:
    from tita.data.validate import Tally
    from tita.errors import TitaError
    from tita.storage import Manifest

app = new_app("Validate, push, pull and list datasets and other trees in the store.")

StoreUri = Annotated[
    str | None,
    typer.Option(help="Store: s3://bucket/prefix or a directory; defaults to TITA_STORE."),
]
Form = Annotated[Output, typer.Option("-o", "--output", help="Output format.")]
Tree = Annotated[
    str, typer.Argument(help="Name of the tree in the store, for example data/ocrvqa.")
]


@app.command()
def validate(
    path: Annotated[Path, typer.Argument(help="A JSONL or Parquet file, or a folder with some.")],
    images: Annotated[
        Path | None, typer.Option(help="What image paths start from; the folder if not given.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Look also for rows that are too long for this model.")
    ] = None,
    max_length: Annotated[
        int | None, typer.Option(min=1, help="Tokens of a row; the model's context if not given.")
    ] = None,
    image_aspect: AspectOption = ImageAspect.AUTO,
    output: Form = Output.TABLE,
) -> None:
    """Name every fault of questions, pairs and images; exit code 2 if there are any."""
    from tita.data.validate import Tally, find_faults
    from tita.errors import TitaError
    from tita.terminal import progress

    if not path.exists():
        raise TitaError("no such file or folder", where=str(path), remedy="check the path")
    for option, given in (
        ("--max-length", max_length),
        ("--image-aspect", image_aspect != ImageAspect.AUTO),
    ):
        if given and not model:
            raise TitaError("says nothing without a model", where=option, remedy="add --model")
    limit = None
    if model:
        from tita.data.validate import limit_of

        limit = limit_of(model, max_length=max_length, image_aspect=image_aspect.value)
    root = images or (path if path.is_dir() else path.parent)
    tally = Tally()
    kept: list[TitaError] = []
    # A live bar takes over the name `sys.stdout`; a result goes where it was meant to go.
    out = sys.stdout
    with progress("looking at", total=None, unit="rows") as advance:
        for fault in find_faults(path, images=root, tally=tally, limit=limit, advance=advance):
            if output is Output.TABLE:
                print(fault, file=out)
            elif len(kept) < _MAX_FAULTS_KEPT:
                kept.append(fault)
    _report(tally, kept, output=output)
    if tally.num_faults:
        raise typer.Exit(2)


_MAX_FAULTS_KEPT = 10_000
"""A JSON document is written as a whole; all faults are counted, so many are in it."""


def _report(tally: "Tally", faults: "list[TitaError]", *, output: Output) -> None:
    if output is not Output.TABLE:
        emit(
            {
                "num_questions": tally.num_questions,
                "num_pairs": tally.num_pairs,
                "num_images": tally.num_images,
                "longest": tally.longest or None,
                "num_faults": tally.num_faults,
                "kinds": dict(tally.faults.most_common()),
                "faults": [
                    {"where": fault.where, "what": fault.what, "remedy": fault.remedy}
                    for fault in faults
                ],
            },
            output=output,
        )
    if len(tally.faults) > 1:
        for kind, number in tally.faults.most_common():
            say(f"{number:>8} x {kind}")
    longest = f", longest {tally.longest} tokens" if tally.longest else ""
    say(
        f"{tally.num_questions} questions, {tally.num_pairs} pairs, {tally.num_images} images"
        f"{longest}, {tally.num_faults} faults"
    )


@app.command()
def push(
    folder: Annotated[Path, typer.Argument(help="A local folder.")],
    tree: Tree,
    store: StoreUri = None,
    output: Form = Output.TABLE,
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
    output: Form = Output.TABLE,
) -> None:
    """Download a tree, verify every file, and print its path. Existing files are not downloaded."""
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
    output: Form = Output.TABLE,
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
