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
        progress: its ROW counts, or START where the round is to be committed.
        windows: int32 [S]: drafts of a round that begins in a row.
        width: W.
        dim: of the samples, the batch's included.
    """

    def __init__(
        self, coefficients: Tensor, progress: Tensor, windows: Tensor, width: int, dim: int, column: int = Progress.ROW
    ) -> None:
        steps, start = len(coefficients), progress[:, column].long()
        ahead = torch.arange(width, device=start.device)
        self.start = start
        self.count = torch.minimum(windows[start.clamp(max=steps - 1)].long().clamp(max=width), steps - start)
        self.rows = (start[:, None] + ahead).clamp(max=steps - 1)
        self.valid = ahead < self.count[:, None]
        columns = coefficients[self.rows].view(len(start), width, *(1,) * (dim - 1), len(COLUMNS)).unbind(-1)
        self.a, self.b, self.c_x0, self.c_x, self.c_out, self.sigma, *_ = columns
        through_output = self.c_out / self.b
        # The mean of a draft: of its guess, with the output that belongs to it, (guess - a y) / b; and of its state.
        self.of_guess, self.of_state = self.c_x0 + through_output, self.c_x - through_output * self.a
        quiet = self.sigma == 0
        self.plain = quiet | (self.count == 1).view(-1, *(1,) * dim)
        inverse = torch.where(quiet, 0, 1 / self.sigma)
        self.of_origin, self.of_raw = self.c_x0 * inverse, through_output * inverse

    def origin(self, y: Tensor, out: Tensor, clip: float | None, bound: Tensor | None) -> tuple[Tensor, Tensor]:
        """The network's estimates of the origin, as they are and as they are clipped."""
        raw = self.a * y + self.b * out
        if bound is not None:
            limit = bound.to(y.dtype).view(self.a.shape)
            return raw, raw.clamp(-limit, limit) / limit
        return raw, raw if clip is None else raw.clamp(-clip, clip)

    def distance(self, raw: Tensor, origin: Tensor, guess: Tensor, at: Any = ...) -> Tensor:
        """D of the drafts `at`: the means' difference over sigma, without cancellation; 0 where there is no noise."""
        return self.of_origin[at] * (origin - guess) + self.of_raw[at] * (raw - guess)


def log_uniforms(seeds: Tensor, ids: Tensor) -> Tensor:
    """log u of every sample and row: float32 [B, S]."""
    counter = torch.zeros(1, 1, dtype=torch.int64, device=seeds.device)
    word, *_ = philox.philox_4x32((counter, ids[None, :, 1].long(), int(philox.Stream.ACCEPT), 0), philox.key_of(seeds))
    return philox.uniform(word).log_()


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
    window: Window | None = None,
    ahead: Tensor | None = None,
) -> None:
    """Move the guesses up by the steps that were taken, the last one standing for rows that are new; and draft.

    Writes guess, drafts and noise, and what the network reads: model_input in its dtype, [B W, C, ...] or guided twice
    that, and its timestep, int64. The twin alone takes the round's `window`, and the noise of all rows, `ahead`,
    [B, S, C, ...], to work it out once.
    """
    batch, full = guess.shape[:2]
    window = window or Window(coefficients, progress, windows, width, x.dim())
    every = torch.arange(batch, device=x.device)[:, None]
    taken, evaluated = progress[:, Progress.TAKEN, None], progress[:, Progress.EVALUATED, None]
    source = torch.minimum(taken + torch.arange(full, device=x.device), evaluated - 1)
    guess.copy_(guess[every, source])
    told = ids[window.rows]
    if ahead is None:
        repeated, noise_ids = seeds.repeat_interleave(width), told[..., 1].flatten()
        flat = philox.normals(repeated, noise_ids, philox.Stream.STEP, x[0].numel(), dtype=x.dtype)
        noise[:, :width] = flat.view(batch, width, *x.shape[1:])
    else:
        noise[:, :width] = ahead[every, window.rows]
    fresh = window.of_guess * guess[:, :width] + window.sigma * noise[:, :width]
    drafts[:, 0] = x
    for k in range(width - 1):
        torch.addcmul(fresh[:, k], window.of_state[:, k], drafts[:, k], out=drafts[:, k + 1])
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
    window: Window | None = None,
) -> None:
    """Write dots: D z and |D|^2 of every draft."""
    drafts, noise, guess = drafts[:, :width], noise[:, :width], guess[:, :width]
    window = window or Window(coefficients, progress, windows, width, guess.dim() - 1)
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
    log_u: Tensor,
    width: int,
    *,
    factor: Tensor,
    rejected: Tensor,
    window: Window | None = None,
) -> None:
    """Find the steps that every sample's round commits, and go on in `progress`; mark rejections in uint8 [B, S].

    `log_u`, [B, S], is that of `log_uniforms`.
    """
    window = window or Window(coefficients, progress, windows, width, 1)
    every = torch.arange(len(dots), device=dots.device)
    along, square = dots[:, :width].sum(2).unbind(-1)
    plain = window.plain.view(window.rows.shape)
    accepted = ~plain & (log_u[every[:, None], window.rows] <= along - square / 2)
    stops = window.valid & ~accepted
    stopped, place = stops.any(1), stops.int().argmax(1)
    taken = torch.where(stopped, place + 1, window.count)
    at = every, place
    reflected = stopped & ~plain[at]
    outcome = torch.where(stopped, torch.where(plain[at], Outcome.PLAIN, Outcome.REJECTED), Outcome.ACCEPTED)
    outcome = torch.where(window.count == 0, Outcome.DONE, outcome)
    factor.copy_(torch.where(reflected, 2 * along[at] / square[at], 0))
    rejected[every, window.rows[at]] |= reflected
    progress.copy_(torch.stack([window.start + taken, window.start, window.count, taken, outcome], dim=1))


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
    window: Window | None = None,
) -> None:
    """Take the steps that were decided on: write the new states to x, and the network's estimates to guess."""
    batch, ones = len(x), (1,) * (x.dim() - 1)
    drafts, noise, guess = drafts[:, :width], noise[:, :width], guess[:, :width]
    window = window or Window(coefficients, progress, windows, width, x.dim(), Progress.START)
    out, _ = split_output(drafts.flatten(0, 1), output, guidance)
    out = out.reshape(drafts.shape)
    raw, origin = window.origin(drafts, out, clip, bound)
    evaluated, taken, outcome = progress[:, Progress.EVALUATED :].unbind(1)
    at = torch.arange(batch, device=x.device), (taken.long() - 1).clamp(min=0)
    y, z, g, sigma = drafts[at], noise[at], guess[at], window.sigma[at]
    drafted = window.of_guess[at] * g + window.of_state[at] * y + sigma * z
    mean = window.c_x0[at] * origin[at] + window.c_x[at] * y + window.c_out[at] * out[at]
    distance = window.distance(raw[at], origin[at], g, at)
    outcome = outcome.view(batch, *ones)
    new = torch.where(
        outcome == Outcome.ACCEPTED, drafted, mean + sigma * (z - factor.to(x.dtype).view(batch, *ones) * distance)
    )
    x.copy_(torch.where(outcome == Outcome.DONE, x, new))
    kept = torch.arange(width, device=x.device) < evaluated[:, None]
    guess.copy_(torch.where(kept.view(batch, width, *ones), origin, guess))


def implementation(backend: str) -> tuple[Callable[..., None], Callable[..., None], Callable[..., None], Callable]:
    """draft, verify, decide and commit; on buffers that the caller made to fit."""
    if backend == "torch":
        return draft_torch, verify_torch, decide_torch, commit_torch
    from ddpm_fast.kernels import speculate_triton as on_device

    return on_device.draft_triton, on_device.verify_triton, on_device.decide_triton, on_device.commit_triton
