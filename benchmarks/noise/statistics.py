"""The tests of normals as the sampler gets them: moments, fit, pairs that share a radius, correlations."""

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy import special, stats
from torch import Tensor

from benchmarks.noise.generators import Generator, lanes
from benchmarks.noise.p_values import (
    count_beyond,
    no_counts,
    p_anderson_darling,
    p_largest,
    p_law,
    p_score,
    row,
    tail_rows,
)
from ddpm_fast.kernels.philox import Stream

N = 1 << 18  # elements of one sample: a 4 x 256 x 256 latent; Q = 2^16
LAGS = (1, 2, 3, 16, 64, N // 4)
CELLS = 64  # a side
# Functions of z whose correlations are tested; each has mean 0 and variance 1 under the hypothesis.
TRANSFORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "z": lambda z: z,
    "z^2": lambda z: z.square().sub_(1).mul_(0.5**0.5),
    "|z|": lambda z: z.abs().sub_(math.sqrt(2 / math.pi)).div_(math.sqrt(1 - 2 / math.pi)),
}


class Sizes(NamedTuple):
    """Sizes: the number of draws of each family of tests."""

    draws: int  # moments, tails, lags, lanes
    fit: int  # Kolmogorov-Smirnov, Anderson-Darling
    row: int  # elements of each row of a correlation matrix
    cells: int


BIG = Sizes(1 << 27, 1 << 24, 1 << 19, 1 << 26)
SMALL = Sizes(1 << 22, 1 << 20, 1 << 16, 1 << 22)


def chunks(generator: Generator, draws: int) -> Iterator[Tensor]:
    """Yield chunks [4, N] of the noise of seeds 0, 1, …: four samples at a time, each four at another noise id."""
    for chunk in range(draws // (4 * N)):
        seeds = torch.arange(4 * chunk, 4 * chunk + 4)
        yield generator.draw(seeds, torch.full((4,), chunk % 1000), Stream.STEP, N)


def moments(generator: Generator, sizes: Sizes) -> list[dict[str, Any]]:
    """Test mean, variance, skewness and kurtosis in their standard errors, and the tails at 4 and 5 on each side."""
    powers, total = torch.zeros(4, dtype=torch.float64), 0
    counts = no_counts((4, 5))
    for z in chunks(generator, sizes.draws):
        total += z.numel()
        count_beyond(z, counts)
        z = z.double()
        square = z * z
        powers += torch.stack([z.sum(), square.sum(), (square * z).sum(), square.square().sum()])
    m1, m2, m3, m4 = (powers / total).tolist()
    variance = m2 - m1 * m1
    skewness = (m3 - 3 * m1 * m2 + 2 * m1**3) / variance**1.5
    kurtosis = (m4 - 4 * m1 * m3 + 6 * m1 * m1 * m2 - 3 * m1**4) / variance**2
    known = {
        "mean": (m1, 0, 1),
        "variance": (variance, 1, 2),
        "skewness": (skewness, 0, 6),
        "kurtosis": (kurtosis, 3, 24),
    }
    rows = []
    for name, (value, expected, spread) in known.items():
        score = (value - expected) / math.sqrt(spread / total)
        rows.append(row("moments", name, score, p_score(score), total, value=value, expected=expected))
    return rows + tail_rows("tails at 4 and 5", counts, total)


def fit(generator: Generator, sizes: Sizes) -> list[dict[str, Any]]:
    """Test the fit to N(0, 1) by Kolmogorov-Smirnov and Anderson-Darling."""
    z = torch.cat([chunk.flatten() for chunk in chunks(generator, sizes.fit)]).sort().values.double().numpy()
    n = len(z)
    distance = stats.ks_1samp(z, special.ndtr).statistic
    weights = np.arange(1, 2 * n, 2)
    a2 = -n - weights @ (special.log_ndtr(z) + special.log_ndtr(-z)[::-1]) / n
    return [
        row("fit", "Kolmogorov-Smirnov", distance, p_law(stats.kstwo(n), distance), n),
        row("fit", "Anderson-Darling", a2, p_anderson_darling(a2), n),
    ]


def cells(generator: Generator, sizes: Sizes) -> list[dict[str, Any]]:
    """Test pairs that share a radius by chi-square, in equiprobable cells of the plane."""
    tables: dict[int, Tensor] = {}
    extra = 0.0
    for z in chunks(generator, sizes.cells):
        if bool(z.isnan().any()):  # NaN has no cell
            extra, z = math.nan, z.nan_to_num()
        for i, (a, b) in enumerate(generator.radius_pairs(z)):
            x, y = ((torch.special.ndtr(v.double()) * CELLS).long().clamp_(max=CELLS - 1).flatten() for v in (a, b))
            tables[i] = tables.get(i, 0) + torch.bincount(x * CELLS + y, minlength=CELLS**2)
    rows = []
    for i, table in tables.items():
        pairs = int(table.sum())
        expected = pairs / CELLS**2
        chi2, degrees = float((table - expected).double().square().sum() / expected) + extra, CELLS**2 - 1
        name = f"pair {i}: chi^2 in {CELLS} x {CELLS} cells"
        rows.append(row("shared radius", name, chi2, p_law(stats.chi2(degrees), chi2), 2 * pairs, expected=degrees))
    return rows


def lags(generator: Generator, sizes: Sizes) -> list[dict[str, Any]]:
    """Test the correlation of elements that are some places apart."""
    sums = {(lag, name): 0.0 for lag in LAGS for name in TRANSFORMS}
    samples = 0
    for z in chunks(generator, sizes.draws):
        samples += len(z)
        for name, transform in TRANSFORMS.items():
            x = transform(z.double())
            for lag in LAGS:
                sums[lag, name] += float((x[:, lag:] * x[:, :-lag]).sum())
    rows = []
    for (lag, name), found in sums.items():
        score = found / math.sqrt(samples * (N - lag))
        rows.append(row("lags", f"{name}, lag {'Q' if lag == N // 4 else lag}", score, p_score(score), samples * N))
    return rows


def matrix_rows(family: str, products: dict[str, Tensor], size: int) -> list[dict[str, Any]]:
    """Test the largest correlation and the sum of all squares, of matrices of scores [M, M]."""
    rows = []
    for name, scores in products.items():
        i, k = torch.triu_indices(len(scores), len(scores), 1)
        scores = scores[i, k]
        largest, total = float(scores.abs().max()), float(scores.square().sum())
        rows += [
            row(family, f"{name}, largest of {len(scores)}", largest, p_largest(largest, len(scores)), size),
            row(family, f"{name}, all {len(scores)}", total, p_law(stats.chi2(len(scores)), total), size),
        ]
    return rows


def lane_correlations(generator: Generator, sizes: Sizes) -> list[dict[str, Any]]:
    """Test the four quarters of the samples against each other."""
    products: dict[str, Tensor] = {name: torch.zeros(4, 4, dtype=torch.float64) for name in TRANSFORMS}
    total = 0
    for z in chunks(generator, sizes.draws):
        x = lanes(z).reshape(4, -1).double()
        total += z.numel()
        for name, transform in TRANSFORMS.items():
            m = transform(x)
            products[name] = products[name] + m @ m.T
    return matrix_rows("lanes", {name: found / math.sqrt(total / 4) for name, found in products.items()}, total)


def correlations(family: str, z: Tensor) -> list[dict[str, Any]]:
    """Test the rows of z [M, n] against each other, element by element, and each against the next at every shift."""
    z = z.double()
    count, n = z.shape
    products = {}
    for name, transform in TRANSFORMS.items():
        x = transform(z)
        products[name] = x @ x.T / math.sqrt(n)
    found = matrix_rows(family, products, z.numel())
    peaks = []
    for a, b in itertools.pairwise(z):
        shifted = torch.fft.irfft(torch.fft.rfft(a).conj() * torch.fft.rfft(b), n)
        peaks.append(float(shifted.abs().max()) / math.sqrt(n))
    largest = float(np.max(peaks))  # NaN if one is, unlike max
    shifts = n * (count - 1)
    found.append(row(family, f"z, largest of {shifts} shifts", largest, p_largest(largest, shifts), z.numel()))
    return found


def seeds_apart(generator: Generator, sizes: Sizes) -> list[dict[str, Any]]:
    """Test the seeds 0 … 63."""
    seeds = torch.arange(64)
    z = generator.draw(seeds, torch.full((64,), 3), Stream.STEP, sizes.row)
    return correlations("neighbouring seeds", z)


def bits_apart(generator: Generator, sizes: Sizes) -> list[dict[str, Any]]:
    """Test seed 5 and the seeds that differ from 5 in one bit, 5 + 2^32 among them."""
    seeds = torch.tensor([5] + [5 ^ (1 << bit) for bit in range(63)] + [5 - (1 << 63)])
    z = generator.draw(seeds, torch.full((65,), 3), Stream.STEP, sizes.row)
    return correlations("seeds one bit apart", z)


def steps(generator: Generator, sizes: Sizes) -> list[dict[str, Any]]:
    """Test the noise ids 0 … 63 of one seed."""
    z = generator.draw(torch.full((64,), 11), torch.arange(64), Stream.STEP, sizes.row)
    return correlations("steps", z)


def streams_and_visits(generator: Generator, sizes: Sizes) -> list[dict[str, Any]]:
    """Test four visits of eight streams (more than there are), with one seed and one noise id."""
    seeds, ids, visits = torch.full((4,), 12), torch.full((4,), 0), torch.arange(4)
    z = torch.cat([generator.draw(seeds, ids, which, sizes.row, visits) for which in generator.streams])
    return correlations("streams and visits", z)


FAMILIES: dict[str, Callable[[Generator, Sizes], list[dict[str, Any]]]] = {
    "moments": moments,  # and the tails at 4 and 5
    "fit": fit,
    "shared radius": cells,
    "lanes": lane_correlations,
    "lags": lags,
    "steps": steps,
    "neighbouring seeds": seeds_apart,
    "seeds one bit apart": bits_apart,
    "streams and visits": streams_and_visits,
}


def battery(generator: Generator, sizes: Sizes) -> list[dict[str, Any]]:
    """Run every test but the far tails."""
    return [found for family in FAMILIES.values() for found in family(generator, sizes)]
