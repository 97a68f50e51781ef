"""What the machine code of the fused layer's inner loop is made of; no GPU is needed.

    python -m benchmarks.machine_code.layers      all forms for all targets: results/layers_code.json and a table of
                                                  docs/kernels.md; fails where something is spilled

A form is a launch of the sampling loop for layers of a U-Net: a dtype, a division among programs, and what stands
around the product. The inner loop takes one tap of one block of input channels in a turn.
"""

import dataclasses
import json
import multiprocessing
import sys
from typing import Any

from benchmarks.common.command_line import make_parser
from benchmarks.common.pages import fill, markdown_table
from benchmarks.common.results import Row, write_result
from benchmarks.machine_code.disassembly import Code, Instruction
from benchmarks.machine_code.run import PAGE, TARGETS, code_of
from ddpm_fast.kernels.specialisations import Specialisation, compile_for
from ddpm_fast.kernels.tiles import Tiles

TENSOR_CORES = ("HMMA", "HGMMA", "UTCHMMA", "v_mfma")
# With what an integer division by a number not known ahead begins: a reciprocal, rounded up (.RP).
DIVISIONS = ("I2F.RP", "I2F.U32.RP", "v_rcp_iflag")
SHARED = {
    "sm_80": 166912,
    "sm_89": 101376,
    "sm_90": 232448,
    "sm_100": 232448,
    "gfx942": 65536,
}  # bytes a program may have

ABSENT = (
    "x2_ptr", "s_ptr", "s2_ptr", "vector_ptr", "residual_ptr", "part_ptr", "beside_ptr", "gain_ptr", "shift_ptr",
    "a_ptr", "d_ptr", "gamma_ptr", "beta_ptr", "next_a_ptr", "next_d_ptr",
)  # fmt: skip
NORMED = {"a_ptr": "*fp32", "d_ptr": "*fp32", "SILU": True}
THEN = {"gamma_ptr": "*fp32", "beta_ptr": "*fp32", "next_a_ptr": "*fp32", "next_d_ptr": "*fp32", "EACH": 8}


def form(name: str, dtype: str, tiles: Tiles, image: int, channels: int, **changes: Any) -> Specialisation:
    """Return a 3 × 3 layer of so many channels on a square image, of a batch of 1, with changes."""
    arguments: dict[str, Any] = {
        **dict.fromkeys(ABSENT), "x_ptr": dtype, "w_ptr": dtype, "bias_ptr": "*fp32", "out_ptr": dtype,
        "tickets_ptr": "*i32", "tile_stats_ptr": "*fp32", "stats_ptr": "*fp32",
        "part_ptr": "*fp32" if tiles.split > 1 else None, "H": image, "W": image, "HO": image, "WO": image,
        "C": channels, "C2": 0, "S": 0, "S2": 0, "N": channels, "M": 0, "top": 1, "left": 1,
        "tiles": -(-(image**2) // tiles.pixels), "tickets": 0, "groups": 32, "each": channels // 32,
        "vector_stride": 0, "gain_stride": 0, "shift_stride": 0, "scale": 1.0, "eps": 1e-6,
        "SIZE": 3, "STRIDE": 1, "UP": False, "SILU": False, "STATS": True, "SPLIT": tiles.split, "BM": tiles.pixels,
        "BN": tiles.channels, "BK": tiles.depth, "TILES": 8, "MERGED": 256, "GROUPS": 32, "EACH": 1,
        "PRECISION": "ieee", "PTX": True, "num_warps": tiles.num_warps, "num_stages": tiles.num_stages, **changes,
    }  # fmt: skip
    for pointer, stride in (
        ("vector_ptr", "vector_stride"),
        ("gain_ptr", "gain_stride"),
        ("shift_ptr", "shift_stride"),
    ):
        arguments[stride] = channels if arguments[pointer] else 0
    return Specialisation(name, "conv_fused", arguments, 0)


# What `tiles_for` takes for such layers on an H100, and tiles for smaller shared memory.
SMALL, MIDDLE, LARGE = Tiles(16, 32, 128, 6, 8, 4), Tiles(16, 128, 128, 4, 8, 4), Tiles(128, 128, 64, 1, 8, 3)
FLAT = Tiles(32, 64, 32, 4, 4, 4)
HALF = "*bf16"
FORMS = {
    each.name: each
    for each in (
        form("4 x 4, 256 channels", HALF, SMALL, 4, 256, **NORMED, **THEN, vector_ptr=HALF),
        form("16 x 16, 256 channels", HALF, MIDDLE, 16, 256, **NORMED, **THEN, residual_ptr=HALF),
        form("batch 256", HALF, LARGE, 32, 128, **NORMED, **THEN),
        form("float16", "*fp16", MIDDLE, 16, 256, **NORMED, **THEN),
        form("float32", "*fp32", FLAT, 16, 256, **NORMED, **THEN),
        form("TF32", "*fp32", FLAT, 16, 256, **NORMED, **THEN, PRECISION="tf32"),
        form("concat and shortcut", HALF, MIDDLE, 16, 256, **NORMED, **THEN, x2_ptr=HALF, C2=128, s_ptr=HALF, S=256,
             s2_ptr=HALF, S2=128),
        form("modulated", HALF, MIDDLE, 16, 256, **NORMED, **THEN, gain_ptr=HALF, shift_ptr=HALF),
        form("enlarged", HALF, MIDDLE, 16, 256, UP=True, HO=32, WO=32, STATS=False, tile_stats_ptr=None,
             stats_ptr=None),
        form("stride 2", HALF, FLAT, 16, 256, STRIDE=2, HO=8, WO=8),
        form("attention's product", HALF, MIDDLE, 16, 256, a_ptr="*fp32", d_ptr="*fp32", SIZE=1, top=0, left=0),
        form("three channels", HALF, Tiles(32, 32, 16, 4, 4, 4), 32, 3, SILU=True),
    )
}  # fmt: skip


def fitted(form: Specialisation, target: str) -> Specialisation:
    """Return the form with tiles that fit into a GPU's shared memory, as `tiles_for` takes them."""
    given = form.arguments
    bytes_of_turn = (given["BM"] + given["BN"]) * given["BK"] * (4 if given["x_ptr"] == "*fp32" else 2)
    if given["num_stages"] * bytes_of_turn <= 0.9 * SHARED[target]:
        return form
    return dataclasses.replace(form, arguments={**given, "BK": 32, "num_stages": 3})


def inner_loops(code: Code) -> list[list[Instruction]]:
    """Return the bodies of the innermost loops that multiply on tensor cores, or where there are none, all of them."""
    spans = []
    for place, instruction in enumerate(code.instructions):
        if instruction.opcode.startswith(("BRA", "s_cbranch", "s_branch")):
            targets = [start for label, start in code.labels.items() if label in instruction.operands]
            spans += [(start, place + 1) for start in targets if start <= place]

    def multiplies(span: tuple[int, int]) -> bool:
        return any(each.opcode.startswith(TENSOR_CORES) for each in code.instructions[slice(*span)])

    spans = [span for span in spans if multiplies(span)] or spans
    # A branch back from code that was moved out of line spans whole loops.
    innermost = [span for span in spans if not any(span[0] < first < span[1] for first, _ in spans)]
    return [code.instructions[first:last] for first, last in innermost]


def measure(name: str, target: str) -> Row:
    """Return a row: resources, and what the longest inner loop is made of."""
    chosen = fitted(FORMS[name], target)
    kernel = compile_for(chosen, *TARGETS[target])
    code = code_of(kernel)
    loops = inner_loops(code)
    longest = max(loops, key=len)
    given = chosen.arguments
    return {
        "form": name,
        "target": target,
        **code.resources,
        "shared_bytes": kernel.metadata.shared,
        "loops": len(loops),
        "loop_instructions": len(longest),
        "tensor_core_instructions": sum(each.opcode.startswith(TENSOR_CORES) for each in longest),
        "integer_divisions": sum(each.opcode.startswith(DIVISIONS) for loop in loops for each in loop),
        "warps": given["num_warps"],
        "products": given["BM"] * given["BN"] * given["BK"],
    }


def complaints(rows: list[Row]) -> list[str]:
    """Return what is spilled, what divides in a loop, and what has no room in shared memory."""
    found = []
    for row in rows:
        where = f"{row['form']} on {row['target']}"
        if row["stack"] or row["local"]:
            found.append(f"{where}: spills, or keeps something in local memory")
        if row["integer_divisions"]:
            found.append(f"{where}: divides integers in the inner loop")
        if row["shared_bytes"] > SHARED[row["target"]]:
            found.append(f"{where}: takes {row['shared_bytes']} bytes of shared memory")
        if not row["tensor_core_instructions"] and row["form"] != "float32":
            found.append(f"{where}: multiplies without tensor cores")
    return found


def table(rows: list[Row]) -> str:
    """Return the table of docs/kernels.md: a line for each form, on sm_90."""
    header = (
        "| layer | tile, pixels x channels x depth | registers | shared, kB | instructions in a turn of the loop "
        "| of them on tensor cores |"
    )
    lines = []
    for row in rows:
        if row["target"] == "sm_90":
            given = FORMS[row["form"]].arguments
            lines.append(
                f"| {row['form']} | {given['BM']} x {given['BN']} x {given['BK']} | {row['registers']} "
                f"| {row['shared_bytes'] / 1024:.0f} | {row['loop_instructions']} | {row['tensor_core_instructions']} |"
            )
    return markdown_table(header, lines)


def _measure(job: tuple[str, str]) -> Row:
    return measure(*job)


def main() -> int:
    parser = make_parser(__doc__)
    parser.add_argument("--json", action="store_true", help="print the rows for sm_90 as JSON, and write nothing")
    arguments = parser.parse_args()
    targets = ["sm_90"] if arguments.json else list(TARGETS)
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        rows = pool.map(_measure, [(name, target) for name in FORMS for target in targets], chunksize=3)
    found = complaints(rows)
    if arguments.json:
        print(json.dumps({"rows": rows, "complaints": found}))
        return 0
    print(write_result("layers_code", rows))
    fill(PAGE, {"layers_code": table(rows)})
    print("\n".join(found) or f"{len(rows)} layers without a spill or a division in a loop")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
