"""Compare speculative sampling of the embedded models with the sequential sampler.

    python -m benchmarks.speculation            runs on a GPU if there is one, else half an hour on a CPU
    python -m benchmarks.speculation --calls    counts calls and volume for more windows, one sample at a time, untimed
    python -m benchmarks.speculation --every    measures every policy for batches of 4 and 16 with one seed, ten minutes
    python -m benchmarks.speculation --smoke    tries whether everything runs, in seconds

A row has these numbers for one policy and one batch size:

    seconds      the median of a run
    calls        sequential network calls until the last sample ends
    volume       network evaluations, those of idle rows included, over those of the sequential sampler
    rejections   rejected drafts of a sample; a rejection ends a round, so there is at least one call more
    faster_than  the speed-up over the plain sequential sampler and over the hoisted one

All arms take turns, seed by seed. Speed-ups are medians over the seeds. The result is written after every seed, to
benchmarks/results/<gpu or cpu>__speculation.json, or to …__speculation_calls.json or …__speculation_every.json.
"""

import math
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.common.command_line import add_result_options, make_parser
from benchmarks.common.results import FOLDER, Row, machine_name, write_result
from ddpm_fast.engine.report import Speculation
from ddpm_fast.kernels.rounds import Position
from ddpm_fast.models.checkpoint import Checkpoint, Classes, load_checkpoint
from ddpm_fast.options import SamplerOptions
from ddpm_fast.sample import Sampler
from ddpm_fast.speculation.choose import Speculate
from ddpm_fast.speculation.loop import SpeculativeLoop

Key = tuple[str, str, bool]  # policy, guess, whether the network is hoisted

BY_T = {0: 2, 100: 8, 250: 16, 500: 32}
EVERY: dict[str, Speculate] = {"8": 8, "16": 16, "32": 32, "64": 64, "by t": BY_T, "measured": True}
ALSO_FROZEN = ("16", "64")  # policies that run with the frozen guess, too
COUNTED: dict[str, Speculate] = {
    "16": 16, "32": 32, "48": 48, "64": 64, "4, 8 from 25, 16 from 100, 32 from 400": {0: 4, 25: 8, 100: 16, 400: 32},
    "8, 16 from 25, 48 from 100": {0: 8, 25: 16, 100: 48},
}  # fmt: skip
BUILDING = 0.6  # share of the time after which no arm is built
RANGES = ((0, 100), (100, 250), (250, 500), (500, 1000))


def speculative_loop(sampler: Sampler[Tensor]) -> SpeculativeLoop:
    """Return the loop of a sampler that speculates."""
    assert isinstance(sampler.loop, SpeculativeLoop)
    return sampler.loop


def with_frozen_guesses(loop: SpeculativeLoop) -> None:
    """Make a loop guess as Hu et al. 2025 do: the x0 prediction of the last examined state serves all drafts."""
    commit = loop._commit

    def frozen(
        x: Tensor,
        drafts: Tensor,
        noise: Tensor,
        guess: Tensor,
        output: Tensor,
        position: Tensor,
        *rest: Any,
        **more: Any,
    ) -> None:
        commit(x, drafts, noise, guess, output, position, *rest, **more)
        last = torch.arange(len(x), device=x.device), (position[:, Position.TAKEN].long() - 1).clamp(min=0)
        guess.copy_(guess[last][:, None].expand_as(guess))

    loop._commit = frozen


def labels(classes: Classes | None, batch: int, device: torch.device) -> dict[str, Tensor]:
    """Return the keywords that label a batch with all classes in turn; no keywords for a network without classes."""
    return {} if classes is None else {classes.keyword: torch.arange(batch, device=device) % classes.count}


def arms_of(
    checkpoint: Checkpoint, batch: int, steps: int, device: torch.device, every: bool = False
) -> Iterator[tuple[Key, Sampler[Tensor]]]:
    """Yield the samplers that are compared, the most wanted first; each is built when its turn has come.

    Args:
        checkpoint: The model.
        batch: The batch size.
        steps: The number of steps.
        device: The device of the model.
        every: Whether to take every policy without hoisting, instead of the policies that suit the batch.
    """
    shape = (batch, *checkpoint.shape)
    options: SamplerOptions = {
        "config": checkpoint.diffusion,
        "num_inference_steps": steps,
        "model_kwargs": labels(checkpoint.classes, batch, device),
    }

    def make(speculate: Speculate, hoist: bool = False, memory_format: str | None = None) -> Sampler[Tensor]:
        execution: SamplerOptions = {"optimize": "hoist" if hoist else None, "memory_format": memory_format}
        all_options: SamplerOptions = {**options, **execution, "speculate": speculate}
        return Sampler(checkpoint.model, shape, **all_options)

    yield ("sequential", "-", False), make(False)
    yield ("sequential", "-", True), make(False, hoist=True)
    measured = make(EVERY["measured"])
    yield ("measured", "of the row", False), measured
    if not every:
        assert measured.windows is not None
        yield ("measured", "of the row", True), make(measured.windows, hoist=True)
    named = EVERY if batch == 1 or every else ("8", "by t") if batch == 4 else ()
    for name in named:
        if name == "measured":
            continue
        yield (name, "of the row", False), make(EVERY[name])
        if batch == 1 and name in ALSO_FROZEN:
            frozen = make(EVERY[name])
            with_frozen_guesses(speculative_loop(frozen))
            yield (name, "frozen", False), frozen
    if not every:
        layout = "channels_last"
        yield (f"sequential, {layout}", "-", True), make(False, hoist=True, memory_format=layout)
        assert measured.windows is not None
        yield (f"measured, {layout}", "of the row", True), make(measured.windows, hoist=True, memory_format=layout)


class Comparison:
    """The runs of all arms for a model and a batch size.

    Args:
        arms: The arms, each built when it is asked for.
        device: The device of the model.
        batch: The batch size.
        until: The time after which no arm is built and no seed begun, except for the first seed.

    Attributes:
        rows: A row for each arm that has run.
        complete: Whether there was time for every arm.
    """

    def __init__(
        self, arms: Iterable[tuple[Key, Sampler[Tensor]]], device: torch.device, batch: int, until: float
    ) -> None:
        self.device, self.batch, self.until = device, batch, until
        self.rows: list[Row] = []
        self.complete = True
        self.samplers: dict[Key, Sampler[Tensor]] = {}
        self.durations: dict[Key, list[float]] = {}
        self.reports: dict[Key, list[Speculation]] = {}
        built = time.perf_counter() + BUILDING * (until - time.perf_counter())
        for key, sampler in arms:
            self.samplers[key], self.durations[key], self.reports[key] = sampler, [], []
            if device.type == "cuda":
                sampler(seeds=0, progress=False)  # the first run records graphs and fills caches
            if time.perf_counter() > built and len(self.samplers) > 1:
                self.complete = False
                break

    def run(self, seeds: int, save: Callable[[list[Row]], Any] = lambda rows: None) -> list[Row]:
        """Run all arms in turns, seed by seed. Return the rows; `save` gets them after every seed."""
        for turn in range(seeds):
            if turn > 0 and time.perf_counter() > self.until:
                break
            for key, sampler in self.samplers.items():
                began = time.perf_counter()
                report = sampler(seeds=100 * turn, progress=False, output="result").speculation
                if self.device.type == "cuda":
                    torch.cuda.synchronize(self.device)
                self.durations[key].append(time.perf_counter() - began)
                if report is not None:
                    self.reports[key].append(report)
            self.rows = [self._row(key) for key in self.samplers]
            save(self.rows)
        for row in self.rows:
            print({name: value for name, value in row.items() if name != "acceptance"}, flush=True)
        return self.rows

    def _row(self, key: Key) -> Row:
        """Return what was measured of an arm so far."""
        policy, guess, hoisted = key
        seeds = len(self.durations[key])
        row: Row = {"policy": policy, "guess": guess, "hoisted": hoisted, "batch": self.batch, "seeds": seeds}
        row["seconds"] = float(np.median(self.durations[key]))
        for name, other in (("plain", False), ("hoisted", True)):
            if ("sequential", "-", other) not in self.durations:
                continue
            ratios = np.divide(self.durations["sequential", "-", other], self.durations[key])
            row[f"faster_than_{name}"] = {
                "median": float(np.median(ratios)), "low": float(ratios.min()), "high": float(ratios.max()),
            }  # fmt: skip
        if reports := self.reports[key]:
            windows = self.samplers[key].windows
            row["windows"] = windows.to_dict() if windows else None
            row |= means(reports)
            row["acceptance"] = {
                f"{low} to {high}": float(np.mean([each.accepted(low, high) for each in reports]))
                for low, high in RANGES
            }
        return row


def means(reports: list[Speculation]) -> Row:
    """Return the mean calls, volume and rejections of several runs."""
    return {
        "calls": float(np.mean([report.calls for report in reports])),
        "volume": float(np.mean([report.volume for report in reports])),
        "rejections": float(np.mean([(1 - report.acceptance).sum() for report in reports])),
    }


def count(checkpoint: Checkpoint, seeds: int, device: torch.device) -> list[Row]:
    """Count the calls and the volume of one sample at a time, with both guesses. Nothing is timed."""
    rows: list[Row] = []
    kwargs, shape = labels(checkpoint.classes, 1, device), (1, *checkpoint.shape)
    for name, windows in COUNTED.items():
        for guess in ("of the row", "frozen"):
            sampler = Sampler(
                checkpoint.model, shape, config=checkpoint.diffusion, speculate=windows, model_kwargs=kwargs
            )
            if guess == "frozen":
                with_frozen_guesses(speculative_loop(sampler))
            reports = [sampler(seeds=seed, output="result", progress=False).speculation for seed in range(seeds)]
            counts = means([report for report in reports if report is not None])
            rows.append({"windows": name, "guess": guess, "seeds": seeds, **counts})
            print(rows[-1], flush=True)
    return rows


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--smoke", action="store_true", help="few steps and seeds; writes nothing without --out")
    parser.add_argument("--calls", action="store_true", help="count calls and volume, without timing")
    parser.add_argument("--every", action="store_true", help="measure every policy for batches of 4 and 16, one seed")
    parser.add_argument("--models", nargs="+", default=["moons", "digits"], help="default: %(default)s")
    parser.add_argument("--batches", nargs="+", type=int, help="default: 1, 4 and 16")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    parser.add_argument("--budget", type=float, default=math.inf, help="seconds; arms that do not fit are left out")
    add_result_options(parser, folder=None)
    given = parser.parse_args()
    device, until = torch.device(given.device), time.perf_counter() + given.budget
    name = f"{machine_name(device)}__speculation" + ("_calls" if given.calls else "_every" if given.every else "")
    batches = given.batches or ((1,) if given.calls or given.smoke else (4, 16) if given.every else (1, 4, 16))
    jobs = [(model, batch) for model in given.models for batch in batches]
    rows: list[Row] = []
    left_out: list[Row] = []

    def save(model: str, measured: list[Row]) -> None:
        if given.out or not given.smoke:
            more = {"left_out": left_out} if left_out else {}
            found = [*rows, *({"model": model, **row} for row in measured)]
            write_result(name, found, folder=given.out or FOLDER, commit=given.commit, **more)

    for place, (model, batch) in enumerate(jobs):
        checkpoint = load_checkpoint(model, device=device)
        seeds = 1 if given.smoke or given.every else 3
        steps = 30 if given.smoke else checkpoint.diffusion.num_train_timesteps
        if given.calls:
            measured = count(checkpoint, 4, device)
        else:
            now = time.perf_counter()
            arms = arms_of(checkpoint, batch, steps, device, given.every)
            comparison = Comparison(arms, device, batch, now + (until - now) / (len(jobs) - place))
            if not comparison.complete:
                left_out.append({"model": model, "batch": batch, "reason": "time"})
            measured = comparison.run(seeds, partial(save, model))
        save(model, measured)
        rows += [{"model": model, **row} for row in measured]
