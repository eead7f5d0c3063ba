"""From a job to model inputs: each model's own chat template, image tokens and image processor."""

import hashlib
import threading
from typing import TYPE_CHECKING, Any

from tita.serve.failures import Refusal
from tita.serve.job import Job, Prepared
from tita.serve.options import Limits
from tita.vlm import VLM, pad_to_square

if TYPE_CHECKING:
    from PIL.Image import Image


class Preparer:
    """Runs prompts through the processors; any thread may call it."""

    def __init__(self, base: VLM, reward: VLM | None, *, limits: Limits) -> None:
        self._base = base
        self._reward = reward
        self._limits = limits
        self._context = min(_context(vlm) for vlm in (base, reward) if vlm is not None)
        # Fast tokenizers refuse to be used by two threads at once.
        self._lock = threading.Lock()

    def prepare(self, job: Job) -> Prepared:
        """The job with its inputs.

        Raises:
            Refusal: the prompt is too long, or its image marks and images do not match.
        """
        with self._lock:
            base = self._inputs(self._base, job)
            reward = self._inputs(self._reward, job) if self._reward and job.guided else None
        longest = max(side["input_ids"].shape[1] for side in (base, reward) if side is not None)
        room = self._context - longest
        if longest > self._limits.max_prompt_tokens or room < 1:
            allowed = min(self._limits.max_prompt_tokens, self._context - 1)
            raise Refusal(
                f"the prompt has {longest} tokens, more than {allowed}",
                param="messages", code="context_length_exceeded",
            )  # fmt: skip
        wanted = job.sampling.max_new_tokens or self._limits.default_output_tokens
        return Prepared(
            job=job,
            base=base,
            reward=reward,
            num_prompt_tokens=base["input_ids"].shape[1],
            max_new_tokens=min(wanted, room),
            image_digest=_digest(job.images),
        )

    def _inputs(self, vlm: VLM, job: Job) -> dict[str, Any]:
        text = _raw_text(vlm, job) if job.raw is not None else _templated(vlm, job)
        images = [
            pad_to_square(image) if vlm.image_aspect == "pad" else image for image in job.images
        ]
        inputs = vlm.processor(
            text=[text],
            images=[images] if images else None,
            # A template has put the beginning-of-text token where the model wants it.
            add_special_tokens=job.raw is not None,
            return_tensors="pt",
        )
        return dict(inputs.to(vlm.device))


def _templated(vlm: VLM, job: Job) -> str:
    messages = [
        {
            "role": turn.role,
            "content": [
                {"type": "text", "text": _disarmed(vlm, part)}
                if isinstance(part, str)
                else {"type": "image"}
                for part in turn.parts
            ],
        }
        for turn in job.turns
    ]
    try:
        text: str = vlm.processor.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=False
        )
    except Exception as error:
        # Templates raise where a model knows no such role or order of turns.
        raise Refusal(
            f"the model's chat template takes no such conversation ({error})",
            param="messages", code="invalid_conversation",
        ) from None  # fmt: skip
    if text.count(vlm.processor.image_token) != len(job.images):
        raise Refusal(
            "the model's chat template takes no images here",
            param="messages", code="invalid_conversation",
        )  # fmt: skip
    return text


def _raw_text(vlm: VLM, job: Job) -> str:
    assert job.raw is not None
    marks = job.raw.count("<image>")
    if marks != len(job.images):
        raise Refusal(
            f"number of images ({len(job.images)}) does not match number of <image> tokens "
            f"in prompt ({marks})",
            param="images",
        )
    pieces = [_disarmed(vlm, piece) for piece in job.raw.split("<image>")]
    return str(vlm.processor.image_token).join(pieces)


def _disarmed(vlm: VLM, text: str) -> str:
    """The client's words with a blank inside whatever the model takes for a control token."""
    marks = {*vlm.tokenizer.all_special_tokens, vlm.processor.image_token}
    for mark in marks:
        if len(mark) > 1:
            text = text.replace(mark, f"{mark[0]} {mark[1:]}")
    return text


def _context(vlm: VLM) -> int:
    config = vlm.model.config.get_text_config()
    return int(getattr(config, "max_position_embeddings", None) or 2**31)


def _digest(images: "tuple[Image, ...]") -> str:
    if not images:
        return ""
    digest = hashlib.sha256()
    for image in images:
        digest.update(f"{image.size}".encode())
        digest.update(image.tobytes())
    return digest.hexdigest()
