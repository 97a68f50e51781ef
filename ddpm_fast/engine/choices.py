"""Choices that measurements made, remembered on disk: windows of speculation, memory formats.

A choice is a small JSON file in $XDG_CACHE_HOME/ddpm_fast (by default ~/.cache/ddpm_fast). Its name is the hash of all
that the measurement depended on. DDPM_FAST_CACHE=off remembers nothing.
"""

import contextlib
import hashlib
import json
import logging
import os
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

import ddpm_fast
from ddpm_fast.engine.call import Call, signature
from ddpm_fast.files import remove_parts, write_json
from ddpm_fast.validate import line_of

logger = logging.getLogger("ddpm_fast")

Key = tuple[Any, ...] | None  # None stands for a network that nobody can recognise: nothing is remembered about it
T = TypeVar("T")

_PIECE = 2**22  # numbers of a parameter that are summed up at once


def folder() -> Path | None:
    """Return the folder of the choices; None where nothing is to be remembered, or where the user has no home."""
    if os.environ.get("DDPM_FAST_CACHE", "").lower() in ("off", "0", "no"):
        return None
    base = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(base):  # the standard has relative paths ignored
        return Path(base) / "ddpm_fast"
    try:
        return Path.home() / ".cache" / "ddpm_fast"
    except RuntimeError:
        return None


def recall(kind: str, key: Key, read: Callable[[Any], T]) -> T | None:
    """Return the choice that was remembered, or None. A damaged file counts as none, and the log says so.

    Args:
        kind, key: See `remember`.
        read: A function that makes the choice of JSON's types; it raises ValueError or TypeError for what is none.
    """
    path = _path(kind, key)
    if path is None:
        return None
    try:
        return read(json.loads(path.read_text(encoding="utf-8"))["choice"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        logger.warning("%s is not readable and is measured anew: %s", path, line_of(error))
        return None


def remember(kind: str, key: Key, choice: Any, about: str) -> None:
    """Write a choice to disk, whole or not at all; where that is impossible, nothing is remembered.

    Args:
        kind: What is chosen; the beginning of the file's name.
        key: All that the measurement depended on; its representation counts.
        choice: The choice, in JSON's types.
        about: A word on the choice for a reader of the file.
    """
    path = _path(kind, key)
    if path is None:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {"about": about, "choice": choice})
    except OSError as error:
        logger.info("the choice is not remembered: %s", error)


def remembered() -> list[Path]:
    """Return the files of all choices."""
    place = folder()
    return sorted(place.glob("*.json")) if place is not None and place.is_dir() else []


def about(path: Path) -> str:
    """Return what the file of a choice says about the choice."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
        found = json.loads(path.read_text(encoding="utf-8"))
        return f"{found['about']}: {found['choice']}"
    return f"{path.name} is not readable"


def forget() -> int:
    """Remove all choices and return their number."""
    files, place = remembered(), folder()
    for path in files:
        path.unlink(missing_ok=True)
    if place is not None and place.is_dir():
        remove_parts(place)
    return len(files)


def key_of(call: Call, *more: Any) -> Key:
    """Return what a measurement of the network depends on: the machine, the network, the call, and what else is given.

    Returns:
        The key; None for a callable without parameters, which may do anything.
    """
    module = call.module
    if not isinstance(module, nn.Module) or next(module.parameters(), None) is None:
        return None
    try:
        return machine(call.device), fingerprint(module), signature(call), call.shape, call.dtype, *more
    except (RuntimeError, NotImplementedError, TypeError) as error:  # of tensor subclasses, and of other devices
        logger.info("choices for the network are not remembered: %s", line_of(error))
        return None


def fingerprint(module: nn.Module) -> str:
    """Return a hash of the modules' classes, of the tensors' names, shapes and dtypes, and of sums of their values."""
    digest = hashlib.sha256()
    for name, part in module.named_modules():
        digest.update(f"{name} {type(part).__module__}.{type(part).__qualname__}\n".encode())
    for tensors in (module.named_parameters(), module.named_buffers()):
        for name, tensor in tensors:
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} {_sums(tensor)}\n".encode())
    return digest.hexdigest()


def machine(device: torch.device) -> tuple[str, ...]:
    """Return the device and the versions that a measurement depends on."""
    gpu = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if gpu else f"{_processor()}, {torch.get_num_threads()} threads"
    return name, torch.__version__, ddpm_fast.__version__


def _processor() -> str:
    """Return the name of the CPU: a home folder may be shared by different machines."""
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return platform.processor() or platform.machine()


@torch.no_grad()
def _sums(tensor: Tensor) -> list[float]:
    """Return weighted sums, one for each piece of the tensor, that differ where two values are exchanged."""
    flat = (torch.view_as_real(tensor) if tensor.is_complex() else tensor).detach().flatten()
    ramp = torch.linspace(1, 2, min(len(flat), _PIECE), dtype=torch.float64, device=flat.device)
    sums: list[float] = torch.stack([piece.double() @ ramp[: len(piece)] for piece in flat.split(_PIECE)]).tolist()
    return sums


def _path(kind: str, key: Key) -> Path | None:
    place = folder()
    if place is None or key is None:
        return None
    return place / f"{kind}-{hashlib.sha256(repr(key).encode()).hexdigest()[:32]}.json"
