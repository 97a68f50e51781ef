"""The per-sample bound of dynamic thresholding (Saharia et al. 2022, section 2.3)."""

import functools

import torch
from torch import Tensor

from ddpm_fast.kernels.checks import FLOATS, check_contiguous, check_tensor
from ddpm_fast.kernels.dispatch import choose_backend, on_device
from ddpm_fast.kernels.step import Rows, split_output


def threshold_bound(
    x: Tensor,
    output: Tensor,
    coefficients: Tensor | list[list[float]],
    base: Tensor | int,
    offset: int = 0,
    *,
    ratio: float,
    max_value: float,
    guidance: Tensor | None = None,
    conditional_first: bool = True,
    bound: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Return the `ratio` quantile of |x0| of every sample, at least 1 and at most `max_value`: float32 [B].

    x0 = a x + b out is the estimate that `step` makes from the same arguments. The quantile is interpolated between two
    order statistics, as by torch.quantile (which takes 16 million elements at most); the bound of a sample with NaN is
    NaN. Nothing waits for the device.

    Args:
        x, output, coefficients, base, offset, guidance, conditional_first: those of `step`; on the PyTorch path base
            may be an int, one row for all samples, and coefficients then a list.
        ratio: in [0, 1].
        max_value: >= 1.
        bound: where to write; None makes a new tensor. On a GPU the bound of a sample whose row is outside the table
            is left as it is.
        backend: "triton" or "torch"; None chooses by device.

    Raises:
        ValueError: a tensor of the wrong shape, dtype, device or layout; a number outside its range.
    """
    if not 0 <= ratio <= 1 or not max_value >= 1:
        raise ValueError(f"ratio must be in [0, 1] and max_value >= 1, got {ratio} and {max_value}")
    batch = len(x)
    check_contiguous("x", x)
    check_tensor("output", output, tuple(output.shape), FLOATS, x.device)
    if bound is None:
        bound = torch.ones(batch, dtype=x.dtype, device=x.device)
    check_tensor("bound", bound, (batch,), (x.dtype,), x.device)
    chosen = choose_backend(x.device, backend)
    below, weight = _rank(ratio, x[0].numel(), x.dtype)
    if chosen == "torch":
        return _threshold_torch(
            x, output, coefficients, base, offset, below=below, weight=weight, max_value=max_value, guidance=guidance,
            conditional_first=conditional_first, bound=bound,
        )  # fmt: skip
    if not isinstance(base, Tensor) or not isinstance(coefficients, Tensor):
        raise ValueError("base and coefficients must be tensors where the kernel runs")
    from ddpm_fast.kernels.threshold_triton import threshold_triton

    with on_device(x.device):
        return threshold_triton(
            x, output, coefficients, base, offset, below=below, weight=weight, max_value=max_value, guidance=guidance,
            conditional_first=conditional_first, bound=bound,
        )  # fmt: skip


@functools.cache
def _rank(ratio: float, count: int, dtype: torch.dtype) -> tuple[int, float]:
    """The order statistic below the quantile, and the weight of the next.

    In the dtype of x, where torch.quantile has it, so that the same two numbers are interpolated.
    """
    rank = torch.tensor(ratio, dtype=dtype) * (count - 1)
    return int(rank), float(rank - int(rank))


def _threshold_torch(
    x: Tensor,
    output: Tensor,
    coefficients: Tensor | list[list[float]],
    base: Tensor | int,
    offset: int,
    *,
    below: int,
    weight: float,
    max_value: float,
    guidance: Tensor | None,
    conditional_first: bool,
    bound: Tensor,
) -> Tensor:
    """The PyTorch twin."""
    out, _ = split_output(x, output, guidance, conditional_first)
    row = Rows(coefficients, base, offset, x.dim())
    magnitude = row.origin(x, out).abs_().flatten(1)
    low = magnitude.kthvalue(below + 1, dim=1).values
    high = magnitude.kthvalue(min(below + 2, magnitude.shape[1]), dim=1).values
    quantile = torch.lerp(low, high, weight).clamp_(1, max_value)
    return bound.copy_(torch.where(magnitude.isnan().any(1), torch.nan, quantile))
