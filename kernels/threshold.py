"""The per-sample bound of dynamic thresholding (Saharia et al. 2022, section 2.3)."""

import functools

import torch
from torch import Tensor

from ddpm_fast.kernels.checks import FLOATS, check_contiguous, check_tensor
from ddpm_fast.kernels.dispatch import choose_backend, on_device
from ddpm_fast.kernels.rows import Rows, split_output


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
    bound: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Return the `ratio` quantile of |x0| of every sample, at least 1 and at most `max_value`: float32 [B].

    x0 = a x + b out is the x0 prediction that `step` makes from the same arguments. The quantile is interpolated
    between two order statistics, as by torch.quantile (which takes 16 million elements at most). The bound of a sample
    with NaN is NaN, and so is a quantile between two infinite numbers. The host does not wait for the device.

    Args:
        x, output, coefficients, base, offset, guidance: See `step`. On the PyTorch path base may be an int, one row for
            all samples, and coefficients a list.
        ratio: The quantile, in [0, 1].
        max_value: The largest bound, >= 1.
        bound: Where to write; None makes a new tensor. On a GPU the bound of a sample whose row is outside the table is
            left as it is.
        backend: "triton" or "torch"; None chooses by device.

    Raises:
        ValueError: A tensor has the wrong shape, dtype, device or layout; a number is outside its range.
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
            bound=bound,
        )  # fmt: skip
    if not isinstance(base, Tensor) or not isinstance(coefficients, Tensor):
        raise ValueError("base and coefficients must be tensors where the kernel runs")
    from ddpm_fast.kernels.threshold_triton import threshold_triton

    with on_device(x.device):
        return threshold_triton(
            x, output, coefficients, base, offset, below=below, weight=weight, max_value=max_value, guidance=guidance,
            bound=bound,
        )  # fmt: skip


@functools.cache
def _rank(ratio: float, count: int, dtype: torch.dtype) -> tuple[int, float]:
    """Return the order statistic below the quantile, and the weight of the next order statistic.

    The rank is computed in the dtype of x, as in torch.quantile, so that the same two numbers are interpolated.
    """
    rank = torch.tensor(ratio, dtype=dtype, device="cpu") * (count - 1)
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
    bound: Tensor,
) -> Tensor:
    """Compute the bound on PyTorch: the twin of the kernel."""
    out, _ = split_output(x, output, guidance)
    row = Rows(coefficients, base, offset, x.dim())
    magnitude = row.predict_x0(x, out).abs_().flatten(1)
    low = magnitude.kthvalue(below + 1, dim=1).values
    # Without a weight the next number is not needed, and 0 times infinity would be NaN.
    above = min(below + 2, magnitude.shape[1]) if weight else below + 1
    high = magnitude.kthvalue(above, dim=1).values
    quantile = torch.lerp(low, high, weight).clamp_(1, max_value)
    return bound.copy_(torch.where(magnitude.isnan().any(1), torch.nan, quantile))
