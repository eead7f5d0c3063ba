"""Sample questions on real images, for a first benchmark without a download.

Photographs and scans of handwriting come with scikit-learn: `china.jpg` by danielbuechele and
`flower.jpg` by vultilion (both CC BY 2.0), digits from the UCI data set of Alpaydin and Kaynak
(CC BY 4.0). Words are drawn with Pillow. Every question has references.
"""

import random
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont
from sklearn.datasets import load_digits, load_sample_image

from tita.bench.evaluate import SAMPLE_SUITE
from tita.bench.llava_prompts import SHORT_PROMPT, with_options
from tita.bench.questions import BenchmarkItem, check_target, write_items
from tita.errors import TitaError
from tita.storage.files import is_stream
from tita.terminal import progress, say

_IN_PHOTO = {
    "china": ("building", "tree", "lake", "roof"),
    "flower": ("flower", "petal"),
}
_ABSENT = ("dog", "car", "computer", "bicycle", "clock")
_WORDS = (
    "OPEN", "STATION", "COFFEE", "MARKET", "LIBRARY", "EXIT", "BRIDGE", "MUSEUM", "GARDEN",
    "TICKET", "HARBOUR", "BAKERY", "THEATRE", "WINTER", "SILVER", "ORANGE",
)  # fmt: skip
_INKS = {"red": (200, 30, 30), "blue": (30, 60, 200), "green": (20, 130, 40), "black": (0, 0, 0)}

Maker = Callable[[random.Random, Path], dict[str, Any]]


def write_sample(path: Path, *, num: int = 24, seed: int = 0) -> list[BenchmarkItem]:
    """Write `num` questions to `path`, and their images `sample_1.jpg`, ... to the same folder.

    The files appear when all of them are complete: an interruption leaves the folder as it was, so
    that the questions of an earlier sample never meet images of this one.

    The categories alternate: existence in a photograph (yes/no), handwritten digits, printed words,
    multiple choice, and arithmetic without an image.

    Raises:
        TitaError: `num` is less than one, or `path` is a folder, a device, or has the suffix of a
            table.
    """
    if num < 1:
        raise TitaError(f"invalid number {num}", where="--num", remedy="give 1 or more")
    check_target(path)
    if is_stream(path):
        raise TitaError(
            "no images can be written next to a device",
            where=str(path),
            remedy="name a file, such as sample/questions.jsonl",
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    makers: tuple[tuple[str, Maker | None], ...] = (
        ("existence", _existence),
        ("counting", _digits),
        ("reading", _word),
        ("choice", _choice),
        ("text", None),
    )
    items = []
    try:
        with (
            tempfile.TemporaryDirectory(prefix=".tita-", dir=path.parent) as scratch,
            progress("making questions", total=num, unit="questions") as advance,
        ):
            for index in range(num):
                rng = random.Random(f"{seed}-{index}")
                category, maker = makers[index % len(makers)]
                image = f"sample_{index + 1}.jpg"
                fields = _arithmetic(rng) if maker is None else maker(rng, Path(scratch) / image)
                items.append(
                    BenchmarkItem(
                        id=f"sample-{index + 1}",
                        suite=SAMPLE_SUITE,
                        category=category,
                        images=() if maker is None else (image,),
                        **fields,
                    )
                )
                advance()
            for made in Path(scratch).iterdir():
                made.replace(path.parent / made.name)
    except KeyboardInterrupt:
        say("interrupted; no question was written")
        raise
    write_items(path, items)
    return items


def _existence(rng: random.Random, path: Path) -> dict[str, Any]:
    name = rng.choice(sorted(_IN_PHOTO))
    _photo(name).save(path, quality=88)
    present = rng.random() < 0.5
    what = rng.choice(_IN_PHOTO[name] if present else _ABSENT)
    return {
        "text": f"Is there a {what} in the image?\n{SHORT_PROMPT}",
        "references": ("yes" if present else "no",),
        "metric": "yes-no",
    }


def _digits(rng: random.Random, path: Path) -> dict[str, Any]:
    count = rng.randint(1, 5)
    scans = [rng.choice(_scans()) for _ in range(count)]
    canvas = Image.new("L", (96 * count + 32, 128), 255)
    for column, (_, scan) in enumerate(scans):
        canvas.paste(scan.resize((96, 96), Image.Resampling.BICUBIC), (16 + 96 * column, 16))
    canvas.convert("RGB").save(path, quality=92)
    if rng.random() < 0.5:
        text, answer = "How many handwritten digits are in the image?", str(count)
    else:
        text, answer = "What is the first digit from the left?", str(scans[0][0])
    return {"text": f"{text}\n{SHORT_PROMPT}", "references": (answer,), "metric": "exact"}


def _word(rng: random.Random, path: Path) -> dict[str, Any]:
    word, ink = rng.choice(_WORDS), rng.choice(sorted(_INKS))
    _sign(word, ink=_INKS[ink]).save(path, quality=92)
    if rng.random() < 0.7:
        text, answer, metric = "What word is written in the image?", word.lower(), "anls"
    else:
        text, answer, metric = "What colour is the writing?", ink, "exact"
    return {"text": f"{text}\n{SHORT_PROMPT}", "references": (answer,), "metric": metric}


def _choice(rng: random.Random, path: Path) -> dict[str, Any]:
    name = rng.choice(sorted(_IN_PHOTO))
    _photo(name).save(path, quality=88)
    right = {"china": "a temple by a lake", "flower": "a flower in bloom"}[name]
    options = [right, "a street at night", "a plate of food", "a football match"]
    rng.shuffle(options)
    return {
        "text": with_options("What does the photograph show?", options),
        "references": ("ABCD"[options.index(right)],),
        "choices": tuple(options),
        "metric": "choice",
    }


def _arithmetic(rng: random.Random) -> dict[str, Any]:
    a, b = rng.randint(2, 60), rng.randint(2, 40)
    return {
        "text": f"What is {a} plus {b}?\n{SHORT_PROMPT}",
        "references": (str(a + b),),
        "metric": "exact",
    }


@cache
def _photo(name: str) -> Image.Image:
    return Image.fromarray(load_sample_image(f"{name}.jpg"))


@cache
def _scans() -> list[tuple[int, Image.Image]]:
    digits = load_digits()
    return [
        (int(label), Image.fromarray((255 - scan * 255 / 16).astype("uint8")))
        for label, scan in zip(digits.target, digits.images, strict=True)
    ]


def _sign(word: str, *, ink: tuple[int, int, int]) -> Image.Image:
    image = Image.new("RGB", (384, 160), (245, 240, 225))
    pen = ImageDraw.Draw(image)
    pen.rectangle((6, 6, 377, 153), outline=ink, width=4)
    pen.text((192, 80), word, fill=ink, anchor="mm", font=ImageFont.load_default(size=56))
    return image
