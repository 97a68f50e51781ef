"""The fused step on a GPU: its bandwidth against a copy's, its time against PyTorch's and diffusers', its launch.

    python -m benchmarks.step                        under eight minutes
    python -m benchmarks.step --device cpu --smoke   tries every piece at tiny sizes; its numbers mean nothing
    python -m benchmarks.step --plot FILE            draws the plot of a result file again

It writes benchmarks/results/<gpu>__step.json and docs/step-<gpu>.png. Without an installed ddpm_fast put PYTHONPATH=.
before it. Every result is compared with float64 before its time is taken; where one is wrong its row has the error and
no time, and the exit code is 1. GB/s are of the bytes that the step must move (`Case.bytes_per_element`), for every
arm: what an arm moves besides is its own loss.
"""

import gc
import importlib.util
import json
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.common.command_line import make_parser
from benchmarks.common.results import FOLDER, ROOT, machine_name, write_result
from benchmarks.common.timers import CudaTimer, Timer, WallTimer, copy_bandwidth
from benchmarks.step.arms import (
    ARMS,
    CASES,
    FLOAT32,
    MAIN,
    Case,
    WrongResultError,
    check,
    make_problem,
    memory_needed,
    missing,
)
from benchmarks.step.goals import CLAIMED, LARGE, goals
from benchmarks.step.launch import launch_cost
from ddpm_fast.kernels.dispatch import choose_backend, has_triton, on_device

DOCS = ROOT / "docs"
SMALL = 64_000_000  # bytes of state, from which on a graph of launches cannot help an arm
SETS, FEWEST_LAUNCHES = 512, 64  # in one graph: buffers in turn at most, launches at least

SIZES = (
    *((batch, 3, 32, 32) for batch in (1, 16, 256, 4096)),
    *((batch, 3, 256, 256) for batch in (86, 342, 1366, 2731)),  # 64 MiB, 256 MiB, 1 GiB, 2 GiB
)
COPIES = (
    256 << 20,
    512 << 20,
    1 << 30,
    2 << 30,
)  # the cache would hold too much of smaller states to show the memory's rate
SMOKE_SIZES = ((1, 3, 8, 8), (5, 3, 8, 8), (2, 3, 16, 16))


Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Job:
    """A row to measure."""

    arm: str
    case: Case
    shape: tuple[int, ...]

    @property
    def state_bytes(self) -> int:
        return 4 * math.prod(self.shape)

    def describe(self) -> dict[str, Any]:
        each = self.case.bytes_per_element()
        return {
            "arm": self.arm,
            "case": self.case.name,
            "shape": list(self.shape),
            "state_bytes": self.state_bytes,
            "bytes_per_element": each,
            "traffic_bytes": each * math.prod(self.shape),
        }


def planned(sizes: Iterable[tuple[int, ...]], arms: Iterable[str] = tuple(ARMS)) -> list[Job]:
    """List every row, the rows of the goals first; the rivals take the two bare cases."""
    jobs = [Job(arm, case, shape) for shape in sizes for arm in arms for case in CASES if _belongs(arm, case, shape)]
    return sorted(jobs, key=_rank)


def _belongs(arm: str, case: Case, shape: tuple[int, ...]) -> bool:
    if arm == "ddpm_fast":
        return True
    if arm.endswith("reduce-overhead"):
        return case is MAIN and 4 * math.prod(shape) < SMALL
    return case in (MAIN, FLOAT32)


def _rank(job: Job) -> int:
    own, large = job.arm == "ddpm_fast", job.state_bytes >= LARGE
    if job.case is MAIN and large and (own or job.arm == "diffusers"):
        return 0
    if own:
        return 1 if large or job.case is MAIN else 3
    return 2 if job.case is MAIN else 4


@dataclass
class Bench:
    """A bench: a device, its timer, and what a measurement may use."""

    device: torch.device
    backend: str
    timer: Timer
    copy_rate: float
    free: Callable[[], int]
    arms: dict[str, Any]

    def measure(self, job: Job) -> dict[str, Any]:
        """Measure one row; the row of a wrong result has the error and no time."""
        row = job.describe()
        problem = make_problem(job.case, job.shape, self.device)
        try:
            arm = self.arms[job.arm](problem, self.backend)
            row |= {"max_difference": check(arm), "tolerance": arm.tolerance}
        except WrongResultError as error:
            return row | {"error": str(error)}
        timing = self.timer.cold(arm.run)
        row |= vars(timing)
        row["GB_per_s"] = 1e-3 * problem.traffic / timing.median_us
        claimed = problem.traffic >= CLAIMED
        row["share_of_copy"] = row["GB_per_s"] / self.copy_rate if claimed else None
        if job.arm == "ddpm_fast" and not claimed:
            row["in_graph"] = self.in_graph(problem)
        return row

    def in_graph(self, problem: Any) -> dict[str, Any] | None:
        """Time a launch among many in one CUDA graph, on buffers in turn: the kernel without the cost of its launch."""
        sets = min(SETS, max(1, -(-self.timer.cold_bytes // problem.traffic)))
        arms = [self.arms["ddpm_fast"](problem.twin(), self.backend) for _ in range(sets)]
        timing = self.timer.graphed([arm.run for arm in arms] * -(-FEWEST_LAUNCHES // sets))
        if timing is None:
            return None
        cold = sets * problem.traffic >= self.timer.cold_bytes
        return {**vars(timing), "GB_per_s": 1e-3 * problem.traffic / timing.median_us, "buffers": sets, "cold": cold}


def run(
    jobs: list[Job],
    bench: Bench,
    budget: float,
    clock: Callable[[], float] = time.perf_counter,
    after: Callable[[Rows, Rows], None] = lambda rows, left_out: None,
) -> tuple[Rows, Rows]:
    """Measure until `budget` seconds are over; return the rows, and what was left out and why.

    `after` gets both so far after every row.
    """
    rows: Rows = []
    left_out: Rows = [{"arm": arm, "reason": why} for arm in bench.arms if (why := missing(arm))]
    absent = {entry["arm"] for entry in left_out}
    began = clock()
    for job in jobs:
        if job.arm in absent:
            continue
        needed = memory_needed(job.case, job.shape, job.arm)
        if clock() - began >= budget:
            left_out.append(job.describe() | {"reason": "time"})
        elif needed > (free := bench.free()):
            left_out.append(
                job.describe() | {"reason": f"memory: needs {needed / 1e9:.1f} GB of {free / 1e9:.1f} free"}
            )
        else:
            try:
                rows.append(_measured(job, bench))
                print(line(rows[-1]), flush=True)
                after(rows, left_out)
            except torch.OutOfMemoryError:  # the memory of an arm besides its operands is an estimate
                left_out.append(job.describe() | {"reason": "memory: ran out of it"})
    for entry in left_out:
        print(line(entry))
    return with_ratios(rows), left_out


def _measured(job: Job, bench: Bench) -> dict[str, Any]:
    try:
        return bench.measure(job)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # one broken arm must not lose the others
        return job.describe() | {"error": f"{type(error).__name__}: {str(error)[:500]}"}


def with_ratios(rows: Rows) -> Rows:
    """Return the rows with `ratio_to_diffusers`: how many times as fast as diffusers' step on the same state."""
    times = {_key(row): row["median_us"] for row in rows if row["arm"] == "diffusers" and "median_us" in row}
    for row in rows:
        if "median_us" in row:
            theirs = times.get(_key(row))
            row["ratio_to_diffusers"] = None if theirs is None else theirs / row["median_us"]
    return rows


def _key(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["case"], *row["shape"]


def line(row: dict[str, Any]) -> str:
    """Return a row for the terminal."""
    shape = "x".join(map(str, row.get("shape", [])))
    text = f"{row['arm']:30} {row.get('case', ''):16} {shape:16} "
    if "reason" in row:
        return f"{text}left out: {row['reason']}"
    if "error" in row:
        return f"{text}ERROR: {row['error']}"
    share = "" if row["share_of_copy"] is None else f"{row['share_of_copy']:7.1%} of copy"
    graph = f", {row['in_graph']['median_us']:.2f} us in a graph" if row.get("in_graph") else ""
    return f"{text}{row['median_us']:10.1f} us {row['GB_per_s']:8.1f} GB/s {share}{graph}"


def free_memory(device: torch.device) -> Callable[[], int]:
    """Return a function that returns the bytes free on the device; on a CPU a gibibyte, enough to try the pieces."""
    if device.type != "cuda":
        return lambda: 1 << 30

    def free() -> int:
        gc.collect()
        torch.cuda.empty_cache()
        return int(0.95 * torch.cuda.mem_get_info(device)[0])

    return free


def benchmark(
    device: torch.device,
    smoke: bool,
    budget: float,
    arms: dict[str, Any] = ARMS,
    save: Callable[[dict[str, Any]], Any] = lambda result: None,
) -> dict[str, Any]:
    """Measure everything that a result file holds besides its environment; `save` gets all of it after every row."""
    began = time.perf_counter()
    cuda = device.type == "cuda"
    timer: Timer = CudaTimer(device) if cuda else WallTimer()
    free = free_memory(device)
    copy = copy_bandwidth(timer, [1 << 20] if smoke else COPIES, device, free)
    print(f"copy: {copy['GB_per_s']:,.0f} GB/s", flush=True)
    backend = choose_backend(device)
    bench = Bench(device, backend, timer, copy["GB_per_s"], free, arms)
    launch = _launch(device, backend, timer, smoke)
    for name, timing in launch.get("host", {}).items():
        print(f"host time of a launch, {name}: {timing['median_us']:.1f} us", flush=True)
    jobs = planned(SMOKE_SIZES if smoke else SIZES, arms)

    def result(rows: Rows, left_out: Rows) -> dict[str, Any]:
        return {
            "rows": rows,
            "left_out": left_out,
            "copy": copy,
            "launch": launch,
            "goals": goals(rows, launch),
            "device": device.type,
            "backend": backend,
            "smoke": smoke,
            "seconds": round(time.perf_counter() - began, 1),
            "budget_seconds": budget,
        }

    def after(rows: Rows, left_out: Rows) -> None:
        save(result(with_ratios([dict(row) for row in rows]), left_out))

    return result(*run(jobs, bench, budget - (time.perf_counter() - began), after=after))


def _launch(device: torch.device, backend: str, timer: Timer, smoke: bool) -> dict[str, Any]:
    try:
        if smoke:
            return launch_cost(device, backend, timer, SMOKE_SIZES[0], launches=20)
        return launch_cost(device, backend, timer)
    except Exception as error:
        print(f"host time of a launch: ERROR: {error}", flush=True)
        return {"error": f"{type(error).__name__}: {str(error)[:500]}"}


def report(result: dict[str, Any]) -> None:
    """Print every goal."""
    words = {True: "met", False: "MISSED", None: "not measured"}
    for goal in result["goals"]:
        value = "" if goal["value"] is None else f", worst of {goal['sizes']}: {goal['value']:.3g}"
        print(f"goal: {goal['goal']}, {goal['limit']}{value}: {words[goal['met']]}")
    print(f"{len(result['rows'])} rows, {len(result['left_out'])} left out, {result['seconds']:.0f} s")


def write_file(result: dict[str, Any], out: Path | None, commit: str | None) -> Path:
    """Write the result file, into `out` if that is given."""
    more = {key: value for key, value in result.items() if key != "rows"}
    name = f"{machine_name(torch.device(result['device']))}__step"
    return write_result(name, result["rows"], folder=out or FOLDER, commit=commit, **more)


def write(result: dict[str, Any], out: Path | None, commit: str | None) -> Path:
    """Write the result file, and the plot where matplotlib is installed; everything in `out` if that is given."""
    path = write_file(result, out, commit)
    print(f"wrote {path}")
    draw(path, out)
    return path


def draw(path: Path, out: Path | None) -> None:
    """Plot a result file, into `out` or docs/."""
    if importlib.util.find_spec("matplotlib") is None:
        print(f"no plot, matplotlib is not installed; later: python -m benchmarks.step --plot {path}")
        return
    from benchmarks.step.plot import plot

    picture = (out or DOCS) / f"step-{path.name.removesuffix('__step.json')}.png"
    plot(json.loads(path.read_text(encoding="utf-8")), picture)
    print(f"wrote {picture}")


def main(arguments: list[str] | None = None, arms: dict[str, Any] = ARMS) -> int:
    """Run from the command line; the exit code is 1 if a row has an error."""
    parser = make_parser(__doc__)
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1, or with --smoke cpu")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes; nothing is written unless --out says where")
    parser.add_argument("--budget", type=float, default=450, help="seconds; what does not fit is listed (default 450)")
    parser.add_argument("--out", type=Path, help="folder for both files, instead of benchmarks/results and docs")
    parser.add_argument("--commit", help="where there is no git: what `git describe --always --dirty` says elsewhere")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw this result file and measure nothing")
    given = parser.parse_args(arguments)
    if given.plot:
        draw(given.plot, given.out)
        return 0
    device = torch.device(given.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("torch finds no CUDA GPU; --device cpu --smoke tries the pieces without one")
    if device.type != "cuda" and not given.smoke:
        parser.error(f"on {device} only --smoke: the sizes are a GPU's")
    if device.type == "cuda" and not has_triton():
        parser.error("triton is not installed, so there is no fused step to measure")
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    if given.out:
        given.out.mkdir(parents=True, exist_ok=True)
    with on_device(device):
        writes = given.out or not given.smoke
        result = benchmark(
            device, given.smoke, given.budget, arms,
            save=lambda result: write_file(result, given.out, given.commit) if writes else None,
        )  # fmt: skip
        report(result)
        if given.out or not given.smoke:
            write(result, given.out, given.commit)
    return 1 if any("error" in row for row in (*result["rows"], result["launch"])) else 0
