"""`tita-bench suite` on scenes of digits: planted effects and their verdicts, resume, controls."""

import base64
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.suites.planted import (
    CALIBRATED,
    NOTHING,
    REAL,
    WORSE,
    Digits,
    PlantedModel,
    write_digits,
)
from tests.suites.published import png, write
from tita.bench.chat_response import Reply
from tita.bench.methods import BASE, Method, guided
from tita.bench.questions import read_items
from tita.bench.results_file import ResultsFile, answer_record
from tita.bench.tasks import BenchmarkTask
from tita.bench.worker_pool import RequestStats
from tita.cli.main import tita_bench
from tita.errors import TitaError
from tita.suites.catalog import SETS, find_sets
from tita.suites.comparison import SetRuns, scorer_of
from tita.suites.question_file import _figures
from tita.suites.runner import plan_suite, read_suite, run_suite, suite_methods
from tita.suites.scorers import MEAN_SCORER
from tita.suites.set_runs import ImageIndex
from tita.suites.suite_report import SuiteReport, html_page, make_report, text_report, to_json


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Digits:
    return write_digits(tmp_path_factory.mktemp("published"), number=120)


def kind_of(method: Method) -> str:
    return "control" if method.control else "base" if method.is_base else "guided"


def asked(digits: Digits, model: PlantedModel) -> Any:
    """A function that answers a task without a server."""

    def ask(task: BenchmarkTask) -> RequestStats:
        stats = RequestStats()
        method = task.generation.method
        assert method is not None
        run = task.protocol(model_name="m")
        with ResultsFile(task.out, run=run) as results:
            for item in task.items():
                if item.id in results.done:
                    continue
                image = (task.images / item.images[0]).read_bytes()
                said = digits.ask(model, item.text, image, method=kind_of(method))
                reply = Reply(text=said, input_tokens=50, output_tokens=9, response_time_s=0.1)
                record = answer_record(item, reply, attempts=1, run=run)
                results.append(record)
                stats.count(record)
        return stats

    return ask


def report_on(digits: Digits, model: PlantedModel, out: Path, methods: list[Method]) -> SuiteReport:
    plan = plan_suite("hallucination", source=digits.source, out=out, methods=methods)
    assert [each.set.name for each in plan.sets] == ["chair", "amber"]
    run_suite(plan, asked(digits, model))
    return make_report(read_suite(plan), methods)


WITH_CONTROL = [BASE, guided(0.3), guided(0.3, control="before DPO", reward="before")]


def test_a_real_gain(digits: Digits, tmp_path: Path) -> None:
    report = report_on(digits, REAL, tmp_path, WITH_CONTROL)
    assert report.findings.outcome == "gain"
    assert {each.set.name for each in report.findings.real_gains} == {"chair", "amber"}
    words = text_report(report)
    assert words.startswith("guided, w = 0.3 is better than the base on CHAIR (CHAIR_i -")
    assert "worse on none of 2 sets" in words


def test_a_gain_that_the_control_has_is_calibration(digits: Digits, tmp_path: Path) -> None:
    report = report_on(digits, CALIBRATED, tmp_path, WITH_CONTROL)
    assert report.findings.outcome == "calibration"
    words = text_report(report)
    assert words.startswith("The gain of guided, w = 0.3 on AMBER")
    assert "is calibration" in words
    assert "AMBER: the share of yes went from" in words
    # Without the control, the same answers pass for a gain, and the report says what is missing.
    alone = make_report(report.sets, WITH_CONTROL[:2])
    assert alone.findings.outcome == "gain"
    assert "Controls were not run" in text_report(alone)


def test_no_gain(digits: Digits, tmp_path: Path) -> None:
    report = report_on(digits, NOTHING, tmp_path, WITH_CONTROL)
    assert report.findings.outcome == "none"
    assert text_report(report).startswith("No gain: guided, w = 0.3 differs")


def test_a_set_without_its_figure_is_named(digits: Digits, tmp_path: Path) -> None:
    """Captions that mention no object have no CHAIR_i, and that is no gain."""
    methods = [BASE, guided(0.3)]
    plan = plan_suite(
        "hallucination", source=digits.source, out=tmp_path, methods=methods, only=["chair"]
    )
    run_suite(plan, asked(digits, REAL))
    path = plan.sets[0].results(methods[1])
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(x | {"response": "Nothing."}) + "\n" for x in lines))
    words = text_report(make_report(read_suite(plan), methods))
    assert words.startswith("Nothing can be said")
    assert "CHAIR is not compared: CHAIR_i is not defined for both." in words


def test_an_incomplete_run_is_reported(tmp_path: Path) -> None:
    """Groups that lack a question are left out: what is left of them is too easily right."""
    names = [f"VD_ocr_{group}_{figure}_0" for group in "12345" for figure in "123"]
    keys = ("category", "subcategory", "set_id", "figure_id", "question_id")
    entries = [
        dict(zip(keys, name.split("_"), strict=True))
        | {"question": f"Is it {name}?", "gt_answer": "1", "visual_input": "1"}
        for name in names
    ]
    pictures = {f"VD/ocr/{name[7:10]}.png": png((20 * n, 0, 0)) for n, name in enumerate(names)}
    pope = [
        {"question_id": n, "image": "a.jpg", "text": "Is there a dog?", "label": "yes"}
        for n in (1, 2)
    ]
    files = {"HallusionBench.json": entries, "coco_pope_random.json": pope, "a.jpg": png()}
    source = write(tmp_path / "source", files | pictures)
    methods = [BASE, guided(0.3), guided(0.3, control="before DPO", reward="before")]
    plan = plan_suite("hallucination", source=source, out=tmp_path / "out", methods=methods)
    # Asked by the base: all but the first one; by the guided method: all, and one fails.
    wrong = {"VD_ocr_1_2_0", "VD_ocr_3_1_0"}
    for number, method in enumerate(methods[:2]):
        for each in plan.sets:
            task = each.task(method, limit=None)
            run = task.protocol(model_name="m")
            with ResultsFile(task.out, run=run) as results:
                for item in task.items()[1 - number :]:
                    reply = Reply(text="no" if item.id in wrong else "yes", response_time_s=0.1)
                    failed = number == 1 and item.id == "VD_ocr_2_1_0"
                    given = None if failed else reply
                    results.append(answer_record(item, given, error="x", attempts=1, run=run))
    sets = read_suite(plan)
    report = make_report(sets, methods)
    figures = {each.set.name: each.figures for each in report.findings.comparisons}
    hallusion = figures["hallusionbench"]
    assert {name: hallusion[name].a for name in ("aAcc", "fAcc", "qAcc")} == {
        "aAcc": pytest.approx(100 * 8 / 9), "fAcc": pytest.approx(100 * 8 / 9),
        "qAcc": pytest.approx(100 * 2 / 3),
    }  # fmt: skip
    words = text_report(report)
    ending = "The groups of questions that they belong to are left out."
    no_answer = "questions have no scored answer of"
    for line in (
        f"HallusionBench: 1 of 15 {no_answer} base; guided, w = 0.3. {ending}",
        f"HallusionBench: 15 of 15 {no_answer} {methods[2].name}. {ending}",
        "POPE: 1 of 2 questions have no scored answer of base.",
        "POPE: F1 mean of splits leaves out F1 popular, F1 adversarial, not defined for both.",
    ):
        assert line in words.splitlines()
    missing = {
        (each["set"], each["method"]): (each["missing"], each["questions"])
        for each in to_json(report)["missing"]
    }
    assert missing["pope", "base"] == (1, 2)
    assert ("pope", "guided, w = 0.3") not in missing
    assert "POPE：2 道题中有 1 道没有 base 的有效得分。" in html_page(report, language="zh").html()


def test_no_weight_is_better_than_0(digits: Digits, tmp_path: Path) -> None:
    methods = suite_methods([0, 0.1, 0.3], controls=False, local=False, before_dpo="")
    report = report_on(digits, WORSE, tmp_path, methods)
    assert report.findings.method is None
    assert text_report(report).startswith("No weight is better than 0")
    assert to_json(report)["method"] is None


def test_the_weight_is_reported_on_questions_that_did_not_choose_it(
    digits: Digits, tmp_path: Path
) -> None:
    methods = [BASE, guided(0.1), guided(0.3)]
    report = report_on(digits, REAL, tmp_path, methods)
    assert report.findings.method in methods[1:]
    assert report.findings.part == "rest"
    chair = report.findings.comparisons[0]
    assert 70 <= chair.num_units <= 100  # of 120, about 70 %
    assert report.of_method(guided(0.3))[0].num_units == 120
    # The weight that was not chosen has no sentence of its own.
    assert text_report(report).count("is better than the base") == 1


def test_a_second_run_asks_nothing(digits: Digits, tmp_path: Path) -> None:
    plan = plan_suite("hallucination", source=digits.source, out=tmp_path, methods=[BASE], limit=20)
    first = run_suite(plan, asked(digits, REAL))
    again = run_suite(plan, asked(digits, REAL))
    assert [one.num_asked for one in first] == [20, 20]
    assert [one.num_asked for one in again] == [0, 0]


def test_controls_that_cannot_be_run_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    methods = suite_methods([0, 0.3], controls=True, local=False, before_dpo="before")
    assert [method.name for method in methods] == ["base", "guided, w = 0.3", "before DPO, w = 0.3"]
    assert methods[2].fields() == {"guidance_weights": {"before": 0.3}}
    assert "needs --local-model" in capsys.readouterr().err
    local = suite_methods([0, 0.3], controls=True, local=True, before_dpo="", explain=True)
    assert [method.explain for method in local] == [False, True, False]
    assert [method.control for method in local] == ["", "", "other images"]
    with pytest.raises(TitaError, match="no control can be run"):
        suite_methods([0, 0.3], controls=True, local=False, before_dpo="")


def test_sets_are_found_by_their_files_or_their_folders_name(tmp_path: Path) -> None:
    for name in (
        "POPE/output/coco/coco_pope_random.json", "RealWorldQA/data/test.parquet",
        "x/y/HallusionBench.json", "mm-vet-v2/mm-vet-v2.json", "amber/data/unrelated.txt",
    ):  # fmt: skip
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")
    found = {each.set.name: each.folder for each in find_sets(tmp_path, suite="hallucination")}
    places = {name: folder.relative_to(tmp_path).as_posix() for name, folder in found.items()}
    assert places == {
        # The reader then says which of AMBER's files is missing.
        "amber": "amber", "pope": "POPE/output/coco", "hallusionbench": "x/y",
        "realworldqa": "RealWorldQA", "mm-vet-v2": "mm-vet-v2",
    }  # fmt: skip
    (tmp_path / "z").mkdir()
    (tmp_path / "z" / "HallusionBench.json").write_text("")
    with pytest.raises(TitaError, match="HallusionBench lies in several folders"):
        find_sets(tmp_path, suite="hallucination")
    with pytest.raises(TitaError, match="no suite 'nope'"):
        find_sets(tmp_path, suite="nope")


def test_missing_images_are_named(digits: Digits, tmp_path: Path) -> None:
    other = tmp_path / "source"
    (other / "coco").mkdir(parents=True)
    for path in (digits.source / "coco").iterdir():
        (other / "coco" / path.name).write_bytes(path.read_bytes())
    with pytest.raises(TitaError, match="120 images of CHAIR are missing: COCO_val2014_0000"):
        plan_suite("hallucination", source=other, out=tmp_path / "out", methods=[BASE])


def problem(identity: str) -> dict[str, Any]:
    return {"question": f"{identity}?", "choices": ["a", "b"], "answer": 0, "image": "image.png"}


def test_an_image_is_never_that_of_another_question(tmp_path: Path) -> None:
    """All images of ScienceQA are called image.png; a link to their folder is followed."""
    problems = {"1": problem("1"), "2": problem("2")}
    files = {"problems.json": problems, "pid_splits.json": {"test": ["1", "2"]}}
    source = write(tmp_path / "source", {f"scienceqa/{name}": files[name] for name in files})
    images = write(tmp_path / "images", {"1/image.png": png()})
    (source / "linked").symlink_to(images)
    (images / "loop").symlink_to(images)
    with pytest.raises(TitaError, match="1 images of ScienceQA are missing: 2"):
        plan_suite("hallucination", source=source, out=tmp_path / "out", methods=[BASE])
    write(images, {"2/image.png": png((0, 0, 0)), "3/image.png": png()})
    plan = plan_suite("hallucination", source=source, out=tmp_path / "out", methods=[BASE])
    items = read_items(plan.sets[0].folder / "questions.jsonl", images=source)
    assert [item.images for item in items] == [("linked/1/image.png",), ("linked/2/image.png",)]


def test_an_image_in_another_folder_is_found_if_it_is_the_only_one(tmp_path: Path) -> None:
    source = write(tmp_path, {"a/1.jpg": png(), "b/1.jpg": png(), "b/2.jpg": png()})
    index = ImageIndex(source)
    assert index.find("images/2.jpg", near=source) == "b/2.jpg"
    assert index.find("images/1.jpg", near=source) is None
    assert index.find("images/1.jpg", near=source / "b") == "b/1.jpg"
    assert index.find("1.jpg", near=source) == "a/1.jpg"


def test_questions_of_several_sets_have_a_score_each(tmp_path: Path) -> None:
    """Also if the second set begins late: the rules of the first are not those of the other."""
    path = tmp_path / "results.jsonl"
    line = {"model_name": "m", "response": "Yes", "success": True, "metric": "yes-no"}
    lines = [line | {"question_id": n, "suite": "pope"} for n in range(200)]
    path.write_text("".join(json.dumps(each) + "\n" for each in lines))
    assert scorer_of(path) == ("pope", SETS["pope"].scorer)
    with path.open("a") as file:
        file.write(json.dumps(line | {"question_id": 200, "suite": "amber"}) + "\n")
    assert scorer_of(path) == ("", MEAN_SCORER)


@pytest.fixture
def server(digits: Digits) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """An endpoint like `tita serve` with the real gain; yields its URL and the requests."""
    requests: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self.send({"object": "list", "data": [{"id": "tita", "object": "model"}]})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            requests.append(body)
            parts = body["messages"][0]["content"]
            question = next(part["text"] for part in parts if part["type"] == "text")
            url = next(part["image_url"]["url"] for part in parts if part["type"] == "image_url")
            image = base64.b64decode(url.partition(",")[2])
            weights = body.get("guidance_weights")
            method = "control" if weights else "guided" if body["guidance_weight"] else "base"
            said = digits.ask(REAL, question, image, method=method)
            choice = {"message": {"role": "assistant", "content": said}, "finish_reason": "stop"}
            usage = {"prompt_tokens": 40, "completion_tokens": 8, "total_tokens": 48}
            self.send({"choices": [choice], "usage": usage})

        def send(self, content: Any) -> None:
            data = json.dumps(content).encode()
            self.send_response(200)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: Any) -> None:
            pass

    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=httpd.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{httpd.server_port}/v1", requests
    httpd.shutdown()
    thread.join()
    httpd.server_close()


def run_command(*arguments: Any) -> int:
    with pytest.raises(SystemExit) as ended:
        tita_bench([str(argument) for argument in arguments])
    return int(ended.value.code or 0)


@pytest.mark.slow
def test_the_command_end_to_end(
    server: tuple[str, list[dict[str, Any]]],
    digits: Digits,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    url, requests = server
    command = (
        "suite", "--name", "hallucination", "--source", digits.source, "--out", tmp_path,
        "--base-url", url, "--weights", "0,0.3", "--controls", "--before-dpo", "before",
        "--max", "60",
    )  # fmt: skip
    assert run_command(*command) == 0
    assert "is better than the base on CHAIR" in capsys.readouterr().out
    assert len(requests) == 2 * 3 * 60
    assert {body["max_tokens"] for body in requests} == {512}
    content = json.loads((tmp_path / "report.json").read_text())
    assert content["outcome"] == "gain"
    assert content["over_controls"]["chair"]
    assert {row["method"]: row["output tokens"] for row in content["methods"]}["base"] == 8
    for name in ("report.html", "report.zh.html"):
        page = (tmp_path / name).read_text()
        assert "http://" not in page.replace("http://www.w3.org", "")


@pytest.mark.slow
def test_methods_of_a_sweep_with_their_front(
    server: tuple[str, list[dict[str, Any]]], digits: Digits, tmp_path: Path
) -> None:
    url, requests = server
    plan_suite("hallucination", source=digits.source, out=tmp_path, methods=[BASE])
    code = run_command(
        "sweep", "--questions", tmp_path / "chair" / "questions.jsonl", "--images", digits.source,
        "--out", tmp_path / "sweep", "--base-url", url, "--weights", "0.3", "--max", "40",
        "--methods", "base,vcd,m3id,cfg,best-of-4,guided,faithful=0.3+brief=0.1",
        "--front", "CHAIR_i,CHAIR_s",
    )  # fmt: skip
    assert code == 0
    bodies = [
        {key: body[key] for key in body if key.startswith(("guidance", "best", "stream", "temp"))}
        for body in requests[::40]
    ]
    streamed = {"stream": True, "stream_options": {"include_usage": True}, "temperature": 0.0}
    assert bodies == [
        {"guidance_weight": 0.0, **streamed},
        {"guidance_weight": 1.0, "guidance_form": "vcd", **streamed},
        {"guidance_weight": 0.02, "guidance_form": "m3id", **streamed},
        {"guidance_weight": 1.5, "guidance_form": "cfg", **streamed},
        {"guidance_weight": 0.0, "best_of": 4, "stream": False, "temperature": 1.0},
        {"guidance_weight": 0.3, **streamed},
        {"guidance_weights": {"faithful": 0.3, "brief": 0.1}, **streamed},
    ]
    words = (tmp_path / "sweep" / "report.txt").read_text()
    assert "vcd is better than the base on chair (CHAIR_i -" in words
    assert "No other method beats these in both figures: " in words
    content = json.loads((tmp_path / "sweep" / "report.json").read_text())
    assert content["front"]["figures"] == ["CHAIR_i", "CHAIR_s"]
    assert content["front"]["hypervolume"] > 0
    points = content["front"]["points"]
    assert len(points) == 7
    # As measured, in percent, and the method of the headline makes less up.
    assert 0 <= points["vcd"][0] < points["base"][0] <= 100
    assert len(content["methods"]) == 7
    runs = SetRuns(
        name="", title="", source="", scorer=SETS["chair"].scorer, folder=tmp_path,
        images=tmp_path, runs={}, num_questions=0,
    )  # fmt: skip
    for figures in ("CHAIR_i", "CHAIR_i,length in words", "nope,recall"):
        with pytest.raises(TitaError, match="names no two figures"):
            _figures(figures, runs)
