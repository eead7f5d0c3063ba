"""A page with pairs and their negative images, for inspection."""

from pathlib import Path

from tita.data.image_table import open_picture
from tita.report import Page, Panel, SideBySide
from tita.train.training_data import TrainInputs

_MAX_PAIRS = 24


def write_contact_sheet(inputs: TrainInputs, *, title: str, into: Path) -> None:
    """Write evenly spaced pairs with both images: the chosen answer is worse under the right one.

    Args:
        inputs: with negative images.
        title: of the page.
        into: the HTML file.
    """
    number = min(_MAX_PAIRS, len(inputs.pairs))
    page = Page("Negative images", subtitle=title)
    page.heading(f"{number} of {len(inputs.pairs):,} pairs")
    page.text("The chosen answer is preferred under the left image to itself under the right one.")
    comparisons = []
    for index in (n * len(inputs.pairs) // number for n in range(number)):
        pair, negative = inputs.pairs[index], inputs.negatives[index]
        other = negative.apply(open_picture(inputs.images, negative.image))
        own = open_picture(inputs.images, pair.image)
        comparisons.append(
            SideBySide(
                title=pair.question,
                note=f"{pair.id} · rejected: {pair.rejected}",
                panels=(
                    Panel(label="own image", text=pair.chosen, image=own, tone="good"),
                    Panel(label="negative image", text=pair.chosen, image=other, tone="bad"),
                ),
            )
        )
    page.side_by_side(comparisons)
    page.write(into)
