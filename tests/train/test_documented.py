"""docs/training.md agrees with the recipe and the memory estimate."""

import re
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from tita.jobspec import merge
from tita.recipe_sources import parse_overrides
from tita.recipes import (
    ImagePreferenceRecipe,
    LoraRecipe,
    TrainRecipe,
    WarmUpRecipe,
    load_recipe,
    validate_recipe,
)
from tita.train.memory import ModelShape, WorldSize, estimate_memory

TEXT = (Path(__file__).parents[2] / "docs" / "training.md").read_text(encoding="utf-8")
GIB = 1024**3
# Layers, width, heads and vocabulary of language models of such sizes.
FORMS = {
    "1.4B": (24, 2048, 32, 32_000),
    "3B": (32, 2560, 32, 51_200),
    "7B": (32, 4096, 32, 32_000),
    "13B": (40, 5120, 40, 32_000),
}


def rows(head: str) -> list[list[str]]:
    """The cells of the table whose first heading is `head`."""
    table = TEXT.split(f"| {head} |")[1].split("\n\n")[0]
    return [line.strip("| ").split(" |") for line in table.splitlines()[2:]]


def given(value: str) -> Any:
    """What `--set key=value` would make of it; None if the cell is empty."""
    return parse_overrides([f"key={value}"])["key"] if value else None


def defaults() -> dict[str, Any]:
    recipe = load_recipe(TrainRecipe)
    parts: dict[str, BaseModel] = {"lora": LoraRecipe(), "sft": WarmUpRecipe(steps=1)}
    parts["image_preference"] = ImagePreferenceRecipe()
    known = {k: v for k, v in recipe.model_dump(mode="json").items() if k not in parts}
    known |= {f"{name}.{key}": value for name, part in parts.items() for key, value in part}
    assert recipe.model_fields_set < TrainRecipe.model_fields.keys()
    # It must be given.
    return known | {"sft.steps": None}


def test_the_table_has_every_recipe_key_with_its_default() -> None:
    documented = {cells[0].strip("` "): given(cells[1].strip("` ")) for cells in rows("key")}
    assert documented == defaults()


def test_shown_settings_are_valid() -> None:
    code = [*re.findall(r"`([^`\n]+)`", TEXT), *re.findall(r"--set (\S+)", TEXT)]
    words = [word.strip("`") for text in code for word in text.split()]
    shown = [word for word in words if re.fullmatch(r"(?!key=)[a-z_.]+=[^=$]+", word)]
    assert len(shown) > 10
    values = load_recipe(TrainRecipe).model_dump(exclude_none=True)
    for setting in shown:
        validate_recipe(TrainRecipe, merge(values, parse_overrides([setting])))


@pytest.mark.parametrize("cells", rows("parameters"), ids=lambda cells: cells[0])
def test_the_memory_table_equals_the_estimate(cells: list[str]) -> None:
    name, *documented = (cell.strip() for cell in cells)
    layers, width, heads, vocabulary = FORMS[name]
    num_parameters = int(float(name.rstrip("B")) * 1e9)

    def gib(gpus: int, num_trained: int = num_parameters, **changes: Any) -> tuple[int, int]:
        shape = ModelShape(
            num_parameters=num_parameters,
            num_trained=num_trained,
            largest_layer=vocabulary * width,
            layers=((layers, width, heads),),
            vocabulary=vocabulary,
            trains_head="lora" not in changes,
            num_quantizable=num_parameters - 2 * vocabulary * width,
        )
        recipe = TrainRecipe(model="m", pairs="p", **changes)
        found = estimate_memory(
            recipe, shape=shape, world=WorldSize(total=gpus, local=gpus), tokens=1000
        )
        return round(found.device / GIB), round((found.host + found.weights) / GIB)

    # Four square matrices a layer and three to or from an MLP 2.7 times as wide.
    adapters = int(LoraRecipe().rank * layers * width * (4 * 2 + 3 * 3.7))
    lora: dict[str, Any] = {"num_trained": adapters, "lora": LoraRecipe()}
    sizes = [gib(1, **lora, quantization="4bit")[0], gib(1, **lora)[0]]
    sizes += [gib(gpus)[0] for gpus in (1, 2, 4, 8)]
    sizes += [gib(8, deepspeed="zero3")[0]]
    device, node = gib(1, deepspeed="zero3_offload")
    assert documented == [*map(str, sizes), f"{device}; {node}"]
