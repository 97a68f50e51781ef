"""A round of speculative sampling: several steps ahead are drafted, verified by one network call, and committed.

For a sample in row i of its table, with x0 estimates g_k guessed for the rows i + k, one round is (De Bortoli et al.
2025, "Accelerated diffusion models via speculative sampling"; Hu et al. 2025, "Diffusion models are secretly
exchangeable"):

    draft     y_0 = x;  y_{k+1} = p_k + sigma z_k,  p_k the step's mean with g_k for the origin;  k < m
    network   at every y_k, in one call
    verify    q_k the step's mean with the network's origin;  D_k = (q_k - p_k) / sigma, over the whole sample
    decide    the first k with  log u_k > D_k z_k - |D_k|^2 / 2  stops the round
    commit    p_k + sigma z_k of the steps before it, and there q_k + sigma (z_k - 2 (D_k z_k) D_k / |D_k|^2)

What is accepted has density min(p, q), what is reflected (q - p)+ (both Gaussians have one covariance), so that every
step has the law of the plain sampler, as long as g_k and m depend on nothing but the noise of earlier rows. u and z are
Philox noise of the row, whatever round it is examined in.

Guesses: the network's estimate at the draft of the same row in the round before, which the noise of earlier rows alone
has made; for rows that were not drafted, the last of these. A window of one row, and a row without noise, are plain
steps: their result is q_k + sigma z_k.

Four operations on buffers that never move, so that a CUDA graph can hold a round. With B samples, of which each drafts
up to W steps, in buffers with room for R >= W:

    drafts, noise, guess    float32 [B, R, C, ...]
    dots                    float32 or float64 [B, R, parts, 2]: D z and |D|^2, in parts to be added up
    progress                int32 [B, 5]: the columns of `Progress`
    factor                  float32 [B]: 2 (D z) / |D|^2 where the sample's round was stopped by a rejection
    windows                 int32 [S]: drafts of a round that begins in a row; W is the most that count
    coefficients, ids       those of `kernels.step`
    output                  the network's for the drafts, any float dtype, [B W, C, ...] or guided [2 B W, C, ...]
    clip, bound, guidance   those of `kernels.step`; bound and guidance with a number for every draft, [B W]

A sample past the last row stays as it is.
"""

import enum
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ddpm_fast.kernels import philox
from ddpm_fast.kernels.step import COLUMNS, halves, split_output


class Progress(enum.IntEnum):
    """Columns of the samples' progress."""

    ROW = 0  # of the table: the next step's
    START = 1  # ROW before the last round
    EVALUATED = 2  # drafts of the last round
    TAKEN = 3  # steps that it committed
    OUTCOME = 4  # how it ended: an `Outcome`


class Outcome(enum.IntEnum):
    """How a sample's round ended."""

    ACCEPTED = 0  # every draft was
    REJECTED = 1
    PLAIN = 2  # by a plain step
    DONE = 3  # there was nothing to do


class Window:
    """The rows that every sample drafts in a round, and their columns of the table, [B, W, 1, ...].

    Args:
        coefficients: float32 [S, 11], the columns of `kernels.step.COLUMNS`.
        rows: int [B]: row of every sample.
        windows: int32 [S]: drafts of a round that begins in a row.
        width: W.
        dim: of the samples, the batch's included.
    """

    def __init__(self, coefficients: Tensor, rows: Tensor, windows: Tensor, width: int, dim: int) -> None:
        steps = len(coefficients)
        ahead = torch.arange(width, device=rows.device)
        last = rows.clamp(max=steps - 1)
        self.count = torch.minimum(windows[last].long().clamp(max=width), steps - rows)  # 0 past the end
        self.rows = (rows[:, None] + ahead).clamp(max=steps - 1)
        self.valid = ahead < self.count[:, None]
        columns = coefficients[self.rows].movedim(-1, 0)
        for name, column in zip(COLUMNS, columns, strict=True):
            setattr(self, name, column.view(*column.shape, *(1,) * (dim - 1)))

    a: Any
    b: Any
    c_x0: Any
    c_x: Any
    c_out: Any
    sigma: Any

    def mean(self, y: Tensor, guess: Tensor, at: tuple[Any, Any]) -> Tensor:
        """The mean of the steps `at`, with `guess` for the origin and the output to match it, (guess - a y) / b."""
        through_output = self.c_out[at] / self.b[at]
        return (self.c_x0[at] + through_output) * guess + (self.c_x[at] - through_output * self.a[at]) * y

    def origin(self, y: Tensor, out: Tensor, clip: float | None, bound: Tensor | None) -> tuple[Tensor, Tensor]:
        """The network's estimates of the origin, as they are and as they are clipped."""
        raw = self.a * y + self.b * out
        if bound is not None:
            limit = bound.to(y.dtype).view(self.a.shape)
            return raw, raw.clamp(-limit, limit) / limit
        return raw, raw if clip is None else raw.clamp(-clip, clip)

    def distance(self, raw: Tensor, origin: Tensor, guess: Tensor) -> Tensor:
        """D: the two means' difference over sigma, without their cancellation; 0 where there is no noise."""
        apart = self.c_x0 * (origin - guess) + self.c_out / self.b * (raw - guess)
        return torch.where(self.sigma == 0, 0, apart / self.sigma)


def draft_torch(
    x: Tensor,
    guess: Tensor,
    progress: Tensor,
    windows: Tensor,
    coefficients: Tensor,
    ids: Tensor,
    seeds: Tensor,
    width: int,
    *,
    drafts: Tensor,
    noise: Tensor,
    model_input: Tensor,
    timestep: Tensor,
) -> None:
    """Move the guesses up by the steps that were taken, the last one standing for rows that are new; and draft.

    Writes guess, drafts and noise, and what the network reads: model_input in its dtype, [B W, C, ...] or guided twice
    that, and its timestep, int64.
    """
    batch, full = guess.shape[:2]
    row, evaluated, taken = (
        progress[:, column].long() for column in (Progress.ROW, Progress.EVALUATED, Progress.TAKEN)
    )
    window = Window(coefficients, row, windows, width, x.dim())
    source = torch.minimum(taken[:, None] + torch.arange(full, device=x.device), evaluated[:, None] - 1)
    guess.copy_(guess[torch.arange(batch, device=x.device)[:, None], source])
    told = ids[window.rows]
    flat = philox.normals(
        seeds.repeat_interleave(width), told[..., 1].flatten(), philox.Stream.STEP, x[0].numel(), dtype=x.dtype
    )
    noise[:, :width] = flat.view(batch, width, *x.shape[1:])
    y = x
    for k in range(width):
        drafts[:, k] = y
        if k + 1 < width:
            y = window.mean(y, guess[:, k], (slice(None), k)) + window.sigma[:, k] * noise[:, k]
    for half in halves(model_input, batch * width):
        half.copy_(drafts[:, :width].flatten(0, 1))
    for half in halves(timestep, batch * width):
        half.copy_(told[..., 0].flatten())


def verify_torch(
    drafts: Tensor,
    noise: Tensor,
    guess: Tensor,
    output: Tensor,
    progress: Tensor,
    windows: Tensor,
    coefficients: Tensor,
    width: int,
    *,
    clip: float | None = None,
    bound: Tensor | None = None,
    guidance: Tensor | None = None,
    dots: Tensor,
) -> None:
    """Write dots: D z and |D|^2 of every draft."""
    drafts, noise, guess = drafts[:, :width], noise[:, :width], guess[:, :width]
    window = Window(coefficients, progress[:, Progress.ROW].long(), windows, width, guess.dim() - 1)
    out, _ = split_output(drafts.flatten(0, 1), output, guidance)
    raw, origin = window.origin(drafts, out.reshape(drafts.shape), clip, bound)
    distance = window.distance(raw, origin, guess).flatten(2).double()
    dots.zero_()
    dots[:, :width, 0, 0] = (distance * noise.flatten(2)).sum(2)
    dots[:, :width, 0, 1] = distance.square().sum(2)


def decide_torch(
    dots: Tensor,
    progress: Tensor,
    windows: Tensor,
    coefficients: Tensor,
    ids: Tensor,
    seeds: Tensor,
    width: int,
    *,
    factor: Tensor,
    rejected: Tensor,
) -> None:
    """Find the steps that every sample's round commits, and go on in `progress`; mark rejections in uint8 [B, S]."""
    batch = len(dots)
    row = progress[:, Progress.ROW].long()
    window = Window(coefficients, row, windows, width, 1)
    along, square = dots[:, :width].sum(2).unbind(-1)
    counter = torch.zeros(batch, width, dtype=torch.int64, device=dots.device)
    key = ((seeds & 0xFFFFFFFF)[:, None], (seeds >> 32 & 0xFFFFFFFF)[:, None])
    word, *_ = philox.philox_4x32((counter, ids[window.rows][..., 1].long(), int(philox.Stream.ACCEPT), 0), key)
    plain = (window.sigma == 0) | (window.count == 1)[:, None]
    accepted = ~plain & (philox.uniform(word).to(dots.dtype).log() <= along - square / 2)
    stops = window.valid & ~accepted
    stopped, place = stops.any(1), stops.int().argmax(1)
    taken = torch.where(stopped, place + 1, window.count)
    at = torch.arange(batch, device=dots.device), place
    outcome = torch.where(plain[at], Outcome.PLAIN, Outcome.REJECTED)
    outcome = torch.where(stopped, outcome, Outcome.ACCEPTED)
    outcome = torch.where(window.count == 0, Outcome.DONE, outcome)
    factor.copy_(torch.where(outcome == Outcome.REJECTED, 2 * along[at] / square[at], 0))
    rejected[at[0], window.rows[at]] |= outcome == Outcome.REJECTED
    progress.copy_(torch.stack([row + taken, row, window.count, taken, outcome], dim=1))


def commit_torch(
    x: Tensor,
    drafts: Tensor,
    noise: Tensor,
    guess: Tensor,
    output: Tensor,
    progress: Tensor,
    factor: Tensor,
    windows: Tensor,
    coefficients: Tensor,
    width: int,
    *,
    clip: float | None = None,
    bound: Tensor | None = None,
    guidance: Tensor | None = None,
) -> None:
    """Take the steps that were decided on: write the new states to x, and the network's estimates to guess."""
    batch = len(x)
    drafts, noise, guess = drafts[:, :width], noise[:, :width], guess[:, :width]
    start, evaluated, taken, outcome = progress[:, 1:].long().unbind(1)
    window = Window(coefficients, start, windows, width, x.dim())
    out, _ = split_output(drafts.flatten(0, 1), output, guidance)
    out = out.reshape(drafts.shape)
    raw, origin = window.origin(drafts, out, clip, bound)
    at = torch.arange(batch, device=x.device), (taken - 1).clamp(min=0)
    y, z, sigma = drafts[at], noise[at], window.sigma[at]
    drafted = window.mean(y, guess[at], at) + sigma * z
    mean = window.c_x0[at] * origin[at] + window.c_x[at] * y + window.c_out[at] * out[at]
    turned = factor.to(x.dtype).view(-1, *(1,) * (x.dim() - 1)) * window.distance(raw, origin, guess)[at]
    column = outcome.view(-1, *(1,) * (x.dim() - 1))
    new = torch.where(column == Outcome.ACCEPTED, drafted, mean + sigma * (z - turned))
    x.copy_(torch.where(column == Outcome.DONE, x, new))
    kept = torch.arange(width, device=x.device) < evaluated[:, None]
    guess.copy_(torch.where(kept.view(batch, width, *(1,) * (x.dim() - 1)), origin, guess))


def implementation(backend: str) -> tuple[Callable[..., None], Callable[..., None], Callable[..., None], Callable]:
    """draft, verify, decide and commit; on buffers that the caller made to fit."""
    if backend == "torch":
        return draft_torch, verify_torch, decide_torch, commit_torch
    from ddpm_fast.kernels import speculate_triton as on_device

    return on_device.draft_triton, on_device.verify_triton, on_device.decide_triton, on_device.commit_triton
