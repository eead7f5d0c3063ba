"""Planted shortcuts in pairs are reported, and `balance` takes them away."""

import json
import random
from collections import Counter
from collections.abc import Callable
from itertools import product
from pathlib import Path

import pytest
from PIL import Image

from tita.cli.commands import app
from tita.cli.main import run
from tita.data import write_pairs
from tita.data.balance import MIN_PAIRS, balance_answers
from tita.data.shortcuts import PairSample, Shortcuts, measure_shortcuts, question_kind
from tita.records import Pair

NUM = 400


def pair(number: int, question: str, chosen: str, rejected: str) -> Pair:
    image = f"{number}.png"
    return Pair(id=str(number), image=image, question=question, chosen=chosen, rejected=rejected)


def measured(pairs: list[Pair]) -> Shortcuts:
    found = measure_shortcuts(pairs)
    assert found is not None
    return found


def yes_no(share_of_no: float) -> list[Pair]:
    """Existence questions, of which this share has the chosen answer no."""
    sides = [("No.", "yes"), ("Yes", "no")]
    return [
        pair(n, f"Is there a {n % 7}?", *sides[n % 100 >= 100 * share_of_no]) for n in range(NUM)
    ]


def sentences(side: Callable[[int, random.Random], str]) -> list[Pair]:
    """Long answers of random words, to which `side` adds one to the chosen answer."""
    words = random.Random(0)

    def text() -> str:
        return " ".join(f"w{words.randrange(500)}" for _ in range(20))

    return [
        pair(n, "Describe it.", f"{text()} {side(n, words)}", f"{text()} w{words.randrange(500)}")
        for n in range(NUM)
    ]


@pytest.mark.parametrize(
    ("pairs", "share", "words"),
    [
        (yes_no(0.75), 0.75, {"no", "yes"}),
        (sentences(lambda n, _: "clearly" if n % 5 else f"w{n}"), 0.9, {"clearly"}),
        # The chosen answer is the usual one of its question, which rejects that of others.
        ([pair(n, f"Which {n % 5}?", f"a{n % 5}", f"a{(n + 1) % 5}") for n in range(NUM)], 1, None),
    ],
    ids=["no", "clearly", "usual"],
)
def test_a_planted_shortcut_is_found(
    pairs: list[Pair], share: float, words: set[str] | None
) -> None:
    found = measured(pairs)
    assert found.accuracy is not None
    assert found.accuracy.share == pytest.approx(share, abs=0.06)
    warning = found.warning()
    assert warning is not None
    assert f"{found.accuracy.share:.0%}" in warning
    assert "balance=answers" in warning
    assert "balance=answers" not in str(found.warning(balanced=True))
    if words is not None:
        assert words <= {word.text for word in found.words}
        assert all(repr(word) in warning for word in words)


def test_one_kind_of_question_is_enough_for_a_warning() -> None:
    numbers = [
        pair(NUM + n, f"How many {n}?", *random.Random(n).sample("123456789", 2))
        for n in range(4 * NUM)
    ]
    found = measured([*yes_no(0.75), *numbers])
    assert found.accuracy is not None
    assert found.worst is not None
    assert found.accuracy.low < 0.6 < found.worst.low
    assert found.worst.kind == "is there"
    assert "'is there'" in str(found.warning())
    assert found.answers[0].kind == "is there"
    assert {found.answers[0].chosen, found.answers[0].rejected} == {NUM // 4, NUM - NUM // 4}


def test_pairs_without_a_shortcut_have_no_warning() -> None:
    for pairs in (yes_no(0.5), sentences(lambda _, words: f"w{words.randrange(500)}")):
        found = measured(pairs)
        assert found.accuracy is not None
        assert 0.4 < found.accuracy.share < 0.57
        assert found.warning() is None


def test_pairs_of_one_question_are_in_one_fold() -> None:
    """Otherwise its own words in other folds would tell the answers apart."""
    pairs = [
        Pair(
            id=f"{n}/{d}", image=f"{n}.png", question=f"What {n}?", chosen=f"a{n}", rejected=f"b{n}"
        )
        for n, d in product(range(60), range(6))
    ]
    found = measured(pairs)
    assert found.num_questions == 60
    assert found.accuracy is not None
    # Not exactly one half: a few of the hashed words collide.
    assert found.accuracy.share == pytest.approx(0.5, abs=0.1)


def test_lengths_and_short_answers_are_counted() -> None:
    pairs = [pair(n, "Why?", "because it is so", "so") for n in range(3)]
    pairs.append(pair(3, "Why?", "so", "so it is here"))
    found = measured(pairs)
    assert (found.longer, found.short) == (0.75, (0.25, 0.75))
    assert found.accuracy is None
    assert found.warning() is None
    assert "too few" in found.describe()
    assert measure_shortcuts([]) is None


def test_a_sample_of_a_long_stream_is_bounded_and_reproducible() -> None:
    def sampled() -> list[Pair]:
        sample = PairSample()
        for n in range(20_000):
            sample.add(pair(n, "q", "a", "b"))
        assert sample.num_seen == 20_000
        return sample.pairs

    pairs = sampled()
    assert len(pairs) == 5_000
    assert pairs == sampled()
    assert 9_000 < sum(int(each.id) for each in pairs) / len(pairs) < 11_000


def excess(pairs: list[Pair] | tuple[Pair, ...]) -> Counter[object]:
    """How much more often an answer is chosen than rejected, over all and by kind of question."""
    found: Counter[object] = Counter()
    for each in pairs:
        kind = question_kind(each.question)
        for key in (each.chosen, (kind, each.chosen)):
            found[key] += 1
        for key in (each.rejected, (kind, each.rejected)):
            found[key] -= 1
    return found


def test_balance_leaves_out_as_few_as_possible() -> None:
    pairs = yes_no(0.75)
    balanced = balance_answers(pairs, seed=0)
    assert balanced.left_out == {"no": NUM // 2}
    assert len(balanced.pairs) == NUM // 2
    assert list(balanced.pairs) == [each for each in pairs if each in set(balanced.pairs)]
    assert measured(list(balanced.pairs)).warning() is None
    assert "200 of 400 pairs left out: 'no' 200" in balanced.describe()


def test_balance_uses_circles_of_answers() -> None:
    """Each answer is chosen as often as rejected, although no two answers balance each other."""
    circle = [pair(n, "Which?", "abc"[n % 3], "bca"[n % 3]) for n in range(30)]
    extra = [pair(30 + n, "Which?", "a", "c") for n in range(4)]
    balanced = balance_answers([*circle, *extra], seed=0)
    assert balanced.left_out == {"a": 4}
    assert max(excess(balanced.pairs).values()) == 0


def test_balance_holds_over_all_and_for_each_kind_of_question() -> None:
    draw = random.Random(0)
    words = ["yes", "no", "two", "red", "a long answer that is not short", "rare"]
    weights = [8, 5, 4, 3, 6, 0.2]
    kinds = ["is there", "is it", "how many", "what is"]
    pairs = []
    for n in range(600):
        chosen, rejected = draw.choices(words, weights)[0], draw.choices(words, weights[::-1])[0]
        if chosen != rejected:
            pairs.append(pair(n, f"{draw.choice(kinds)} {n}", chosen, rejected))
    balanced = balance_answers(pairs, seed=0)
    counts: Counter[object] = Counter()
    for each in pairs:
        kind = question_kind(each.question)
        counts.update([each.chosen, each.rejected, (kind, each.chosen), (kind, each.rejected)])
    left = excess(balanced.pairs)
    for key, number in counts.items():
        answer = key if isinstance(key, str) else key[1]  # type: ignore[index]
        if number >= MIN_PAIRS and len(answer.split()) <= 3:
            assert left[key] <= 0, key
    assert 0 < sum(balanced.left_out.values()) == len(pairs) - len(balanced.pairs)


def test_balance_depends_on_the_seed_and_not_on_the_order() -> None:
    pairs = yes_no(0.75)
    kept = [{p.id for p in balance_answers(pairs, seed=seed).pairs} for seed in (0, 0, 1)]
    turned = {p.id for p in balance_answers(pairs[::-1], seed=0).pairs}
    assert kept[0] == kept[1] == turned
    assert kept[2] != kept[0]


def test_long_and_rare_answers_stay() -> None:
    pairs = [pair(n, "Who is it?", f"author {n}", f"writer {n}") for n in range(20)]
    pairs += [
        pair(20 + n, "Describe.", "a dog on the green grass", "a cat on the red mat")
        for n in range(9)
    ]
    assert list(balance_answers(pairs, seed=0).pairs) == pairs


def test_validate_reports_shortcuts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for n in range(NUM):
        Image.new("RGB", (4, 4)).save(tmp_path / f"{n}.png")
    (tmp_path / "pairs.jsonl").write_bytes(write_pairs(yes_no(0.9)))
    assert run(app, ["data", "validate", str(tmp_path)], name="tita") == 0
    errors = capsys.readouterr().err
    assert "'no' to 'is there': 360 chosen, 40 rejected" in errors
    assert "warning: 90%" in errors
    assert run(app, ["data", "validate", str(tmp_path), "-o", "json"], name="tita") == 0
    shown = json.loads(capsys.readouterr().out)["shortcuts"]
    assert shown["accuracy"]["share"] == pytest.approx(0.9, abs=0.03)
    assert {"word": "no", "chosen": 360, "rejected": 40} in shown["words"]
