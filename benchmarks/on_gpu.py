"""Everything that waits for a GPU, the most wanted first, as far as the time goes.

    python -m benchmarks.on_gpu                     tests, then benchmarks, in nine minutes
    python -m benchmarks.on_gpu --after step        goes on behind a stage; the last line says behind which
    python -m benchmarks.on_gpu --list              names the stages

Every stage is a process of its own: one that fails or runs out of time does not stop the next. Results and one log are
written to benchmarks/results, or to --out. Without an installed ddpm_fast put PYTHONPATH=. before it.
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.common.results import FOLDER, ROOT
from benchmarks.walks.run import PARTS

LEAST = 45  # seconds: with less, no stage is begun
LAST_WORDS = 40  # lines that are shown of a stage that did not end well
SPARE = 15  # seconds that a stage with a budget of its own gets to end

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
BUDGETED = ("benchmarks.step", "benchmarks.walks")  # take --budget


def command(stage: str, seconds: float, out: Path, commit: str | None) -> list[str]:
    """What runs a stage in so many seconds."""
    if stage in TESTS:
        return [sys.executable, *TESTS[stage]]
    module, *arguments = BENCHMARKS[stage]
    found = [sys.executable, "-m", module, *arguments, "--out", str(out)]
    if module in BUDGETED:
        found += ["--budget", str(int(min(480, seconds - SPARE)))]
    return found + (["--commit", commit] if commit else [])


def run(stage: str, seconds: float, out: Path, commit: str | None) -> str:
    """Run a stage, and put what it says into the log; how it ended, and if that was not well, its last words."""
    began, path = time.monotonic(), out / "on_gpu.log"
    with path.open("a", encoding="utf-8") as log:
        print(f"== {stage}", file=log, flush=True)
        try:
            done = subprocess.run(
                command(stage, seconds, out, commit), stdout=log, stderr=subprocess.STDOUT, timeout=seconds,
                cwd=ROOT, check=False,
            )  # fmt: skip
            how = "ok" if done.returncode == 0 else f"FAILED with {done.returncode}"
        except subprocess.TimeoutExpired:
            how = "ran OUT OF TIME"
    if how != "ok":
        said = path.read_text(encoding="utf-8", errors="replace").rpartition(f"== {stage}\n")[2]
        for line in said.splitlines()[-LAST_WORDS:]:
            print(line, flush=True)
    return f"{stage}: {how}, {time.monotonic() - began:.0f} s"


def main(arguments: list[str] | None = None) -> int:
    """Run from the command line; the exit code is 1 if a stage failed or ran out of time."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--after", choices=STAGES, metavar="STAGE", help="go on behind this one")
    parser.add_argument("--list", action="store_true", help="name the stages")
    parser.add_argument("--budget", type=float, default=540, help="seconds (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder for results and log")
    parser.add_argument("--commit", help="where there is no git: what `git describe --always --dirty` says elsewhere")
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
