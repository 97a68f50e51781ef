"""Every specialisation of every kernel compiles for GPUs that are not here, and to the code that was meant.

One program (compile_all.py) compiles them all, about 40 in ten seconds; the tests read what it says.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from ddpm_fast.kernels import specialisations
from ddpm_fast.kernels.specialisations import MAIN, SPECIALISATIONS, compile_for

NAMES = [s.name for s in SPECIALISATIONS]
HERE = Path(__file__).parent
OTHERS = [
    (target, name)
    for target in ("sm_80", "sm_89", "sm_100", "gfx942")
    for name in (MAIN.name, "normal-x_T", "q_sample-tensor", "to_uint8-round")
]


ROOT = Path(specialisations.__file__).parents[2]  # of the package that these tests import, so that a program does too


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"} | {
        "PYTHONPATH": str(ROOT),
        "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton")),
        "TRITON_ALWAYS_COMPILE": "1",  # what comes from the cache has no log
    }
    run = subprocess.run(
        [sys.executable, HERE / "compile_all.py"], env=environment, capture_output=True, text=True, timeout=300
    )
    if run.returncode != 0:
        pytest.fail(run.stderr[-2000:], pytrace=False)
    return json.loads(run.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", NAMES)
def test_compiles_for_sm_90(report, name):
    result = report["sm_90"][name]
    assert result["error"] is None
    assert result["size"] > 1000


@pytest.mark.parametrize(("target", "name"), OTHERS)
def test_compiles_for(report, target, name):
    result = report[target][name]
    assert result["error"] is None
    assert result["size"] > 1000


def test_no_register_is_spilled(report):
    spilled = {name: result.get("spilled") for name, result in report["sm_90"].items()}
    if set(spilled.values()) == {None}:
        pytest.skip("this Triton does not show what ptxas says")
    assert {name: size for name, size in spilled.items() if size not in (0, None)} == {}


@pytest.mark.parametrize("name", NAMES)
def test_is_what_the_host_launches(report, name):
    """Types, constants, divisibility and options, as Triton itself reads the arguments of a real launch."""
    assert report["differences"][name] == []


def accesses(report, name, pattern):
    return re.findall(rf"\b{pattern}\b", report["sm_90"][name]["ptx"])


def test_state_moves_16_bytes_at_a_time(report):
    """Four lanes: x is read and x' written in four runs, float32 in quadruples."""
    assert len(accesses(report, MAIN.name, r"ld\.global[.\w:]*\.v4\.[bf]32")) >= 4
    assert len(accesses(report, MAIN.name, r"st\.global[.\w:]*\.v4\.[bf]32")) >= 4


@pytest.mark.parametrize("name", ["step-clip", "step-bound", MAIN.name])
def test_clipping_keeps_nan(report, name):
    """min.f32 and max.f32 drop NaN for the other number; the interpreter's do not, so it cannot show this."""
    assert report["sm_90"][name]["error"] is None
    assert not accesses(report, name, r"(?:min|max)\.(?:ftz\.)?f32")


def test_model_input_is_rounded_to_nearest(report):
    assert accesses(report, MAIN.name, r"cvt\.rn\.bf16x?2?\.f32")
    assert not accesses(report, MAIN.name, r"cvt\.rz\.bf16x?2?\.f32")


def test_square_roots_of_alpha_bar_are_exact(report):
    """1 - alpha_bar cancels near t = 0, so it and its root are float64."""
    assert len(accesses(report, "q_sample-tensor", r"sqrt\.rn\.f64")) >= 2


def test_bytes_are_rounded_twice(report):
    """255 v is rounded before it is rounded to an integer; one fused operation would round 128 halfway points else."""
    assert report["sm_90"]["to_uint8-round"]["error"] is None
    assert not accesses(report, "to_uint8-round", r"fma\.rn\.f32")


def test_a_change_of_the_kernel_is_noticed(report):
    short, long = report["refusals"]
    assert "step_kernel also takes ['visit']" in short
    assert "does not take ['temperature']" in long


def test_names_are_unique_and_every_kernel_is_listed():
    assert len(set(NAMES)) == len(NAMES)
    kernels = {path.stem.removesuffix("_triton") for path in Path(specialisations.__file__).parent.glob("*_triton.py")}
    assert {s.op for s in SPECIALISATIONS} == kernels - {"philox"}  # functions for the others, no kernel


def test_the_interpreter_is_refused():
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("not in the interpreter")
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET"):
        compile_for(MAIN, "cuda", 90, 32)


def test_listing_does_not_import_triton():
    program = "import sys, ddpm_fast.kernels.specialisations; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], timeout=100, cwd=ROOT).returncode == 0
