"""Run every test and benchmark that needs a GPU, the most important first, within a time budget.

    python -m benchmarks.on_gpu                     runs the tests, then the benchmarks, in nine minutes
    python -m benchmarks.on_gpu --after step        continues after the stage `step`
    python -m benchmarks.on_gpu --list              names the stages

The last line that a run prints names the stage to continue after. Every stage is a process of its own: a stage that
fails or runs out of time does not stop the next one. Results and one log are written to benchmarks/results, or to
--out. Put PYTHONPATH=. before the command where ddpm_fast is not installed.
"""

import subprocess
import sys
import time
from pathlib import Path

from benchmarks.common.command_line import make_parser
from benchmarks.common.results import FOLDER, ROOT
from benchmarks.walks.run import PARTS

LEAST = 45  # seconds; no stage starts with less time left
LAST_LINES = 40  # of the log that are shown of a stage that failed
SPARE = 15  # seconds that a stage with a budget of its own gets to finish

TESTS = {
    "tests": ["-m", "pytest", "-q", "-m", "gpu"],
    "kernels": ["-m", "pytest", "-q", "tests/kernels"],
}
BENCHMARKS = {
    "walks-smoke": ["benchmarks.walks", "--part", "smoke", "--device", "cuda"],
    "step": ["benchmarks.step"],
    "replay": ["benchmarks.network.replay", "--device", "cuda"],
    "walks-cifar-1-bfloat16": ["benchmarks.walks", "--part", "cifar-1-bfloat16"],
    "speculation": ["benchmarks.speculation", "--device", "cuda"],
    **{f"walks-{part}": ["benchmarks.walks", "--part", part] for part in PARTS if part not in ("cpu", "smoke")},
}
STAGES = [*TESTS, *BENCHMARKS]
BUDGETED = ("benchmarks.step", "benchmarks.walks")  # modules with the option --budget


def command(stage: str, seconds: float, out: Path, commit: str | None) -> list[str]:
    """Return the command line that runs a stage in at most `seconds`."""
    if stage in TESTS:
        return [sys.executable, *TESTS[stage]]
    module, *arguments = BENCHMARKS[stage]
    line = [sys.executable, "-m", module, *arguments, "--out", str(out)]
    if module in BUDGETED:
        line += ["--budget", str(int(min(480, seconds - SPARE)))]
    return line + (["--commit", commit] if commit else [])


def run(stage: str, seconds: float, out: Path, commit: str | None) -> str:
    """Run a stage with its output in the log. Return its name, its outcome and its seconds.

    The last lines of the output are printed where the stage failed or ran out of time.
    """
    began, path = time.monotonic(), out / "on_gpu.log"
    with path.open("a", encoding="utf-8") as log:
        print(f"== {stage}", file=log, flush=True)
        try:
            done = subprocess.run(
                command(stage, seconds, out, commit), stdout=log, stderr=subprocess.STDOUT, timeout=seconds,
                cwd=ROOT, check=False,
            )  # fmt: skip
            outcome = "ok" if done.returncode == 0 else f"FAILED with {done.returncode}"
        except subprocess.TimeoutExpired:
            outcome = "ran OUT OF TIME"
    if outcome != "ok":
        output = path.read_text(encoding="utf-8", errors="replace").rpartition(f"== {stage}\n")[2]
        for line in output.splitlines()[-LAST_LINES:]:
            print(line, flush=True)
    return f"{stage}: {outcome}, {time.monotonic() - began:.0f} s"


def main(arguments: list[str] | None = None) -> int:
    """Run the command line. Return 1 if a stage failed or ran out of time, else 0."""
    parser = make_parser(__doc__)
    parser.add_argument("--after", choices=STAGES, metavar="STAGE", help="continue after this stage")
    parser.add_argument("--list", action="store_true", help="name the stages and exit")
    parser.add_argument("--budget", type=float, default=540, help="seconds for all stages (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder for the results and the log")
    parser.add_argument("--commit", help="output of `git describe --always --dirty`, for a machine without git")
    given = parser.parse_args(arguments)
    if given.list:
        print("\n".join(STAGES))
        return 0
    given.out.mkdir(parents=True, exist_ok=True)
    until = time.monotonic() + given.budget
    left = STAGES[STAGES.index(given.after) + 1 :] if given.after else STAGES
    ended, last = [], given.after
    for stage in left:
        seconds = until - time.monotonic()
        if seconds < LEAST:
            break
        ended.append(run(stage, seconds, given.out, given.commit))
        last = stage
        print(ended[-1], flush=True)
    print("done" if last == STAGES[-1] else f"go on with --after {last}" if last else "no stage fits")
    return int(any(": ok," not in line for line in ended))


if __name__ == "__main__":
    sys.exit(main())
