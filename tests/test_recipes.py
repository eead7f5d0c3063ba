"""Recipes: defaults, precedence of the sources, and errors with key and remedy."""

from pathlib import Path

import pytest

from tita.errors import TitaError
from tita.jobspec import deepspeed_config, job_names, load_job
from tita.recipe_sources import (
    format_overrides,
    parse_overrides,
    parse_recipe_variable,
    read_recipe_file,
)
from tita.recipes import RECIPES, BenchmarkRecipe, TrainRecipe, load_recipe


def test_every_job_file_is_valid_and_has_a_recipe_type() -> None:
    assert set(job_names()) == set(RECIPES)
    for name in job_names():
        assert load_job(name).description


def test_train_defaults_are_the_papers() -> None:
    recipe = load_recipe(TrainRecipe)
    assert (recipe.beta, recipe.learning_rate, recipe.epochs) == (0.1, 2e-6, 1.0)
    assert (recipe.batch_size, recipe.max_length, recipe.schedule) == (8, 2048, "cosine")


def test_later_sources_override_earlier_ones(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text("beta: 0.2\nseed: 1\nlora: {rank: 8, alpha: 4}\n")
    recipe = load_recipe(
        TrainRecipe,
        read_recipe_file(file),
        {"seed": 2, "lora": {"rank": 16}},
        parse_overrides(["seed=3", "learning_rate=2e-5", "lora.dropout=0"]),
    )
    assert (recipe.beta, recipe.seed, recipe.learning_rate) == (0.2, 3, 2e-5)
    assert recipe.lora is not None
    assert (recipe.lora.rank, recipe.lora.alpha, recipe.lora.dropout) == (16, 4, 0)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["bta=0.2"], "unknown key 'bta'; did you mean 'beta'?"),
        (["lora.rnk=3"], "unknown key 'lora.rnk'; did you mean 'rank'?"),
        (["beta=-1"], "beta: input should be greater than 0"),
        (["beta"], "'beta' is not key=value"),
        (["batch_size=many"], "batch_size: input should be a valid integer"),
    ],
)
def test_errors_have_key_and_remedy(overrides: list[str], words: str) -> None:
    with pytest.raises(TitaError) as caught:
        load_recipe(TrainRecipe, parse_overrides(overrides))
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["[1]", "{", "3"])
def test_the_recipe_variable_must_be_a_json_object(text: str) -> None:
    with pytest.raises(TitaError, match="TITA_RECIPE"):
        parse_recipe_variable(text)


def test_unknown_names_list_the_known_ones() -> None:
    known = ", ".join(job_names())
    with pytest.raises(TitaError, match=f"choose one of {known}"):
        load_job("train")
    with pytest.raises(TitaError, match="choose one of zero2, zero3, zero3_offload"):
        deepspeed_config("zero9")


def test_a_recipe_file_must_be_a_mapping(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text("- 1\n")
    with pytest.raises(TitaError, match=r"recipe\.yaml: a recipe is a mapping"):
        read_recipe_file(file)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("010", "010"), ("a #b", "a #b"), ("off", "off"), ("1:30", "1:30"), ("a: b", "a: b"),
        ("2026-01-01", "2026-01-01"), ("0x10", "0x10"), ("2e-6", 2e-6), ("1.", 1.0), ("-3", -3),
        ("true", True), ("null", None), ("", None), ("'010'", "010"), ("[0, 010]", [0, "010"]),
    ],
)  # fmt: skip
def test_overrides_are_taken_as_typed(text: str, value: object) -> None:
    assert parse_overrides([f"k={text}"]) == {"k": value}
    assert parse_overrides(format_overrides({"k": value})) == {"k": value}


def test_leading_zeros_are_decimal() -> None:
    pairs = {"pairs": "p", "model": "m"}
    recipe = load_recipe(TrainRecipe, pairs, parse_overrides(["seed=010", "model=010"]))
    assert (recipe.seed, recipe.model) == (10, "010")


@pytest.mark.parametrize("text", ["fail_below=.nan", "fail_below=nan", "fail_slower=.inf"])
def test_bound_that_is_never_exceeded_is_refused(text: str) -> None:
    with pytest.raises(TitaError, match="finite number"):
        load_recipe(BenchmarkRecipe, parse_overrides([text]))


def test_address_of_a_benchmark_is_a_url() -> None:
    """Without its scheme no request would succeed, and the job would wait for the server."""
    with pytest.raises(TitaError, match="base_url"):
        load_recipe(BenchmarkRecipe, parse_overrides(["base_url=server:8000/v1"]))


def test_recipe_file_has_the_same_scalars(tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_text("seed: 010\nlearning_rate: 2e-6\n")
    assert read_recipe_file(file) == {"seed": "010", "learning_rate": 2e-6}


def test_unknown_deepspeed_configuration_is_refused_with_the_known_ones() -> None:
    with pytest.raises(TitaError, match="'zero9'; choose one of zero2, zero3, zero3_offload"):
        load_recipe(TrainRecipe, parse_overrides(["deepspeed=zero9"]))


def test_refusals_say_how_to_quote() -> None:
    with pytest.raises(TitaError, match=r"""quote text: --set model='"7"'"""):
        load_recipe(TrainRecipe, {"pairs": "p"}, parse_overrides(["model=7"]))
    with pytest.raises(TitaError, match="close its brackets and quotes"):
        parse_overrides(["model=[x"])
