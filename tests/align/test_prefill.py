"""Chunks of prompts are as long as the pace of running answers allows."""

import pytest

from tita.align.prefill import ChunkPacer, Prefill


def _settled(pacing: ChunkPacer, *, s_a_token: float, s_a_chunk: float = 0.01) -> int:
    for _ in range(40):
        pacing.note_decode(0.01)
        pacing.note_chunk(pacing.num_tokens, s_a_chunk + s_a_token * pacing.num_tokens)
    return pacing.num_tokens


def test_chunks_follow_what_tokens_cost():
    pacing = ChunkPacer(512)
    pacing.note_chunk(512, 10.0)
    assert pacing.num_tokens == 512, "nobody writes: nobody is held up"
    slow = _settled(pacing, s_a_token=0.0001)
    assert 0.5 <= (0.01 + 0.0001 * slow) / 0.03 <= 1.5, "a chunk takes about three steps"
    assert _settled(pacing, s_a_token=0.1) == 32, "never so short that it comes in not at all"
    assert _settled(pacing, s_a_token=0.0) == 512


def test_one_slow_chunk_costs_half_at_most():
    pacing = ChunkPacer(512)
    pacing.note_decode(0.01)
    pacing.note_chunk(512, 100.0)
    assert pacing.num_tokens == 256


def test_short_chunks_say_nothing_about_long_ones():
    pacing = ChunkPacer(512)
    _settled(pacing, s_a_token=0.0001)
    before = pacing.num_tokens
    pacing.note_chunk(1, 0.012)
    assert pacing.num_tokens == before


@pytest.mark.parametrize("size", [4, 100])
def test_pieces_are_cut_shorter_but_images_are_not(size: int):
    import torch

    ids = torch.tensor([[1, 9, 9, 9, 9, 9, 9, *range(10, 30)]])
    prefill = Prefill({"input_ids": ids}, positions=torch.zeros(1, 27), offset=0, max_new_tokens=9)
    prefill.cut(size=16, image_token=9, whole=False, keep_images=True, digest="")
    taken = []
    while prefill.chunks:
        prefill.shorten(size)
        taken.append(prefill.chunks.pop(0))
    assert taken[0] == (0, 7), "all images in one call"
    assert [start for start, _ in taken[1:]] == [end for _, end in taken[:-1]]
    assert taken[-1][1] == 27
    assert max(end - start for start, end in taken[1:]) == min(size, 16)
