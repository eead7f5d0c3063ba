"""The gallery of answers that changed their score, as data that the page's script shows."""

import base64
import io
from collections.abc import Sequence
from html import escape
from importlib import resources
from pathlib import Path
from typing import Any

from tita.bench.methods import Method
from tita.errors import TitaError
from tita.json_text import dump_json
from tita.report import Page
from tita.suites.comparison import SetRuns
from tita.suites.report_text import text
from tita.suites.verdict import Language
from tita.vlm.images import open_image

_MAX_ROWS_PER_SET = 1_000
_MAX_IMAGES_PER_SIDE = 12
"""Images of a set's won and of its lost questions; others are shown without."""
_MAX_CHARS = 1_500
_SIDE = 240


def add_flipped(
    page: Page,
    sets: Sequence[SetRuns],
    *,
    method: Method,
    language: Language = "en",
) -> int:
    """Add the gallery of questions on which a method and the base have other scores.

    Returns:
        The number of questions that changed.
    """
    rows: list[list[Any]] = []
    images: list[str] = []
    num_all = 0
    for number, runs in enumerate(sets):
        changed = flipped(runs, method)
        num_all += len(changed)
        rows += _rows(number, runs, changed[:_MAX_ROWS_PER_SET], method=method, images=images)
    page.heading(text("flipped", language))
    if not rows:
        page.text(text("nothing flipped", language))
        return 0
    left_out = num_all - len(rows)
    more = text("left out", language, number=left_out) if left_out else ""
    page.text(f"{text('flipped note', language)} {more}".strip())
    data = {
        "sets": [runs.title for runs in sets],
        "texts": {name: text(name, language) for name in ("won", "lost", "reference")}
        | {"count": text("count", language, shown="{shown}", all="{all}")},
        "methods": ["base", method.name],
        "rows": rows,
        "images": images,
    }
    style, script = (
        resources.files("tita.suites").joinpath(name).read_text(encoding="utf-8")
        for name in ("suite_page.css", "suite_page.js")
    )
    # "</script>" in an answer must not end the element.
    encoded = dump_json(data, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
    page.embed(
        f'{_filters(sets, language)}<div class="gallery" id="flipped"></div>'
        f'<button class="more" type="button">{escape(text("more", language))}</button>'
        f'<script type="application/json" id="flipped-data">{encoded}</script>',
        style=style,
        script=script,
    )
    return num_all


def flipped(runs: SetRuns, method: Method) -> list[tuple[str, float]]:
    """(question id, change of its score) of the questions whose score changed; losses first."""
    base, other = runs.runs.get("base"), runs.runs.get(method.name)
    if base is None or other is None:
        return []
    changes = [
        (identity, other.scored[identity][1]["score"] - counts["score"])
        for identity, (_, counts) in base.scored.items()
        if identity in other.scored
    ]
    changed = [(identity, change) for identity, change in changes if change]
    losses = [each for each in changed if each[1] < 0]
    gains = [each for each in changed if each[1] > 0]
    # In turn, so that a cut leaves both.
    mixed = [each for pair in zip(losses, gains, strict=False) for each in pair]
    shorter = min(len(losses), len(gains))
    return mixed + losses[shorter:] + gains[shorter:]


def _rows(
    number: int,
    runs: SetRuns,
    changed: Sequence[tuple[str, float]],
    *,
    method: Method,
    images: list[str],
) -> list[list[Any]]:
    base, other = runs.runs["base"], runs.runs[method.name]
    shown = {1: 0, -1: 0}
    rows = []
    for identity, change in changed:
        question = base.scored[identity][0]
        side = 1 if change > 0 else -1
        image = None
        if question.image and shown[side] < _MAX_IMAGES_PER_SIDE:
            thumbnail = _thumbnail(runs.images / question.image)
            if thumbnail:
                image = len(images)
                images.append(thumbnail)
                shown[side] += 1
        answered = other.scored[identity][0]
        rows.append(
            [
                number, side, identity, base.prompts.get(identity, "")[:_MAX_CHARS],
                question.answer[:_MAX_CHARS], answered.answer[:_MAX_CHARS],
                ", ".join(question.references)[:200], image, answered.changed,
            ]
        )  # fmt: skip
    return rows


def _thumbnail(path: Path) -> str:
    """A small copy as a data: URL; empty if the image cannot be read."""
    try:
        image = open_image(path)
    except TitaError:
        return ""
    image.thumbnail((_SIDE, _SIDE))
    content = io.BytesIO()
    image.save(content, "jpeg", quality=70)
    return f"data:image/jpeg;base64,{base64.b64encode(content.getvalue()).decode()}"


def _filters(sets: Sequence[SetRuns], language: Language) -> str:
    titles = "".join(
        f'<option value="{number}">{escape(runs.title)}</option>'
        for number, runs in enumerate(sets)
    )
    sides = "".join(
        f'<option value="{value}">{escape(text(name, language))}</option>'
        for name, value in (("won", 1), ("lost", -1))
    )
    return (
        '<div class="filters">'
        f'<label>{escape(text("set", language))} <select name="set"><option value="">'
        f"{escape(text('all sets', language))}</option>{titles}</select></label>"
        f'<label>{escape(text("result", language))} <select name="side"><option value="">'
        f"{escape(text('won and lost', language))}</option>{sides}</select></label>"
        f'<label>{escape(text("search", language))} <input name="words" type="search"></label>'
        '<span class="count"></span></div>'
    )
