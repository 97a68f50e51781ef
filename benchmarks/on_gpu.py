"""Run every test and benchmark that needs a GPU, the most wanted first, in two runs of about six minutes.

    python -m benchmarks.on_gpu --run 1      tests, then whole runs of the CIFAR-10 U-Net at batch 1
    python -m benchmarks.on_gpu --run 2      batch 256, speculation, the step, float32, 256 x 256 pixels, DiT
    python -m benchmarks.on_gpu --list       names the stages with the seconds that each may take
    python -m benchmarks.on_gpu --dry        goes through every stage on a CPU, with tiny sizes

Every stage is a process of its own, or several at once. A stage that fails or runs out of time does not stop the next,
and writes its result after every row. Results and one log are written to benchmarks/results, or to --out. --after STAGE
goes on behind a stage. Put PYTHONPATH=. before the command where ddpm_fast is not installed.
"""

import contextlib
import importlib.util
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.common.command_line import make_parser
from benchmarks.common.results import FOLDER, ROOT

LAST_LINES = 40  # of the log that are shown of a command that failed
SPARE = 10  # seconds that a command with a budget of its own gets to finish
LEAST = 15  # seconds; no stage starts with less time left


@dataclass(frozen=True)
class Stage:
    """Commands that run at once.

    Attributes:
        run: The number of the run that the stage belongs to.
        seconds: Seconds that the commands may take.
        commands: Arguments of Python. "{out}" stands for the folder of the results, "{budget}" for the seconds less
            those that a command needs to finish.
        dry: The commands of a dry run.
    """

    run: int
    seconds: int
    commands: tuple[str, ...]
    dry: tuple[str, ...]


def _walks(run: int, part: str, seconds: int) -> Stage:
    measure = "-m benchmarks.walks --part {part} --device {device} --budget {budget} --out {out}"
    dry = measure.replace("{part}", "dry").replace("{device}", "cpu").replace("{budget}", "1")
    return Stage(run, seconds, (measure.replace("{part}", part).replace("{device}", "cuda"),), (dry,))


COMPILED = ("cifar-1-bfloat16", "cifar-256-bfloat16")  # parts whose arms are compiled before anything is timed
STAGES = {
    "tests": Stage(
        1, 120,
        ("-m pytest -q -m gpu {workers}", "-m pytest -q tests/kernels -m {not_gpu} --deselect {compile} {workers}"),
        ("-m pytest -q -m gpu --collect-only tests/engine/test_gpu.py", "-m pytest -q tests/kernels/test_layout.py"),
    ),
    "build": Stage(
        1, 110, (f"-m benchmarks.walks --build {' '.join(COMPILED)} --device cuda --out {{out}}",),
        ("-m benchmarks.walks --build dry --device cpu --out {out}",),
    ),
    "walks-cifar-1-bfloat16": _walks(1, "cifar-1-bfloat16", 110),
    "walks-cifar-256-bfloat16": _walks(2, "cifar-256-bfloat16", 70),
    "speculation": Stage(
        2, 60, ("-m benchmarks.speculation --device cuda --models moons --out {out}",),
        ("-m benchmarks.speculation --device cpu --models digits --smoke --out {out}",),
    ),
    "step": Stage(
        2, 50, ("-m benchmarks.step --budget {budget} --out {out}",),
        ("-m benchmarks.step --device cpu --smoke --budget 200 --out {out}",),
    ),
    "walks-cifar-1-float32": _walks(2, "cifar-1-float32", 50),
    "walks-256-1-bfloat16": _walks(2, "256-1-bfloat16", 60),
    "walks-dit-1-bfloat16": _walks(2, "dit-1-bfloat16", 40),
    "replay": Stage(
        2, 30, ("-m benchmarks.network.replay --device cuda --out {out}",),
        ("-m benchmarks.network.replay --device cpu --smoke --out {out}",),
    ),
}  # fmt: skip


def commands(stage: Stage, dry: bool, seconds: float, out: Path, commit: str | None) -> list[list[str]]:
    """Return the command lines of a stage that has so many seconds."""
    workers = "-n 7 --dist loadfile" if importlib.util.find_spec("xdist") else ""
    words: dict[str, Any] = {
        "{out}": str(out), "{budget}": str(max(1, int(seconds - SPARE))), "{workers}": workers,
        "{not_gpu}": "not gpu and not slow", "{compile}": "tests/kernels/test_compile.py",
    }  # fmt: skip
    lines = []
    for command in stage.dry if dry else stage.commands:
        line = [sys.executable]
        for word in command.split():
            line += words[word].split() if word == "{workers}" else [words.get(word, word)]
        lines.append(line + (["--commit", commit] if commit and "pytest" not in command else []))
    return lines


def execute(name: str, lines: Sequence[Sequence[str]], seconds: float, out: Path, dry: bool = False) -> str:
    """Run the commands of a stage at once. Return the stage's name, its outcome and its seconds.

    The output goes to the log; the last lines of a command that failed or ran out of time are printed.
    """
    began, outcome = time.monotonic(), "ok"
    cache = str(Path(tempfile.gettempdir()) / "ddpm_fast_inductor")
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": cache} | ({"OMP_NUM_THREADS": "1"} if dry else {})
    with contextlib.ExitStack() as files:
        opened = [tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") for _ in lines]  # noqa: SIM115
        outputs = [files.enter_context(output) for output in opened]
        processes = [
            subprocess.Popen(line, stdout=output, stderr=subprocess.STDOUT, cwd=ROOT, env=environment)
            for line, output in zip(lines, outputs, strict=True)
        ]
        texts, ends = [], []
        for process, output in zip(processes, outputs, strict=True):
            ends.append(_end(process, began + seconds))
            output.seek(0)
            texts.append(output.read())
    for line, text, ended in zip(lines, texts, ends, strict=True):
        with (out / "on_gpu.log").open("a", encoding="utf-8") as log:
            print(f"== {name}: {' '.join(line[1:])}\n{text}", file=log, end="")
        if ended != "ok":
            print("\n".join(text.splitlines()[-LAST_LINES:]), flush=True)
            outcome = ended
    return f"{name}: {outcome}, {time.monotonic() - began:.0f} of {seconds:.0f} s"


def _end(process: "subprocess.Popen[bytes]", until: float) -> str:
    """Wait for a process and return how it ended; a process that takes too long is killed."""
    try:
        code = process.wait(max(0.1, until - time.monotonic()))
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return "ran OUT OF TIME"
    return "ok" if code == 0 else f"FAILED with {code}"


def main(arguments: list[str] | None = None) -> int:
    """Run the command line. Return 1 if a stage failed or ran out of time, else 0."""
    parser = make_parser(__doc__)
    parser.add_argument("--run", type=int, choices=(1, 2), help="the stages of one run (default: all)")
    parser.add_argument("--after", choices=STAGES, metavar="STAGE", help="continue after this stage")
    parser.add_argument("--list", action="store_true", help="name the stages and exit")
    parser.add_argument("--dry", action="store_true", help="go through every stage on a CPU, with tiny sizes")
    parser.add_argument("--budget", type=float, default=360, help="seconds of a run (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder for the results and the log")
    parser.add_argument("--commit", help="output of `git describe --always --dirty`, for a machine without git")
    given = parser.parse_args(arguments)
    names = [name for name, stage in STAGES.items() if given.run in (None, stage.run)]
    if given.after:
        names = [name for name in names if list(STAGES).index(name) > list(STAGES).index(given.after)]
    if given.list:
        for name in names:
            print(f"run {STAGES[name].run}  {STAGES[name].seconds:4} s  {name}")
        return 0
    given.out.mkdir(parents=True, exist_ok=True)
    runs = len({STAGES[name].run for name in names})
    until = time.monotonic() + given.budget * max(1, runs) * (5 if given.dry else 1)
    ended, last, tried = [], given.after, []
    for name in names:
        allowed = STAGES[name].seconds * (5 if given.dry else 1)  # a CPU may be busy
        seconds = min(allowed, until - time.monotonic())
        if seconds < LEAST:
            break
        lines = commands(STAGES[name], given.dry, seconds, given.out, given.commit)
        last = name
        if given.dry and lines in tried:
            continue  # a dry run takes the same commands for all parts of whole runs
        tried.append(lines)
        ended.append(execute(name, lines, seconds, given.out, given.dry))
        print(ended[-1], flush=True)
    print("done" if names and last == names[-1] else f"go on with --after {last}" if last else "no stage fits")
    return int(any(": ok," not in line for line in ended))


if __name__ == "__main__":
    sys.exit(main())
