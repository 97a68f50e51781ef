"""The kernel behind `to_uint8`."""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024
HALF_EVEN = tl.constexpr(12582912.0)  # 1.5 2^23: adding it leaves no bits for a fraction, so the sum rounds to even


@triton.jit
def to_uint8_kernel(x_ptr, bytes_ptr, channels, pixels, total, ROUND: tl.constexpr, BLOCK: tl.constexpr):
    """One program writes BLOCK consecutive bytes of the [B, pixels, C] result."""
    o_byte = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = o_byte < total
    channel = o_byte % channels
    pixel = o_byte // channels % pixels
    sample = o_byte // channels // pixels
    x = tl.load(x_ptr + (sample * channels + channel) * pixels + pixel, mask=mask)
    if ROUND:
        value = tl.minimum(tl.maximum(x * 0.5 + 0.5, 0.0), 1.0) * 255
        value = (value + HALF_EVEN) - HALF_EVEN
    else:
        value = tl.minimum(tl.maximum((x + 1) * 127.5, 0.0), 255.0)
    tl.store(bytes_ptr + o_byte, value.to(tl.uint8), mask=mask)


def to_uint8_triton(x: Tensor, *, rounding: str = "round") -> Tensor:
    """Launch `to_uint8_kernel`; the contract is `kernels.to_uint8.to_uint8`."""
    batch, channels, height, width = x.shape
    result = torch.empty(batch, height, width, channels, dtype=torch.uint8, device=x.device)
    total = x.numel()
    to_uint8_kernel[(triton.cdiv(total, BLOCK),)](
        x, result, channels, height * width, total, ROUND=rounding == "round", BLOCK=BLOCK,
        enable_fp_fusion=False,  # fused, value * 255 + HALF_EVEN rounds once: another byte at some halves
    )  # fmt: skip
    return result
