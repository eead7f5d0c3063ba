"""Requests and responses of `/v1`: OpenAI's chat completions with the extensions of tita.

Spec: platform.openai.com/docs/api-reference/chat. Requests have the additional fields
`guidance_...`, `explain` and `best_of`, and from vLLM `top_k`, `repetition_penalty`, `min_tokens`
and `ignore_eos`. Responses have `explain` in choices, and `changed_tokens`, `base_ms` and
`reward_ms` in the usage block.
"""

from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    Discriminator,
    Field,
    StrictBool,
    Tag,
    model_validator,
)
from pydantic_core import PydanticCustomError

from tita.serve.request_fields import INTEGRAL, GenerationFields, MessagePart, NumTokens


class TextPart(MessagePart):
    """Text in a message."""

    type: Literal["text"]
    text: str


class ImageURL(MessagePart):
    """A `data:` URL, or an http(s) URL on a host that the server allows."""

    url: str
    detail: str | None = None
    """Ignored: the models' processors have one level of detail."""


class ImagePart(MessagePart):
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


class Message(MessagePart):
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Content | None = None
    """Optional for the assistant only."""
    refusal: str | None = None
    """What an assistant of OpenAI's says instead of content."""
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
        """The content as parts, also if it is a string, and the refusal."""
        parts = self.content if isinstance(self.content, list) else []
        texts = (self.content if isinstance(self.content, str) else None, self.refusal)
        return (*parts, *(TextPart(type="text", text=text) for text in texts if text is not None))


class ChatRequest(GenerationFields):
    """Body of `POST /v1/chat/completions`."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=1024)]
    logprobs: StrictBool | None = None
    top_logprobs: Annotated[int, Field(strict=True, ge=0, le=20), INTEGRAL] | None = None
    explain: Annotated[
        StrictBool | None,
        Field(description="Return each model's log-probability of every token, in nats."),
    ] = False
    best_of: (
        Annotated[
            NumTokens,
            Field(
                description="Sample this number of responses and return the best `n` by the "
                "implicit reward of the reward models; not streamed."
            ),
        ]
        | None
    ) = None

    @property
    def num_samples(self) -> int:
        """Number of responses that are generated."""
        return max(self.best_of or 1, self.n or 1)


class PromptTokensDetails(BaseModel):
    """Details of `prompt_tokens`."""

    cached_tokens: int
    """Tokens that the base model's prefix cache had."""


class Usage(BaseModel):
    """Tokens and model time of a request."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
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
    """Log-probabilities of a token under each model and view, in nats."""

    token: str
    base: float
    reward: float | None
    """None unless one reward model ran."""
    terms: dict[str, float]
    """Under every source: `base`, reward models by name, `reference`, `base/distorted`,
    `base/no-image`, `base/text`."""
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
    score: float | None = None
    """With `best_of`: the summed implicit reward, in nats."""


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
    adapter_of: str | None = None
    """If it is a LoRA adapter: the model that it belongs to."""


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
    aspect of base, reward and reference models, and the default guidance. Every answer has it in
    the header `x-tita-model-digest`."""
    system_fingerprint: str
    """`fp_` and the first 12 digits of `digest`, as answers have it in their body."""
    max_model_len: int
    """Maximum number of tokens of prompt and response together."""
    guidance_weight: float
    """Default guidance weight of requests."""
    guidance_weights: dict[str, float] | None
    """Default weights by reward model, if there are several."""
    guidance_form: str
    """Default guidance form."""
    guidance_forms: list[str]
    """Guidance forms that requests can name."""
    guidance_view_forms: list[str]
    """Those that need no reward model; each has a default weight of its own."""
    guidance_plausibility: float
    """Default plausibility bound."""
    base: Checkpoint
    reward: Checkpoint | None
    """The reward model, if there is one."""
    rewards: dict[str, Checkpoint]
    """All reward models by name, which `guidance_weights` takes."""
    reference: Checkpoint | None
    """The reward model before DPO, if the server has it."""


class ModelList(BaseModel):
    """Response to `GET /v1/models`."""

    object: Literal["list"] = "list"
    data: list[ModelCard]
