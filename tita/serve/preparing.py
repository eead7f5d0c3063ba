"""From a request to model inputs, and what a client is told where that cannot be done."""

from tita.align.preparing import Prepared, Preparer, PromptTooLong
from tita.align.requests import Request
from tita.serve.failures import Refusal, too_long
from tita.vlm import BadConversation


def prepare(preparer: Preparer, request: Request) -> Prepared:
    """The request with its inputs.

    Raises:
        Refusal: the prompt is too long, or a model's template cannot say it.
    """
    try:
        return preparer.prepare(request)
    except PromptTooLong as error:
        raise too_long(error.what) from None
    except BadConversation as error:
        raise Refusal(error.what, param="messages", code="invalid_conversation") from None


def cost(request: Request) -> int:
    """Roughly how long it takes to prepare, compared with others: the characters of its text.

    Resizing an image of a megapixel takes about as long as tokenizing a page or two.
    """
    parts = [part for turn in request.prompt.conversation for part in turn.parts]
    num_characters = len(request.raw or "") + sum(len(p) for p in parts if isinstance(p, str))
    sizes = [getattr(part, "size", (0, 0)) for part in parts]
    return num_characters + sum(width * height for width, height in sizes) // 200
