"""The pages: their numbers are those of the result files, and their code runs."""

import re
from importlib.util import find_spec
from pathlib import Path
from pkgutil import resolve_name

import pytest
import torch

from benchmarks import tables
from benchmarks.common import pages

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
PROSE = ["README.md", "ARCHITECTURE.md", *sorted(f"docs/{page.name}" for page in ROOT.glob("docs/*.md"))]


@pytest.mark.parametrize("page", tables.PAGES)
def test_tables_are_those_of_the_result_files(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    assert pages.filled(text, tables.tables_of(page), page) == text


def test_the_python_code_runs():
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.S)
    assert len(blocks) >= 2
    names = {"model": lambda x, t: torch.tanh(x)}
    for block in blocks:
        exec(block, names)
    assert names["images"].shape == (16, 3, 32, 32)
    assert names["walk"].frames.shape == (3, 64, 3, 32, 32)


@pytest.mark.parametrize(
    ("page", "name", "shape"),
    [("migration.md", "images", (4, 3, 32, 32)), ("network.md", "moons", (4, 1, 32, 32))],
)
def test_the_code_of_the_pages_runs(page, name, shape):
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / page).read_text(encoding="utf-8"), flags=re.S)
    names = {}
    exec(block, names)
    assert names[name].shape == shape


@pytest.mark.parametrize("page", PROSE)
def test_links_lead_somewhere(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+)", text):
        assert target.startswith("http") or ((ROOT / page).parent / target).exists(), target


@pytest.mark.parametrize("page", PROSE)
def test_commands_and_names_of_the_pages_exist(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    for module in re.findall(r"python -m ([a-z_.]+)", text):
        assert find_spec(module.rstrip(".")), module
    for name in re.findall(r"`((?:ddpm_fast|kernels|benchmarks|research)(?:\.\w+)+)", text):
        assert resolve_name(name) is not None
    for target in re.findall(r"\bmake ([a-z-]+)`", text):
        assert re.search(rf"^{target}:", MAKEFILE, flags=re.M), target
