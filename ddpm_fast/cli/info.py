"""A report of this machine: versions, devices, and the path of execution with its reason."""

import importlib.metadata
import platform
import re
from collections.abc import Iterator

import torch

import ddpm_fast
from ddpm_fast.engine import choices
from ddpm_fast.kernels.dispatch import choose_backend, has_triton

PACKAGES = ("torch", "triton", "numpy", "einops", "safetensors", "pillow", "tqdm")


def describe() -> list[tuple[str, str]]:
    """Return rows of (name, value)."""
    rows = [("ddpm_fast", ddpm_fast.__version__), ("python", platform.python_version())]
    rows += [(name, _version(name) or "not installed") for name in PACKAGES]
    rows += [(f"device {name}", text) for name, text in _devices()]
    rows.append(("path", path_taken()))
    rows.append(("choices", _choices()))
    rows += [("", choices.about(path)) for path in choices.remembered()]
    mismatch = triton_mismatch()
    if mismatch:
        rows.append(("warning", mismatch))
    return rows


def path_taken(device: torch.device | None = None) -> str:
    """Return the implementation that runs on `device` and the reason. None means the default device."""
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        reason = "the device is the CPU" if torch.cuda.is_available() else "torch finds no CUDA GPU"
        return f"PyTorch on the CPU, because {reason}"
    if choose_backend(device) == "triton":
        return "Triton kernels; network and step in one CUDA graph, where the network allows it"
    return "PyTorch kernels, because triton is not installed; in a CUDA graph, where the network allows it"


def triton_mismatch() -> str | None:
    """Return a warning if the installed Triton is not the one that torch was built for, else None."""
    if not has_triton():
        return None
    installed = _version("triton")
    for requirement in importlib.metadata.requires("torch") or []:
        required = re.match(r"triton\s*==\s*([\w.+]+)", requirement)
        if required and installed and installed.partition("+")[0] != required[1]:
            return f"torch {_version('torch')} was built for triton {required[1]}, installed is {installed}"
    return None


def _choices() -> str:
    """Return how many choices are remembered, and where."""
    place = choices.folder()
    if place is None:
        return "not remembered (DDPM_FAST_CACHE is off, or there is no home folder)"
    return f"{len(choices.remembered())} remembered in {place}"


def _devices() -> Iterator[tuple[str, str]]:
    """Yield the name and a description of every device."""
    yield "cpu", f"{torch.get_num_threads()} threads"
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        yield f"cuda:{index}", f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"


def _version(name: str) -> str | None:
    """Return the version of an installed package, or None."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
