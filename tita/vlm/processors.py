"""Loading a model's processor, with what older checkpoints leave to their users.

LLaVA checkpoints of early 2024, tiny-llava among them, came before processors knew the size of a
patch or had a chat template; both can be told from the model's configuration.
"""

import logging
from typing import Any

from tita.errors import TitaError

logger = logging.getLogger(__name__)

LLAVA_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}USER: {% elif message['role'] == 'assistant' %}ASSISTANT: "
    "{% endif %}"
    "{% for part in message['content'] if part['type'] == 'image' %}<image>\n{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }} {% endfor %}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
"""Vicuna's conversation as `llava-hf/llava-1.5-7b-hf` writes it."""


def load_processor(source: str, *, where: str) -> Any:
    """The processor of a folder or hub name, ready for questions with images.

    Args:
        source: what transformers loads it from.
        where: how errors and hints name it.

    Raises:
        TitaError: it takes no images.
    """
    from transformers import AutoConfig, AutoProcessor

    processor = AutoProcessor.from_pretrained(source)
    if getattr(processor, "image_processor", None) is None:
        raise TitaError(
            "has no image processor", where=where, remedy="save its processor beside it"
        )
    config = AutoConfig.from_pretrained(source)
    if config.model_type == "llava":
        _complete_llava(processor, config, where=where)
    return processor


def _complete_llava(processor: Any, config: Any, *, where: str) -> None:
    if processor.patch_size is None:
        vision = config.vision_config
        processor.patch_size = vision.patch_size
        # CLIP's class token, which the strategy `default` drops again; SigLIP has none.
        processor.num_additional_image_tokens = int("clip" in vision.model_type)
    if processor.vision_feature_select_strategy is None:
        processor.vision_feature_select_strategy = config.vision_feature_select_strategy
    if processor.chat_template is None:
        logger.warning("%s has no chat template; it is asked as LLaVA-1.5 is", where)
        processor.chat_template = LLAVA_TEMPLATE
