"""Options that choose the inference engine, for the commands that run models. Imports no torch."""

from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tita.errors import TitaError

if TYPE_CHECKING:
    from tita.engine.engine_options import VllmOptions


class EngineChoice(StrEnum):
    """Inference engines."""

    TRANSFORMERS = "transformers"
    VLLM = "vllm"


EngineOption = Annotated[
    EngineChoice, typer.Option(help="Inference engine; vllm requires the extra tita[vllm].")
]
TensorParallel = Annotated[
    int, typer.Option(min=1, help="GPUs that each layer is split over; engine vllm.")
]
PipelineParallel = Annotated[
    int, typer.Option(min=1, help="Groups of GPUs that the layers are spread over; engine vllm.")
]
NumNodes = Annotated[
    int, typer.Option("--nnodes", min=1, help="Machines that the GPUs are on; engine vllm.")
]
NodeRank = Annotated[
    int,
    typer.Option(min=0, help="Which machine this is; 0 answers requests; engine vllm."),
]
LeaderAddress = Annotated[
    str, typer.Option("--master-addr", help="Address of machine 0; engine vllm.")
]
LeaderPort = Annotated[
    int, typer.Option("--master-port", min=1, max=65535, help="Port of machine 0; engine vllm.")
]
MaxModelLen = Annotated[
    int | None,
    typer.Option(
        min=2, help="Maximum tokens of prompt and answer; engine vllm; default: the models'."
    ),
]
MemoryShare = Annotated[
    float,
    typer.Option(
        min=0.01, max=1, help="Fraction of GPU memory for weights and KV cache; engine vllm."
    ),
]
EnforceEager = Annotated[
    bool, typer.Option("--enforce-eager", help="Do not compile the models; engine vllm.")
]

_DEFAULTS: dict[str, Any] = {
    "tensor_parallel_size": 1,
    "pipeline_parallel_size": 1,
    "nnodes": 1,
    "node_rank": 0,
    "master_addr": "",
    "master_port": 29501,
    "max_model_len": None,
    "gpu_memory_utilization": 0.9,
    "enforce_eager": False,
}


def vllm_options(engine: EngineChoice, *, dtype: str, **given: Any) -> "VllmOptions":
    """The options of vLLM as they were given, by the names of their command line options.

    Raises:
        TitaError: one was given, and the engine is another.
    """
    from tita.engine.engine_options import VllmOptions

    if engine is not EngineChoice.VLLM:
        for name, value in given.items():
            if value != _DEFAULTS[name]:
                option = f"--{name.replace('_', '-')}"
                raise TitaError(f"{option} without --engine vllm", remedy="give --engine vllm")
    return VllmOptions(
        dtype=dtype,
        tensor_parallel=given.get("tensor_parallel_size", 1),
        pipeline_parallel=given.get("pipeline_parallel_size", 1),
        num_nodes=given.get("nnodes", 1),
        node_rank=given.get("node_rank", 0),
        leader_address=given.get("master_addr", ""),
        leader_port=given.get("master_port", 29501),
        max_model_len=given.get("max_model_len"),
        memory_share=given.get("gpu_memory_utilization", 0.9),
        compile=not given.get("enforce_eager", False),
    )
