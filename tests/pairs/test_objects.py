"""The objects of finished batches: few for many questions, read in order, and all deleted."""

from dataclasses import replace
from pathlib import Path

import pytest

from tita.pairs import build
from tita.pairs.build import PairBatch, PairsRun, make_pair
from tita.recipes import PairsRecipe
from tita.records import Question
from tita.storage import Store, open_store


@pytest.fixture(params=["directory", "s3_environment"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if request.param == "directory":
        return open_store(str(tmp_path / "store"))
    request.getfixturevalue(request.param)
    return open_store()


def run_of(num_questions: int) -> PairsRun:
    questions = (Question(id=f"{n:05}", text="?", image="a.png") for n in range(num_questions))
    recipe = PairsRecipe(model="m", questions="q", batch_size=4)
    return PairsRun(
        recipe=recipe, questions=tuple(questions), images=Path(), out="pairs/x", parts="parts/x/1"
    )


def test_many_questions_have_few_objects() -> None:
    small, large = run_of(4_000), run_of(100_000)
    assert (small.num_batches, small.steps_per_batch) == (1_000, 1)
    assert (large.num_batches, large.steps_per_batch) == (1_563, 16)
    for run in (small, large):
        steps = [step for number in range(run.num_batches) for step in run.steps(number)]
        assert [question for step in steps for question in step] == list(run.questions)
        assert {len(step) for step in steps} == {4}


def test_batches_of_other_models_or_images_are_outdated(tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "store"))
    questions = [Question(id=str(n), text="?", image=f"{n // 8}.png") for n in range(24)]
    for number in range(3):
        (tmp_path / f"{number}.png").write_bytes(b"image %d" % number)
    run = replace(run_of(24), questions=questions, images=tmp_path, models={"base": "digest"})
    for number in range(run.num_batches):
        digest = run.inputs_digest(run.image_digests(number)) if number != 3 else ""
        store.put(run.batch_key(number), PairBatch(pairs=(), inputs_sha256=digest).to_json())
    assert run.outdated_batches(store, range(6)) == []
    (tmp_path / "1.png").write_bytes(b"other 1")
    (tmp_path / "2.png").touch()
    assert run.outdated_batches(store, range(6)) == [2]
    assert run.outdated_batches(store, [4, 5]) == []
    other = replace(run, models={"base": "another"})
    # That of an older version has no digest, and is kept.
    assert other.outdated_batches(store, range(6)) == [0, 1, 2, 4, 5]


def test_batches_are_found_from_a_cursor_on_and_read_in_order(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "_READERS", 3)
    run = run_of(4 * 40 - 2)
    for number in range(40):
        if number in (5, 20, 39):
            continue
        pairs = [make_pair(q, "n", chosen="a", rejected="b") for s in run.steps(number) for q in s]
        batch = PairBatch(pairs=tuple(pairs), dropped={"x": 1}, cost={"requests": 2})
        store.put(run.batch_key(number), batch.to_json())
    missing = run.missing_batches(store)
    assert missing == [5, 20, 39]
    listed = [info.key for info in store.list(f"{run.parts}/", start_at=run.batch_key(20))]
    assert listed == [run.batch_key(number) for number in range(21, 39)]
    for number in (5, 39):
        store.put(run.batch_key(number), PairBatch(pairs=()).to_json())
    assert run.missing_batches(store, among=missing) == [20]
    store.put(run.batch_key(20), PairBatch(pairs=()).to_json())
    assert run.missing_batches(store, among=[20]) == run.missing_batches(store, among=[]) == []
    whole = PairBatch.join(run.read_batches(store))
    done = [q.id for q in run.questions if int(q.id) // 4 not in (5, 20, 39)]
    assert [pair.id for pair in whole.pairs] == [f"{id}/n" for id in done]
    assert (whole.dropped, whole.cost) == ({"x": 37}, {"requests": 74})
    run.delete_batches(store)
    assert list(store.list("parts/")) == []
