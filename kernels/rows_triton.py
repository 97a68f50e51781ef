"""What the kernels of the step, the threshold and the rounds share: the x0 prediction, guidance, places in memory."""

import triton
import triton.language as tl
from torch import Tensor

from ddpm_fast.kernels.philox import Stream
from ddpm_fast.kernels.rows import COLUMNS as NAMES

COLUMNS = tl.constexpr(len(NAMES))
STEP = tl.constexpr(int(Stream.STEP))


@triton.jit
def to_float32(values, PTX: tl.constexpr):
    if PTX and values.dtype == tl.bfloat16:
        # One instruction for each of two numbers; Triton's own conversion takes three for the pair.
        return tl.inline_asm_elementwise(
            "shl.b32 $0, $2, 16;\nand.b32 $1, $2, 0xffff0000;", "=r,=r,r", [values],
            dtype=tl.float32, is_pure=True, pack=2,
        )  # fmt: skip
    else:
        return values.to(tl.float32)


@triton.jit
def guide(out, unconditional, guidance, PTX: tl.constexpr):
    """Return the guided output, from both halves as the network stored them."""
    unconditional = to_float32(unconditional, PTX)
    return unconditional + guidance * (to_float32(out, PTX) - unconditional)


@triton.jit
def predict_x0(x, out, a, b, limit, CLIP: tl.constexpr):
    """Return the x0 prediction, raw and clipped."""
    raw = a * x + b * out
    x0 = raw
    if CLIP != "none":
        x0 = tl.clamp(raw, -limit, limit, propagate_nan=tl.PropagateNan.ALL)
    if CLIP == "bound":
        x0 = x0 / limit
    return raw, x0


@triton.jit
def place(first, pixels, channel_stride, pixel_stride, ONE_WRAP: tl.constexpr, BLOCK: tl.constexpr):
    """Return where the BLOCK elements from `first` on, row-major in a sample, lie in memory with these strides."""
    channel = first // pixels
    pixel = first - channel * pixels + tl.arange(0, BLOCK)
    if ONE_WRAP:
        wraps = (pixel >= pixels).to(tl.int32)
    else:
        wraps = pixel // pixels
    pixel -= wraps * pixels
    inner = wraps.to(tl.int64) * channel_stride + pixel.to(tl.int64) * pixel_stride
    return channel.to(tl.int64) * channel_stride + inner


@triton.jit
def place4(begins, start, pixels, channel_stride, pixel_stride, ONE_WRAP: tl.constexpr, BLOCK: tl.constexpr):
    """Return `place` for the four lanes of the block at counter `start`."""
    return (
        place(begins[0] + start, pixels, channel_stride, pixel_stride, ONE_WRAP, BLOCK),
        place(begins[1] + start, pixels, channel_stride, pixel_stride, ONE_WRAP, BLOCK),
        place(begins[2] + start, pixels, channel_stride, pixel_stride, ONE_WRAP, BLOCK),
        place(begins[3] + start, pixels, channel_stride, pixel_stride, ONE_WRAP, BLOCK),
    )


def clip_form(clip: float | None, bound: Tensor | None) -> str:
    """Return the CLIP of a kernel."""
    return "bound" if bound is not None else "fixed" if clip is not None else "none"
