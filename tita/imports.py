"""Imports of large libraries, without the garbage collector."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without_garbage_collection() -> Iterator[None]:
    """Entry points import torch, transformers or matplotlib in this block, which is faster.

    Such libraries create hundreds of thousands of objects that live as long as the process. The
    collector would go through all of them again and again, also when the process ends, and free
    nothing.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            # It ignores all objects that exist now.
            gc.freeze()
            gc.enable()
