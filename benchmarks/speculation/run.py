"""Speculative walks of the embedded models against the sequential sampler, in one run.

    python -m benchmarks.speculation            on a GPU if there is one, else half an hour on a CPU
    python -m benchmarks.speculation --calls    calls and volume for more windows, one sample at a time, not timed
    python -m benchmarks.speculation --every    every policy for batches of 4 and 16, one seed: ten minutes
    python -m benchmarks.speculation --smoke    seconds: whether it runs

For each policy and batch size: network calls one after the other until the last sample ends, volume (network
evaluations, those of idle rows too, over those of the sequential walk), rejections a sample (each ends a round, so one
more is the floor of calls), and how many times faster the walk is than the plain sequential one and than the hoisted
one. All arms take turns, seed by seed; ratios are medians over the seeds. Writes
benchmarks/results/<gpu or cpu>__speculation.json, or …__speculation_calls.json, …__speculation_every.json.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.common.results import FOLDER, machine_name, write_result
from ddpm_fast.engine.report import Speculation
from ddpm_fast.kernels.speculate import Progress
from ddpm_fast.models.checkpoint import Checkpoint, Classes, load_checkpoint
from ddpm_fast.sample import Sampler
from ddpm_fast.speculation.loop import SpeculativeLoop

BY_T = {0: 2, 100: 8, 250: 16, 500: 32}
EVERY: dict[str, Any] = {"8": 8, "16": 16, "32": 32, "64": 64, "by t": BY_T, "measured": True}
ALONE = ("16", "64")  # also with the guess of the literature, the last estimate of an examined state
COUNTED: dict[str, Any] = {
    "16": 16, "32": 32, "48": 48, "64": 64, "4, 8 from 25, 16 from 100, 32 from 400": {0: 4, 25: 8, 100: 16, 400: 32},
    "8, 16 from 25, 48 from 100": {0: 8, 25: 16, 100: 48},
}  # fmt: skip
RANGES = ((0, 100), (100, 250), (250, 500), (500, 1000))


def with_frozen_guesses(loop: SpeculativeLoop) -> None:
    """Make a loop guess as Hu et al. 2025 do: one estimate for all drafts, that of the last examined state."""
    commit = loop._commit

    def frozen(
        x: Tensor, drafts: Tensor, noise: Tensor, guess: Tensor, output: Tensor, progress: Tensor, *rest, **more
    ):
        commit(x, drafts, noise, guess, output, progress, *rest, **more)
        last = torch.arange(len(x), device=x.device), (progress[:, Progress.TAKEN].long() - 1).clamp(min=0)
        guess.copy_(guess[last][:, None].expand_as(guess))

    loop._commit = frozen


def labels(classes: Classes | None, batch: int, device: torch.device) -> dict[str, Tensor]:
    """The keyword of a network with classes: all of them in turn; nothing for others."""
    return {} if classes is None else {classes.keyword: torch.arange(batch, device=device) % classes.count}


def arms_of(
    checkpoint: Checkpoint, batch: int, steps: int, device: torch.device, every: bool = False
) -> dict[tuple[str, str, bool], Sampler]:
    """Samplers by policy, guess, and whether they are hoisted; of every policy, or of those that suit the batch."""
    shape = (batch, *checkpoint.shape)
    told = labels(checkpoint.classes, batch, device)
    options: dict[str, Any] = {"config": checkpoint.diffusion, "num_inference_steps": steps, "model_kwargs": told}

    def make(speculate: Any, hoist: bool = False, memory_format: str | None = None) -> Sampler:
        how = {"optimize": "hoist" if hoist else None, "memory_format": memory_format}
        return Sampler(checkpoint.model, shape, speculate=speculate, **how, **options)

    arms = {("sequential", "-", False): make(False), ("sequential", "-", True): make(False, hoist=True)}
    policies = (
        EVERY if batch == 1 or every else {"8": 8, "by t": BY_T, "measured": True} if batch == 4 else {"measured": True}
    )
    for name, windows in policies.items():
        arms[name, "of the row", False] = make(windows)
        if batch == 1 and name in ALONE:
            arms[name, "frozen", False] = make(windows)
            with_frozen_guesses(arms[name, "frozen", False].loop)  # type: ignore[arg-type]
    if every:
        return arms
    chosen = arms["measured", "of the row", False].windows
    arms["measured", "of the row", True] = make(chosen, hoist=True)
    arms["sequential, channels_last", "-", True] = make(False, hoist=True, memory_format="channels_last")
    arms["measured, channels_last", "of the row", True] = make(chosen, hoist=True, memory_format="channels_last")
    return arms


def compare(
    checkpoint: Checkpoint, batch: int, seeds: int, steps: int, device: torch.device, every: bool = False
) -> list[dict[str, Any]]:
    """All arms for a model and a batch size."""
    arms = arms_of(checkpoint, batch, steps, device, every)
    if device.type == "cuda":
        for sampler in arms.values():  # what the first walk alone has to do: graphs are recorded, caches filled
            sampler(seeds=0, progress=False)
    times: dict[tuple[str, str, bool], list[float]] = {key: [] for key in arms}
    did: dict[tuple[str, str, bool], list[Speculation]] = {key: [] for key in arms}
    for turn in range(seeds):
        for key, sampler in arms.items():
            began = time.perf_counter()
            found = sampler(seeds=100 * turn, progress=False, output="result")
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            times[key].append(time.perf_counter() - began)
            if found.speculation is not None:
                did[key].append(found.speculation)
    rows = []
    for key, sampler in arms.items():
        policy, guess, hoisted = key
        row: dict[str, Any] = {"policy": policy, "guess": guess, "hoisted": hoisted, "batch": batch, "seeds": seeds}
        for name, other in (("plain", False), ("hoisted", True)):
            ratios = np.divide(times["sequential", "-", other], times[key])
            row[f"faster_than_{name}"] = {
                "median": float(np.median(ratios)), "low": float(ratios.min()), "high": float(ratios.max()),
            }  # fmt: skip
        if did[key]:
            row["windows"] = sampler.windows.to_dict() if sampler.windows else None
            row["calls"] = float(np.mean([each.calls for each in did[key]]))
            row["volume"] = float(np.mean([each.volume for each in did[key]]))
            row["rejections"] = float(np.mean([(1 - each.acceptance).sum() for each in did[key]]))
            row["acceptance"] = {
                f"{low} to {high}": float(np.mean([each.accepted(low, high) for each in did[key]]))
                for low, high in RANGES
            }
        rows.append(row)
        print({name: value for name, value in row.items() if name != "acceptance"}, flush=True)
    return rows


def count(checkpoint: Checkpoint, seeds: int, device: torch.device) -> list[dict[str, Any]]:
    """Calls and volume of one sample at a time, guessed by the row and frozen; nothing is timed."""
    rows = []
    told, shape = labels(checkpoint.classes, 1, device), (1, *checkpoint.shape)
    for name, windows in COUNTED.items():
        for guess in ("of the row", "frozen"):
            sampler = Sampler(
                checkpoint.model, shape, config=checkpoint.diffusion, speculate=windows, model_kwargs=told
            )
            if guess == "frozen":
                with_frozen_guesses(sampler.loop)  # type: ignore[arg-type]
            did = [sampler(seeds=seed, output="result", progress=False).speculation for seed in range(seeds)]
            rows.append({
                "windows": name,
                "guess": guess,
                "seeds": seeds,
                "calls": float(np.mean([each.calls for each in did])),
                "volume": float(np.mean([each.volume for each in did])),
                "rejections": float(np.mean([(1 - each.acceptance).sum() for each in did])),
            })  # fmt: skip
            print(rows[-1], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="few steps, few seeds; writes nothing")
    parser.add_argument("--calls", action="store_true", help="count calls alone")
    parser.add_argument("--every", action="store_true", help="every policy, batches of 4 and 16, one seed")
    parser.add_argument("--models", nargs="+", default=["moons", "digits"], help="default: %(default)s")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder for the result")
    parser.add_argument("--commit", help="where there is no git: what `git describe --always --dirty` says elsewhere")
    given = parser.parse_args()
    device = torch.device(given.device)
    name = f"{machine_name(device)}__speculation" + ("_calls" if given.calls else "_every" if given.every else "")
    rows = []
    for model in given.models:
        checkpoint = load_checkpoint(model, device=device)
        seeds = 1 if given.smoke or given.every else 3
        steps = 30 if given.smoke else checkpoint.diffusion.num_train_timesteps
        for batch in (1,) if given.calls else (4, 16) if given.every else (1, 4, 16):
            if given.calls:
                found = count(checkpoint, 4, device)
            else:
                found = compare(checkpoint, batch, seeds, steps, device, given.every)
            rows += [{"model": model, **row} for row in found]
            if not given.smoke:
                write_result(name, rows, folder=given.out, commit=given.commit)
