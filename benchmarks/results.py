"""Result files: what was measured, on what, from which commit."""

import datetime
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from ddpm_fast.files import write_json
from ddpm_fast.kernels.dispatch import has_triton

FOLDER = Path(__file__).parent / "results"


def environment() -> dict[str, Any]:
    """Machine, versions and commit, as far as they say how to read a number."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "date": datetime.date.today().isoformat(),
        "gpu": gpu,
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": version("triton") if has_triton() else None,
        "ddpm_fast": version("ddpm_fast"),
        "commit": _git("rev-parse", "--short", "HEAD"),
        "uncommitted_changes": bool(_git("status", "--porcelain", "--untracked-files=no")),
    }


def write_result(name: str, rows: Any) -> Path:
    """Write `rows` with their environment to results/<name>.json."""
    path = FOLDER / f"{name}.json"
    FOLDER.mkdir(exist_ok=True)
    write_json(path, {"environment": environment(), "rows": rows})
    return path


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=FOLDER.parent, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
