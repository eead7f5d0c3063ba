"""Costs that grow with the data, the nodes or the pods: what a start, a restart and a watch do.

`scale.py [--long] [SECTION ...]` (lengths, memory, restart, pairs, shards, manifest, pull, watch)
prints, for each, the way it was done before and the way it is done now, measured in the same run,
the growth, and an extrapolation. It counts work where it can: processor time, requests and bytes,
which other programs disturb little. It exits with 1 if a bound of docs/scale.md is missed. Without
`--long` it takes a few seconds, judges counts and bytes alone, since times of a few seconds depend
on what else the machine does, and leaves out `memory`, which needs many rows, and `pull` and
`watch`, which need servers.
"""

import argparse
import hashlib
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "launch"), str(ROOT / "benchmarks")]

RLAIF_V, MMPR = 83_000, 3_000_000
"""Numbers of pairs."""


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=" ".join(SECTIONS))
    parser.add_argument("--long", action="store_true")
    arguments = parser.parse_args(words)
    names = arguments.sections or (SECTIONS if arguments.long else SHORT)
    load, cpus = os.getloadavg()[0], os.cpu_count()
    print(f"load {load:.1f} on {cpus} processors{', busy' if load > 0.5 * (cpus or 1) else ''}")
    good = [SECTIONS[name](arguments.long) for name in names]
    return 0 if all(good) else 1


def verdict(is_good: bool) -> str:
    return "held" if is_good else "MISSED"


def time_verdict(is_good: bool, *, is_long: bool) -> str:
    return verdict(is_good) if is_long else "times not judged"


def processor_s(work: Callable[[], Any]) -> float:
    started = time.process_time()
    work()
    return time.process_time() - started


def as_time(seconds: float) -> str:
    for size, unit in ((3600.0, "h"), (60.0, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} s"


@contextmanager
def lone_rank(folder: Path) -> Iterator[None]:
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def measure_lengths(is_long: bool) -> bool:
    """Processor time per row before step 1: as it was, first start, second start.

    Before, the rows were read by each start, and each image went through the processor. Each row
    has its own image of 640 x 480 pixels, which is the worst case.
    """
    import PIL.Image

    from tita.data import read_pairs
    from tita.data.record_table import open_records
    from tita.demo.models import demo_model_path
    from tita.records import Pair
    from tita.storage import open_store
    from tita.train.measures import measure_rows, to_fields
    from tita.train.training_data import RowFormatter, count_tokens
    from tita.vlm.processors import load_processor

    model = str(demo_model_path("reward"))
    processor = load_processor(model, where=model)
    good = True
    with tempfile.TemporaryDirectory() as name, lone_rank(Path(name)):
        root = Path(name)
        os.environ["TITA_CACHE_DIR"] = f"{name}/cache"
        noise = PIL.Image.effect_noise((640, 480), 60).convert("RGB")
        noise.save(root / "image.jpg", quality=70)
        content = (root / "image.jpg").read_bytes()
        (root / "images").mkdir()
        for number in (200,) if not is_long else (1_000, 2_000, 4_000):
            for row in range(number):
                # Bytes behind the end of the picture would be decoded to be sure.
                path = root / "images" / f"{row}.jpg"
                path.write_bytes(
                    content[:2] + b"\xff\xfe\x00\x06%04d" % (row % 10_000) + content[2:]
                )
            pairs = root / "images" / f"{number}.jsonl"
            write_pairs(pairs, number, images="{}.jpg")
            rows = RowFormatter(images=root / "images", processor=processor, image_aspect="pad")

            def before(pairs: Path = pairs, rows: Any = rows) -> list[Any]:
                some = list(read_pairs(pairs))[:200]
                formatted = (rows.format_row(to_fields(pair)) for pair in some)
                return list(count_tokens(formatted, processor=processor))

            def start(pairs: Path = pairs, number: int = number) -> None:
                table = open_records(pairs, Pair)
                measure_rows(
                    [table],
                    images=table.source(),
                    aspect="pad",
                    model=model,
                    processor=processor,
                    store=open_store(str(root / f"store-{number}")),
                )

            old = processor_s(before) / min(number, 200)
            first, second = (processor_s(start) / number for _ in range(2))
            held = first < 0.15 * old and second < 0.02 * old
            good = good and (held or not is_long)
            print(
                f"lengths: {number:5} rows: before {1e3 * old:.2f} ms a row; first start "
                f"{1e3 * first:.2f} ({first / old:.2f}), second {1e3 * second:.3f} "
                f"({second / old:.4f}); {MMPR:,} rows: {as_time(MMPR * old)}, "
                f"{as_time(MMPR * first)}, {as_time(MMPR * second)}: "
                f"{time_verdict(held, is_long=is_long)}"
            )
    return good


def write_pairs(path: Path, number: int, *, images: str) -> None:
    """Write pairs with the images `images.format(row)` as JSON Lines."""
    with path.open("w") as file:
        for row in range(number):
            pair = {
                "id": f"{row}",
                "image": images.format(row),
                "question": f"What is shown at number {row}?",
                "chosen": "A man and a woman walk a dog along the beach. " * 3,
                "rejected": "A man rides a horse through a field of flowers. " * 3,
            }
            file.write(f"{json.dumps(pair)}\n")


ROWS = """
import gc, os, re, sys, threading, time
from pathlib import Path

import torch
import torch.distributed as dist

from tita.demo.models import demo_model_path
from tita.recipes import TrainRecipe, validate_recipe
from tita.storage import open_store
from tita.train.preflight import preflight
from tita.train.reference import recall_reference, reference_key
from tita.train.run import TrainRun
from tita.train.training_data import make_dataset, read_inputs
from tita.vlm.processors import load_processor

root, numbers = Path(sys.argv[1]), sys.argv[2:]
own = f"file://{root}/group-{os.getpid()}"
dist.init_process_group("gloo", init_method=own, rank=0, world_size=1)
model = str(demo_model_path("reward"))
processor = load_processor(model, where=model)


def held():
    # Without mapped files, which the kernel may drop.
    return int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024


def start(number):
    facts = {"model": model, "pairs": f"{root}/data/{number}.jsonl", "dtype": "float32"}
    recipe = validate_recipe(TrainRecipe, facts)
    store = open_store(f"{root}/store")
    run = TrainRun(recipe=recipe, name="r", out="runs/r", folder=root, store=store)
    inputs = preflight(run, inputs=read_inputs(recipe, store=store), processor=processor)
    rows = make_dataset(
        inputs.pairs, images=inputs.images, processor=processor, image_aspect="pad"
    )

    def compute(first, add):
        for row in range(first, len(rows), 8):
            some = [-12.5] * min(8, len(rows) - row)
            add([some, some])

    found = recall_reference(
        compute,
        key=lambda: reference_key(inputs, pairs=inputs.pairs, negatives=(), dtype="float32"),
        store=store,
        num_pairs=len(rows),
    )
    for name, values in zip(("chosen", "rejected"), found):
        rows = rows.add_column(f"ref_{name}_logps", values)
    order = torch.randperm(len(rows)).tolist()
    for row in order[:16]:
        rows[row]


start(5_000)  # imports, and the sample whose shortcuts are measured
peak = 0


def watch():
    global peak
    while True:
        peak = max(peak, held())
        time.sleep(0.005)


threading.Thread(target=watch, daemon=True).start()
for number in numbers:
    for _ in range(2):
        gc.collect()
        base = peak = held()
        began = time.process_time()
        start(number)
        print(time.process_time() - began, max(peak, held()) - base)
os._exit(0)
"""


def measure_memory(is_long: bool) -> bool:
    """Memory of a rank that grows with the rows: at a first start, and at a second one."""
    numbers = (20_000, 80_000) if not is_long else (50_000, 250_000)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name, "data")
        folder.mkdir()
        write_image(folder / "0.png")
        for row in range(1, max(numbers)):
            # A file has at most 65,000 names.
            source = folder / f"{row - row % 10_000}.png"
            path = folder / f"{row}.png"
            path.hardlink_to(source) if row % 10_000 else write_image(path)
        for number in (5_000, *numbers):
            write_pairs(folder / f"{number}.jsonl", number, images="{}.png")
        peaks: list[list[float]] = []
        for number in numbers:
            command = [sys.executable, "-c", ROWS, name, str(number)]
            environment = {
                **os.environ, "PYTHONPATH": str(ROOT), "TITA_CACHE_DIR": f"{name}/cache"
            }  # fmt: skip
            ended = subprocess.run(
                command, env=environment, check=True, stdout=subprocess.PIPE, text=True
            )
            lines = [line.split() for line in ended.stdout.splitlines()]
            peaks.append([float(peak) for _, peak in lines])
    rows = numbers[1] - numbers[0]
    slopes = [(large - small) / rows for small, large in zip(*peaks, strict=True)]
    good = bool(max(slopes) < 200)
    print(
        f"memory: {numbers[0]:,} to {numbers[1]:,} rows: {slopes[0]:.0f} bytes a row at the first "
        f"start, {slopes[1]:.0f} at the second; before 1,300 (docs/scale.md): {verdict(good)}"
    )
    return good


def write_image(path: Path) -> None:
    import PIL.Image

    PIL.Image.new("RGB", (32, 32)).save(path)


def measure_restart(is_long: bool) -> bool:
    """Bytes that one node pulls at a restart: all nodes' trees, or its own and what is shared."""
    from tita.storage import open_store
    from tita.train.checkpoints import Checkpoints

    shared, shard = 14_000, 84_000
    """A full 7B with ZeRO-2, scaled down by a million: weights in 16 bits, and the states of Adam
    in 32 bits over all nodes."""
    good, sizes = True, []
    with tempfile.TemporaryDirectory() as name, lone_rank(Path(name)):
        for num_nodes in (2, 4, 8, 16):
            store = open_store(str(Path(name) / f"store-{num_nodes}"))
            options: dict[str, Any] = {
                "store": store, "out": "runs/a", "num_nodes": num_nodes, "meta": {},
                "is_same_run": lambda _: True,
            }  # fmt: skip
            nodes = [Checkpoints(node=node, **options) for node in range(num_nodes)]
            for number in range(num_nodes):
                folder = Path(name) / f"{num_nodes}-{number}"
                folder.mkdir()
                names = {f"zero_pp_rank_{number}_mp_rank_00_optim_states.pt": shard // num_nodes}
                if number == 0:
                    names["mp_rank_00_model_states.pt"] = shared
                for file, size in names.items():
                    (folder / file).write_bytes(bytes(size))
                store.push_tree(folder, f"runs/a/checkpoints/2/node-{number}", meta={})
            restored = nodes[-1].restore(Path(name) / f"restored-{num_nodes}")
            assert restored is not None
            pulled = sum(path.stat().st_size for path in restored.rglob("*.pt"))
            before = shared + shard // num_nodes * num_nodes
            sizes.append(pulled)
            good = pulled <= shared + shard // num_nodes and good
            print(
                f"restart: {num_nodes:2} nodes: before {before / 1e3:.0f} GB a node, "
                f"{num_nodes * before / 1e6:.2f} TB in all, one after the other; now "
                f"{pulled / 1e3:.0f} GB a node, {num_nodes * pulled / 1e6:.2f} TB in all, at once: "
                f"{verdict(good)}"
            )
    return good


class DistantStore:
    """A store whose every request takes 5 ms; it counts them."""

    def __init__(self, store: Any) -> None:
        self._store, self.num_requests, self._guard = store, 0, threading.Lock()

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._store, name)

        def call(*arguments: Any, **options: Any) -> Any:
            with self._guard:
                self.num_requests += 1
            time.sleep(0.005)
            return method(*arguments, **options)

        return call


def measure_pairs(is_long: bool) -> bool:
    """The end of `build-pairs`: objects and time to read them, one by one and as it is done."""
    from tita.pairs.build import PairBatch, PairsRun, make_pair
    from tita.recipes import PairsRecipe
    from tita.records import Question
    from tita.storage import open_store

    good = True
    for number in (10_000,) if not is_long else (10_000, 100_000, 300_000):
        questions = tuple(Question(id=f"{n}", text="?", image="a.png") for n in range(number))
        recipe = PairsRecipe(model="m", questions="q")
        run = PairsRun(
            recipe=recipe, questions=questions, images=Path(), out="pairs/x", parts="parts/x"
        )
        with tempfile.TemporaryDirectory() as name:
            store = DistantStore(open_store(name))
            for batch in range(run.num_batches):
                asked = [question for step in run.steps(batch) for question in step]
                pairs = tuple(make_pair(q, "n", chosen="a", rejected="b") for q in asked)
                path = Path(name) / run.batch_key(batch)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(PairBatch(pairs=pairs).to_json())
            started = time.perf_counter()
            for batch in range(40):
                store.get(run.batch_key(batch))
            one_s = (time.perf_counter() - started) / 40
            started = time.perf_counter()
            whole = PairBatch.join(run.read_batches(store))
            now_s = time.perf_counter() - started
            assert len(whole.pairs) == number
        objects = -(-number // recipe.batch_size)
        before_s = objects * one_s
        held = now_s < 0.4 * before_s
        good = good and (held or not is_long)
        print(
            f"pairs: {number:7,} questions: before {objects:6,} objects, {as_time(before_s)} to "
            f"read one by one; now {run.num_batches:5,} objects, {as_time(now_s)}: "
            f"{time_verdict(held, is_long=is_long)}"
        )
    last = replace(run, questions=questions[:1] * MMPR)
    print(
        f"pairs: {MMPR:,} questions: before {MMPR // recipe.batch_size:,} objects to read and to "
        f"delete, now {last.num_batches:,}, 16 at a time"
    )
    return good


def measure_pull(is_long: bool) -> bool:
    """Pods that pull the same 2,000 files at 50 GET/s: time, and requests that are refused."""
    from tests.s3_server import BUCKET, KEYS, seaweedfs
    from tests.storage.test_throttling import ThrottlingProxy

    number, good = 2_000 if is_long else 200, True
    with tempfile.TemporaryDirectory() as name, seaweedfs(Path(name)) as url:
        environment = {
            **os.environ, **KEYS, "TITA_S3_ENDPOINT_URL": url, "TITA_S3_REGION": "us-east-1",
            "TITA_S3_PATH_STYLE": "true", "TITA_STORE": f"s3://{BUCKET}/x",
            "PYTHONPATH": str(ROOT),
        }  # fmt: skip
        folder = Path(name) / "tree"
        folder.mkdir()
        for file in range(number):
            (folder / f"{file}.jpg").write_bytes(random.Random(file).randbytes(10_000))
        tita = [sys.executable, "-m", "tita"]
        for tree, options in (("data", []), ("sharded", ["--shard"])):
            command = [*tita, "data", "push", str(folder), tree, *options]
            subprocess.run(command, env=environment, check=True)
        ThrottlingProxy.upstream, ThrottlingProxy.rate = urlsplit(url).netloc, 50.0
        proxy = ThreadingHTTPServer(("127.0.0.1", 0), ThrottlingProxy)
        proxy.daemon_threads = True
        threading.Thread(target=proxy.serve_forever, daemon=True).start()
        environment["TITA_S3_ENDPOINT_URL"] = f"http://127.0.0.1:{proxy.server_address[1]}"
        for tree, num_pods in (("data", 1), ("data", 2), ("data", 4), ("sharded", 4)):
            what = "images in shards" if tree == "sharded" else "files"
            ThrottlingProxy.num_answered, ThrottlingProxy.num_refused = Counter(), 0
            started = time.perf_counter()
            pods = [
                subprocess.Popen(
                    [*tita, "data", "pull", tree, f"{name}/{tree}-{num_pods}-{pod}"],
                    env=environment, stderr=subprocess.DEVNULL,
                )
                for pod in range(num_pods)
            ]  # fmt: skip
            codes = [pod.wait() for pod in pods]
            is_done = not any(codes)
            taken_s = time.perf_counter() - started
            good = is_done and good
            print(
                f"pull: {num_pods} pods x {number:,} {what} at 50 GET/s: "
                f"{'finished' if is_done else 'FAILED'} after {taken_s:.0f} s; "
                f"{ThrottlingProxy.num_answered.total():,} requests answered, "
                f"{ThrottlingProxy.num_refused:,} refused: "
                f"{verdict(is_done)}"
            )
        proxy.shutdown()
    return good


def measure_watch(is_long: bool) -> bool:
    """Processor time of `tita jobs watch`: while all pods start, and afterwards."""
    from fake_api import FakeApi
    from launch_speed import cpu_seconds, peak_mib, prepare

    good = True
    for options in ([], ["--all-ranks"], ["-o", "json"]):
        # The tests' API server wakes a thread per open log at every change: 1,024 saturate it.
        for num_pods in (256, 512, 1_024) if not options else (128, 256):
            api = FakeApi().start()
            with tempfile.TemporaryDirectory() as folder:
                environment = prepare(api, Path(folder)) | {"PYTHONPATH": str(ROOT)}
                tita = [sys.executable, "-m", "tita"]
                subprocess.run(
                    [*tita, "launch", "train-dpo", "--detach", "--no-preflight", "--nodes",
                     str(num_pods), "--name", "big"],
                    env=environment, check=True, stderr=subprocess.DEVNULL,
                )  # fmt: skip
                printed = Path(folder) / "printed"
                with printed.open("wb") as output:
                    process = subprocess.Popen(
                        [*tita, "jobs", "watch", "big", *options],
                        env=environment, stdout=output, stderr=output,
                    )  # fmt: skip
                time.sleep(3)
                idle_s = cpu_seconds(process.pid)
                pods = [api.pod("big", index, node=f"n{index % 256}") for index in range(num_pods)]
                for index, pod in enumerate(pods):
                    api.run_pod(pod, node=f"n{index % 256}")
                    time.sleep(0.005)
                time.sleep(5)
                start_s = cpu_seconds(process.pid) - idle_s
                before, began = cpu_seconds(process.pid), time.perf_counter()
                for step in range(60):
                    figures = {"step": step, "steps": 10**6, **FIGURES}
                    api.write(pods[0], json.dumps({"progress": figures}))
                    time.sleep(0.5)
                share = (cpu_seconds(process.pid) - before) / (time.perf_counter() - began)
                peak, size = peak_mib(process.pid), printed.stat().st_size
                process.terminate()
                process.wait()
            api.stop()
            bounds = (20.0, 0.2) if "--all-ranks" in options else (2.0, 0.02)
            is_good = start_s < bounds[0] and share < bounds[1]
            good = good and is_good
            print(
                f"watch {' '.join(options):11}: {num_pods:5} pods: {start_s:.2f} processor seconds "
                f"while they start, then {share:.1%} of a core; {peak:.0f} MiB, "
                f"{size / 1e6:.2f} MB printed: {verdict(is_good)}"
            )
    return good


def measure_shards(is_long: bool) -> bool:
    """Images as files and in shards: requests of a pull, and processor time to read one by name."""
    from tita.data.dataset import find_image
    from tita.storage import open_store
    from tita.storage.download import SLICE_BYTES
    from tita.storage.image_shards import read_image
    from tita.storage.sharded_push import push_in_shards

    def requests(root: Path) -> int:
        files = (path for path in root.rglob("*") if path.is_file())
        return sum(max(1, -(-path.stat().st_size // SLICE_BYTES)) for path in files)

    good = True
    # Small images in small shards stand for some of 100 kB in shards of 256 MiB.
    for number, size, shard_mib in (
        (4_000, 781, 2), *(((16_000, 781, 2), (8_000, 100_000, 256)) if is_long else ())
    ):  # fmt: skip
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name, "data")
            folder.mkdir()
            names = [f"{image:07}.jpg" for image in range(number)]
            for image in names:
                (folder / image).write_bytes(random.Random(image).randbytes(size))
            os.environ["TITA_CACHE_DIR"] = f"{name}/cache"
            store = open_store(f"{name}/store")
            push_in_shards(store, folder, "x", shard_bytes=shard_mib << 20)
            packed = Path(name, "store", "x")
            found = [path for path in packed.rglob("*") if path.name != "manifest.json"]
            index = next(path for path in found if path.suffix == ".sqlite")
            number_now = requests(packed) - 1

            def read(root: Path, names: Any = names) -> int:
                return sum(
                    len(read_image(root / (find_image(image, images=root) or "")))
                    for image in names
                )

            assert read(folder) == read(packed) == number * size
            times = [1e6 * processor_s(partial(read, root)) / number for root in (folder, packed)]
            is_good = 200 * number_now < number
            good = good and is_good
            print(
                f"shards: {number:6,} images of {size:,} bytes, {shard_mib} MiB: before {number:,} "
                f"requests, now {number_now}; found and read in {times[0]:.0f} and {times[1]:.0f} "
                f"us; index {index.stat().st_size / number:.0f} bytes an image: {verdict(is_good)}"
            )
    now = -(-MMPR * (100_000 + 1_024) // SLICE_BYTES)
    print(f"shards: {MMPR:,} images of 100 kB: before {MMPR:,} requests of each node, now {now:,}")
    return good


MANIFESTS = """
import re, sys, time
from pathlib import Path
from tita.storage import open_store

def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024

base, started = peak(), time.process_time()
manifest = open_store(sys.argv[1]).read_manifest("x")
total = sum(file.size_bytes for file in manifest.files)
assert (len(manifest.files), total) == (int(sys.argv[2]), manifest.size_bytes)
print(time.process_time() - started, peak(), peak() - base)
"""


class MadeUpFiles(Sequence[Any]):
    """The files of a large tree, made when they are read."""

    def __init__(self, number: int) -> None:
        self._number = number

    def __len__(self) -> int:
        return self._number

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(self._number))]
        if index >= self._number:
            raise IndexError
        from tita.storage.manifest import ManifestFile

        digest = hashlib.sha256(b"%d" % index).hexdigest()
        path = f"images/train/{index:09}.jpg"
        return ManifestFile(
            path=path, size_bytes=100_000, sha256=digest, etag=f'"{digest[:32]}"'
        )  # fmt: skip


def measure_manifest(is_long: bool) -> bool:
    """Reading a manifest in a process of its own: one JSON document, and parts."""
    from tita.storage.manifest import Manifest

    good = True
    for number in (100_000, 200_000) if not is_long else (100_000, 1_000_000, 10_000_000):
        with tempfile.TemporaryDirectory() as name:

            def write(key: str, data: bytes, name: str = name) -> None:
                path = Path(name, "x", key)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(data)

            def read(number: int = number, name: str = name) -> list[float]:
                command = [sys.executable, "-c", MANIFESTS, name, str(number)]
                environment = {**os.environ, "PYTHONPATH": str(ROOT)}
                printed = subprocess.run(
                    command, env=environment, check=True, capture_output=True, text=True
                )
                return [float(word) for word in printed.stdout.split()]

            files: Any = MadeUpFiles(number)
            before = ""
            if number <= 1_000_000:
                write("manifest.json", Manifest(files=tuple(files)).to_json())
                taken_s, peak_mib, _ = read()
                before = f"before {as_time(taken_s)}, {peak_mib:,.0f} MiB; "
            stored = Manifest(files=files).in_parts(write, read=lambda _: b"", where="")
            write("manifest.json", stored.to_json())
            taken_s, peak_mib, more_mib = read()
            # 60 s for ten million.
            is_good = (taken_s < 6e-6 * number or not is_long) and peak_mib < 300
            good = good and is_good
            print(
                f"manifest: {number:10,} files: {before}now {len(stored.parts)} parts, "
                f"{as_time(taken_s)}, {peak_mib:.0f} MiB, {more_mib:.0f} of them for the files: "
                f"{verdict(is_good)}"
            )
    return good


FIGURES = {
    "loss": 0.5, "reward_margin": 0.2, "reward_accuracy": 0.75, "learning_rate": 1e-6,
    "samples_per_s": 3.0, "seconds_left": 20.0, "peak_memory_bytes": 1,
}  # fmt: skip
SECTIONS = {
    "lengths": measure_lengths,
    "memory": measure_memory,
    "restart": measure_restart,
    "pairs": measure_pairs,
    "shards": measure_shards,
    "manifest": measure_manifest,
    "pull": measure_pull,
    "watch": measure_watch,
}
SHORT = ("lengths", "restart", "pairs", "shards", "manifest")


if __name__ == "__main__":
    sys.exit(main())
