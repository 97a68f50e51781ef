"""A sampler is a table: one row a step, all numbers that depend on the timestep alone.

Given the network's output `out` at x_t, every sampler here takes the step

    x0      = clip(a x_t + b out)
    x_{t-1} = c_x0 x0 + c_x x_t + c_out out + sigma z,    z ~ N(0, I)

so a sampler is six numbers a row. They are computed in float64. Notation: alpha_bar = alpha_bar_t, alpha_bar_s
belongs to the timestep s that the step goes to, alpha = alpha_bar / alpha_bar_s and beta = 1 - alpha.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ddpm_fast.config import SamplerConfig
from ddpm_fast.kernels.step import COLUMNS
from ddpm_fast.schedules import Array
from ddpm_fast.timesteps import Timesteps

MIN_VARIANCE = 1e-20  # what diffusers and lucidrains clamp beta_tilde at before its logarithm


@dataclass(frozen=True)
class StepTable:
    """The rows of a walk, first step first. All arrays have shape [steps].

    Attributes:
        timestep: what the network is told, int64.
        noise_id: counter word of the step's noise (ddpm_fast.kernels.philox), int64: the timestep, so that walks
            with different numbers of steps share the noise of the timesteps that they share.
        a, b: the origin estimate.
        c_x0, c_x, c_out: the mean of the step.
        sigma: standard deviation of the step's noise; with learned variances, what multiplies exp(log_variance / 2).
        log_min, log_max: with learned variances the bounds that the network's v in [-1, 1] interpolates between.
        known_scale, known_sigma: sqrt(alpha_bar_s) and sqrt(1 - alpha_bar_s), which noise a known image to where the
            step goes.
        input_scale: what the network's input is multiplied by; 1 in all samplers here.
        draws: bool: whether a plain loop draws noise at the step, used or not; where torch generators are followed.
        learned: whether the second half of the output's channels sets the variance.
        doubled: whether the network's output has twice the channels of x.
    """

    timestep: Timesteps
    noise_id: Timesteps
    a: Array
    b: Array
    c_x0: Array
    c_x: Array
    c_out: Array
    sigma: Array
    log_min: Array
    log_max: Array
    known_scale: Array
    known_sigma: Array
    input_scale: Array
    draws: Array
    learned: bool
    doubled: bool

    @classmethod
    def of(
        cls,
        timestep: Timesteps,
        columns: Mapping[str, Array],
        *,
        draws: Array,
        learned: bool = False,
        doubled: bool = False,
    ) -> "StepTable":
        """The table with these columns, and with what does nothing in all others.

        Args:
            timestep: what the network is told; also the noise id.
            columns: name → [steps].
            draws, learned, doubled: see above.
        """
        zero, one = np.zeros(len(timestep)), np.ones(len(timestep))
        idle = dict.fromkeys(COLUMNS, zero) | {"log_min": -one, "log_max": one, "input_scale": one}
        filled = idle | {name: np.asarray(column, np.float64) for name, column in columns.items()}
        ids = np.asarray(timestep, np.int64)
        return cls(ids, ids % 2**31, **filled, draws=np.asarray(draws, bool), learned=learned, doubled=doubled)

    def __len__(self) -> int:
        return len(self.timestep)

    def coefficients(self, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> Tensor:
        """The columns of `kernels.step.COLUMNS`: [steps, 11]."""
        columns = np.stack([getattr(self, name) for name in COLUMNS], axis=1)
        return torch.from_numpy(columns).to(device, dtype)

    def ids(self, device: str | torch.device = "cpu") -> Tensor:
        """Timestep and noise id of every row: int32 [steps, 2]."""
        return torch.from_numpy(np.stack([self.timestep, self.noise_id], axis=1)).to(device, torch.int32)


@dataclass(frozen=True)
class Clipping:
    """What becomes of the origin estimate.

    Attributes:
        limit: largest |x0|, or None.
        ratio: of dynamic thresholding, instead: the quantile of |x0| that becomes the bound, or None; with
        max_value: the largest bound.
    """

    limit: float | None = None
    ratio: float | None = None
    max_value: float = 1.0

    @classmethod
    def of(cls, config: SamplerConfig) -> "Clipping":
        """What the options say."""
        if config.thresholding:
            return cls(ratio=config.dynamic_thresholding_ratio, max_value=config.sample_max_value)
        return cls(limit=config.clip_sample_range if config.clip_sample else None)


def build_table(config: SamplerConfig) -> StepTable:
    """Compute every row of the walk that `config` describes."""
    t = config.inference_timesteps()
    alpha_bars = config.alphas_cumprod()
    alpha_bar, alpha_bar_s = alpha_bars[t], previous_alpha_bars(config, t)
    beta_tilde = posterior_variance(alpha_bar, alpha_bar_s)
    a, b = x0_coefficients(config.prediction_type, alpha_bar)
    learned = config.sampler == "ddpm" and config.variance_type in ("learned", "learned_range")
    if config.sampler == "ddpm":
        c_x0, c_x, c_out = posterior_mean(alpha_bar, alpha_bar_s)
        sigma = posterior_deviation(config.variance_type, alpha_bar, alpha_bar_s, beta_tilde)
    else:
        sigma = config.eta * np.sqrt(beta_tilde)
        c_x0, c_x, c_out = ddim_mean(config, alpha_bar, alpha_bar_s, sigma)
    log_min, log_max = variance_bounds(config.variance_type, alpha_bar, alpha_bar_s, beta_tilde)
    quiet = np.arange(len(t)) == len(t) - 1
    if config.noise_free == "t_zero":
        quiet = t == 0
    sigma = np.where(quiet, 0.0, config.temperature * sigma)
    return StepTable(
        timestep=t,
        noise_id=t,
        a=a,
        b=b,
        c_x0=c_x0,
        c_x=c_x,
        c_out=c_out,
        sigma=sigma,
        log_min=log_min,
        log_max=log_max,
        known_scale=np.sqrt(alpha_bar_s),
        known_sigma=np.sqrt(1 - alpha_bar_s),
        input_scale=np.ones_like(alpha_bar),
        draws=sigma != 0,
        learned=learned,
        doubled=config.variance_type in ("learned", "learned_range"),
    )


def previous_timesteps(config: SamplerConfig, t: Timesteps) -> Timesteps:
    """The timestep s that each step goes to; negative past the end of the walk."""
    if config.previous_timestep == "stride":
        return t - config.num_train_timesteps // len(t)
    return np.append(t[1:], -1)


def previous_alpha_bars(config: SamplerConfig, t: Timesteps) -> Array:
    """alpha_bar_s; past the end 1, or alpha_bar_0 without set_alpha_to_one."""
    alpha_bars = config.alphas_cumprod()
    s = previous_timesteps(config, t)
    final = 1.0 if config.set_alpha_to_one else alpha_bars[0]
    return np.where(s >= 0, alpha_bars[np.maximum(s, 0)], final)


def x0_coefficients(prediction_type: str, alpha_bar: Array) -> tuple[Array, Array]:
    """(a, b) with x0 = a x_t + b out (Ho et al. 2020, eq. 15; for v Salimans & Ho 2022, appendix D)."""
    if prediction_type == "epsilon":
        return 1 / np.sqrt(alpha_bar), -np.sqrt(1 - alpha_bar) / np.sqrt(alpha_bar)
    if prediction_type == "sample":
        return np.zeros_like(alpha_bar), np.ones_like(alpha_bar)
    return np.sqrt(alpha_bar), -np.sqrt(1 - alpha_bar)


def posterior_mean(alpha_bar: Array, alpha_bar_s: Array) -> tuple[Array, Array, Array]:
    """(c_x0, c_x, c_out) of the mean of q(x_s | x_t, x_0) (Ho et al. 2020, eq. 7)."""
    alpha = alpha_bar / alpha_bar_s
    c_x0 = np.sqrt(alpha_bar_s) * (1 - alpha) / (1 - alpha_bar)
    c_x = np.sqrt(alpha) * (1 - alpha_bar_s) / (1 - alpha_bar)
    return c_x0, c_x, np.zeros_like(c_x)


def posterior_variance(alpha_bar: Array, alpha_bar_s: Array) -> Array:
    """beta_tilde, the variance of q(x_s | x_t, x_0) (Ho et al. 2020, eq. 7)."""
    return (1 - alpha_bar_s) / (1 - alpha_bar) * (1 - alpha_bar / alpha_bar_s)


def posterior_deviation(variance_type: str, alpha_bar: Array, alpha_bar_s: Array, beta_tilde: Array) -> Array:
    """sigma of the DDPM step: sqrt(beta_tilde) or sqrt(beta) (Ho et al. 2020, section 3.2); 1 where it is learned.

    The "_log" types are the same law here. (In diffusers, fixed_large_log is the square root of a logarithm: NaN.)
    """
    if variance_type.startswith("learned"):
        return np.ones_like(beta_tilde)
    return np.sqrt(beta_tilde if variance_type.startswith("fixed_small") else 1 - alpha_bar / alpha_bar_s)


def variance_bounds(variance_type: str, alpha_bar: Array, alpha_bar_s: Array, beta_tilde: Array) -> tuple[Array, Array]:
    """(log_min, log_max) with log sigma^2 = f log_max + (1 - f) log_min, f = (v + 1) / 2.

    learned_range: log beta_tilde and log beta (Nichol & Dhariwal 2021, eq. 15). learned: -1 and 1, which makes
    log sigma^2 = v. Unused otherwise.
    """
    if variance_type == "learned_range":
        beta = 1 - alpha_bar / alpha_bar_s
        return np.log(np.maximum(beta_tilde, MIN_VARIANCE)), np.log(np.maximum(beta, MIN_VARIANCE))
    return -np.ones_like(beta_tilde), np.ones_like(beta_tilde)


def ddim_mean(config: SamplerConfig, alpha_bar: Array, alpha_bar_s: Array, sigma: Array) -> tuple[Array, Array, Array]:
    """(c_x0, c_x, c_out) of DDIM's step sqrt(alpha_bar_s) x0 + d epsilon (Song et al. 2021, eq. 12).

    d = sqrt(1 - alpha_bar_s - sigma^2), and epsilon is what x_t holds besides the clipped x0, or what the raw
    output says it is.
    """
    d = np.sqrt(np.maximum(1 - alpha_bar_s - sigma**2, 0.0))
    zero = np.zeros_like(d)
    if config.ddim_direction == "x0":
        c_x = d / np.sqrt(1 - alpha_bar)
        return np.sqrt(alpha_bar_s) - c_x * np.sqrt(alpha_bar), c_x, zero
    if config.prediction_type == "epsilon":
        return np.sqrt(alpha_bar_s), zero, d
    if config.prediction_type == "v_prediction":
        return np.sqrt(alpha_bar_s), d * np.sqrt(1 - alpha_bar), d * np.sqrt(alpha_bar)
    c_x = d / np.sqrt(1 - alpha_bar)
    return np.sqrt(alpha_bar_s), c_x, -c_x * np.sqrt(alpha_bar)
