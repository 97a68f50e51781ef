"""Images from samples: [-1, 1] to bytes, channels last."""

import torch
from torch import Tensor

from ddpm_fast.kernels.checks import check_tensor
from ddpm_fast.kernels.dispatch import choose_backend, on_device

ROUNDINGS = ("round", "truncate")


def to_uint8(x: Tensor, *, rounding: str = "round", backend: str | None = None) -> Tensor:
    """Map x in [-1, 1] to bytes: uint8 [B, H, W, C] from [B, C, H, W], values outside clipped, computed in float32.

    NaN becomes 0.

    Args:
        x: Samples, float32, float16 or bfloat16 [B, C, H, W], in any strides.
        rounding: "round" computes round(clamp(x / 2 + 1/2, 0, 1) 255), halves to even (diffusers); "truncate" computes
            floor(clamp((x + 1) 127.5, 0, 255)) (guided-diffusion).
        backend: "triton" or "torch"; None chooses by device.

    Raises:
        ValueError: x is no such tensor, or the rounding is unknown.
    """
    if x.dim() != 4 or x.numel() == 0:
        raise ValueError(f"x must be a non-empty [B, C, H, W] tensor, got shape {tuple(x.shape)}")
    check_tensor("x", x, tuple(x.shape), (torch.float32, torch.float16, torch.bfloat16), x.device)
    if rounding not in ROUNDINGS:
        raise ValueError(f"rounding must be one of {list(ROUNDINGS)}, got {rounding!r}")
    if choose_backend(x.device, backend) == "torch":
        return to_uint8_torch(x, rounding=rounding)
    from ddpm_fast.kernels.to_uint8_triton import to_uint8_triton

    with on_device(x.device):
        return to_uint8_triton(x, rounding=rounding)


def to_uint8_torch(x: Tensor, *, rounding: str = "round") -> Tensor:
    """Map to bytes on PyTorch: the twin of `to_uint8`; float64 is not rounded to float32."""
    x = x.permute(0, 2, 3, 1)
    x = x if x.dtype == torch.float64 else x.float()
    zero = x.new_zeros(())  # fmax takes the number where the other value is NaN
    if rounding == "round":
        bytes_ = (x / 2 + 0.5).fmax(zero).clamp_(max=1).mul_(255).round_()
    else:
        bytes_ = (x + 1).mul_(127.5).fmax(zero).clamp_(max=255)
    return bytes_.to(torch.uint8).contiguous()
