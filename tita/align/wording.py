"""From token ids to words as they come: whole characters only, and nothing of a stop string."""

from typing import Any


class Wording:
    """The text of one answer while it grows."""

    def __init__(self, tokenizer: Any, stops: tuple[str, ...] = ()) -> None:
        self._tokenizer = tokenizer
        self._stops = stops
        self._ids: list[int] = []
        self._begin = 0
        self._read = 0
        self._held = ""
        self._said = False
        self.stopped = False
        """Whether a stop string has come; the text ends before it."""

    def add(self, token: int) -> str:
        """Take in one token; the text that is certain now."""
        self._ids.append(token)
        # A token's text hangs on its neighbours (spaces, bytes of one character): decode with a
        # few tokens before it, and take what that adds.
        before = self._decode(self._ids[self._begin : self._read])
        after = self._decode(self._ids[self._begin :])
        if after.endswith("\ufffd"):
            return ""
        self._begin, self._read = self._read, len(self._ids)
        return self._release(after[len(before) :])

    def finish(self) -> str:
        """What was held back, when no more tokens come."""
        if self.stopped:
            return ""
        before = self._decode(self._ids[self._begin : self._read])
        rest = self._decode(self._ids[self._begin :])[len(before) :].rstrip("\ufffd")
        return self._plain((self._held + rest).rstrip())

    def _decode(self, ids: list[int]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True)
        return text

    def _release(self, new: str) -> str:
        text = self._held + new
        found = [at for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            self.stopped = True
            self._held = ""
            return self._plain(text[: min(found)].rstrip())
        keep = max((_overlap(text, stop) for stop in self._stops), default=0)
        certain = text[: len(text) - keep].rstrip()
        self._held = text[len(certain) :]
        return self._plain(certain)

    def _plain(self, text: str) -> str:
        """Without the blanks that many templates put before an answer."""
        if not self._said:
            text = text.lstrip()
        self._said = self._said or bool(text)
        return text


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a beginning of `stop`."""
    return next(
        (
            size
            for size in range(min(len(stop) - 1, len(text)), 0, -1)
            if text.endswith(stop[:size])
        ),
        0,
    )
