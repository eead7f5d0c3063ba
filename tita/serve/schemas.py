"""The wire format of `/v1`: OpenAI's chat completions and what we add to them.

Spec: platform.openai.com/docs/api-reference/chat. Fields of ours in requests: `guidance_weight`,
`guidance_form`, `guidance_plausibility` and `explain`, and with vLLM's names `top_k`,
`repetition_penalty` and `ignore_eos`. In answers: `explain` in choices; `changed_tokens`, `base_ms`
and `reward_ms` in the usage block.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag
from pydantic import model_validator as validated
from pydantic_core import PydanticCustomError

Number = Annotated[float, Field(allow_inf_nan=False)]


Weight = Annotated[
    Number,
    Field(
        ge=0,
        le=100,
        description="How strongly the reward model guides: 0 is the base model alone. "
        "The server's own if not given (see /v1/models).",
    ),
]
Form = Annotated[
    str,
    Field(description="How its log-probabilities are used; /v1/models lists `guidance_forms`."),
]
Plausibility = Annotated[
    Number,
    Field(
        ge=0,
        le=1,
        description="Guided tokens must have this share of the probability that the base model "
        "gives its likeliest token (arXiv 2210.15097); 0 is no bound.",
    ),
]


Stop = Annotated[str, Field(max_length=4096)]


class _Incoming(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)


class TextPart(_Incoming):
    """Words of a message."""

    type: Literal["text"]
    text: str


class ImageURL(_Incoming):
    """Where an image is: a `data:` URL, or http(s) if the server allows the host."""

    url: str
    detail: str | None = None
    """Passed over: the models' processors have one way of looking."""


class ImagePart(_Incoming):
    """An image of a message."""

    type: Literal["image_url"]
    image_url: Annotated[
        ImageURL,
        # Older clients give the URL alone.
        BeforeValidator(lambda given: {"url": given} if isinstance(given, str) else given),
    ]


Part = Annotated[TextPart | ImagePart, Field(discriminator="type")]
Content = Annotated[
    Annotated[str, Tag("words")] | Annotated[list[Part], Field(max_length=1024), Tag("parts")],
    # So that what is wrong with a part is told, and not that it is no text.
    Discriminator(lambda given: "parts" if isinstance(given, list) else "words"),
]


class Message(_Incoming):
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Content | None = None
    """Only what an assistant said may be nothing."""
    tool_calls: Any = None

    @validated(mode="after")
    def _says_something(self) -> "Message":
        if self.tool_calls:
            raise PydanticCustomError("unsupported", "tool_calls are not supported")
        if self.content is None and self.role != "assistant":
            raise PydanticCustomError("content_required", "content is required")
        return self

    @property
    def parts(self) -> tuple[Part, ...]:
        """Its content, whatever way it was given."""
        if self.content is None:
            return ()
        if isinstance(self.content, str):
            return (TextPart(type="text", text=self.content),)
        return tuple(self.content)


class StreamOptions(_Incoming):
    """How a stream ends."""

    include_usage: bool | None = False


class ChatRequest(_Incoming):
    """Body of `POST /v1/chat/completions`."""

    model_config = ConfigDict(extra="allow", frozen=True)

    model: str
    messages: Annotated[list[Message], Field(min_length=1, max_length=1024)]
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[Number, Field(ge=0, le=2)] | None = None
    """0, the default, is greedy: a benchmark asked twice should answer once."""
    top_p: Annotated[Number, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] | None = None
    """0 and -1: no bound."""
    repetition_penalty: Annotated[Number, Field(gt=0, le=10)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=16)] | None = None
    n: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    guidance_weight: Weight | None = None
    guidance_form: Form | None = None
    guidance_plausibility: Plausibility | None = None
    explain: Annotated[
        bool | None, Field(description="Tell what each model thought of every token, in nats.")
    ] = False
    ignore_eos: Annotated[
        bool | None, Field(description="Write on past the end of the text: for measurements.")
    ] = False

    @property
    def wanted_tokens(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @property
    def stops(self) -> tuple[str, ...]:
        given = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return tuple(filter(None, given))


class Usage(BaseModel):
    """What a request cost."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    changed_tokens: int
    """Tokens that the base alone would not have chosen where they stand."""
    base_ms: float
    """This request's share of the time in the base model."""
    reward_ms: float
    """And in the models that steer it: the reward, and with form dpo the reference."""


class TopLogprob(BaseModel):
    """One token that could have stood here."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    """One token of the answer, and others that could have stood there."""

    top_logprobs: list[TopLogprob] = []


class Logprobs(BaseModel):
    """Per-token log-probabilities under the combined distribution, in nats."""

    content: list[TokenLogprob]
    refusal: None = None


class ExplainedToken(BaseModel):
    """What each model thought of a token; log-probabilities in nats."""

    token: str
    base: float
    reward: float | None
    combined: float
    changed: bool


class Answered(BaseModel):
    """The message of a choice."""

    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None
    """OpenAI's clients look for it; this server says its refusals as errors."""


class Choice(BaseModel):
    """One answer."""

    index: int
    message: Answered
    finish_reason: Literal["stop", "length"]
    logprobs: Logprobs | None = None
    explain: list[ExplainedToken] | None = None


class ChatResponse(BaseModel):
    """Answer to `POST /v1/chat/completions`."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    system_fingerprint: str
    """Of the models: with the same one, a seed gives the same answer."""
    choices: list[Choice]
    usage: Usage


class Checkpoint(BaseModel):
    """Where a model came from: what reports of the benchmark point at, too."""

    name: str
    """As it was named at the start."""
    source: str
    """What that name led to: a tree in the store, a folder, or a hub name."""
    sha256: str
    """Of its files' listing; a hub model's name and commit."""
    run: str | None
    """The training run that made it, if it came from one of the store."""


class ModelCard(BaseModel):
    """A model that can be asked."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "tita"
    root: str
    """The base model, as it was named at the start."""
    parent: str | None
    max_model_len: int
    """Tokens of prompt and answer together."""
    guidance_weight: float
    """What a request is guided by that names no weight."""
    guidance_form: str
    """And by that names no form; all that can be named:"""
    guidance_forms: list[str]
    guidance_plausibility: float
    base: Checkpoint
    reward: Checkpoint | None
    reference: Checkpoint | None
    """The reward model before DPO, if there is a form that compares with it."""


class ModelList(BaseModel):
    """Answer to `GET /v1/models`."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class ErrorBody(BaseModel):
    """OpenAI's error object."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(BaseModel):
    """Answer to a request that failed."""

    error: ErrorBody


_NOTHING: tuple[Any, ...] = (None, False, 0, "", [], {})
_PLAIN: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(
        (
            "tools", "functions", "logit_bias", "frequency_penalty", "presence_penalty",
            "audio", "web_search_options",
            # vLLM's
            "min_p", "min_tokens", "bad_words", "allowed_token_ids", "stop_token_ids",
            "guided_json", "guided_regex", "guided_choice", "guided_grammar", "structured_outputs",
            "use_beam_search", "prompt_logprobs", "echo", "continue_final_message",
            "include_stop_str_in_output", "chat_template", "documents",
        ),
        _NOTHING,
    ),
    "response_format": (None, {"type": "text"}),
    "modalities": (None, [], ["text"]),
    "tool_choice": (None, "none", "auto"),
    "function_call": (None, "none", "auto"),
    "best_of": (None, 1),
    "add_generation_prompt": (None, True),
    "skip_special_tokens": (None, True),
}  # fmt: skip
"""By field, what asks for nothing."""
_SWITCHES = {"tools": "tool_choice", "functions": "function_call"}
"""What is offered, and what may say `none` of it is to be used."""


def unsupported(fields: Mapping[str, Any]) -> str | None:
    """The first of a request's other fields that asks for something this server cannot do."""
    for name, value in fields.items():
        off = fields.get(_SWITCHES.get(name, "")) == "none"
        if not off and value not in _PLAIN.get(name, (value,)):
            return name
    return None
