"""Compare whole sampling runs of ddpm_fast with diffusers, a CUDA graph by hand and denoising-diffusion-pytorch.

    python -m benchmarks.walks --part cifar-1-bfloat16     measures a part on a GPU in less than nine minutes
    python -m benchmarks.walks --part cpu                  measures the part for a CPU, in minutes
    python -m benchmarks.walks --part smoke --device cpu   tries every piece; its numbers mean nothing
    python -m benchmarks.walks --list                      names the parts

Every arm has a process of its own. All arms of all parts that are named are built at once, on as many cores as there
are; then the arms of a part run in turns, while the other processes wait. Diffusers runs as shipped and compiled. An
arm that takes a wrong step has an error in its row and no time. The first builds begin with an empty cache of compiled
code; in the end, where time is left, the arms are built once more, with the cache that is full then. The result is
written to benchmarks/results/<gpu>__walks-<part>.json, or to cpu__walks.json, after every build and every turn.
docs/benchmarks.md explains the result, and `python -m benchmarks.tables` fills the tables from it. Put PYTHONPATH=.
before the command where ddpm_fast is not installed.
"""

import contextlib
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from benchmarks.common.command_line import add_result_options, make_parser
from benchmarks.common.results import FOLDER, Row, machine_name, write_result
from benchmarks.walks.arms import ALONE, COMPILED, OURS, SHIPPED, missing
from benchmarks.walks.networks import KINDS, cost
from benchmarks.walks.parts import PARTS, TRIALS, Part
from benchmarks.walks.worker import ArmError, Clock, Seconds, Worker, rows_as_they_come

ROUNDS = 10  # the most that an arm runs
FEWEST = 3  # runs of an arm, whatever the time
BUILDING = 0.7  # share of the budget after which arms that are not built yet are left out
AGAIN = 15  # seconds; with less time left nothing is built again
COMPILES = "compile"  # part of the names of arms that Inductor compiles
MATRIX = 8192  # rows and columns of the matrices whose product gives the ceiling

Save = Callable[[Row], Any]


class Sheet:
    """The measurements of a part.

    Args:
        name: A key of `PARTS`.
        budget: Seconds of the whole command.

    Attributes:
        part: The setting.
        rows: The row of every arm whose build has ended.
        times: The runs of every arm that took its turns.
        left_out: The arms that are not measured, and why.
        ceiling: The TFLOP/s of a large matrix product.
        built_at_once: The number of arms that were built at the same time, those of other parts included.
    """

    def __init__(self, name: str, budget: float) -> None:
        self.name, self.part, self.budget = name, PARTS[name], budget
        self.rows: dict[str, Row] = {}
        self.times: dict[str, list[Seconds]] = {}
        self.left_out: list[Row] = []
        self.ceiling: float | None = None
        self.built_at_once = 0
        self._began = time.perf_counter()
        self._parameters, self._operations = cost(KINDS[self.part.kind], self.part.batch)

    def leave_out(self, arm: str, why: str) -> None:
        self.left_out.append({"arm": arm, "reason": why})
        print(f"{self.name:20} {arm:50} left out: {why}", flush=True)

    def add(self, row: Row) -> None:
        """Take the row of an arm that was built, or could not be built, with an empty cache."""
        if "build_s" in row:
            row["cold_build_s"] = row.pop("build_s")
        self.rows[row["arm"]] = row
        print(f"{self.name:20} {_built(row)}", flush=True)

    def fail(self, arm: str, error: str) -> None:
        """Note that an arm failed while it ran. Its times are dropped."""
        self.rows[arm]["error"] = error
        self.times.pop(arm, None)

    def result(self) -> Row:
        """Return all entries of the result file except the environment, as far as they are known."""
        part = self.part
        rows = {arm: dict(self.rows[arm]) for arm in part.arms if arm in self.rows}
        times = {arm: seconds for arm, seconds in self.times.items() if seconds}
        for arm, seconds in times.items():
            rows[arm] |= row_of(part, seconds, self._operations, self.ceiling)
        compare(rows, times)
        return {
            "part": self.name,
            "network": KINDS[part.kind].title,
            "batch": part.batch,
            "precision": part.precision,
            "steps": part.steps,
            "parameters": self._parameters,
            "GFLOP_per_call": self._operations / 1e9,
            "ceiling_TFLOP_per_s": self.ceiling,
            "built_at_once": self.built_at_once,
            "goals": goals(part, rows),
            "left_out": self.left_out,
            "seconds": time.perf_counter() - self._began,
            "budget_seconds": self.budget,
            "rows": list(rows.values()),
        }


def take_turns(
    workers: Mapping[str, Worker],
    until: float,
    after: Callable[[dict[str, list[Seconds]]], Any] = lambda times: None,
    fail: Callable[[str, str], Any] = lambda arm, error: None,
) -> dict[str, list[Seconds]]:
    """Run all arms in turns. Return the seconds of each run.

    Args:
        workers: The arms by name.
        until: The time that ends the turns. Every arm runs `FEWEST` times, and at most `ROUNDS` times while it lasts.
        after: A function that gets the times so far after every turn.
        fail: A function that gets the name and the error of an arm that fails. The arm takes no more turns.
    """
    times: dict[str, list[Seconds]] = {name: [] for name in workers}
    for turn in range(ROUNDS + 1):  # turn 0 warms up
        for name in list(times):
            expected = max((whole for whole, _ in times[name]), default=0)
            if turn > FEWEST and time.perf_counter() + expected >= until:
                continue
            try:
                seconds = workers[name].time(turn)
            except ArmError as error:
                del times[name]
                fail(name, str(error))
                continue
            if turn > 0:
                times[name].append(seconds)
        if turn > 0:
            after(times)
        if turn >= FEWEST and time.perf_counter() > until:
            break
    return times


def bootstrap(theirs: Sequence[float], ours: Sequence[float], draws: int = 4000) -> dict[str, float]:
    """Return the ratio of the medians, theirs to ours, with its 95 % interval by resampling."""
    generator = np.random.default_rng(0)
    medians = [np.median(generator.choice(np.asarray(times), (draws, len(times))), axis=1) for times in (theirs, ours)]
    low, high = np.percentile(medians[0] / medians[1], (2.5, 97.5)).tolist()
    return {"ratio": float(np.median(theirs) / np.median(ours)), "low": low, "high": high}


def row_of(part: Part, times: list[Seconds], operations: int, ceiling: float | None) -> Row:
    """Return the measured numbers of an arm."""
    whole, host = (np.array(column) for column in zip(*times, strict=True))
    p20, median, p80 = np.percentile(1e3 * whole / part.steps, (20, 50, 80)).tolist()
    share = None if ceiling is None else operations / (1e-3 * median) / (1e12 * ceiling)
    return {
        "walks": len(times),
        "ms_per_step": median,
        "ms_per_step_p20": p20,
        "ms_per_step_p80": p80,
        "s_per_1000_steps": median,
        "scaled": part.steps != 1000,
        "images_per_s": part.batch / median,
        "host_us_per_step": float(np.median(1e6 * host / part.steps)),
        "share_of_ceiling": share,
    }


def compare(rows: dict[str, Row], times: dict[str, list[Seconds]]) -> None:
    """Add the speed-ups over the other arms to the rows of ours."""
    wholes = {name: [whole for whole, _ in pairs] for name, pairs in times.items() if pairs}
    compiled = [name for name in wholes if name.startswith(COMPILED)]
    best = min(compiled, key=lambda name: np.median(wholes[name]), default=None)
    for name in wholes:
        if not name.startswith(OURS):
            continue
        rivals = {"shipped": SHIPPED, "best_compiled": best, "alone": ALONE if name == OURS else None}
        for key, rival in rivals.items():
            if rival in wholes:
                rows[name][f"over_{key}"] = {"arm": rival, **bootstrap(wholes[rival], wholes[name])}


def goals(part: Part, rows: dict[str, Row]) -> list[Row]:
    """Return every goal of the part with the value that was reached; None where nothing was measured."""
    ours = [row for name, row in rows.items() if name.startswith(OURS)]
    shipped, compiled = (
        [row[key]["ratio"] for row in ours if key in row] for key in ("over_shipped", "over_best_compiled")
    )
    overhead = [1 / row["over_alone"]["ratio"] - 1 for row in ours if "over_alone" in row]
    return [
        _goal("best of ours, times as fast as diffusers as shipped", part.shipped_goal, max(shipped, default=None)),
        _goal("slowest of ours, times as fast as diffusers as shipped", part.slowest_goal, min(shipped, default=None)),
        _goal("best of ours, times as fast as the best compiled", part.compiled_goal, max(compiled, default=None)),
        _goal(
            "what the loop adds to the network call alone", part.overhead_goal, max(overhead, default=None), most=True
        ),
    ]


def _goal(name: str, limit: float | None, value: float | None, most: bool = False) -> Row:
    met = None
    if limit is not None and value is not None:
        met = value <= limit if most else value >= limit
    return {"goal": name, "sense": "at most" if most else "at least", "limit": limit, "value": value, "met": met}


def matrix_ceiling(clock: Clock) -> float | None:
    """Return the TFLOP/s of a large bfloat16 matrix product; None on a CPU."""
    if not clock.cuda:
        return None
    a, b = (torch.randn(MATRIX, MATRIX, device=clock.device, dtype=torch.bfloat16) for _ in range(2))
    for _ in range(3):
        a @ b
    times = []
    for _ in range(10):
        began = clock.wait()
        a @ b
        times.append(clock.wait() - began)
    return 2 * MATRIX**3 / float(np.median(times)) / 1e12


@contextlib.contextmanager
def empty_cache(compiled: int) -> Iterator[None]:
    """Give processes that are started in this context an empty cache for compiled code, and share the cores.

    Args:
        compiled: The number of arms that are compiled at once.
    """
    threads = max(1, (os.cpu_count() or 1) // max(1, compiled))
    before = dict(os.environ)
    with tempfile.TemporaryDirectory(prefix="ddpm_fast_", ignore_cleanup_errors=True) as folder:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder
        os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", str(threads))
        try:
            yield
        finally:
            os.environ.clear()
            os.environ.update(before)


def run(names: Sequence[str], device: torch.device, budget: float, save: Save = lambda result: None) -> list[Row]:
    """Measure parts. Return for each part all entries of the result file except the environment.

    Args:
        names: Keys of `PARTS`.
        device: The device of the networks.
        budget: Seconds. Arms that do not fit are left out.
        save: A function that gets the entries of a part after every arm that was built and every turn.
    """
    until = time.perf_counter() + budget
    sheets = [Sheet(name, budget) for name in names]
    jobs = []
    for sheet in sheets:
        for arm in sheet.part.arms:
            if why := missing(arm, KINDS[sheet.part.kind], device):
                sheet.leave_out(arm, why)
            else:
                jobs.append((sheet, arm))
    with empty_cache(sum(COMPILES in arm for _, arm in jobs)):
        with workers_of(jobs, device) as workers:
            build_all(workers, until - (1 - BUILDING) * budget, save)
            ceiling = matrix_ceiling(Clock(device))
            for place, sheet in enumerate(sheets):
                sheet.ceiling = ceiling
                now = time.perf_counter()
                own = {worker.arm: worker for worker, owner in workers.items() if owner is sheet}
                measure(sheet, own, now + (until - now) / (len(sheets) - place), save)
        again = [(sheet, arm) for sheet, arm in jobs if arm in sheet.times]
        if again and until - time.perf_counter() > AGAIN:
            with workers_of(again, device) as workers:
                build_again(workers, until, save)
    return [sheet.result() for sheet in sheets]


@contextlib.contextmanager
def workers_of(jobs: Sequence[tuple[Sheet, str]], device: torch.device) -> Iterator[dict[Worker, Sheet]]:
    """Start a process for every arm of `jobs`, all at once. In the end the processes end."""
    workers: dict[Worker, Sheet] = {}
    try:
        for sheet, arm in jobs:
            workers[Worker(sheet.part, arm, device)] = sheet
        yield workers
    finally:
        for worker in workers:
            worker.end()
        for worker in workers:
            worker.join()


def build_all(workers: Mapping[Worker, Sheet], until: float, save: Save) -> None:
    """Wait for the builds of all arms until a time. Arms that are not built then are left out."""

    def after(worker: Worker) -> None:
        assert worker.row is not None
        workers[worker].add(worker.row)
        save(workers[worker].result())

    for sheet in workers.values():
        sheet.built_at_once = len(workers)
    rows_as_they_come(list(workers), until, after)
    for worker, sheet in workers.items():
        if worker.row is None:
            worker.end()
            sheet.leave_out(worker.arm, "time")


def build_again(workers: Mapping[Worker, Sheet], until: float, save: Save) -> None:
    """Wait until a time for second builds, whose compiled code is in the cache."""

    def after(worker: Worker) -> None:
        sheet = workers[worker]
        assert worker.row is not None
        if "build_s" in worker.row:
            sheet.rows[worker.arm]["warm_build_s"] = worker.row["build_s"]
            print(
                f"{sheet.name:20} {worker.arm:50} built in {worker.row['build_s']:.1f} s with a warm cache", flush=True
            )
            save(sheet.result())

    rows_as_they_come(list(workers), until, after)


def measure(sheet: Sheet, workers: Mapping[str, Worker], until: float, save: Save) -> None:
    """Run the arms of a part that were built, in turns, until a time."""

    def after(times: dict[str, list[Seconds]]) -> None:
        sheet.times = times
        save(sheet.result())

    ready = {arm: worker for arm, worker in workers.items() if worker.row is not None and "error" not in worker.row}
    sheet.times = take_turns(ready, until, after, sheet.fail)
    save(sheet.result())


def _built(row: Row) -> str:
    if "error" in row:
        return f"{row['arm']:50} ERROR: {row['error']}"
    gate = "no gate" if row["gate"] is None else f"gate at {row['gate']:.2f}"
    return f"{row['arm']:50} built in {row['cold_build_s']:.1f} s, {gate}"


def line(row: Row) -> str:
    """Return a row as a line for the terminal."""
    if "error" in row:
        return f"{row['arm']:45} {row['error']}"
    text = f"{row['arm']:45} {row['ms_per_step']:9.3f} ms a step, host {row['host_us_per_step']:7.0f} us"
    for key in ("shipped", "best_compiled"):
        if over := row.get(f"over_{key}"):
            text += f", {over['ratio']:.2f} x {key} ({over['low']:.2f} to {over['high']:.2f})"
    return text


def report(result: Row) -> None:
    """Print the rows and the goals of a part."""
    for row in result["rows"]:
        print(line(row))
    for goal in result["goals"]:
        if goal["limit"] is not None:
            value = "" if goal["value"] is None else f" {goal['value']:.3g},"
            verdict = {True: "met", False: "MISSED", None: "not measured"}[goal["met"]]
            print(f"goal: {goal['goal']}, {goal['sense']} {goal['limit']:g}:{value} {verdict}")


def main(arguments: list[str] | None = None) -> int:
    """Run the command line. Return 1 if a row has an error, else 0."""
    parser = make_parser(__doc__)
    parser.add_argument("--part", nargs="+", choices=PARTS, help="the parts to measure; default: name them and exit")
    parser.add_argument("--list", action="store_true", help="name the parts, the most important first, and exit")
    parser.add_argument("--device", help="cuda or cpu (default: cpu for the parts that are for a CPU, else cuda)")
    parser.add_argument(
        "--budget",
        type=float,
        default=480,
        help="seconds; arms that do not fit are listed as left out (default: %(default)s)",
    )
    add_result_options(parser, folder=None)
    given = parser.parse_args(arguments)
    if given.list or not given.part:
        print("\n".join(PARTS))
        return 0
    device = torch.device(given.device or ("cpu" if {*given.part} <= {"cpu", *TRIALS} else "cuda"))
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("torch finds no CUDA GPU; the part cpu is for a CPU")
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())

    def save(result: Row) -> None:
        name = result["part"]
        if given.out or name not in TRIALS:
            more = {key: value for key, value in result.items() if key != "rows"}
            file = "cpu__walks" if name == "cpu" else f"{machine_name(device)}__walks-{name}"
            write_result(file, result["rows"], folder=given.out or FOLDER, commit=given.commit, **more)

    results = run(given.part, device, given.budget, save)
    for result in results:
        report(result)
    return int(any("error" in row for result in results for row in result["rows"]))
