"""examples/ run, and the images before and after are the same."""

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
HERE = ("with_diffusers.py", "with_lucidrains.py", "with_your_own_network.py")


def test_all_of_them():
    assert {path.name for path in EXAMPLES.glob("*.py")} == {*HERE, "with_guided_diffusion.py"}


@pytest.mark.parametrize("name", HERE)
def test_it_runs_and_the_images_stay(name, monkeypatch, capsys):
    for library in ("diffusers", "denoising_diffusion_pytorch"):
        pytest.importorskip(library)
    monkeypatch.setattr(sys, "argv", [name])
    runpy.run_path(str(EXAMPLES / name))
    said = capsys.readouterr().out
    assert re.search(r"1000 steps: \d+\.\d s before, \d+\.\d s after", said)
    assert float(re.search(r"difference of the images, on .*: (\S+)", said)[1]) < 1e-5


@pytest.mark.skipif("GUIDED_DIFFUSION" not in os.environ, reason="GUIDED_DIFFUSION names no checkout")
def test_guided_diffusion():
    environment = {**os.environ, "PYTHONPATH": os.environ["GUIDED_DIFFUSION"]}
    command = [sys.executable, EXAMPLES / "with_guided_diffusion.py"]
    said = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    assert float(re.search(r"difference of the images, on .*: (\S+)", said)[1]) < 1e-5
