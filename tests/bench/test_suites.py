"""Every evaluation suite of LLaVA-1.5, on a few records in the published format."""

import base64
import io
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tita.bench.questions import BenchmarkItem, read_items
from tita.bench.scoring import METRICS, score_answer
from tita.bench.suites import prepare, suite_names
from tita.errors import TitaError

SHORT = "Answer the question using a single word or phrase."
LETTER = "Answer with the option's letter from the given choices directly."


def write(folder: Path, files: Mapping[str, Any]) -> None:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, bytes):
            path.write_bytes(content)
        elif name.endswith("jsonl") or "pope" in name:
            path.write_text("".join(json.dumps(line) + "\n" for line in content))
        else:
            path.write_text(content if isinstance(content, str) else json.dumps(content))


def read(
    suite: str, tmp_path: Path, files: Mapping[str, Any], metric: str = ""
) -> list[BenchmarkItem]:
    write(tmp_path / "source", files)
    out = tmp_path / "out" / f"{suite}.jsonl"
    num = prepare(suite, source=tmp_path / "source", out=out, metric=metric)
    items = list(read_items(out))
    assert len(items) == num
    return items


def score(item: BenchmarkItem, answer: str) -> float:
    scored = score_answer(item.metric, answer, references=item.references, choices=item.choices)
    assert scored is not None
    return scored.score


def test_vqav2(tmp_path: Path) -> None:
    question = {"image_id": 262148, "question": "Where is he looking?", "question_id": 262148000}
    answers = [
        {"answer": text, "answer_confidence": "yes", "answer_id": n}
        for n, text in enumerate(["down"] * 3 + ["at table"] * 2 + ["skateboard"] * 5, start=1)
    ]
    annotation = {
        "question_type": "none of the above", "multiple_choice_answer": "down",
        "answers": answers, "image_id": 262148, "answer_type": "other", "question_id": 262148000,
    }  # fmt: skip
    files = {
        "v2_OpenEnded_mscoco_val2014_questions.json": {
            "data_subtype": "val2014", "questions": [question],
        },
        "v2_mscoco_val2014_annotations.json": {"annotations": [annotation]},
    }  # fmt: skip
    (item,) = read("vqav2", tmp_path, files)
    assert item.id == "262148000"
    assert item.text == f"Where is he looking?\n{SHORT}"
    assert item.images == ("COCO_val2014_000000262148.jpg",)
    assert item.category == "other"
    assert score(item, "Down.") == pytest.approx(0.9)
    assert score(item, "skateboard") == 1
    assert score(item, "at table") == pytest.approx(0.6)


def test_vqav2_with_the_official_metric(tmp_path: Path) -> None:
    question = {"image_id": 1, "question": "Is it?", "question_id": 1000}
    annotation = {"answers": [{"answer": "Yes"}] * 10, "question_id": 1000}
    files = {
        "v2_OpenEnded_mscoco_val2014_questions.json": {
            "data_subtype": "val2014", "questions": [question],
        },
        "v2_mscoco_val2014_annotations.json": {"annotations": [annotation]},
    }  # fmt: skip
    (item,) = read("vqav2", tmp_path, files)
    assert (item.metric, score(item, "yes")) == ("vqa", 1)
    (item,) = read("vqav2", tmp_path, files, metric="vqa-official")
    assert (item.metric, score(item, "yes"), score(item, "Yes")) == ("vqa-official", 0, 1)
    with pytest.raises(TitaError, match="unknown metric 'nope'"):
        read("vqav2", tmp_path, files, metric="nope")


def test_vqav2_test_split_has_no_answers(tmp_path: Path) -> None:
    question = {"image_id": 1, "question": "What?", "question_id": 1000}
    name = "v2_OpenEnded_mscoco_test-dev2015_questions.json"
    files = {name: {"data_subtype": "test-dev2015", "questions": [question]}}
    (item,) = read("vqav2", tmp_path, files)
    assert item.images == ("COCO_test2015_000000000001.jpg",)
    assert item.references == ()


def test_gqa(tmp_path: Path) -> None:
    entry = {
        "question": "Is it overcast?", "answer": "no", "imageId": "n161313",
        "types": {"detailed": "weatherVerify", "semantic": "global", "structural": "verify"},
        "fullAnswer": "No, it is clear.", "isBalanced": True,
    }  # fmt: skip
    (item,) = read("gqa", tmp_path, {"testdev_balanced_questions.json": {"201307251": entry}})
    assert (item.id, item.images, item.category) == ("201307251", ("n161313.jpg",), "verify")
    assert score(item, "No.") == 1
    assert score(item, "no it is not") == 0


def test_vizwiz(tmp_path: Path) -> None:
    answers = [{"answer": "unanswerable", "answer_confidence": "yes"}] * 8
    answers += [{"answer": "sky", "answer_confidence": "maybe"}] * 2
    entry = {
        "image": "VizWiz_val_00000001.jpg", "question": "Can you tell me what this is?",
        "answers": answers, "answer_type": "unanswerable", "answerable": 0,
    }  # fmt: skip
    (item,) = read("vizwiz", tmp_path, {"val.json": [entry]})
    assert item.id == "VizWiz_val_00000001"
    assert "respond with 'Unanswerable'.\n" in item.text
    assert score(item, "Unanswerable") == 1
    assert score(item, "sky") == pytest.approx(0.6)


def test_textvqa_with_and_without_llavas_ocr_prompts(tmp_path: Path) -> None:
    entry = {
        "question": "What is the brand of this camera?", "image_id": "003a8ae2ef43b901",
        "answers": ["nous les gosses", "dakota"] + ["dakota"] * 8, "question_id": 34602,
    }  # fmt: skip
    files: dict[str, Any] = {"TextVQA_0.5.1_val.json": {"dataset_type": "val", "data": [entry]}}
    (item,) = read("textvqa", tmp_path, files)
    assert item.text == f"What is the brand of this camera?\n{SHORT}"
    assert item.images == ("003a8ae2ef43b901.jpg",)
    assert score(item, "Dakota") == 1
    prompt = f"What is the brand of this camera?\nReference OCR token: DAKOTA\n{SHORT}"
    line = {"question_id": "003a8ae2ef43b901", "image": "003a8ae2ef43b901.jpg", "text": prompt}
    (item,) = read("textvqa", tmp_path, files | {"llava_textvqa_val_v051_ocr.jsonl": [line]})
    assert item.text == prompt


def test_science_qa(tmp_path: Path) -> None:
    with_image = {
        "question": "Which of these states is farthest north?", "hint": "", "image": "image.png",
        "choices": ["West Virginia", "Louisiana", "Arizona", "Oklahoma"], "answer": 0,
    }  # fmt: skip
    without = {
        "question": "Which is it?", "hint": "Look.", "image": None,
        "choices": ["hard", "soft"], "answer": 1,
    }  # fmt: skip
    files = {
        "problems.json": {"4": with_image, "5": without, "6": without},
        "pid_splits.json": {"test": ["4", "5"], "train": ["6"]},
    }
    one, other = read("scienceqa", tmp_path, files)
    assert one.text == (
        "Which of these states is farthest north?\nA. West Virginia\nB. Louisiana\nC. Arizona\n"
        f"D. Oklahoma\n{LETTER}"
    )
    assert (one.images, one.category) == (("4/image.png",), "image")
    assert other.text.startswith("Context: Look.\nWhich is it?\nA. hard")
    assert (other.images, other.category, other.references) == ((), "text", ("B",))
    assert score(one, "A") == 1
    assert score(other, "The answer is B.") == 1
    assert score(other, "C") == 0


def test_pope_ids_of_its_three_files_do_not_clash(tmp_path: Path) -> None:
    image = "COCO_val2014_000000310196.jpg"
    line = {
        "question_id": 1, "image": image, "text": "Is there a snowboard in the image?",
        "label": "yes",
    }  # fmt: skip
    names = ("adversarial", "popular", "random")
    items = read("pope", tmp_path, {f"coco_pope_{name}.json": [line] for name in names})
    assert [item.id for item in items] == [f"{name}-1" for name in names]
    assert [item.category for item in items] == list(names)
    assert items[0].text == f"Is there a snowboard in the image?\n{SHORT}"
    assert score(items[0], "Yes, there is.") == 1


def test_mme_in_both_of_its_layouts(tmp_path: Path) -> None:
    text = (
        "Is there a dog in this image? Please answer yes or no.\tYes\n"
        "Is there a cat in this image? Please answer yes or no.\tNo\n"
    )
    files = {
        "existence/000000006040.txt": text,
        "existence/000000006040.jpg": b"jpg",
        "artwork/questions_answers_YN/10002.txt": text,
        "artwork/images/10002.jpg": b"jpg",
    }
    items = {item.id: item for item in read("mme", tmp_path, files)}
    first = items["existence/000000006040-1"]
    assert first.text == f"Is there a dog in this image?\n{SHORT}"
    assert (first.category, first.group) == ("existence", "existence/000000006040")
    assert items["artwork/10002-2"].images == ("artwork/images/10002.jpg",)
    assert items["artwork/10002-2"].references == ("no",)
    assert score(first, "Yes") == 1


def test_mmbench_rotates_its_options(tmp_path: Path) -> None:
    data = io.BytesIO()
    Image.new("RGB", (2, 2), "red").save(data, "JPEG")
    image = base64.b64encode(data.getvalue()).decode()
    head = (
        "index\tquestion\thint\tA\tB\tC\tD\tanswer\tcategory\timage\tsource\tl2-category\tsplit\n"
    )
    rows = (
        f"241\tWhat colour?\tLook.\tblue\tred\tgreen\t\tB\tattribute\t{image}\tx\tx\tdev\n"
        f"1000241\tWhat colour?\tLook.\tred\tgreen\tblue\t\tA\tattribute\t{image}\tx\tx\tdev\n"
    )
    items = read("mmbench", tmp_path, {"mmbench_dev_20230712.tsv": head + rows})
    assert [item.references[0] for item in items] == ["B", "A", "C"]
    assert {item.group for item in items} == {"241"}
    assert items[1].text == f"Look.\nWhat colour?\nA. red\nB. green\nC. blue\n{LETTER}"
    assert [score(item, "red") for item in items] == [1, 1, 1]
    assert [score(item, "B") for item in items] == [1, 0, 0]
    assert Image.open(tmp_path / "out" / "mmbench_241.jpg").size == (2, 2)


def picture(colour: str = "red") -> str:
    data = io.BytesIO()
    Image.new("RGB", (2, 2), colour).save(data, "JPEG")
    return base64.b64encode(data.getvalue()).decode()


def mmbench_table(*rows: tuple[str, ...], letters: str = "ABCD") -> str:
    """A table of rows (index, options..., answer, image)."""
    head = ("index", "question", "hint", *letters, "answer", "category", "image")
    lines = [head]
    for index, *middle, image in rows:
        *options, answer = middle
        lines.append((index, "Which?", "nan", *options, answer, "c", image))
    return "".join("\t".join(line) + "\n" for line in lines)


def test_an_image_may_be_the_index_of_another_row(tmp_path: Path) -> None:
    table = mmbench_table(
        ("1", "x", "y", "", "", "A", "7"),
        ("3", "x", "y", "", "", "A", "1"),
        ("7", "x", "y", "", "", "A", picture("red")),
        ("8", "x", "y", "", "", "A", "1000009"),
        ("1000009", "x", "y", "", "", "A", picture("blue")),
    )
    items = read("mmbench", tmp_path, {"mmbench_dev_1.tsv": table})
    by_group = {item.group: item.images[0] for item in items}
    assert by_group == {
        "1": "mmbench_7.jpg", "3": "mmbench_7.jpg", "7": "mmbench_7.jpg",
        "8": "mmbench_1000009.jpg",
    }  # fmt: skip
    written = sorted(path.name for path in (tmp_path / "out").glob("*.jpg"))
    assert written == ["mmbench_1000009.jpg", "mmbench_7.jpg"]
    assert Image.open(tmp_path / "out" / "mmbench_7.jpg").size == (2, 2)


def test_the_option_none_does_not_shift_letters(tmp_path: Path) -> None:
    table = mmbench_table(
        ("1", "None", "One", "Two", "", "B", picture()),
        ("2", "One", "Two", "None", "", "C", picture()),
        ("3", "yes", "no", "nan", "nan", "A", picture()),
    )
    items = {item.id: item for item in read("mmbench", tmp_path, {"mmbench_dev_1.tsv": table})}
    assert items["1-0"].choices == ("None", "One", "Two")
    assert items["1-0"].references == ("B",)
    assert items["1-0"].text.endswith(f"\nA. None\nB. One\nC. Two\n{LETTER}")
    assert [score(items[f"1-{turn}"], "One") for turn in range(3)] == [1, 1, 1]
    assert items["2-0"].choices == ("One", "Two", "None")
    assert items["3-0"].choices == ("yes", "no")


def test_a_table_may_write_absent_options_as_none(tmp_path: Path) -> None:
    table = mmbench_table(
        ("1", "yes", "no", "None", "None", "A", picture()),
        ("2", "x", "y", "z", "None", "C", picture()),
    )
    items = {item.id: item for item in read("mmbench", tmp_path, {"mmbench_dev_1.tsv": table})}
    assert items["1-0"].choices == ("yes", "no")
    assert items["2-0"].choices == ("x", "y", "z")


def test_a_fifth_option_is_read(tmp_path: Path) -> None:
    table = mmbench_table(
        ("1", "v", "w", "x", "y", "zebra", "E", picture()),
        ("2", "v", "w", "x", "y", "", "D", picture()), letters="ABCDE",
    )  # fmt: skip
    items = read("mmbench", tmp_path, {"mmbench_dev_1.tsv": table})
    assert len(items) == 9
    assert [item.references[0] for item in items] == list("EDCBADCBA")
    assert all(score(item, "zebra") for item in items[:5])


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (("1", "x", "y", "", "", "A", "99"), ":2: the image of row 1 is that of row 99, and there"),
        (("1", "x", "y", "", "", "A", "AAAA"), ":2: the image 'AAAA' is not an image in base64"),
        (("1", "x", "y", "", "", "A", "not base64!"), "is not an image in base64"),
        (("1", "x", "", "z", "", "A", "IMAGE"), ":2: option B is empty, and a later one is not"),
        (("1", "x", "y", "", "", "D", "IMAGE"), ":2: the answer 'D' is none of the options A to B"),
        (("one", "x", "y", "", "", "A", "IMAGE"), ":2: the index 'one' is not a number"),
        (("1", "x", "", "", "", "A", "IMAGE"), ":2: 1 options"),
    ],
)
def test_broken_rows_of_mmbench_are_named(
    row: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    cells = tuple(picture() if cell == "IMAGE" else cell for cell in row)
    with pytest.raises(TitaError, match=re.escape(message)):
        read("mmbench", tmp_path, {"mmbench_dev_1.tsv": mmbench_table(cells)})
    assert not (tmp_path / "out" / "mmbench.jsonl").exists()


def test_annotations_are_those_of_the_questions_split(tmp_path: Path) -> None:
    question = {"image_id": 1, "question": "Is it?", "question_id": 1000}
    questions = {"data_subtype": "val2014", "questions": [question]}
    train, val = (
        {"annotations": [{"question_id": 1000, "answers": [{"answer": text}] * 10}]}
        for text in ("of train", "of val")
    )
    files = {
        "v2_OpenEnded_mscoco_val2014_questions.json": questions,
        "v2_mscoco_train2014_annotations.json": train,
        "v2_mscoco_val2014_annotations.json": val,
    }
    (item,) = read("vqav2", tmp_path, files)
    assert set(item.references) == {"of val"}
    (tmp_path / "source" / "v2_mscoco_val2014_annotations.json").unlink()
    with pytest.raises(TitaError, match=r"no annotations of val2014.*add v2_mscoco_val2014_annot"):
        prepare("vqav2", source=tmp_path / "source", out=tmp_path / "out.jsonl")
    other = {"annotations": [{"question_id": 1, "answers": []}]}
    with pytest.raises(TitaError, match="question 1000 has no annotation"):
        read("vqav2", tmp_path, {"v2_mscoco_val2014_annotations.json": other})


@pytest.mark.parametrize(
    ("suite", "name", "text"),
    [
        ("gqa", "testdev_balanced_questions.json",
         '{"1": {"question": "Café?", "answer": "no", "imageId": "n"}}'),
        ("mmbench", "mmbench_dev_1.tsv", mmbench_table(("1", "é", "y", "", "", "A", picture()))),
        ("mme", "task/a.txt", "Is it a café?\tYes\nIs it?\tNo\n"),
        ("pope", "coco_pope_random.json",
         '{"question_id": 1, "image": "a.jpg", "text": "Café?", "label": "yes"}\n'),
    ],
)  # fmt: skip
def test_published_files_in_other_encodings(
    suite: str, name: str, text: str, tmp_path: Path
) -> None:
    write(tmp_path / "source", {"task/a.jpg": b""})
    path = tmp_path / "source" / name

    def questions(encoding: str) -> str:
        path.write_bytes(text.encode(encoding))
        out = tmp_path / "q" / f"{suite}.jsonl"
        prepare(suite, source=tmp_path / "source", out=out)
        return out.read_text()

    plain = questions("utf-8")
    assert "\ufeff" not in plain
    assert questions("utf-8-sig") == plain, "a byte order mark is no part of the text"
    with pytest.raises(
        TitaError, match="not UTF-8; it may be Windows-1252 or GB18030; save the file as"
    ) as refused:
        questions("cp1252")
    assert name.rpartition("/")[2] in str(refused.value)


def test_seed_bench(tmp_path: Path) -> None:
    entry = {
        "answer": "A", "choice_a": "One", "choice_b": "Two", "choice_c": "Three",
        "choice_d": "Four", "data_id": "1454426_2591111986", "data_type": "image",
        "question": "How many towels are in the image?", "question_id": "101669",
        "question_type_id": 5,
    }  # fmt: skip
    video = entry | {"data_type": "video", "question_id": "v7", "question_type_id": 10}
    kinds = {"Instances Counting": 5, "Action Recognition": 10}
    files = {"SEED-Bench.json": {"question_type": kinds, "questions": [entry, video]}}
    one, other = read("seed-bench", tmp_path, files)
    assert one.text.startswith("How many towels are in the image?\nA. One\nB. Two")
    assert one.images == ("SEED-Bench-image/1454426_2591111986",)
    assert one.category == "image+Instances Counting"
    assert other.images == ("SEED-Bench-video-image/v7.png",)
    assert score(one, "A") == 1


def test_llava_bench(tmp_path: Path) -> None:
    files = {
        "questions.jsonl": [
            {"question_id": 0, "image": "001.jpg", "category": "conv", "text": "What is it called?"}
        ],
        "answers_gpt4.jsonl": [{"question_id": 0, "text": "Diamond Head.", "answer_id": "x"}],
        "context.jsonl": [{"id": "001", "image": "001.jpg", "caption": "An aerial view."}],
    }
    (item,) = read("llava-bench", tmp_path, files)
    assert item.text == "What is it called?"
    assert item.references == ("Diamond Head.", "An aerial view.")
    assert item.metric == "judge-llava-bench"


def test_mm_vet(tmp_path: Path) -> None:
    entry = {
        "imagename": "v1_0.png", "question": "What is x in the equation?",
        "answer": "-1<AND>-5", "imagesource": "x", "capability": ["ocr", "math"],
    }  # fmt: skip
    (item,) = read("mm-vet", tmp_path, {"mm-vet.json": {"v1_0": entry}})
    assert (item.id, item.category, item.metric) == ("v1_0", "math+ocr", "judge-mm-vet")


def test_all_eleven_suites_have_known_metrics() -> None:
    assert len(suite_names()) == 11
    assert {"vqa", "gqa", "yes-no", "mme", "circular", "choice", "science-qa"} <= METRICS.keys()


@pytest.mark.parametrize(
    ("suite", "files", "message"),
    [
        ("pope", {}, r"no \*_pope_random\.json"),
        ("gqa", {"testdev_balanced_questions.json": {"1": {}}}, "does not have gqa's"),
        ("vizwiz", {"val.json": "{"}, r"val\.json: not valid JSON"),
        ("mme", {"task/a.txt": "no tab\n", "task/a.jpg": b""}, "expected question, tab"),
        ("mme", {"task/a.txt": "Q\tYes\n"}, r"no image for a\.txt"),
        ("nonsense", {}, "choose one of"),
    ],
)
def test_invalid_sources_are_rejected(
    suite: str, files: dict[str, Any], message: str, tmp_path: Path
) -> None:
    (tmp_path / "source").mkdir()
    with pytest.raises(TitaError, match=message):
        read(suite, tmp_path, files)
    assert not (tmp_path / "out" / f"{suite}.jsonl").exists()
