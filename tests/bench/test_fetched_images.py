"""Images that rows name by URL: refused by name, or fetched with `--fetch-images`."""

import io
import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tita.bench import fetched_images
from tita.bench.fetched_images import image_downloads
from tita.bench.questions import read_items
from tita.bench.results_file import read_results
from tita.bench.tasks import BenchmarkTask
from tita.cli.bench import app
from tita.cli.bench_options import is_local
from tita.cli.main import run
from tita.errors import TitaError

Bench = Callable[..., tuple[int, str]]


@pytest.fixture
def bench(capsys: pytest.CaptureFixture[str]) -> Bench:
    """Run `tita-bench` in this process: its exit code and standard error."""

    def call(*arguments: Any) -> tuple[int, str]:
        code = run(app, list(map(str, arguments)), name="tita-bench")
        return code, capsys.readouterr().err

    return call


@dataclass
class ImageHost:
    """A server of images: `/<colour>.png`, 404 for `/missing`, HTML for `/page`."""

    port: int
    asked: list[str] = field(default_factory=list)

    def url(self, name: str) -> str:
        return f"http://127.0.0.1:{self.port}/{name}"


def picture(colour: str) -> bytes:
    data = io.BytesIO()
    Image.new("RGB", (32, 24), colour).save(data, "PNG")
    return data.getvalue()


@pytest.fixture
def host() -> Iterator[ImageHost]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            found.asked.append(self.path)
            self.send_response(404 if self.path == "/missing" else 200)
            self.end_headers()
            name = self.path.strip("/").removesuffix(".png")
            self.wfile.write(b"<html>" if name in ("page", "missing") else picture(name))

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        found = ImageHost(port=server.server_port)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield found
        server.shutdown()


def write_rows(path: Path, *images: Any) -> Path:
    rows = ({"question_id": f"q{n}", "text": "?", "image": i} for n, i in enumerate(images))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_url_is_refused_by_name_without_the_option(
    bench: Bench, endpoint: Any, host: ImageHost, tmp_path: Path
) -> None:
    questions = write_rows(tmp_path / "q.jsonl", None, host.url("red.png"))
    common = ("run", "--questions", questions, "--base-url", endpoint.base_url)
    for command in (
        (*common, "--out", tmp_path / "r.jsonl"),
        ("prepare", "unpack", "--source", questions, "--out", tmp_path / "new" / "q.jsonl"),
    ):
        code, error = bench(*command)
        assert code == 2
        assert f"{questions}:2: the image '{host.url('red.png')}' is a URL" in error
        assert "--fetch-images" in error
    assert not (tmp_path / "new" / "q.jsonl").exists()
    assert host.asked == endpoint.asked() == []
    code, error = bench(*common, "--out", tmp_path / "r.jsonl", "--fetch-images")
    assert code == 2
    assert "images are not fetched from private addresses" in error
    assert host.asked == endpoint.asked() == []


ALLOWED = ("--fetch-images", "--image-host", "127.0.0.1", "--private-hosts")


def test_fetched_images_are_asked_about_and_kept(
    bench: Bench, endpoint: Any, host: ImageHost, tmp_path: Path
) -> None:
    (tmp_path / "own.png").write_bytes(picture("blue"))
    messages = [
        {"type": "text", "text": "what ?"},
        {"type": "image_url", "image_url": {"url": host.url("green.png")}},
    ]
    questions = write_rows(tmp_path / "q.jsonl", host.url("red.png"), "own.png")
    with questions.open("a") as file:
        row = {"id": "m", "messages": [{"role": "user", "content": messages}]}
        file.write(json.dumps(row) + "\n")
    for out in ("a.jsonl", "b.jsonl"):
        code, error = bench(
            "run", "--questions", questions, "--base-url", endpoint.base_url,
            "--out", tmp_path / out, *ALLOWED,
        )  # fmt: skip
        assert code == 0, error
    assert sorted(host.asked) == ["/green.png", "/red.png"], "the second run has them"
    assert [len(entry["images"]) for entry in endpoint.asked()] == [1] * 6
    results = {r["question_id"]: r for r in read_results(tmp_path / "a.jsonl")}
    assert results["q1"]["image"] == "own.png"
    for name, colour in (("q0", "red"), ("m", "green")):
        image = results[name]["image"]
        assert image.startswith("fetched/")
        assert (tmp_path / image).read_bytes() == picture(colour)


def test_unpack_fetches_and_writes_paths(bench: Bench, host: ImageHost, tmp_path: Path) -> None:
    source = write_rows(tmp_path / "q.jsonl", [host.url("red.png"), host.url("blue.png")])
    out = tmp_path / "new" / "q.jsonl"
    code, error = bench("prepare", "unpack", "--source", source, "--out", out, *ALLOWED)
    assert code == 0, error
    (item,) = read_items(out)
    contents = [(out.parent / image).read_bytes() for image in item.images]
    assert contents == [picture("red"), picture("blue")]


def test_all_failures_are_reported_and_the_others_kept(host: ImageHost, tmp_path: Path) -> None:
    names = ("red.png", "missing", "page", "blue.png")
    questions = write_rows(tmp_path / "q.jsonl", *map(host.url, names))

    def task() -> BenchmarkTask:
        downloads = image_downloads(tmp_path, hosts=["127.0.0.1"], private=True)
        return BenchmarkTask(
            questions=questions, images=tmp_path, out=tmp_path / "r.jsonl", downloads=downloads
        )

    for num_asked in (4, 6):
        with pytest.raises(TitaError, match=r"2 images not fetched, such as .*missing of question "
                           r"q1: the image could not be fetched \(HTTP 404\)"):  # fmt: skip
            task().items()
        assert len(host.asked) == num_asked
    write_rows(questions, *map(host.url, ("red.png", "blue.png")))
    assert [(tmp_path / item.images[0]).is_file() for item in task().items()] == [True, True]
    assert len(host.asked) == 6


def test_hosts_are_bounded(
    host: ImageHost, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    urls = [f"http://h{n}.test/a.png" for n in range(fetched_images.MAX_HOSTS + 1)]
    items = list(read_items(write_rows(tmp_path / "q.jsonl", *urls), urls=True))
    with pytest.raises(TitaError, match=r"more than 16 hosts, such as h0.test.*--image-host"):
        list(image_downloads(tmp_path, hosts=[], private=False).replace_urls(items))
    other = read_items(write_rows(tmp_path / "q.jsonl", host.url("red.png")), urls=True)
    with pytest.raises(TitaError, match="not fetched from this host"):
        list(image_downloads(tmp_path, hosts=["x.test"], private=True).replace_urls(other))
    monkeypatch.setattr(fetched_images, "MAX_BYTES", 10)
    large = read_items(write_rows(tmp_path / "q.jsonl", host.url("red.png")), urls=True)
    with pytest.raises(TitaError, match="more than 10 bytes"):
        list(image_downloads(tmp_path, hosts=["127.0.0.1"], private=True).replace_urls(large))


def test_options_without_effect_are_refused(bench: Bench, tmp_path: Path) -> None:
    questions = write_rows(tmp_path / "q.jsonl", None)
    common = (
        "run",
        "--questions",
        questions,
        "--out",
        tmp_path / "r.jsonl",
        "--base-url",
        "http://h",
    )
    code, error = bench(*common, "--image-host", "a.test")
    assert (code, "need --fetch-images" in error) == (2, True)
    code, error = bench(*common, "--fetch-images", "--private-hosts")
    assert (code, "--private-hosts needs --image-host" in error) == (2, True)


def test_a_copy_of_the_store_is_not_written_to(tmp_path: Path) -> None:
    assert is_local(str(tmp_path), folder=tmp_path)
    assert is_local(str(tmp_path / "q.jsonl"), folder=tmp_path)
    assert not is_local("data/vqa/questions.jsonl", folder=tmp_path)


@pytest.mark.parametrize("url", ["HTTP://h.test/a.png", " https://h.test/a.png", "ftp://h/a.png"])
def test_every_spelling_of_a_url_is_refused(tmp_path: Path, url: str) -> None:
    with pytest.raises(TitaError, match="is a URL, not a file"):
        list(read_items(write_rows(tmp_path / "q.jsonl", url)))
