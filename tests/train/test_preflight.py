"""A run that cannot succeed ends with one line before any weights are loaded."""

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs
from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs
from transformers import AutoProcessor

from tita.data import read_pairs
from tita.demo.models import demo_model_path
from tita.errors import TitaError
from tita.recipes import LoraRecipe, TrainRecipe, validate_recipe
from tita.storage import open_store
from tita.storage.manifest import sha256_of
from tita.train.memory import (
    ModelShape,
    WorldSize,
    cheaper_recipes,
    estimate_memory,
    model_shape,
)
from tita.train.model import meta_model
from tita.train.preflight import (
    check_attention,
    check_batches,
    check_compiler,
    check_disk,
    check_equal_versions,
    check_memory,
    check_precision,
    preflight,
)
from tita.train.run import TrainRun
from tita.train.training_data import TrainInputs, read_inputs

MODEL = str(demo_model_path("reward"))
GIB = 1024**3
SHAPE_7B = ModelShape(
    num_parameters=7_000_000_000,
    num_trained=7_000_000_000,
    largest_layer=131_000_000,
    layers=((32, 4096, 32),),
    vocabulary=32_000,
    trains_head=True,
)


def recipe_of(data: Any, **changes: Any) -> TrainRecipe:
    own = {"model": MODEL, "pairs": str(data.pairs), "images": str(data.images)}
    return validate_recipe(TrainRecipe, own | {"dtype": "float32"} | changes)


def check(recipe: TrainRecipe, tmp_path: Path) -> TrainInputs:
    store = open_store(str(tmp_path / "store"))
    inputs = read_inputs(recipe, store=store)
    processor = AutoProcessor.from_pretrained(inputs.model)
    run = TrainRun(recipe=recipe, name="r", out="runs/r", folder=tmp_path, store=store)
    return preflight(run, inputs=inputs, processor=processor)


def test_a_valid_run_passes_with_a_summary(
    data: Any, tmp_path: Path, lone_rank: None, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = check(recipe_of(data, batch_size=4, gradient_accumulation=2), tmp_path)
    assert len(kept.pairs) == 48
    assert kept.image_digests == {p.image: sha256_of(data.images / p.image) for p in kept.pairs}
    said = capsys.readouterr().err
    assert "48 pairs, 8 per step (4 x 2 accumulated x 1 processes)" in said
    assert "of 2048 tokens" in said


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"deepspeed": "zero3"},
        {"deepspeed": "zero3_offload", "batch_size": 1},
        {"lora": {"rank": 8}, "quantization": "4bit", "dtype": "bfloat16"},
    ],
    ids=str,
)
def test_cheaper_recipes_are_others_and_valid(data: Any, changes: dict[str, Any]) -> None:
    recipe = recipe_of(data, **changes)
    for change, other in cheaper_recipes(recipe):
        assert other != recipe, change
        assert validate_recipe(TrainRecipe, other.model_dump()) == other


def test_nodes_that_read_other_pairs_are_refused() -> None:
    places = {"pairs": "pairs/a", "images": "images/a"}
    same: dict[str, str | None] = {"pairs": "1", "images": None}
    check_equal_versions([same] * 3, places=places)
    said = "pairs/a: rank 2 has read another version of pairs than rank 0; start again"
    with pytest.raises(TitaError, match=said):
        check_equal_versions([same, same, {**same, "pairs": "2"}], places=places)


def test_shortcuts_are_reported_and_balanced(
    data: Any, tmp_path: Path, lone_rank: None, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rejected answers of the fixture are no, or yes where no is the answer."""
    found = check(recipe_of(data, batch_size=1), tmp_path)
    said = capsys.readouterr().err
    assert found.shortcuts is not None
    assert found.shortcuts.warning() is not None
    assert f"warning: {found.shortcuts.worst or found.shortcuts.accuracy}" in said
    balanced = check(recipe_of(data, batch_size=1, balance="answers"), tmp_path)
    said = capsys.readouterr().err
    chosen, rejected = (
        Counter(getattr(pair, side) for pair in balanced.pairs) for side in ("chosen", "rejected")
    )
    assert chosen["yes"] <= rejected["yes"]
    assert chosen["no"] <= rejected["no"]
    number = sum(balanced.left_out.values())
    assert number == 48 - len(balanced.pairs) > 0
    assert f"balance: {number} of 48 pairs left out" in said


@pytest.mark.parametrize("where", ["question", "chosen"])
def test_long_pairs_are_refused_or_dropped(
    data: Any, tmp_path: Path, lone_rank: None, capsys: pytest.CaptureFixture[str], where: str
) -> None:
    pairs = [json.loads(line) for line in data.pairs.read_text().splitlines()]
    # Nothing is truncated, so a long prompt counts like a long answer.
    pairs[5][where] = " ".join(["yes"] * 40)
    long = tmp_path / "pairs.jsonl"
    long.write_text("\n".join(map(json.dumps, pairs)))
    changes = {"pairs": str(long), "max_length": 40, "sft": {"steps": 1}}
    with pytest.raises(TitaError, match=r"1 of 48 pairs are too long: .* --set max_length=\d+, or"):
        check(recipe_of(data, **changes), tmp_path)
    kept = check(recipe_of(data, **changes, too_long="drop"), tmp_path)
    assert len(kept.pairs) == len(kept.answers) == 47
    assert pairs[5]["id"] not in {pair.id for pair in kept.pairs}
    assert "dropping 1 of 48 pairs that exceed max_length" in capsys.readouterr().err
    with pytest.raises(TitaError, match="48 of 48 pairs are too long"):
        check(recipe_of(data, **changes | {"max_length": 3}, too_long="drop"), tmp_path)


def test_a_truncated_image_is_an_error(data: Any, tmp_path: Path, lone_rank: None) -> None:
    images = tmp_path / "images"
    shutil.copytree(data.images, images)
    torn = max(images.rglob("*.png"))
    torn.write_bytes(torn.read_bytes()[:60])
    with pytest.raises(TitaError, match=torn.name):
        check(recipe_of(data, images=str(images)), tmp_path)


def test_an_image_placeholder_in_a_question_is_removed(
    data: Any, tmp_path: Path, lone_rank: None
) -> None:
    text = data.pairs.read_text().replace("What", "<image> What", 1)
    (tmp_path / "pairs.jsonl").write_text(text)
    assert "<image>" in text
    assert not any("<image>" in pair.question for pair in read_pairs(tmp_path / "pairs.jsonl"))
    check(recipe_of(data, pairs=str(tmp_path / "pairs.jsonl")), tmp_path)


def test_less_than_one_batch_is_refused(data: Any, tmp_path: Path, lone_rank: None) -> None:
    recipe = recipe_of(data, batch_size=16, gradient_accumulation=4)
    with pytest.raises(TitaError, match=r"48 pairs are less than one batch: 64 .*batch_size=48"):
        check(recipe, tmp_path)
    one = recipe_of(data, batch_size=1)
    check_batches(one, num_pairs=1, world=1)
    with pytest.raises(TitaError, match=r"1 pair is less than one batch: 2 .*fewer processes"):
        check_batches(one, num_pairs=1, world=2)


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("chat_template.jinja", lambda text: "hello", "chat template does not accept images here"),
        ("chat_template.jinja", lambda text: None, "has no chat template"),
        ("config.json", lambda text: _fewer_words(text), "the model has only 20 tokens"),
        ("tokenizer_config.json", lambda text: _no_end(text), "no end-of-text token"),
    ],
)
def test_a_model_with_a_wrong_tokenizer_is_an_error(
    data: Any, tmp_path: Path, lone_rank: None, name: str, change: Any, words: str
) -> None:
    model = tmp_path / "model"
    shutil.copytree(MODEL, model)
    changed = change((model / name).read_text())
    (model / name).unlink()
    if changed is not None:
        (model / name).write_text(changed)
    with pytest.raises(TitaError, match=words):
        check(recipe_of(data, model=str(model)), tmp_path)


def _fewer_words(text: str) -> str:
    config = json.loads(text)
    config["text_config"]["vocab_size"] = 20
    return json.dumps(config)


def _no_end(text: str) -> str:
    config = json.loads(text)
    del config["eos_token"]
    return json.dumps(config)


@pytest.mark.parametrize("world", [1, 4, 16])
def test_model_states_equal_deepspeeds(data: Any, world: int) -> None:
    """DeepSpeed's estimators, for 16 bits and full training."""
    size = WorldSize(total=world, local=min(4, world))
    nodes = {"num_gpus_per_node": size.local, "num_nodes": world // size.local}
    total, largest = SHAPE_7B.num_parameters, SHAPE_7B.largest_layer

    def of(stage: str) -> Any:
        recipe = recipe_of(data, dtype="bfloat16", deepspeed=stage)
        return estimate_memory(recipe, shape=SHAPE_7B, world=size, tokens=1000)

    _, theirs = estimate_zero2_model_states_mem_needs(total, cpu_offload=False, **nodes)
    assert of("zero2").weights + of("zero2").states == pytest.approx(theirs, rel=1e-6)
    _, theirs, _ = estimate_zero3_model_states_mem_needs(
        total, largest, cpu_offload=False, cpu_offload_params=False, **nodes
    )
    # Its 18 for this stage include the weights, so 2 less for gradients than in stage 2.
    ours = of("zero3").weights + of("zero3").states
    assert ours == pytest.approx(theirs + 2 * total / world, rel=1e-6)
    host, theirs, _ = estimate_zero3_model_states_mem_needs(total, largest, **nodes)
    offloaded = of("zero3_offload")
    assert offloaded.weights + offloaded.states == pytest.approx(theirs, rel=1e-6)
    assert offloaded.host == pytest.approx(host * 20 / 18, rel=1e-6)


def test_the_shape_counts_trained_parameters(data: Any) -> None:
    full = model_shape(meta_model(recipe_of(data, freeze_vision=False), start=MODEL))
    frozen = model_shape(meta_model(recipe_of(data), start=MODEL))
    lora = model_shape(meta_model(recipe_of(data, lora={"rank": 4}), start=MODEL))
    assert full.num_trained == full.num_parameters == frozen.num_parameters
    assert lora.num_trained < frozen.num_trained < full.num_trained
    assert len(full.layers) == 2
    assert len(frozen.layers) == 1
    # A frozen vision tower gets no adapters either.
    model = meta_model(recipe_of(data, lora={"rank": 4}), start=MODEL)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained
    assert not [name for name in trained if "vision" in name]


def test_a_model_that_cannot_fit_is_an_error_with_a_remedy(data: Any) -> None:
    world = WorldSize(total=2, local=2)
    recipe = recipe_of(data, gradient_checkpointing=False, batch_size=64, max_length=4096)

    def remedy(free: int) -> str:
        with pytest.raises(TitaError) as caught:
            check_memory(recipe, start=MODEL, world=world, tokens=4096, free=free, on_gpu=True)
        assert "needs about" in str(caught.value)
        assert "are free on its GPU" in str(caught.value)
        return str(caught.value.remedy)

    whole = check_memory(recipe, start=MODEL, world=world, tokens=4096, free=2**60, on_gpu=True)
    assert remedy(int(0.7 * whole.certain)) == "--set gradient_checkpointing=true"
    assert "--set batch_size=" in remedy(whole.certain // 50)
    assert remedy(1000) == "use more or larger GPUs, or a smaller model"
    check_memory(recipe, start=MODEL, world=world, tokens=4096, free=whole.certain, on_gpu=True)


def test_a_7b_model_on_80_gib(data: Any) -> None:
    """Full training needs ZeRO over several GPUs, or offloading; LoRA fits."""
    options: dict[str, Any] = {"shape": SHAPE_7B, "tokens": 1000}
    one, eight = WorldSize(total=1, local=1), WorldSize(total=8, local=8)
    recipe = recipe_of(data, dtype="bfloat16")
    assert estimate_memory(recipe, world=one, **options).certain > 80 * GIB
    assert estimate_memory(recipe, world=eight, **options).certain < 80 * GIB
    adapters = ModelShape(
        num_parameters=7_160_000_000,
        num_trained=160_000_000,
        largest_layer=131_000_000,
        layers=((32, 4096, 32),),
        vocabulary=32_000,
        trains_head=False,
    )
    lora = recipe.model_copy(update={"lora": LoraRecipe()})
    assert estimate_memory(lora, world=one, shape=adapters, tokens=1000).certain < 80 * GIB


def test_a_node_without_memory_to_load_is_an_error(
    data: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tita.train import preflight as module

    monkeypatch.setattr(module, "free_memory_bytes", lambda: 1000)
    with pytest.raises(TitaError, match="of this node's memory to load"):
        check_memory(
            recipe_of(data),
            start=MODEL,
            world=WorldSize(total=2, local=2),
            tokens=64,
            free=2**40,
            on_gpu=True,
        )


T4, A100 = (7, 5), (8, 0)


def test_attention_that_is_not_installed_is_an_error(data: Any) -> None:
    with pytest.raises(TitaError, match="--set attention=sdpa"):
        check_attention(recipe_of(data, attention="flash_attention_2"), capability=A100)
    check_attention(recipe_of(data, attention="sdpa"), capability=None)


@pytest.mark.parametrize(
    ("capability", "dtype", "words"),
    [
        (T4, "bfloat16", r"no bfloat16 \(compute capability 7.5\); --set dtype=float16"),
        (None, "float16", "--set dtype=float32"),
        (A100, "bfloat16", None),
        (T4, "float16", None),
        (None, "bfloat16", None),
    ],
)
def test_a_dtype_that_the_device_lacks_is_an_error(
    data: Any, capability: tuple[int, int] | None, dtype: str, words: str | None
) -> None:
    recipe = recipe_of(data, dtype=dtype)
    if words is None:
        check_precision(recipe, capability=capability)
        return
    with pytest.raises(TitaError, match=words):
        check_precision(recipe, capability=capability)


def test_a_missing_compiler_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(TitaError, match="no C compiler, which Triton needs"):
        check_compiler()
    (tmp_path / "gcc").touch(mode=0o755)
    check_compiler()


def test_a_full_disk_is_an_error(tmp_path: Path) -> None:
    free = shutil.disk_usage(tmp_path).free
    with pytest.raises(TitaError, match=r"GiB are free, checkpoints and the model need about"):
        check_disk(tmp_path / "not" / "there", needed=2 * free)
    volume = free / 2 / 1024**3
    with pytest.raises(TitaError, match=r"need about .*; raise jobs\.scratch\.size"):
        check_disk(tmp_path, needed=free // 2 + 1, volume_gib=volume)
    check_disk(tmp_path, needed=free // 4, volume_gib=volume)
