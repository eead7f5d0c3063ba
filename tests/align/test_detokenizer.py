"""The text of an answer's tokens, one by one, is the tokenizer's own text of them all."""

from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from tita.align.sequence import Detokenizer

WORDS = ("<unk>", "</s>", "yes", ",", "it", "##s", "is", ".", "n't", "do")


class Shouting(PreTrainedTokenizerFast):
    """One that does more than its backend."""

    def decode(self, token_ids: Any, **options: Any) -> str:  # type: ignore[override]
        return str(super().decode(token_ids, **options)).upper()


def tokenizer_of(kind: type[PreTrainedTokenizerFast], **options: Any) -> PreTrainedTokenizerFast:
    made = Tokenizer(models.WordPiece({word: n for n, word in enumerate(WORDS)}, unk_token="<unk>"))
    made.decoder = decoders.WordPiece(cleanup=False)
    return kind(tokenizer_object=made, unk_token="<unk>", eos_token="</s>", **options)


@pytest.mark.parametrize(
    ("tokenizer", "text"),
    [
        (tokenizer_of(PreTrainedTokenizerFast), "yes , its is ."),
        (tokenizer_of(Shouting), "YES , ITS IS ."),
        (tokenizer_of(PreTrainedTokenizerFast, clean_up_tokenization_spaces=True), "yes, its is."),
    ],
    ids=["backend", "own", "blanks"],
)
def test_text_is_the_tokenizers(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    ids = [WORDS.index(word) for word in ("yes", ",", "it", "##s", "</s>", "is", ".")]
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    detokenizer = Detokenizer(tokenizer)
    assert "".join([*map(detokenizer.add, ids), detokenizer.finish()]) == text
