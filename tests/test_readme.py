"""The pages: their numbers are those of the result files, and their code runs."""

import re
from pathlib import Path

import pytest
import torch

from benchmarks import tables
from benchmarks.common import pages

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"


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


@pytest.mark.parametrize("page", ["README.md", "ARCHITECTURE.md", *(f"docs/{p.name}" for p in ROOT.glob("docs/*.md"))])
def test_links_lead_somewhere(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+)", text):
        assert target.startswith("http") or ((ROOT / page).parent / target).exists(), target
