"""Noise as a function of seed and position, so that a seed's answer is one and the same.

Choosing argmax(log p + g) with g from the standard Gumbel distribution draws from p (the Gumbel-max
trick, arXiv 1611.01144). With g a function of (seed, position) alone, the draw does not hang on
the batch, on the device, or on how many tokens were drafted.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def gumbel(num_tokens: int, *, seed: int, position: int) -> "Tensor":
    """Standard Gumbel noise[V] of a seed for the token at a position of its answer, on the CPU."""
    import numpy as np
    import torch

    # Philox counts (Salmon et al. 2011): any two of its counters are independent.
    source = np.random.Philox(key=seed % 2**128, counter=[0, 0, 0, position])
    waits = np.random.Generator(source).standard_exponential(num_tokens, dtype=np.float32)
    # Minus the logarithm of an exponential variable is a Gumbel one. Zero would be infinite.
    return torch.from_numpy(np.maximum(waits, np.finfo(np.float32).tiny)).log_().neg_()
