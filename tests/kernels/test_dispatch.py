"""Which implementation runs, what is imported for it, and what is said about it."""

import importlib.util
import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ddpm_fast import kernels
from ddpm_fast.kernels import dispatch
from ddpm_fast.kernels.dispatch import choose_backend, has_triton

CPU, CUDA, MPS = (torch.device(name) for name in ("cpu", "cuda", "mps"))
ROOT = Path(kernels.__file__).parents[2]
ALL_OPERATIONS = """
import torch
from ddpm_fast.kernels import normal, q_sample, q_step, step, to_uint8
seeds = torch.arange(2)
z = normal(seeds, seeds, 0, (3, 4, 5))
x = q_sample(z, seeds, torch.tensor([0.9, 0.5], dtype=torch.float64), seeds=seeds)
x = q_step(x, seeds, torch.tensor([0.9, 0.5], dtype=torch.float64), seeds=seeds)
base = torch.zeros(2, dtype=torch.int32)
x = step(x, z, torch.ones(1, 10), torch.zeros(1, 2, dtype=torch.int32), base, seeds=seeds)
assert to_uint8(x).shape == (2, 4, 5, 3)
"""


@pytest.fixture(autouse=True)
def forget():
    """What was found out and said is remembered for the process: start and end without it."""
    for function in (dispatch.has_triton, dispatch._say_once):
        function.cache_clear()
    yield
    for function in (dispatch.has_triton, dispatch._say_once):
        function.cache_clear()


@pytest.fixture
def no_triton(monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *args: None if name == "triton" else find_spec(name, *args)
    )


@pytest.fixture
def interpreter(monkeypatch, request):
    """Whether kernels are interpreted, as the parameter says."""
    if request.param:
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    else:
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)


off = pytest.mark.parametrize("interpreter", [False], indirect=True, ids=["compiled"])
on = pytest.mark.parametrize("interpreter", [True], indirect=True, ids=["interpreted"])
either = pytest.mark.parametrize("interpreter", [False, True], indirect=True, ids=["compiled", "interpreted"])


def run(program):
    """Run in a fresh interpreter; the exit code and what went wrong."""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=100, cwd=ROOT)
    return done.returncode, done.stderr


class TestImports:
    def test_importing_the_package_does_not_import_triton(self):
        modules = "ddpm_fast.sample, ddpm_fast.kernels, ddpm_fast.kernels.specialisations"
        program = f"import sys, {modules}; sys.exit('triton' in sys.modules)"
        assert run(program) == (0, "")

    def test_the_torch_path_does_not_import_triton(self):
        assert run(f"{ALL_OPERATIONS}\nimport sys; sys.exit('triton' in sys.modules)") == (0, "")

    def test_the_torch_path_serves_where_triton_cannot_be_imported(self):
        assert run(f"import sys; sys.modules['triton'] = None\n{ALL_OPERATIONS}") == (0, "")

    def test_asking_whether_there_is_triton_does_not_import_it(self):
        program = "import sys; from ddpm_fast.kernels.dispatch import has_triton; has_triton(); "
        assert run(program + "sys.exit('triton' in sys.modules)") == (0, "")


class TestChoice:
    @either
    def test_triton_on_cuda(self, interpreter):
        assert choose_backend(CUDA) == "triton"
        assert choose_backend(torch.device("cuda:1")) == "triton"

    @either
    @pytest.mark.parametrize("device", [CPU, MPS], ids=str)
    def test_torch_elsewhere(self, device, interpreter):
        """The interpreter is slower than PyTorch by far: it is there for those who ask for it."""
        assert choose_backend(device) == "torch"

    def test_torch_on_cuda_without_triton(self, no_triton):
        assert not has_triton()
        assert choose_backend(CUDA) == "torch"

    @either
    @pytest.mark.parametrize("device", [CPU, CUDA], ids=str)
    def test_torch_on_request(self, device, interpreter):
        assert choose_backend(device, "torch") == "torch"

    @off
    def test_triton_on_request_on_cuda(self, interpreter):
        assert choose_backend(CUDA, "triton") == "triton"

    @on
    def test_triton_on_request_in_the_interpreter(self, interpreter):
        assert choose_backend(CPU, "triton") == "triton"


class TestErrors:
    @pytest.mark.parametrize("name", ["Triton", "cuda", "", "auto"])
    def test_unknown_backend(self, name):
        with pytest.raises(ValueError, match=rf"^backend must be one of \['triton', 'torch'\], got '{name}'$"):
            choose_backend(CPU, name)

    @off
    def test_triton_without_a_gpu(self, interpreter):
        with pytest.raises(ValueError, match=r"needs a CUDA tensor \(or TRITON_INTERPRET=1\), got one on cpu"):
            choose_backend(CPU, "triton")

    @either
    @pytest.mark.parametrize("device", [CPU, CUDA], ids=str)
    def test_triton_that_is_not_installed(self, device, interpreter, no_triton):
        with pytest.raises(ValueError, match="needs the package triton, which is not installed"):
            choose_backend(device, "triton")

    @pytest.mark.parametrize("value", ["0", "", "true"])
    def test_only_1_means_the_interpreter(self, value, monkeypatch):
        monkeypatch.setenv("TRITON_INTERPRET", value)
        with pytest.raises(ValueError, match="needs a CUDA tensor"):
            choose_backend(CPU, "triton")


class TestSaying:
    @pytest.fixture(autouse=True)
    def listen(self, caplog):
        caplog.set_level(logging.DEBUG, logger="ddpm_fast")

    def test_no_gpu_is_worth_a_note_once(self, caplog):
        for _ in range(3):
            choose_backend(CPU)
        assert [(r.name, r.levelname) for r in caplog.records] == [("ddpm_fast", "INFO")]
        assert "no CUDA GPU in use (device cpu)" in caplog.text

    def test_a_gpu_without_triton_is_worth_a_warning_once(self, caplog, no_triton):
        for index in range(3):
            choose_backend(torch.device("cuda", index))
        assert [r.levelname for r in caplog.records] == ["WARNING"]
        assert "triton is not installed" in caplog.text

    def test_once_for_each_type_of_device(self, caplog, no_triton):
        for device in (CPU, CUDA, MPS, CUDA, CPU):
            choose_backend(device)
        assert [r.levelname for r in caplog.records] == ["INFO", "WARNING", "INFO"]

    def test_nothing_where_triton_runs_or_torch_was_asked_for(self, caplog):
        choose_backend(CUDA)
        choose_backend(CUDA, "torch")
        choose_backend(CPU, "torch")
        assert caplog.records == []
