"""Count the network calls of other guesses and other rules of acceptance in speculative sampling, in plain PyTorch.

    python -m research.speculation_ideas           takes minutes; writes research/results/cpu__speculation_ideas.json
    python -m research.speculation_ideas --smoke   tries whether everything runs, in seconds

The embedded models draw one sample at a time, with windows of one width. Each idea keeps the law, as
research/test_speculation_ideas.py tests.

A guess is an x0 prediction for a draft, made before the noise of the draft is known:

    frozen      the network's x0 prediction at the last examined state, as published
    of the row  the network's x0 prediction at the draft of the same row in the round before, as in ddpm_fast
    secant      the guess of the row plus kappa (y - y'), where y' is the draft of that prediction; kappa is fitted to
                the examined rows
    response    the guess of the row plus M (y - y'), with a symmetric M in the few directions in which the predictions
                of the examined rows moved

A rule decides which drafts are accepted:

    each step   each draft is accepted or rejected by itself, and the first rejected draft is reflected, as in ddpm_fast
    blocks      block verification (Sun et al. 2024, arXiv 2403.10444) keeps the longest prefix that passes; one draft
                may make up for another. The decision depends on all noise of the block, so the noise of the drafts
                that are not kept is drawn anew
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Protocol, TypedDict

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import ndtr
from torch import Tensor

from benchmarks.common.command_line import make_parser
from benchmarks.common.results import RESEARCH, Row, write_result
from benchmarks.speculation.run import labels
from ddpm_fast.engine.device import Model
from ddpm_fast.models.checkpoint import load_checkpoint
from ddpm_fast.table import StepTable, build_table

WIDTHS = (16, 32, 64)
FORGET = 0.7  # the weight that older sums keep with each round
FEWEST = 8  # pairs that a response is fitted to
DIRECTIONS = 0.2  # a response leaves out directions that are weaker than this share of the strongest one
RIDGE = 1e-2  # of the fit of a response, as a share of the mean square of its inputs

Array = NDArray[np.float64]


@dataclass
class Round:
    """The drafts of a round, float64 [m, n]: m rows of the table from `first` on, n elements of the sample.

    Attributes:
        first: The first row.
        states: The drafts y.
        scaled: The drafts in units of x_0, y / sqrt(alpha_bar).
        guesses: The guesses that the drafts were made with.
        noise: The noise of the drafts.
        x0: The x0 predictions of the network.
        distance: D, the distance between the means of the prediction and of the guess, in units of sigma.
        innovations: The part of the next scaled state that the x0 prediction at this one does not explain, [m - 1, n].
    """

    first: int
    states: Tensor
    scaled: Tensor
    guesses: Tensor
    noise: Tensor
    x0: Tensor
    distance: Tensor
    innovations: Tensor

    def __len__(self) -> int:
        return len(self.states)


class Guess(Protocol):
    """A way to guess x0 predictions."""

    def __call__(self, row: int, state: Tensor, last: Tensor) -> Tensor:
        """Return the guess for the scaled draft `state` of a row; `last` is the x0 prediction at the last state."""

    def learn(self, done: Round, examined: int) -> None:
        """Learn from a round whose first `examined` rows were examined."""


class Frozen:
    """The guess that serves all drafts of a round."""

    def __call__(self, row: int, state: Tensor, last: Tensor) -> Tensor:
        return last

    def learn(self, done: Round, examined: int) -> None:
        pass


class OfTheRow:
    """The x0 prediction of the same row in the round before; the last prediction where the row has none."""

    def __init__(self) -> None:
        self.before: dict[int, tuple[Tensor, Tensor]] = {}  # row: scaled state, x0 prediction

    def __call__(self, row: int, state: Tensor, last: Tensor) -> Tensor:
        if row in self.before:
            return self.before[row][1] + self.correction(state - self.before[row][0])
        return self.before[max(self.before)][1] if self.before else last

    def correction(self, moved: Tensor) -> Tensor:
        """Return the change of the guess for a state that has moved by `moved`."""
        return torch.zeros_like(moved)

    def learn(self, done: Round, examined: int) -> None:
        rows = range(done.first, done.first + len(done))
        known = [k for k, row in enumerate(rows) if row in self.before and k < examined]
        if known:
            old = [torch.stack(each) for each in zip(*(self.before[rows[k]] for k in known), strict=True)]
            self.fit(done.scaled[known] - old[0], done.x0[known] - old[1])
        self.before = {row: (done.scaled[k], done.x0[k]) for k, row in enumerate(rows) if k >= examined}

    def fit(self, moved: Tensor, changed: Tensor) -> None:
        """Learn from examined rows whose states moved by `moved` and whose x0 predictions changed by `changed`."""


class Secant(OfTheRow):
    """The guess of the row with a slope, which is fitted to the examined rows."""

    def __init__(self) -> None:
        super().__init__()
        self.sums = torch.zeros(2, dtype=torch.float64)

    def correction(self, moved: Tensor) -> Tensor:
        return self.sums[0] / self.sums[1].clamp(min=1e-9) * moved

    def fit(self, moved: Tensor, changed: Tensor) -> None:
        self.sums = FORGET * self.sums + torch.stack([(moved * changed).sum(), moved.square().sum()])


class Response(OfTheRow):
    """The guess of the row with a symmetric response in the directions in which predictions moved.

    The response is shrunk by how well it predicts the changes.
    """

    def __init__(self) -> None:
        super().__init__()
        self.pairs: list[tuple[Tensor, Tensor]] = []
        self.directions: Tensor | None = None
        self.matrix = torch.zeros(0, 0)
        self.sums, self.trust = torch.zeros(2, dtype=torch.float64), 1.0

    def correction(self, moved: Tensor) -> Tensor:
        return self.trust * self.response(moved)

    def response(self, moved: Tensor) -> Tensor:
        """Return the change that the fitted response predicts."""
        if self.directions is None:
            return torch.zeros_like(moved)
        return moved @ self.directions.T @ self.matrix @ self.directions

    def fit(self, moved: Tensor, changed: Tensor) -> None:
        predicted = self.response(moved)
        self.sums = FORGET * self.sums + torch.stack([(predicted * changed).sum(), predicted.square().sum()])
        self.trust = float((self.sums[0] / self.sums[1].clamp(min=1e-12)).clamp(0, 1))

    def learn(self, done: Round, examined: int) -> None:
        super().learn(done, examined)
        moves, changes = done.innovations[: examined - 1], done.x0[1:examined] - done.x0[: examined - 1]
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
    """Return the mass of (weight q - p)+ for Gaussians p and q of deviation 1, `length` apart."""
    if length < 1e-10:
        return max(weight - 1, 0.0)
    meet = math.log(weight) / length
    return float(max(weight * ndtr(length / 2 + meet) - ndtr(meet - length / 2), 0.0))


def drawn_excess(weight: float, length: float, u: float) -> float:
    """Draw from (weight q - p)+ on the line from the centre of p, at 0, to the centre of q.

    The draw is the point where the upper tail has the share `u` of the mass, found by bisection.
    """
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
    """Return how many drafts of a block are kept, and the weight of the next draft.

    Args:
        along: D z of every draft.
        square: |D|^2 of every draft.
        uniform: The source of the decisions.
    """
    weight, kept, kept_weight = 1.0, 0, 1.0
    for k in range(len(along)):
        weight = min(1.0, weight * math.exp(along[k] - square[k] / 2))
        passes = weight
        if weight < 1 and k + 1 < len(along):
            more = excess(weight, math.sqrt(square[k + 1]))
            passes = more / (more + 1 - weight)
        if uniform.random() <= passes:
            kept, kept_weight = k + 1, weight
    return kept, kept_weight


@dataclass
class Drawn:
    """A sample and the cost of drawing it.

    Attributes:
        x: The sample.
        calls: Network calls.
        evaluations: Network evaluations.
        rejected: The place of each rejected draft in its round.
    """

    x: Tensor
    calls: int = 0
    evaluations: int = 0
    rejected: list[int] = field(default_factory=list)


class SpeculativeSampler:
    """A sampler that draws one sample at a time in rounds of drafts.

    Args:
        model: A network for states [m, *shape].
        table: The rows of the run.
        alpha_bar: alpha_bar of every timestep, float64 [T].
        shape: The shape of a sample.
        width: The window of every round.
        guess: The class of the guesses.
        block: The number of rows that are verified together. 1 verifies each step by itself, with reflection.
        clip: The bound of the x0 predictions.
        model_kwargs: Keywords of the model with one entry, which serves every draft.
    """

    def __init__(
        self, model: Model, table: StepTable, alpha_bar: Array, shape: tuple[int, ...], width: int,
        guess: Callable[[], Guess], *, block: int = 1, clip: float = math.inf,
        model_kwargs: dict[str, Tensor] | None = None,
    ) -> None:  # fmt: skip
        self.model, self.table, self.shape, self.width = model, table, shape, width
        self.alpha_bar = alpha_bar[table.timestep]
        self.guess, self.block, self.clip, self.kwargs = guess, block, clip, model_kwargs or {}

    def __call__(self, seed: int) -> Drawn:
        """Draw a sample."""
        generator, uniform = torch.Generator().manual_seed(seed), np.random.default_rng(seed)
        size = math.prod(self.shape)

        def fresh() -> Tensor:
            return torch.randn(size, generator=generator, dtype=torch.float64)

        guess, drawn, noise = self.guess(), Drawn(fresh()), dict[int, Tensor]()
        last, row = torch.zeros(size, dtype=torch.float64), 0
        while row < len(self.table):
            for drafted in range(row, min(row + self.width, len(self.table))):
                noise.setdefault(drafted, fresh())
            done = self._draft(guess, drawn.x, last, row, noise)
            drawn.calls, drawn.evaluations = drawn.calls + 1, drawn.evaluations + self.width
            taken, examined, z = self._decide(done, uniform, fresh)
            if z is not None and len(done) > 1:
                drawn.rejected.append(taken - 1)
            guess.learn(done, taken)
            k = taken - 1
            drawn.x, last = self._step(row + k, done, k, z), done.x0[k]
            for spent in range(row, row + examined):
                noise.pop(spent)
            row += taken
        drawn.x = drawn.x.view(self.shape)
        return drawn

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
        x0 = self._x0(y, rows)
        sigma = np.where(table.sigma[rows] == 0, np.inf, table.sigma[rows])
        distance = torch.from_numpy(table.c_x0[rows] / sigma)[:, None] * (x0 - g)
        scaled = y / torch.from_numpy(self.alpha_bar[rows])[:, None].sqrt()
        ratio = self.alpha_bar[rows] / (1 - self.alpha_bar[rows])  # of signal to noise, squared
        kept = torch.from_numpy(ratio[:-1] / ratio[1:])[:, None]
        innovations = scaled[1:] - kept * scaled[:-1] - (1 - kept) * x0[:-1]
        drawn = torch.stack([noise[row] for row in rows.tolist()])
        return Round(first, y, scaled, g, drawn, x0, distance, innovations)

    @torch.no_grad()
    def _x0(self, y: Tensor, rows: NDArray[np.int64]) -> Tensor:
        kwargs = {name: value.expand(len(rows)) for name, value in self.kwargs.items()}
        timesteps = torch.from_numpy(self.table.timestep[rows])
        out: Tensor = self.model(y.float().view(-1, *self.shape), timesteps, **kwargs).double().flatten(1)
        a, b = (torch.from_numpy(each[rows])[:, None] for each in (self.table.a, self.table.b))
        return (a * y + b * out).clamp(-self.clip, self.clip)

    def _decide(
        self, done: Round, uniform: np.random.Generator, fresh: Callable[[], Tensor]
    ) -> tuple[int, int, Tensor | None]:
        """Return the number of steps taken, the number of rows examined, and the noise of the last step.

        The noise is about the true mean. It is None where all drafts are accepted.
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
            # The noise is about the true mean, which is `length` away from the mean of the draft.
            z += (drawn_excess(weight, length, uniform.random()) - length - z @ towards) * towards
            return k + 1, first + size, z
        return len(done), len(done), None

    def _step(self, row: int, done: Round, k: int, z: Tensor | None) -> Tensor:
        """Return the state after row k of the round: the draft, or the true mean with noise z."""
        table = self.table
        x0, noise = (done.guesses[k], done.noise[k]) if z is None else (done.x0[k], z)
        x: Tensor = table.c_x0[row] * x0 + table.c_x[row] * done.states[k] + table.sigma[row] * noise
        return x


class Idea(TypedDict):
    """The options of `SpeculativeSampler` that make an idea."""

    guess: Callable[[], Guess]
    block: int


IDEAS: dict[str, Idea] = {
    "frozen, each step": {"guess": Frozen, "block": 1},
    "of the row, each step": {"guess": OfTheRow, "block": 1},
    "secant, each step": {"guess": Secant, "block": 1},
    "response, each step": {"guess": Response, "block": 1},
    "frozen, one block": {"guess": Frozen, "block": 1024},
    "of the row, blocks of 8": {"guess": OfTheRow, "block": 8},
}


def count(name: str, seeds: int, widths: tuple[int, ...] = WIDTHS, steps: int | None = None) -> list[Row]:
    """Count the calls, the volume and the rejections of every idea, as means over the seeds."""
    checkpoint = load_checkpoint(name)
    config = checkpoint.diffusion
    table = build_table(config if steps is None else replace(config, num_inference_steps=steps))
    kwargs = labels(checkpoint.classes, 1, torch.device("cpu"))
    rows: list[Row] = []
    for width in widths:
        for idea, options in IDEAS.items():
            sampler = SpeculativeSampler(
                checkpoint.model, table, config.alphas_cumprod(), checkpoint.shape, width, **options,
                clip=config.clip_sample_range if config.clip_sample else math.inf, model_kwargs=kwargs,
            )  # fmt: skip
            samples = [sampler(seed) for seed in range(seeds)]
            places = np.bincount(np.concatenate([each.rejected for each in samples]).astype(int), minlength=width)
            calls = sum(each.calls for each in samples)
            rows.append({
                "model": name, "idea": idea, "width": width, "seeds": seeds,
                "calls": calls / seeds,
                "calls_low": min(each.calls for each in samples),
                "calls_high": max(each.calls for each in samples),
                "volume": sum(each.evaluations for each in samples) / (seeds * len(table)),
                "rejections": sum(len(each.rejected) for each in samples) / seeds,
                "rounds_ended_by_the_likeliest_row": float(places.max() / calls),
            })  # fmt: skip
            print(rows[-1], flush=True)
    return rows


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--smoke", action="store_true", help="take few steps and write nothing")
    parser.add_argument("--seeds", type=int, default=8, help="samples of each idea (default: %(default)s)")
    given = parser.parse_args()
    if given.smoke:
        count("digits", 1, (4,), 20)
        return
    rows = [row for name in ("moons", "digits") for row in count(name, given.seeds)]
    print(write_result("cpu__speculation_ideas", rows, folder=RESEARCH))


if __name__ == "__main__":
    main()
