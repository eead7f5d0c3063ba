"""vLLM with its own class of one model, its own sampler and none of tita's code in its process."""

from collections.abc import Hashable
from types import SimpleNamespace
from typing import Any

from vllm import EngineArgs, LLMEngine, SamplingParams
from vllm.sampling_params import RequestOutputKind

from tita.align.prompts import PreparedRequest, Preparer
from tita.engine.engine_options import VllmOptions
from tita.engine.vllm_engine import load_outlines
from tita.engine.vllm_inputs import to_engine_input
from tita.vllm_plugin.families import family_of, plain_name
from tita.vlm.inputs import image_token_id


class StockVllm:
    """As much of `tita.engine.interface.StepEngine` as a benchmark needs."""

    def __init__(self, path: str, options: VllmOptions) -> None:
        models = load_outlines({"base": path})
        self.preparer = Preparer(models)
        self._family = family_of(models.base.model.config, where=path)
        self._image_token = image_token_id(models.base.model)
        more: dict[str, Any] = {}
        if options.kv_cache_bytes is not None:
            more["kv_cache_memory_bytes"] = options.kv_cache_bytes
        self._engine = LLMEngine.from_engine_args(
            EngineArgs(
                model=path,
                # vLLM's own class, which also loads what transformers 5 has saved.
                hf_overrides={"architectures": [plain_name(self._family)]},
                dtype="float32",
                max_model_len=options.max_model_len,
                max_num_seqs=options.max_batch,
                gpu_memory_utilization=options.memory_share,
                enable_prefix_caching=options.prefix_cache,
                enforce_eager=not options.compile,
                mm_processor_cache_gb=0,
                generation_config="vllm",
                **more,
            )
        )
        self._left: dict[str, Hashable] = {}

    def __len__(self) -> int:
        return len(self._left)

    def admit(self, key: Hashable, prepared: PreparedRequest) -> None:
        params = SamplingParams(
            temperature=0.0,
            max_tokens=prepared.max_new_tokens,
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )
        self._left[str(key)] = key
        engine_input = to_engine_input(
            prepared, family=self._family, image_token=self._image_token, vocabularies={}
        )
        self._engine.add_request(str(key), engine_input, params)

    def step(self) -> list[tuple[Hashable, Any]]:
        outcomes = []
        for output in self._engine.step():
            key = self._left[output.request_id]
            outcomes += [(key, SimpleNamespace(id=t)) for t in output.outputs[0].token_ids]
            if output.finished:
                del self._left[output.request_id]
        return outcomes
