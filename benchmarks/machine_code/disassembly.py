"""The machine code of a kernel: SASS (NVIDIA) or GCN assembly (AMD), read as text.

Counted is the longest path from the entry to an exit, with calls followed and each loop's body taken once: no tile
executes more than that, and a full tile in the table executes it all, but for the rare arms of a branch. Instructions
whose predicate is false still take an issue slot, so they count.
"""

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Instruction:
    """A line of machine code: the guard ("@P0", "@!UP1" or ""), the opcode with its modifiers, and the operands."""

    guard: str
    opcode: str
    operands: str


@dataclass
class Code:
    """A kernel's machine code: the instructions in order, and the position of every label."""

    instructions: list[Instruction]
    labels: dict[str, int]
    resources: dict[str, int] = field(default_factory=dict)  # registers, stack, spills: as the compiler reports them


def of_cubin(cubin: bytes) -> Code:
    """Disassemble NVIDIA machine code with the nvdisasm of Triton's wheel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = _tool("nvdisasm", "-c", file.name)
        usage = _tool("cuobjdump", "-res-usage", file.name)
    code = read_sass(text)
    numbers = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", usage))
    code.resources = {
        "registers": int(numbers["REG"]),
        "stack": int(numbers["STACK"]),
        "local": int(numbers["LOCAL"]),
    }
    return code


def read_sass(text: str) -> Code:
    """Read the output of nvdisasm."""
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        if label := re.match(r"\s*([.$\w]+):\s*$", line):
            labels[label[1]] = len(instructions)
        elif found := re.match(r"\s*/\*[0-9a-f]+\*/\s+(?:(@!?U?P\w+)\s+)?([A-Z][\w.]*)\s*(.*?)\s*;", line):
            instructions.append(Instruction(found[1] or "", found[2], found[3]))
    return Code(instructions, labels)


def of_amdgcn(text: str) -> Code:
    """Read AMD assembly as LLVM prints it."""
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    body = text.split(".Lfunc_end", 1)[0]
    for line in body.splitlines():
        line = line.split(";", 1)[0].rstrip()
        if label := re.match(r"([.\w$]+):", line):
            labels[label[1]] = len(instructions)
        elif found := re.match(r"\t((?:v|s|ds|global|buffer|flat|scratch)_\w+)\s*(.*)", line):
            instructions.append(Instruction("", found[1], found[2]))
    number = {key: int(value) for key, value in re.findall(r"\.(\w+):\s+(\d+)\s*$", text, re.MULTILINE)}
    resources = {
        "registers": number["vgpr_count"],
        "stack": number["private_segment_fixed_size"],
        "local": 4 * number["vgpr_spill_count"],  # scalars are spilled to lanes of vectors, or to the private segment
    }
    return Code(instructions, labels, resources)


def _tool(name: str, *arguments: str) -> str:
    import triton

    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([path, *arguments], capture_output=True, text=True, check=True).stdout


def longest_path(code: Code) -> list[Instruction]:
    """Return the instructions of the longest way through the code, in order."""
    return _longest(code, 0, frozenset())


def _longest(code: Code, start: int, calls: frozenset[int]) -> list[Instruction]:
    """Return the longest way from `start` on; `calls` are the routines that the way is already inside."""
    order = _finished_last_first(code, start)
    rank = {position: i for i, position in enumerate(order)}
    length: dict[int, int] = {}
    after: dict[int, int | None] = {}
    called: dict[int, list[Instruction]] = {}
    for position in order:
        target = _call(code, code.instructions[position])
        if target is not None and target not in calls:
            called[position] = _longest(code, target, calls | {target})
        ahead = [following for following in _next(code, position) if rank[following] < rank[position]]
        best = max(ahead, key=length.__getitem__, default=None)
        after[position] = best
        length[position] = 1 + len(called.get(position, ())) + (0 if best is None else length[best])
    path: list[Instruction] = []
    current: int | None = start
    while current is not None:
        path += [code.instructions[current], *called.get(current, ())]
        current = after[current]
    return path


def _finished_last_first(code: Code, start: int) -> list[int]:
    """Return the positions in the order in which a depth-first search leaves them: later ones first."""
    order: list[int] = []
    seen = {start}
    stack = [(start, iter(_next(code, start)))]
    while stack:
        position, following = stack[-1]
        fresh = next((after for after in following if after not in seen), None)
        if fresh is None:
            order.append(position)
            stack.pop()
        else:
            seen.add(fresh)
            stack.append((fresh, iter(_next(code, fresh))))
    return order


def _next(code: Code, position: int) -> list[int]:
    """Return the positions that control can reach after the instruction at `position`."""
    instruction = code.instructions[position]
    opcode = instruction.opcode.split(".")[0]
    conditional = instruction.guard or opcode.startswith("s_cbranch") or re.match(r"!?U?P\w+,", instruction.operands)
    following = [position + 1] if position + 1 < len(code.instructions) else []
    if opcode in ("EXIT", "RET", "s_endpgm"):
        return following if conditional else []
    if opcode in ("BRA", "s_branch") or opcode.startswith("s_cbranch"):
        target = _target(code, instruction)
        return [*([target] if target is not None else []), *(following if conditional else [])]
    return following


def _call(code: Code, instruction: Instruction) -> int | None:
    return _target(code, instruction) if instruction.opcode.startswith("CALL") else None


def _target(code: Code, instruction: Instruction) -> int | None:
    for name in re.findall(r"[.$\w]+", instruction.operands)[::-1]:
        if name in code.labels:
            return code.labels[name]
    return None


_SPACES = {
    "global": r"(LDG|STG|RED|ATOMG)\b|global_|buffer_|flat_",
    "local": r"(LDL|STL)\b|scratch_",
    "shared": r"(LDS|STS|LDSM|STSM|ATOMS)\b|ds_",
}


def count(path: list[Instruction]) -> dict[str, Any]:
    """Count the instructions on the path by kind, and global accesses by width in bits, such as {"load 128": 4}."""
    result: dict[str, Any] = {"instructions": len(path)}
    for space, pattern in _SPACES.items():
        result[f"{space}_accesses"] = sum(bool(re.match(pattern, i.opcode)) for i in path)
    result["barriers"] = sum(i.opcode.startswith(("BAR", "s_barrier")) for i in path)
    result["mufu"] = sum(i.opcode.startswith("MUFU") for i in path)
    widths = Counter(access for i in path if (access := _access(i)))
    result["accesses"] = dict(sorted(widths.items()))
    return result


def _access(instruction: Instruction) -> str | None:
    opcode = instruction.opcode
    if found := re.match(r"(LD|ST)G\b(.*)", opcode):
        width = re.search(r"\.(128|64|U?S?16|U?S?8)\b", found[2])
        return f"{'load' if found[1] == 'LD' else 'store'} {re.sub('[US]', '', width[1]) if width else 32}"
    if found := re.match(r"(?:global|buffer|flat)_(load|store)_(\w+)", opcode):
        sizes = {"dwordx4": 128, "dwordx3": 96, "dwordx2": 64, "dword": 32, "ushort": 16, "sshort": 16, "short": 16}
        size = sizes.get(found[2].split("_")[0], 8)
        return f"{found[1]} {size}"
    return None
