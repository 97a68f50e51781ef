"""Which of the T training timesteps a sampler visits, descending (Lin et al. 2023, table 2; diffusers' names)."""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

Timesteps = NDArray[np.int64]


def leading(train_steps: int, steps: int) -> Timesteps:
    """0, r, 2r, … with the integer stride r = T // N: begins short of T - 1 unless N divides T."""
    return np.arange(steps)[::-1] * (train_steps // steps)


def trailing(train_steps: int, steps: int) -> Timesteps:
    """T - 1, T - 1 - T/N, …, rounded: always begins at T - 1.

    The float range is diffusers', so that ties round alike. For 62 of the N up to 1000 it is one too long, and
    diffusers then visits -1; this yields exactly N.
    """
    return np.round(np.arange(train_steps, 0, -train_steps / steps)).astype(np.int64)[:steps] - 1


def linspace(train_steps: int, steps: int) -> Timesteps:
    """Both ends included, evenly spread and rounded; one step is t = 0."""
    return np.round(np.linspace(0, train_steps - 1, steps))[::-1].astype(np.int64)


TIMESTEP_SPACINGS: dict[str, Callable[[int, int], Timesteps]] = {
    spacing.__name__: spacing for spacing in (leading, trailing, linspace)
}


def explicit(timesteps: Sequence[int], train_steps: int) -> Timesteps:
    """Check timesteps that the caller brings: integers in [0, T), strictly descending."""
    values = np.asarray(timesteps)
    if values.ndim != 1 or values.size == 0 or not np.issubdtype(values.dtype, np.integer):
        raise ValueError(f"timesteps must be a non-empty list of integers, got {timesteps!r}")
    values = values.astype(np.int64)  # unsigned differences would wrap
    check_range(values, train_steps)
    if np.any(np.diff(values) >= 0):
        raise ValueError(f"timesteps must descend strictly, got {values.tolist()}")
    return values


def check_range(timesteps: Timesteps, train_steps: int) -> None:
    """Raise ValueError unless all timesteps lie in [0, T)."""
    outside = timesteps[(timesteps < 0) | (timesteps >= train_steps)]
    if outside.size:
        raise ValueError(f"timesteps must lie in [0, {train_steps - 1}], got {outside[0]}")
