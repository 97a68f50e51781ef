"""Casts of weights that autocast would make anew in every call."""

from collections.abc import Callable, Iterable, Sequence
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
    """A mode in which functions that autocast lowers read casts of the weights that are kept for a recorded call.

    The mode does what autocast's own cache does, but the casts outlive the context: a graph that is recorded in the
    mode reads them. `refresh` brings them up to date. Calls that record gradients make casts of their own.

    Args:
        device: Type of the device, "cpu" or "cuda".
        dtype: Dtype of the surrounding autocast. Where the model sets another one, or none, nothing is replaced.
        weights: The parameters that may be replaced.
    """

    def __init__(self, device: str, dtype: torch.dtype, weights: Iterable[nn.Parameter]) -> None:
        super().__init__()
        self.device, self.dtype = device, dtype
        self._weights = frozenset(map(id, weights))
        self._kept: dict[int, tuple[nn.Parameter, tuple[int, int], Tensor]] = {}

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _LOWERED and self._lowers():
            args = [self._lowered(each) for each in args]
            kwargs = {name: self._lowered(each) for name, each in kwargs.items()}
        return func(*args, **kwargs)

    def _lowers(self) -> bool:
        """Return whether autocast casts to the dtype here, and for no gradient."""
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or not torch.is_autocast_enabled(self.device):
            return False
        return torch.get_autocast_dtype(self.device) == self.dtype

    def refresh(self) -> None:
        """Cast all weights again, into the same memory: a write through `.data` leaves no trace."""
        for key, (weight, _, kept) in self._kept.items():
            kept.copy_(weight.detach())
            self._kept[key] = weight, _state(weight), kept

    def _lowered(self, value: Any) -> Any:
        """Return the kept cast of a parameter; other values are returned as they are."""
        if id(value) not in self._weights or value.dtype not in _CAST or value.dtype == self.dtype:
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
