"""Programs that compile kernels: outside of this process, whose kernels are the interpreter's."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ddpm_fast.kernels import specialisations

ROOT = Path(specialisations.__file__).parents[2]  # of the package that these tests import, so that a program does too


def output_of(module, cache, *options):
    """What the module prints last, from JSON; it runs outside of the interpreter with an empty cache of kernels."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"} | {
        "PYTHONPATH": str(ROOT),
        "TRITON_CACHE_DIR": str(cache),
    }
    run = subprocess.run(
        [sys.executable, "-m", module, *options],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
    )
    if run.returncode != 0:
        pytest.fail(run.stderr[-2000:], pytrace=False)
    return json.loads(run.stdout.splitlines()[-1])
