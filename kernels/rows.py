"""The rows of the table that the samples of a batch are in: what the step lends to the other operations' twins."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ddpm_fast.kernels import philox

COLUMNS = ("a", "b", "c_x0", "c_x", "c_out", "sigma", "log_min", "log_max", "known_scale", "known_sigma")

# Columns that multiply a tensor by themselves. A 0-dim tensor does that in half the time of a number.
_FACTORS = tuple(COLUMNS.index(name) for name in ("a", "c_x", "known_scale"))


def rows_on_host(coefficients: Tensor, ids: Tensor) -> tuple[list[list[Any]], list[list[int]]]:
    """Return coefficients and ids in the form that the twins read fastest when all samples are in one row."""
    rows: list[list[Any]] = coefficients.tolist()
    for column in _FACTORS:
        for row, factor in zip(rows, coefficients[:, column].cpu().unbind(), strict=True):
            row[column] = factor
    return rows, ids.tolist()


class Rows:
    """The rows that the samples are in: one row each, or one row (an int) for all.

    The columns are attributes: tensors [B, 1, ...] that broadcast over the samples; or numbers, which take a third of
        the
    operations.

    Args:
        coefficients: The table, float32 [S, 10]; or a list of its rows, where all samples are in one row.
        base: Row of every sample, int32 [B], or one int for all.
        offset: Number that is added to `base`.
        dim: Dimensions of the samples' batch.
    """

    def __init__(self, coefficients: Tensor | list[list[Any]], base: Tensor | int, offset: int, dim: int) -> None:
        self.steps = len(coefficients)
        self.active: Tensor | None = None
        self.shape = (-1,) + (1,) * (dim - 1)
        columns: Any
        if isinstance(base, int):
            self.row: Tensor | int = base + offset
            columns = coefficients[self.row]
            if isinstance(columns, Tensor):
                columns = columns.tolist()
        elif isinstance(coefficients, list):
            raise TypeError("coefficients are a tensor where every sample has a row of its own")
        else:
            row = base.long() + offset
            self.active = (row >= 0) & (row < self.steps)
            self.row = row.clamp(0, self.steps - 1)
            columns = coefficients[self.row].T.unflatten(1, self.shape).unbind(0)
        (
            self.a, self.b, self.c_x0, self.c_x, self.c_out, self.sigma, self.log_min, self.log_max,
            self.known_scale, self.known_sigma,
        ) = columns  # fmt: skip

    def predict_x0(self, x: Tensor, out: Tensor, target: Tensor | None = None) -> Tensor:
        """Return the x0 prediction before it is clipped, in `target` or in a new tensor."""
        return self.add(self.scaled(x, self.a, target), self.b, out)

    def scaled(self, x: Tensor, column: Any, out: Tensor | None = None) -> Tensor:
        """Return column x, in `out` or in a new tensor."""
        return torch.mul(x, column, out=out)

    def add(self, total: Tensor, column: Any, values: Tensor) -> Tensor:
        """Add column values to `total`, in place."""
        return total.add_(values, alpha=column) if self.active is None else total.add_(column * values)

    def target(self, tensor: Tensor | None) -> Tensor | None:
        """Return the tensor that a result may be built in: `tensor`, or None if some samples must stay as they are."""
        return tensor if self.active is None else None

    def where_noisy(self, deviation: Tensor) -> Tensor:
        """Return `deviation`, but 0 in rows whose sigma is 0: such a row has no noise, whatever the network says."""
        if self.active is not None:
            return torch.where(self.sigma == 0, self.sigma, deviation)
        return deviation if self.sigma else torch.zeros_like(deviation)

    def per_sample(self, values: Tensor) -> Tensor:
        """Return values [B] as [B, 1, ...]."""
        return values.view(self.shape)

    def noise(self, seeds: Tensor, ids: Tensor | list[list[int]], stream: int, x: Tensor) -> Tensor:
        """Return normals of `stream` at the samples' noise ids, in the shape and dtype of x."""
        noise_ids = torch.as_tensor(ids, dtype=torch.int64, device=x.device)[:, 1][self.row].expand(len(x))
        return philox.normals(seeds, noise_ids, stream, x[0].numel(), dtype=x.dtype).view_as(x)

    def write(self, target: Tensor, values: Tensor) -> None:
        """Write `values` to `target` where a sample's row is inside the table."""
        if self.active is None:
            if target is not values:
                target.copy_(values)
        else:
            torch.where(self.per_sample(self.active), values.to(target.dtype), target, out=target)

    def write_next_timestep(self, target: Tensor, ids: Tensor | list[list[int]]) -> None:
        """Write the timestep of the samples' next rows to `target`; the last row repeats its own."""
        if isinstance(self.row, int):
            target.fill_(int(ids[min(self.row + 1, self.steps - 1)][0]))
        elif self.active is not None:
            assert isinstance(ids, Tensor)
            following = ids[:, 0][(self.row + 1).clamp(max=self.steps - 1)].to(target.dtype)
            torch.where(self.active, following, target, out=target)


def halves(tensor: Tensor, batch: int) -> Sequence[Tensor]:
    """Return `tensor` in pieces of `batch` samples: the tensor itself, or the two halves of a guided batch."""
    return (tensor,) if tensor.shape[0] == batch else tensor.split(batch)


def split_output(x: Tensor, output: Tensor, guidance: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Return the (guided) prediction and, if there is one, the second half of the channels, in the dtype of x."""
    batch, channels = x.shape[:2]
    if output.dtype is not x.dtype:
        output = output.to(x.dtype)
    if guidance is None:
        return (output, None) if output.shape[1] == channels else (output[:, :channels], output[:, channels:])
    conditional, unconditional = output.split(batch)
    scale = guidance.to(x.dtype).view(batch, *(1,) * (x.dim() - 1))
    # Only the mean is guided; the variance is that of the conditional half.
    mean, variance = conditional[:, :channels], conditional[:, channels:]
    unconditional = unconditional[:, :channels]
    return torch.addcmul(unconditional, mean - unconditional, scale), variance
