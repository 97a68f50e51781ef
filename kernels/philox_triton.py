"""Philox-4x32-10 and Box-Muller on the device; `philox.py` says what it computes and holds the PyTorch twin."""

import triton
import triton.language as tl


@triton.jit
def uniform(word):
    # w 2^-32 + 2^-33: the product is exact, so it makes no difference whether the compiler fuses the two
    return word.to(tl.float32) * 2.3283064365386963e-10 + 1.1641532182693481e-10


@triton.jit
def normals4(seed, j, noise_id, stream, visit):
    """Four normals a counter: lanes 0 … 3 of the counters `j` (a block), for one sample."""
    zero = j * 0
    w0, w1, w2, w3 = tl.philox(seed, j, zero + noise_id, zero + stream, zero + visit)
    turn = 6.283185307179586
    # log(1) may come out a hair above 0 in an approximation: the absolute value keeps the root real.
    radius = tl.sqrt(tl.abs(-2.0 * tl.log(uniform(w0))))
    angle = turn * uniform(w1)
    z0 = radius * tl.cos(angle)
    z1 = radius * tl.sin(angle)
    radius = tl.sqrt(tl.abs(-2.0 * tl.log(uniform(w2))))
    angle = turn * uniform(w3)
    z2 = radius * tl.cos(angle)
    z3 = radius * tl.sin(angle)
    return z0, z1, z2, z3


@triton.jit
def pick_lane(lane: tl.constexpr, z0, z1, z2, z3):
    if lane == 0:
        return z0
    elif lane == 1:
        return z1
    elif lane == 2:
        return z2
    else:
        return z3
