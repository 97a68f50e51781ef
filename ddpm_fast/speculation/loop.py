"""Speculative sampling: a walk in few sequential network calls, of the same law (kernels/speculate.py)."""

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ddpm_fast.engine.device import Model
from ddpm_fast.engine.execution import DEFAULT, Execution, tf32
from ddpm_fast.engine.graph import CaptureError, GraphPool, StepGraph, can_capture
from ddpm_fast.engine.network import Network
from ddpm_fast.engine.noise import Noise
from ddpm_fast.engine.progress import Progress, Show
from ddpm_fast.engine.timer import seconds
from ddpm_fast.kernels.dispatch import choose_backend, on_device
from ddpm_fast.kernels.normal import normal
from ddpm_fast.kernels.philox import Stream
from ddpm_fast.kernels.speculate import Outcome, Window, implementation, log_uniforms
from ddpm_fast.kernels.speculate import Progress as Column
from ddpm_fast.kernels.threshold import threshold_bound
from ddpm_fast.speculation.windows import Windows
from ddpm_fast.table import Clipping, StepTable
from ddpm_fast.validate import line_of

logger = logging.getLogger("ddpm_fast")

AHEAD = 1 << 25  # normals that are made ahead of a walk on the PyTorch path: 128 MB
LOOK = 4  # rounds at most between two looks at where the samples are, on a GPU, whose queue a look empties


@dataclass(frozen=True)
class Speculation:
    """What a speculative walk did.

    Attributes:
        windows: {timestep: window}; with the seeds it makes the images again.
        calls: network calls, one after the other.
        volume: network evaluations, over those of a walk one step at a time; drafts that were computed in vain count,
            and so do rows of the batch that were idle.
        timesteps: of the steps.
        acceptance: share of the samples whose draft was accepted, for each of the steps.
    """

    windows: dict[int, int]
    calls: int
    volume: float
    timesteps: NDArray[np.int64]
    acceptance: NDArray[np.float64]

    @classmethod
    def sequential(cls, timesteps: NDArray[np.int64]) -> "Speculation":
        """Of a walk one step at a time."""
        return cls({0: 1}, len(timesteps), 1.0, timesteps, np.ones(len(timesteps)))

    def accepted(self, low: int, high: int) -> float:
        """Share of drafts that were accepted at timesteps low … high - 1; NaN where there is no step."""
        found = self.acceptance[(self.timesteps >= low) & (self.timesteps < high)]
        return float(found.mean()) if len(found) else float("nan")


class SpeculativeLoop:
    """Walks a table with a network, several steps a call, with noise from seeds.

    Args:
        model, shape, model_kwargs, uncond_kwargs, device, dtype, module: those of `Network`, for a batch of samples.
        table: the rows to walk; without learned variances.
        clipping: of the origin estimate.
        windows: the drafts of every round.
        guidance: float32 [B], where the network is guided.
        inference_mode: run under torch.inference_mode (`Loop`).
        how: it is executed; steps_per_replay counts for nothing.

    Attributes:
        x: the states, float32 [B, C, ...].
        last: what the last walk did.
        watch: with one sample and without graphs, called with the estimates of the origin that a round committed.

    Raises:
        ValueError: a table with learned variances, whose drafts have another covariance than what they stand for.
    """

    @torch.inference_mode(False)  # buffers made inside it could not be written outside
    def __init__(
        self,
        model: Model,
        shape: tuple[int, ...],
        *,
        table: StepTable,
        clipping: Clipping,
        windows: Windows,
        model_kwargs: Mapping[str, Any] | None = None,
        uncond_kwargs: Mapping[str, Any] | None = None,
        device: torch.device,
        dtype: torch.dtype | None = None,
        module: nn.Module | None = None,
        guidance: Tensor | None = None,
        inference_mode: bool = False,
        how: Execution = DEFAULT,
    ) -> None:
        check_table(table)
        self.table, self.clipping, self.windows, self.how, self.device = table, clipping, windows, how, device
        self.shape = shape
        self.model, self.module, self.dtype, self.guidance = model, module, dtype, guidance
        self.guided = uncond_kwargs is not None
        self._no_gradients = torch.inference_mode if inference_mode else torch.no_grad
        if how.execution == "graph" and not can_capture(device):
            raise ValueError(f"execution='graph' needs a CUDA device, got {device}")
        self.execution = how.execution
        self.backend = choose_backend(device, how.backend)
        self.x0: Tensor | None = None  # there is none after each step
        self.last: Speculation | None = None
        self.watch: Callable[[Tensor], Any] | None = None
        self._kwargs = dict(model_kwargs or {}), uncond_kwargs
        self._by_row = np.minimum(windows.rows(table.timestep), np.arange(len(table), 0, -1))
        self._rounds_left = [0] * (len(table) + 1)  # from each row on, where every draft is accepted
        for row in reversed(range(len(table))):
            self._rounds_left[row] = 1 + self._rounds_left[row + int(self._by_row[row])]
        self._widths = sorted(set(windows.rows(table.timestep).tolist()))
        self._networks: dict[int, Network] = {}
        self._graphs: dict[int, StepGraph] = {}
        self._pool = GraphPool()
        self._draft, self._verify, self._decide, self._commit = implementation(self.backend)

        batch, room, steps = shape[0], self._widths[-1], len(table)
        self.x = torch.zeros(shape, device=device)
        self._drafts, self._noise, self._guess = (torch.zeros(batch, room, *shape[1:], device=device) for _ in range(3))
        self._dots = torch.zeros(batch, room, self._parts(), 2, dtype=self._sums(), device=device)
        self._begin = torch.tensor([0, 0, 1, 0, Outcome.DONE], dtype=torch.int32, device=device)
        self._progress = self._begin.repeat(batch, 1)
        self._factor = torch.zeros(batch, device=device)
        self._rejected = torch.zeros(batch, steps, dtype=torch.uint8, device=device)
        self._seeds = torch.zeros(batch, dtype=torch.int64, device=device)
        self._log_u = torch.zeros(batch, steps, device=device)
        self._ahead: Tensor | None = None
        self._window_rows = torch.from_numpy(windows.rows(table.timestep)).to(device)
        self._coefficients, self._ids = table.coefficients(device), table.ids(device)
        if how.at_once:
            for width in self._widths:
                self.network(width)

    def run(self, noise: Noise, x_T: Tensor | None = None, *, progress: Show = None) -> Tensor:
        """Walk to the end and return a copy of x: float32 [B, C, ...]."""
        for _ in self.steps(noise, x_T, progress=progress):
            pass
        return self.x.clone()

    def steps(
        self,
        noise: Noise,
        x_T: Tensor | None = None,
        *,
        known: Any = None,
        previews: bool = False,
        every_step: bool = False,
        progress: Show = None,
    ) -> Iterator[int]:
        """Walk; from time to time the number of steps that all samples have done.

        Raises:
            ValueError: noise that is not from seeds; what is to be seen after every step.
            FloatingPointError: NaN, or an infinity that no clipping bounds; says between which steps.
        """
        check_walk(from_seeds=noise.seeds is not None, known=known is not None, watched=every_step or previews)
        steps, batch = len(self.table), self.shape[0]
        self.last = None
        with self._settings():
            self._start(noise, x_T)
        bar = Progress(steps, self.device, progress, every=1)
        calls = evaluations = reached = 0
        rows = [0] * batch
        finished = False
        try:
            while reached < steps:
                # So many the walk has still to do at the least: none is in vain.
                rounds = min(LOOK, max(self._rounds_left[row] for row in rows)) if self._records() else 1
                width = self._width(rows, rounds)
                with self._settings():
                    for _ in range(rounds):
                        self._round(width)
                    rows = self._progress[:, Column.ROW].tolist()
                calls, evaluations = calls + rounds, evaluations + rounds * batch * width
                before, reached = reached, min(rows)
                if self.watch is not None:
                    self.watch(self._guess[0, : reached - before])
                bar.advance(reached - before)
                if not bool(torch.isfinite(self.x).all()):
                    raise FloatingPointError(self._not_finite_error(before, reached))
                if reached == steps:
                    self.last = Speculation(
                        self.windows.to_dict(),
                        calls,
                        evaluations / (batch * steps),
                        self.table.timestep,
                        1 - self._rejected.double().mean(0).cpu().numpy(),
                    )
                    finished = True
                yield reached
        finally:
            bar.close(finished)

    def update_kwargs(self, model_kwargs: Mapping[str, Any], uncond_kwargs: Mapping[str, Any] | None) -> None:
        """New values of what the model is given; see `Network.update_kwargs`."""
        self.network(self._widths[-1])  # one there is, to check them
        for width, network in self._networks.items():
            network.update_kwargs(self._repeated(model_kwargs, width), self._repeated(uncond_kwargs, width))
        self._kwargs = dict(model_kwargs), uncond_kwargs

    def free(self) -> None:
        """Let go of the recorded graphs."""
        self._graphs.clear()

    def network(self, width: int) -> Network:
        """The network for `width` drafts of every sample."""
        if width not in self._networks:
            batch, channels = self.shape[0] * width, self.shape[1] * (2 if self.table.doubled else 1)
            given, unconditional = (self._repeated(kwargs, width) for kwargs in self._kwargs)
            shape = (batch, *self.shape[1:])
            network = Network(self.model, shape, channels, given, unconditional, self.device, self.dtype, self.module)
            if self.how.at_once:
                network.prepare(self.table.timestep.tolist(), self.how)
            self._networks[width] = network
        return self._networks[width]

    def seconds(self, width: int) -> float:
        """How long a round with so many drafts of every sample takes; with one, the network's call alone."""
        network = self.network(width)
        with self._settings():
            self._make_ahead()
            return seconds(network if width == 1 else lambda: self._iterate(network, width), self.device)

    def _repeated(self, kwargs: Mapping[str, Any] | None, width: int) -> Any:
        """The keywords for every draft: tensors with an entry a sample go with their samples."""
        batch = self.shape[0]
        return kwargs and {
            name: value.repeat_interleave(width, 0)
            if isinstance(value, Tensor) and value.dim() and len(value) == batch
            else value
            for name, value in kwargs.items()
        }

    def _start(self, noise: Noise, x_T: Tensor | None) -> None:
        for network in self._networks.values():
            if network.refresh():
                self._graphs.clear()
        self._seeds.copy_(noise.seeds)  # type: ignore[arg-type]
        self._log_u.copy_(log_uniforms(self._seeds, self._ids))
        self._make_ahead()
        self.x.copy_(noise.x_T() if x_T is None else x_T)
        self._guess.zero_()  # before anything is known
        self._rejected.zero_()
        self._progress.copy_(self._begin)

    def _make_ahead(self) -> None:
        """On the PyTorch path the noise of every row at once, if that is not too much: drafts are made twice."""
        batch, steps = self._rejected.shape
        if self.backend == "torch" and batch * steps * self._drafts[0, 0].numel() <= AHEAD:
            seeds, ids = self._seeds.repeat_interleave(steps), self._ids[:, 1].repeat(batch)
            flat = normal(seeds, ids, Stream.STEP, self.shape[1:], backend="torch")
            self._ahead = flat.view(batch, steps, *self.shape[1:])

    def _width(self, rows: Sequence[int], rounds: int) -> int:
        """The narrowest network that has room for the windows of samples in these rows, and where they may get to."""
        needed = 1
        for row in rows:
            needed = max([needed, *self._by_row[row : row + 1 + (rounds - 1) * self._widths[-1]].tolist()])
        return next(width for width in self._widths if width >= needed)

    def _round(self, width: int) -> None:
        if self._records() and width not in self._graphs:
            self._record(width)
        if width in self._graphs:
            self._graphs[width].replay()
        else:
            self._iterate(self.network(width), width)

    def _records(self) -> bool:
        """Whether rounds are to be recorded in graphs."""
        return self.execution != "eager" and can_capture(self.device)

    def _record(self, width: int) -> None:
        """Record a round; where that fails, rounds run eagerly from now on."""
        network = self.network(width)
        state = self.x, self._guess, self._progress, self._rejected
        kept = [buffer.clone() for buffer in state]
        try:
            self._graphs[width] = StepGraph(lambda: self._iterate(network, width), self.device, self._pool)
        except (CaptureError, torch.OutOfMemoryError) as error:
            why = f"the rounds cannot be recorded in a CUDA graph: {line_of(error)}"
            if self.execution == "graph":
                raise RuntimeError(why) from error
            logger.warning("%s; running eagerly", why)
            self.execution = "eager"
        for buffer, value in zip(state, kept, strict=True):  # recording runs rounds for real
            buffer.copy_(value)

    def _iterate(self, network: Network, width: int) -> None:
        """One round, on the fixed buffers."""
        drafted = self._drafts, self._noise, self._guess
        shared: dict[str, Any] = {}
        if self.backend == "torch":
            window = Window(self._coefficients, self._progress, self._window_rows, width, self.x.dim())
            shared = {"window": window}
        self._draft(
            self.x, self._guess, self._progress, self._window_rows, self._coefficients, self._ids, self._seeds, width,
            drafts=self._drafts, noise=self._noise, model_input=network.input, timestep=network.timestep, **shared,
            **({} if self._ahead is None else {"ahead": self._ahead}),
        )  # fmt: skip
        output = network()
        how = self._limits(output, width)
        self._verify(
            *drafted,
            output,
            self._progress,
            self._window_rows,
            self._coefficients,
            width,
            dots=self._dots,
            **how,
            **shared,
        )
        self._decide(
            self._dots, self._progress, self._window_rows, self._coefficients, self._log_u, width,
            factor=self._factor, rejected=self._rejected, **shared,
        )  # fmt: skip
        self._commit(
            self.x,
            *drafted,
            output,
            self._progress,
            self._factor,
            self._window_rows,
            self._coefficients,
            width,
            **how,
            **shared,
        )

    def _limits(self, output: Tensor, width: int) -> dict[str, Any]:
        """Clipping and guidance of every draft."""
        guidance = None if self.guidance is None else self.guidance.repeat_interleave(width)
        if self.clipping.ratio is None:
            return {"clip": self.clipping.limit, "guidance": guidance}
        ahead = torch.arange(width, device=self.device, dtype=torch.int32)
        rows = (self._progress[:, Column.ROW, None] + ahead).clamp(max=len(self.table) - 1).flatten()
        bound = threshold_bound(
            self._drafts[:, :width].flatten(0, 1).contiguous(), output, self._coefficients, rows,
            ratio=self.clipping.ratio, max_value=self.clipping.max_value, guidance=guidance, backend=self.backend,
        )  # fmt: skip
        return {"bound": bound, "guidance": guidance}

    def _parts(self) -> int:
        if self.backend == "torch":
            return 1
        from ddpm_fast.kernels.speculate_triton import parts

        return parts(self.x[0].numel())

    def _sums(self) -> torch.dtype:
        return torch.float64 if self.backend == "torch" else torch.float32

    @contextlib.contextmanager
    def _settings(self):
        """What torch is set to while the network and the rounds run."""
        with on_device(self.device), self._no_gradients(), tf32(self.how.tf32 if self.device.type == "cuda" else None):
            yield

    def _not_finite_error(self, low: int, high: int) -> str:
        bad = (~torch.isfinite(self.x).flatten(1).all(1)).nonzero().flatten().tolist()
        return (
            f"the model returned NaN or infinity in steps {low} to {high} of {len(self.table)} "
            f"(timestep {self.table.timestep[low]} and below), for sample {', '.join(map(str, bad[:5]))} of the batch"
        )


def check_walk(*, from_seeds: bool = True, known: bool = False, watched: bool = False) -> None:
    """Raise ValueError for what no walk with `speculate` can do, whatever its windows are.

    Args:
        from_seeds: whether the noise is.
        known: whether there is a known image.
        watched: whether there is to be something after every step.
    """
    if not from_seeds:
        raise ValueError("speculate draws its noise from seeds, which any order of steps can do: not a generator")
    if known:
        raise ValueError("speculate does not inpaint: a known image is put in after every step")
    if watched:
        raise ValueError(
            "speculate gives the samples alone (output 'sample' or 'result'): the steps of a batch are not taken "
            "together, so that there is no state after each"
        )


def check_table(table: StepTable) -> None:
    """Raise ValueError for a table that cannot be speculated on."""
    if table.learned:
        raise ValueError(
            "speculate needs a variance that is fixed: drafts with a learned one (variance_type 'learned' or "
            "'learned_range') differ from what they stand for in covariance; take 'fixed_small' or 'fixed_large'"
        )
    if len(np.unique(table.noise_id[table.sigma != 0])) < int((table.sigma != 0).sum()):
        raise ValueError("speculate needs noise of its own in every row: this table uses a noise id twice")
