"""What OpenAI's API and vLLM's have and this server has not.

A field of theirs that changes the answer is refused where it asks for something: left out in
silence, it would be taken for done. Fields that change nothing here (`user`, `metadata`, `store`,
`service_tier`, ...) are passed over, whatever they say.

Spec: platform.openai.com/docs/api-reference/chat; docs.vllm.ai, OpenAI-compatible server.
"""

from collections.abc import Mapping
from typing import Any

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
