"""The per-sample bound of dynamic thresholding (Saharia et al. 2022, section 2.3)."""

import torch
from torch import Tensor

from ddpm_fast.kernels.step import Rows, split_output


def threshold_bound(
    x: Tensor,
    output: Tensor,
    coefficients: Tensor,
    base: Tensor | int,
    offset: int = 0,
    *,
    ratio: float,
    max_value: float,
    guidance: Tensor | None = None,
) -> Tensor:
    """Return the `ratio` quantile of |x0| of every sample, at least 1 and at most `max_value`: [B].

    x0 = a x + b out is the estimate that `step` makes from the same arguments. PyTorch on every device so far.
    """
    out, _ = split_output(x, output, guidance)
    x0 = Rows(coefficients, base, offset, x.dim()).origin(x, out)
    return torch.quantile(x0.abs_().flatten(1), ratio, dim=1).clamp_(1, max_value)
