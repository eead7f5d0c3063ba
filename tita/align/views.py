"""Views of a request: which prompt and which images a model sees, and with which noise."""

import dataclasses
import hashlib
from pathlib import Path

from tita.align.forms import Source, View
from tita.align.requests import Request
from tita.errors import TitaError
from tita.vlm.inputs import Inputs
from tita.vlm.noise import NOISE_KEY, SevaNoise, pixel_names
from tita.vlm.prompts import BadConversation

_STRIP_ROWS = 128


def sees_others(request: Request) -> bool:
    """Whether the models that steer see other images than the base."""
    return request.reward_images is not None


def as_seen(request: Request, source: Source) -> Request:
    """The request in the view of a source, but for noise on its images.

    Raises:
        BadConversation: text cannot be added to its prompt.
    """
    seen = request if source.model == "base" else request.reward_view
    if source.view.image == "none":
        seen = _without_images(seen)
    if source.view.text:
        seen = _with_text(seen, source.view.text)
    return seen


def _without_images(request: Request) -> Request:
    raw = request.raw
    if raw is not None:
        # LLaVA's prompts have an image on a line of its own.
        raw = raw.replace("<image>\n", "").replace("<image>", "")
    turns = tuple(
        dataclasses.replace(turn, parts=tuple(part for part in turn.parts if isinstance(part, str)))
        for turn in request.turns
    )
    return dataclasses.replace(request, images=(), turns=turns, raw=raw)


def _with_text(request: Request, text: str) -> Request:
    """The request with a text before its question, on lines of its own.

    Raises:
        BadConversation: the prompt is in a model's template already, where the question is unknown.
    """
    if request.raw is not None or request.token_ids:
        raise BadConversation(
            "guidance adds a text to the question, and this prompt is not divided into turns",
            remedy="send a conversation, or leave out the text",
        )
    if not request.turns:
        return dataclasses.replace(request, question=f"{text}\n{request.question}")
    *before, last = request.turns
    at = next((n for n, part in enumerate(last.parts) if isinstance(part, str)), len(last.parts))
    parts = (*last.parts[:at], "\n".join([text, *map(str, last.parts[at : at + 1])]))
    parts += last.parts[at + 1 :]
    return dataclasses.replace(request, turns=(*before, dataclasses.replace(last, parts=parts)))


def undistorted(view: View) -> View:
    """The view without noise."""
    return View(text=view.text) if view.image == "distorted" else view


def distort_inputs(inputs: Inputs, request: Request, view: View) -> Inputs:
    """Inputs whose images have the view's noise, a function of images and step alone.

    Raises:
        TitaError: the model's processor has another name for the pixels.
    """
    if not view.noise_step:
        return inputs
    pixels = {name: inputs[name] for name in pixel_names(inputs)}
    if not pixels:
        raise TitaError(
            f"cannot distort images: the tensors of the prompt are {', '.join(inputs)}",
            remedy="choose another form than vcd",
        )
    noise = SevaNoise(view.noise_step, int(image_digest(request)[:12], 16))
    return inputs | {
        name: noise.add_to(tensor.cpu()).to(tensor.device) for name, tensor in pixels.items()
    }


def seen_digest(digest: str, view: View) -> str:
    """The digest of the images of a view, from that of the images themselves."""
    if view.image == "none":
        return ""
    return f"{digest} with noise {view.noise_step}" if view.noise_step else digest


def image_digest(request: Request) -> str:
    """The digest of all images in order, of pixels and noise; empty without images."""
    pictures = request.prompt.pictures
    if not pictures:
        return ""
    digest = hashlib.sha256()
    for image in pictures:
        assert not isinstance(image, Path)
        noise = image.info.get(NOISE_KEY)
        # The seed of the noise of `vcd` is made from it, so a plain image keeps the digest it had.
        digest.update((f"{image.size}" if noise is None else f"{image.size} {noise}").encode())
        # In strips, because a copy of the whole would hold Python's global lock for long.
        for top in range(0, image.height, _STRIP_ROWS):
            bottom = min(top + _STRIP_ROWS, image.height)
            digest.update(image.crop((0, top, image.width, bottom)).tobytes())
    return digest.hexdigest()
