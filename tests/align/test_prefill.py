"""Chunk sizes follow measured times; images are never cut."""

import pytest
import torch

from tita.align.prefill import ChunkPacer, Prefill


def _settled(pacer: ChunkPacer, *, token_s: float, chunk_s: float = 0.01) -> int:
    for _ in range(40):
        pacer.note_decode(0.01)
        pacer.note_chunk(pacer.num_tokens, chunk_s + token_s * pacer.num_tokens)
    return pacer.num_tokens


def test_chunk_size_follows_token_cost():
    pacer = ChunkPacer(512)
    pacer.note_chunk(512, 10.0)
    assert pacer.num_tokens == 512, "no running answers to delay"
    slow = _settled(pacer, token_s=0.0001)
    assert 0.5 <= (0.01 + 0.0001 * slow) / 0.03 <= 1.5, "a chunk takes about three steps"
    assert _settled(pacer, token_s=0.1) == 32, "not below the minimum"
    assert _settled(pacer, token_s=0.0) == 512


def test_one_slow_chunk_halves_at_most():
    pacer = ChunkPacer(512)
    pacer.note_decode(0.01)
    pacer.note_chunk(512, 100.0)
    assert pacer.num_tokens == 256


def test_short_chunks_are_not_informative():
    pacer = ChunkPacer(512)
    _settled(pacer, token_s=0.0001)
    before = pacer.num_tokens
    pacer.note_chunk(1, 0.012)
    assert pacer.num_tokens == before


@pytest.mark.parametrize("size", [4, 100])
def test_chunks_are_shortened_except_images(size: int):
    import torch

    ids = torch.tensor([[1, 9, 9, 9, 9, 9, 9, *range(10, 30)]])
    prefill = Prefill(
        inputs={"input_ids": ids}, positions=torch.zeros(1, 27), offset=0, max_new_tokens=9
    )
    prefill.cut(size=16, image_tokens={9}, whole=False, keep_images=True, digest="")
    taken = []
    while prefill.chunks:
        prefill.shorten(size)
        taken.append(prefill.chunks.pop(0))
    assert taken[0] == (0, 7), "all images in one call"
    assert [start for start, _ in taken[1:]] == [end for _, end in taken[:-1]]
    assert taken[-1][1] == 27
    assert max(end - start for start, end in taken[1:]) == min(size, 16)


def test_prompts_whose_inputs_have_places_in_their_pixels_are_taken_in_alone():
    """Molmo 2's: joined with another prompt's, they would be places in that one's pixels."""

    def prefill(name: str) -> Prefill:
        ids = torch.tensor([[1, 2, 3]])
        inputs = {"input_ids": ids, "attention_mask": ids, name: torch.zeros(2, 4)}
        made = Prefill(inputs=inputs, positions=ids, offset=0, max_new_tokens=1)
        made.cut(size=8, image_tokens=(2,), whole=False, keep_images=False, digest="")
        return made

    assert prefill("pixel_values").kind == prefill("pixel_values").kind is not None
    assert prefill("image_token_pooling").kind is None
