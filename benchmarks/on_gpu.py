"""Run every test and benchmark that needs a GPU, the most wanted first, in two calls of six minutes.

    python -m benchmarks.on_gpu                       the first call: tests, whole runs of the CIFAR-10 U-Net, the step
    python -m benchmarks.on_gpu --after step          the second call: speculation, other whole runs
    python -m benchmarks.on_gpu --list                names the stages with the seconds that each may take
    python -m benchmarks.on_gpu --dry                 goes through all stages on a CPU, with tiny sizes

A call runs stages until its budget is used up; its last line names the stage to go on behind. A stage that ends early
leaves its time to the next. A stage that fails or runs out of time does not stop the next, and has written what it
measured row by row. Results and one log are written to benchmarks/results, or to --out. The command works from a
checkout, without a network and without an installed ddpm_fast: it needs torch, Triton, pytest, hypothesis and, for
whole runs, diffusers. With pytest-xdist the tests run in many processes.
"""

import contextlib
import importlib.util
import math
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from benchmarks.common.command_line import make_parser
from benchmarks.common.results import FOLDER, ROOT

BUDGET = 360  # seconds of a call
LAST_LINES = 40  # of the output of a command that failed, which are shown
SPARE = 10  # seconds that a command with a budget of its own gets to finish
PATIENCE = 600  # seconds that a stage of a dry run may take, on a CPU that may be busy
LEAST = 0.7  # share of a stage's seconds with which the stage is begun
USES = {
    "triton": "no kernel can run",
    "diffusers": "there are no whole runs, and the step has no rival of that name",
    "hypothesis": "the kernels' tests fail",
    "xdist": "tests run in one process, and too slowly",
}


@dataclass(frozen=True)
class Stage:
    """Commands that run at once.

    Attributes:
        seconds: The seconds that are planned for the commands.
        commands: The arguments of Python, as for a shell. {out} stands for the folder of the results, {budget} for the
            seconds less those that a command needs to finish, {few} and {many} for options of pytest-xdist.
        dry: The commands of a dry run; none where another stage has run the same script.
    """

    seconds: int
    commands: tuple[str, ...]
    dry: tuple[str, ...]


_WALKS = "-m benchmarks.walks --budget {budget} --out {out} --part"
_SPECULATION = "-m benchmarks.speculation --budget {budget} --out {out} --batches 1"
_STEP = "-m benchmarks.step --budget {budget} --out {out}"
_LAYERS = "-m benchmarks.network.layers --measure --budget {budget} --out {out}"
_REPLAY = "-m benchmarks.network.replay --out {out}"
# Left out of the kernels' tests is what compiles ahead of time, for any GPU.
_KERNELS = (
    '-m pytest -q tests/kernels -m "not gpu and not slow" {many} '
    "--ignore tests/kernels/test_compile.py --ignore tests/kernels/test_compile_layers.py "
    "--ignore tests/kernels/test_specialisations.py"
)
STAGES = {
    "tests": Stage(
        120, ("-m pytest -q -m gpu {few}", _KERNELS),
        ("-m pytest -q -m gpu --collect-only tests/engine/test_gpu.py", "-m pytest -q tests/kernels/test_layout.py"),
    ),
    "layers": Stage(45, (_LAYERS,), (f"{_LAYERS} --device cpu --smoke",)),
    "walks-cifar": Stage(
        190, (f"{_WALKS} cifar-1-bfloat16 cifar-256-bfloat16",), (f"{_WALKS} dry --device cpu",)
    ),
    "step": Stage(50, (_STEP,), (f"{_STEP} --device cpu --smoke",)),
    "speculation": Stage(80, (_SPECULATION,), (f"{_SPECULATION} --device cpu --smoke --models digits",)),
    "walks-others": Stage(
        190, (f"{_WALKS} cifar-1-float32 256-1-bfloat16 dit-1-bfloat16",), ()
    ),
    "replay": Stage(40, (_REPLAY,), (f"{_REPLAY} --device cpu --smoke",)),
}  # fmt: skip


def planned(names: Sequence[str], budget: float) -> list[str]:
    """Return the first of these stages, as many as fit into the seconds of a call."""
    found: list[str] = []
    for name in names:
        if sum(STAGES[each].seconds for each in [*found, name]) > budget:
            break
        found.append(name)
    return found


def commands(stage: Stage, dry: bool, seconds: float, out: Path, commit: str | None) -> list[list[str]]:
    """Return the command lines of a stage that has so many seconds."""
    cores = os.cpu_count() or 1
    several = importlib.util.find_spec("xdist") is not None
    words = {
        "out": shlex.quote(str(out)),
        "budget": max(1, int(seconds - SPARE)),
        "few": f"-n {max(1, cores // 4)}" if several else "",
        "many": f"-n {max(1, cores * 5 // 8)}" if several else "",
    }
    lines = []
    for command in stage.dry if dry else stage.commands:
        line = [sys.executable, *shlex.split(command.format(**words))]
        lines.append(line + (["--commit", commit] if commit and "pytest" not in line else []))
    return lines


def execute(name: str, lines: Sequence[Sequence[str]], seconds: float, out: Path, threads: int | None = None) -> str:
    """Run the commands of a stage at once. Return the stage's name, its outcome and its seconds.

    The output goes to the log; the last lines of a command that failed or ran out of time are printed.

    Args:
        name: The name of the stage.
        lines: The command lines.
        seconds: The seconds after which commands are killed, with all processes that they have started.
        out: The folder of the log.
        threads: The number of threads of a process; None leaves that to torch.
    """
    began, outcome = time.monotonic(), "ok"
    with contextlib.ExitStack() as stack:
        running = [_start(line, threads, stack) for line in lines]
        for line, (process, output) in zip(lines, running, strict=True):
            ended = _end(process, began + seconds)
            output.seek(0)
            text = output.read()
            with (out / "on_gpu.log").open("a", encoding="utf-8") as log:
                print(f"== {name}: {shlex.join(line[1:])}: {ended}\n{text}", file=log, end="")
            if ended != "ok":
                print("\n".join(text.splitlines()[-LAST_LINES:]), flush=True)
                outcome = ended
    return f"{name}: {outcome}, {time.monotonic() - began:.0f} of {seconds:.0f} s"


def _start(
    line: Sequence[str], threads: int | None, stack: contextlib.ExitStack
) -> tuple["subprocess.Popen[bytes]", IO[str]]:
    """Start a command as a process group, which is killed at the latest when the stack ends."""
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    if "pytest" not in line:
        environment["DDPM_FAST_CACHE"] = "off"  # what a benchmark has to choose, it measures
    if threads is not None:
        environment["OMP_NUM_THREADS"] = str(threads)
    file = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115
    output = stack.enter_context(file)
    process = subprocess.Popen(
        line, stdout=output, stderr=subprocess.STDOUT, cwd=ROOT, env=environment, preexec_fn=os.setpgrp
    )
    stack.callback(_kill, process)
    return process, output


def _end(process: "subprocess.Popen[bytes]", until: float) -> str:
    """Wait for a command and return how it ended; a command that takes too long is killed."""
    try:
        code = process.wait(max(0.1, until - time.monotonic()))
    except subprocess.TimeoutExpired:
        _kill(process)
        return "ran OUT OF TIME"
    return "ok" if code == 0 else f"FAILED with {code}"


def _kill(process: "subprocess.Popen[bytes]") -> None:
    """Kill a command and every process that it has started and left."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def report_what_is_missing() -> None:
    """Print which packages are not installed, and what that means."""
    for package, without in USES.items():
        if importlib.util.find_spec(package) is None:
            print(f"{package} is not installed: {without}", flush=True)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line. Return 1 if a stage failed or ran out of time, else 0."""
    parser = make_parser(__doc__)
    parser.add_argument("--after", choices=STAGES, metavar="STAGE", help="go on behind this stage")
    parser.add_argument("--list", action="store_true", help="name the stages and exit")
    parser.add_argument("--dry", action="store_true", help="run the stages on a CPU, with tiny sizes")
    parser.add_argument(
        "--budget", type=float, default=BUDGET, help="seconds of a call on a GPU (default: %(default)s)"
    )
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder for the results and the log")
    parser.add_argument("--commit", help="output of `git describe --always --dirty`, for a machine without git")
    given = parser.parse_args(arguments)
    names = list(STAGES)[list(STAGES).index(given.after) + 1 :] if given.after else list(STAGES)
    plan = planned(names, given.budget)
    print(f"planned: {', '.join(f'{name} {STAGES[name].seconds} s' for name in plan) or 'nothing'}", flush=True)
    if given.list:
        for name in names:
            print(f"{STAGES[name].seconds:4} s  {name}")
        return 0
    report_what_is_missing()
    given.out.mkdir(parents=True, exist_ok=True)
    until = time.monotonic() + (math.inf if given.dry else given.budget)
    ended, last = [], given.after
    for name in names:
        left, wanted = until - time.monotonic(), STAGES[name].seconds
        if left < LEAST * wanted:
            break
        later = sum(STAGES[each].seconds for each in plan[plan.index(name) + 1 :]) if name in plan else 0
        seconds = PATIENCE if given.dry else min(left, max(wanted, left - later))
        lines = commands(STAGES[name], given.dry, seconds, given.out, given.commit)
        ended.append(execute(name, lines, seconds, given.out, 1 if given.dry else None))
        print(ended[-1], flush=True)
        last = name
    print("done" if last == list(STAGES)[-1] else f"go on with --after {last}" if last else "no stage fits")
    return int(any(": ok," not in line for line in ended))


if __name__ == "__main__":
    sys.exit(main())
