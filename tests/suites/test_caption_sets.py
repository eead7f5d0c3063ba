"""CHAIR, Object HalBench, AMBER: published layouts, hand-worked answers, other implementations."""

import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.suites.published import answered, encoded, figures, png, read
from tita.errors import TitaError

SYNONYMS = "person, man, woman\ndog, puppy\ncat\ndining table, table\ncup, glass\n"
CATEGORIES = [
    {"id": 1, "name": "person"}, {"id": 18, "name": "dog"}, {"id": 17, "name": "cat"},
    {"id": 67, "name": "dining table"}, {"id": 47, "name": "cup"},
]  # fmt: skip


def coco(instances: dict[int, list[int]], captions: dict[int, list[str]]) -> dict[str, Any]:
    images = [{"id": n, "file_name": f"COCO_val2014_{n:012d}.jpg"} for n in instances]
    boxes = [{"image_id": n, "category_id": c} for n, own in instances.items() for c in own]
    texts = [{"image_id": n, "caption": t} for n, own in captions.items() for t in own]
    return {
        "instances_val2014.json": {
            "images": images, "annotations": boxes, "categories": CATEGORIES,
        },
        "captions_val2014.json": {"annotations": texts},
        "synonyms.txt": SYNONYMS,
    }  # fmt: skip


def test_chair(tmp_path: Path) -> None:
    files = coco({7: [18], 9: [1, 67]}, {7: ["A puppy near a glass."], 9: ["A man.", "A woman"]})
    first, second = read("chair", tmp_path, files)
    assert (first.id, first.images) == ("7", ("COCO_val2014_000000000007.jpg",))
    # The cup is in a caption only.
    assert first.references == ("cup", "dog")
    assert second.references == ("dining table", "person")
    answers = [
        answered(first, "A dog, two cats and a cat."),  # 2 of 3 mentions; 1 of 2 objects
        answered(second, "A man and his woman at tables"),  # 0 of 3; 2 of 2
    ]
    found = figures("chair", answers, tmp_path)
    assert found == pytest.approx(
        {"CHAIR_i": 100 * 2 / 6, "CHAIR_s": 50, "recall": 75, "length in words": 7}
    )


def test_two_sets_in_one_folder_keep_their_words(tmp_path: Path) -> None:
    """CHAIR's list and that of Object HalBench differ in the words of one object."""
    (first,) = read("chair", tmp_path, coco({7: [18]}, {}))
    other = coco({7: [18]}, {}) | {"synonyms.txt": SYNONYMS.replace("puppy", "hound")}
    lines = [{"question": "What?", "image_id": 7, "image": encoded(png())}]
    (second,) = read("object-halbench", tmp_path, other | {"obj_halbench_300.jsonl": lines})
    for name, item, right, unknown in (
        ("chair", first, "A puppy.", "A hound."),
        ("object-halbench", second, "A hound.", "A puppy."),
    ):
        assert figures(name, [answered(item, right)], tmp_path)["recall"] == 100
        assert figures(name, [answered(item, unknown)], tmp_path)["recall"] == 0
    with pytest.raises(TitaError, match="no words of the set amber"):
        figures("amber", [], tmp_path)


def test_chair_asks_about_the_listed_images(tmp_path: Path) -> None:
    files = coco({n: [18] for n in range(1, 701)}, {})
    assert len(read("chair", tmp_path / "all", files)) == 500
    listed = files | {"images.txt": "12\nCOCO_val2014_000000000003.jpg\n\n"}
    assert [item.id for item in read("chair", tmp_path / "listed", listed)] == ["12", "3"]
    with pytest.raises(TitaError, match="no image '9999'"):
        read("chair", tmp_path / "wrong", files | {"images.txt": "9999"})


def test_chair_refuses_a_category_without_synonyms(tmp_path: Path) -> None:
    files = coco({1: [18]}, {}) | {"synonyms.txt": "person\ncat\ncup\ndining table\n"}
    with pytest.raises(TitaError, match="'dog' is in no line"):
        read("chair", tmp_path, files)


def test_object_halbench(tmp_path: Path) -> None:
    lines = [
        {"question": "Describe it.", "image_id": "000000000007", "image": encoded(png())},
        {"question": "Describe it in detail.", "image_id": 7, "image": encoded(png())},
    ]
    boxes = {
        "id": "000000000007", "image": "000000000007.jpg", "captions": ["A dog."],
        "instances": [{"category": "dining table", "bbox": [0, 0, 1, 1]}],
    }  # fmt: skip
    files = {
        "obj_halbench_300_with_image.jsonl": lines,
        "caps_boxes_coco2014_val_80.jsonl": [boxes],
        "synonyms_refine.txt": SYNONYMS,
    }
    first, second = read("object-halbench", tmp_path, files)
    assert first.references == ("dining table", "dog")
    assert (tmp_path / "out" / first.images[0]).read_bytes() == png()
    # An answer without objects is no response of which a share could be wrong.
    found = figures(
        "object-halbench",
        [answered(first, "A dog and a cat."), answered(second, "Nothing.")],
        tmp_path,
    )
    assert found["responses wrong"] == 100
    assert found["objects wrong"] == 50
    assert found["recall"] == 25


def test_object_halbench_equals_a_count_of_words_on_500_answers(tmp_path: Path) -> None:
    draw = random.Random(7)
    names = {"person": "person", "man": "person", "dog": "dog", "puppy": "dog", "cat": "cat",
             "table": "dining table", "cup": "cup", "glass": "cup"}  # fmt: skip
    boxes = [
        {"id": str(n), "captions": [], "instances": [
            {"category": name} for name in draw.sample(sorted({*names.values()}), k=3)]}
        for n in range(60)
    ]  # fmt: skip
    lines = [
        {"question": "Describe it.", "image_id": n % 60, "image": encoded(png())}
        for n in range(500)
    ]
    files = {
        "obj_halbench_300_with_image.jsonl": lines,
        "caps_boxes_coco2014_val_80.jsonl": boxes,
        "synonyms.txt": SYNONYMS,
    }
    items = read("object-halbench", tmp_path, files)
    words = [draw.choices([*names, "grass", "runs"], k=draw.randint(0, 6)) for _ in items]
    found = figures(
        "object-halbench",
        [answered(item, " ".join(own)) for item, own in zip(items, words, strict=True)],
        tmp_path,
    )
    wrong = mentions = responses = mentioning = recalled = present = 0
    for item, own in zip(items, words, strict=True):
        objects = [names[word] for word in own if word in names]
        bad = [name for name in objects if name not in item.references]
        wrong, mentions = wrong + len(bad), mentions + len(objects)
        responses, mentioning = responses + bool(bad), mentioning + bool(objects)
        recalled += len({*objects} & {*item.references})
        present += len(item.references)
    assert found["responses wrong"] == pytest.approx(100 * responses / mentioning)
    assert found["objects wrong"] == pytest.approx(100 * wrong / mentions)
    assert found["recall"] == pytest.approx(100 * recalled / present)


RELATION = {
    "sky": [], "grass": ["ground"], "ground": ["floor"], "person": ["man", "people"],
    "dog": ["puppy"], "cat": [], "bench": ["seat"], "light": [],
}  # fmt: skip
AMBER = {
    "data/relation.json": RELATION,
    "data/safe_words.txt": "light\nline",
    "data/annotations.json": [
        {
            "id": 1, "type": "generative", "truth": ["grass", "ground", "person", "person"],
            "hallu": ["dog", "bench"],
        },
        {"id": 1005, "type": "discriminative-attribute-state", "truth": "yes"},
        {"id": 1006, "type": "discriminative-hallucination", "truth": "no"},
        {"id": 1007, "type": "relation", "truth": "no"},
    ],
    "data/query/query_all.json": [
        {"id": 1, "image": "AMBER_1.jpg", "query": "Describe this image."},
        {"id": 1005, "image": "AMBER_1.jpg", "query": "Is the sky sunny?"},
        {"id": 1006, "image": "AMBER_1.jpg", "query": "Is there a dog?"},
        {"id": 1007, "image": "AMBER_1.jpg", "query": "Does the man touch the dog?"},
    ],
}  # fmt: skip


def test_amber(tmp_path: Path) -> None:
    caption, sky, dog, touch = read("amber", tmp_path, AMBER)
    assert caption.references == ("grass", "ground", "person", "person")
    assert caption.choices == ("dog", "bench")
    assert [item.category for item in (sky, dog, touch)] == ["attribute", "existence", "relation"]
    # "ground" counts for grass, of which it is an associate, so that the object ground is not
    # covered; of two persons one is. "puppies" is made up, for the dog; "cats" is made up as well.
    text = "People on the ground under the sky, puppies and cats. The line of light, a tower."
    found = figures(
        "amber",
        [
            answered(caption, text),
            answered(sky, "Yes."),
            answered(dog, "Yes, there is."),
            answered(touch, "No"),
        ],
        tmp_path,
    )
    # Mentions: people, ground, sky, puppies, cats, light; sky is not in the image, and light is a
    # safe word, so that it is a mention and never made up.
    assert found["CHAIR"] == pytest.approx(100 * 3 / 6)
    assert found["cover"] == pytest.approx(100 * 2 / 4)
    assert (found["hal"], found["cog"]) == (100, 50)
    # Positive class no: 1 hit of 1 said and of 2 labelled.
    assert found["accuracy"] == pytest.approx(200 / 3)
    assert (found["precision"], found["recall"]) == (100, 50)
    assert found["F1"] == pytest.approx(200 / 3)
    assert found["AMBER score"] == pytest.approx((100 - 50 + 200 / 3) / 2)
    assert (found["F1 existence"], found["F1 relation"]) == (0, 100)


def test_amber_with_captions_only(tmp_path: Path) -> None:
    files = dict(AMBER)
    files["data/query/query_all.json"] = AMBER["data/query/query_all.json"][:1]
    (caption,) = read("amber", tmp_path, files)
    found = figures("amber", [answered(caption, "Grass.")], tmp_path)
    assert set(found) == {"CHAIR", "cover", "hal", "cog", "caption length in words"}


def published_amber(answers: list[tuple[str, Any]]) -> dict[str, float]:
    """AMBER's figures with the lists and flags of its published code, but no tagger or vectors."""
    singular = {"men": "man", "benches": "bench", "skies": "sky", "puppies": "puppy"}
    known = {w for word, others in RELATION.items() for w in (word, *others)}
    n = Counter[str]()
    for answer, item in answers:
        if item.category != "generative":
            no = item.references[0] == "no"
            n["qa"] += 1
            n["right"] += answer == item.references[0]
            n["said"] += answer == "no"
            n["labelled"] += no
            n["hits"] += no and answer == "no"
            continue
        words = [singular.get(w, w) for w in answer.split()]
        words = [w if w in known else w.removesuffix("s") for w in words]
        nouns = [w for w in words if w in known]
        flags = {}
        for name, objects in (("safe", item.references), ("ha", item.choices)):
            listed = [(w, k) for k, o in enumerate(objects) for w in RELATION[o]]
            listed += [(o, k) for k, o in enumerate(objects)]
            flags[name] = (listed, set())
        bad = 0
        for noun in nouns:
            if noun == "light":
                continue
            for name in ("safe", "ha"):
                listed, hit = flags[name]
                place = next((k for w, k in listed if w == noun), None)
                if place is not None:
                    hit.add(place)
                    break
            bad += name == "ha" or place is None
        n["chair"] += bad
        n["all"] += len(nouns)
        n["cover"] += len(flags["safe"][1])
        n["truth"] += len(item.references)
        n["cog"] += len(flags["ha"][1])
        n["hallu"] += len(item.choices)
        n["hal"] += bad > 0
    captions = sum(item.category == "generative" for _, item in answers)
    f1 = 200 * n["hits"] / (n["said"] + n["labelled"])
    chair = 100 * n["chair"] / n["all"]
    return {
        "AMBER score": (100 - chair + f1) / 2, "CHAIR": chair, "F1": f1,
        "cover": 100 * n["cover"] / n["truth"], "cog": 100 * n["cog"] / n["hallu"],
        "hal": 100 * n["hal"] / captions, "accuracy": 100 * n["right"] / n["qa"],
    }  # fmt: skip


def test_amber_equals_a_second_implementation_on_500_answers(tmp_path: Path) -> None:
    draw = random.Random(1)
    words = [w for word, others in RELATION.items() for w in (word, *others)]
    words += ["men", "benches", "skies", "dogs", "puppies", "cats", "tower", "the"]
    annotations, queries = [], []
    for n in range(1, 501):
        kind = draw.choice(
            ["generative", "discriminative-hallucination", "discriminative-relation"]
        )
        entry: dict[str, Any] = {"id": n, "type": kind, "truth": draw.choice(["yes", "no"])}
        if kind == "generative":
            entry["truth"] = draw.choices(sorted(RELATION), k=draw.randint(1, 5))
            entry["hallu"] = draw.sample(sorted(RELATION), k=draw.randint(2, 3))
        annotations.append(entry)
        queries.append({"id": n, "image": f"AMBER_{n % 40}.jpg", "query": f"Question {n}?"})
    files = AMBER | {
        "data/annotations.json": annotations, "data/query/query_all.json": queries,
    }  # fmt: skip
    items = read("amber", tmp_path, files)
    pairs = [
        (" ".join(draw.choices(words, k=draw.randint(0, 9)))
         if item.category == "generative" else draw.choice(["yes", "no"]), item)
        for item in items
    ]  # fmt: skip
    found = figures("amber", [answered(item, text) for text, item in pairs], tmp_path)
    expected = published_amber(pairs)
    assert {name: found[name] for name in expected} == pytest.approx(expected)
