"""Compare whole sampling runs of ddpm_fast with diffusers, a CUDA graph by hand and denoising-diffusion-pytorch.

    python -m benchmarks.walks --part cifar-1-bfloat16     measures a part on a GPU in less than nine minutes
    python -m benchmarks.walks --part cpu                  measures the part for a CPU, in minutes
    python -m benchmarks.walks --part smoke --device cpu   tries every piece; its numbers mean nothing
    python -m benchmarks.walks --build cifar-1-bfloat16    compiles that part's arms, for Inductor's cache
    python -m benchmarks.walks --list                      names the parts

All arms of a part run in one process, in turns, with the same network and random weights. Diffusers runs as shipped and
compiled. An arm that takes a wrong step has an error in its row and no time. The result is written to
benchmarks/results/<gpu>__walks-<part>.json, or to cpu__walks.json. docs/benchmarks.md explains the result, and
`python -m benchmarks.tables` fills the tables from it. Put PYTHONPATH=. before the command where ddpm_fast is not
installed.
"""

import gc
import multiprocessing
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.common.command_line import add_result_options, make_parser
from benchmarks.common.results import FOLDER, Row, machine_name, write_result
from benchmarks.walks.arms import ALONE, ARMS, COMPILED, OURS, SHIPPED, Arm, Ours, WrongStepError, check, missing, quiet
from benchmarks.walks.networks import KINDS, Problem
from ddpm_fast.engine.tf32 import tf32

ROUNDS = 25  # the most that an arm runs
COMPILES = "compile"  # part of the names of arms that Inductor compiles
MOST_PROCESSES = 12  # that compile at once
MATRIX = 8192  # rows and columns of the matrices whose product gives the ceiling

Seconds = tuple[float, float]  # of one run: until the images are on the host; until the host had issued all steps

_OURS = (OURS, f"{OURS}, layout by trial", f"{OURS}, layout by trial, compiled", f"{OURS}, network as it is", ALONE)
_RIVALS = ("CUDA graph by hand", "denoising-diffusion-pytorch")
_REDUCED = (f"{COMPILED} reduce-overhead", f"{COMPILED} reduce-overhead, channels_last")
_AUTOTUNED = (f"{COMPILED} max-autotune", f"{COMPILED} max-autotune, channels_last")
_DEFAULT = (f"{COMPILED} default", f"{COMPILED} default, channels_last")
_GPU = (SHIPPED, *_OURS[:2], *_OURS[3:], "CUDA graph by hand", *_REDUCED, _OURS[2], "denoising-diffusion-pytorch")
_TUNED = (*_AUTOTUNED, *_OURS)


@dataclass(frozen=True)
class Part:
    """The setting that one command measures, with its goals.

    Attributes:
        kind: A key of `KINDS`.
        batch: The batch size.
        precision: "float32", "tf32" or "bfloat16".
        steps: The number of steps of a run. Where the number is not 1000, the times of 1000 steps are scaled.
        arms: The arms in the order in which they are built.
        shipped_goal: The least speed-up of our fastest arm over diffusers as shipped.
        compiled_goal: The least speed-up of our fastest arm over the fastest compiled diffusers.
        slowest_goal: The least speed-up of our slowest arm over diffusers as shipped.
        overhead_goal: The largest share of time that the loop may add to our network call alone.
    """

    kind: str
    batch: int
    precision: str
    steps: int = 50
    arms: tuple[str, ...] = _GPU
    shipped_goal: float | None = None
    compiled_goal: float | None = None
    slowest_goal: float = 1.0
    overhead_goal: float | None = 0.02


# The most important parts stand first.
PARTS = {
    "cifar-1-bfloat16": Part("cifar", 1, "bfloat16", 100, shipped_goal=6, compiled_goal=1.5),
    "cifar-256-bfloat16": Part("cifar", 256, "bfloat16", compiled_goal=1.15),
    "256-1-bfloat16": Part("256", 1, "bfloat16", compiled_goal=1.2),
    "cifar-1-float32": Part("cifar", 1, "float32", 100, shipped_goal=6, compiled_goal=1.5),
    "cifar-1-tf32": Part("cifar", 1, "tf32", 100, shipped_goal=6, compiled_goal=1.5),
    "cifar-1-bfloat16-autotune": Part("cifar", 1, "bfloat16", 100, _TUNED, compiled_goal=1.5),
    "cifar-256-bfloat16-autotune": Part("cifar", 256, "bfloat16", 50, _TUNED, compiled_goal=1.15),
    "cifar-16-bfloat16": Part("cifar", 16, "bfloat16"),
    "cifar-64-bfloat16": Part("cifar", 64, "bfloat16"),
    "256-16-bfloat16": Part("256", 16, "bfloat16"),
    "dit-1-bfloat16": Part("dit", 1, "bfloat16"),
    "dit-16-bfloat16": Part("dit", 16, "bfloat16"),
    "cpu": Part(
        "moons", 1, "float32", 50, (SHIPPED, *_OURS, _RIVALS[1], *_DEFAULT), shipped_goal=1.05, overhead_goal=None
    ),
    "smoke": Part("tiny", 2, "float32", 8, (SHIPPED, *_OURS, *_RIVALS, _DEFAULT[0])),
    "dry": Part("tiny", 2, "float32", 8, (SHIPPED, OURS, ALONE)),
}
TRIALS = ("smoke", "dry")  # parts whose numbers mean nothing


class Clock:
    """A wall clock for a device.

    Attributes:
        device: The device that runs the arms.
        cuda: Whether the host has to wait for the device.
    """

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self.device = device

    def wait(self) -> float:
        """Wait until the device has finished. Return the time."""
        if self.cuda:
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def time(self, arm: Arm, seed: int) -> Seconds:
        """Return the seconds until the images are on the host as bytes, and until the host had issued all steps."""
        began = self.wait()
        x = arm.sample(seed)
        issued = time.perf_counter()
        if x is not None:
            to_bytes(x).cpu()
        return self.wait() - began, issued - began


def to_bytes(x: Tensor) -> Tensor:
    """Return images on [-1, 1] as bytes. All arms use this function."""
    return ((x.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def build(name: str, problem: Problem, clock: Clock) -> tuple[Arm, Row]:
    """Build an arm and check it. Return the arm, and a row with the time, the memory and the kernels that it takes."""
    reserved = _reserved(clock)
    began = clock.wait()
    with quiet():
        arm = ARMS[name](problem)
    seconds = clock.wait() - began
    row: Row = {"arm": name, "build_s": seconds, "gate": None if name == ALONE else check(arm)}
    row["kernels_per_step"] = kernels(arm, clock) if clock.cuda else None
    arm.sample(0)
    row["memory_MB"] = (_reserved(clock) - reserved) / 1e6 if clock.cuda else None
    return arm, row


def _reserved(clock: Clock) -> int:
    if not clock.cuda:
        return 0
    gc.collect()
    torch.cuda.empty_cache()
    return torch.cuda.memory_reserved(clock.device)


def kernels(arm: Arm, clock: Clock) -> float | None:
    """Return the kernels, copies and fills that the device runs for a step; None where they cannot be counted."""
    if isinstance(arm, Ours):
        graphs = list(arm.loop._graphs.values())
        return count(graphs[0].replay, clock) if graphs else None
    if arm.problem.steps < 8:
        return None
    return (count(lambda: arm.sample(0, 7), clock) - count(lambda: arm.sample(0, 3), clock)) / 4


def count(work: Callable[[], Any], clock: Clock) -> float:
    """Return the kernels, copies and fills that the device runs for `work`."""
    from torch.profiler import ProfilerActivity, profile

    clock.wait()
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        work()
        clock.wait()
    return float(sum(event.device_type.name == "CUDA" for event in profiled.events()))


def take_turns(
    arms: dict[str, Arm],
    clock: Clock,
    until: float,
    rounds: int = ROUNDS,
    after: Callable[[dict[str, list[Seconds]]], None] = lambda times: None,
) -> dict[str, list[Seconds]]:
    """Run all arms in turns. Return the seconds of each run.

    Every arm runs at least three times, and at most `rounds` times while the time lasts. `after` gets what was measured
    so far after every turn, so that a run that is cut off loses a turn.
    """
    times: dict[str, list[Seconds]] = {name: [] for name in arms}
    for arm in arms.values():
        clock.time(arm, 0)
    for turn in range(rounds):
        for name, arm in arms.items():
            expected = max((whole for whole, _ in times[name]), default=0)
            if turn < 3 or time.perf_counter() + expected < until:
                times[name].append(clock.time(arm, turn + 1))
        after(times)
        if turn >= 2 and time.perf_counter() > until:
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


def run(name: str, device: torch.device, budget: float, save: Callable[[Row], None] = lambda result: None) -> Row:
    """Measure a part. Return all entries of the result file except the environment.

    Args:
        name: A key of `PARTS`.
        device: The device of the network.
        budget: Seconds; arms that do not fit are left out.
        save: A function that gets the entries so far, after every arm that was built and every turn.
    """
    part, clock = PARTS[name], Clock(device)
    began = time.perf_counter()
    ceiling = matrix_ceiling(clock)
    problem = Problem(KINDS[part.kind], part.batch, part.precision, part.steps, device)
    operations = problem.operations()
    arms: dict[str, Arm] = {}
    rows: dict[str, Row] = {}
    left_out: list[Row] = []

    def result(times: dict[str, list[Seconds]]) -> Row:
        measured = {name: dict(row) for name, row in rows.items()}
        for arm, seconds in times.items():
            if seconds:
                measured[arm] |= row_of(part, seconds, operations, ceiling)
        compare(measured, times)
        return {
            "part": name,
            "network": problem.kind.title,
            "batch": part.batch,
            "precision": part.precision,
            "steps": part.steps,
            "parameters": sum(parameter.numel() for parameter in problem.exact.parameters()),
            "GFLOP_per_call": operations / 1e9,
            "ceiling_TFLOP_per_s": ceiling,
            "goals": goals(part, measured),
            "left_out": left_out,
            "seconds": time.perf_counter() - began,
            "budget_seconds": budget,
            "built": "with Inductor's cache",
            "rows": list(measured.values()),
        }

    longest = 0.0
    with tf32({"float32": False, "tf32": True}.get(part.precision) if clock.cuda else None):
        for arm in part.arms:
            spent = time.perf_counter() - began
            why = missing(arm, problem)
            if why is None and spent + longest > 0.7 * budget:
                why = "time"
            if why is not None:
                left_out.append({"arm": arm, "reason": why})
                print(f"{arm:45} left out: {why}", flush=True)
                continue
            try:
                arms[arm], rows[arm] = build(arm, problem, clock)
            except WrongStepError as error:
                rows[arm] = {"arm": arm, "error": f"wrong result: {error}"}
            except Exception as error:  # the other arms are still measured
                rows[arm] = {"arm": arm, "error": f"{type(error).__name__}: {str(error)[:500]}"}
            print(_built(rows[arm]), flush=True)
            longest = max(longest, time.perf_counter() - began - spent)
            save(result({}))
        times = take_turns(arms, clock, began + budget, ROUNDS, lambda times: save(result(times)))
        return result(times)


def build_cold(names: Sequence[str], device: torch.device, out: Path, commit: str | None) -> int:
    """Build every compiled arm of the parts in a process of its own, all at once: their code is then in the cache.

    The seconds are written to <machine>__builds.json. Return 1 if an arm could not be built, else 0.
    """
    jobs = [(name, arm) for name in names for arm in PARTS[name].arms if COMPILES in arm]
    context = multiprocessing.get_context("spawn")
    with context.Pool(max(1, min(len(jobs), MOST_PROCESSES)), maxtasksperchild=1) as pool:
        rows: list[Row] = []
        for row in pool.imap_unordered(partial(_build_cold, str(device)), jobs):
            rows.append(row)
            print("{part:28} {arm:60} ".format(**row), row.get("error") or f"{row['cold_s']:.1f} s", flush=True)
            write_result(f"{machine_name(device)}__builds", rows, folder=out, commit=commit)
    return int(any("error" in row for row in rows))


def _build_cold(device: str, job: tuple[str, str]) -> Row:
    name, arm = job
    part, clock = PARTS[name], Clock(torch.device(device))
    problem = Problem(KINDS[part.kind], part.batch, part.precision, min(part.steps, 4), clock.device)
    if why := missing(arm, problem):
        return {"part": name, "arm": arm, "error": f"left out: {why}"}
    began = clock.wait()
    try:
        with quiet():
            ARMS[arm](problem)
    except Exception as error:  # the other arms are still built
        return {"part": name, "arm": arm, "error": f"{type(error).__name__}: {str(error)[:500]}"}
    return {"part": name, "arm": arm, "cold_s": clock.wait() - began}


def _built(row: Row) -> str:
    if "error" in row:
        return f"{row['arm']:45} ERROR: {row['error']}"
    gate = "no gate" if row["gate"] is None else f"gate at {row['gate']:.2f}"
    return f"{row['arm']:45} built in {row['build_s']:.1f} s, {gate}"


def line(row: Row) -> str:
    """Return a row as a line for the terminal."""
    if "error" in row:
        return f"{row['arm']:45} {row['error']}"
    text = f"{row['arm']:45} {row['ms_per_step']:9.3f} ms a step, host {row['host_us_per_step']:7.0f} us"
    for key in ("shipped", "best_compiled"):
        if over := row.get(f"over_{key}"):
            text += f", {over['ratio']:.2f} x {key} ({over['low']:.2f} to {over['high']:.2f})"
    return text


def main(arguments: list[str] | None = None) -> int:
    """Run the command line. Return 1 if a row has an error, else 0."""
    parser = make_parser(__doc__)
    parser.add_argument("--part", choices=PARTS, help="the part to measure; default: name the parts and exit")
    parser.add_argument("--build", nargs="+", choices=PARTS, help="only build these parts' compiled arms, all at once")
    parser.add_argument("--list", action="store_true", help="name the parts, the most important first, and exit")
    parser.add_argument("--device", help="cuda or cpu (default: cpu for the parts cpu and smoke, else cuda)")
    parser.add_argument(
        "--budget",
        type=float,
        default=480,
        help="seconds; arms that do not fit are listed as left out (default: %(default)s)",
    )
    add_result_options(parser, folder=None)
    given = parser.parse_args(arguments)
    if given.list or not (given.part or given.build):
        print("\n".join(PARTS))
        return 0
    device = torch.device(given.device or ("cpu" if given.part in ("cpu", *TRIALS) else "cuda"))
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("torch finds no CUDA GPU; the part cpu is for a CPU")
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    machine, folder = machine_name(device), given.out or FOLDER
    if given.build:
        return build_cold(given.build, device, folder, given.commit)
    name = f"{machine}__walks-{given.part}" if given.part != "cpu" else "cpu__walks"
    writes = given.out or given.part not in TRIALS

    def save(result: Row) -> None:
        more = {key: value for key, value in result.items() if key != "rows"}
        if writes:
            write_result(name, result["rows"], folder=folder, commit=given.commit, **more)

    result = run(given.part, device, given.budget, save)
    save(result)
    for row in result["rows"]:
        print(line(row))
    for goal in result["goals"]:
        if goal["limit"] is not None:
            value = "" if goal["value"] is None else f" {goal['value']:.3g},"
            verdict = {True: "met", False: "MISSED", None: "not measured"}[goal["met"]]
            print(f"goal: {goal['goal']}, {goal['sense']} {goal['limit']:g}:{value} {verdict}")
    return int(any("error" in row for row in result["rows"]))
