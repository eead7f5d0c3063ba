"""Loading a model's processor, completed where older checkpoints lack settings.

Processors of LLaVA checkpoints of early 2024, tiny-llava among them, have no patch size and no
chat template; both follow from the model's configuration.
"""

import logging
from pathlib import Path
from typing import Any

from PIL.Image import Image
from transformers import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    PROCESSOR_MAPPING,
    AutoConfig,
    AutoFeatureExtractor,
    AutoImageProcessor,
    AutoProcessor,
    AutoTokenizer,
    CLIPImageProcessorPil,
    GenerationMixin,
    LlavaProcessor,
    SiglipImageProcessorPil,
)
from transformers.utils import cached_file, is_torchvision_available
from transformers.video_processing_utils import VideoProcessorMixin

from tita.errors import TitaError
from tita.vlm.prompts import image_marks

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
"""Vicuna's conversation format, as in `llava-hf/llava-1.5-7b-hf`."""


def load_processor(source: str | Path, *, where: str) -> Any:
    """The processor of a folder or hub name, ready for questions with images.

    Args:
        source: folder or hub name for transformers.
        where: its name in errors and warnings.

    Raises:
        TitaError: it is no vision-language model, does not generate text token by token, or has no
            image processor.
    """
    source = str(source)
    config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    if type(config) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        raise TitaError(
            f"a model of type {config.model_type!r}, which is no vision-language model",
            where=where,
            remedy="name a model that takes images",
        )
    models = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[type(config)]
    # pi0 generates the actions of a robot, DiffusionGemma blocks of text.
    if not issubclass(models[0] if isinstance(models, tuple) else models, GenerationMixin):
        raise TitaError(
            f"a model of type {config.model_type!r}, which does not generate text token by token",
            where=where,
            remedy="name another vision-language model",
        )
    kind = PROCESSOR_MAPPING.get(type(config), None)
    videos = kind is not None and "video_processor" in kind.get_attributes()
    if videos and not is_torchvision_available():
        processor = _without_torchvision(kind, source)
    else:
        processor = AutoProcessor.from_pretrained(source, trust_remote_code=False)
    if getattr(processor, "image_processor", None) is None:
        raise TitaError(
            "has no image processor", where=where, remedy="save its processor beside it"
        )
    _find_template(processor, where=where)
    # Pixtral is of this type, too, and its processor has other settings.
    if config.model_type == "llava" and isinstance(processor, LlavaProcessor):
        _complete_llava(processor, config, where=where)
    return processor


def resize_first(processor: Any, image: Image) -> Image:
    """An image resized as its processor would do it, so that the pixels it makes are the same.

    A processor copies an image several times as an array before it resizes it with Pillow: for a
    photograph of twelve megapixels, two thirds of its time, much of it under Python's global lock.
    Resizing an image to its own size changes nothing, so it can be resized first. Processors whose
    steps are not exactly these get the image as it is.
    """
    step = processor.image_processor
    if type(step) not in (CLIPImageProcessorPil, SiglipImageProcessorPil) or not step.do_resize:
        return image
    size = dict(step.size)
    shortest = size.get("shortest_edge")
    if size.keys() >= {"height", "width"}:
        wanted = (size["width"], size["height"])
    elif shortest and not size.get("longest_edge"):
        short, long = sorted(image.size)
        scaled = (shortest, int(shortest * long / short))
        wanted = scaled if image.width <= image.height else scaled[::-1]
    else:
        return image
    return image if image.size == wanted else image.resize(wanted, step.resample)


def _without_torchvision(kind: Any, source: str) -> Any:
    """A processor of images and videos, loaded without torchvision: it takes images only.

    Only video processors need torchvision. The video settings in the checkpoint are kept, so that
    the processor is saved as it was loaded.

    No public way exists: a processor class with a `video_processor` refuses None and any object
    that is not of torchvision's backend. So a subclass skips that check, and the result gets the
    original class back, by whose name it is saved.
    """

    class Videos(VideoProcessorMixin):  # type: ignore[misc]
        # SmolVLM's chat template reads these even without a video.
        num_frames = fps = None
        # ERNIE 4.5 VL's processor saves a copy of this file.
        font = ""

        def to_dict(self) -> dict[str, Any]:
            return dict(written)

    class WithoutVideos(kind):  # type: ignore[misc]
        def check_argument_for_proper_class(self, name: str, argument: Any) -> Any:
            if name != "video_processor":
                return super().check_argument_for_proper_class(name, argument)
            return type(argument)

    written, _ = Videos.get_video_processor_dict(source)
    if font := written.get("font"):
        try:
            Videos.font = cached_file(source, font)
        except OSError:
            logger.warning("%s: no file %s, which its processor writes in videos", source, font)
    parts = {
        "feature_extractor": AutoFeatureExtractor.from_pretrained,
        "image_processor": AutoImageProcessor.from_pretrained,
        "tokenizer": AutoTokenizer.from_pretrained,
        "video_processor": lambda *_, **__: Videos(),
    }
    options, others = kind.get_processor_dict(source)
    made = [parts[name](source, trust_remote_code=False) for name in kind.get_attributes()]
    processor = WithoutVideos.from_args_and_dict(made, options, **others)
    processor.__class__ = kind
    return processor


def _find_template(processor: Any, *, where: str) -> None:
    """Take the chat template of the tokenizer if the processor has none and it shows images.

    Some checkpoints have it in `tokenizer_config.json` only, and some classes of processors take
    none (Chameleon, Fuyu).

    Raises:
        TitaError: there are several, and none is the default one.
    """
    if getattr(processor, "chat_template", None) is None:
        own = getattr(processor.tokenizer, "chat_template", None)
        text = own.get("default", "") if isinstance(own, dict) else own or ""
        if any(mark in text for mark in image_marks(processor)):
            processor.chat_template = text
    elif isinstance(processor.chat_template, dict) and "default" not in processor.chat_template:
        raise TitaError(
            f"has several chat templates ({', '.join(processor.chat_template)}), none of them "
            "`default`",
            where=where,
            remedy="save the one to use as chat_template.jinja beside the model",
        )


def _complete_llava(processor: Any, config: Any, *, where: str) -> None:
    if processor.patch_size is None:
        vision = config.vision_config
        processor.patch_size = vision.patch_size
        # CLIP's class token, which the strategy `default` removes; SigLIP has none.
        processor.num_additional_image_tokens = int("clip" in vision.model_type)
    if processor.vision_feature_select_strategy is None:
        processor.vision_feature_select_strategy = config.vision_feature_select_strategy
    if processor.chat_template is None:
        logger.warning("%s has no chat template; using that of LLaVA-1.5", where)
        processor.chat_template = LLAVA_TEMPLATE
