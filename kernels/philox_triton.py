"""Philox-4x32-10 and Box-Muller on the device; `philox.py` is the specification and holds the PyTorch twin.

Each function comes in two forms, chosen at compile time. The form PTX uses NVIDIA's approximations of log2, sqrt, sin
and cos, each one instruction, and the 64-bit product, which LLVM would split in two. The portable form (PTX = False)
serves AMD and Triton's interpreter. By their documented errors, NVIDIA's approximations move a normal by less than 6e-4
where the radius is below 0.04 (one draw in 1,250) and by less than 1.2e-5 elsewhere
(tests/kernels/test_approximations.py). The portable form moves a normal by at most 4e-6.
"""

import triton
import triton.language as tl

ROOT = tl.constexpr(1.1774100225154747)  # sqrt(2 ln 2): sqrt(-2 ln u) = ROOT sqrt(-log2 u)
TURN = tl.constexpr(6.283185307179586)


@triton.jit
def tie(j, loaded):
    """Return `j` in the layout in which `loaded` (float32, of the same shape) was loaded.

    Without this function, Triton computes one element of the noise in a thread and carries the noise through shared
    memory to the loads, which have four elements in a thread. A bit pattern with its last bit set is never 0: LLVM
    knows this, Triton's passes do not.
    """
    return tl.where((loaded.to(tl.int32, bitcast=True) | 1) == 0, 0, j)


@triton.jit
def multiply_wide(a, m: tl.constexpr, PTX: tl.constexpr):
    """Return the high and the low word of a m, as uint32."""
    if PTX:
        low, high = tl.inline_asm_elementwise(
            "{ .reg .b64 p; mul.wide.u32 p, $2, $3; mov.b64 {$0, $1}, p; }",
            "=r,=r,r,r",
            [a, tl.full((), m, tl.uint32)],
            dtype=(tl.uint32, tl.uint32),
            is_pure=True,
            pack=1,
        )
    else:
        high = tl.umulhi(a, m)
        low = a * m
    return high, low


@triton.jit
def philox_4x32(seed, j, noise_id, stream, visit, PTX: tl.constexpr):
    """Return four words (uint32) for each of the counters `j`: ten rounds of Philox-4x32."""
    k0 = seed.to(tl.uint32)
    k1 = (seed >> 32).to(tl.uint32)
    c0 = j.to(tl.uint32)
    c1 = k0 * 0 + noise_id  # a number that is compiled in becomes a word, too
    c2 = k0 * 0 + stream
    c3 = k0 * 0 + visit
    for _ in tl.static_range(10):
        high0, low0 = multiply_wide(c0, 0xD2511F53, PTX)
        high1, low1 = multiply_wide(c2, 0xCD9E8D57, PTX)
        c0 = high1 ^ c1 ^ k0
        c1 = low1
        c2 = high0 ^ c3 ^ k1
        c3 = low0
        k0 += 0x9E3779B9
        k1 += 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def uniform(word):
    # w 2^-32 + 2^-33: the product is exact, so that a fused multiply-add gives the same number
    return word.to(tl.float32) * 2.3283064365386963e-10 + 1.1641532182693481e-10


@triton.jit
def radius(word, PTX: tl.constexpr):
    """Return sqrt(-log2 u) for the uniform of `word`."""
    if PTX:
        # lg2.approx may be slightly above 0 near u = 1: the absolute value keeps the root real.
        return tl.inline_asm_elementwise(
            "{ .reg .f32 t; lg2.approx.ftz.f32 t, $1; abs.f32 t, t; sqrt.approx.ftz.f32 $0, t; }",
            "=f,f",
            [uniform(word)],
            dtype=tl.float32,
            is_pure=True,
            pack=1,
        )
    else:
        return tl.sqrt(tl.abs(tl.log(uniform(word))) * 1.4426950408889634)


@triton.jit
def direction(word, PTX: tl.constexpr):
    """Return cos and sin of 2 pi u for the uniform of `word`."""
    if PTX:
        angle = word.to(tl.float32) * (TURN * 2.0**-32) + TURN * 2.0**-33
        cosine = tl.inline_asm_elementwise(
            "cos.approx.ftz.f32 $0, $1;", "=f,f", [angle], dtype=tl.float32, is_pure=True, pack=1
        )
        sine = tl.inline_asm_elementwise(
            "sin.approx.ftz.f32 $0, $1;", "=f,f", [angle], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        # Quarter turns are subtracted exactly; the rest, within pi/4, goes to the polynomials of Cephes' sinf and cosf.
        u = uniform(word)
        quarters = tl.floor(u * 4 + 0.5)
        x = (u - quarters * 0.25) * TURN
        square = x * x
        s = ((-1.9515295891e-4 * square + 8.3321608736e-3) * square - 1.6666654611e-1) * square * x + x
        c = ((2.443315711809948e-5 * square - 1.388731625493765e-3) * square + 4.166664568298827e-2) * square * square
        c = c - 0.5 * square + 1
        quarters = quarters.to(tl.int32)
        odd = (quarters & 1) == 1
        cosine = tl.where(odd, s, c)
        sine = tl.where(odd, c, s)
        cosine = tl.where(((quarters + 1) & 2) == 2, -cosine, cosine)
        sine = tl.where((quarters & 2) == 2, -sine, sine)
    return cosine, sine


@triton.jit
def polar4(seed, j, noise_id, stream, visit, scale, PTX: tl.constexpr):
    """Return scale z for the four lanes of the counters `j`, as radii and directions: lane k is radii[k] directions[k].

    Left as two factors, so that the last product becomes part of a multiply-add where the noise is added.
    """
    w0, w1, w2, w3 = philox_4x32(seed, j, noise_id, stream, visit, PTX)
    scale = scale * ROOT
    radius01 = scale * radius(w0, PTX)
    radius23 = scale * radius(w2, PTX)
    cosine0, sine1 = direction(w1, PTX)
    cosine2, sine3 = direction(w3, PTX)
    return (radius01, radius01, radius23, radius23), (cosine0, sine1, cosine2, sine3)
