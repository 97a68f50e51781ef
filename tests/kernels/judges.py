"""Independent computations to judge by, in plain Python and numpy float64: nothing here imports the package."""

import functools
import math

import numpy as np

MASK = 0xFFFFFFFF
EPS = 2.0**-24  # half the distance from 1 to the next float32: the relative error of one rounding


def philox_4x32_10(counter, key):
    """Philox-4x32-10 as its paper draws it, on Python integers."""
    c, k = list(counter), list(key)
    for _ in range(10):
        high0, low0 = divmod(0xD2511F53 * c[0], 1 << 32)
        high1, low1 = divmod(0xCD9E8D57 * c[2], 1 << 32)
        c = [high1 ^ c[1] ^ k[0], low1, high0 ^ c[3] ^ k[1], low0]
        k = [(k[0] + 0x9E3779B9) & MASK, (k[1] + 0xBB67AE85) & MASK]
    return tuple(c)


def uniform(word):
    """w 2^-32 + 2^-33 in float32: the word is rounded, the product is exact, the sum is rounded."""
    return float(np.float32(np.float32(word) * np.float32(2.0**-32)) + np.float32(2.0**-33))


@functools.lru_cache(maxsize=64)
def noise(seed, noise_id, stream, visit, n):
    """The n normals of one sample, element by element: float64 [n]."""
    key = (seed & MASK, seed >> 32 & MASK)
    quarter = math.ceil(math.ceil(n / 4) / 16) * 16
    z = np.empty(n)
    for j in range(min(quarter, n)):
        u = [uniform(word) for word in philox_4x32_10((j, noise_id & MASK, stream, visit & MASK), key)]
        for lane in range(4):
            if lane * quarter + j < n:
                radius = math.sqrt(-2 * math.log(u[lane // 2 * 2]))
                angle = 2 * math.pi * u[lane // 2 * 2 + 1]
                z[lane * quarter + j] = radius * (math.cos(angle) if lane % 2 == 0 else math.sin(angle))
    z.flags.writeable = False
    return z
