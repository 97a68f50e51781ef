"""Checks of a launch: each error says in one sentence what is wrong."""

from collections.abc import Mapping

import torch
from torch import Tensor

from ddpm_fast.kernels.layout import layout_of

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def check_tensor(
    name: str, tensor: Tensor, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...], device: torch.device
) -> None:
    """Raise ValueError unless `tensor` has the shape, one of the dtypes and the device, and its memory its values."""
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} must have shape {shape}, got {tuple(tensor.shape)}")
    if tensor.dtype not in dtypes:
        raise ValueError(f"{name} must be one of {[str(dtype) for dtype in dtypes]}, got {tensor.dtype}")
    if tensor.device != device:
        raise ValueError(f"{name} must be on {device}, got {tensor.device}")
    if tensor.is_neg():  # as the imaginary part of a conjugate has: torch changes the sign when it reads
        raise ValueError(f"{name} must hold its values themselves, not their negatives: pass {name}.resolve_neg()")


def check_contiguous(name: str, tensor: Tensor) -> None:
    """Raise ValueError unless `tensor` is contiguous."""
    if not tensor.is_contiguous():
        raise ValueError(f"{name} must be contiguous, got strides {tensor.stride()} for shape {tuple(tensor.shape)}")


def check_writable(name: str, tensor: Tensor) -> None:
    """Raise ValueError unless every element of `tensor`, [B, C, ...], has its own place that three strides reach."""
    layout = layout_of(tensor)
    if layout is None or layout.overlaps_itself(len(tensor)):
        raise ValueError(
            f"{name} must be contiguous, channels_last or the like, "
            f"got strides {tensor.stride()} for shape {tuple(tensor.shape)}"
        )


def check_disjoint(
    written: Mapping[str, Tensor | None], read: Mapping[str, Tensor | None], in_place: tuple[str, str]
) -> None:
    """Raise ValueError if a tensor that is written shares memory with another: programs run in any order.

    The pair `in_place` may be the same tensor, as a whole: each element is read before it is written, by its thread.
    """
    named = {name: tensor for name, tensor in {**written, **read}.items() if tensor is not None}
    spans = {name: span(tensor) for name, tensor in named.items()}
    for name in written:
        for other in named:
            if name not in named or name == other or ((name, other) == in_place and spans[name] == spans[other]):
                continue
            if spans[name][0] < spans[other][1] and spans[other][0] < spans[name][1]:
                raise ValueError(f"{name} must not share memory with {other}")


def span(tensor: Tensor) -> tuple[int, int]:
    """Return the address of the tensor's first byte, and the address behind its last."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()


def check_visit(visit: int) -> None:
    """Raise ValueError unless `visit` is an int in [0, 2^31)."""
    if not isinstance(visit, int) or not 0 <= visit < 2**31:
        raise ValueError(f"visit must be an int in [0, 2^31), got {visit!r}")


def check_seeds(seeds: Tensor, batch: int, device: torch.device) -> None:
    """Raise ValueError unless `seeds` is int64 [batch] on `device`."""
    check_tensor("seeds", seeds, (batch,), (torch.int64,), device)
