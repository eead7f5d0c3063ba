"""Which errors of collectives are another rank's end."""

import pytest
from torch.distributed import DistBackendError

from tita.train.preemption import is_lost_peer


@pytest.mark.parametrize(
    ("words", "lost"),
    [
        ("NCCL communicator was aborted on rank 1.", True),
        ("NCCL error in: x.cpp:1, remote process exited or there was a network error", True),
        ("NCCL error: unhandled system error (run with NCCL_DEBUG=INFO)", True),
        ("NCCL error: ncclInternalError: Bootstrap : no socket interface found", False),
        ("NCCL error: ncclInvalidUsage: Duplicate GPU detected : rank 0 and rank 1", False),
        ("NCCL error: ncclSystemError: failed to extend /dev/shm/nccl-x: No space left", False),
        ("NCCL error: ncclUnhandledCudaError: Call to CUDA function failed.", False),
    ],
)
def test_what_is_wrong_on_this_node_is_no_lost_peer(words: str, lost: bool) -> None:
    """A lost peer's code is tried again without counting, for ever."""
    assert is_lost_peer(DistBackendError(words)) == lost
    assert not is_lost_peer(ValueError(words))
