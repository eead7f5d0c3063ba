"""Fields that the requests of several APIs share, and the treatment of fields that are not known.

Types are strict: `"5"` is no number and `1` no boolean. A field that would change the answer and is
not implemented is an error, as is one whose name is almost that of a field: a client must not
believe that an ignored field took effect. Other unknown fields are ignored, and the response names
them in a header.
"""

import difflib
import re
from collections.abc import Collection, Iterator
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    StrictBool,
    Tag,
)

from tita.records import MAX_WEIGHT
from tita.serve.errors import APIError

IGNORED_HEADER = "x-tita-ignored-fields"
"""Response header: unknown fields of the request that had no effect."""

INTEGRAL = BeforeValidator(
    lambda given: int(given) if isinstance(given, float) and given.is_integer() else given
)
"""Takes 5.0 as 5, which are one number in JSON."""

# fmt: off
Temperature = Annotated[float, Field(strict=True, allow_inf_nan=False, ge=0, le=2)]
TopP = Annotated[
    float,
    Field(strict=True, allow_inf_nan=False, ge=0, le=1),
    # OpenAI and LLaVA's worker take 0, which leaves the most likely token, as any small one does.
    AfterValidator(lambda given: given or 1e-9),
]
RepetitionPenalty = Annotated[float, Field(strict=True, allow_inf_nan=False, gt=0, le=10)]
NumTokens = Annotated[int, Field(strict=True, ge=1), INTEGRAL]
GuidanceWeight = Annotated[float, Field(
    strict=True, allow_inf_nan=False, ge=0, le=MAX_WEIGHT,
    description="Guidance weight; 0 is the base model alone. Default: the server's, in /v1/models.",
)]
GuidanceWeights = Annotated[dict[str, GuidanceWeight], Field(
    max_length=256,
    description="Weights of several reward models by name; 0 for those not named. Instead of "
    "`guidance_weight`. Default: the server's, in /v1/models.",
)]
GuidanceNoiseStep = Annotated[int, Field(
    strict=True, ge=0, lt=1000,
    description="Diffusion step of the distorted image (forms vcd and tita_vcd, arXiv 2311.16922); "
    "default 500.",
), INTEGRAL]
GuidanceContrast = Annotated[float, Field(
    strict=True, allow_inf_nan=False, ge=0, le=MAX_WEIGHT,
    description="Strength of the contrast beside reward models (form tita_vcd); default 1.",
)]
GuidanceText = Annotated[str, Field(
    max_length=65_536,
    description="Text that form cfg adds before the question in one of its two views.",
)]
GuidanceForm = Annotated[str, Field(
    description="How log-probabilities are combined: one of `guidance_forms` in /v1/models.",
)]
GuidancePlausibility = Annotated[float, Field(
    strict=True, allow_inf_nan=False, ge=0, le=1,
    description="Minimum probability of guided tokens, as a fraction of the base model's "
    "top-token probability (arXiv 2210.15097); 0 is no bound.",
)]
StopString = Annotated[str, Field(max_length=4096)]
StopStrings = Annotated[
    Annotated[StopString, Tag("str")]
    | Annotated[list[StopString], Field(max_length=16), Tag("list")],
    # So that the number of strings is reported, rather than "not a string".
    Discriminator(lambda given: "list" if isinstance(given, list) else "str"),
]

_EMPTY: tuple[Any, ...] = (None, False, 0, "", [], {})
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(
        (
            # OpenAI
            "tools", "functions", "logit_bias", "frequency_penalty", "presence_penalty", "audio",
            "input", "instructions", "prompt", "suffix", "echo",
            # vLLM and SGLang
            "min_p", "bad_words", "allowed_token_ids", "stop_token_ids", "guided_json",
            "guided_regex", "guided_choice", "guided_grammar", "guided_whitespace_pattern",
            "structured_outputs", "structural_tag", "regex", "ebnf", "use_beam_search",
            "prompt_embeds", "continue_final_message", "documents",
            "include_stop_str_in_output", "chat_template", "chat_template_kwargs",
            "truncate_prompt_tokens", "mm_processor_kwargs", "logits_processors", "vllm_xargs",
            "thinking_token_budget", "sampling_params", "lora_path",
            # transformers, llama.cpp and Ollama; and what belongs into the top level or a message
            "max_new_tokens", "min_new_tokens", "max_length", "min_length", "num_predict",
            "n_predict", "no_repeat_ngram_size", "grammar", "json_schema", "options", "images",
            "image", "system", "extra_body", "do_sample", "max_output_tokens", "stop_sequences",
            "penalty_alpha",
            # of tita's other APIs
            "messages", "explain", "top_logprobs",
        ),
        _EMPTY,
    ),
    # Empty options and no alternatives request these, too.
    "web_search_options": (None,),
    "prompt_logprobs": (None,),
    "response_format": (None, {"type": "text"}),
    "modalities": (None, [], ["text"]),
    "tool_choice": (None, "none", "auto"),
    "function_call": (None, "none", "auto"),
    "best_of": (None, 1),
    "num_beams": (None, 1),
    "num_return_sequences": (None, 1),
    "guidance_scale": (None, 1),
    "cfg_scale": (None, 1),
    "typical_p": (None, 1),
    "length_penalty": (None, 1),
    "repeat_penalty": (None, 1),
    "add_generation_prompt": (None, True),
    "add_special_tokens": (None, True),
    "skip_special_tokens": (None, True),
}
"""Fields that would change the response, with the values that request nothing."""

_HARMLESS = frozenset((
    # OpenAI
    "user", "metadata", "store", "service_tier", "parallel_tool_calls", "reasoning_effort",
    "verbosity", "prediction", "safety_identifier", "prompt_cache_key", "prompt_cache_retention",
    # vLLM
    "request_id", "priority", "spaces_between_special_tokens", "return_token_ids",
    "return_tokens_as_token_ids", "include_reasoning", "kv_transfer_params", "cache_salt",
))
"""Fields of these APIs that change nothing here: they are ignored without a header."""
_UNSUPPORTED_IN_MESSAGES: dict[str, tuple[Any, ...]] = dict.fromkeys(
    (
        # Ollama and others put images here, where they would be left out.
        "images", "image", "image_url", "images_url", "audio", "input_audio", "video", "video_url",
        "files", "file", "text", "function_call", "prefix", "partial", "min_pixels", "max_pixels",
    ),
    _EMPTY,
)
"""As `_UNSUPPORTED`, in messages and their parts."""
_HARMLESS_IN_MESSAGES = frozenset((
    "name", "annotations", "reasoning", "reasoning_content", "tool_call_id", "uuid",
    "cache_control", "id", "detail", "format",
))
# fmt: on

_DISABLED_BY = {"tools": "tool_choice", "functions": "function_call"}
"""Fields that request nothing if another field is `none`."""
_REMEDIES = {
    "max_new_tokens": "use max_tokens",
    "num_predict": "use max_tokens",
    "n_predict": "use max_tokens",
    "max_output_tokens": "use max_tokens",
    "messages": "use /v1/chat/completions",
    "explain": "use /v1/chat/completions",
    "top_logprobs": "use logprobs",
    "min_new_tokens": "use min_tokens",
    "do_sample": "use temperature",
    "num_return_sequences": "use n",
    "stop_sequences": "use stop",
    "guidance_scale": "use guidance_weight",
    "cfg_scale": "use guidance_weight",
    "repeat_penalty": "use repetition_penalty",
    "extra_body": "send its fields at the top level of the body",
}
_SIMILAR = 0.8
"""Names with at least this ratio of matching characters are taken for misspelt."""
_MAX_NAMED = 16
_MAX_UNKNOWN = 1000
"""Unknown fields of a request. Comparing millions of names with those of fields takes minutes, in
which no other request is answered."""


class RequestModel(BaseModel):
    """A part of a request."""

    model_config = ConfigDict(extra="ignore", frozen=True)


class MessagePart(RequestModel):
    """A message, or a part of one."""

    model_config = ConfigDict(extra="allow", frozen=True)


class StreamOptions(RequestModel):
    """Options of a stream."""

    model_config = ConfigDict(extra="allow", frozen=True)

    include_usage: StrictBool | None = False
    continuous_usage_stats: Annotated[
        StrictBool | None,
        Field(description="Send the usage so far with every chunk."),
    ] = False
    include_obfuscation: StrictBool | None = None
    """Ignored: OpenAI's padding of chunks against traffic analysis."""


class GuidanceFields(RequestModel):
    """Fields of a request's guidance."""

    guidance_weight: GuidanceWeight | None = None
    guidance_weights: GuidanceWeights | None = None
    guidance_form: GuidanceForm | None = None
    guidance_plausibility: GuidancePlausibility | None = None
    guidance_noise_step: GuidanceNoiseStep | None = None
    guidance_contrast: GuidanceContrast | None = None
    guidance_text: GuidanceText | None = None


class GenerationFields(GuidanceFields):
    """Fields of chat and text completions."""

    model_config = ConfigDict(extra="allow", frozen=True)

    model: str
    stream: StrictBool | None = False
    stream_options: StreamOptions | None = None
    max_tokens: NumTokens | None = None
    max_completion_tokens: NumTokens | None = None
    """Counts before `max_tokens`; some clients send both to all APIs."""
    min_tokens: Annotated[int, Field(strict=True, ge=0), INTEGRAL] | None = None
    """Until the response has this number of tokens, nothing ends it."""
    temperature: Temperature | None = None
    """Default: 0 (greedy), so that benchmarks are reproducible."""
    top_p: TopP | None = None
    top_k: Annotated[int, Field(strict=True, ge=-1, lt=2**31), INTEGRAL] | None = None
    """0 and -1: no bound."""
    repetition_penalty: RepetitionPenalty | None = None
    seed: Annotated[int, Field(strict=True, ge=-(2**63), lt=2**63), INTEGRAL] | None = None
    stop: StopStrings | None = None
    n: NumTokens | None = None
    ignore_eos: Annotated[
        StrictBool | None,
        Field(description="Continue after the end-of-text token; for measurements."),
    ] = False

    @property
    def max_new_tokens(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @property
    def stops(self) -> tuple[str, ...]:
        given = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return tuple(filter(None, given))


def check_unknown_fields(body: BaseModel, *, within: str = "") -> list[str]:
    """The unknown fields that have no effect, those of `stream_options` and messages included.

    Args:
        body: with its unknown fields in `model_extra`.
        within: path of the body in the request.

    Raises:
        APIError: a field would change the answer, its name is almost that of a field, or there are
            too many.
    """
    fields = body.model_extra or {}
    ours = type(body).model_fields.keys()
    unsupported, harmless = _UNSUPPORTED, _HARMLESS
    if isinstance(body, MessagePart):
        unsupported, harmless = _UNSUPPORTED_IN_MESSAGES, _HARMLESS_IN_MESSAGES
    ignored = []
    for name, value in fields.items():
        if value is None:
            # Clients send null for what their user has not set.
            continue
        if name in unsupported:
            if fields.get(_DISABLED_BY.get(name, "")) == "none" or value in unsupported[name]:
                continue
            remedy = f"; {_REMEDIES[name]}" if name in _REMEDIES else ""
            what, param = f"{within}{name} is not supported{remedy}", f"{within}{name}"
            raise APIError(what, param=param, code="unsupported")
        if name not in harmless:
            _check_spelling(name, {*ours, *unsupported}, within=within)
            ignored.append(f"{within}{name}")
            _check_number(ignored)
    for path, part in _parts_of(body):
        ignored += check_unknown_fields(part, within=f"{within}{path}.")
        _check_number(ignored)
    return ignored


def _check_number(unknown: Collection[str]) -> None:
    if len(unknown) > _MAX_UNKNOWN:
        raise APIError(f"more than {_MAX_UNKNOWN:,} unknown fields", code="unknown_field")


def _parts_of(body: BaseModel) -> Iterator[tuple[str, BaseModel]]:
    """The models inside a model, with their paths in it."""
    for name in type(body).model_fields:
        value = getattr(body, name)
        if isinstance(value, RequestModel):
            yield name, value
        elif isinstance(value, list):
            for number, each in enumerate(value):
                if isinstance(each, RequestModel):
                    yield f"{name}.{number}", each


def ignored_header(names: Collection[str]) -> dict[str, str]:
    """The response header that names ignored fields; empty without any."""
    # A name can be any text, and a header cannot.
    found = [name for name in names if re.fullmatch(r"[\w.-]{1,64}", name, re.ASCII)]
    shown = found[:_MAX_NAMED]
    if len(names) > len(shown):
        shown.append(f"and {len(names) - len(shown)} more")
    return {IGNORED_HEADER: ", ".join(shown)} if shown else {}


def _check_spelling(name: str, known: Collection[str], *, within: str) -> None:
    def plain(text: str) -> str:
        return text[:64].casefold().replace("_", "").replace("-", "")

    by_plain_name = {plain(each): each for each in sorted(known)}
    found = difflib.get_close_matches(plain(name), by_plain_name, n=1, cutoff=_SIMILAR)
    if found:
        meant = by_plain_name[found[0]]
        raise APIError(
            f"no field {within}{name}; did you mean {within}{meant}?",
            param=f"{within}{name}", code="unknown_field",
        )  # fmt: skip
