"""From a request to model inputs, and what a client is told where that cannot be done."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tita.align.preparing import Prepared, Preparer, PromptTooLong
from tita.align.requests import Request
from tita.serve.failures import Refusal, too_long
from tita.serve.images import EncodedImage
from tita.vlm import BadConversation

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """A request whose images have come, and are not unpacked yet."""

    num_characters: int
    """Of its words."""
    images: "tuple[EncodedImage, ...]"
    request: "Callable[[Sequence[Image]], Request]"
    """What is asked of the engine, with these images once they are unpacked."""

    @property
    def cost(self) -> int:
        """Roughly how long it takes to prepare, compared with others: the characters of its words.

        Unpacking and resizing a photograph takes about as long as tokenizing a twentieth of its
        bytes; and few bytes may unpack to many pixels.
        """
        return self.num_characters + sum(5000 + image.num_bytes // 20 for image in self.images)


def prepare(preparer: Preparer, asked: Asked) -> Prepared:
    """The request with its inputs.

    Raises:
        Refusal: an image is broken, the prompt is too long, or a model's template cannot say it.
    """
    request = asked.request([image.decoded() for image in asked.images])
    try:
        return preparer.prepare(request)
    except PromptTooLong as error:
        raise too_long(error.what) from None
    except BadConversation as error:
        raise Refusal(error.what, param="messages", code="invalid_conversation") from None
