"""Plans: how many steps a round drafts, given or chosen by the cost of network calls and the quality of guesses."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ddpm_fast.table import StepTable
from ddpm_fast.validate import whole

LARGEST = 1024  # drafts of one sample in one call
WIDTHS = (1, 2, 4, 8, 16, 32, 64, 128, 256)  # windows to choose from
RANGES = (0, 25, 50, 100, 200, 400, 700)  # of t, in thousandths; a window is chosen for each range
MIN_SPEEDUP = 1.03  # over one step at a time; with less, nothing is drafted


@dataclass(frozen=True)
class WindowPlan:
    """A plan: how many steps a round drafts, by the timestep of its first step.

    Attributes:
        bounds: Pairs (t, window), t ascending from 0. From timestep t upwards a round has `window` drafts.

    Raises:
        ValueError: The timesteps do not ascend from 0, or a window is not in 1 … 1024.
    """

    bounds: tuple[tuple[int, int], ...]

    def __post_init__(self) -> None:
        starts = [whole("a timestep of the windows", t, 0) for t, _ in self.bounds]
        for _, window in self.bounds:
            whole("window", window, 1, LARGEST)
        if not starts or starts[0] != 0 or sorted(set(starts)) != starts:
            raise ValueError(f"windows go by timesteps that ascend from 0, got {self.bounds}")

    @classmethod
    def of(cls, value: Any) -> "WindowPlan":
        """Build a plan from one window for all timesteps, or from {timestep: window}.

        Raises:
            ValueError, TypeError: A window is no whole number in 1 … 1024, or there is no window for timestep 0.
        """
        if isinstance(value, cls):
            return value
        if isinstance(value, Mapping):
            # The keys of JSON are texts.
            items = ((int(t) if isinstance(t, str) and t.isdecimal() else t, window) for t, window in value.items())
            pairs = [
                (whole("a timestep of the windows", t, 0), whole("window", window, 1, LARGEST)) for t, window in items
            ]
            return cls(tuple(sorted(pairs)))
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
            raise TypeError(f"speculate is False, True, a window or {{timestep: window}}, got {value!r}")
        return cls(((0, whole("speculate", value, 1, LARGEST)),))

    def to_dict(self) -> dict[int, int]:
        """Return {timestep: window}."""
        return dict(self.bounds)

    def rows(self, timesteps: NDArray[np.int64]) -> NDArray[np.int32]:
        """Return the window of a round that begins with each of the steps."""
        starts, windows = zip(*self.bounds, strict=True)
        return np.array(windows, np.int32)[np.searchsorted(starts, timesteps, side="right") - 1]

    @property
    def sequential(self) -> bool:
        """Whether every round has one draft, so that nothing is speculated on."""
        return all(window == 1 for _, window in self.bounds)


class GuessErrors:
    """Distances of a run's x0 predictions from the predictions of earlier steps.

    `add` takes the predictions in the order of the steps. `squares` then holds |D|^2 of every step for a guess that is
    `lag` steps old.

    Args:
        table: The rows of the run.
        reach: The longest lag.
    """

    def __init__(self, table: StepTable, reach: int) -> None:
        noisy = table.sigma != 0
        self._scale = np.where(noisy, (table.c_x0 + table.c_out / table.b) / np.where(noisy, table.sigma, 1), 0.0)
        self._recent: list[Tensor] = []
        self.squares = np.full((len(table), reach), np.inf)  # [S, lag - 1]; there is no guess before the first step
        self._row = 0

    def add(self, predictions: Tensor) -> None:
        """Add the x0 predictions of the next steps, [K, ...]; they are copied."""
        for x0 in predictions.flatten(1).clone():
            if self._recent:
                squares = (torch.stack(self._recent[::-1]) - x0).square().sum(1)
                self.squares[self._row, : len(squares)] = self._scale[self._row] ** 2 * squares.double().cpu().numpy()
            self._recent = [*self._recent, x0][-self.squares.shape[1] :]
            self._row += 1


def acceptance(squares: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return 2 Phi(-|D| / 2), the probability that a draft at distance |D| is accepted."""
    probability: NDArray[np.float64] = torch.special.erfc(torch.from_numpy(np.sqrt(squares / 8))).numpy()
    return probability


def expected_cost(
    windows: NDArray[np.int32], accepted: NDArray[np.float64], costs: Mapping[int, float]
) -> NDArray[np.float64]:
    """Return the expected cost of the rest of the run, from each step on: [S + 1].

    Args:
        windows: Window of a round that begins with each step, [S].
        accepted: Probability that a step's draft is accepted with a guess that is `lag` steps old, [S, lag - 1].
        costs: Cost of a call, by the number of drafts.
    """
    steps = len(windows)
    left = np.zeros(steps + 1)
    for row in range(steps - 1, -1, -1):
        left[row] = _round_cost(row, int(windows[row]), left, accepted, costs)
    return left


def best_windows(accepted: NDArray[np.float64], costs: Mapping[int, float]) -> NDArray[np.int32]:
    """Return the windows of least expected cost, found by dynamic programming: [S]."""
    steps = len(accepted)
    left, best = np.zeros(steps + 1), np.ones(steps, np.int32)
    for row in range(steps - 1, -1, -1):
        found = {width: _round_cost(row, width, left, accepted, costs) for width in costs}
        best[row] = min(found, key=found.__getitem__)
        left[row] = found[int(best[row])]
    return best


def _round_cost(
    row: int, width: int, left: NDArray[np.float64], accepted: NDArray[np.float64], costs: Mapping[int, float]
) -> float:
    """Return the cost of a round from `row` on and of the rest of the run; a rejection ends the round."""
    count = min(width, len(accepted) - row)
    drafts = np.arange(count)
    alive = np.concatenate([[1.0], np.cumprod(accepted[row + drafts, drafts])])  # the first k are all accepted
    ends = alive[:-1] - alive[1:]
    ends[-1] = alive[-2]
    return costs[width] + float(ends @ left[row + 1 : row + 1 + count])


def choose_windows(table: StepTable, squares: NDArray[np.float64], costs: Mapping[int, float]) -> WindowPlan:
    """Return the plan for a network of these costs; windows of one step where others do not pay.

    A plan has one window for each range of t. The search starts from the best window of every step by itself, averaged
    over each range, and then halves and doubles windows.

    Args:
        table: The rows of the run.
        squares: |D|^2 of every step and lag (`GuessErrors`), up to the widest of the costs.
        costs: Seconds of a call, by the number of drafts of every sample, for some of WIDTHS.
    """
    accepted = acceptance(squares)
    best = best_windows(accepted, costs)
    last = int(table.timestep.max()) + 1
    starts = sorted({low * last // 1000 for low in RANGES})
    place = np.searchsorted(starts, table.timestep, side="right") - 1
    exponents = [
        round(float(np.log2(best[place == k]).mean())) if (place == k).any() else 0 for k in range(len(starts))
    ]
    widths = [2**exponent for exponent in exponents]

    def cost(chosen: Sequence[int]) -> float:
        return float(expected_cost(np.array(chosen, np.int32)[place], accepted, costs)[0])

    least = cost(widths)
    for _ in range(3):
        before = least
        for k in range(len(starts)):
            for width in (widths[k] // 2, 2 * widths[k]):
                tried = [*widths[:k], width, *widths[k + 1 :]]
                if width in costs and cost(tried) < least:
                    widths, least = tried, cost(tried)
                    break
        if least == before:
            break
    if len(table) * costs[1] < MIN_SPEEDUP * least:
        return WindowPlan(((0, 1),))
    kept = [k for k in range(len(starts)) if k == 0 or widths[k] != widths[k - 1]]
    return WindowPlan(tuple((starts[k], widths[k]) for k in kept))
