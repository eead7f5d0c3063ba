"""The answer of contrastive decoding, or of a teacher, is preferred, without labels."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from tests.adapters import merged, save_adapter
from tests.pairs import judge_server
from tests.pairs.conftest import JudgeProcess
from tests.pairs.workers import start
from tita.align import Engine, Request
from tita.align.forms import UNGUIDED, Guidance
from tita.data import read_pairs, read_questions
from tita.demo.models import demo_model_path
from tita.errors import ExitCode, TitaError
from tita.recipes import PairsRecipe, validate_recipe
from tita.records import Pair
from tita.storage import Store
from tita.vlm.images import open_image
from tita.vlm.loading import Models, load_vlm, model_digest

RECIPE = {"strategy": "contrast", "noise": "ddpm", "contrast": {"weight": 1.0, "plain_copies": 2}}


def answer(engine: Engine, pair: Pair, images: Path, guidance: Guidance) -> str:
    image = open_image(images / pair.image)
    (found,) = engine.generate(
        [Request(question=pair.question, images=(image,), guidance=guidance)]
    )
    return found.text


@pytest.mark.slow
def test_answer_with_contrast_is_preferred(
    store: Store, environment: dict[str, str], tmp_path: Path
) -> None:
    start(tmp_path, environment, **RECIPE).succeed()
    tree, images = store.pull_tree("pairs/r"), store.pull_tree("data")
    pairs = list(read_pairs(tree / "pairs.jsonl"))
    engine = Engine(Models(load_vlm(demo_model_path("base"))))
    vcd = Guidance.of(form="vcd", weight=1.0)
    plain = [pair for pair in pairs if pair.id.rpartition("/")[2].startswith("plain")]
    noisy = [pair for pair in pairs if pair not in plain]
    assert plain
    assert noisy
    for pair in pairs:
        assert pair.chosen == answer(engine, pair, images, vcd)
    for pair in plain:
        assert pair.rejected == answer(engine, pair, images, UNGUIDED) != pair.chosen
    # Each plain pair is there twice, and ids are unique.
    contents = [dataclasses.replace(pair, id="") for pair in plain]
    assert all(contents.count(each) == 2 for each in contents)
    assert len({pair.id for pair in pairs}) == len(pairs)
    lineage = json.loads((tree / "lineage.json").read_text())
    assert lineage["num_dropped"]["plain: answers agree"] > 0
    assert "with contrast" in (tree / "contact_sheet.html").read_text()


@pytest.mark.slow
def test_answers_of_several_reward_models_are_preferred(
    store: Store, environment: dict[str, str], tmp_path: Path
) -> None:
    """One of them a LoRA adapter of the base model itself."""
    base, reward = (load_vlm(demo_model_path(role)) for role in ("base", "reward"))
    folder = save_adapter(base.model, tmp_path / "adapter", base=demo_model_path("base"), seed=1)
    rewards = {"faithful": str(demo_model_path("reward")), "brief": str(folder)}
    weights = {"faithful": 0.5, "brief": 0.3}
    contrast = {"form": "tita", "rewards": rewards, "weights": weights, "distorted_copies": 0}
    recipe = {"strategy": "contrast", "contrast": contrast, "max_questions": 24}
    start(tmp_path, environment, **recipe).succeed()
    tree, images = store.pull_tree("pairs/r"), store.pull_tree("data")
    pairs = list(read_pairs(tree / "pairs.jsonl"))
    assert pairs
    more = {"faithful": reward, "brief": merged(base, folder)}
    engine = Engine(Models(base, more=more))
    for pair in pairs:
        assert pair.chosen == answer(engine, pair, images, Guidance(weights=weights))
        assert pair.rejected == answer(engine, pair, images, UNGUIDED)
    lineage = json.loads((tree / "lineage.json").read_text())
    digests = {name: each["digest"] for name, each in lineage["rewards"].items()}
    assert digests["faithful"] == model_digest(reward)
    assert digests["brief"] not in (digests["faithful"], lineage["model"]["digest"])


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["contrast", "teacher"])
def test_references_are_not_read(
    strategy: str, store: Store, environment: dict[str, str], tmp_path: Path
) -> None:
    teacher = {"teacher": {"model": str(demo_model_path("reward"))}}
    recipe = RECIPE if strategy == "contrast" else {"noise": "ddpm", **teacher}
    recipe = {**recipe, "strategy": strategy, "max_questions": 12}
    start(tmp_path, environment, **recipe).succeed()
    labelled = list(read_pairs(store.pull_tree("pairs/r") / "pairs.jsonl"))
    folder = store.pull_tree("data", into=tmp_path / "unlabelled")
    (file,) = folder.glob("*.jsonl")
    questions = list(read_questions(file))
    file.write_text(
        "".join(
            json.dumps({"id": q.id, "question": q.text, "image": q.image}) + "\n" for q in questions
        )
    )
    store.push_tree(folder, "unlabelled")
    start(
        tmp_path, environment, run="s", questions="unlabelled", images="unlabelled", **recipe
    ).succeed()  # fmt: skip
    assert list(read_pairs(store.pull_tree("pairs/s") / "pairs.jsonl")) == labelled


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["model", "endpoint"])
def test_answer_of_a_teacher_is_preferred(
    kind: str, judge: JudgeProcess, store: Store, environment: dict[str, str], tmp_path: Path
) -> None:
    """A teacher that is another model, or an endpoint; the base's own answers are rejected."""
    reward = str(demo_model_path("reward"))
    endpoint = {"base_url": judge.url, "model": "t", "extra_body": {"guidance_form": "tita_vcd"}}
    teacher = {"model": reward} if kind == "model" else {"endpoint": endpoint}
    recipe = {"strategy": "teacher", "noise": "ddpm", "teacher": teacher, "max_questions": 12}
    stderr = start(tmp_path, environment, **recipe).succeed()
    tree, images = store.pull_tree("pairs/r"), store.pull_tree("data")
    pairs = list(read_pairs(tree / "pairs.jsonl"))
    base, other = (
        Engine(Models(load_vlm(path))) for path in (demo_model_path("base"), Path(reward))
    )
    plain = [pair for pair in pairs if pair.id.endswith("/plain")]
    assert plain
    for pair in pairs:
        if kind == "model":
            assert pair.chosen == answer(other, pair, images, UNGUIDED)
        else:
            assert pair.chosen == f"a {judge_server.score(pair.question)}"
    for pair in plain:
        assert pair.rejected == answer(base, pair, images, UNGUIDED) != pair.chosen
    lineage = json.loads((tree / "lineage.json").read_text())
    if kind == "model":
        assert lineage["teacher_cost"] is None
        return
    cost = {"requests": 12, "prompt_tokens": 1200, "completion_tokens": 84}
    assert lineage["teacher_cost"] == cost
    assert "teacher: 12 requests, 1,200 tokens in, 84 out" in stderr
    assert {each["guidance_form"] for each in judge.requests} == {"tita_vcd"}
    judge.fail(503)
    code, stderr = start(tmp_path, environment, run="s", **recipe).end()
    assert code == ExitCode.RETRY
    assert "no request succeeded" in stderr


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ({"contrast": {"weight": 2}}, "`contrast` has no effect with `strategy=distort`"),
        ({**RECIPE, "chosen": "reference"}, "`chosen` has no effect with `strategy=contrast`"),
        (
            {"strategy": "contrast", "contrast": {"plain_copies": 0, "distorted_copies": 0}},
            "both kinds of pairs are left out",
        ),
        ({"strategy": "contrast", "contrast": {"form": "dpo"}}, "contrast.form"),
        (
            {"strategy": "contrast", "contrast": {"form": "tita"}},
            "tita` without reward models",
        ),
        (
            {"strategy": "contrast", "contrast": {"rewards": {"a": "x"}}},
            "`contrast.rewards` has no effect with `contrast.form=vcd`; remove it, or --set",
        ),
        (
            {**RECIPE, "contrast": {"form": "tita", "rewards": {"a": "x"}, "weights": {"b": 1}}},
            "`contrast.weights.b`: no reward model 'b'",
        ),
        ({"strategy": "teacher"}, "asks either `teacher.model` or `teacher.endpoint`"),
        ({"teacher": {"model": "m"}}, "`teacher` has no effect with `strategy=distort`"),
    ],
)
def test_recipes_that_contradict_themselves_are_refused(
    recipe: dict[str, Any], message: str
) -> None:
    with pytest.raises(TitaError, match=message):
        validate_recipe(PairsRecipe, {"questions": "data", **recipe})
