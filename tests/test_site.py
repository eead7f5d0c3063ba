"""The documentation's site builds without a broken link, and its menu has every page."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the configuration, the collected pages and the built site."""
    folder = tmp_path_factory.mktemp("site")
    make = [sys.executable, ROOT / "docs" / "make_pages.py", folder / "build" / "docs"]
    subprocess.run(make, check=True)
    (folder / "mkdocs.yml").write_text((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    return folder


def build(folder: Path) -> "subprocess.CompletedProcess[str]":
    command = Path(sys.executable).with_name("zensical")
    return subprocess.run(
        [command, "build", "--strict", "--clean"],
        cwd=folder, capture_output=True, text=True, check=False,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip


def test_menu_has_every_page(site: Path) -> None:
    menu = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]
    listed = set(re.findall(r"[\w./-]+\.md", str(menu)))
    pages = site / "build" / "docs"
    assert listed == {str(path.relative_to(pages)) for path in pages.rglob("*.md")}


@pytest.mark.slow
def test_site_builds_and_documents_options_and_classes(site: Path) -> None:
    built = build(site)
    assert built.returncode == 0, built.stdout + built.stderr
    reference = site / "build" / "site" / "reference"
    assert "--plausibility" in (reference / "tita.html").read_text(encoding="utf-8")
    python = (reference / "python.html").read_text(encoding="utf-8")
    assert 'id="tita.align.Guidance.plausibility"' in python
    assert 'id="tita.recipes.TrainRecipe.learning_rate"' in (reference / "recipes.html").read_text()
    start = (site / "build" / "site" / "index.html").read_text(encoding="utf-8")
    assert 'href="demo.html"' in start
    pictures = re.findall(r'(?:src|srcset)="(pictures/[^"]+)"', start)
    assert len(pictures) == 4
    assert all((site / "build" / "site" / path).is_file() for path in pictures)
    page = site / "build" / "docs" / "demo.md"
    page.write_text(page.read_text() + "\n[gone](missing.md)\n", encoding="utf-8")
    broken = build(site)
    assert broken.returncode != 0
    # Every character is coloured by itself.
    assert "missing.md" in re.sub(r"\x1b\[[0-9;]*m", "", broken.stdout + broken.stderr)
