"""Whole walks, end to end: ddpm_fast, diffusers as shipped and at its best, a CUDA graph by hand, lucidrains' loop.

    python -m benchmarks.walks --part cifar-1-bfloat16     on a GPU, under nine minutes; --list names the parts
    python -m benchmarks.walks --part cpu                  on a CPU, minutes
    python -m benchmarks.walks --part smoke --device cpu   tries every piece; its numbers mean nothing

All arms of a part run in one process, in turns, with the same network (random weights). An arm that takes a wrong step
has an error in its row and no time. Writes benchmarks/results/<gpu>__walks-<part>.json; docs/benchmarks.md says how to
read it, and benchmarks/tables.py fills the tables from it. Without an installed ddpm_fast put PYTHONPATH=. before it.
"""

import argparse
import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.common.results import FOLDER, machine_name, write_result
from benchmarks.walks.arms import ALONE, ARMS, COMPILED, OURS, SHIPPED, Arm, Ours, WrongStepError, check, missing, quiet
from benchmarks.walks.networks import KINDS, Problem
from ddpm_fast.engine.execution import tf32

ROUNDS = 25  # at most
MATRIX = 8192  # side of the product that gives the ceiling

_OURS = (OURS, f"{OURS}, layout by trial", f"{OURS}, layout by trial, compiled", f"{OURS}, network as it is", ALONE)
_RIVALS = ("CUDA graph by hand", "denoising-diffusion-pytorch")
_REDUCED = (f"{COMPILED} reduce-overhead", f"{COMPILED} reduce-overhead, channels_last")
_AUTOTUNED = (f"{COMPILED} max-autotune", f"{COMPILED} max-autotune, channels_last")
_DEFAULT = (f"{COMPILED} default", f"{COMPILED} default, channels_last")
_GPU = (SHIPPED, *_OURS[:2], *_OURS[3:], "CUDA graph by hand", *_REDUCED, _OURS[2], "denoising-diffusion-pytorch")
_TUNED = (*_AUTOTUNED, *_OURS)


@dataclass(frozen=True)
class Part:
    """What one command measures.

    Attributes:
        kind, batch, precision: of the network.
        steps: of a walk; where they are not 1000, times a thousand steps are scaled.
        arms: in the order in which they are built.
        shipped_goal, compiled_goal: how many times as fast as diffusers, as shipped and best compiled, the best of
            ours is to be.
        slowest_goal: how many times as fast as diffusers as shipped the slowest of ours is to be.
        overhead_goal: the most that the loop may add to our network call alone.
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


# The first ones are wanted first.
PARTS = {
    "cifar-1-bfloat16": Part("cifar", 1, "bfloat16", 1000, shipped_goal=6, compiled_goal=1.5),
    "cifar-256-bfloat16": Part("cifar", 256, "bfloat16", compiled_goal=1.15),
    "256-1-bfloat16": Part("256", 1, "bfloat16", compiled_goal=1.2),
    "cifar-1-float32": Part("cifar", 1, "float32", 1000, shipped_goal=6, compiled_goal=1.5),
    "cifar-1-tf32": Part("cifar", 1, "tf32", 1000, shipped_goal=6, compiled_goal=1.5),
    "cifar-1-bfloat16-autotune": Part("cifar", 1, "bfloat16", 1000, _TUNED, compiled_goal=1.5),
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
}


class Clock:
    """Wall time on a device.

    Attributes:
        cuda: whether it has to be waited for.
    """

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self.device = device

    def wait(self) -> float:
        """Until the device is done; the time."""
        if self.cuda:
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def walk(self, arm: Arm, seed: int) -> tuple[float, float]:
        """Seconds until the images are on the host as bytes, and until the host had issued all steps."""
        began = self.wait()
        x = arm.walk(seed)
        issued = time.perf_counter()
        if x is not None:
            to_bytes(x).cpu()
        return self.wait() - began, issued - began


def to_bytes(x: Tensor) -> Tensor:
    """Images on [-1, 1] as bytes; the same for all arms."""
    return ((x.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def build(name: str, problem: Problem, clock: Clock) -> tuple[Arm, dict[str, Any]]:
    """An arm that has passed the gate, and what that took."""
    reserved = _reserved(clock)
    began = clock.wait()
    with quiet():
        arm = ARMS[name](problem)
    took = clock.wait() - began
    row = {"arm": name, "build_s": took, "gate": None if name == ALONE else check(arm)}
    row["kernels_per_step"] = kernels(arm, clock) if clock.cuda else None
    arm.walk(0)
    row["memory_MB"] = (_reserved(clock) - reserved) / 1e6 if clock.cuda else None
    return arm, row


def _reserved(clock: Clock) -> int:
    if not clock.cuda:
        return 0
    gc.collect()
    torch.cuda.empty_cache()
    return torch.cuda.memory_reserved(clock.device)


def kernels(arm: Arm, clock: Clock) -> float | None:
    """Kernels, copies and fills that the device runs for a step."""
    if isinstance(arm, Ours):
        graphs = list(arm.sampler.loop._graphs.values())
        return count(graphs[0].replay, clock) if graphs else None
    if arm.problem.steps < 8:
        return None
    return (count(lambda: arm.walk(0, 7), clock) - count(lambda: arm.walk(0, 3), clock)) / 4


def count(work: Callable[[], Any], clock: Clock) -> float:
    """Kernels, copies and fills that the device runs for `work`."""
    from torch.profiler import ProfilerActivity, profile

    clock.wait()
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        work()
        clock.wait()
    return float(sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profiled.events()))


def take_turns(arms: dict[str, Arm], clock: Clock, until: float, rounds: int = ROUNDS) -> dict[str, list]:
    """(whole, host) seconds of the arms' walks, in turns; at least three rounds of those that time allows."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in arms}
    for arm in arms.values():
        clock.walk(arm, 0)
    for turn in range(rounds):
        for name, arm in arms.items():
            expected = max((whole for whole, _ in times[name]), default=0)
            if turn < 3 or time.perf_counter() + expected < until:
                times[name].append(clock.walk(arm, turn + 1))
        if turn >= 2 and time.perf_counter() > until:
            break
    return times


def bootstrap(theirs: Sequence[float], ours: Sequence[float], draws: int = 4000) -> dict[str, float]:
    """Ratio of the medians, theirs to ours, with its 95 % interval by resampling."""
    generator = np.random.default_rng(0)
    medians = [np.median(generator.choice(np.asarray(times), (draws, len(times))), axis=1) for times in (theirs, ours)]
    low, high = np.percentile(medians[0] / medians[1], (2.5, 97.5)).tolist()
    return {"ratio": float(np.median(theirs) / np.median(ours)), "low": low, "high": high}


def row_of(part: Part, times: list[tuple[float, float]], operations: int, ceiling: float | None) -> dict[str, Any]:
    """What a table shows of an arm."""
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


def compare(rows: dict[str, dict], times: dict[str, list]) -> None:
    """Put into the rows of ours how many times as fast as the others they are."""
    wholes = {name: [whole for whole, _ in found] for name, found in times.items() if found}
    compiled = [name for name in wholes if name.startswith(COMPILED)]
    best = min(compiled, key=lambda name: np.median(wholes[name]), default=None)
    for name in wholes:
        if not name.startswith(OURS):
            continue
        rivals = {"shipped": SHIPPED, "best_compiled": best, "alone": ALONE if name == OURS else None}
        for key, rival in rivals.items():
            if rival in wholes:
                rows[name][f"over_{key}"] = {"arm": rival, **bootstrap(wholes[rival], wholes[name])}


def goals(part: Part, rows: dict[str, dict]) -> list[dict[str, Any]]:
    """Every goal of the part, what was reached, and whether that is enough; None where it was not measured."""
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


def _goal(name: str, limit: float | None, value: float | None, most: bool = False) -> dict[str, Any]:
    known = limit is not None and value is not None
    met = (value <= limit if most else value >= limit) if known else None  # type: ignore[operator]
    return {"goal": name, "sense": "at most" if most else "at least", "limit": limit, "value": value, "met": met}


def matrix_ceiling(clock: Clock) -> float | None:
    """TFLOP/s of a large bfloat16 matrix product; None on a CPU."""
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


def run(name: str, device: torch.device, budget: float) -> dict[str, Any]:
    """Measure a part; everything that a result file holds besides its environment."""
    part, clock = PARTS[name], Clock(device)
    torch.compiler.config.force_disable_caches = True  # what compiling takes is measured
    began = time.perf_counter()
    ceiling = matrix_ceiling(clock)
    problem = Problem(KINDS[part.kind], part.batch, part.precision, part.steps, device)
    operations = problem.operations()
    arms: dict[str, Arm] = {}
    rows: dict[str, dict[str, Any]] = {}
    left_out = []
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
            except Exception as error:  # one arm that breaks is no reason to lose the others
                rows[arm] = {"arm": arm, "error": f"{type(error).__name__}: {str(error)[:500]}"}
            print(_built(rows[arm]), flush=True)
            longest = max(longest, time.perf_counter() - began - spent)
        times = take_turns(arms, clock, began + budget)
    for arm, found in times.items():
        rows[arm] |= row_of(part, found, operations, ceiling)
    compare(rows, times)
    return {
        "part": name,
        "network": problem.kind.title,
        "batch": part.batch,
        "precision": part.precision,
        "steps": part.steps,
        "parameters": sum(parameter.numel() for parameter in problem.exact.parameters()),
        "GFLOP_per_call": operations / 1e9,
        "ceiling_TFLOP_per_s": ceiling,
        "goals": goals(part, rows),
        "left_out": left_out,
        "seconds": time.perf_counter() - began,
        "budget_seconds": budget,
        "rows": list(rows.values()),
    }


def _built(row: dict) -> str:
    if "error" in row:
        return f"{row['arm']:45} ERROR: {row['error']}"
    gate = "no gate" if row["gate"] is None else f"gate at {row['gate']:.2f}"
    return f"{row['arm']:45} built in {row['build_s']:.1f} s, {gate}"


def line(row: dict) -> str:
    """A row for the terminal."""
    if "error" in row:
        return f"{row['arm']:45} {row['error']}"
    text = f"{row['arm']:45} {row['ms_per_step']:9.3f} ms a step, host {row['host_us_per_step']:7.0f} us"
    for key in ("shipped", "best_compiled"):
        if found := row.get(f"over_{key}"):
            text += f", {found['ratio']:.2f} x {key} ({found['low']:.2f} to {found['high']:.2f})"
    return text


def main(arguments: list[str] | None = None) -> int:
    """Run from the command line; the exit code is 1 if a row has an error."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=PARTS, help="what to measure")
    parser.add_argument("--list", action="store_true", help="name the parts, the most wanted first")
    parser.add_argument("--device", help="cuda or cpu; default: cpu for the parts cpu and smoke, else cuda")
    parser.add_argument("--budget", type=float, default=480, help="seconds; what does not fit is listed (default 480)")
    parser.add_argument("--out", type=Path, help="folder for the result, instead of benchmarks/results")
    parser.add_argument("--commit", help="where there is no git: what `git describe --always --dirty` says elsewhere")
    given = parser.parse_args(arguments)
    if given.list or not given.part:
        print("\n".join(PARTS))
        return 0
    device = torch.device(given.device or ("cpu" if given.part in ("cpu", "smoke") else "cuda"))
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("torch finds no CUDA GPU; the part cpu is for a CPU")
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    result = run(given.part, device, given.budget)
    for row in result["rows"]:
        print(line(row))
    for goal in result["goals"]:
        if goal["limit"] is not None:
            value = "" if goal["value"] is None else f" {goal['value']:.3g},"
            said = {True: "met", False: "MISSED", None: "not measured"}[goal["met"]]
            print(f"goal: {goal['goal']}, {goal['sense']} {goal['limit']:g}:{value} {said}")
    if given.out or given.part != "smoke":
        machine = machine_name(device)
        rows = result.pop("rows")
        name = f"{machine}__walks-{given.part}" if given.part != "cpu" else "cpu__walks"
        print(write_result(name, rows, folder=given.out or FOLDER, commit=given.commit, **result))
        result["rows"] = rows
    return int(any("error" in row for row in result["rows"]))
