"""The kernel behind `to_uint8`."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ddpm_fast.kernels.dispatch import warps
from ddpm_fast.kernels.launch_triton import launch
from ddpm_fast.kernels.layout import with_layout
from ddpm_fast.kernels.tile_triton import ROWS, sample_index

BLOCK = 1024  # bytes of a program
HALF_EVEN = tl.constexpr(12582912.0)  # 1.5 2^23: adding it leaves no bits for a fraction, so the sum rounds to even


@triton.jit(do_not_specialize=["batch"])
def to_uint8_kernel(
    x_ptr, bytes_ptr, batch, size, batch_stride, channel_stride, pixel_stride,
    CHANNELS: tl.constexpr,
    ROUND: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Write BLOCK consecutive bytes of one image, whose size is pixels · CHANNELS."""
    i_sample = sample_index()
    if i_sample >= batch:
        return
    o_byte = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = o_byte < size
    pixel = o_byte // CHANNELS
    channel = o_byte - pixel * CHANNELS
    p_sample = x_ptr + i_sample.to(tl.int64) * batch_stride
    x = tl.load(p_sample + (channel.to(tl.int64) * channel_stride + pixel.to(tl.int64) * pixel_stride), mask=mask)
    x = x.to(tl.float32)
    # Without propagate_nan the maximum of NaN and 0 is 0.
    if ROUND:
        value = tl.minimum(tl.maximum(x * 0.5 + 0.5, 0.0), 1.0) * 255
        value = (value + HALF_EVEN) - HALF_EVEN
    else:
        value = tl.minimum(tl.maximum((x + 1) * 127.5, 0.0), 255.0)
    tl.store(bytes_ptr + i_sample.to(tl.int64) * size + o_byte, value.to(tl.uint8), mask=mask)


def to_uint8_triton(x: Tensor, *, rounding: str = "round") -> Tensor:
    """Launch `to_uint8_kernel`; the contract is `kernels.to_uint8.to_uint8`."""
    batch, channels, height, width = x.shape
    x, layout = with_layout(x)
    result = torch.empty(batch, height, width, channels, dtype=torch.uint8, device=x.device)
    size = channels * height * width
    launch(
        to_uint8_kernel, (triton.cdiv(size, BLOCK), min(batch, ROWS.value), triton.cdiv(batch, ROWS.value)),
        (x, result), (batch, size, layout.batch, layout.channel, layout.pixel),
        CHANNELS=channels, ROUND=rounding == "round", BLOCK=BLOCK, num_warps=2 * warps(),
        enable_fp_fusion=False,  # fused, value * 255 + HALF_EVEN rounds once: another byte at some halves
    )  # fmt: skip
    return result
