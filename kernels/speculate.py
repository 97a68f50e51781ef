"""A round of speculative sampling: steps are drafted, verified by one network call, and committed.

Let g_k be x0 predictions guessed for the rows i + k, for a sample in row i of its table. One round is (De Bortoli et
al. 2025, "Accelerated diffusion models via speculative sampling"; Hu et al. 2025, "Diffusion models are secretly
exchangeable"):

    draft     y_0 = x;  y_{k+1} = p_k + sigma z_k,  p_k the step's mean with g_k as x0;  k < m
    network   at every y_k, in one call
    verify    q_k the step's mean with the network's x0;  D_k = (q_k - p_k) / sigma, over the whole sample
    decide    the first k with  log u_k > D_k z_k - |D_k|^2 / 2  stops the round
    commit    p_k + sigma z_k of the steps before that k, and there q_k + sigma (z_k - 2 (D_k z_k) D_k / |D_k|^2)

An accepted step has density min(p, q), a reflected step (q - p)+, because both Gaussians have one covariance. So every
step has the law of the plain sampler, as long as g_k and m depend on nothing but the noise of earlier rows. u and z are
Philox noise of the row, in whatever round the row is examined.

A guess is the network's x0 prediction at the draft of the same row in the round before; the noise of earlier rows alone
made that draft. For rows that were not drafted, the last such prediction is the guess. A window of one row and a row
without noise are plain steps: their result is q_k + sigma z_k.

Four operations work on buffers that never move, so that a CUDA graph can hold a round. There are B samples, each drafts
up to W steps, and the buffers have room for R >= W drafts:

    drafts, noise, guess    float32 [B, R, C, ...]
    dots                    float32 or float64 [B, R, parts, 2]: D z and |D|^2, in parts that have to be added up
    position                int32 [B, 5]: the columns of `Position`
    factor                  float32 [B]: 2 (D z) / |D|^2 where a rejection stopped the sample's round
    windows                 int32 [S]: drafts of a round that begins in a row; at most W count
    coefficients, ids       as in `kernels.step`
    output                  the network's for the drafts, any float dtype, [B W, C, ...] or guided [2 B W, C, ...]
    clip, bound, guidance   as in `kernels.step`; bound and guidance with a number for every draft, [B W]

A sample past the last row stays as it is.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ddpm_fast.kernels import philox
from ddpm_fast.kernels.rounds import Outcome, Position
from ddpm_fast.kernels.rows import COLUMNS, halves, split_output


class RoundRows:
    """The rows that every sample drafts in a round, and their columns of the table, [B, W, 1, ...].

    Args:
        coefficients: The table, float32 [S, 10], the columns of `kernels.rows.COLUMNS`.
        position: The samples' positions.
        windows: Drafts of a round that begins in a row, int32 [S].
        width: W.
        dim: Dimensions of the samples' batch.
        column: The column of `position` that holds the first row: ROW, or START where the round is to be committed.
    """

    def __init__(
        self, coefficients: Tensor, position: Tensor, windows: Tensor, width: int, dim: int, column: int = Position.ROW
    ) -> None:
        steps, start = len(coefficients), position[:, column].long()
        offsets = torch.arange(width, dtype=torch.int64, device=start.device)
        self.start = start
        self.count = torch.minimum(windows[start.clamp(max=steps - 1)].long().clamp(max=width), steps - start)
        self.rows = (start[:, None] + offsets).clamp(max=steps - 1)
        self.valid = offsets < self.count[:, None]
        columns = coefficients[self.rows].view(len(start), width, *(1,) * (dim - 1), len(COLUMNS)).unbind(-1)
        self.a, self.b, self.c_x0, self.c_x, self.c_out, self.sigma, *_ = columns
        through_output = self.c_out / self.b
        # The mean of a draft as a sum over its guess, with the output (guess - a y) / b that belongs to it, and its
        # state.
        self.of_guess, self.of_state = self.c_x0 + through_output, self.c_x - through_output * self.a
        quiet = self.sigma == 0
        self.plain = quiet | (self.count == 1).view(-1, *(1,) * dim)
        inverse = torch.where(quiet, 0, 1 / self.sigma)
        self.of_x0, self.of_raw = self.c_x0 * inverse, through_output * inverse

    def predict_x0(self, y: Tensor, out: Tensor, clip: float | None, bound: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the network's x0 predictions, raw and clipped."""
        raw = self.a * y + self.b * out
        if bound is not None:
            limit = bound.to(y.dtype).view(self.a.shape)
            return raw, raw.clamp(-limit, limit) / limit
        return raw, raw if clip is None else raw.clamp(-clip, clip)

    def distance(self, raw: Tensor | None, x0: Tensor, guess: Tensor, at: Any = ...) -> Tensor:
        """Return D of the drafts `at`: the means' difference over sigma, without cancellation; 0 without noise.

        Without `raw`, c_out is 0 in every row; 0 times an infinite prediction would be NaN.
        """
        distance = self.of_x0[at] * (x0 - guess)
        return distance if raw is None else distance + self.of_raw[at] * (raw - guess)


def log_uniforms(seeds: Tensor, ids: Tensor) -> Tensor:
    """Return log u of every sample and row: float32 [B, S]."""
    counter = torch.zeros(1, 1, dtype=torch.int64, device=seeds.device)
    word, *_ = philox.philox_4x32((counter, ids[None, :, 1].long(), int(philox.Stream.ACCEPT), 0), philox.key_of(seeds))
    return philox.uniform(word).log_()


def draft_torch(
    x: Tensor,
    guess: Tensor,
    position: Tensor,
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
    rows: RoundRows | None = None,
    row_noise: Tensor | None = None,
) -> None:
    """Move the guesses up by the steps that were taken, and draft; the last guess serves for new rows.

    The operation writes guess, drafts and noise, and the denoiser input: model_input in its dtype, [B W, C, ...] or
        guided
    twice that, and its timestep, int64. Only the twin takes the round's `rows` and the noise of all rows, `row_noise`,
    [B, S, C, ...], which are then computed once.
    """
    batch, full = guess.shape[:2]
    rows = rows or RoundRows(coefficients, position, windows, width, x.dim())
    every = torch.arange(batch, dtype=torch.int64, device=x.device)[:, None]
    taken, evaluated = position[:, Position.TAKEN, None], position[:, Position.EVALUATED, None]
    source = torch.minimum(taken + torch.arange(full, dtype=torch.int64, device=x.device), evaluated - 1)
    guess.copy_(guess[every, source])
    row_ids = ids[rows.rows]
    if row_noise is None:
        repeated, noise_ids = seeds.repeat_interleave(width), row_ids[..., 1].flatten()
        flat = philox.normals(repeated, noise_ids, philox.Stream.STEP, x[0].numel(), dtype=x.dtype)
        noise[:, :width] = flat.view(batch, width, *x.shape[1:])
    else:
        noise[:, :width] = row_noise[every, rows.rows]
    fresh = rows.of_guess * guess[:, :width] + rows.sigma * noise[:, :width]
    drafts[:, 0] = x
    for k in range(width - 1):
        torch.addcmul(fresh[:, k], rows.of_state[:, k], drafts[:, k], out=drafts[:, k + 1])
    for half in halves(model_input, batch * width):
        half.copy_(drafts[:, :width].flatten(0, 1))
    for half in halves(timestep, batch * width):
        half.copy_(row_ids[..., 0].flatten())


def verify_torch(
    drafts: Tensor,
    noise: Tensor,
    guess: Tensor,
    output: Tensor,
    position: Tensor,
    windows: Tensor,
    coefficients: Tensor,
    width: int,
    *,
    clip: float | None = None,
    bound: Tensor | None = None,
    guidance: Tensor | None = None,
    use_output: bool = True,
    dots: Tensor,
    rows: RoundRows | None = None,
) -> None:
    """Write D z and |D|^2 of every draft to `dots`. Without `use_output`, c_out must be 0 in every row."""
    drafts, noise, guess = drafts[:, :width], noise[:, :width], guess[:, :width]
    rows = rows or RoundRows(coefficients, position, windows, width, guess.dim() - 1)
    out, _ = split_output(drafts.flatten(0, 1), output, guidance)
    raw, x0 = rows.predict_x0(drafts, out.reshape(drafts.shape), clip, bound)
    distance = rows.distance(raw if use_output else None, x0, guess).flatten(2).double()
    dots.zero_()
    dots[:, :width, 0, 0] = (distance * noise.flatten(2)).sum(2)
    dots[:, :width, 0, 1] = distance.square().sum(2)


def decide_torch(
    dots: Tensor,
    position: Tensor,
    windows: Tensor,
    coefficients: Tensor,
    log_u: Tensor,
    width: int,
    *,
    factor: Tensor,
    rejected: Tensor,
    rows: RoundRows | None = None,
) -> None:
    """Find the steps that every sample's round commits, and advance `position`.

    Rejections are marked in `rejected`, uint8 [B, S]. `log_u`, [B, S], is the result of `log_uniforms`.
    """
    rows = rows or RoundRows(coefficients, position, windows, width, 1)
    every = torch.arange(len(dots), dtype=torch.int64, device=dots.device)
    along, square = dots[:, :width].sum(2).unbind(-1)
    plain = rows.plain.view(rows.rows.shape)
    accepted = ~plain & (log_u[every[:, None], rows.rows] <= along - square / 2)
    stops = rows.valid & ~accepted
    stopped, place = stops.any(1), stops.int().argmax(1)
    taken = torch.where(stopped, place + 1, rows.count)
    at = every, place
    reflected = stopped & ~plain[at]
    outcome = torch.where(stopped, torch.where(plain[at], Outcome.PLAIN, Outcome.REJECTED), Outcome.ACCEPTED)
    outcome = torch.where(rows.count == 0, Outcome.DONE, outcome)
    factor.copy_(torch.where(reflected, 2 * along[at] / square[at], 0))
    rejected[every, rows.rows[at]] |= reflected
    position.copy_(torch.stack([rows.start + taken, rows.start, rows.count, taken, outcome], dim=1))


def commit_torch(
    x: Tensor,
    drafts: Tensor,
    noise: Tensor,
    guess: Tensor,
    output: Tensor,
    position: Tensor,
    factor: Tensor,
    windows: Tensor,
    coefficients: Tensor,
    width: int,
    *,
    clip: float | None = None,
    bound: Tensor | None = None,
    guidance: Tensor | None = None,
    use_output: bool = True,
    rows: RoundRows | None = None,
) -> None:
    """Take the steps that were decided on: write the new states to x, and the network's x0 predictions to guess."""
    batch, ones = len(x), (1,) * (x.dim() - 1)
    drafts, noise, guess = drafts[:, :width], noise[:, :width], guess[:, :width]
    rows = rows or RoundRows(coefficients, position, windows, width, x.dim(), Position.START)
    out, _ = split_output(drafts.flatten(0, 1), output, guidance)
    out = out.reshape(drafts.shape)
    raw, x0 = rows.predict_x0(drafts, out, clip, bound)
    evaluated, taken, outcome = position[:, Position.EVALUATED :].unbind(1)
    at = torch.arange(batch, dtype=torch.int64, device=x.device), (taken.long() - 1).clamp(min=0)
    y, z, g, sigma = drafts[at], noise[at], guess[at], rows.sigma[at]
    drafted = rows.of_guess[at] * g + rows.of_state[at] * y + sigma * z
    mean = rows.c_x0[at] * x0[at] + rows.c_x[at] * y
    if use_output:
        mean = mean + rows.c_out[at] * out[at]
    distance = rows.distance(raw[at] if use_output else None, x0[at], g, at)
    outcome = outcome.view(batch, *ones)
    new = torch.where(
        outcome == Outcome.ACCEPTED, drafted, mean + sigma * (z - factor.to(x.dtype).view(batch, *ones) * distance)
    )
    x.copy_(torch.where(outcome == Outcome.DONE, x, new))
    kept = torch.arange(width, dtype=torch.int64, device=x.device) < evaluated[:, None]
    guess.copy_(torch.where(kept.view(batch, width, *ones), x0, guess))


def implementation(
    backend: str,
) -> tuple[Callable[..., None], Callable[..., None], Callable[..., None], Callable[..., None]]:
    """Return draft, verify, decide and commit, for buffers that the caller made to fit."""
    if backend == "torch":
        return draft_torch, verify_torch, decide_torch, commit_torch
    from ddpm_fast.kernels import speculate_triton as on_device

    return on_device.draft_triton, on_device.verify_triton, on_device.decide_triton, on_device.commit_triton
