"""Messages of the chat completions API: images in the turn and at the place that shows them."""

import io

import PIL.Image
import pytest

from tita.records import ContextTurn
from tita.vlm.chat_messages import chat_messages, data_url


def url(name: str) -> dict[str, object]:
    return {"type": "image_url", "image_url": {"url": name}}


def text(words: str) -> dict[str, object]:
    return {"type": "text", "text": words}


def test_an_image_is_never_in_the_system_prompt() -> None:
    """Endpoints refuse it there, and it belongs to the question."""
    context = (
        ContextTurn(role="system", text="Be brief."),
        ContextTurn(role="user", text="Hello"),
        ContextTurn(role="assistant", text="Hi"),
    )
    assert chat_messages(context, "What is it?", ["a"]) == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hi"},
        {"role": "user", "content": [url("a"), text("What is it?")]},
    ]


def test_images_of_earlier_turns_and_between_words() -> None:
    context = (
        ContextTurn(role="user", text="First", num_images=1),
        ContextTurn(role="assistant", text="Yes"),
    )
    assert chat_messages(context, "Is <image> like <image>?", ["a", "b", "c"]) == [
        {"role": "user", "content": [url("a"), text("First")]},
        {"role": "assistant", "content": "Yes"},
        {
            "role": "user",
            "content": [text("Is "), url("b"), text(" like "), url("c"), text("?")],
        },
    ]


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "JPEG"])
def test_the_type_is_that_of_the_bytes(kind: str) -> None:
    file = io.BytesIO()
    PIL.Image.new("RGB", (8, 8)).save(file, kind)
    assert data_url(file.getvalue(), name="a.gif").startswith(f"data:image/{kind.lower()};base64,")
    assert data_url(b"<svg/>", name="a.gif") == "data:image/gif;base64,PHN2Zy8+"
