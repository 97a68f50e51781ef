"""Tests of the report of `info`, and of the check of Triton against torch."""

import importlib.metadata
import platform

import pytest
import torch

import ddpm_fast
from ddpm_fast.cli import info
from ddpm_fast.kernels import dispatch

NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")


def fake(monkeypatch, requires, triton="3.2.0", importable=True):
    """Pretend that torch 2.6.0 with these requirements and this triton are installed."""
    versions = {"torch": "2.6.0", "triton": triton}

    def version(name):
        if versions.get(name) is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(info, "has_triton", lambda: importable)
    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: requires if name == "torch" else None)


def test_describe():
    rows = dict(info.describe())
    assert rows["ddpm_fast"] == ddpm_fast.__version__
    assert rows["python"] == platform.python_version()
    assert rows["torch"] == importlib.metadata.version("torch")
    assert {"triton", "numpy", "einops", "safetensors", "pillow", "tqdm"} <= rows.keys()
    assert rows["device cpu"] == f"{torch.get_num_threads()} threads"
    assert rows["path"] == info.path_taken()
    assert sum(name.startswith("device cuda") for name in rows) == torch.cuda.device_count()


@NO_GPU
def test_path_without_a_gpu():
    assert info.path_taken() == "PyTorch on the CPU, because torch finds no CUDA GPU"


@pytest.mark.parametrize(
    ("triton", "says"),
    [
        pytest.param(
            True, "Triton kernels; network and step in one CUDA graph, where the network allows it", id="triton"
        ),
        pytest.param(
            False,
            "PyTorch kernels, because triton is not installed; in a CUDA graph, where the network allows it",
            id="no-triton",
        ),
    ],
)
def test_path_with_a_gpu(monkeypatch, triton, says):
    monkeypatch.setattr(dispatch, "has_triton", lambda: triton)
    assert info.path_taken(torch.device("cuda")) == says


def test_path_on_the_cpu_beside_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert info.path_taken(torch.device("cpu")) == "PyTorch on the CPU, because the device is the CPU"


LINUX = f'platform_system == "{platform.system()}"'


@pytest.mark.parametrize(
    ("requires", "triton"),
    [
        pytest.param([f"triton==3.2.0; {LINUX}"], "3.2.0", id="same"),
        pytest.param([f"triton==3.2.0; {LINUX}"], "3.2.0+git1234", id="same-local-build"),
        pytest.param(["triton>=3.2"], "3.3.0rc1", id="no-pin"),
        pytest.param(["sympy", "numpy==1.0"], "3.2.0", id="cpu-build"),
        pytest.param(None, "3.2.0", id="requires-nothing"),
    ],
)
def test_triton_that_fits(monkeypatch, requires, triton):
    fake(monkeypatch, requires, triton)
    assert info.triton_mismatch() is None


def test_triton_that_does_not_fit(monkeypatch):
    fake(monkeypatch, ["sympy", f"triton==3.3.0; {LINUX}"])
    sentence = "torch 2.6.0 was built for triton 3.3.0, installed is 3.2.0"
    assert info.triton_mismatch() == sentence
    versions = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda n: "0.1.0" if n == "ddpm_fast" else versions(n))
    assert info.describe()[-1] == ("warning", sentence)


def test_no_triton_is_no_mismatch(monkeypatch):
    fake(monkeypatch, ["triton==3.3.0"], triton=None, importable=False)
    assert info.triton_mismatch() is None


def test_describe_from_a_tree_that_was_never_installed(monkeypatch):
    fake(monkeypatch, [], triton=None, importable=False)
    rows = dict(info.describe())
    assert rows["ddpm_fast"] == ddpm_fast.__version__
    assert rows["triton"] == "not installed"
