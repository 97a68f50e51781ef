"""Every specialisation of every kernel compiles for GPUs that are not here, and to the code that was meant.

One program (compile_all.py) compiles them all, in about a minute; the tests read what it says.
"""

import json
import os
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from benchmarks.machine_code.layers import FORMS
from ddpm_fast.kernels import specialisations
from ddpm_fast.kernels.specialisations import MAIN, MODULES, SPECIALISATIONS, compile_for
from tests.kernels.compiling import ROOT, output_of

NAMES = [s.name for s in SPECIALISATIONS]
OTHERS = [
    (target, name)
    for target in ("sm_80", "sm_89", "sm_100", "gfx942")
    for name in (MAIN.name, "normal-x_T", "q_sample-tensor", "to_uint8-round", "threshold")
]


VERSION = tuple(int(part) for part in version("triton").split(".")[:2])
BUDGETS_HOLD, COMPILER_LINKS_AMD = (3, 6) <= VERSION < (3, 8), VERSION >= (3, 5)
budget = pytest.mark.skipif(not BUDGETS_HOLD, reason="budgets are those of a compiler")


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    found = output_of("tests.kernels.compile_all", tmp_path_factory.mktemp("triton"))
    if not COMPILER_LINKS_AMD:
        found["gfx942"] = _Skipped()
    return found


class _Skipped(dict):
    def __missing__(self, key):
        pytest.skip("this Triton needs ROCm's linker to compile for AMD")


@budget
@pytest.mark.parametrize("name", NAMES)
def test_within_its_budget_on_sm_90(report, name):
    row = report["sm_90"][name]
    assert row["error"] is None
    assert row["instructions_per_element"] <= row["budget"]


@pytest.mark.parametrize(
    ("name", "most"),
    [
        ("step-bf16-clip-philox", 34),
        ("step-bf16-clip-philox-input", 36),
        ("step-bf16-clip-philox-guided", 40),
        ("step-bf16-clip-philox-learned", 40),
        ("step-engine-learned", 40),
        ("step-engine-guided", 40),
    ],
)
def test_the_main_steps(report, name, most):
    """No stack, no shared memory, state 16 bytes at a time, bfloat16 8."""
    row = report["sm_90"][name]
    assert row["instructions_per_element"] <= most
    assert row["budget"] <= most
    assert row["stack"] == row["local_accesses"] == row["shared_accesses"] == row["barriers"] == 0
    assert row["accesses"]["load 128"] == row["accesses"]["store 128"] == 8
    halves = row["accesses"].get("load 64", 0)  # of bfloat16, and the seed
    assert halves == (17 if "guided" in name or "learned" in name else 9)
    assert "load 16" not in row["accesses"]
    assert "store 16" not in row["accesses"]


ON_SM_90 = [("sm_90", name) for name in NAMES]
KEEP_NAN = [
    (target, name)
    for target, name in (*OTHERS, *ON_SM_90)
    if target != "gfx942" and not name.startswith("to_uint8")  # on AMD a comparison puts NaN in afterwards
]


def dropping_nan(ptx):
    """The instructions whose result is a number where one of their values is NaN."""
    each = re.findall(r"\b(?:max|min)\.[\w.]+", ptx)
    return [one for one in each if re.search(r"\.b?f(?:16|32|64)", one) and ".NaN" not in one]


@pytest.mark.parametrize(("target", "name"), KEEP_NAN)
def test_no_maximum_drops_nan(report, target, name):
    """Triton's maximum, minimum and clamp drop NaN on a GPU unless they are told to propagate NaN."""
    assert dropping_nan(report[target][name]["assembly"]) == []


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("to_uint8")])
def test_a_byte_drops_nan(report, name):
    """The maximum of NaN and 0 is meant to be 0 there."""
    assert len(dropping_nan(report["sm_90"][name]["assembly"])) >= 2


@pytest.mark.parametrize(
    ("instruction", "drops"),
    [("max.f32", True), ("min.ftz.f32", True), ("min.xorsign.abs.f32", True), ("max.bf16x2", True), ("max.f64", True),
     ("max.NaN.f32", False), ("min.NaN.xorsign.abs.f32", False), ("max.s32", False), ("redux.sync.max.u32", False)],
)  # fmt: skip
def test_such_an_instruction_is_found(instruction, drops):
    assert bool(dropping_nan(f"{instruction} %f1, %f2, %f3;")) == drops


NO_DENORMALS = {f"{function}.approx.ftz.f32" for function in ("lg2", "sqrt", "sin", "cos", "ex2")}


@pytest.mark.parametrize(("target", "name"), [*OTHERS, *ON_SM_90])
def test_denormals_are_not_flushed(report, target, name):
    """Except in what Box-Muller and the exponent of a learned variance are made of: nothing there is that small."""
    assembly = report[target][name]["assembly"]
    if target == "gfx942":
        assert re.findall(r"\.amdhsa_float_denorm_mode_[\d_]+ (\d)", assembly) == ["3", "3"]
    else:
        assert set(re.findall(r"\b[\w.]*\.ftz[\w.]*", assembly)) <= NO_DENORMALS


@budget
@pytest.mark.parametrize(("target", "name"), [*OTHERS, *ON_SM_90])
def test_nothing_is_spilled(report, target, name):
    row = report[target][name]
    assert row["error"] is None
    assert row["stack"] == row["local"] == row["local_accesses"] == 0


EXPLAINED = {
    "step-input-channels-last": "channels lie apart in memory, the noise side by side",
    "step-engine-channels-last": "likewise",
    "step-engine-channels-last-small": "likewise",
    "threshold": "histograms",
    "threshold-guided": "histograms",
    "normal-x_T": "there is no load that could tell Triton the layout (tie in philox_triton.py)",
    "normal-step": "likewise",
    **dict.fromkeys(
        ("verify", "verify-bound", "verify-guided", "verify-latents", "verify-ddim", "decide"), "sums over a sample"
    ),
}


def test_shared_memory_is_explained(report):
    assert {name for name, row in report["sm_90"].items() if row["shared_accesses"]} == set(EXPLAINED)


def test_the_count_is_that_of_the_source(report):
    """A multiplication and a multiply-add more in the kernel's source are two instructions an element more."""
    more = report["changed"] - report["sm_90"][MAIN.name]["instructions_per_element"]
    assert 1.5 < more < 2.6


def test_the_list_is_short_enough_to_read():
    assert len(SPECIALISATIONS) <= 80


def test_the_committed_table_is_that_of_this_code(report):
    """benchmarks/results/sass.json, made by `make sass`, with the same Triton as here."""
    committed = json.loads((ROOT / "benchmarks" / "results" / "sass.json").read_text())
    if committed["environment"]["triton"] != version("triton"):
        pytest.skip(f"the table was made with Triton {committed['environment']['triton']}")
    rows = {row["name"]: row for row in committed["rows"] if row["target"] == "sm_90"}
    counted = {name: row["instructions_per_element"] for name, row in report["sm_90"].items()}
    assert {name: row["instructions_per_element"] for name, row in rows.items()} == counted
    assert {name: row["budget"] for name, row in rows.items()} == {s.name: s.budget for s in SPECIALISATIONS}


@pytest.mark.parametrize("name", NAMES)
def test_is_what_the_host_launches(report, name):
    """Types, constants, divisibility and options, as Triton itself reads the arguments of a real launch."""
    assert report["differences"][name] == []


def accesses(report, name, pattern):
    return re.findall(rf"\b{pattern}\b", report["sm_90"][name]["assembly"])


def test_state_moves_16_bytes_at_a_time(report):
    """Four lanes: x is read and x' written in four runs, float32 in quadruples."""
    assert len(accesses(report, MAIN.name, r"ld\.global[.\w:]*\.v4\.[bf]32")) >= 4
    assert len(accesses(report, MAIN.name, r"st\.global[.\w:]*\.v4\.[bf]32")) >= 4


@pytest.mark.parametrize("name", ["step-clip", "step-bound", "verify", "commit", "threshold", MAIN.name])
def test_clipping_keeps_nan(report, name):
    assert accesses(report, name, r"(?:min|max)\.NaN\.[\w.]*f32")


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
    assert "step_kernel also takes ['offset']" in short
    assert "does not take ['temperature']" in long


def test_names_are_unique_and_every_kernel_is_listed():
    assert len(set(NAMES)) == len(NAMES)
    kernels = {path.stem.removesuffix("_triton") for path in Path(specialisations.__file__).parent.glob("*_triton.py")}
    listed = {MODULES.get(s.op, s.op) for s in (*SPECIALISATIONS, *FORMS.values())}
    assert listed == kernels - {"philox", "rows", "tile", "launch"}  # functions for the others, no kernel


def test_the_interpreter_is_refused():
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("not in the interpreter")
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET"):
        compile_for(MAIN, "cuda", 90, 32)


def test_listing_does_not_import_triton():
    program = "import sys, ddpm_fast.kernels.specialisations; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], timeout=100, cwd=ROOT).returncode == 0
