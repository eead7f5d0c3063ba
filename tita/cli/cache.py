"""`tita cache`: the local copies of trees in S3."""

from typing import Annotated

import typer

from tita.cli.app import OutputFormat, new_app
from tita.terminal import Output, counted, emit, say

app = new_app("List and prune the local cache of datasets and models in S3.")


@app.command("list")
def list_trees(output: OutputFormat = Output.TABLE) -> None:
    """List trees in TITA_CACHE_DIR, least recently used first."""
    from tita.storage.cache import TreeCache

    cache = TreeCache.from_settings()
    rows = [
        {
            "tree": tree.origin or tree.digest[:16],
            "digest": tree.digest,
            "size_bytes": tree.size_bytes,
            "used": tree.used.isoformat(timespec="seconds"),
            "in_use": tree.in_use,
        }
        for tree in cache.trees()
    ]
    if output is Output.TABLE:
        rows = [row | {"digest": str(row["digest"])[:16]} for row in rows]
        say(f"{counted(len(rows), 'tree')}, {cache.size_bytes()} bytes on disk in {cache.root}")
    emit(rows, output=output)


@app.command()
def prune(
    keep_gib: Annotated[
        float | None,
        typer.Option(min=0, max=1e9, help="Size to keep, in GiB; default: TITA_CACHE_MAX_GIB."),
    ] = None,
    output: OutputFormat = Output.TABLE,
) -> None:
    """Remove the least recently used trees that are not in use. Print the number of freed bytes."""
    from tita.errors import TitaError
    from tita.settings import settings
    from tita.storage.cache import TreeCache

    keep = settings().cache_max_gib if keep_gib is None else keep_gib
    if keep is None:
        raise TitaError(
            "no size to keep",
            where="--keep-gib",
            remedy="write --keep-gib 20, or 0 to keep only trees in use",
        )
    cache = TreeCache.from_settings()
    freed = cache.prune(cache.size_bytes() - int(keep * 2**30))
    left = cache.size_bytes()
    say(f"freed {freed} bytes, {left} bytes left in {cache.root}")
    if left > keep * 2**30:
        say("the rest is in use or being downloaded; prune again when those processes have ended")
    if output is Output.TABLE:
        print(freed)
    else:
        emit({"freed_bytes": freed, "left_bytes": left}, output=output)
