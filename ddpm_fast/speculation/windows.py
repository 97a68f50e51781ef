"""How many steps a speculative walk drafts at once: given, or chosen by the network's cost and how good guesses are."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ddpm_fast.table import StepTable
from ddpm_fast.validate import whole

LARGEST = 1024  # drafts of a sample in one call
WIDTHS = (1, 2, 4, 8, 16, 32, 64, 128, 256)  # that are chosen from
RANGES = (0, 25, 50, 100, 200, 400, 700)  # of t, in thousandths: a window is chosen for each
PAYS = 1.03  # times faster than one step at a time: from there on speculating is worth it


@dataclass(frozen=True)
class Windows:
    """How many steps are drafted at once, by the timestep of the first.

    Attributes:
        bounds: pairs (t, window), t ascending from 0: from timestep t upwards, `window` drafts.
    """

    bounds: tuple[tuple[int, int], ...]

    def __post_init__(self) -> None:
        starts = [whole("a timestep of the windows", t, 0) for t, _ in self.bounds]
        for _, window in self.bounds:
            whole("window", window, 1, LARGEST)
        if not starts or starts[0] != 0 or sorted(set(starts)) != starts:
            raise ValueError(f"windows go by timesteps that ascend from 0, got {self.bounds}")

    @classmethod
    def of(cls, value: Any) -> "Windows":
        """From one window for all, or from {timestep: window}.

        Raises:
            ValueError, TypeError: a window that is no whole number in 1 … 1024; no window for timestep 0.
        """
        if isinstance(value, cls):
            return value
        if isinstance(value, Mapping):
            # JSON has texts for keys.
            told = ((int(t) if isinstance(t, str) and t.isdecimal() else t, window) for t, window in value.items())
            pairs = [
                (whole("a timestep of the windows", t, 0), whole("window", window, 1, LARGEST)) for t, window in told
            ]
            return cls(tuple(sorted(pairs)))
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
            raise TypeError(f"speculate is False, True, a window or {{timestep: window}}, got {value!r}")
        return cls(((0, whole("speculate", value, 1, LARGEST)),))

    def to_dict(self) -> dict[int, int]:
        """As {timestep: window}."""
        return dict(self.bounds)

    def rows(self, timesteps: NDArray[np.int64]) -> NDArray[np.int32]:
        """The window of a round that begins with each of the steps."""
        starts, windows = zip(*self.bounds, strict=True)
        return np.array(windows, np.int32)[np.searchsorted(starts, timesteps, side="right") - 1]

    @property
    def sequential(self) -> bool:
        """Whether nothing is speculated on."""
        return all(window == 1 for _, window in self.bounds)


class GuessErrors:
    """How far the origin estimates of a walk are from those of some steps before.

    Fed with the estimates in the order of the steps, it finds |D|^2 of every step for a guess that is `lag` steps old.

    Args:
        table: the rows of the walk.
        reach: the longest lag.
    """

    def __init__(self, table: StepTable, reach: int) -> None:
        noisy = table.sigma != 0
        self._scale = np.where(noisy, (table.c_x0 + table.c_out / table.b) / np.where(noisy, table.sigma, 1), 0.0)
        self._recent: list[Tensor] = []
        self.squares = np.full((len(table), reach), np.inf)  # [S, lag - 1]; nothing is known before the first
        self._row = 0

    def add(self, origins: Tensor) -> None:
        """The estimates of the next steps: [K, ...]."""
        for origin in origins.flatten(1):
            if self._recent:
                apart = (torch.stack(self._recent[::-1]) - origin).square().sum(1)
                self.squares[self._row, : len(apart)] = self._scale[self._row] ** 2 * apart.double().cpu().numpy()
            self._recent = [*self._recent, origin][-self.squares.shape[1] :]
            self._row += 1


def acceptance(squares: NDArray[np.float64]) -> NDArray[np.float64]:
    """2 Phi(-|D| / 2): how often a draft at that distance is accepted."""
    return torch.special.erfc(torch.from_numpy(np.sqrt(squares / 8))).numpy()


def expected_cost(
    windows: NDArray[np.int32], accepted: NDArray[np.float64], costs: Mapping[int, float]
) -> NDArray[np.float64]:
    """What the walk from each step on costs with these windows: [S + 1].

    Args:
        windows: [S].
        accepted: probability that the draft of a step is accepted with a guess `lag` steps old: [S, lag - 1].
        costs: of a call with so many drafts.
    """
    steps = len(windows)
    left = np.zeros(steps + 1)
    for row in range(steps - 1, -1, -1):
        left[row] = _round_cost(row, int(windows[row]), left, accepted, costs)
    return left


def best_windows(accepted: NDArray[np.float64], costs: Mapping[int, float]) -> NDArray[np.int32]:
    """The window of every step that makes the expected cost least, by dynamic programming: [S]."""
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
    """A round from `row` on and what then is left: it ends with the first rejection, or with its last draft."""
    count = min(width, len(accepted) - row)
    ahead = np.arange(count)
    alive = np.concatenate([[1.0], np.cumprod(accepted[row + ahead, ahead])])  # all of the first k were accepted
    ends = alive[:-1] - alive[1:]
    ends[-1] = alive[-2]
    return costs[width] + float(ends @ left[row + 1 : row + 1 + count])


def choose_windows(table: StepTable, squares: NDArray[np.float64], costs: Mapping[int, float]) -> Windows:
    """The windows for a network of these costs, constant over ranges of t; of one step where others do not pay.

    From the windows that are best for every step by itself, averaged over each range, by halving and doubling.

    Args:
        table: the rows of the walk.
        squares: |D|^2 of every step and lag (`GuessErrors`), up to the widest of costs.
        costs: seconds of a call with so many drafts of every sample, for some of WIDTHS.
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
    if len(table) * costs[1] < PAYS * least:
        return Windows(((0, 1),))
    kept = [k for k in range(len(starts)) if k == 0 or widths[k] != widths[k - 1]]
    return Windows(tuple((starts[k], widths[k]) for k in kept))
