"""The choice of the implementation: Triton on a GPU, PyTorch everywhere else."""

import contextlib
import functools
import importlib.util
import logging
import os
from typing import Any

import torch

logger = logging.getLogger("ddpm_fast")

BACKENDS = ("triton", "torch")


def choose_backend(device: torch.device, backend: str | None = None) -> str:
    """Return "triton" or "torch" for tensors on `device`; `backend` forces one of them.

    Raises:
        ValueError: The backend is unknown, or Triton cannot run here.
    """
    if backend is None:
        if device.type == "cuda" and has_triton():
            return "triton"
        _say_once(device.type)
        return "torch"
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {list(BACKENDS)}, got {backend!r}")
    if backend == "triton":
        if not has_triton():
            raise ValueError("backend='triton' needs the package triton, which is not installed")
        if device.type != "cuda" and not interpreting():
            raise ValueError(f"backend='triton' needs a CUDA tensor (or TRITON_INTERPRET=1), got one on {device}")
    return backend


def on_device(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Make `device` the current device: Triton launches there, wherever the tensors are."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


@functools.cache
def has_triton() -> bool:
    """Return whether Triton can be imported, without importing Triton."""
    return importlib.util.find_spec("triton") is not None


def interpreting() -> bool:
    """Return whether kernels run in Triton's interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def ptx() -> bool:
    """Return whether kernels may hold NVIDIA's assembly: not in the interpreter, and not on AMD."""
    return not interpreting() and torch.version.hip is None


def warps() -> int:
    """Return the number of warps in 64 threads: AMD's data centre GPUs have warps of 64."""
    return 2 if torch.version.hip is None else 1


@functools.cache
def _say_once(device_type: str) -> None:
    if device_type == "cuda":
        logger.warning("triton is not installed: the kernels run as plain PyTorch")
    else:
        logger.info("no CUDA GPU in use (device %s): the kernels run as plain PyTorch", device_type)
