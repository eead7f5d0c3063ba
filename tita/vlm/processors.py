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
    from transformers import PROCESSOR_MAPPING, AutoConfig, AutoProcessor
    from transformers.utils import is_torchvision_available

    config = AutoConfig.from_pretrained(source)
    kind = PROCESSOR_MAPPING.get(type(config), None)
    videos = kind is not None and "video_processor" in kind.get_attributes()
    if videos and not is_torchvision_available():
        processor = _without_torchvision(kind, source)
    else:
        processor = AutoProcessor.from_pretrained(source)
    if getattr(processor, "image_processor", None) is None:
        raise TitaError(
            "has no image processor", where=where, remedy="save its processor beside it"
        )
    if config.model_type == "llava":
        _complete_llava(processor, config, where=where)
    return processor


def _without_torchvision(kind: Any, source: str) -> Any:
    """A processor of images and videos whose videos nobody asks for.

    Only video processors need torchvision; a plain PyTorch does without. What is written about
    videos beside the model is kept, so that the processor is saved as it was.
    """
    from transformers import AutoImageProcessor, AutoTokenizer
    from transformers.video_processing_utils import VideoProcessorMixin

    class Videos(VideoProcessorMixin):  # type: ignore[misc]
        # SmolVLM's chat template asks for these even where there are none.
        num_frames = fps = None

        def to_dict(self) -> dict[str, Any]:
            return dict(written)

    class WithoutVideos(kind):  # type: ignore[misc]
        def check_argument_for_proper_class(self, name: str, argument: Any) -> Any:
            if name != "video_processor":
                return super().check_argument_for_proper_class(name, argument)
            return type(argument)

    written, _ = Videos.get_video_processor_dict(source)
    parts = {
        "image_processor": AutoImageProcessor.from_pretrained,
        "tokenizer": AutoTokenizer.from_pretrained,
        "video_processor": lambda _: Videos(),
    }
    options, others = kind.get_processor_dict(source)
    made = [parts[name](source) for name in kind.get_attributes()]
    processor = WithoutVideos.from_args_and_dict(made, options, **others)
    # From here on it is like any other of its kind, by name when it is saved, too.
    processor.__class__ = kind
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
