"""The far tails: counted among 10^10 draws and more, and computed exactly by enumeration of the words."""

import math
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from scipy import integrate, special
from torch import Tensor

from benchmarks.noise.generators import Uniforms
from benchmarks.noise.p_values import count_beyond, no_counts
from ddpm_fast.kernels import philox
from ddpm_fast.kernels.philox import Stream

FAR_CUTS = (5.0, 5.5, 6.0, 6.5)
EXACT_CUTS = (4.0, 5.0, 5.5, 6.0, 6.5, 6.7, 6.764)


def radius_word(j: Tensor, ids: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Return the smaller of the two radius words of each counter."""
    words = philox.philox_4x32((j, ids, int(Stream.STEP), 0), (low, high))
    return torch.minimum(words[0], words[2])


def _fastest_radius_word() -> tuple[Callable[..., Tensor], int]:
    """Return `radius_word` and its counters at a time, compiled where there is a compiler and the words agree."""
    j, other = torch.arange(1 << 20)[None], [torch.tensor([[value]]) for value in (3, 5, 7)]
    try:
        compiled = torch.compile(radius_word, dynamic=False)
        agreed = torch.equal(compiled(j, *other), radius_word(j, *other))
    except Exception:  # without a C++ compiler that torch can use, the plain twin serves, more slowly
        agreed = False
    return (compiled, 1 << 20) if agreed else (radius_word, philox._BLOCK)


def far_tails(uniforms: Uniforms, draws: int, fast: bool = True) -> dict[str, Any]:
    """Count |z| beyond FAR_CUTS among Philox's normals, all four lanes, seeds 0, 1, … with 1,000 noise ids each.

    Only a small radius word can pass the first cut, so the rest of Box-Muller, in float64, is for those few alone.
    """
    words_of, block = _fastest_radius_word() if fast else (radius_word, philox._BLOCK)
    limit = uniforms.reach(FAR_CUTS[0]) << (32 - uniforms.bits)
    counts = no_counts(FAR_CUTS)
    j = torch.arange(block)[None]
    blocks = -(-draws // (4 * block))
    started = time.perf_counter()
    for i in range(blocks):
        ids, low, high = (torch.tensor([[value]]) for value in (i % 1000, i // 1000, 0))
        found = (words_of(j, ids, low, high) < limit)[0].nonzero()[:, 0]
        if len(found):
            words = philox.philox_4x32((found[None], ids, int(Stream.STEP), 0), (low, high))
            count_beyond(uniforms.normals(words), counts)
    seconds = time.perf_counter() - started
    total = 4 * block * blocks
    return {"draws": total, "counts": counts, **_rate(total, seconds), "compiled": words_of is not radius_word}


def far_tails_of_randn(draws: int) -> dict[str, Any]:
    """Count |z| beyond FAR_CUTS for torch.randn, of one generator with seed 0."""
    counts = no_counts(FAR_CUTS)
    generator, z, total = torch.Generator().manual_seed(0), torch.empty(1 << 18), 0
    largest = 0.0
    started = time.perf_counter()
    while total < draws:
        torch.randn(z.shape, generator=generator, out=z)
        total += z.numel()
        beyond = z[~(z.abs() <= FAR_CUTS[0])]  # NaN included
        if len(beyond):
            count_beyond(beyond, counts)
            largest = max(largest, float(beyond.abs().max()))
    return {"draws": total, "counts": counts, **_rate(total, time.perf_counter() - started), "largest": largest}


def _rate(draws: int, seconds: float) -> dict[str, float]:
    return {"seconds": round(seconds, 1), "draws_per_second": round(draws / seconds)}


def exact_tail(cut: float, uniforms: Uniforms) -> dict[str, Any]:
    """Return P(|z| > cut) over all pairs of words, exactly, beside 2 (1 - Phi(cut)).

    Each radius word that reaches the cut is taken by itself. Around its four maxima |cosine|, and |sine|, falls for a
    quarter of a turn on both sides, so that bisection on the angle word finds how many pass.
    """
    quarter = 1 << uniforms.bits - 2
    words = torch.arange(uniforms.reach(cut))
    radius, _ = uniforms.polar(words, words)
    radius = radius[radius > cut]
    count = 0
    for function, sign, top in ((torch.cos, 1, 0), (torch.sin, 1, 1), (torch.cos, -1, 2), (torch.sin, -1, 3)):
        for side in (1, -1):
            count += _passing(radius, cut, uniforms, partial(_signed, function, sign), top * quarter, side)
    pairs = 2 << 2 * uniforms.bits  # cosine and sine
    normal = float(2 * special.ndtr(-cut))
    return {
        "cut": cut,
        "radius_words": len(radius),
        "count": count,
        "of": pairs,
        "probability": count / pairs,
        "normal": normal,
        "ratio": count / pairs / normal,
    }


def _signed(function: Callable[[Tensor], Tensor], sign: int, angle: Tensor) -> Tensor:
    return sign * function(angle)


def _passing(radius: Tensor, cut: float, uniforms: Uniforms, f: Callable[[Tensor], Tensor], top: int, side: int) -> int:
    """Return the sum of angle words from `top` on, up or down for a quarter, with radius f(angle) > cut."""
    mask = (1 << uniforms.bits) - 1
    low, high = torch.zeros(len(radius), dtype=torch.int64), torch.full((len(radius),), 1 << uniforms.bits - 2)
    while bool((low < high).any()):  # the first low distances pass, none from high on does
        middle = (low + high) // 2
        word = top + middle if side > 0 else top - 1 - middle
        passes = radius * f(2 * math.pi * uniforms.angle(word & mask).double()) > cut
        low, high = torch.where(passes, middle + 1, low), torch.where(passes, high, middle)
    return int(low.sum())


def lost_cells(cut: float) -> dict[str, float]:
    """Return where our exact tail falls short: the parts of P(|z| > cut) that two cells of the radius word lose.

    Word w stands for the cell of width 2^-32 around its uniform. The first cell reaches down to 0, where the radius has
    no bound, and its uniform stands for all of it; the last is cut through by the radius that equals `cut`.
    """
    cell, last = 2.0**-32, math.exp(-cut * cut / 2)

    def passing(u: float) -> float:  # the share of angles that takes this radius beyond the cut
        radius = math.sqrt(-2 * math.log(u)) if u > 0 else math.inf
        return 2 / math.pi * math.acos(cut / radius) if radius > cut else 0.0

    def lost(left: float, right: float) -> float:
        mass = integrate.quad(lambda v: passing(v * cell), left, right)[0]
        return float((mass - passing((math.floor(left) + 0.5) * cell)) * cell / (2 * float(special.ndtr(-cut))))

    cells = last / cell
    return {
        "lost_in_first_cell": lost(0, min(1, cells)),
        "lost_in_last_cell": lost(math.floor(cells), cells) if cells > 1 else 0.0,  # else it is the first
    }
