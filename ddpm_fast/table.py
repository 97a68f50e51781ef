"""The step table of a sampler: one row a step, with all numbers that depend on the timestep alone.

Given the network's output `out` at x_t, every sampler here takes the step

    x0      = clip(a x_t + b out)
    x_{t-1} = c_x0 x0 + c_x x_t + c_out out + sigma z,    z ~ N(0, I)

A sampler is therefore six numbers a row, computed in float64. Notation: s is the timestep that the step goes to,
alpha_bar = alpha_bar_t, alpha = alpha_bar / alpha_bar_s and beta = 1 - alpha.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ddpm_fast.config import SamplerConfig
from ddpm_fast.kernels.rows import COLUMNS
from ddpm_fast.schedules import Array
from ddpm_fast.timesteps import Timesteps

MIN_VARIANCE = 1e-20  # diffusers and lucidrains clamp beta_tilde here before its logarithm


@dataclass(frozen=True)
class StepTable:
    """The rows of a run, first step first. All arrays have shape [steps].

    Attributes:
        timestep: Timestep that the network gets, int64.
        noise_id: Counter word of the step's noise (ddpm_fast.kernels.philox), int64. It is the timestep, so that runs
            with different numbers of steps share the noise of the timesteps that they share.
        a, b: Coefficients of the x0 prediction.
        c_x0, c_x, c_out: Coefficients of the step's mean.
        sigma: Standard deviation of the step's noise. With learned variances, the factor of exp(log_variance / 2).
        log_min, log_max: Bounds between which the network's v in [-1, 1] interpolates, with learned variances.
        known_scale, known_sigma: sqrt(alpha_bar_s) and sqrt(1 - alpha_bar_s), which noise a known image to the level of
            the timestep that the step goes to.
        draws: True where a plain loop draws noise, used or not, bool. Needed to follow torch generators.
        learned: True if the second half of the output's channels sets the variance.
        doubled: True if the network's output has twice the channels of x.
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
        """Return the table with these columns. All other columns get values that have no effect.

        Args:
            timestep: Timesteps that the network gets, [steps]. They also become the noise ids.
            columns: Names of columns and their values, [steps] each.
            draws, learned, doubled: Attributes of the table, as above.
        """
        zero, one = np.zeros(len(timestep)), np.ones(len(timestep))
        idle = dict.fromkeys(COLUMNS, zero) | {"log_min": -one, "log_max": one}
        filled = idle | {name: np.asarray(column, np.float64) for name, column in columns.items()}
        ids = np.asarray(timestep, np.int64)
        return cls(ids, ids % 2**31, **filled, draws=np.asarray(draws, bool), learned=learned, doubled=doubled)

    def __len__(self) -> int:
        return len(self.timestep)

    def coefficients(self, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the columns of `kernels.rows.COLUMNS`: [steps, 10]."""
        columns = np.stack([getattr(self, name) for name in COLUMNS], axis=1)
        return torch.from_numpy(columns).to(device, dtype)

    def ids(self, device: str | torch.device = "cpu") -> Tensor:
        """Return the timestep and the noise id of every row: int32 [steps, 2]."""
        return torch.from_numpy(np.stack([self.timestep, self.noise_id], axis=1)).to(device, torch.int32)


@dataclass(frozen=True)
class Clipping:
    """The clipping of the x0 prediction.

    Attributes:
        limit: Largest |x0|. None means no fixed bound.
        ratio: Quantile of |x0| that becomes the bound of dynamic thresholding. None means no thresholding.
        max_value: Largest bound of dynamic thresholding.
    """

    limit: float | None = None
    ratio: float | None = None
    max_value: float = 1.0

    @classmethod
    def of(cls, config: SamplerConfig) -> "Clipping":
        """Return the clipping that the configuration describes."""
        if config.thresholding:
            return cls(ratio=config.dynamic_thresholding_ratio, max_value=config.sample_max_value)
        return cls(limit=config.clip_sample_range if config.clip_sample else None)


def build_table(config: SamplerConfig) -> StepTable:
    """Compute every row of the run that `config` describes."""
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
    known_level = np.append(alpha_bar_s[:-1], 1.0)  # a run ends with the known image itself, wherever its table ends
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
        known_scale=np.sqrt(known_level),
        known_sigma=np.sqrt(1 - known_level),
        draws=sigma != 0,
        learned=learned,
        doubled=config.variance_type in ("learned", "learned_range"),
    )


def previous_timesteps(config: SamplerConfig, t: Timesteps) -> Timesteps:
    """Return the timestep s that each step goes to. A negative s is past the end of the run."""
    if config.previous_timestep == "stride":
        return t - config.num_train_timesteps // len(t)
    return np.append(t[1:], -1)


def previous_alpha_bars(config: SamplerConfig, t: Timesteps) -> Array:
    """Return alpha_bar_s of each step: past the end of the run 1, or alpha_bar_0 without set_alpha_to_one."""
    alpha_bars = config.alphas_cumprod()
    s = previous_timesteps(config, t)
    final = 1.0 if config.set_alpha_to_one else alpha_bars[0]
    return np.where(s >= 0, alpha_bars[np.maximum(s, 0)], final)


def x0_coefficients(prediction_type: str, alpha_bar: Array) -> tuple[Array, Array]:
    """Return (a, b) with x0 = a x_t + b out (Ho et al. 2020, eq. 15; for v Salimans & Ho 2022, appendix D)."""
    if prediction_type == "epsilon":
        return 1 / np.sqrt(alpha_bar), -np.sqrt(1 - alpha_bar) / np.sqrt(alpha_bar)
    if prediction_type == "sample":
        return np.zeros_like(alpha_bar), np.ones_like(alpha_bar)
    return np.sqrt(alpha_bar), -np.sqrt(1 - alpha_bar)


def posterior_mean(alpha_bar: Array, alpha_bar_s: Array) -> tuple[Array, Array, Array]:
    """Return (c_x0, c_x, c_out) of the mean of q(x_s | x_t, x_0) (Ho et al. 2020, eq. 7)."""
    alpha = alpha_bar / alpha_bar_s
    c_x0 = np.sqrt(alpha_bar_s) * (1 - alpha) / (1 - alpha_bar)
    c_x = np.sqrt(alpha) * (1 - alpha_bar_s) / (1 - alpha_bar)
    return c_x0, c_x, np.zeros_like(c_x)


def posterior_variance(alpha_bar: Array, alpha_bar_s: Array) -> Array:
    """Return beta_tilde, the variance of q(x_s | x_t, x_0) (Ho et al. 2020, eq. 7)."""
    return (1 - alpha_bar_s) / (1 - alpha_bar) * (1 - alpha_bar / alpha_bar_s)


def posterior_deviation(variance_type: str, alpha_bar: Array, alpha_bar_s: Array, beta_tilde: Array) -> Array:
    """Return sigma of the DDPM step: sqrt(beta_tilde) or sqrt(beta) (Ho et al. 2020, section 3.2), or 1 if learned.

    The "_log" types are the same law here. (In diffusers, fixed_large_log is the square root of a logarithm: NaN.)
    """
    if variance_type.startswith("learned"):
        return np.ones_like(beta_tilde)
    return np.sqrt(beta_tilde if variance_type.startswith("fixed_small") else 1 - alpha_bar / alpha_bar_s)


def variance_bounds(variance_type: str, alpha_bar: Array, alpha_bar_s: Array, beta_tilde: Array) -> tuple[Array, Array]:
    """Return (log_min, log_max) with log sigma^2 = f log_max + (1 - f) log_min, f = (v + 1) / 2.

    For "learned_range" the bounds are log beta_tilde and log beta (Nichol & Dhariwal 2021, eq. 15). For "learned" the
    bounds are -1 and 1, so that log sigma^2 = v. Fixed variances do not use the bounds.
    """
    if variance_type == "learned_range":
        beta = 1 - alpha_bar / alpha_bar_s
        return np.log(np.maximum(beta_tilde, MIN_VARIANCE)), np.log(np.maximum(beta, MIN_VARIANCE))
    return -np.ones_like(beta_tilde), np.ones_like(beta_tilde)


def ddim_mean(config: SamplerConfig, alpha_bar: Array, alpha_bar_s: Array, sigma: Array) -> tuple[Array, Array, Array]:
    """Return (c_x0, c_x, c_out) of DDIM's step sqrt(alpha_bar_s) x0 + d epsilon (Song et al. 2021, eq. 12).

    d = sqrt(1 - alpha_bar_s - sigma^2). With ddim_direction = "x0", epsilon is computed from x_t and the clipped x0.
    With "output", epsilon is the one that the network's raw output stands for.
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
