"""The generators of the battery: ours, torch.randn, and ours with one defect planted in each."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from scipy import special
from torch import Tensor

from ddpm_fast.kernels import philox
from ddpm_fast.kernels.philox import Stream


class Uniforms(NamedTuple):
    """A rule that turns the top `bits` bits of a 32-bit word into uniforms of Box-Muller; both maps are monotone."""

    bits: int
    radius: Callable[[Tensor], Tensor]
    angle: Callable[[Tensor], Tensor]

    def reach(self, cut: float) -> int:
        """Return a word from which on no word has a radius beyond `cut`."""
        return int(math.exp(-cut * cut / 2) * 2**self.bits) + 2

    def polar(self, radius_word: Tensor, angle_word: Tensor) -> tuple[Tensor, Tensor]:
        """Return radius and angle in float64, from words of `bits` bits."""
        u, v = self.radius(radius_word).double(), self.angle(angle_word).double()
        return (-2 * u.log()).abs().sqrt(), 2 * math.pi * v

    def normals(self, words: tuple[Tensor, ...]) -> Tensor:
        """Return Box-Muller's normals in float64, as in philox.py, from four words of 32 bits: [4, …]."""
        z = []
        for pair in (0, 2):
            radius, angle = self.polar(*(word >> (32 - self.bits) for word in words[pair : pair + 2]))
            z += [radius * angle.cos(), radius * angle.sin()]
        return torch.stack(z)


OURS = Uniforms(32, philox.uniform, philox.uniform)
# torch.randn on a CPU, float32: 24 bits, the radius from 1 - u (ATen, DistributionTemplates.h, normal_fill).
TORCH = Uniforms(24, lambda w: (w + 1).float() * 2.0**-24, lambda w: w.float() * 2.0**-24)
# Clamped as tl.randn clamps.
CLAMPED = Uniforms(23, lambda w: (w.float() * 2.0**-23).clamp(min=1e-7), lambda w: w.float() * 2.0**-23)
COARSE_ANGLES = Uniforms(32, philox.uniform, lambda w: ((w >> 24).float() + 0.5) / 256)


class Generator(NamedTuple):
    """A source of normals: `draw(seeds [M], noise ids [M], stream, n, visit)` gives float32 [M, n].

    `radius_pairs(z [M, n])` gives the pairs of elements that share a radius, as [pairs, 2, …].
    """

    name: str
    draw: Callable[..., Tensor]
    radius_pairs: Callable[[Tensor], Tensor]
    uniforms: Uniforms | None = None  # of a generator whose far tails are counted
    streams: tuple[int, ...] = tuple(range(8))
    caught_by: str = ""  # the family of tests that must reject a planted generator


def lanes(z: Tensor) -> Tensor:
    """Return [M, n] as [4, M, n / 4], for n a multiple of 64."""
    return z.view(len(z), 4, -1).transpose(0, 1)


def _lane_pairs(z: Tensor) -> Tensor:
    a, b, c, d = lanes(z)
    return torch.stack([torch.stack([a, b]), torch.stack([c, d])])


def _torch_pairs(z: Tensor) -> Tensor:
    return z.reshape(-1, 2, 8).transpose(0, 1)[None]


def draw_torch(seeds: Tensor, ids: Tensor, stream: int, n: int, visit: Tensor | int = 0) -> Tensor:
    """Draw with torch.randn, which has no counter: each row is the next n numbers of its seed's generator."""
    generators: dict[int, torch.Generator] = {}
    z = torch.empty(len(seeds), n)
    for row, seed in zip(z, seeds.tolist(), strict=True):
        if seed not in generators:
            generators[seed] = torch.Generator().manual_seed(seed & (2**64 - 1))
        torch.randn(n, generator=generators[seed], out=row)
    return z


def draw_with(uniforms: Uniforms, order: tuple[int, ...] = (0, 1, 2, 3)) -> Callable[..., Tensor]:
    """Draw philox.normals from other uniforms, or from some words of each counter instead of all four."""

    def draw(seeds: Tensor, ids: Tensor, stream: int, n: int, visit: Tensor | int = 0) -> Tensor:
        z = torch.empty(len(seeds), 4, philox.quarter(n))
        visits = torch.as_tensor(visit).expand(len(seeds))
        for i, seed in enumerate(seeds.tolist()):
            counter = torch.arange(z.shape[2]), ids[i], int(stream), visits[i]
            words = philox.philox_4x32(counter, (seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF))
            z[i] = uniforms.normals(tuple(words[k] for k in order))
        return z.view(len(seeds), -1)[:, :n]

    return draw


def _overlapping_seeds(seeds: Tensor, ids: Tensor, stream: int, n: int, visit: Tensor | int = 0) -> Tensor:
    """Draw noise in which seed s + 1 is seed s, shifted by one element."""
    visits = torch.as_tensor(visit).expand(len(seeds))
    zero = torch.zeros(1, dtype=torch.int64)
    rows = []
    for i, seed in enumerate(seeds.tolist()):
        shift = seed % 4096
        rows.append(philox.normals(zero, ids[i : i + 1], stream, n + shift, visits[i : i + 1])[0, shift:])
    return torch.stack(rows)


def _variance(seeds: Tensor, ids: Tensor, stream: int, n: int, visit: Tensor | int = 0) -> Tensor:
    return philox.normals(seeds, ids, stream, n, visit) * math.sqrt(1.001)


def _heavy_tailed(seeds: Tensor, ids: Tensor, stream: int, n: int, visit: Tensor | int = 0) -> Tensor:
    """Draw one in a thousand from N(0, 4), all scaled to variance 1."""
    z = philox.normals(seeds, ids, stream, n, visit)
    chosen = philox.normals(seeds, ids, stream, n, visit + (1 << 20)) > special.ndtri(0.999)
    return torch.where(chosen, 2 * z, z) / math.sqrt(1.003)


def _neighbours_mixed(seeds: Tensor, ids: Tensor, stream: int, n: int, visit: Tensor | int = 0) -> Tensor:
    """Draw normals with a correlation of 0.005 between neighbouring elements."""
    z = philox.normals(seeds, ids, stream, n, visit)
    return (z + 0.005 * z.roll(1, 1)) / math.sqrt(1 + 0.005**2)


def _bfloat16(seeds: Tensor, ids: Tensor, stream: int, n: int, visit: Tensor | int = 0) -> Tensor:
    return philox.normals(seeds, ids, stream, n, visit).bfloat16().float()


def _high_word_dropped(seeds: Tensor, ids: Tensor, stream: int, n: int, visit: Tensor | int = 0) -> Tensor:
    return philox.normals(seeds & 0xFFFFFFFF, ids, stream, n, visit)


def _steps_twice(seeds: Tensor, ids: Tensor, stream: int, n: int, visit: Tensor | int = 0) -> Tensor:
    return philox.normals(seeds, ids >> 1, stream, n, visit)


def _visits_ignored(seeds: Tensor, ids: Tensor, stream: int, n: int, visit: Tensor | int = 0) -> Tensor:
    return philox.normals(seeds, ids, stream, n)


PHILOX = Generator("ddpm_fast", philox.normals, _lane_pairs, OURS)
RANDN = Generator("torch.randn", draw_torch, _torch_pairs, TORCH, (Stream.STEP,))  # torch.randn has no streams
PLANTED = [
    Generator("uniforms of 23 bits, clamped at 1e-7", draw_with(CLAMPED), _lane_pairs, CLAMPED, caught_by="far tails"),
    Generator("seed s + 1 is seed s, one element on", _overlapping_seeds, _lane_pairs, caught_by="neighbouring seeds"),
    Generator("a variance of 1.001", _variance, _lane_pairs, caught_by="moments"),
    Generator("lanes 2 and 3 reuse a radius", draw_with(OURS, (0, 1, 0, 3)), _lane_pairs, caught_by="lanes"),
    Generator("one in a thousand from N(0, 4)", _heavy_tailed, _lane_pairs, caught_by="tails at 4 and 5"),
    Generator("rounded to bfloat16", _bfloat16, _lane_pairs, caught_by="fit"),
    Generator("neighbours correlated by 0.005", _neighbours_mixed, _lane_pairs, caught_by="lags"),
    Generator("the seed's high word dropped", _high_word_dropped, _lane_pairs, caught_by="seeds one bit apart"),
    Generator("every noise id twice", _steps_twice, _lane_pairs, caught_by="steps"),
    Generator("visits ignored", _visits_ignored, _lane_pairs, caught_by="streams and visits"),
    Generator("angles of 8 bits", draw_with(COARSE_ANGLES), _lane_pairs, caught_by="shared radius"),
]
