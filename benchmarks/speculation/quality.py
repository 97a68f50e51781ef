"""Are speculated moons those of the sequential sampler? Two-sample tests of what is measured of them.

    python -m benchmarks.speculation.quality [--count 192]

Lit fraction, radius, position and misfit of speculated samples (seeds from 1,000,000 on, so that none shares its noise)
against the sequential samples of moons__quality.json, by the Kolmogorov-Smirnov test. Writes
benchmarks/results/moons__speculated.json.
"""

import argparse
from typing import Any

import numpy as np
import torch
from scipy import stats
from tqdm.auto import tqdm

from benchmarks.common.results import read_result, write_result
from benchmarks.study.moons_statistics import STATISTICS, statistics_of
from ddpm_fast.models.checkpoint import load_checkpoint
from ddpm_fast.sample import Sampler

WINDOWS = {0: 2, 25: 8, 50: 16}
FIRST_SEED, BATCH = 1_000_000, 1


def sequential() -> dict[str, Any]:
    """What was measured of the embedded model's sequential samples."""
    steps = load_checkpoint().about["training"]["steps"]
    (row,) = (row for row in read_result("moons__quality")["rows"]["models"] if row["training"]["steps"] == steps)
    return {name: np.array(values) for name, values in row["measured"].items()}


def compare(found: dict[str, Any], other: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Kolmogorov-Smirnov distance and p of everything that is measured."""
    tests = {name: stats.ks_2samp(found[name], other[name]) for name in (*STATISTICS, "misfit")}
    return {name: {"distance": float(test.statistic), "p": float(test.pvalue)} for name, test in tests.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=192)
    count = parser.parse_args().count
    checkpoint = load_checkpoint()
    sampler = Sampler(
        checkpoint.model, (BATCH, *checkpoint.shape), config=checkpoint.diffusion, speculate=WINDOWS, optimize="hoist"
    )
    parts, calls, volumes = [], [], []
    for first in tqdm(range(FIRST_SEED, FIRST_SEED + count, BATCH)):
        found = sampler(seeds=first, output="result", progress=False)
        parts.append(found.sample)
        calls.append(found.speculation.calls)
        volumes.append(found.speculation.volume)
    measured = {name: values.round(5) for name, values in statistics_of(torch.cat(parts)[:count]).items()}
    row = {
        "count": count,
        "windows": WINDOWS,
        "batch": BATCH,
        "calls": float(np.mean(calls)),
        "volume": float(np.mean(volumes)),
        "tests": compare(measured, sequential()),
        "measured": {name: values.tolist() for name, values in measured.items()},
    }
    for name, test in row["tests"].items():
        print(f"{name:<8}KS distance {test['distance']:.4f}   p = {test['p']:.2g}")
    print(write_result("moons__speculated", row))


if __name__ == "__main__":
    main()
