"""Test whether speculated moons have the law of the moons of the sequential sampler.

    python -m benchmarks.speculation.quality [--count 192]

The Kolmogorov-Smirnov test compares the lit fraction, radius, position and misfit of speculated samples with the
sequential samples of moons__quality.json. The seeds begin at 1,000,000, so no two samples share their noise. The result
is written to benchmarks/results/moons__speculated.json.
"""

import numpy as np
import torch
from scipy import stats
from tqdm.auto import tqdm

from benchmarks.common.command_line import make_parser
from benchmarks.common.results import Row, read_result, write_result
from benchmarks.study.moons_statistics import STATISTICS, Measured, statistics_of
from ddpm_fast.models.checkpoint import load_checkpoint
from ddpm_fast.sample import Sampler

WINDOWS = {0: 2, 25: 8, 50: 16}
FIRST_SEED, BATCH = 1_000_000, 1


def sequential() -> Measured:
    """Return the statistics of the embedded model's sequential samples."""
    steps = load_checkpoint().about["training"]["steps"]
    (row,) = (row for row in read_result("moons__quality")["rows"]["models"] if row["training"]["steps"] == steps)
    return {name: np.array(values) for name, values in row["measured"].items()}


def compare(speculated: Measured, sequential: Measured) -> dict[str, dict[str, float]]:
    """Return the Kolmogorov-Smirnov distance and p of every statistic."""
    tests = {name: stats.ks_2samp(speculated[name], sequential[name]) for name in (*STATISTICS, "misfit")}
    return {name: {"distance": float(test.statistic), "p": float(test.pvalue)} for name, test in tests.items()}


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--count", type=int, default=192, help="speculated samples (default: %(default)s)")
    count = parser.parse_args().count
    checkpoint = load_checkpoint()
    sampler = Sampler(
        checkpoint.model, (BATCH, *checkpoint.shape), config=checkpoint.diffusion, speculate=WINDOWS, optimize="hoist"
    )
    parts, calls, volumes = [], [], []
    for first in tqdm(range(FIRST_SEED, FIRST_SEED + count, BATCH)):
        result = sampler(seeds=first, output="result", progress=False)
        assert result.speculation is not None
        parts.append(result.sample)
        calls.append(result.speculation.calls)
        volumes.append(result.speculation.volume)
    measured = {name: values.round(5) for name, values in statistics_of(torch.cat(parts)[:count]).items()}
    tests = compare(measured, sequential())
    row: Row = {
        "count": count,
        "windows": WINDOWS,
        "batch": BATCH,
        "calls": float(np.mean(calls)),
        "volume": float(np.mean(volumes)),
        "tests": tests,
        "measured": {name: values.tolist() for name, values in measured.items()},
    }
    for name, test in tests.items():
        print(f"{name:<8}KS distance {test['distance']:.4f}   p = {test['p']:.2g}")
    print(write_result("moons__speculated", row))


if __name__ == "__main__":
    main()
