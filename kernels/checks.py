"""What the host wrappers check before a launch, in one sentence each."""

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def check_tensor(
    name: str, tensor: Tensor, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...], device: torch.device
) -> None:
    """Raise ValueError unless `tensor` has the shape, one of the dtypes and the device."""
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} must have shape {shape}, got {tuple(tensor.shape)}")
    if tensor.dtype not in dtypes:
        raise ValueError(f"{name} must be one of {[str(dtype) for dtype in dtypes]}, got {tensor.dtype}")
    if tensor.device != device:
        raise ValueError(f"{name} must be on {device}, got {tensor.device}")


def check_contiguous(name: str, tensor: Tensor) -> None:
    """Raise ValueError unless `tensor` is contiguous."""
    if not tensor.is_contiguous():
        raise ValueError(f"{name} must be contiguous, got strides {tensor.stride()} for shape {tuple(tensor.shape)}")


def check_visit(visit: int) -> None:
    """Raise ValueError unless `visit` is an int in [0, 2^31)."""
    if not isinstance(visit, int) or not 0 <= visit < 2**31:
        raise ValueError(f"visit must be an int in [0, 2^31), got {visit!r}")


def check_seeds(seeds: Tensor, batch: int, device: torch.device) -> None:
    """Raise ValueError unless `seeds` is int64 [batch] on `device`."""
    check_tensor("seeds", seeds, (batch,), (torch.int64,), device)
