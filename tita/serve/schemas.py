"""Requests and responses of `/v1`: OpenAI's chat completions with the extensions of tita.

Spec: platform.openai.com/docs/api-reference/chat. Requests have the additional fields
`guidance_weight`, `guidance_form`, `guidance_plausibility` and `explain`, and from vLLM `top_k`,
`repetition_penalty` and `ignore_eos`. Responses have `explain` in choices, and `changed_tokens`,
`base_ms` and `reward_ms` in the usage block.
"""

from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    model_validator,
)
from pydantic_core import PydanticCustomError

from tita.records import MAX_WEIGHT

FiniteFloat = Annotated[float, Field(allow_inf_nan=False)]
GuidanceWeight = Annotated[FiniteFloat, Field(
    ge=0, le=MAX_WEIGHT,
    description="Guidance weight; 0 is the base model alone. Default: the server's, in /v1/models.",
)]  # fmt: skip
GuidanceForm = Annotated[str, Field(
    description="How log-probabilities are combined: one of `guidance_forms` in /v1/models.",
)]  # fmt: skip
GuidancePlausibility = Annotated[FiniteFloat, Field(
    ge=0, le=1,
    description="Minimum probability of guided tokens, as a fraction of the base model's "
    "top-token probability (arXiv 2210.15097); 0 is no bound.",
)]  # fmt: skip
StopString = Annotated[str, Field(max_length=4096)]

# Fields of OpenAI's API and of vLLM (docs.vllm.ai, OpenAI-compatible server) that would change the
# response and are not implemented, with the values that request nothing. Any other value is an
# error: a client must not believe that an ignored field took effect. Fields that are in neither
# table (`user`, `metadata`, `store`, `service_tier`, ...) change nothing and are ignored.
_EMPTY: tuple[Any, ...] = (None, False, 0, "", [], {})
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(
        (
            # OpenAI
            "tools", "functions", "logit_bias", "frequency_penalty", "presence_penalty",
            "audio", "web_search_options",
            # vLLM
            "min_p", "min_tokens", "bad_words", "allowed_token_ids", "stop_token_ids",
            "guided_json", "guided_regex", "guided_choice", "guided_grammar", "structured_outputs",
            "use_beam_search", "prompt_logprobs", "echo", "continue_final_message",
            "include_stop_str_in_output", "chat_template", "documents",
        ),
        _EMPTY,
    ),
    "response_format": (None, {"type": "text"}),
    "modalities": (None, [], ["text"]),
    "tool_choice": (None, "none", "auto"),
    "function_call": (None, "none", "auto"),
    "best_of": (None, 1),
    "add_generation_prompt": (None, True),
    "skip_special_tokens": (None, True),
}  # fmt: skip
_DISABLED_BY = {"tools": "tool_choice", "functions": "function_call"}
"""Fields that request nothing if another field is `none`."""


class _RequestModel(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)


class TextPart(_RequestModel):
    """Text in a message."""

    type: Literal["text"]
    text: str


class ImageURL(_RequestModel):
    """A `data:` URL, or an http(s) URL on a host that the server allows."""

    url: str
    detail: str | None = None
    """Ignored: the models' processors have one level of detail."""


class ImagePart(_RequestModel):
    """An image in a message."""

    type: Literal["image_url"]
    image_url: Annotated[
        ImageURL,
        # Older clients send the URL alone.
        BeforeValidator(lambda given: {"url": given} if isinstance(given, str) else given),
    ]


Part = Annotated[TextPart | ImagePart, Field(discriminator="type")]
Content = Annotated[
    Annotated[str, Tag("str")] | Annotated[list[Part], Field(max_length=1024), Tag("list")],
    # So that an error in a part is reported, rather than "not a string".
    Discriminator(lambda given: "list" if isinstance(given, list) else "str"),
]


class Message(_RequestModel):
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Content | None = None
    """Optional for the assistant only."""
    tool_calls: Any = None

    @model_validator(mode="after")
    def _check_content(self) -> "Message":
        if self.tool_calls:
            raise PydanticCustomError("unsupported", "tool_calls are not supported")
        if self.content is None and self.role != "assistant":
            raise PydanticCustomError("content_required", "content is required")
        return self

    @property
    def parts(self) -> tuple[Part, ...]:
        """The content as parts, also if it is a string."""
        if self.content is None:
            return ()
        if isinstance(self.content, str):
            return (TextPart(type="text", text=self.content),)
        return tuple(self.content)


class StreamOptions(_RequestModel):
    """Options of a stream."""

    include_usage: bool | None = False


class ChatRequest(_RequestModel):
    """Body of `POST /v1/chat/completions`."""

    model_config = ConfigDict(extra="allow", frozen=True)

    model: str
    messages: Annotated[list[Message], Field(min_length=1, max_length=1024)]
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[FiniteFloat, Field(ge=0, le=2)] | None = None
    """Default: 0 (greedy), so that benchmarks are reproducible."""
    top_p: Annotated[FiniteFloat, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] | None = None
    """0 and -1: no bound."""
    repetition_penalty: Annotated[FiniteFloat, Field(gt=0, le=10)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: StopString | Annotated[list[StopString], Field(max_length=16)] | None = None
    n: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    guidance_weight: GuidanceWeight | None = None
    guidance_form: GuidanceForm | None = None
    guidance_plausibility: GuidancePlausibility | None = None
    explain: Annotated[
        bool | None,
        Field(description="Return each model's log-probability of every token, in nats."),
    ] = False
    ignore_eos: Annotated[
        bool | None,
        Field(description="Continue after the end-of-text token; for measurements."),
    ] = False

    @property
    def max_new_tokens(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @property
    def stops(self) -> tuple[str, ...]:
        given = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return tuple(filter(None, given))

    @property
    def unsupported_field(self) -> str | None:
        """The first field that requests something this server cannot do."""
        fields = self.model_extra or {}
        for name, value in fields.items():
            disabled = fields.get(_DISABLED_BY.get(name, "")) == "none"
            if not disabled and value not in _UNSUPPORTED.get(name, (value,)):
                return name
        return None


class Usage(BaseModel):
    """Tokens and model time of a request."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    changed_tokens: int
    """Tokens that the base model alone would not have chosen."""
    base_ms: float
    """This request's share of the time in the base model."""
    reward_ms: float
    """Its share of the time in the reward model and, with form dpo, the reference model."""


class TopLogprob(BaseModel):
    """An alternative token and its log-probability."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    """A token of the response with its alternatives."""

    top_logprobs: list[TopLogprob] = []


class Logprobs(BaseModel):
    """Per-token log-probabilities under the combined distribution, in nats."""

    content: list[TokenLogprob]
    refusal: None = None


class ExplainedToken(BaseModel):
    """Log-probabilities of a token under each model, in nats."""

    token: str
    base: float
    reward: float | None
    combined: float
    changed: bool


class ResponseMessage(BaseModel):
    """The message of a choice."""

    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None
    """Expected by OpenAI's clients; always null here."""


class ChatChoice(BaseModel):
    """One generated response."""

    index: int
    message: ResponseMessage
    finish_reason: Literal["stop", "length"]
    logprobs: Logprobs | None = None
    explain: list[ExplainedToken] | None = None


class ChatResponse(BaseModel):
    """Response to `POST /v1/chat/completions`."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    system_fingerprint: str
    """`fp_` and the first 12 digits of the model's `digest`."""
    choices: list[ChatChoice]
    usage: Usage


class Checkpoint(BaseModel):
    """Origin of a loaded model, which benchmark reports also refer to."""

    name: str
    """As given to `tita serve`."""
    source: str
    """What the name resolved to: a tree in the store, a directory, or a hub name."""
    sha256: str
    """Digest of the list of its files; for a hub model, of its name and commit."""
    run: str | None
    """The training run that produced it, if it is in the store."""
    dtype: str
    """Weight dtype as loaded; of a quantized model, that of its other weights."""
    quantization: str | None
    """`8bit` or `4bit`, if the server quantized it."""
    image_aspect: str
    """How it sees images that are not square: `pad` or `keep`."""


class ModelCard(BaseModel):
    """A model that requests can name."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "tita"
    root: str
    """The base model, as given to `tita serve`."""
    parent: str | None
    digest: str
    """SHA-256 of all that decides what the model answers: the digest, dtype, quantization and image
    aspect of base, reward and reference model, and the default guidance. Every answer has it in the
    header `x-tita-model-digest`."""
    system_fingerprint: str
    """`fp_` and the first 12 digits of `digest`, as answers have it in their body."""
    max_model_len: int
    """Maximum number of tokens of prompt and response together."""
    guidance_weight: float
    """Default guidance weight of requests."""
    guidance_form: str
    """Default guidance form."""
    guidance_forms: list[str]
    """Guidance forms that requests can name."""
    guidance_plausibility: float
    """Default plausibility bound."""
    base: Checkpoint
    reward: Checkpoint | None
    reference: Checkpoint | None
    """The reward model before DPO, if the server has it."""


class ModelList(BaseModel):
    """Response to `GET /v1/models`."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class ErrorBody(BaseModel):
    """OpenAI's error object."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(BaseModel):
    """Response to a request that failed."""

    error: ErrorBody
