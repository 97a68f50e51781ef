"""The statistics of a set of moons, and the two-sample tests between two sets."""

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor

from benchmarks.common.results import Row
from ddpm_fast.data import moons

STATISTICS = ("lit", "radius", "x", "y")
DATA_COUNT = 8192
LEVEL = 0.001  # a model is rejected below this p, after Bonferroni over the statistics

Measured = dict[str, NDArray[np.float64]]  # statistic: its values, one for each image


def statistics_of(images: Tensor) -> Measured:
    """Return the lit fraction, radius, position and misfit of every image."""
    parts = [moons.measure(part) for part in torch.split(images, 512)]
    found = {name: torch.cat([getattr(moon, name) for moon, _ in parts]) for name in STATISTICS}
    found["misfit"] = torch.cat([misfit for _, misfit in parts])
    return {name: values.double().numpy() for name, values in found.items()}


def compare(samples: Measured, data: Measured) -> Row:
    """Return the Kolmogorov-Smirnov distance and p of every statistic, and whether the samples are rejected."""
    row: Row = {}
    for name in STATISTICS:
        test = stats.ks_2samp(samples[name], data[name])
        row[name] = {"distance": float(test.statistic), "p": float(test.pvalue)}
    misfit = samples["misfit"]
    row["misfit"] = {
        "median": float(np.median(misfit)),
        "p95": float(np.quantile(misfit, 0.95)),
        "above_0.1": float((misfit > 0.1).mean()),
    }
    row["rejected"] = min(row[name]["p"] for name in STATISTICS) < LEVEL / len(STATISTICS)
    return row
