"""Lets vLLM's CPU build run its Triton kernels by Triton's interpreter, slowly.

Triton has no backend for CPUs, and vLLM's CPU build takes Triton only with one. The interpreter
needs none, so the one here is a name. To be imported before vLLM.
"""

import os
from types import SimpleNamespace

os.environ["TRITON_INTERPRET"] = "1"

from triton.backends import backends

inactive = SimpleNamespace(is_active=lambda: False)
backends["cpu"] = SimpleNamespace(driver=inactive, compiler=None)
