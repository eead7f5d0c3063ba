"""The pairs of a run, its lineage, judges, and error messages."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.pairs.conftest import NUM_SCENES
from tests.pairs.workers import start
from tita.data import read_pairs
from tita.data.normalise import normalise
from tita.demo.models import demo_model_path
from tita.pairs.build import PairBatch
from tita.records import Pair
from tita.storage import Store
from tita.vlm.images import open_image

NUM_QUESTIONS = 3 * NUM_SCENES


def built(
    folder: Path, environment: dict[str, str], store: Store, **recipe: object
) -> tuple[list[Pair], dict[str, Any]]:
    """The pairs of a run, and its lineage."""
    start(folder, environment, **recipe).succeed()
    tree = store.pull_tree("pairs/r")
    return list(read_pairs(tree / "pairs.jsonl")), json.loads((tree / "lineage.json").read_text())


def references(store: Store) -> dict[str, str]:
    lines = store.get("data/train.jsonl").decode().splitlines()
    return {row["question_id"]: row["answer"] for row in map(json.loads, lines)}


@pytest.mark.slow
def test_lineage_describes_recipe_model_and_counts(
    store: Store, environment: dict[str, str], tmp_path: Path
) -> None:
    pairs, lineage = built(
        tmp_path,
        environment,
        store,
        distortions=["diffusion", "blur"],
        chosen="reference",
        max_questions=12,
        seed=3,
    )
    assert lineage["num_kept"] == len(pairs)
    assert lineage["num_kept"] + sum(lineage["num_dropped"].values()) == 24
    assert (lineage["num_questions"], lineage["num_candidates"], lineage["seed"]) == (12, 24, 3)
    for name in ("questions_sha256", "images_sha256"):
        assert len(lineage[name]) == 64
    assert len(lineage["model"]["digest"]) == 64
    assert lineage["recipe"]["distortions"] == ["diffusion", "blur"]
    assert lineage["shortcuts"]["num_pairs"] == len(pairs)
    assert {"torch", "transformers"} <= lineage["packages"].keys()
    assert "git" in lineage
    manifest = store.read_manifest("pairs/r")
    assert manifest is not None
    assert manifest.meta == lineage
    truth = references(store)
    for pair in pairs:
        question, _, distortion = pair.id.rpartition("/")
        assert distortion in ("diffusion", "blur")
        assert pair.chosen == truth[question]
        assert normalise(pair.rejected) != normalise(pair.chosen)
        open_image(store.pull_tree("data") / pair.image)


@pytest.mark.slow
def test_the_recipe_selects_how_images_are_shown(
    store: Store, environment: dict[str, str], tmp_path: Path
) -> None:
    folder = store.pull_tree("data", into=tmp_path / "oblong")
    for image in folder.glob("**/*.png"):
        Image.open(image).resize((120, 40)).save(image)
    store.push_tree(folder, "oblong")
    paths = {"questions": "oblong/train.jsonl", "images": "oblong", "distortions": ["blur"]}
    for aspect in ("auto", "pad", "keep"):
        start(tmp_path, environment, run=aspect, image_aspect=aspect, **paths).succeed()
    auto, pad, keep = (
        [
            (pair.id, pair.chosen, pair.rejected)
            for pair in read_pairs(store.pull_tree(f"pairs/{aspect}"))
        ]
        for aspect in ("auto", "pad", "keep")
    )
    assert auto == pad != keep


@pytest.mark.slow
def test_a_judge_decides_which_pairs_are_kept(
    store: Store, environment: dict[str, str], tmp_path: Path
) -> None:
    pairs, lineage = built(tmp_path, environment, store, judge="exact-match")
    truth = references(store)
    for pair in pairs:
        right = normalise(truth[pair.id.rpartition("/")[0]])
        assert normalise(pair.chosen) == right
        assert normalise(pair.rejected) != right
    dropped = lineage["num_dropped"]
    assert dropped.keys() <= {"answers agree", "judge: both wrong"}
    assert sum(dropped.values()) + len(pairs) == NUM_QUESTIONS


@pytest.mark.slow
def test_a_judge_is_loaded_by_module_and_name(
    store: Store, environment: dict[str, str], tmp_path: Path
) -> None:
    (tmp_path / "my_judge.py").write_text(
        "from tita.pairs.judges import Preference\n"
        "class Shorter:\n"
        "    def __call__(self, candidates):\n"
        "        assert all(c.image.is_file() for c in candidates)\n"
        "        return [Preference(better='rejected') if len(c.rejected) < len(c.chosen) else\n"
        "                Preference(better='neither', reason='longer') for c in candidates]\n"
    )
    pairs, lineage = built(
        tmp_path,
        environment | {"PYTHONPATH": str(tmp_path)},
        store,
        judge="my_judge:Shorter",
    )
    assert pairs
    assert all(len(pair.chosen) < len(pair.rejected) for pair in pairs)
    assert lineage["num_dropped"]["judge: longer"]


@pytest.mark.slow
def test_sampled_answers_depend_only_on_the_seed(
    store: Store, environment: dict[str, str], tmp_path: Path
) -> None:
    drawn = {"temperature": 1.5, "top_p": 0.95}
    shapes: list[dict[str, object]] = [{}, {"batch_size": 7}, {"seed": 1}]
    found = []
    for number, shape in enumerate(shapes):
        start(tmp_path, environment, run=f"r{number}", **drawn, **shape).succeed()
        found.append(store.get(f"pairs/r{number}/pairs.jsonl"))
    assert found[0] == found[1] != found[2]


@pytest.mark.slow
def test_a_resumed_run_does_not_mix_models(
    store: Store, environment: dict[str, str], tmp_path: Path
) -> None:
    model = tmp_path / "model"
    shutil.copytree(demo_model_path("base"), model)
    start(tmp_path, environment, rank=1, world_size=2, model=str(model)).succeed()
    keys = [info.key for info in store.list("parts/r/")]
    assert len(keys) == 3
    for key in keys:  # building them again overwrites this
        batch = PairBatch.from_json(store.get(key))
        marked = [replace(pair, chosen="marked") for pair in batch.pairs]
        store.put(key, replace(batch, pairs=tuple(marked)).to_json())
    (model / "trained_again.txt").write_text("other weights")
    pairs, _ = built(tmp_path, environment, store, model=str(model))
    assert "marked" not in {pair.chosen for pair in pairs}
    stderr = max(tmp_path.glob("*.err")).read_text()
    assert "3 of 3 finished batches were built with other models or images" in stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        ({"questions": "data/none.jsonl"}, "nor a path; check the path"),
        ({"images": "data/ocrvqa"}, "no image 'texvqa/train_images/train-00001.png'"),
        ({"model": "./no-such-model"}, "no such file or folder"),
        ({"model": "data"}, "no config.json in it"),
        ({"distortions": ["melt"]}, "recipe of build-pairs: distortions"),
        ({"judge": "exact"}, "judge: no judge 'exact'; choose one of exact-match, or write"),
        (
            {"judge": "no.such:judge"},
            "cannot load the judge 'no.such:judge' (No module",
        ),
        ({"judge": "math:pi"}, "cannot load the judge 'math:pi' (it is not callable)"),
        ({"judge": "copy:copy"}, "judge copy:copy: a result that is not a Preference; return one"),
        ({"diffusion_steps": 1}, f"{{'answers agree': {NUM_QUESTIONS}}}; distort more strongly"),
    ],
)
def test_user_errors_are_one_line_with_exit_code_2(
    store: Store,
    environment: dict[str, str],
    tmp_path: Path,
    recipe: dict[str, object],
    words: str,
) -> None:
    code, stderr = start(tmp_path, environment, **recipe).end()
    assert code == 2, stderr
    assert words in stderr.strip().splitlines()[-1]
    assert "Traceback" not in stderr
    assert not list(store.list("pairs/"))
