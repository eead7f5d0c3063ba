"""A prompt on its way into a model: cut into pieces, or together with others of its kind.

Legend: B rows, L tokens of a prompt.
"""

import hashlib
from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING, Any

from tita.errors import TitaError
from tita.vlm import VLM, Inputs

if TYPE_CHECKING:
    from torch import Tensor

    from tita.align.cache import RoomyCache


_SEE_AHEAD_WITHIN_IMAGES = ("gemma3",)
"""Models whose tokens see later ones only within an image, which is never cut."""


def sees_ahead(vlm: VLM) -> bool:
    """Whether tokens of a prompt may see later ones, as all of PaliGemma's do.

    What is kept of an image is then the question's, too, and no prompt can be cut. Models that
    mask otherwise than by cause make their own masks for `generate`.
    """
    own_masks = hasattr(vlm.model, "create_masks_for_generate")
    return own_masks and vlm.model.config.model_type not in _SEE_AHEAD_WITHIN_IMAGES


class Prefill:
    """One row on its way in."""

    def __init__(
        self, inputs: Inputs, *, positions: "Tensor", offset: int, max_new_tokens: int
    ) -> None:
        """Args:
        inputs: what the model's processor made of one prompt.
        positions: [A, L] of its tokens, in A directions.
        offset: what is to be added to the number of a later token.
        max_new_tokens: of the answer.
        """
        self.max_new_tokens = max_new_tokens
        self.inputs = inputs
        self.positions = positions
        self.offset = offset
        self.ids: list[int] = inputs["input_ids"][0].tolist()
        self.pieces: list[tuple[int, int]] = []
        """First and last column, exclusive, of what is still to be taken in."""
        self.cache: RoomyCache | None = None
        self.row = 0
        """Its row in `cache`, which it may share with others."""
        self.prefix_key: Hashable = None
        """What the KV up to the last image is kept under."""
        self.prefix_length = 0
        self._images_end = 0

    @property
    def length(self) -> int:
        """L."""
        return len(self.ids)

    @property
    def num_to_come(self) -> int:
        """Columns to make room for behind the piece that is next, the answer's or some of them.

        An answer that may be long is seldom so: room for half as much as the prompt has will do.
        """
        taken = self.pieces[0][1] if self.pieces else self.length
        return self.length - taken + min(self.max_new_tokens, max(self.length // 2, 64))

    @property
    def extras(self) -> Inputs:
        """What the model takes beside tokens: image tensors, and some per token."""
        plain = ("input_ids", "attention_mask")
        return {name: value for name, value in self.inputs.items() if name not in plain}

    @property
    def kind(self) -> Hashable:
        """Prompts of the same kind can be taken in together; None: only by itself."""
        if self.pieces != [(0, self.length)] or self.prefix_key is not None:
            return None
        shapes = [
            (name, () if self.is_per_token(name) else tuple(tensor.shape))
            for name, tensor in self.extras.items()
        ]
        return len(self.positions), *shapes

    def is_per_token(self, name: str) -> bool:
        """Whether one of the `extras` has a value for each token."""
        return bool(self.inputs[name].shape == self.inputs["input_ids"].shape)

    def cut(
        self, *, size: int, image_token: int | None, whole: bool, keep_images: bool, digest: str
    ) -> None:
        """Lay out the pieces, none but that of the images longer than `size`.

        Args:
            size: tokens of a piece.
            image_token: what stands for images, if the model has such a token.
            whole: leave it in one piece.
            keep_images: end a piece with the last image, so that the KV up to there can be kept.
            digest: of the images.

        Raises:
            TitaError: there are images, and nothing that stands for them.
        """
        images = [place for place, token in enumerate(self.ids) if token == image_token]
        if not images and not all(map(self.is_per_token, self.extras)):
            raise TitaError(
                "cannot tell which tokens of its prompt stand for images",
                remedy="name `image_token_id` in the model's config.json",
            )
        end = self._images_end = self.length if whole else images[-1] + 1 if images else 0
        if keep_images and 0 < end < self.length:
            self.prefix_key = (hashlib.sha256(str(self.ids[:end]).encode()).digest(), digest)
            self.prefix_length = end
        if self.length <= size and self.prefix_key is None:
            end = self.length
        # The image tokens and their pixels come in one call; what follows is cut small.
        self.pieces = [*([(0, end)] if end else []), *_cut(end, self.length, size)]

    def shorten(self, size: int) -> None:
        """Let the next piece have so many tokens at most, unless images are in it."""
        start, end = self.pieces[0]
        if start >= self._images_end and end - start > size:
            self.pieces[:1] = [(start, start + size), (start + size, end)]

    def skip_prefix(self, cache: "RoomyCache") -> None:
        """Go on from a cache in which the KV up to the last image is already."""
        self.cache = cache
        self.pieces = self.pieces[1:]


def together(
    prefills: Sequence[Prefill], start: int, end: int, *, with_images: bool
) -> dict[str, Any]:
    """Model inputs of some columns: `input_ids[B, Q]`, `position_ids`, and what else there is."""
    import torch

    first = prefills[0]
    # Whatever pads must be no image token; the last of a prompt is none.
    ids = [prefill.inputs["input_ids"] for prefill in prefills]
    positions = [prefill.positions for prefill in prefills]
    found: dict[str, Any] = {
        "input_ids": _flush(ids, end, value=first.ids[-1])[:, start:end],
        "position_ids": torch.stack([_flush([each], end) for each in positions], 1)[..., start:end],
    }
    if len(first.positions) == 1:
        found["position_ids"] = found["position_ids"][0]
    for name in first.extras:
        tensors = [prefill.inputs[name] for prefill in prefills]
        if first.is_per_token(name):
            found[name] = _flush(tensors, end)[:, start:end]
        elif with_images:
            found[name] = torch.cat(tensors)
    return found


def _flush(rows: Sequence["Tensor"], width: int, *, value: int = 0) -> "Tensor":
    """Rows[..., L] one below the other as [B, width], flush at the right."""
    import torch

    pad = torch.nn.functional.pad
    return torch.cat([pad(row, (max(width - row.shape[-1], 0), 0), value=value) for row in rows])


def _cut(start: int, end: int, size: int) -> list[tuple[int, int]]:
    return [(at, min(at + size, end)) for at in range(start, end, size)]
