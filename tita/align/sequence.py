"""One answer while it is generated: its tokens, its text, and when it ends."""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, TypeAlias

from tita.align.forms import OWN, Term
from tita.align.prompts import PreparedRequest
from tita.align.requests import Alternative, FinishReason, Sampling, TokenOutput

_NUM_COMPARED = 64
"""Pairs of tokens on which a tokenizer is compared with its backend."""


class _Texts:
    """The texts of a tokenizer's tokens, without special ones; all answers decode with it."""

    def __init__(self, tokenizer: Any) -> None:
        """`tokenizer`: None if no text is wanted."""
        self._tokenizer = tokenizer
        self._singles: dict[int, str] = {}
        added = getattr(tokenizer, "added_tokens_decoder", {})
        named = getattr(tokenizer, "all_special_ids", ())
        self._special = {*named, *(token for token, each in added.items() if each.special)}
        self.decode: Callable[[list[int]], str] = self._decode
        # Most tokenizers only hand ids on to their backend, which takes a fifth of the time.
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is not None and not tokenizer.clean_up_tokenization_spaces:
            ids = range(0, len(tokenizer), max(1, len(tokenizer) // _NUM_COMPARED))
            pairs = [*map(list, zip(ids, reversed(ids), strict=True))]
            if [*map(backend.decode, pairs)] == [*map(self._decode, pairs)]:
                self.decode = backend.decode

    def of(self, token: int) -> str:
        """The text of a token alone."""
        if (text := self._singles.get(token)) is None:
            text = self._singles[token] = self.decode([token])
        return text

    def piece_bytes(self, token: int) -> bytes:
        """The bytes that a token stands for; none for a special one, whose name is no text."""
        return b"" if token in self._special else piece_bytes(self._tokenizer, token)

    def _decode(self, ids: list[int]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True)
        return text


_texts_of = lru_cache(maxsize=8)(_Texts)


@dataclass(slots=True)
class Agreement:
    """How often the reward model's own choice was the combined one, weighted by recency."""

    agreed: float = 0.0
    seen: float = 0.0

    def note(self, agreed: bool, *, decay: float) -> None:
        """Count one token; the counts before it are multiplied by `decay`."""
        self.agreed = decay * self.agreed + agreed
        self.seen = decay * self.seen + 1


@dataclass(slots=True, kw_only=True)
class SampledToken:
    """The next token of a sequence; log-probabilities are set if they were requested."""

    token: int
    changed: bool
    logprob: float | None = None
    base: float | None = None
    reward: float | None = None
    terms: tuple[tuple[str, float], ...] = ()
    score: float | None = None
    alternatives: tuple[tuple[int, float], ...] = ()
    """The most likely tokens, each with its log-probability."""


SequenceMark: TypeAlias = tuple[int, int, float, float, float, float, "DetokenizerMark"]
"""The state of a `Sequence` before a step: numbers, since each step makes one for every answer."""


@dataclass(slots=True, kw_only=True)
class Sequence:
    """An answer in progress."""

    number: int = 0
    """In the order of admission."""

    prepared: PreparedRequest
    tokenizer: Any
    ends: frozenset[int]
    """End-of-text tokens of the base model."""
    detokenizer: "Detokenizer"
    token_ids: list[int] = field(default_factory=list)
    last: int = -1
    """The newest token, which the models have not seen yet."""
    agreement: Agreement = field(default_factory=Agreement)
    """Of the reward model with the combined choice, in this answer."""
    base_s: float = 0.0
    """Seconds of its share in the models since its last token."""
    reward_s: float = 0.0
    num_cached_tokens: int = 0
    """Tokens of the base model's prompt that the prefix cache had."""

    sampling: Sampling = field(init=False)
    terms: tuple[Term, ...] = field(init=False)
    """What guidance adds to the base model's log-probabilities."""
    kind: tuple[tuple[str, str | None], ...] = field(init=False)
    """Names of the sources of its terms, and of those that they are compared with: sequences of the
    same kind are combined together."""

    def __post_init__(self) -> None:
        self.sampling, self.terms = self.prepared.request.sampling, self.prepared.terms
        self.kind = tuple(
            (each.source.name, None if each.against is None else each.against.name)
            for each in self.terms
        )

    @property
    def drafter(self) -> str | None:
        """The source that drafts its tokens: the reward model with the largest coefficient.

        None without one: a view of the base is no cheaper than the base.
        """
        rewards = {each.source.name: each.at(1) for each in self.terms if each.source.view == OWN}
        if not rewards and not self.terms:
            # Explained answers of the base alone: reward models run for their log-probabilities.
            models = (name for name in self.prepared.inputs if "/" not in name)
            rewards = {name: 0.0 for name in models if name not in ("base", "reference")}
        return max(rewards, key=rewards.__getitem__, default=None)

    @property
    def num_left(self) -> int:
        """Number of tokens that it may still get."""
        return self.prepared.max_new_tokens - len(self.token_ids)

    def mark(self) -> SequenceMark:
        """The state to which `restore` returns if the next step fails."""
        return (
            len(self.token_ids),
            self.last,
            self.agreement.agreed,
            self.agreement.seen,
            self.base_s,
            self.reward_s,
            self.detokenizer.mark(),
        )

    def restore(self, mark: SequenceMark) -> None:
        """Forget everything since `mark`."""
        num_tokens, self.last, agreed, seen, self.base_s, self.reward_s, detokenizer = mark
        del self.token_ids[num_tokens:]
        self.agreement.agreed, self.agreement.seen = agreed, seen
        self.detokenizer.restore(detokenizer)

    def ends_with(self, token: int) -> bool:
        """Whether this token ends the answer without being part of it."""
        ends = token in self.ends and not self.sampling.ignore_end
        return ends or token in self.sampling.stop_token_ids

    def too_early(self, num_drafts: int = 0) -> list[int]:
        """Tokens that would end the answer before its minimum length.

        Args:
            num_drafts: number of drafted tokens before the one in question.
        """
        sampling = self.sampling
        if len(self.token_ids) + num_drafts >= sampling.min_new_tokens:
            return []
        # Also if the end of text is ignored, as in vLLM: its text is empty, and clients that time
        # answers of a fixed length would see no tokens.
        return [*sampling.stop_token_ids, *self.ends]

    def append(self, choice: SampledToken) -> TokenOutput:
        """Add the next token."""
        self.last = choice.token
        ended = self.ends_with(choice.token)
        detailed = self.prepared.request.detailed
        spell = self.detokenizer.spell
        own_bytes = spell(choice.token) if detailed else b""
        alternatives: tuple[Alternative, ...] = ()
        if choice.alternatives:
            alternatives = tuple(
                Alternative(text=self._text_of(token, spelled), bytes=spelled, logprob=logprob)
                for token, logprob in choice.alternatives
                for spelled in [spell(token)]
            )
        text, reason = ("", "stop") if ended else self._add(choice.token)
        if reason:
            text += self.detokenizer.finish()
        base_s, reward_s = self.base_s, self.reward_s
        self.base_s = self.reward_s = 0.0
        return TokenOutput(
            id=choice.token,
            text=text,
            token=self._text_of(choice.token, own_bytes) if detailed else "",
            bytes=own_bytes,
            changed=choice.changed,
            logprob=choice.logprob,
            base=choice.base,
            reward=choice.reward,
            terms=choice.terms,
            score=choice.score,
            alternatives=alternatives,
            counted=not ended,
            finish_reason=reason,
            base_s=base_s,
            reward_s=reward_s,
            num_cached_tokens=self.num_cached_tokens,
        )

    def _text_of(self, token: int, spelled: bytes) -> str:
        """The text of a token; special tokens, which spell nothing, by their names."""
        if spelled:
            return spelled.decode("utf-8", "replace")
        text: str = self.tokenizer.decode([token])
        return text

    def _add(self, token: int) -> tuple[str, FinishReason | None]:
        self.token_ids.append(token)
        text = self.detokenizer.add(token)
        if self.detokenizer.stopped:
            return text, "stop"
        return text, None if self.num_left > 0 else "length"


DetokenizerMark: TypeAlias = tuple[int, list[int], int, str, bool, bool, bytes]
"""The state of a `Detokenizer` before a step."""


class Detokenizer:
    """Turns token ids into text as they come: whole characters, and no part of a stop string."""

    def __init__(self, tokenizer: Any, stops: tuple[str, ...] = (), *, min_tokens: int = 0) -> None:
        """Args:
        tokenizer: of the base model; None if the text is not wanted.
        stops: strings that end the text.
        min_tokens: stop strings that these first tokens complete do not count.
        """
        self._texts = _texts_of(tokenizer)
        self._stops = stops
        self._min_tokens = min_tokens
        self._num_tokens = 0
        self._window: list[int] = []
        """The last tokens with text: first those whose text has been read. Replaced, not modified:
        marks hold it."""
        self._num_read = 0
        self._held = ""
        self._any_text = False
        self._partial = b""
        """What the tokens that are not read spell, which do not complete a character."""
        self.stopped = False
        """Whether a stop string has come; the text ends before it."""

    def mark(self) -> DetokenizerMark:
        """The state to which `restore` returns."""
        return (
            self._num_tokens, self._window, self._num_read, self._held, self._any_text,
            self.stopped, self._partial,
        )  # fmt: skip

    def restore(self, mark: DetokenizerMark) -> None:
        """Forget everything since `mark`."""
        (
            self._num_tokens, self._window, self._num_read, self._held, self._any_text,
            self.stopped, self._partial,
        ) = mark  # fmt: skip

    def add(self, token: int) -> str:
        """Add one token; returns the text that is final now."""
        self._num_tokens += 1
        # A token's text depends on its neighbours (spaces, bytes of one character): decode it with
        # a few tokens before it, and take the difference.
        before = self._before()
        after = self._texts.decode([*self._window, token])
        if after.endswith("\ufffd"):
            self._window = [*self._window, token]
            self._partial += self._texts.piece_bytes(token)
            return ""
        if after == before and self._num_read == len(self._window):
            # A special token. Those after it are the neighbours of those before it.
            return ""
        self._partial = b""
        self._window = [*self._window[self._num_read :], token]
        self._num_read = len(self._window)
        return self._release(after[len(before) :])

    def spell(self, token: int) -> bytes:
        """What a token that comes next adds to the text, in UTF-8; parts of a character, too.

        Blanks before an answer, which are removed from its text, are left out; what `finish` or a
        stop string removes later is not.
        """
        before = self._before()
        after = self._texts.decode([*self._window, token])
        new = after[len(before) :]
        if new.endswith("\ufffd"):
            return self._texts.piece_bytes(token)
        if not self._any_text and not self._held.strip():
            new = new.lstrip()
        spelled = new.encode("utf-8", "replace")
        if spelled.startswith(self._partial):
            return spelled[len(self._partial) :]
        # The tokens before this one are no character, and stand in the text as U+FFFD.
        return new.lstrip("\ufffd").encode("utf-8", "replace")

    def finish(self) -> str:
        """The text that was held back, once no more tokens come."""
        if self.stopped:
            return ""
        before = self._before()
        rest = self._texts.decode(self._window)[len(before) :].rstrip("\ufffd")
        return self._strip_start((self._held + rest).rstrip())

    def _before(self) -> str:
        """The text of the tokens that have been read; nearly always it is one."""
        if self._num_read != 1:
            return self._texts.decode(self._window[: self._num_read])
        return self._texts.of(self._window[0])

    def _release(self, new: str) -> str:
        text, keep = self._held + new, 0
        if self._stops:
            found = [at for stop in self._stops if (at := text.find(stop)) >= 0]
            if found and self._num_tokens > self._min_tokens:
                self.stopped = True
                self._held = ""
                return self._strip_start(text[: min(found)].rstrip())
            keep = max(_overlap(text, stop) for stop in self._stops)
        final = text[: len(text) - keep].rstrip()
        self._held = text[len(final) :]
        return self._strip_start(final)

    def _strip_start(self, text: str) -> str:
        """Remove the blanks that many templates put before an answer."""
        if not self._any_text:
            text = text.lstrip()
        self._any_text = self._any_text or bool(text)
        return text


def piece_bytes(tokenizer: Any, token: int) -> bytes:
    """The bytes that a token stands for, which may be a part of a character; empty if unknown.

    SentencePiece has a token `<0xE2>` for each byte (byte fallback). Byte-level BPE (GPT-2) writes
    bytes as letters.
    """
    piece = tokenizer.convert_ids_to_tokens(token)
    if not isinstance(piece, str):
        return b""
    if found := _BYTE_TOKEN.fullmatch(piece):
        return bytes([int(found[1], 16)])
    if all(letter in _BYTES for letter in piece):
        return bytes(_BYTES[letter] for letter in piece)
    return b""


def _bytes_of_letters() -> dict[str, int]:
    """The letters of byte-level BPE: `bytes_to_unicode` of openai/gpt-2's `encoder.py`."""
    plain = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    letters = {chr(byte): byte for byte in plain}
    return letters | {chr(256 + number): byte for number, byte in enumerate(others)}


_BYTE_TOKEN = re.compile("<0x([0-9A-F]{2})>")
_BYTES = _bytes_of_letters()


def _overlap(text: str, stop: str) -> int:
    """Length of the longest suffix of `text` that is a proper prefix of `stop`."""
    return next(
        (
            size
            for size in range(min(len(stop) - 1, len(text)), 0, -1)
            if text.endswith(stop[:size])
        ),
        0,
    )
