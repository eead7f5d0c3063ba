"""Recipes: defaults, precedence of the sources, and errors with key and remedy."""

import gzip
import json
from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import BaseModel

from tita.errors import TitaError
from tita.jobspec import deepspeed_config, job_names, load_job
from tita.recipe_sources import (
    format_overrides,
    parse_overrides,
    parse_recipe_variable,
    read_recipe_file,
)
from tita.recipes import (
    RECIPES,
    BenchmarkRecipe,
    ContrastRecipe,
    EndpointRankerRecipe,
    ImagePreferenceRecipe,
    LoraRecipe,
    PairsRecipe,
    RewardRankerRecipe,
    TeacherEndpointRecipe,
    TeacherRecipe,
    TrainRecipe,
    VllmRecipe,
    WarmUpRecipe,
    load_recipe,
    validate_recipe,
)


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


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_a_recipe_file_may_be_in_any_encoding_of_yaml(encoding: str, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("criterion: größer\r\nbeta: 0.2\r\n", encoding=encoding)
    assert read_recipe_file(tmp_path / "recipe.yaml") == {"criterion": "größer", "beta": 0.2}


def test_a_recipe_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_bytes(gzip.compress(b"beta: 0.2"))
    with pytest.raises(
        TitaError, match=r"recipe\.yaml: not YAML .*; write lines such as beta: 0\.2"
    ):
        read_recipe_file(tmp_path / "recipe.yaml")


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


RESUMED = {
    TrainRecipe: "allow_cpu attention gradient_checkpointing hang_timeout_s logging_steps out "
    "report_to save_steps",
    PairsRecipe: "allow_cpu out peer_timeout_s",
    EndpointRankerRecipe: "concurrency key_env retries timeout_s",
    TeacherEndpointRecipe: "concurrency key_env retries timeout_s",
    VllmRecipe: "enforce_eager gpu_memory_utilization tensor_parallel_size",
}
"""Fields that may change between two starts of a run: they change no weights and no pairs."""
RESTARTED = {
    TrainRecipe: "balance batch_size beta dtype early_stopping epochs eval_steps "
    "f_alpha_divergence_coef f_divergence freeze_vision gradient_accumulation ignore_columns "
    "image_aspect image_preference images keep label_smoothing ld_alpha learning_rate lora loss "
    "max_length max_steps model nll_weight pairs quantization schedule seed sft too_long "
    # The layout of its checkpoints.
    "deepspeed "
    # A share is taken from the pairs, and the figures of a run are of the same pairs.
    "validation warmup_ratio weight_decay",
    PairsRecipe: "agreement chosen contrast distortions diffusion_steps dtype endpoint engine "
    "ignore_columns image_aspect images judge max_new_tokens max_questions model noise questions "
    "reward samples seed strategy teacher temperature top_p vllm "
    # Which questions are in which batch.
    "batch_size",
    ContrastRecipe: "distorted_copies form noise_step plain_copies plausibility rewards weight "
    "weights",
    EndpointRankerRecipe: "base_url criterion max_tokens model orders",
    ImagePreferenceRecipe: "anchor negative weight",
    LoraRecipe: "alpha dropout rank target_modules",
    RewardRankerRecipe: "model reference",
    TeacherEndpointRecipe: "base_url extra_body model",
    TeacherRecipe: "distorted_copies endpoint model plain_copies",
    # Answers may end at it.
    VllmRecipe: "max_model_len",
    WarmUpRecipe: "answers learning_rate steps",
}
"""Fields with which a run of the same name starts at its beginning; a complete one refuses."""


def kinds_in(kind: type[BaseModel]) -> set[type[BaseModel]]:
    """The type of a recipe and those of the recipes in it."""
    found = {kind}
    for field in kind.model_fields.values():
        for inner in (field.annotation, *get_args(field.annotation)):
            if isinstance(inner, type) and issubclass(inner, BaseModel):
                found |= kinds_in(inner)
    return found


@pytest.mark.parametrize("kind", sorted(kinds_in(TrainRecipe) | kinds_in(PairsRecipe), key=str))
def test_it_is_decided_for_every_field_whether_a_change_restarts_a_run(kind: Any) -> None:
    resumed, restarted = ({*table.get(kind, "").split()} for table in (RESUMED, RESTARTED))
    assert set(kind.model_fields) == resumed | restarted, "decide on the new field"
    assert not resumed & restarted
    assert kind.no_effect == resumed


def test_changes_that_make_no_difference_do_not_change_the_identity() -> None:
    train = {"model": "m", "pairs": "p", "validation": 0.1}
    changed = {"report_to": ["mlflow"], "save_steps": 7, "attention": "eager", "eval_steps": 9}
    pairs = {"model": "m", "questions": "q", "strategy": "judge", "temperature": 1.0}
    asked = {"base_url": "http://a/v1", "model": "j"}
    for kind, values, changes, same in (
        (TrainRecipe, train, changed, True),
        (TrainRecipe, train, {"beta": 0.2}, False),
        (TrainRecipe, train | {"keep": "best"}, {"eval_steps": 9}, False),
        (TrainRecipe, train | {"early_stopping": 2}, {"eval_steps": 9}, False),
        (TrainRecipe, train | {"lora": {"rank": 4}}, {"lora": {"rank": 8}}, False),
        (PairsRecipe, pairs | {"endpoint": asked}, {"endpoint": asked | {"retries": 9}}, True),
        (PairsRecipe, pairs | {"endpoint": asked}, {"endpoint": asked | {"orders": 2}}, False),
        (PairsRecipe, pairs | {"endpoint": asked}, {"vllm": {}, "peer_timeout_s": 9}, True),
    ):
        before, after = validate_recipe(kind, values), validate_recipe(kind, values | changes)
        assert (before.identity() == after.identity()) is same, changes
        assert after.is_equivalent_to(json.loads(before.model_dump_json())) is same, changes
    assert not validate_recipe(TrainRecipe, train).is_equivalent_to(None)
    assert not validate_recipe(TrainRecipe, train).is_equivalent_to({"model": "m", "unknown": 1})
