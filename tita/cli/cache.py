"""`tita cache`: what this machine keeps of trees in S3."""

from typing import Annotated

import typer

from tita.cli.app import new_app
from tita.terminal import Output, counted, emit, say

app = new_app("List and prune what this machine keeps of datasets and models in S3.")

Form = Annotated[Output, typer.Option("-o", "--output", help="Form of the result.")]


@app.command("list")
def list_trees(output: Form = Output.TABLE) -> None:
    """List trees in TITA_CACHE_DIR, used longest ago first."""
    from tita.storage.cache import TreeCache

    cache = TreeCache.of_settings()
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
        typer.Option(min=0, help="So much may stay; TITA_CACHE_MAX_GIB if not given."),
    ] = None,
    output: Form = Output.TABLE,
) -> None:
    """Remove what was used longest ago; what a process uses stays. Prints the bytes freed."""
    from tita.errors import TitaError
    from tita.settings import settings
    from tita.storage.cache import TreeCache

    keep = settings().cache_max_gib if keep_gib is None else keep_gib
    if keep is None:
        raise TitaError(
            "does not say how much may stay",
            where="--keep-gib",
            remedy="write --keep-gib 20, or 0 for nothing but what is in use",
        )
    cache = TreeCache.of_settings()
    freed = cache.prune(cache.size_bytes() - int(keep * 2**30))
    left = cache.size_bytes()
    say(f"freed {freed} bytes; {left} are left in {cache.root}")
    if left > keep * 2**30:
        say("the rest is in use, or on its way: prune again once those processes have ended")
    if output is Output.TABLE:
        print(freed)
    else:
        emit({"freed_bytes": freed, "left_bytes": left}, output=output)
