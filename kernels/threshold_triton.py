"""The kernel behind `threshold_bound`: an exact quantile by radix selection, one program a sample.

For numbers >= 0 the order of floats is the order of their bits. Four passes find the bits of the lower order statistic,
eight bits in a pass: a pass counts the next eight bits among the numbers that share the bits found so far. A fifth pass
finds the next greater number. Nothing is sorted or stored, the host does not wait, and x and output come from the cache
after the first pass.
"""

import triton
import triton.language as tl
from torch import Tensor

from ddpm_fast.kernels.dispatch import ptx, warps
from ddpm_fast.kernels.launch_triton import launch
from ddpm_fast.kernels.layout import with_layout
from ddpm_fast.kernels.rows_triton import COLUMNS, guide, place, to_float32

BLOCK = 2048  # elements at a time; a program takes a whole sample
INFINITY = tl.constexpr(0x7F800000)  # the bits of infinity: those of NaN are greater
LARGEST = tl.constexpr(0x7FFFFFFF)  # of a number without its sign


@triton.jit
def magnitude_bits(
    x_ptr, p_output, p_unconditional, start, n, a, b, guidance, pixels, channel_stride, pixel_stride,
    GUIDED: tl.constexpr, STRIDED_OUTPUT: tl.constexpr, ONE_WRAP: tl.constexpr, PTX: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Return the bits of |x0| for BLOCK elements, and a mask of the elements that exist."""
    e = start + tl.arange(0, BLOCK)
    mask = e < n
    if STRIDED_OUTPUT:
        o_output = place(start, pixels, channel_stride, pixel_stride, ONE_WRAP, BLOCK)
    else:
        o_output = e
    conditional = tl.load(p_output + o_output, mask=mask)
    if GUIDED:
        out = guide(conditional, tl.load(p_unconditional + o_output, mask=mask), guidance, PTX)
    else:
        out = to_float32(conditional, PTX)
    x0 = a * tl.load(x_ptr + e, mask=mask) + b * out
    return x0.to(tl.int32, bitcast=True) & LARGEST, mask  # tl.abs may leave NaN its sign


@triton.jit(do_not_specialize=["offset", "steps", "below"])
def threshold_kernel(
    x_ptr, output_ptr, coefficients_ptr, base_ptr, guidance_ptr, bound_ptr,
    offset, steps, n, below, weight, max_value, pixels, output_batch, output_channel, output_pixel,
    GUIDED: tl.constexpr, STRIDED_OUTPUT: tl.constexpr, ONE_WRAP: tl.constexpr, PTX: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i_sample = tl.program_id(0)
    row = tl.load(base_ptr + i_sample) + offset
    if (row < 0) | (row >= steps):
        return
    a = tl.load(coefficients_ptr + row * COLUMNS)
    b = tl.load(coefficients_ptr + row * COLUMNS + 1)
    if GUIDED:
        guidance = tl.load(guidance_ptr + i_sample)
    else:
        guidance = 1.0
    p_x = x_ptr + i_sample.to(tl.int64) * n
    p_output = output_ptr + i_sample.to(tl.int64) * output_batch
    p_unconditional = p_output + (tl.num_programs(0)).to(tl.int64) * output_batch

    rank = below  # of the number sought, among those that share the bits found
    prefix = rank * 0
    equal = rank * 0
    bins = tl.arange(0, 256)
    for digit in tl.static_range(4):
        counts = tl.zeros((256,), tl.int32)
        for start in range(0, n, BLOCK):
            bits, mask = magnitude_bits(
                p_x, p_output, p_unconditional, start, n, a, b, guidance, pixels, output_channel, output_pixel,
                GUIDED, STRIDED_OUTPUT, ONE_WRAP, PTX, BLOCK,
            )  # fmt: skip
            if digit > 0:
                mask = mask & ((bits >> (32 - 8 * digit)) == prefix)
            counts += tl.histogram((bits >> (24 - 8 * digit)) & 255, 256, mask=mask)
        reached = tl.cumsum(counts, 0)
        found = tl.sum((reached <= rank).to(tl.int32), 0)
        rank -= tl.sum(tl.where(bins < found, counts, 0), 0)
        equal = tl.sum(tl.where(bins == found, counts, 0), 0)
        prefix = prefix * 256 + found

    above = rank * 0 + LARGEST
    largest = rank * 0
    for start in range(0, n, BLOCK):
        bits, mask = magnitude_bits(
            p_x, p_output, p_unconditional, start, n, a, b, guidance, pixels, output_channel, output_pixel,
            GUIDED, STRIDED_OUTPUT, ONE_WRAP, PTX, BLOCK,
        )  # fmt: skip
        above = tl.minimum(above, tl.min(tl.where(mask & (bits > prefix), bits, LARGEST), 0))
        largest = tl.maximum(largest, tl.max(tl.where(mask, bits, 0), 0))
    # The next order statistic is the same number again, the next greater one, or, after the last or without a weight,
    # not needed: 0 times infinity would be NaN.
    above = tl.where((rank + 1 < equal) | (above == LARGEST) | (weight == 0), prefix, above)
    low = prefix.to(tl.float32, bitcast=True)
    high = above.to(tl.float32, bitcast=True)
    quantile = tl.where(weight < 0.5, low + weight * (high - low), high - (1 - weight) * (high - low))
    # NaN, as between two infinite numbers, must not become 1.
    bound = tl.clamp(quantile, 1.0, max_value, propagate_nan=tl.PropagateNan.ALL)
    bound = tl.where(largest > INFINITY, largest.to(tl.float32, bitcast=True), bound)  # NaN stays NaN
    tl.store(bound_ptr + i_sample, bound)


def threshold_triton(
    x: Tensor,
    output: Tensor,
    coefficients: Tensor,
    base: Tensor,
    offset: int,
    *,
    below: int,
    weight: float,
    max_value: float,
    guidance: Tensor | None,
    bound: Tensor,
) -> Tensor:
    """Launch `threshold_kernel`; the contract is `kernels.threshold.threshold_bound`."""
    output, layout = with_layout(output)
    strided = not layout.row_major
    places = (
        (layout.pixels, layout.batch, layout.channel, layout.pixel) if strided else (None, layout.batch, None, None)
    )
    launch(
        threshold_kernel, (len(x),), (x, output, coefficients, base, guidance, bound),
        (offset, len(coefficients), x[0].numel(), below, weight, max_value, *places),
        GUIDED=guidance is not None,
        STRIDED_OUTPUT=strided, ONE_WRAP=strided and layout.pixels >= BLOCK,
        PTX=ptx(), BLOCK=BLOCK, num_warps=4 * warps(),
    )  # fmt: skip
    return bound
