"""What else could shorten a speculative walk: guesses and rules of acceptance, counted in plain PyTorch.

    python -m research.speculation_ideas           minutes; writes research/results/cpu__speculation_ideas.json
    python -m research.speculation_ideas --smoke   seconds: whether it runs

One sample at a time, windows of one width, the embedded models. Each idea keeps the law
(research/test_speculation_ideas.py).

Guesses of the origin, all made before a draft's own noise is looked at:

    frozen      the network's estimate at the last examined state, as published
    of the row  its estimate at the draft of the same row in the round before, as ddpm_fast does
    secant      of the row, and kappa (y - y'), where y' is the draft it was made at; kappa fitted to examined rows
    response    of the row, and M (y - y'), M symmetric, in the few directions in which estimates of examined rows moved

Rules:

    each step   a draft is accepted or not by itself, and the first that is not is reflected, as ddpm_fast does
    blocks      block verification (Sun et al. 2024, arXiv 2403.10444): what one draft lacks another may make up for;
                the longest prefix that passes is kept. All noise of the block has a say in that, so that what is
                not kept of it is drawn anew
"""

import argparse
import math
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
import torch
from scipy.special import ndtr
from torch import Tensor

from benchmarks.common.results import RESEARCH, write_result
from benchmarks.speculation.run import labels
from ddpm_fast.engine.device import Model
from ddpm_fast.models.checkpoint import load_checkpoint
from ddpm_fast.table import StepTable, build_table

WIDTHS = (16, 32, 64)
FORGET = 0.7  # a round: how fast fits forget
FEWEST = 8  # pairs that a response is fitted to
DIRECTIONS = 0.2  # of the strongest: directions of a response that are weaker are left out
RIDGE = 1e-2  # of the mean square of what is fitted


@dataclass
class Round:
    """What a round drafted, for rows `first` and after: [m, n] float64, n elements of the sample."""

    first: int
    states: Tensor
    scaled: Tensor  # states in units of the origin, y / sqrt(alpha_bar)
    guesses: Tensor
    noise: Tensor
    origins: Tensor  # what the network says
    distance: Tensor  # D
    innovations: Tensor  # [m - 1, n]: what the next scaled state has that the estimate at this one does not explain

    def __len__(self) -> int:
        return len(self.states)


class Guess(Protocol):
    """Guesses of the origin."""

    def __call__(self, row: int, state: Tensor, last: Tensor) -> Tensor:
        """For the scaled draft `state` of a row; `last` is the estimate at the last examined state."""

    def learn(self, done: Round, examined: int) -> None:
        """From a round, of which so many rows were looked at."""


class Frozen:
    """One guess for all."""

    def __call__(self, row: int, state: Tensor, last: Tensor) -> Tensor:
        return last

    def learn(self, done: Round, examined: int) -> None:
        pass


class OfTheRow:
    """The row's estimate of the round before; the last one where there is none."""

    def __init__(self) -> None:
        self.before: dict[int, tuple[Tensor, Tensor]] = {}  # row: scaled state, estimate

    def __call__(self, row: int, state: Tensor, last: Tensor) -> Tensor:
        if row in self.before:
            return self.before[row][1] + self.correction(state - self.before[row][0])
        return self.before[max(self.before)][1] if self.before else last

    def correction(self, moved: Tensor) -> Tensor:
        """What a state that has moved changes."""
        return torch.zeros_like(moved)

    def learn(self, done: Round, examined: int) -> None:
        rows = range(done.first, done.first + len(done))
        known = [k for k, row in enumerate(rows) if row in self.before and k < examined]
        if known:
            old = [torch.stack(each) for each in zip(*(self.before[rows[k]] for k in known), strict=True)]
            self.fit(done.scaled[known] - old[0], done.origins[known] - old[1])
        self.before = {row: (done.scaled[k], done.origins[k]) for k, row in enumerate(rows) if k >= examined}

    def fit(self, moved: Tensor, changed: Tensor) -> None:
        """What examined rows show: states moved so far, and estimates changed so much."""


class Secant(OfTheRow):
    """With the slope that examined rows show."""

    def __init__(self) -> None:
        super().__init__()
        self.sums = torch.zeros(2, dtype=torch.float64)

    def correction(self, moved: Tensor) -> Tensor:
        return self.sums[0] / self.sums[1].clamp(min=1e-9) * moved

    def fit(self, moved: Tensor, changed: Tensor) -> None:
        self.sums = FORGET * self.sums + torch.stack([(moved * changed).sum(), moved.square().sum()])


class Response(OfTheRow):
    """With a symmetric response in the directions in which estimates moved, shrunk by how well it foretells."""

    def __init__(self) -> None:
        super().__init__()
        self.pairs: list[tuple[Tensor, Tensor]] = []
        self.directions: Tensor | None = None
        self.matrix = torch.zeros(0, 0)
        self.sums, self.trust = torch.zeros(2, dtype=torch.float64), 1.0

    def correction(self, moved: Tensor) -> Tensor:
        return self.trust * self.foretold(moved)

    def foretold(self, moved: Tensor) -> Tensor:
        if self.directions is None:
            return torch.zeros_like(moved)
        return moved @ self.directions.T @ self.matrix @ self.directions

    def fit(self, moved: Tensor, changed: Tensor) -> None:
        foretold = self.foretold(moved)
        self.sums = FORGET * self.sums + torch.stack([(foretold * changed).sum(), foretold.square().sum()])
        self.trust = float((self.sums[0] / self.sums[1].clamp(min=1e-12)).clamp(0, 1))

    def learn(self, done: Round, examined: int) -> None:
        super().learn(done, examined)
        moves, changes = done.innovations[: examined - 1], done.origins[1:examined] - done.origins[: examined - 1]
        self.pairs = [*self.pairs, *zip(moves, changes, strict=True)][-WIDTHS[-1] :]
        if len(self.pairs) < FEWEST:
            return
        x, y = (torch.stack(each) for each in zip(*self.pairs, strict=True))
        _, strength, directions = torch.linalg.svd(y, full_matrices=False)
        self.directions = directions[strength > DIRECTIONS * strength[0]]
        x, y = x @ self.directions.T, y @ self.directions.T
        gram = x.T @ x
        ridge = RIDGE * gram.trace() / len(gram) * torch.eye(len(gram), dtype=gram.dtype)
        matrix = torch.linalg.solve(gram + ridge, x.T @ y)
        values, vectors = torch.linalg.eigh((matrix + matrix.T) / 2)
        self.matrix = vectors * values.clamp(min=0) @ vectors.T


def excess(weight: float, length: float) -> float:
    """Mass of (weight q - p)+ for Gaussians p and q of deviation 1, `length` apart."""
    if length < 1e-10:
        return max(weight - 1, 0.0)
    meet = math.log(weight) / length
    return max(weight * ndtr(length / 2 + meet) - ndtr(meet - length / 2), 0.0)


def drawn_excess(weight: float, length: float, u: float) -> float:
    """A draw from (weight q - p)+, along the line from p's centre at 0 to q's, by bisection of its upper tail."""
    low, high = length / 2 - math.log(weight) / length, 40.0
    mass = excess(weight, length)
    for _ in range(100):
        middle = (low + high) / 2
        if weight * ndtr(length - middle) - ndtr(-middle) > u * mass:
            low = middle
        else:
            high = middle
    return middle


def longest_prefix(along: list[float], square: list[float], uniform: np.random.Generator) -> tuple[int, float]:
    """How many drafts of a block are kept, and the weight of what comes next.

    Args:
        along, square: D z and |D|^2 of every draft.
        uniform: what decides.
    """
    weight, kept, its = 1.0, 0, 1.0
    for k in range(len(along)):
        weight = min(1.0, weight * math.exp(along[k] - square[k] / 2))
        passes = weight
        if weight < 1 and k + 1 < len(along):
            more = excess(weight, math.sqrt(square[k + 1]))
            passes = more / (more + 1 - weight)
        if uniform.random() <= passes:
            kept, its = k + 1, weight
    return kept, its


@dataclass
class Did:
    """What a walk did, and its end."""

    calls: int = 0
    evaluations: int = 0
    rejected: list[int] = field(default_factory=list)  # the draft of its round
    x: Tensor | None = None


class Walk:
    """One sample through all rows of a table.

    Args:
        model: of states [m, 1, n] or the shape given.
        table: its rows.
        shape: of a sample.
        width: of the windows.
        alpha_bar: of every timestep, float64.
        guess: a class of guesses.
        block: rows that are verified together; 1 is each step by itself, with reflection.
        clip: of the origin.
        model_kwargs: with an entry, for every draft.
    """

    def __init__(
        self, model: Model, table: StepTable, alpha_bar: np.ndarray, shape: tuple[int, ...], width: int,
        guess: type[Guess], *, block: int = 1, clip: float = math.inf, model_kwargs: dict[str, Tensor] | None = None,
    ) -> None:  # fmt: skip
        self.model, self.table, self.shape, self.width = model, table, shape, width
        self.alpha_bar = alpha_bar[table.timestep]
        self.guess, self.block, self.clip, self.kwargs = guess, block, clip, model_kwargs or {}

    def __call__(self, seed: int) -> Did:
        generator, uniform = torch.Generator().manual_seed(seed), np.random.default_rng(seed)
        size = math.prod(self.shape)

        def fresh() -> Tensor:
            return torch.randn(size, generator=generator, dtype=torch.float64)

        guess, did, noise = self.guess(), Did(), {}
        x, last, row = fresh(), torch.zeros(size, dtype=torch.float64), 0
        while row < len(self.table):
            for ahead in range(row, min(row + self.width, len(self.table))):
                noise.setdefault(ahead, fresh())
            done = self._draft(guess, x, last, row, noise)
            did.calls, did.evaluations = did.calls + 1, did.evaluations + self.width
            taken, examined, z = self._decide(done, uniform, fresh)
            if z is not None and len(done) > 1:
                did.rejected.append(taken - 1)
            guess.learn(done, taken)
            at = taken - 1
            x, last = self._step(row + at, done, at, z), done.origins[at]
            for spent in range(row, row + examined):
                noise.pop(spent)
            row += taken
        did.x = x.view(self.shape)
        return did

    def _draft(self, guess: Guess, x: Tensor, last: Tensor, first: int, noise: dict[int, Tensor]) -> Round:
        table = self.table
        count = min(self.width, len(table) - first)
        quiet = np.flatnonzero(table.sigma[first : first + count] == 0)
        count = max(1, int(quiet[0])) if len(quiet) else count  # a row without noise is a round of its own
        states, guesses = [x], []
        for row in range(first, first + count):
            guesses.append(guess(row, states[-1] / self.alpha_bar[row] ** 0.5, last))
            mean = table.c_x0[row] * guesses[-1] + table.c_x[row] * states[-1]
            states.append(mean + table.sigma[row] * noise[row])
        rows = np.arange(first, first + count)
        y, g = torch.stack(states[:-1]), torch.stack(guesses)
        origins = self._origins(y, rows)
        sigma = np.where(table.sigma[rows] == 0, np.inf, table.sigma[rows])
        distance = torch.from_numpy(table.c_x0[rows] / sigma)[:, None] * (origins - g)
        scaled = y / torch.from_numpy(self.alpha_bar[rows])[:, None].sqrt()
        ratio = self.alpha_bar[rows] / (1 - self.alpha_bar[rows])  # of signal to noise, squared
        kept = torch.from_numpy(ratio[:-1] / ratio[1:])[:, None]
        innovations = scaled[1:] - kept * scaled[:-1] - (1 - kept) * origins[:-1]
        return Round(first, y, scaled, g, torch.stack([noise[row] for row in rows]), origins, distance, innovations)

    @torch.no_grad()
    def _origins(self, y: Tensor, rows: np.ndarray) -> Tensor:
        told = {name: value.expand(len(rows)) for name, value in self.kwargs.items()}
        timesteps = torch.from_numpy(self.table.timestep[rows])
        out = self.model(y.float().view(-1, *self.shape), timesteps, **told).double().flatten(1)
        a, b = (torch.from_numpy(each[rows])[:, None] for each in (self.table.a, self.table.b))
        return (a * y + b * out).clamp(-self.clip, self.clip)

    def _decide(self, done: Round, uniform: np.random.Generator, fresh: Any) -> tuple[int, int, Tensor | None]:
        """Steps that are taken, rows that were looked at, and the noise of the last one about the true mean.

        The noise is None where all drafts are as they were.
        """
        if len(done) == 1:
            return 1, 1, done.noise[0]
        along = (done.distance * done.noise).sum(1).tolist()
        square = done.distance.square().sum(1).tolist()
        for first in range(0, len(done), self.block):
            size = min(self.block, len(done) - first)
            if self.block == 1:
                kept = int(math.log(1 - uniform.random()) <= along[first] - square[first] / 2)
            else:
                here = slice(first, first + size)
                kept, weight = longest_prefix(along[here], square[here], uniform)
            if kept == size:
                continue
            k, distance = first + kept, done.distance[first + kept]
            if self.block == 1:
                return k + 1, k + 1, done.noise[k] - 2 * along[k] / square[k] * distance
            length = math.sqrt(square[k])
            z, towards = fresh(), distance / length
            # About the true mean, which is `length` from the drafts'.
            z += (drawn_excess(weight, length, uniform.random()) - length - z @ towards) * towards
            return k + 1, first + size, z
        return len(done), len(done), None

    def _step(self, row: int, done: Round, k: int, z: Tensor | None) -> Tensor:
        """The state after row k of the round: drafted, or with noise z about the true mean."""
        table = self.table
        origin, noise = (done.guesses[k], done.noise[k]) if z is None else (done.origins[k], z)
        return table.c_x0[row] * origin + table.c_x[row] * done.states[k] + table.sigma[row] * noise


IDEAS: dict[str, dict[str, Any]] = {
    "frozen, each step": {"guess": Frozen},
    "of the row, each step": {"guess": OfTheRow},
    "secant, each step": {"guess": Secant},
    "response, each step": {"guess": Response},
    "frozen, one block": {"guess": Frozen, "block": 1024},
    "of the row, blocks of 8": {"guess": OfTheRow, "block": 8},
}


def count(name: str, seeds: int, widths: tuple[int, ...] = WIDTHS, steps: int | None = None) -> list[dict[str, Any]]:
    """Calls, volume and rejections of every idea, means over the seeds."""
    checkpoint = load_checkpoint(name)
    config = checkpoint.diffusion
    table = build_table(config if steps is None else replace(config, num_inference_steps=steps))
    told = labels(checkpoint.classes, 1, torch.device("cpu"))
    rows = []
    for width in widths:
        for idea, how in IDEAS.items():
            walk = Walk(
                checkpoint.model, table, config.alphas_cumprod(), checkpoint.shape, width, **how,
                clip=config.clip_sample_range if config.clip_sample else math.inf, model_kwargs=told,
            )  # fmt: skip
            did = [walk(seed) for seed in range(seeds)]
            where = np.bincount(np.concatenate([each.rejected for each in did]).astype(int), minlength=width)
            calls = sum(each.calls for each in did)
            rows.append({
                "model": name, "idea": idea, "width": width, "seeds": seeds,
                "calls": calls / seeds,
                "calls_low": min(each.calls for each in did),
                "calls_high": max(each.calls for each in did),
                "volume": sum(each.evaluations for each in did) / (seeds * len(table)),
                "rejections": sum(len(each.rejected) for each in did) / seeds,
                "rounds_ended_by_the_likeliest_row": float(where.max() / calls),
            })  # fmt: skip
            print(rows[-1], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="few steps; writes nothing")
    parser.add_argument("--seeds", type=int, default=8)
    given = parser.parse_args()
    if given.smoke:
        count("digits", 1, (4,), 20)
        return
    rows = [row for name in ("moons", "digits") for row in count(name, given.seeds)]
    print(write_result("cpu__speculation_ideas", rows, folder=RESEARCH))


if __name__ == "__main__":
    main()
