"""Noise schedules: beta_t for t = 0 … T-1, in float64.

beta_t is the variance that the forward step q(x_t | x_{t-1}) = N(sqrt(1 - beta_t) x_{t-1}, beta_t I) adds
(Ho et al. 2020, eq. 2), and alpha_bar_t = prod_{s<=t} (1 - beta_s). The names are diffusers'.
"""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def linear(steps: int, beta_start: float, beta_end: float) -> Array:
    """Return a beta that rises linearly (Ho et al. 2020)."""
    return np.linspace(beta_start, beta_end, steps)


def scaled_linear(steps: int, beta_start: float, beta_end: float) -> Array:
    """Return a beta whose square root rises linearly (latent diffusion, Rombach et al. 2022)."""
    root: Array = np.linspace(beta_start**0.5, beta_end**0.5, steps)
    return root**2


def squaredcos_cap_v2(steps: int, beta_start: float, beta_end: float) -> Array:
    """Return the beta of an alpha_bar that is a squared cosine, capped at 0.999 (Nichol & Dhariwal 2021, eq. 17).

    The end points are unused.
    """
    t = np.arange(steps + 1) / steps
    alpha_bar = np.cos((t + 0.008) / 1.008 * np.pi / 2) ** 2
    betas: Array = np.minimum(1 - alpha_bar[1:] / alpha_bar[:-1], 0.999)
    return betas


def sigmoid(steps: int, beta_start: float, beta_end: float) -> Array:
    """Return a beta that is a sigmoid over [-6, 6] between the end points (GeoDiff, Xu et al. 2022).

    This is diffusers' "sigmoid".
    """
    return _sigmoid(np.linspace(-6, 6, steps)) * (beta_end - beta_start) + beta_start


def sigmoid_alpha_bar(steps: int, beta_start: float, beta_end: float) -> Array:
    """Return the beta of an alpha_bar that is a sigmoid over [-3, 3] (Jabri et al. 2022; lucidrains' default).

    beta is capped at 0.999. The end points are unused.
    """
    start, end = -3.0, 3.0
    t = np.arange(steps + 1) / steps
    low, high = _sigmoid(np.array([start, end]))
    alpha_bar = (high - _sigmoid(start + t * (end - start))) / (high - low)
    betas: Array = np.clip(1 - alpha_bar[1:] / alpha_bar[:-1], 0, 0.999)
    return betas


BETA_SCHEDULES: dict[str, Callable[[int, float, float], Array]] = {
    schedule.__name__: schedule for schedule in (linear, scaled_linear, squaredcos_cap_v2, sigmoid, sigmoid_alpha_bar)
}


def betas_from_list(betas: Sequence[float], steps: int) -> Array:
    """Return the betas as an array; raise ValueError unless they are `steps` numbers in (0, 1).

    The very last beta may be 1.
    """
    try:
        values = np.asarray(betas, dtype=np.float64)
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"trained_betas must be numbers, got {betas!r:.80}") from error
    if values.shape != (steps,):
        raise ValueError(
            f"trained_betas must be num_train_timesteps = {steps} numbers in one dimension, got shape {values.shape}"
        )
    bad = np.flatnonzero(~((values > 0) & (values < 1)))
    if bad.size and not (bad.tolist() == [steps - 1] and values[-1] == 1):
        raise ValueError(f"trained_betas must lie between 0 and 1, got {values[bad[0]]} at timestep {bad[0]}")
    return values


def rescale_zero_terminal_snr(betas: Array) -> Array:
    """Shift and scale sqrt(alpha_bar) so that the last one becomes 0 and the first is kept.

    (Lin et al. 2023, algorithm 1.)
    """
    root = np.sqrt(np.cumprod(1 - betas))
    root = (root - root[-1]) * root[0] / (root[0] - root[-1])
    alpha_bar = root**2
    return 1 - np.concatenate([alpha_bar[:1], alpha_bar[1:] / alpha_bar[:-1]])


def _sigmoid(x: Array) -> Array:
    """Return 1 / (1 + exp(-x))."""
    return 1 / (1 + np.exp(-x))
