"""Variants of the step kernel and their cost: each variant is an edit of the kernels' source, compiled anew.

    python -m research.sass_variants     writes research/results/sass_variants.json and the table of docs/kernels.md

The kernels are copied, edited and compiled for sm_90 in a process of their own; an edit that no longer fits the source
is an error.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.common.command_line import make_parser
from benchmarks.common.pages import fill
from benchmarks.common.results import RESEARCH, ROOT, write_result
from benchmarks.machine_code.run import PAGE

BY_ITSELF, WITH_INPUT = "step-bf16-clip-philox", "step-bf16-clip-philox-input"


@dataclass(frozen=True)
class Variant:
    """A variant: an edit that replaces some text in each of some files.

    Attributes:
        name: What differs from the kernel as it is.
        verdict: The result of the trial.
        edits: (file under kernels/, text that it has, text instead).
    """

    name: str
    verdict: str
    edits: tuple[tuple[str, str, str], ...] = ()


def _philox(old: str, new: str) -> tuple[str, str, str]:
    return "philox_triton.py", old, new


LIBRARY_SINE = _philox("return cosine, sine", "angle = TURN * uniform(word)\n    return tl.cos(angle), tl.sin(angle)")
NO_TIE = _philox("return tl.where((loaded.to(tl.int32, bitcast=True) | 1) == 0, 0, j)", "return j")
LLVM_PRODUCT = _philox(
    "return high, low",
    "product = a.to(tl.uint64) * m\n    return (product >> 32).to(tl.uint32), product.to(tl.uint32)",
)
TWO_PRODUCTS = _philox("return high, low", "return tl.umulhi(a, m), a * m")
TRITON_WIDENING = ("rows_triton.py", "if PTX and values.dtype == tl.bfloat16:", "if False:")
SIGMA_LAST = (
    ("step_triton.py", "noise_id, STEP, visit, sigma, PTX)", "noise_id, STEP, visit, 1.0, PTX)"),
    ("step_triton.py", "scale, z = radii[lane], directions[lane]", "scale, z = sigma, radii[lane] * directions[lane]"),
)
SINE_PORTABLE = tuple(_philox(f"direction(w{i}, PTX)", f"direction(w{i}, False)") for i in (1, 3))
ALL_PORTABLE = (
    *SINE_PORTABLE,
    *(_philox(f"radius(w{i}, PTX)", f"radius(w{i}, False)") for i in (0, 2)),
)


def _blocks(count: int) -> tuple[str, str, str]:
    return "tile_triton.py", "PARTS = tl.constexpr(2)", f"PARTS = tl.constexpr({count})"


VARIANTS = (
    Variant("**as it is**", "kept"),
    Variant(
        "sin, cos, log of libdevice; noise in Triton's layout; product in two instructions; one block",
        "the obvious version",
        (*ALL_PORTABLE, LIBRARY_SINE, NO_TIE, TWO_PRODUCTS, _blocks(1)),
    ),
    Variant(
        "polynomial sine, library log",
        "exact to 4e-6: the portable form, for AMD and the interpreter",
        ALL_PORTABLE,
    ),
    Variant("polynomial sine, hardware logarithm", "better than 1e-5 away from 0, a third more work", SINE_PORTABLE),
    Variant("noise in Triton's layout", "through shared memory, with barriers", (NO_TIE,)),
    Variant("64-bit products left to LLVM", "it splits some in two; which ones changes with the code", (LLVM_PRODUCT,)),
    Variant("products in two instructions", "IMAD.HI and IMAD for every IMAD.WIDE", (TWO_PRODUCTS,)),
    Variant("bfloat16 widened by Triton", "three instructions for two numbers", (TRITON_WIDENING,)),
    Variant("sigma multiplied into every normal", "once a radius is half as often", SIGMA_LAST),
    Variant("one block a program", "what is the same for a whole sample is paid twice as often", (_blocks(1),)),
    Variant("three blocks", "a little less; for 4 channels of 32 by 32 a third would idle", (_blocks(3),)),
    Variant("four blocks", "a little less; half as many programs to fill a GPU with", (_blocks(4),)),
    Variant(
        "one block of 512 instead of two of 256",
        "bfloat16 asks for eight elements a thread, the state for four: shared memory between them",
        (_blocks(1), ("tile_triton.py", "BLOCK = 256", "BLOCK = 512")),
    ),
)  # fmt: skip


def measure(variant: Variant, name: str) -> dict[str, Any]:
    """Return the row of specialisation `name` with the kernels edited."""
    with tempfile.TemporaryDirectory() as folder:
        package = Path(folder) / "ddpm_fast"
        shutil.copytree(ROOT / "ddpm_fast", package, ignore=shutil.ignore_patterns("kernels", "weights", "__pycache__"))
        shutil.copytree(ROOT / "kernels", package / "kernels", ignore=shutil.ignore_patterns("__pycache__"))
        for file, old, new in variant.edits:
            path = package / "kernels" / file
            source = path.read_text(encoding="utf-8")
            if source.count(old) != 1:
                raise ValueError(f"{variant.name}: {file} must have {old!r} once, has it {source.count(old)} times")
            path.write_text(source.replace(old, new), encoding="utf-8")
        environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.machine_code", name],
            env=environment
            | {"PYTHONPATH": f"{folder}{os.pathsep}{ROOT}", "TRITON_CACHE_DIR": str(Path(folder) / "cache")},
            cwd=folder,
            capture_output=True,
            text=True,
        )
    if done.returncode != 0:
        raise RuntimeError(f"{variant.name}: {done.stderr[-2000:]}")
    row: dict[str, Any] = json.loads(done.stdout)
    return row


def table(rows: list[dict[str, Any]]) -> str:
    """Return the table, a line for each variant."""
    lines = [
        "| variant | instructions / element | with the next input | registers | shared | local | issue slots, H200 "
        "| verdict |",
        "|---" * 8 + "|",
    ]
    for row in rows:
        step, following = row["step"], row["step_with_input"]
        cells = [row["variant"], f"{step['instructions_per_element']:.1f}"]
        cells += [f"{following['instructions_per_element']:.1f}", step["registers"], step["shared_accesses"]]
        cells += [step["local_accesses"], f"{step['issue_slots']['H200']:.0%}", row["verdict"]]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def main() -> None:
    make_parser(__doc__).parse_args()
    rows: list[dict[str, Any]] = []
    for variant in VARIANTS:
        rows.append(
            {
                "variant": variant.name,
                "verdict": variant.verdict,
                "step": measure(variant, BY_ITSELF),
                "step_with_input": measure(variant, WITH_INPUT),
            }
        )
        print(f"{variant.name:90}{rows[-1]['step']['instructions_per_element']:8.2f}", flush=True)
    write_result("sass_variants", rows, folder=RESEARCH)
    fill(PAGE, {"variants": table(rows)})


if __name__ == "__main__":
    main()
