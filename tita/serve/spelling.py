"""Which bytes of an answer's text each of its tokens stands for."""

from collections import deque
from dataclasses import dataclass

from tita.align import TokenOutput

_REPLACEMENT = "\ufffd".encode()


@dataclass(frozen=True, slots=True)
class SpelledToken:
    """A token, and its bytes of the answer's text."""

    output: TokenOutput
    bytes: bytes


class Speller:
    """Divides the text of one answer among its tokens: their bytes, joined, are its UTF-8.

    Text comes later than the tokens that it is made of: a stop string may begin in it, a blank may
    be its end, a character may be incomplete. A token waits until its text is there.
    """

    def __init__(self) -> None:
        self._waiting: deque[TokenOutput] = deque()
        self._text = b""
        """What has come and belongs to no token yet."""

    def add(self, output: TokenOutput) -> list[SpelledToken]:
        """Add the next token; the tokens whose bytes are known now, in order."""
        self._text += output.text.encode("utf-8", "replace")
        if output.counted:
            self._waiting.append(output)
        spelled: list[SpelledToken] = []
        ended = output.finish_reason is not None
        while self._waiting:
            own = self._waiting[0].bytes
            if not self._text.startswith(own):
                if not ended and own.startswith(self._text):
                    break
                own = self._share(own)
            if ended and len(self._waiting) == 1:
                own = self._text
            self._text = self._text[len(own) :]
            spelled.append(SpelledToken(self._waiting.popleft(), own))
        return spelled

    def _share(self, own: bytes) -> bytes:
        """Of a token that the text does not spell: cut off, or no character."""
        if own.startswith(self._text):
            return self._text
        return _REPLACEMENT if self._text.startswith(_REPLACEMENT) else b""
