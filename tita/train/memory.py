"""Estimates the memory that a run needs, from the model's shape alone.

P parameters of b bytes, T of them trained, N processes. By stage, ZeRO partitions across the N
processes: optimizer states (1), gradients (2), weights (3). Mixed precision keeps for each trained
parameter b bytes of gradient and 4 of its fp32 sum, 4 of an fp32 copy, 8 of Adam; in float32 there
is no second gradient. With b = 2 and T = P this is DeepSpeed's own `2 P + 18 P / N` for stage 2,
and for stage 3 its `18 P / N` plus the largest layer, with 20 in place of 18: the same gradients as
in stage 2. With offloading the largest layer stays, and hosts hold 1.5 times the rest.
https://deepspeed.readthedocs.io/en/latest/memory.html

Activations of one layer are 34 s B h bytes in 16 bits (s tokens, B sequences, width h), without
attention matrices, which only eager attention keeps: 5 a s^2 B more for a heads. Checkpointing
keeps 2 s B h of each layer and one layer whole (arXiv 2205.05198, section 4).

With 4-bit weights a parameter of the language model's layers takes 4.127 bits (QLoRA, arXiv
2305.14314, section 3), and one layer at a time is unpacked.

Logits, V for each of s B tokens, are never materialised as a whole: TRL multiplies by the head in
tiles of 4,096 tokens and 32,768 vocabulary entries, forward and again backward
(`trl.kernels.ChunkedLogProbFunction`), and the reference's log-probabilities are precomputed. The
sums over the tiles are in fp32: the gradients of the hidden states, 4 s B h bytes, and of a trained
head, 4 V h.
"""

from dataclasses import dataclass
from typing import Any

import torch

from tita.jobspec import deepspeed_config
from tita.recipes import LoraRecipe, TrainRecipe

_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
_BITS_PACKED = 4.127
"""Bits of a 4-bit parameter with its quantization constants."""
_HOST_BUFFERS = 1.5
"""DeepSpeed's `additional_buffer_factor`."""
_LOCAL_CHECKPOINTS = 3
"""Checkpoints on the scratch disk: one uploading, one queued, one being written."""
_STAGES = "zero2", "zero3", "zero3_offload"
"""Files in `jobs/deepspeed`, from the one that needs most memory."""
_TILE = 4096, 32768
"""Maximum tokens and vocabulary entries of the logits that TRL computes at once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """The sizes of a model that determine its memory."""

    num_parameters: int
    num_trained: int
    largest_layer: int
    """Parameters of the largest single module, without its submodules."""
    layers: tuple[tuple[int, int, int], ...]
    """Layers, width and heads of each stack that gradients pass through; language model first."""
    vocabulary: int
    """Size of the head's vocabulary."""
    trains_head: bool
    num_quantizable: int = 0
    """Parameters in the linear layers of the language model, without its head."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorldSize:
    """The number of processes that share the work."""

    total: int
    local: int
    """Processes of one node."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryEstimate:
    """Bytes that one process needs on its device, and one node in addition."""

    weights: int
    states: int
    """Gradients, fp32 copies and Adam's two moments."""
    activations: int
    host: int
    """Offloaded to the node's memory."""
    scratch: int
    """Disk: checkpoints until they are uploaded, and the final model."""

    @property
    def certain(self) -> int:
        """The minimum; activations are estimated to within a factor of two."""
        return self.weights + self.states + self.activations // 2

    @property
    def device(self) -> int:
        return self.weights + self.states + self.activations


def model_shape(model: Any) -> ModelShape:
    """The sizes of `model`, which may be on the meta device."""
    config: Any = model.config
    text = config.get_text_config()
    stacks = [_stack(text)]
    vision = getattr(config, "vision_config", None)
    # Image tokens count as text tokens: a tower gets no more of them than the language model.
    if vision is not None and any(
        p.requires_grad for name, p in model.named_parameters() if "vis" in name
    ):
        stacks.append(_stack(vision))
    return ModelShape(
        num_parameters=sum(p.numel() for p in model.parameters()),
        num_trained=sum(p.numel() for p in model.parameters() if p.requires_grad),
        largest_layer=max(
            sum(p.numel() for p in m.parameters(recurse=False)) for m in model.modules()
        ),
        layers=tuple(stacks),
        vocabulary=int(text.vocab_size),
        trains_head=any(p.requires_grad for p in model.get_output_embeddings().parameters()),
        num_quantizable=sum(
            module.weight.numel()
            for name, module in model.get_decoder().named_modules()
            if isinstance(module, torch.nn.Linear) and "lora_" not in name
        ),
    )


def _stack(config: Any) -> tuple[int, int, int]:
    def first(*names: str) -> int:
        return next((int(v) for n in names if isinstance(v := getattr(config, n, None), int)), 0)

    return (
        first("num_hidden_layers", "depth"),
        first("hidden_size", "embed_dim"),
        first("num_attention_heads", "num_heads"),
    )


def estimate_memory(
    recipe: TrainRecipe, *, shape: ModelShape, world: WorldSize, tokens: int
) -> MemoryEstimate:
    """The memory that this recipe needs for a model of `shape` and sequences of `tokens` tokens."""
    zero = deepspeed_config(recipe.deepspeed)["zero_optimization"]
    stage, size, trained = int(zero["stage"]), _BYTES[recipe.dtype], shape.num_trained
    gradients = trained * (size + (4 if size < 4 else 0))
    optimizer = trained * 12
    weights = whole = shape.num_parameters * size
    if recipe.quantization is not None:
        packed = int(shape.num_quantizable * _BITS_PACKED / 8)
        weights += packed + (shape.largest_layer - shape.num_quantizable) * size
    layer = 2 * shape.largest_layer * size
    device = {
        "weights": weights // world.total + layer if stage >= 3 else weights,
        "states": gradients // (world.total if stage >= 2 else 1)
        + optimizer // (world.total if stage >= 1 else 1),
    }
    host = 0.0
    share = world.local / world.total
    if "offload_optimizer" in zero:
        host += _HOST_BUFFERS * share * (gradients + optimizer)
        device["states"] = 0
    if "offload_param" in zero:
        host += _HOST_BUFFERS * share * weights
        device["weights"] = layer
    saved = trained * size if recipe.lora else whole
    checkpoint = 2 * saved + int(optimizer * share)
    return MemoryEstimate(
        **device,
        activations=_activations(recipe, shape=shape, tokens=tokens),
        host=int(host),
        scratch=_LOCAL_CHECKPOINTS * checkpoint + whole,
    )


def _activations(recipe: TrainRecipe, *, shape: ModelShape, tokens: int) -> int:
    sequences, total = _num_sequences(recipe), 0.0
    for layers, width, heads in shape.layers:
        whole = 34.0 * tokens * sequences * width
        if recipe.attention == "eager":
            whole += 5.0 * heads * tokens**2 * sequences
        kept = 2.0 * tokens * sequences * width if recipe.gradient_checkpointing else whole
        total += layers * kept + whole * recipe.gradient_checkpointing
    return int(total * _BYTES[recipe.dtype] / 2) + _head(recipe, shape=shape, tokens=tokens)


def _num_sequences(recipe: TrainRecipe) -> int:
    """Sequences in a forward pass: both answers of each pair, and one under another image."""
    preference = recipe.image_preference
    return (3 if preference is not None and preference.weight else 2) * recipe.batch_size


def _head(recipe: TrainRecipe, *, shape: ModelShape, tokens: int) -> int:
    """Memory of the logits, which are computed in tiles."""
    number, width = _num_sequences(recipe) * tokens, shape.layers[0][1]
    tile = min(number, _TILE[0]) * min(shape.vocabulary, _TILE[1]) * _BYTES[recipe.dtype]
    return tile + 4 * width * (number + shape.vocabulary * shape.trains_head)


def cheaper_recipes(recipe: TrainRecipe) -> list[tuple[str, TrainRecipe]]:
    """Recipes that need less memory and the `--set` options for them.

    First each change alone, the one that costs least speed first; then they accumulate. Empty if
    there is nothing left to change.
    """
    steps: list[dict[str, Any]] = []
    if not recipe.gradient_checkpointing:
        steps.append({"gradient_checkpointing": True})
    batch, rounds = recipe.batch_size, recipe.gradient_accumulation
    while batch > 1 and batch % 2 == 0:
        # Equal pairs per step, so the training is equivalent.
        batch, rounds = batch // 2, rounds * 2
        steps.append({"batch_size": batch, "gradient_accumulation": rounds})
    if recipe.quantization is None:
        own = _STAGES.index(recipe.deepspeed) if recipe.deepspeed in _STAGES else 0
        steps += [{"deepspeed": name} for name in _STAGES[own + 1 :]]
    lora = {} if recipe.lora is not None else {"lora": LoraRecipe()}
    if lora:
        steps.append(lora)
    if recipe.quantization is None and recipe.dtype == "bfloat16":
        steps.append({**lora, "deepspeed": "zero2", "quantization": "4bit"})
    tried = [(_set_options(change), recipe.model_copy(update=change)) for change in steps]
    combined: dict[str, Any] = {}
    for change in steps:
        combined |= change
        tried.append((_set_options(combined), recipe.model_copy(update=combined)))
    return tried


def _set_options(change: dict[str, Any]) -> str:
    return " ".join(
        f"--set lora.rank={value.rank}"
        if isinstance(value, LoraRecipe)
        else f"--set {key}={str(value).lower()}"
        for key, value in change.items()
    )
