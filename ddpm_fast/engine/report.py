"""What a call reports besides its samples."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Generic, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

T = TypeVar("T")


class OfThread(Generic[T]):
    """A value that every thread sets for itself; a thread that has set none reads the last one that any thread set."""

    def __init__(self, value: T) -> None:
        self._last, self._own = value, threading.local()

    def set(self, value: T) -> None:
        """Set the value of this thread."""
        self._last = self._own.value = value

    def get(self) -> T:
        """Return the value of this thread."""
        return cast("T", getattr(self._own, "value", self._last))


@dataclass(frozen=True)
class Speculation:
    """The windows, the cost and the acceptance of a speculative run.

    Attributes:
        windows: The plan, {timestep: window}. With the seeds it reproduces the images.
        calls: Sequential network calls.
        volume: Network evaluations as a multiple of a run one step at a time. Drafts that were computed in vain count,
            and so do idle rows of the batch.
        timesteps: Timesteps of the steps, int64 [steps].
        acceptance: Share of the samples whose draft was accepted, float64 [steps].
    """

    windows: dict[int, int]
    calls: int
    volume: float
    timesteps: NDArray[np.int64]
    acceptance: NDArray[np.float64]

    @classmethod
    def sequential(cls, timesteps: NDArray[np.int64]) -> Speculation:
        """Return the report of a run one step at a time."""
        return cls({0: 1}, len(timesteps), 1.0, timesteps, np.ones(len(timesteps)))

    def accepted(self, low: int, high: int) -> float:
        """Return the share of drafts accepted at timesteps low … high - 1; NaN where there is no step."""
        share = self.acceptance[(self.timesteps >= low) & (self.timesteps < high)]
        return float(share.mean()) if len(share) else float("nan")
