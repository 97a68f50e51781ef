"""README.md: its numbers are those of the result files, and its code runs."""

import re
from pathlib import Path

import tables
import torch

README = Path(__file__).parent.parent / "README.md"


def test_tables_are_those_of_the_result_files():
    text = README.read_text(encoding="utf-8")
    assert tables.filled(text) == text


def test_the_python_code_runs():
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.S)
    assert len(blocks) >= 2
    names = {"model": lambda x, t: torch.tanh(x)}
    for block in blocks:
        exec(block, names)
    assert names["images"].shape == (16, 3, 32, 32)
    assert names["walk"].frames.shape == (3, 64, 3, 32, 32)
