"""Makes PyPI's torchvision importable beside a CPU build of torch.

PyPI has torchvision for CUDA only. Its C++ operators do not load beside a CPU build of torch, and
importing it fails at two modules that register functions for these operators. Both are emptied. The
rest of it is Python, and all that image processors use.
"""

import importlib.util
from pathlib import Path

found = importlib.util.find_spec("torch")
assert found is not None
assert found.origin is not None
for name in ("_meta_registrations", "_autograd_registrations"):
    module = Path(found.origin).parent.parent / "torchvision" / f"{name}.py"
    module.write_text("# Emptied: its operators do not load beside a CPU build of torch.\n")
