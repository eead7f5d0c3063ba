"""Marks of images in texts: `<image>` and those of other tools are found, moved or refused.

Marks only say where an image is shown: every model's chat template inserts its own.
"""

import re

from tita.data.row_values import RowValues
from tita.records import IMAGE_MARK

# LLaVA, TRL, ms-swift; InternLM-XComposer; MMMU and MMPR; Qwen2-VL; Llama 3.2, GLM; Phi-3;
# MiniGPT-4; Gemma 3; InternVL; Pixtral
_ONE = (
    r"(?:<image>|<ImageHere>|<image[ _-]?\d+>|<\|image_pad\|>|<\|image\|>|<\|image_\d+\|>"
    r"|<image_placeholder>|<ImageContent>|<start_of_image>|<image_soft_token>|<IMG_CONTEXT>|\[IMG\])"
)
_MARK = re.compile(
    # Qwen2-VL; MiniCPM-V; InternVL, MiniGPT-4; GLM-4V; `<image></image>`; Qwen-VL
    r"<\|vision_start\|>(?:<\|image_pad\|>)+<\|vision_end\|>|\(?<image>\./</image>\)?"
    rf"|<img>{_ONE}</img>|<\|begin_of_image\|>{_ONE}<\|end_of_image\|>|<image></image>"
    rf"|{_ONE}|<img>[^<\n]*</img>",
    re.IGNORECASE,
)
_OTHER_MEDIA = re.compile(r"<video>|<audio>|<\|video_pad\|>|<\|audio_pad\|>", re.IGNORECASE)
_UNKNOWN_MARK = re.compile(
    # A tag or a placeholder whose name is about images, an HTML image, an image of Markdown.
    r"</?\|?(?:\w+_)?(?:image|img|vision)[\w -]{0,20}\|?/?>|<(?:image|img)\b[^<>]*>"
    r"|\[/?(?:IMG|IMAGE)[_ ]?\w{0,10}\]|\{+(?:image|img)[_ ]?\d*\}+|!\[[^\]\n]*\]\([^)\n]*\)",
    re.IGNORECASE,
)
_TEMPLATE = re.compile(
    r"<\|im_start\|>|<start_of_turn>|<\|start_header_id\|>|<\|(?:user|assistant|system)\|>|\[/?INST\]"
    r"|(?<!\w)(?:ASSISTANT|Assistant):\s*$|^\s*(?:USER|ASSISTANT|Assistant):"
)
"""Control tokens of chat templates, and the roles of Vicuna's and of `Human: ... Assistant:`."""
_NUMBER = re.compile(r"\d+")


def check_no_media(row: RowValues, text: str, column: str) -> None:
    """Check an answer, which may not contain an image's mark: no model writes images.

    Raises:
        TitaError: it contains one.
    """
    mark = _MARK.search(text) or _OTHER_MEDIA.search(text)
    if mark:
        what = f"{column!r} contains the mark {mark.group()[:40]!r} in an answer"
        raise row.error(what, "remove it from the answer")


def check_no_template(row: RowValues, text: str, column: str) -> None:
    """Check that a text is not in a model's chat template, which would be applied twice.

    Raises:
        TitaError: it is.
    """
    mark = _TEMPLATE.search(text)
    if mark:
        what = f"{column!r} is in a chat template already: {mark.group().strip()[:40]!r}"
        raise row.error(what, "write the bare text, or a list of messages")


def remove_marks(row: RowValues, text: str, column: str) -> tuple[str, int]:
    """The text of a user's message, and the number of its images.

    Marks at both ends, and a single one on a line of its own, are removed: the images are shown
    before the text, as LLaVA does it (`preprocess_multimodal` in `llava/train/train.py`). Other
    marks become `IMAGE_MARK` at their places.

    Raises:
        TitaError: a mark is not known, is not of an image, or is out of order.
    """
    media = _OTHER_MEDIA.search(text)
    if media:
        what = f"{column!r} contains {media.group()!r}"
        raise row.error(what, "use rows with images only")
    unknown = _UNKNOWN_MARK.search(_MARK.sub("", text))
    if unknown:
        what = f"{column!r} contains {unknown.group()[:40]!r}, which may stand for an image"
        raise row.error(what, f"write {IMAGE_MARK} where an image is shown, or remove it")
    marks = [match.group() for match in _MARK.finditer(text)]
    if not marks:
        return text, 0
    numbers = [
        int(n) for mark in marks for n in _NUMBER.findall(mark) if "</img>" not in mark.lower()
    ]
    kept = text.strip()
    if len(marks) == 1:
        lines = kept.splitlines()
        kept = "\n".join(line for line in lines if not _MARK.search(line) or _strip_marks(line))
    kept = _strip_marks(kept)
    if _MARK.search(kept):
        kept = _MARK.sub(IMAGE_MARK, text.strip())
    if numbers and numbers != list(range(1, len(marks) + 1)):
        what = f"{column!r} has the image marks {', '.join(marks)}"
        raise row.error(what, "mark every image once, in the order of the images")
    return kept, len(marks)


def _strip_marks(text: str) -> str:
    while True:
        stripped = text.strip()
        match = _MARK.match(stripped)
        if match:
            text = stripped[match.end() :]
            continue
        marks = list(_MARK.finditer(stripped))
        if not marks or marks[-1].end() != len(stripped):
            return stripped
        text = stripped[: marks[-1].start()]
