"""The report of a speculative run."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


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
