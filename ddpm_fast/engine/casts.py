"""Casts of weights that autocast would make anew in every call."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

# Functions whose floating point arguments autocast casts, on a CPU and on a GPU, and that read weights.
_LOWERED = frozenset((
    F.linear, F.conv1d, F.conv2d, F.conv3d, F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d,
    torch.matmul, torch.mm, torch.bmm, torch.addmm, torch.baddbmm,
    Tensor.matmul, Tensor.mm, Tensor.bmm, Tensor.__matmul__, Tensor.__rmatmul__,
))  # fmt: skip
_CAST = (torch.float32, torch.float16, torch.bfloat16)  # autocast leaves double precision alone


class Casts(TorchFunctionMode):
    """A mode in which functions that autocast lowers read casts of the weights that are kept from call to call.

    The mode does what autocast's own cache does, but the casts outlive the context, so that a recorded graph may read
    them; they follow the weights. Calls that record gradients make casts of their own.

    Args:
        dtype: Dtype of the surrounding autocast.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        self._kept: dict[int, tuple[nn.Parameter, tuple[int, int], Tensor]] = {}

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _LOWERED and not torch.is_grad_enabled() and not torch.compiler.is_compiling():
            args = [self._lowered(each) for each in args]
            kwargs = {name: self._lowered(each) for name, each in kwargs.items()}
        return func(*args, **kwargs)

    def refresh(self) -> None:
        """Cast all weights again, into the same memory: a write through `.data` leaves no trace."""
        for key, (weight, _, kept) in self._kept.items():
            kept.copy_(weight.detach())
            self._kept[key] = weight, _state(weight), kept

    def _lowered(self, value: Any) -> Any:
        """Return the kept cast of a parameter; other values are returned as they are."""
        if type(value) is not nn.Parameter or value.dtype not in _CAST or value.dtype == self.dtype:
            return value
        known = self._kept.get(id(value))
        if known is not None and known[1] == _state(value):
            return known[2]
        if value.is_inference():  # it has no version
            return value
        with torch.inference_mode(False):
            kept = value.detach().to(self.dtype) if known is None else known[2].copy_(value.detach())
        self._kept[id(value)] = value, _state(value), kept
        return kept


def _state(weight: Tensor) -> tuple[int, int]:
    return weight.data_ptr(), weight._version
