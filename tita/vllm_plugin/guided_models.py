"""The combined models: base, reward and reference read the same tokens, and logits are combined.

`Guided` is a mixin before one of vLLM's model classes. What is inherited is the base model, with
its own module and weight names, so quantisation and M-RoPE stay as they are; the steering models
are submodules, whose attention layers have KV caches of their own in the same pages.

What vLLM passes between its calls holds all models side by side in the last dimension: embeddings
[T, D], hidden states [T, D], image features [N, D], where D is the sum of the models' widths.

Legend: T tokens, R rows of logits, V tokens of the base's vocabulary, N tokens of an image.
"""

import dataclasses
import math
import sys
from collections.abc import Callable, Iterable
from importlib import import_module
from itertools import accumulate, groupby
from typing import Any

import torch
from torch import Tensor
from vllm.compilation.backends import set_model_tag
from vllm.config import VllmConfig, replace
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from vllm.model_executor.models.module_mapping import MultiModelKeys
from vllm.model_executor.models.utils import (
    WeightsMapper,
    init_vllm_registered_model,
    maybe_prefix,
)
from vllm.sequence import IntermediateTensors
from vllm.transformers_utils.config import get_config

from tita.align.vocabulary import Vocabularies, match_vocabularies
from tita.vllm_plugin.adapter_layers import adapter_mapper, steering_name
from tita.vllm_plugin.choosing import choose_tokens
from tita.vllm_plugin.drafting import DraftedBatch, ImageEmbeddings, NoRequests
from tita.vllm_plugin.families import (
    FAMILIES,
    STEERING_MARK,
    Family,
    draft_name,
    family_of,
    guided_name,
    plain_name,
)
from tita.vllm_plugin.outline import load_outline, models_of
from tita.vllm_plugin.row_table import table_of

FLAT_CLIP = WeightsMapper(
    orig_to_new_prefix={
        f"{start}vision_tower.{name}": f"{start}vision_tower.vision_model.{name}"
        for start in ("", "model.")
        for name in ("embeddings.", "encoder.", "pre_layrnorm.", "post_layernorm.", "head.")
    }
)
"""transformers 5.20 and later write CLIP's weights without `vision_model.`, which vLLM expects."""


class Plain:
    """Mixin: a model alone, which also loads checkpoints that transformers 5 has saved."""

    tita_family: Family

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        if self.tita_family.flat_tower:
            weights = FLAT_CLIP.apply(weights)
        return super().load_weights(weights)  # type: ignore[misc, no-any-return]


class Draft(Plain):
    """Mixin: a reward model that drafts. It sees the images that the combined model's has read."""

    _batch: DraftedBatch | None = None
    _combined: tuple["Guided", ...] = ()

    def follow(self, batch: DraftedBatch, combined: "Guided") -> None:
        """Draft for this batch of the combined model."""
        self._batch = batch
        # Not as a submodule.
        self._combined = (combined,)

    def embed_input_ids(
        self,
        input_ids: Tensor,
        multimodal_embeddings: Any = None,
        *,
        is_multimodal: Tensor | None = None,
    ) -> Tensor:
        """Embed tokens; the first ones of a step with image features, which are the combined's."""
        embedded: Tensor = super().embed_input_ids(input_ids)  # type: ignore[misc]
        if multimodal_embeddings is not None and self._batch is not None:
            (combined,) = self._combined
            self._batch.put_images(embedded, combined.drafter_images)
        return embedded


class Guided(Plain):
    """Mixin: a base model with its steering models as submodules `steering0`, `steering1`, ..."""

    make_empty_intermediate_tensors: Callable[..., IntermediateTensors]

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        model_config = vllm_config.model_config
        drafter: str | None = getattr(model_config.hf_config, "tita_drafter", None)
        if drafter is None and vllm_config.speculative_config is not None:
            raise ValueError(
                "only the reward model drafts; leave speculative_config out, and give tita "
                "--max-drafts"
            )
        super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]
        paths: dict[str, str] = model_config.hf_config.tita_models
        adapters: list[str] = model_config.hf_config.tita_adapters
        self._roles = tuple(paths)
        self._served = [adapters if role in adapters else [role] for role in paths]
        """By steering model: the roles that its logits are those of, depending on the adapter."""
        self._names = [steering_name(n) for n in range(len(paths))]
        self._adapted = next(
            (name for name, role in zip(self._names, paths, strict=True) if role in adapters), None
        )
        # The base may be quantised; the steering models are not.
        plain = replace(vllm_config, quant_config=None) if vllm_config.quant_config else vllm_config
        self._widths = [model_config.hf_text_config.hidden_size]
        self._feature_widths = self._widths
        self.secondary_weights = []
        makers = [self.make_empty_intermediate_tensors]
        for name, path in zip(self._names, paths.values(), strict=True):
            config = get_config(path, trust_remote_code=False)
            self._widths.append(config.get_text_config().hidden_size)
            with set_model_tag(name):
                model = init_vllm_registered_model(
                    plain,
                    prefix=maybe_prefix(prefix, name),
                    hf_config=config,
                    architectures=[plain_name(family_of(config, where=path))],
                )
            setattr(self, name, model)
            makers.append(model.make_empty_intermediate_tensors)
            self.secondary_weights.append(
                DefaultModelLoader.Source(path, revision=None, prefix=f"{name}.")
            )
        self.make_empty_intermediate_tensors = lambda *args, **named: self._join_tensors(
            [make(*args, **named) for make in makers]
        )
        self._table = table_of(vllm_config)
        self._drafter = None if drafter is None else [*paths].index(drafter) + 1
        """Its place among the models."""
        self.drafter_images: ImageEmbeddings | None = None
        """What the reward model that drafts reads of images, in the newest step."""
        if drafter is not None:
            self._table.follow(NoRequests())
        self._vocabularies = _match(model_config.model, paths)
        self._maps = {
            each: self._vocabularies.maps[role]
            for role, served in zip(self._roles, self._served, strict=True)
            for each in served
            if role in self._vocabularies.maps
        }
        for name, role in zip(self._names, self._roles, strict=True):
            vocabulary = self._vocabularies.maps.get(role)
            reads = None if vocabulary is None else torch.tensor(vocabulary.reads)
            self.register_buffer(f"_{name}_reads", reads, persistent=False)  # type: ignore[attr-defined]

    @property
    def _steering(self) -> list[Any]:
        return [getattr(self, name) for name in self._names]

    def _parts(self, together: Tensor, widths: list[int] | None = None) -> list[Tensor]:
        """What belongs to each model, of a tensor[..., D], by the models' widths if not given."""
        widths = widths or self._widths
        return [
            together[..., end - width : end].contiguous()
            for end, width in zip(accumulate(widths), widths, strict=True)
        ]

    def _read(self, input_ids: Tensor | None) -> list[Tensor | None]:
        """The base's token ids as each of the steering models reads them."""
        found: list[Tensor | None] = []
        for name in self._names:
            reads: Tensor | None = getattr(self, f"_{name}_reads")
            if input_ids is None or reads is None:
                found.append(input_ids)
            else:
                known = input_ids.clamp(max=len(reads) - 1)
                found.append(reads[known].to(input_ids.dtype))
        return found

    def embed_multimodal(self, **kwargs: Any) -> list[Tensor]:
        own = {name: each for name, each in kwargs.items() if STEERING_MARK not in name}
        features = [list(super().embed_multimodal(**dict(own)))]  # type: ignore[misc]
        for role, model in zip(self._roles, self._steering, strict=True):
            start = f"{role}{STEERING_MARK}"
            other = {
                name.removeprefix(start): each
                for name, each in kwargs.items()
                if name.startswith(start)
            }
            features.append(list(model.embed_multimodal(**(own | other))))
        # Wider than embeddings where features go into several layers (DeepStack).
        self._feature_widths = [parts[0].shape[-1] for parts in features]
        return [torch.cat(parts, dim=-1) for parts in zip(*features, strict=True)]

    def embed_input_ids(
        self,
        input_ids: Tensor,
        multimodal_embeddings: Any = None,
        *,
        is_multimodal: Tensor | None = None,
    ) -> Tensor:
        parts: list[Any] = [multimodal_embeddings] * len(self._widths)
        if multimodal_embeddings is not None:
            split = [self._parts(each, self._feature_widths) for each in multimodal_embeddings]
            parts = [[each[n] for each in split] for n in range(len(self._widths))]
        embedded = [
            super().embed_input_ids(  # type: ignore[misc]
                input_ids, parts[0], is_multimodal=is_multimodal
            )
        ]
        read = self._read(input_ids)
        embedded += [
            model.embed_input_ids(ids, part, is_multimodal=is_multimodal)
            for model, ids, part in zip(self._steering, read, parts[1:], strict=True)
        ]
        if self._drafter is not None and is_multimodal is not None:
            places = is_multimodal.nonzero()[:, 0].cpu()
            own = embedded[self._drafter]
            self.drafter_images = ImageEmbeddings(places, own[places.to(own.device)])
        return torch.cat(embedded, dim=-1)

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor | IntermediateTensors:
        number = len(self._widths)
        embeds: list[Any] = [None] * number
        between: list[Any] = [None] * number
        if intermediate_tensors is not None:
            between = self._part_tensors(intermediate_tensors)
        elif inputs_embeds is not None:
            embeds = self._parts(inputs_embeds)
        hidden = [
            super().forward(  # type: ignore[misc]
                input_ids, positions, between[0], embeds[0], **kwargs
            )
        ]
        read = self._read(input_ids)
        for n, model in enumerate(self._steering):
            hidden.append(model(read[n], positions, between[n + 1], embeds[n + 1], **kwargs))
        if isinstance(hidden[0], IntermediateTensors):
            return self._join_tensors(hidden)
        return torch.cat(hidden, dim=-1)

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        parts = self._parts(hidden_states)
        base = super().compute_logits(parts[0])  # type: ignore[misc]
        steering = [
            model.compute_logits(part)
            for model, part in zip(self._steering, parts[1:], strict=True)
        ]
        if base is None:  # not the rank of tensor parallelism that has logits
            return None
        logits = {"base": self._fit("base", base)}
        for role, served, theirs in zip(self._roles, self._served, steering, strict=True):
            logits |= dict.fromkeys(served, self._fit(role, theirs))
        rows = self._table.rows(len(base))
        found = choose_tokens(rows, logits, vocabularies=self._maps)
        num_padding = base.shape[-1] - found.shape[-1]
        return torch.nn.functional.pad(found, (0, num_padding), value=-math.inf)

    def _fit(self, role: str, logits: Tensor) -> Tensor:
        """A model's logits over the tokens that are sampled from, float32."""
        if vocabulary := self._vocabularies.maps.get(role):
            return vocabulary.project(logits)
        return logits.float()[..., : self._vocabularies.width]

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        loaded: set[str] = set()

        def model_of(named: tuple[str, Tensor]) -> str | None:
            start = named[0].partition(".")[0]
            return start if start in self._names else None

        for name, group in groupby(weights, key=model_of):
            if name is None:
                loaded |= super().load_weights(group)
                continue
            own = ((key.removeprefix(f"{name}."), tensor) for key, tensor in group)
            loaded |= {f"{name}.{key}" for key in getattr(self, name).load_weights(own)}
        if self._adapted is not None:
            # Weights are loaded; from now on, vLLM maps the layers of adapters by it.
            self.hf_to_vllm_mapper = adapter_mapper(type(self), self._adapted)
        return loaded

    @staticmethod
    def get_model_state_cls() -> type[Any]:
        """vLLM's model runner V2 tells an object of this class of its batch."""
        # Only V2 has what it imports.
        from tita.vllm_plugin.model_state import GuidedModelState

        return GuidedModelState

    def get_mm_mapping(self) -> MultiModelKeys:
        """The parts of the model, to which vLLM applies adapters: of the one that has them."""
        if self._adapted is None:
            return super().get_mm_mapping()  # type: ignore[misc]
        own = dataclasses.asdict(getattr(self, self._adapted).get_mm_mapping())
        return MultiModelKeys(
            **{part: [f"{self._adapted}.{name}" for name in names] for part, names in own.items()}
        )

    def get_mm_lora_token_counts(self, **given: Any) -> tuple[int, int | None]:
        if self._adapted is None:
            return super().get_mm_lora_token_counts(**given)  # type: ignore[misc, no-any-return]
        counts: tuple[int, int | None] = getattr(self, self._adapted).get_mm_lora_token_counts(
            **given
        )
        return counts

    def _join_tensors(self, each: list[IntermediateTensors]) -> IntermediateTensors:
        """What goes from one rank of pipeline parallelism to the next, of all models."""
        joined = dict(each[0].tensors)
        for name, tensors in zip(self._names, each[1:], strict=True):
            joined |= {f"{name}.{key}": tensor for key, tensor in tensors.tensors.items()}
        return IntermediateTensors(joined)

    def _part_tensors(self, together: IntermediateTensors) -> list[IntermediateTensors]:
        parts: dict[str | None, dict[str, Tensor]] = {None: {}} | {n: {} for n in self._names}
        for key, tensor in together.tensors.items():
            start, _, rest = key.partition(".")
            if start in self._names:
                parts[start][rest] = tensor
            else:
                parts[None][key] = tensor
        return [IntermediateTensors(each) for each in parts.values()]


def _match(base: str, paths: dict[str, str]) -> Vocabularies:
    outlines = {role: load_outline(path) for role, path in {"base": base, **paths}.items()}
    return match_vocabularies(models_of(outlines))


def _define(family: Family) -> None:
    """Define the combined class of a family, that of one model alone, and that of a draft model."""
    module = import_module(f"vllm.model_executor.models.{family.module}")
    base = getattr(module, family.vllm_class)
    for name, mixin in (
        (guided_name(family), Guided),
        (plain_name(family), Plain),
        (draft_name(family), Draft),
    ):
        cls = type(name, (mixin, base), {"__module__": __name__, "tita_family": family})
        setattr(sys.modules[__name__], name, cls)


for _each in FAMILIES.values():
    _define(_each)
