"""Launches: the compiled kernel is called with what Triton would pass, and only where the form is the same."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import ddpm_fast.kernels.launch_triton as launch_triton
from ddpm_fast.kernels.launch_triton import launch
from ddpm_fast.kernels.step import _CHECKED, step
from tests.kernels.step_problems import make

ROOT = Path(__file__).parents[2]


def test_a_second_launch_passes_the_same_arguments(tmp_path):
    """For every kernel, with a driver that is not there."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(tmp_path)}
    run = subprocess.run(
        [sys.executable, "-m", "tests.kernels.launch_twice"], cwd=ROOT, env=environment, capture_output=True, text=True,
        timeout=300,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-2000:]
    found = json.loads(run.stdout.splitlines()[-1])
    assert len(found) == 17
    assert all(launched == {"jitted": 1, "differences": []} for launched in found.values()), found


class Kernel:
    """A stand-in for a kernel: counts the launches that go through Triton."""

    pre_run_hooks = ()
    arg_names = ("x_ptr", "y_ptr", "n", "offset", "scale", "BLOCK")
    params = tuple(SimpleNamespace(do_not_specialize=name == "offset") for name in arg_names)

    def __init__(self):
        self.through_triton, self.called = 0, []

    def __getitem__(self, grid):
        def run(*arguments, **options):
            self.through_triton += 1
            return self.Compiled(self)

        return run

    class Compiled:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            assert len(grid) == 3
            return lambda *arguments: self.kernel.called.append(arguments)


@pytest.fixture
def kernel(monkeypatch):
    monkeypatch.setattr(launch_triton, "JITFunction", Kernel)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    return Kernel()


def test_what_triton_compiles_for_is_the_form(kernel):
    x, y = torch.zeros(64), torch.zeros(64)

    def run(x=x, y=y, n=16, offset=0, scale=1.0, BLOCK=128, grid=(4,)):
        launch(kernel, grid, (x, y), (n, offset, scale), BLOCK=BLOCK)
        return kernel.through_triton, len(kernel.called)

    assert run() == (1, 0)
    assert run(offset=7, scale=2.5) == (1, 1)  # values that are not compiled in
    assert kernel.called[-1] == (x.data_ptr(), y.data_ptr(), 16, 7, 2.5, 128)
    assert run(y=torch.zeros(64)) == (1, 2)  # another tensor of the same kind
    assert run(n=1) == (2, 2)
    assert run(y=None) == (3, 2)
    assert run(scale=None) == (4, 2)
    assert run(y=torch.zeros(64, dtype=torch.bfloat16)) == (5, 2)
    assert run(BLOCK=256) == (6, 2)
    assert run(grid=(5,)) == (7, 2)
    for _ in range(2):
        through_triton, called = run(y=y[1:])  # not aligned: Triton compiles other code
    assert (through_triton, called) == (9, 2)
    kernel.pre_run_hooks = (lambda *args, **kwargs: None,)
    assert run() == (10, 2)


def test_arguments_that_were_checked_may_not_overlap_later():
    """The shapes of a form are checked once, what shares memory in every call."""
    p = make((2, 3, 4, 5), noise="philox")
    positional, keywords = p.arguments()
    x = positional[0]
    both = torch.zeros(2, *x.shape)
    step(*positional, **keywords, x_new=both[0], x0_new=both[1])
    forms = len(_CHECKED)
    step(*positional, **keywords, x_new=both[0], x0_new=torch.zeros_like(x))
    assert len(_CHECKED) == forms
    with pytest.raises(ValueError, match="x_new must not share memory with x0_new"):
        step(*positional, **keywords, x_new=both[0], x0_new=both[0])
    with pytest.raises(ValueError, match="x0_new must not share memory with x"):
        step(*positional, **keywords, x_new=both[0], x0_new=x)
    flat = torch.zeros(2 * x.numel())
    shifted = flat[4 : 4 + x.numel()].view_as(x), flat[: x.numel()].view_as(x)
    with pytest.raises(ValueError, match="x_new must not share memory with x$"):
        step(shifted[1], *positional[1:], **keywords, x_new=shifted[0], x0_new=both[1])
    step(x, *positional[1:], **keywords, x_new=x, x0_new=both[1])  # in place, as a whole
