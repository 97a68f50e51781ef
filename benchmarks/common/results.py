"""Result files: measured rows with the machine, the versions and the commit that they belong to."""

import datetime
import functools
import json
import platform
import re
import subprocess
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import ddpm_fast
from ddpm_fast.files import whole_file
from ddpm_fast.kernels.dispatch import has_triton

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "benchmarks" / "results"
RESEARCH = ROOT / "research" / "results"
LONGEST = 1200  # characters of a dict that is written on one line

Row = dict[str, Any]  # of a result file, or any other JSON object


def environment(commit: str | None = None) -> Row:
    """Return the machine, the versions and the commit that a measurement belongs to.

    Args:
        commit: The output of `git describe --always --dirty`, for a machine without git.
    """
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    changes = _git("status", "--porcelain", "--untracked-files=no")
    dirty = bool(changes) if changes is not None else commit.endswith("-dirty") if commit else None
    return {
        "date": datetime.date.today().isoformat(),
        "gpu": gpu,
        "driver": _driver() if gpu else None,
        "cuda": torch.version.cuda if gpu else None,
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": version("triton") if has_triton() else None,
        "ddpm_fast": ddpm_fast.__version__,  # importlib.metadata knows installed packages only
        "commit": _git("rev-parse", "--short", "HEAD") or (commit.removesuffix("-dirty") if commit else None),
        "uncommitted_changes": dirty,
    }


def write_result(name: str, rows: Any, *, folder: Path = FOLDER, commit: str | None = None, **more: Any) -> Path:
    """Write `rows`, their environment and the entries of `more` to <folder>/<name>.json. Return its path."""
    path = folder / f"{name}.json"
    folder.mkdir(exist_ok=True)
    write_rows(path, {"environment": environment(commit), **more, "rows": rows})
    return path


def write_rows(path: Path, result: Mapping[str, Any]) -> None:
    """Write `result` as JSON with one line for each row, whole or not at all."""
    plain = json.loads(json.dumps(result))  # the value that a reader will get: keys are strings, tuples are lists
    with whole_file(path) as part:
        part.write_text(_json_lines(plain) + "\n", encoding="utf-8")


def _json_lines(value: dict[str, Any] | list[Any], margin: str = "") -> str:
    """Return `value` as JSON, with a line or more for each item."""
    inner = margin + "  "
    if isinstance(value, dict):
        items, (start, end) = [f"{json.dumps(key)}: {_json(item, inner)}" for key, item in value.items()], "{}"
    else:
        items, (start, end) = [_json(item, inner) for item in value], "[]"
    lines = f",\n{inner}".join(items)
    return f"{start}\n{inner}{lines}\n{margin}{end}"


def _json(value: Any, margin: str) -> str:
    return _json_lines(value, margin) if _needs_lines(value) else json.dumps(value)


def _needs_lines(value: Any) -> bool:
    """Return True for a list of dicts, for a value with such a list inside, and for a dict longer than `LONGEST`."""
    if isinstance(value, list):
        return any(isinstance(item, dict) or _needs_lines(item) for item in value)
    return isinstance(value, dict) and (any(map(_needs_lines, value.values())) or len(json.dumps(value)) > LONGEST)


def read_result(name: str, folder: Path = FOLDER) -> Row:
    """Return the contents of <folder>/<name>.json."""
    result: Row = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
    return result


def slug(name: str) -> str:
    """Return `name` in a form that suits a file name: nvidia-h200 for NVIDIA H200."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def machine_name(device: torch.device) -> str:
    """Return the first part of the names of a device's result files: "cpu", or the GPU's name as in nvidia-h200."""
    return slug(torch.cuda.get_device_name()) if device.type == "cuda" else "cpu"


def machine_of(result: Row) -> str:
    """Return the machine that a result was measured on, as tables show it."""
    environment = result["environment"]
    return environment["gpu"] or f"CPU, {environment['threads']} threads"


@functools.cache
def _driver() -> str | None:
    """Return the version of the GPU driver, which torch does not know; None where nvidia-smi fails."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        output = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return next(iter(output.split()), None)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
