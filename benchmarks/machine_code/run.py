"""The cost of every kernel, counted in the machine code that the compiler makes; no GPU is needed.

    python -m benchmarks.machine_code                    all specialisations for all targets: results/sass.json and the
                                                         table of docs/kernels.md; fails over a budget
    python -m benchmarks.machine_code step-engine-bf16   some of them, printed, for sm_90 alone; --code: the code

Compiled is the function that the host launches, with the types, constants and divisibilities of its launch
(tests/kernels/test_compile.py compares them). Counted is the longest path through it (machine_code.py), divided by the
elements a thread: with mask, lookup of the row and addresses in 64 bits, and everything else that is not an element's.
"""

import json
import multiprocessing
from dataclasses import dataclass
from typing import Any

from benchmarks.common.command_line import make_parser
from benchmarks.common.pages import fill
from benchmarks.common.results import FOLDER, ROOT, write_result
from benchmarks.machine_code import disassembly as machine_code
from ddpm_fast.kernels.specialisations import SPECIALISATIONS, Specialisation, compile_for

PAGE = ROOT / "docs" / "kernels.md"
TARGETS: dict[str, tuple[str, int | str, int]] = {  # backend, architecture, warp size
    "sm_80": ("cuda", 80, 32),
    "sm_89": ("cuda", 89, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}


@dataclass(frozen=True)
class GPU:
    """A GPU: what bounds an elementwise kernel there.

    Attributes:
        target: A name in `TARGETS`.
        processors: Number of multiprocessors (compute units on AMD).
        lanes: Instructions, counted for one thread, that a processor issues in a clock.
        clock: Boost clock of the data sheet, in GHz.
        copy: GB/s, read and written together: measured on an H200 (90 % of its data sheet), 90 % of it elsewhere.
    """

    target: str
    processors: int
    lanes: int
    clock: float
    copy: float

    def issue_slots(self, instructions: float, size: float) -> float:
        """Return the share of issue slots that `instructions` of an element take while its `size` bytes are copied.

        Above 1, arithmetic sets the pace: the copy's pace divided by this number.
        """
        return instructions * (self.copy / size) / (self.processors * self.lanes * self.clock)


GPUS = {
    "A100 80 GB": GPU("sm_80", 108, 128, 1.41, 0.9 * 2039),
    "RTX 4090": GPU("sm_89", 128, 128, 2.52, 0.9 * 1008),
    "H100 SXM": GPU("sm_90", 132, 128, 1.75, 0.9 * 3350),
    "H200": GPU("sm_90", 132, 128, 1.75, 4300),
    "B200": GPU("sm_100", 148, 128, 1.85, 0.9 * 8000),
    "MI300X": GPU("gfx942", 304, 64, 2.1, 0.9 * 5300),
}


def code_of(kernel: Any) -> machine_code.Code:
    """Return the machine code of one of Triton's compiled kernels."""
    if "cubin" in kernel.asm:
        return machine_code.of_cubin(kernel.asm["cubin"])
    return machine_code.of_amdgcn(kernel.asm["amdgcn"])


def measure(specialisation: Specialisation, target: str, kernel: Any = None) -> dict[str, Any]:
    """Return one row of the table; counts are those of a thread, instructions also per element."""
    code = code_of(compile_for(specialisation, *TARGETS[target]) if kernel is None else kernel)
    counts = machine_code.count(machine_code.longest_path(code))
    per_element = counts["instructions"] / specialisation.elements_per_thread()
    size = specialisation.bytes_per_element()
    return {
        "name": specialisation.name,
        "target": target,
        "instructions_per_element": round(per_element, 2),
        "budget": specialisation.budget if target == "sm_90" else None,
        "elements_per_thread": specialisation.elements_per_thread(),
        "bytes_per_element": size,
        **counts,
        **code.resources,
        "issue_slots": {
            name: round(gpu.issue_slots(per_element, size), 3) for name, gpu in GPUS.items() if gpu.target == target
        },
    }


def complaints(rows: list[dict[str, Any]]) -> list[str]:
    """Return the budgets that are exceeded, and the spills."""
    found = []
    for row in rows:
        where = f"{row['name']} on {row['target']}"
        if row["budget"] is not None and row["instructions_per_element"] > row["budget"]:
            found.append(f"{where}: {row['instructions_per_element']} instructions an element, budget {row['budget']}")
        if row["stack"] or row["local"] or row["local_accesses"]:
            found.append(f"{where}: spills, or keeps something in local memory")
    return found


def bound(slots: float) -> str:
    """Return what sets the pace, for the page; see `GPU.issue_slots`."""
    return f"memory ({slots:.0%})" if slots <= 1 else f"arithmetic: {1 / slots:.0%}"


def table(rows: list[dict[str, Any]]) -> str:
    """Return the page's table, a line for each specialisation."""
    by_name: dict[str, dict[str, dict[str, Any]]] = {}
    for row in rows:
        by_name.setdefault(row["name"], {})[row["target"]] = row
    others = [target for target in TARGETS if target != "sm_90"]
    head = ["specialisation", "instructions / element", "budget", " / ".join(others), "registers", "shared", "accesses"]
    head += ["bytes / element", *GPUS]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for name, targets in by_name.items():
        row = targets["sm_90"]
        slots = {gpu: share for each in targets.values() for gpu, share in each["issue_slots"].items()}
        cells = [name, f"{row['instructions_per_element']:.1f}", f"{row['budget']:g}"]
        cells += [" / ".join(f"{targets[target]['instructions_per_element']:.0f}" for target in others)]
        cells += [row["registers"], row["shared_accesses"]]
        cells += [", ".join(f"{count} {kind}" for kind, count in row["accesses"].items())]
        cells += [f"{row['bytes_per_element']:g}", *(bound(slots[gpu]) for gpu in GPUS)]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def _measure(job: tuple[str, str]) -> dict[str, Any]:
    return measure(NAMED[job[0]], job[1])


NAMED = {specialisation.name: specialisation for specialisation in SPECIALISATIONS}


def main() -> int:
    parser = make_parser(__doc__)
    parser.add_argument(
        "names",
        nargs="*",
        choices=[[], *NAMED],
        metavar="NAME",
        help="of specialisations (default: all, for all targets)",
    )
    parser.add_argument("--code", action="store_true", help="print the instructions of the counted path")
    arguments = parser.parse_args()
    if arguments.names:
        for name in arguments.names:
            print(json.dumps(measure(NAMED[name], "sm_90")))
            if arguments.code:
                path = machine_code.longest_path(code_of(compile_for(NAMED[name], *TARGETS["sm_90"])))
                print("\n".join(f"{i.guard:6}{i.opcode:22}{i.operands}" for i in path))
        return 0
    jobs = [(name, target) for name in NAMED for target in TARGETS]
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        rows = []
        for row in pool.imap(_measure, jobs, chunksize=4):
            rows.append(row)
            print(
                f"{row['name']:34}{row['target']:8}{row['instructions_per_element']:8.2f} instructions an element"
                f"{row['registers']:5} registers  {row['accesses']}",
                flush=True,
            )
    write_result("sass", rows)
    fill(PAGE, {"sass": table(rows)})
    found = complaints(rows)
    print("\n".join(found) or f"{len(rows)} kernels within their budgets: {FOLDER / 'sass.json'}")
    return int(bool(found))
