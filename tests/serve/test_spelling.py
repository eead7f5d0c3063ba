"""Log-probabilities spell the answer: the tokens' bytes, joined, are the text's UTF-8."""

import random
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import openai
import pytest
from serve_process import about, picture
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

from tita.align import Request, Sampling, TokenOutput
from tita.align.forms import UNGUIDED
from tita.align.prompts import PreparedRequest
from tita.align.sequence import Detokenizer, SampledToken, Sequence
from tita.serve.spelling import Speller

TEXT = [
    "This is a picture of a cat.\n\nIt is café au lait, 日本語 and 한국어; naïve résumé 👍🏽 🇨🇭!",
    "Is it? Yes, it is: 12.5 % of them — “quoted” … and the end.",
]
WORDS = [
    "▁This",
    "▁is",
    "▁a",
    "is",
    "▁",
    "This",
    "▁caf",
    "é",
    ".",
    ",",
    "▁日",
    "本",
    "▁the",
    "▁end",
]


def sentence_piece() -> Tokenizer:
    """As Llama 2's and LLaVA-1.5's: `▁` for a blank, and a token for every byte."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *WORDS]
    made = Tokenizer(
        models.BPE({piece: n for n, piece in enumerate(pieces)}, [], byte_fallback=True)
    )
    made.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    made.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return made


def unigram() -> Tokenizer:
    """SentencePiece without byte tokens, as T5's and Gemma's Metaspace."""
    made = Tokenizer(models.Unigram([("<unk>", 0.0), *((word, -1.0) for word in WORDS)], 0, False))
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Metaspace()
    return made


def byte_level() -> Tokenizer:
    """As GPT-2's and Qwen's: letters that stand for bytes."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        TEXT, BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    )
    return made


def words() -> Tokenizer:
    """Whole words, as the demo's."""
    vocabulary = {word: n for n, word in enumerate(["<unk>", "this", "is", "a", "7", "."])}
    made = Tokenizer(models.WordLevel(vocabulary, "<unk>"))
    made.pre_tokenizer = pre_tokenizers.Split(Regex(r"\s+"), "removed")
    return made


MAKERS: list[Callable[[], Tokenizer]] = [sentence_piece, unigram, byte_level, words]


def fast(maker: Callable[[], Tokenizer]) -> Any:
    return PreTrainedTokenizerFast(tokenizer_object=maker(), clean_up_tokenization_spaces=False)


def outputs_of(tokenizer: Any, ids: list[int], *, stops: tuple[str, ...] = ()) -> list[TokenOutput]:
    sampling = Sampling(max_new_tokens=len(ids), stops=stops)
    request = Request(num_logprobs=1, guidance=UNGUIDED, sampling=sampling)
    sequence = Sequence(
        prepared=PreparedRequest(
            request=request, inputs={}, image_digests={}, num_prompt_tokens=1,
            max_new_tokens=len(ids),
        ),
        tokenizer=tokenizer, ends=frozenset(),
        detokenizer=Detokenizer(tokenizer, stops),
    )  # fmt: skip
    outputs: list[TokenOutput] = []
    for token in ids:
        alternatives = ((ids[0], -1.0), (token, -2.0))
        outputs.append(
            sequence.append(SampledToken(token=token, changed=False, alternatives=alternatives))
        )
        if outputs[-1].finish_reason:
            break
    return outputs


@pytest.mark.parametrize("maker", MAKERS)
def test_bytes_are_the_text_whatever_the_tokens(maker: Callable[[], Tokenizer]) -> None:
    """Random tokens: parts of characters, bytes that are no character, blanks and stop strings."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=maker(), clean_up_tokenization_spaces=False
    )
    dice, num_cut = random.Random(5), 0
    for number in range(200):
        ids = [dice.randrange(len(tokenizer)) for _ in range(dice.randrange(1, 25))]
        stops = ("is", ". T", "\n")[: number % 4]
        outputs, speller = outputs_of(tokenizer, ids, stops=stops), Speller()
        spelled = [each for output in outputs for each in speller.add(output)]
        text = "".join(output.text for output in outputs)
        assert b"".join(each.bytes for each in spelled) == text.encode()
        assert [each.output for each in spelled] == outputs
        num_cut += len(outputs) < len(ids)
        for output in outputs:
            own = output.alternatives[1]
            assert (own.text, own.bytes) == (output.token, output.bytes)
    assert num_cut > 0


@pytest.mark.parametrize("maker", [sentence_piece, byte_level])
def test_tokens_spell_real_text(maker: Callable[[], Tokenizer]) -> None:
    """Blanks belong to the words behind them, and each byte of a character to its token."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=maker(), clean_up_tokenization_spaces=False
    )
    num_parts = 0
    for wanted in (*TEXT, "This is a café. This is the end"):
        ids = tokenizer.encode(wanted, add_special_tokens=False)
        outputs = outputs_of(tokenizer, ids)
        # No token's bytes are lost or replaced: those of all are the whole text.
        assert b"".join(output.bytes for output in outputs) == wanted.encode()
        num_parts += sum("\ufffd" in output.token for output in outputs)
        for output in outputs:
            assert output.bytes.decode("utf-8", "replace") == output.token
    assert num_parts > 20


@pytest.mark.parametrize("maker", [sentence_piece, byte_level])
def test_special_tokens_spell_nothing_and_shift_nothing(maker: Callable[[], Tokenizer]) -> None:
    """Also between the bytes of one character: the other tokens have the bytes they have alone."""
    tokenizer, dice = fast(maker), random.Random(7)
    tokenizer.add_special_tokens({"eos_token": "</s>", "pad_token": "<|pad|>"})
    tokenizer.add_tokens([AddedToken("<|image|>", special=True)])
    special = tokenizer.convert_tokens_to_ids(["</s>", "<|pad|>", "<|image|>"])
    num_inside = 0
    for number in range(60):
        ids = tokenizer.encode(TEXT[number % 2], add_special_tokens=False)
        alone = [output.bytes for output in outputs_of(tokenizer, ids)]
        mixed: list[int] = []
        for token in ids:
            # The blank before an answer belongs to its first token.
            while mixed and dice.random() < 0.3:
                mixed.append(dice.choice(special))
            mixed.append(token)
        outputs, speller = outputs_of(tokenizer, mixed), Speller()
        spelled = [each for output in outputs for each in speller.add(output)]
        assert "".join(output.text for output in outputs) == TEXT[number % 2]
        assert [each.bytes for each in spelled if each.output.id not in special] == alone
        for before, each in pairwise(spelled):
            if each.output.id in special:
                assert each.bytes == each.output.bytes == b""
                assert each.output.token in ("</s>", "<|pad|>", "<|image|>")
                num_inside += "\ufffd" in before.output.token
    assert num_inside > 20


def test_a_blank_belongs_to_the_word_behind_it() -> None:
    tokenizer = fast(sentence_piece)
    ids = tokenizer.convert_tokens_to_ids(["▁This", "▁is", "▁a", "▁caf", "<0xC3>", "<0xA9>", "is"])
    outputs = outputs_of(tokenizer, ids)
    assert [output.bytes for output in outputs] == [
        b"This", b" is", b" a", b" caf", b"\xc3", b"\xa9", b"is",
    ]  # fmt: skip
    assert "".join(output.text for output in outputs) == "This is a caféis"
    assert outputs[1].alternatives[0].bytes == b" This"


@pytest.mark.parametrize("stop", [None, "the", "a "])
@pytest.mark.parametrize("stream", [False, True])
def test_logprobs_of_the_server_spell_its_answer(
    client: openai.OpenAI, stop: str | None, stream: bool
) -> None:
    fields = {
        "model": "tita", "messages": about(picture(), "describe the image ."), "seed": 3,
        "temperature": 1.5, "max_tokens": 16, "logprobs": True, "top_logprobs": 3,
        "stop": stop, "extra_body": {"ignore_eos": True},
    }  # fmt: skip
    if stream:
        choices = [c for event in client.chat.completions.create(**fields, stream=True)
                   for c in event.choices]  # fmt: skip
        text = "".join(choice.delta.content or "" for choice in choices)
        tokens = [t for choice in choices if choice.logprobs for t in choice.logprobs.content]
    else:
        (choice,) = client.chat.completions.create(**fields).choices
        text, tokens = choice.message.content, choice.logprobs.content
    assert text
    assert b"".join(bytes(token.bytes) for token in tokens) == text.encode()
    if len(text.split()) > 1:
        assert any(token.token.startswith(" ") for token in tokens)
