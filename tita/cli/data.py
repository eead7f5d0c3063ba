"""`tita data`: datasets, and any other trees, to and from the store."""

import sys
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tita.cli.app import IgnoreColumn, OutputFormat, StoreUri, new_app
from tita.cli.infer import AspectOption, ImageAspect
from tita.terminal import Output, counted, emit, say

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tita.data.validate import ValidationSummary
    from tita.errors import TitaError
    from tita.storage import Manifest
    from tita.storage.store import UnusedContent

app = new_app("Validate datasets; push, pull and list trees in the store.")

Tree = Annotated[
    str,
    typer.Argument(
        help="Name of the tree in the store, for example data/ocrvqa; or s3://bucket/data/ocrvqa."
    ),
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
    """Report the errors of every row and image of a dataset. Exits with code 2 if there are any.

    Of pairs it also says how well chosen and rejected are told apart without the image.
    """
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
    from tita.data.shortcuts import measure_shortcuts

    shortcuts = measure_shortcuts(summary.pairs.pairs)
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
                "shortcuts": shortcuts and shortcuts.as_json(),
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
    if shortcuts is not None:
        shortcuts.report()
    longest = f", longest {summary.longest} tokens" if summary.longest else ""
    say(
        f"{counted(summary.num_questions, 'question')}, {counted(summary.num_pairs, 'pair')}, "
        f"{counted(summary.num_images, 'image')}{longest}, {counted(summary.num_errors, 'error')}"
    )


_SHARD_MIB = 256
_MAX_REMOVED = 0.5
"""Share of a tree's files that a push may remove without `--delete`."""


@app.command()
def push(
    folder: Annotated[Path, typer.Argument(help="A local folder.")],
    tree: Tree,
    store: StoreUri = None,
    delete: Annotated[
        bool,
        typer.Option("--delete", help="Allow the push to remove more than half of the files."),
    ] = False,
    verify: Annotated[
        bool,
        typer.Option("--verify", help="Read all content in the store and replace damaged files."),
    ] = False,
    shard: Annotated[
        bool,
        typer.Option("--shard", help="Pack images into WebDataset shards; other files stay files."),
    ] = False,
    shard_mib: Annotated[
        int | None,
        typer.Option(
            min=1,
            help=f"Maximum size of a shard in MiB; 64 to 256 suit most. [default: {_SHARD_MIB}]",
            show_default=False,
        ),
    ] = None,
    output: OutputFormat = Output.TABLE,
) -> None:
    """Copy a folder to the store and print its digest. The tree becomes visible when complete."""
    from tita.errors import TitaError
    from tita.storage.image_shards import describe_folder, num_packed
    from tita.storage.locate import split_name
    from tita.storage.sharded_push import push_in_shards

    if shard_mib is not None and not shard:
        raise TitaError("has no effect without shards", where="--shard-mib", remedy="add --shard")
    opened, name = split_name(tree, store=store)
    share = 1.0 if delete else _MAX_REMOVED
    if shard:
        manifest = push_in_shards(
            opened,
            folder,
            name,
            shard_bytes=(shard_mib or _SHARD_MIB) << 20,
            max_removed=share,
            verify=verify,
        )
    else:
        meta = describe_folder(folder)
        manifest = opened.push_tree(folder, name, meta=meta, max_removed=share, verify=verify)
    packed = f" with {num_packed(manifest)} images in shards" if shard else ""
    say(f"{len(manifest.files)} files{packed}, {manifest.size_bytes} bytes in {opened.uri}/{name}")
    if output is Output.TABLE:
        print(manifest.digest)
    else:
        emit(_tree_row(name, manifest), output=output)


_MAX_NAMED = 3
"""Number of files that a message names."""


@app.command()
def pull(
    tree: Tree,
    into: Annotated[Path, typer.Argument(help="Destination folder; created if it does not exist.")],
    store: StoreUri = None,
    delete: Annotated[
        bool,
        typer.Option(
            "--delete", help="Remove files of earlier pulls that the tree does not have any more."
        ),
    ] = False,
    output: OutputFormat = Output.TABLE,
) -> None:
    """Copy a tree, or a folder of one, verify every file, and print its path.

    A name such as reward/current stands for the tree that it points to. Other files in the folder
    are kept.
    """
    from tita.storage.local_copy import read_record
    from tita.storage.locate import find_tree, split_name

    opened, name = split_name(tree, store=store)
    found, part = find_tree(opened, name)
    path = opened.pull_tree(found, into=into, folder=part)
    record = read_record(path)
    assert record is not None
    _report_outdated(path, [file.path for file in record.outdated], delete=delete)
    if output is Output.TABLE:
        print(path)
        return
    row = {
        "tree": name,
        "files": len(record.files),
        "size_bytes": sum(file.size_bytes for file in record.files),
        "digest": record.digest,
    }
    emit({"path": str(path), **row}, output=output)


def _report_outdated(folder: Path, outdated: list[str], *, delete: bool) -> None:
    from tita.storage.local_copy import remove_outdated

    if not outdated:
        return
    if delete:
        removed, changed = remove_outdated(folder)
        say(f"removed {counted(len(removed), 'file')} of earlier pulls")
        if changed:
            say(f"kept {_some(changed)}, which changed since they were pulled")
    else:
        say(
            f"{counted(len(outdated), 'file')} of earlier pulls stay although the tree does not "
            f"have them: {_some(outdated)}; --delete removes them"
        )


def _some(paths: list[str]) -> str:
    more = len(paths) - _MAX_NAMED
    return ", ".join(paths[:_MAX_NAMED]) + (f" and {more} more" if more > 0 else "")


@app.command("ls")
def list_trees(
    prefix: Annotated[str, typer.Argument(help="Prefix of the names to list.")] = "",
    store: StoreUri = None,
    unused: Annotated[
        bool,
        typer.Option("--unused", help="List what `tita data prune` removes, not the trees."),
    ] = False,
    output: OutputFormat = Output.TABLE,
) -> None:
    """List complete trees with their size and digest."""
    from tita.storage import open_store
    from tita.storage.store import list_trees

    opened = open_store(store)
    if unused:
        found = opened.find_unused(prefix, older_than=timedelta(hours=_PRUNE_HOURS))
        _emit_unused(found, output=output)
        return
    rows = [_tree_row(name, manifest) for name, manifest in list_trees(opened, prefix)]
    if output is Output.TABLE:
        rows = [row | {"digest": row["digest"][:16]} for row in rows]
        if not rows:
            say(f"no trees in {opened.uri}")
    emit(rows, output=output)


_PRUNE_HOURS = 24.0


@app.command()
def prune(
    prefix: Annotated[str, typer.Argument(help="Prefix of the names of the trees.")] = "",
    store: StoreUri = None,
    older_than: Annotated[
        float,
        typer.Option(min=0, max=1e6, help="Hours for which content must not have been in use."),
    ] = _PRUNE_HOURS,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only list what would be removed.")
    ] = False,
    output: OutputFormat = Output.TABLE,
) -> None:
    """Remove content that no tree has any more: of old versions, and of pushes that were killed.

    Use `--older-than 0` only while no push is in progress.
    """
    from tita.storage import open_store

    opened, age = open_store(store), timedelta(hours=older_than)
    act = opened.find_unused if dry_run else opened.prune
    found = act(prefix, older_than=age)
    _emit_unused(found, output=output)
    for state, words in (
        ("recent", f"was used in the last {older_than:g} hours; prune again later"),
        ("changed", "changed meanwhile; prune again"),
    ):
        if names := [one.tree for one in found if one.state == state]:
            say(f"kept unused content of {_some(names)}, which {words}")


def _emit_unused(found: "Sequence[UnusedContent]", *, output: Output) -> None:
    rows = [
        {
            "tree": one.tree,
            "objects": one.num_objects,
            "size_bytes": one.size_bytes,
            "state": one.state.value,
        }
        for one in found
    ]
    if not rows and output is Output.TABLE:
        say("no unused content")
    emit(rows, output=output)


def _tree_row(name: str, manifest: "Manifest") -> dict[str, Any]:
    """One row of the output."""
    return {
        "tree": name,
        "files": len(manifest.files),
        "size_bytes": manifest.size_bytes,
        "digest": manifest.digest,
    }
