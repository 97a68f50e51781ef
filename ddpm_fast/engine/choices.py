"""Choices that measurements made, remembered on disk: windows of speculation, memory formats.

A choice is a small JSON file in $XDG_CACHE_HOME/ddpm_fast (by default ~/.cache/ddpm_fast). Its name is the hash of all
that the measurement depended on. DDPM_FAST_CACHE=off remembers nothing.
"""

import hashlib
import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

import ddpm_fast
from ddpm_fast.files import remove_parts, write_json

logger = logging.getLogger("ddpm_fast")


def folder() -> Path | None:
    """Return the folder of the choices; None where nothing is to be remembered."""
    if os.environ.get("DDPM_FAST_CACHE", "").lower() in ("off", "0", "no"):
        return None
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "ddpm_fast"


def recall(kind: str, key: Any) -> Any:
    """Return the choice that was remembered, or None. A damaged file counts as none, and the log says so."""
    path = _path(kind, key)
    if path is None:
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))["choice"]
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        logger.warning("%s is not readable and is measured anew: %s", path, error)
        return None


def remember(kind: str, key: Any, choice: Any, about: str) -> None:
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


def forget() -> int:
    """Remove all choices and return their number."""
    files, place = remembered(), folder()
    for path in files:
        path.unlink(missing_ok=True)
    if place is not None and place.is_dir():
        remove_parts(place)
    return len(files)


def fingerprint(module: nn.Module) -> str:
    """Return a hash of the class, the parameters' names, shapes and dtypes, and sums of their values."""
    digest = hashlib.sha256(f"{type(module).__module__}.{type(module).__qualname__}".encode())
    for name, tensor in module.state_dict().items():
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
    with torch.no_grad():
        for value in _sums(module):
            digest.update(repr(value).encode())
    return digest.hexdigest()


def machine(device: torch.device) -> tuple[str, ...]:
    """Return the device and the versions that a measurement depends on."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"
    return name, torch.__version__, ddpm_fast.__version__


def _sums(module: nn.Module) -> Iterator[float]:
    """Yield two sums of each parameter that differ where two values are exchanged."""
    sums = []
    for parameter in module.parameters():
        flat = parameter.detach().flatten().to(torch.float64)
        ramp = torch.linspace(1, 2, len(flat), dtype=torch.float64, device=flat.device)
        sums += [flat.sum(), flat @ ramp]
    yield from torch.stack(sums).tolist() if sums else []


def _path(kind: str, key: Any) -> Path | None:
    place = folder()
    return None if place is None else place / f"{kind}-{hashlib.sha256(repr(key).encode()).hexdigest()[:32]}.json"
