"""Noise as a function of (seed, noise id, stream, visit, element), and of nothing else.

This page is a file format: whoever changes it changes every image.

Philox-4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3") turns a counter of four 32-bit
words and a key of two into four random words:

    key     = (seed mod 2^32, seed div 2^32)
    counter = (j, noise id, stream, visit)

`j` counts the quarter of a sample's n elements. With Q = ceil(n / 4) rounded up to a multiple of 16, the element e
(row-major within the sample, whatever the memory format) is lane e div Q of counter j = e mod Q, so that a program
reads and writes four contiguous runs. Word w becomes the uniform u = w 2^-32 + 2^-33, rounded to float32 once (the
conversion of w) and once more (the sum), in every precision: never 0, and 1 only for the top 128 words. Words
(0, 1) and (2, 3) are (radius, angle) pairs of Box & Muller (1958), cosine first:

    lane 0: sqrt(-2 ln u0) cos(2 pi u1)        lane 2: sqrt(-2 ln u2) cos(2 pi u3)
    lane 1: sqrt(-2 ln u0) sin(2 pi u1)        lane 3: sqrt(-2 ln u2) sin(2 pi u3)

so |z| <= sqrt(66 ln 2) = 6.764. This file is the PyTorch twin; `philox_triton.py` is the same on the device.
"""

import enum
import math

import torch
from torch import Tensor


class Stream(enum.IntEnum):
    """Streams, the third word of the counter: what the noise is for."""

    X_T = 0  # the start of a run; noise id 0
    STEP = 1  # the steps of a run
    FORWARD = 2  # q_sample
    INPAINT = 3  # the known image, noised to the level of the step
    FORWARD_STEP = 4  # q_step
    ACCEPT = 5  # speculative sampling's tests: the first word of counter j = 0, as a uniform


_MASK = 0xFFFFFFFF
_MULTIPLIER = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_BLOCK = 1 << 14  # counters worked on at once, so that their words stay in the cache (best of 2^12 … 2^16 on a CPU)


def quarter(n: int) -> int:
    """Return Q, the counters that a sample of n elements needs: ceil(n / 4) rounded up to a multiple of 16."""
    return -(-n // 64) * 16


def philox_4x32(counter: tuple[Tensor | int, ...], key: tuple[Tensor | int, Tensor | int]) -> tuple[Tensor, ...]:
    """Apply ten rounds of Philox-4x32 to int64 tensors (or ints) that hold 32-bit words; all broadcast together."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # The 64-bit products wrap; their high words come out right once the sign extension is masked off. The low
        # words are the products themselves: the bits above 32 are masked only where a word is multiplied again.
        p0, p1 = c0 * _MULTIPLIER[0], c2 * _MULTIPLIER[1]
        c0, c1, c2, c3 = _mix(p1, c1, k0), p1, _mix(p0, c3, k1), p0
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1 & _MASK, c2, c3 & _MASK  # type: ignore[return-value]


def _mix(product: Tensor | int, word: Tensor | int, key: Tensor | int) -> Tensor | int:
    return ((product >> 32) ^ word ^ key) & _MASK


def key_of(seeds: Tensor) -> tuple[Tensor, Tensor]:
    """Return the two words of every seed's key: int64 [M, 1] each."""
    return (seeds & _MASK)[:, None], (seeds >> 32 & _MASK)[:, None]


def uniform(word: Tensor) -> Tensor:
    """Map 32-bit words (int64) to float32 uniforms in (0, 1]."""
    return word.float().mul_(2.0**-32).add_(2.0**-33)


def normals(
    seeds: Tensor, noise_ids: Tensor, stream: int, n: int, visit: Tensor | int = 0, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Return standard normals of M samples, [M, n], in `dtype` (float32 or float64; the uniforms are float32 in both).

    Args:
        seeds: The seeds' 64 bits, int64 [M].
        noise_ids: Noise ids, integers [M].
        stream: A `Stream`.
        n: Elements of one sample.
        visit: How often each sample has drawn at its noise id before: an int, or integers [M].
        dtype: Dtype of the result.
    """
    q = quarter(n)
    z = torch.empty(len(seeds), 4, q, dtype=dtype, device=seeds.device)
    key = key_of(seeds)
    ids = noise_ids.long()[:, None]
    visits = visit.long()[:, None] if isinstance(visit, Tensor) else visit
    used = min(q, n)  # a sample of fewer elements has one lane, and that is not full
    rows = max(1, _BLOCK // used)
    for start in range(0, len(seeds), rows):
        part = slice(start, start + rows)
        for left in range(0, used, _BLOCK):
            right = min(left + _BLOCK, used)
            j = torch.arange(left, right, dtype=torch.int64, device=seeds.device)[None]
            visited = visits[part] if isinstance(visits, Tensor) else visits
            words = philox_4x32((j, ids[part], int(stream), visited), (key[0][part], key[1][part]))
            _box_muller(words, z[part, :, left:right])
    return z.view(len(seeds), 4 * q)[:, :n].contiguous()


def _box_muller(words: tuple[Tensor, ...], z: Tensor) -> None:
    for pair in (0, 2):
        radius = uniform(words[pair]).to(z.dtype).log_().mul_(-2).abs_().sqrt_()
        angle = uniform(words[pair + 1]).to(z.dtype).mul_(2 * math.pi)
        torch.mul(radius, angle.cos(), out=z[:, pair])
        torch.mul(radius, angle.sin_(), out=z[:, pair + 1])
