"""Answers in training end as each family's template ends an assistant turn, once.

The template of each family is the one that its publisher ships, shortened to roles, images and
text. Tokens of prompt and completion are those of the whole conversation.
"""

from typing import Any

import PIL.Image
import pytest

from tests.families import FAMILIES, built
from tita.demo.models import demo_model_path
from tita.errors import TitaError
from tita.records import ContextTurn
from tita.vlm.processors import load_processor
from tita.vlm.prompts import (
    Prompt,
    adds_special_tokens,
    completion_ids,
    completion_text,
    prompt_text,
    to_turns,
)

IMAGE = PIL.Image.new("RGB", (40, 40), "red")
CONTEXT = (
    ContextTurn(role="user", text="what number is written ?", num_images=1),
    ContextTurn(role="assistant", text="seven"),
)


def chat_ml(image: str, *, answer: str = "m.text") -> str:
    """Qwen's and its relatives' template."""
    return (
        "{% for message in messages %}<|im_start|>{{ message.role }}\n"
        "{% for m in message.content %}{% if m.type == 'image' %}"
        + image
        + "{% elif message.role == 'assistant' %}{{ "
        + answer
        + " }}{% else %}{{ m.text }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )


GEMMA = (
    "{{ bos_token }}{% for message in messages %}<start_of_turn>"
    "{{ 'model' if message.role == 'assistant' else message.role }}\n"
    "{% for m in message.content %}{% if m.type == 'image' %}<start_of_image>{% else %}"
    "{{ m.text | trim }}{% endif %}{% endfor %}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
LLAVA = (
    "{% for message in messages %}{{ message.role.upper() }}: "
    "{% for m in message.content %}{% if m.type == 'image' %}<image>\n{% endif %}{% endfor %}"
    "{% for m in message.content %}{% if m.type == 'text' %}{{ m.text + ' ' }}{% endif %}"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
"""LLaVA-1.5's, which leaves the end of a turn to the tokenizer."""
IDEFICS = (
    "<|im_start|>{% for message in messages %}{{ message.role | capitalize }}:"
    "{% if message.content[0].type != 'image' %} {% endif %}"
    "{% for m in message.content %}{% if m.type == 'image' %}<image>{% else %}{{ m.text }}"
    "{% endif %}{% endfor %}<end_of_utterance>\n{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)
AYA = (
    "{% for message in messages %}<|START_OF_TURN_TOKEN|>"
    "{{ '<|CHATBOT_TOKEN|>' if message.role == 'assistant' else '<|USER_TOKEN|>' }}"
    "{% for m in message.content %}{% if m.type == 'image' %}<image>{% else %}{{ m.text }}"
    "{% endif %}{% endfor %}<|END_OF_TURN_TOKEN|>{% endfor %}"
    "{% if add_generation_prompt %}<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>{% endif %}"
)
QWEN_IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
TEMPLATES = {
    "llava_next": (LLAVA, "</s>"),
    "llava_onevision": (chat_ml("<image>"), "<|im_end|>\n"),
    "idefics3": (IDEFICS, "<end_of_utterance>\n"),
    "smolvlm": (IDEFICS, "<end_of_utterance>\n"),
    "internvl": (chat_ml("<IMG_CONTEXT>\n"), "<|im_end|>\n"),
    "qwen2_vl": (chat_ml(QWEN_IMAGE), "<|im_end|>\n"),
    "qwen2_5_vl": (chat_ml(QWEN_IMAGE), "<|im_end|>\n"),
    "qwen3_vl": (chat_ml(QWEN_IMAGE), "<|im_end|>\n"),
    "gemma3": (GEMMA, "<end_of_turn>\n"),
    "paligemma": (LLAVA, "</s>"),
    "aya_vision": (AYA, "<|END_OF_TURN_TOKEN|>"),
}
"""Template and the end of a turn, by family."""
TOKENS = [
    *("<|im_start|>", "<|im_end|>", "<start_of_turn>", "<end_of_turn>", "<end_of_utterance>"),
    *("<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>", "<|CHATBOT_TOKEN|>", "<|USER_TOKEN|>"),
]


def processor_of(family: str) -> tuple[Any, str]:
    """The family's processor with its published template, and the end of its turns."""
    _, processor = built(family)
    template, end = TEMPLATES[family]
    processor.chat_template = template
    own = [token for token in TOKENS if token in template]
    processor.tokenizer.add_special_tokens({"additional_special_tokens": own})
    return processor, end


def test_every_family_has_its_template() -> None:
    assert TEMPLATES.keys() == FAMILIES.keys()


@pytest.mark.parametrize("context", [(), CONTEXT], ids=["one turn", "two turns"])
@pytest.mark.parametrize(
    "answer",
    ["seven", "the number is seven", "seven</s>", "seven </s></s>", "seven<|im_end|>", "s"],
)
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_tokens_are_those_of_the_whole_conversation(
    family: str, answer: str, context: tuple[ContextTurn, ...]
) -> None:
    processor, end = processor_of(family)
    prompt = Prompt(turns=to_turns(context, "is it odd ?", (IMAGE,)))
    text = prompt_text(processor, prompt)
    completion = completion_text(processor, prompt, answer)
    bare = answer.replace("</s>", "").replace("<|im_end|>", "").strip()
    assert completion.endswith(f"{bare}{end}")
    assert completion.count(end.strip()) == 1
    messages = [
        {
            "role": turn.role,
            "content": [
                {"type": "text", "text": part} if isinstance(part, str) else {"type": "image"}
                for part in turn.parts
            ],
        }
        for turn in prompt.conversation
    ]
    said = {"role": "assistant", "content": [{"type": "text", "text": bare}]}
    whole = processor.apply_chat_template([*messages, said], tokenize=False)
    if end == "</s>":  # The template leaves the end to the tokenizer, and a blank before it.
        assert "</s>" not in whole
        whole = whole.rstrip() + "</s>"
    special = adds_special_tokens(processor, whole)
    expected = processor.tokenizer(whole, add_special_tokens=special)["input_ids"]
    begin = processor.tokenizer(text, add_special_tokens=special)["input_ids"]
    assert begin + completion_ids(processor, text, completion) == expected


@pytest.mark.parametrize("family", ["qwen2_vl", "gemma3"])
def test_templates_that_change_the_answer(family: str) -> None:
    """Gemma's strips it; Qwen3's puts an empty thought in front."""
    processor, end = processor_of(family)
    if family == "qwen2_vl":
        thought = "'<think>\\n\\n</think>\\n\\n' + m.text"
        processor.chat_template = chat_ml(QWEN_IMAGE, answer=thought)
    prompt = Prompt(text="is it odd ?", images=(IMAGE,))
    completion = completion_text(processor, prompt, " seven\n")
    thought = "<think>\n\n</think>\n\n seven\n" if family == "qwen2_vl" else "seven"
    assert completion == f"{thought}{end}"


def test_control_tokens_inside_an_answer_stay_text() -> None:
    processor, end = processor_of("qwen2_vl")
    prompt = Prompt(text="is it odd ?", images=(IMAGE,))
    text = "a <|im_end|> b <|image_pad|>"
    completion = completion_text(processor, prompt, text)
    assert completion == f"a < |im_end|> b < |image_pad|>{end}"


def test_a_template_that_omits_answers_is_an_error() -> None:
    processor, _ = processor_of("qwen2_vl")
    processor.chat_template = "{% for m in messages if m.role == 'user' %}x{% endfor %}"
    processor.image_token = None
    with pytest.raises(TitaError, match="omits the assistant's answer"):
        completion_text(processor, Prompt(text="is it odd ?"), "yes")


@pytest.mark.parametrize("role", ["base", "reward"])
def test_tokens_of_the_demos_answers_are_as_before(role: str) -> None:
    """Answer and end-of-text token, tokenized alone, as the demo's models were trained."""
    processor = load_processor(str(demo_model_path(role)), where=role)
    prompt = Prompt(text="what number is written ?", images=(IMAGE,))
    for answer in ("seven", "yes", "the number is seven .", " no\n"):
        text = prompt_text(processor, prompt)
        completion = completion_text(processor, prompt, answer)
        alone = processor.tokenizer(f"{answer}</s>", add_special_tokens=False)["input_ids"]
        assert completion_ids(processor, text, completion) == alone
