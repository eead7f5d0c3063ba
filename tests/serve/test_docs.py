"""docs/serving.md names existing flags and all additional fields."""

import re
from pathlib import Path

from typer.main import get_command

from tita.cli.commands import app
from tita.serve.schemas import ChatRequest

DOCUMENT = (Path(__file__).parents[2] / "docs" / "serving.md").read_text()


def flags(command: str) -> set[str]:
    options = get_command(app).commands[command].params  # type: ignore[attr-defined]
    return {flag for option in options for flag in (*option.opts, *option.secondary_opts)}


def test_documented_flags_exist():
    named = set(re.findall(r"`(--[a-z0-9-]+)", DOCUMENT)) | set(
        re.findall(r" (--[a-z-]+)", DOCUMENT)
    )
    others = {"--controller-address", "--controller-url"}  # LLaVA's
    assert len(named) > 15
    assert named - others <= flags("serve") | flags("ask")


def test_additional_fields_are_documented():
    ours = {name for name in ChatRequest.model_fields if name.startswith("guidance_")}
    ours |= {"explain", "top_k", "repetition_penalty", "ignore_eos"}
    named = set(re.findall(r"`([a-z_]+)`", DOCUMENT))
    assert ours <= named
