"""docs/data.md: recipe keys and the example judge."""

import re
from pathlib import Path
from typing import Any

from tita.pairs.judges import Candidate, apply_judge
from tita.recipes import PairsRecipe
from tita.records import Question

TEXT = (Path(__file__).parent.parent.parent / "docs" / "data.md").read_text(encoding="utf-8")


def test_every_key_of_the_recipe_is_documented() -> None:
    table = TEXT.split("| key of the recipe |")[1].split("\n\n")[0]
    keys = {key for line in table.splitlines()[2:] for key in re.findall("`(.+?)`", line[:80])}
    inputs_and_outputs = {"model", "questions", "images", "out", "dtype"}
    assert PairsRecipe.model_fields.keys() - inputs_and_outputs <= keys


def test_the_example_judge_works() -> None:
    (code,) = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)
    module: dict[str, Any] = {}
    exec(code, module)
    question = Question(id="1", text="What?")
    candidates = [
        Candidate(question=question, image=Path("1.png"), chosen=chosen, rejected="four")
        for chosen in ("two", "thirteen")
    ]
    preferences = apply_judge(module["shorter"], candidates, name="shorter")
    assert [preference.better for preference in preferences] == ["chosen", "rejected"]
