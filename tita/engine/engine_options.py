"""Which engine answers, and how vLLM runs the models. Imports no torch."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from tita.errors import TitaError

EngineName = Literal["transformers", "vllm"]
ADAPTERS_PER_REQUEST: Mapping[EngineName, int | None] = MappingProxyType(
    # vLLM's requests have one adapter, and the models of a request run in one pass.
    {"transformers": None, "vllm": 1}
)
"""Maximum number of LoRA adapters of one model that one request may use, if there is one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VllmOptions:
    """How vLLM runs the models.

    Raises:
        TitaError: a value is out of range.
    """

    dtype: str = "auto"
    """Weight dtype of all models; `auto` is the base checkpoint's."""
    max_batch: int = 256
    """Maximum number of running requests."""
    max_model_len: int | None = None
    """Maximum number of tokens of prompt and answer together; the smallest model's if not given."""
    prefill_tokens: int | None = None
    """Maximum number of tokens per step; vLLM's default if not given."""
    tensor_parallel: int = 1
    """GPUs that each layer is split over."""
    pipeline_parallel: int = 1
    """Groups of GPUs that the layers are distributed over."""
    num_nodes: int = 1
    """Machines that the GPUs are distributed over, each with the same number of them."""
    node_rank: int = 0
    """Which of these machines this is; requests are answered on machine 0."""
    leader_address: str = ""
    """Host name or address of machine 0, if there are several."""
    leader_port: int = 29501
    """Port of machine 0 at which they find each other."""
    memory_share: float = 0.9
    """Fraction of a GPU's memory for weights and KV cache."""
    kv_cache_bytes: int | None = None
    """Size of the KV cache; what `memory_share` leaves if not given."""
    block_size: int | None = None
    """Tokens per block of the KV cache; vLLM's default if not given."""
    prefix_cache: bool = True
    """Whether prompts that begin alike share their KV."""
    max_drafts: int = 0
    """Number of tokens that the reward model drafts per step and request; 0 disables drafting."""
    compile: bool = True
    """Whether the models are compiled, and captured as CUDA graphs."""
    processes: bool = True
    """Whether vLLM's engine runs in a process of its own."""

    def __post_init__(self) -> None:
        for name in ("max_batch", "tensor_parallel", "pipeline_parallel", "num_nodes"):
            if getattr(self, name) < 1:
                raise TitaError(f"{name} is {getattr(self, name)}", remedy="give 1 or more")
        if self.max_drafts < 0:
            raise TitaError(f"max_drafts is {self.max_drafts}", remedy="give 0 or more")
        self._check_nodes()
        if not 0 < self.memory_share <= 1:
            raise TitaError(
                f"memory_share is {self.memory_share}", remedy="give more than 0, at most 1"
            )

    def _check_nodes(self) -> None:
        number, gpus = self.num_nodes, self.tensor_parallel * self.pipeline_parallel
        if not 0 <= self.node_rank < number:
            raise TitaError(
                f"node rank {self.node_rank} of {number} nodes",
                remedy=f"give --node-rank 0 to {number - 1}",
            )
        if gpus % number:
            raise TitaError(
                f"{gpus} GPUs cannot be distributed over {number} nodes",
                remedy="the product of --tensor-parallel-size and --pipeline-parallel-size must be "
                "a multiple of --nnodes",
            )
        if number > 1 and not self.leader_address:
            raise TitaError("--nnodes without --master-addr", remedy="give node 0's address")
