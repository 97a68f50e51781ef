"""Spacings: the timesteps, of the T training timesteps, that a sampler visits, descending.

The names are diffusers' (Lin et al. 2023, table 2).
"""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

Timesteps = NDArray[np.int64]


def leading(train_steps: int, steps: int) -> Timesteps:
    """Return (N - 1) r, …, 2r, r, 0 with the integer stride r = T // N.

    The first timestep is less than T - 1 unless r = 1 and N = T.
    """
    return np.arange(steps)[::-1] * (train_steps // steps)


def trailing(train_steps: int, steps: int) -> Timesteps:
    """Return T - 1, T - 1 - T/N, …, rounded. The first timestep is always T - 1.

    The float range is diffusers', so that ties round alike. For 62 of the N up to 1000 that range is one too long, and
    diffusers then visits -1; this function returns exactly N timesteps.
    """
    return np.round(np.arange(train_steps, 0, -train_steps / steps)).astype(np.int64)[:steps] - 1


def linspace(train_steps: int, steps: int) -> Timesteps:
    """Return N evenly spread timesteps, rounded, both ends included. A single step is t = 0."""
    return np.round(np.linspace(0, train_steps - 1, steps))[::-1].astype(np.int64)


TIMESTEP_SPACINGS: dict[str, Callable[[int, int], Timesteps]] = {
    spacing.__name__: spacing for spacing in (leading, trailing, linspace)
}


def explicit(timesteps: Sequence[int], train_steps: int) -> Timesteps:
    """Return the given timesteps as int64; raise ValueError unless they are integers in [0, T), strictly descending."""
    values = np.asarray(timesteps)
    if values.ndim != 1 or values.size == 0 or not np.issubdtype(values.dtype, np.integer):
        raise ValueError(f"timesteps must be a non-empty list of integers, got {timesteps!r}")
    values = values.astype(np.int64)  # differences of unsigned integers would wrap
    check_range(values, train_steps)
    if np.any(np.diff(values) >= 0):
        raise ValueError(f"timesteps must descend strictly, got {values.tolist()}")
    return values


def check_range(timesteps: Timesteps, train_steps: int) -> None:
    """Raise ValueError unless all timesteps lie in [0, T)."""
    outside = timesteps[(timesteps < 0) | (timesteps >= train_steps)]
    if outside.size:
        raise ValueError(f"timesteps must lie in [0, {train_steps - 1}], got {outside[0]}")
