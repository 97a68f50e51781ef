"""Speculative sampling: a run in few sequential network calls, of the same law (kernels/speculate.py)."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ddpm_fast.engine.base import KnownImage, SamplingLoop
from ddpm_fast.engine.call import Call
from ddpm_fast.engine.execution import DEFAULT, Execution
from ddpm_fast.engine.graph import CaptureError, GraphPool, StepGraph
from ddpm_fast.engine.network import Network
from ddpm_fast.engine.noise import Noise
from ddpm_fast.engine.progress import ProgressBar, Show
from ddpm_fast.engine.report import Speculation
from ddpm_fast.engine.timer import seconds
from ddpm_fast.kernels.normal import normal
from ddpm_fast.kernels.philox import Stream
from ddpm_fast.kernels.rounds import Outcome, Position
from ddpm_fast.kernels.speculate import RoundRows, implementation, log_uniforms
from ddpm_fast.kernels.threshold import threshold_bound
from ddpm_fast.speculation.windows import WindowPlan
from ddpm_fast.table import Clipping, StepTable
from ddpm_fast.validate import line_of

logger = logging.getLogger("ddpm_fast")

MOST_NORMALS = 1 << 25  # that are made before a run on the PyTorch path: 128 MB
ROUNDS_PER_CHECK = 4  # rounds, at most, between two readings of the positions on a GPU: a reading drains its queue


class SpeculativeLoop(SamplingLoop):
    """A sampling loop that takes several steps in one network call, with noise from seeds.

    Args:
        call, clipping, inference_mode: See `SamplingLoop`.
        table: The rows of the run, without learned variances.
        plan: The windows of the rounds.
        execution: How the loop is executed; `steps_per_replay` has no meaning here.

    Attributes:
        watch: A function that is called with the x0 predictions that each round committed, for one sample. They lie in
            a buffer that the next round overwrites.

    Raises:
        ValueError: The table has learned variances or uses a noise id twice.
    """

    seeds_only = True

    @torch.inference_mode(False)  # a buffer made in inference mode could not be written outside of that mode
    def __init__(
        self,
        call: Call,
        table: StepTable,
        clipping: Clipping,
        plan: WindowPlan,
        *,
        inference_mode: bool = False,
        execution: Execution = DEFAULT,
    ) -> None:
        check_table(table)
        super().__init__(call, table, clipping, inference_mode, execution)
        self.plan = plan
        self.watch: Callable[[Tensor], Any] | None = None
        windows = plan.rows(table.timestep)
        self._window_of_row = np.minimum(windows, np.arange(len(table), 0, -1))
        self._rounds_left = [0] * (len(table) + 1)  # from each row on, where every draft is accepted
        for row in reversed(range(len(table))):
            self._rounds_left[row] = 1 + self._rounds_left[row + int(self._window_of_row[row])]
        self._widths: list[int] = sorted(set(windows.tolist()))
        self._networks: dict[int, Network] = {}
        self._graphs: dict[int, StepGraph] = {}
        self._proven: set[int] = set()  # widths whose calls were compared in this run
        self._rebuilt: set[int] = set()  # widths that were prepared anew since they agreed
        self._per_sample: set[int] = {1}  # widths whose calls were compared with calls of one draft
        self._pool = GraphPool()
        self._draft, self._verify, self._decide, self._commit = implementation(self.backend)

        (batch, *sizes), room, steps, device = self.shape, self._widths[-1], len(table), self.device
        self._drafts, self._noise, self._guess = (
            torch.zeros(batch, room, *sizes, dtype=torch.float32, device=device) for _ in range(3)
        )
        self._dots = torch.zeros(batch, room, self._parts(), 2, dtype=self._dtype_of_sums(), device=device)
        self._begin = torch.tensor([0, 0, 1, 0, Outcome.DONE], dtype=torch.int32, device=device)
        self._position = self._begin.repeat(batch, 1)
        self._factor = torch.zeros(batch, dtype=torch.float32, device=device)
        self._rejected = torch.zeros(batch, steps, dtype=torch.uint8, device=device)
        self._seeds = torch.zeros(batch, dtype=torch.int64, device=device)
        self._log_u = torch.zeros(batch, steps, dtype=torch.float32, device=device)
        self._row_noise: Tensor | None = None
        self._window_rows = torch.from_numpy(windows).to(device)
        self._use_output = bool(np.any(table.c_out != 0))
        self._coefficients, self._ids = table.coefficients(device), table.ids(device)
        if execution.at_once:
            for width in self._widths:
                self.network(width)

    def update_kwargs(self, model_kwargs: Mapping[str, Any], uncond_kwargs: Mapping[str, Any] | None) -> None:
        """Replace the values of the model's keywords; see `SamplingLoop`."""
        call = self.call.with_kwargs(model_kwargs, uncond_kwargs)
        self.network(self._widths[-1])  # at least one network, which checks the keywords
        for width, network in self._networks.items():
            network.update(call.repeated(width))
        self.call = call

    def set_state(self, x: Tensor) -> None:
        """Raise ValueError: the samples of a batch are at different steps."""
        check_run(watched=True)

    def free(self) -> None:
        """Drop the recorded graphs."""
        self._graphs.clear()

    def network(self, width: int) -> Network:
        """Return the network for `width` drafts of every sample, built on first use."""
        if width not in self._networks:
            network = Network(self.call.repeated(width), self.table.doubled)
            if self.execution.at_once:
                with self._settings():
                    network.prepare(self.table.timestep.tolist(), self.execution)
            self._networks[width] = network
        return self._networks[width]

    def seconds(self, width: int) -> float:
        """Return the seconds of a round with `width` drafts of every sample; for one draft, of the network call."""
        network = self.network(width)
        with self._settings():
            self._make_row_noise()
            return seconds(network if width == 1 else lambda: self._round(network, width), self.device)

    def steps(
        self,
        noise: Noise,
        x_T: Tensor | None = None,
        *,
        known: KnownImage | None = None,
        previews: bool = False,
        every_step: bool = False,
        progress: Show = None,
    ) -> Iterator[int]:
        """Run the sampler. Yields the number of steps that all samples have finished.

        The arguments are those of `Loop.steps`.

        Raises:
            ValueError: The noise is not from seeds, there is a known image, or something is wanted after every step.
            FloatingPointError: The model returned NaN, or an infinity that no clipping bounds; says between which
                steps.
        """
        check_run(from_seeds=noise.seeds is not None, known=known is not None, watched=every_step or previews)
        steps, batch = len(self.table), self.shape[0]
        self.speculation = None
        with self._settings():
            self._start(noise, x_T)
        bar = ProgressBar(steps, self.device, progress, every=1)
        calls = evaluations = reached = 0
        rows = [0] * batch
        finished = False
        try:
            while reached < steps:
                # At least as many rounds are left to do, so that no queued round is in vain.
                queued = ROUNDS_PER_CHECK if self._records() and self.watch is None else 1
                rounds = min(queued, max(self._rounds_left[row] for row in rows))
                width = self._width(rows, rounds)
                with self._settings():
                    for _ in range(rounds):
                        self._advance(width)
                    rows = self._position[:, Position.ROW].tolist()
                calls, evaluations = calls + rounds, evaluations + rounds * batch * width
                before, reached = reached, min(rows)
                if self.watch is not None:
                    self.watch(self._guess[0, : reached - before])
                bar.advance(reached - before)
                if not bool(torch.isfinite(self.x).all()):
                    raise FloatingPointError(self._not_finite_error(before, reached))
                if reached == steps:
                    acceptance = 1 - self._rejected.double().mean(0).cpu().numpy()
                    volume = evaluations / (batch * steps)
                    self.speculation = Speculation(self.plan.to_dict(), calls, volume, self.table.timestep, acceptance)
                    finished = True
                yield reached
        finally:
            bar.close(finished)

    def _start(self, noise: Noise, x_T: Tensor | None) -> None:
        """Bring the networks up to date, and fill every buffer with what the first round expects."""
        for network in self._networks.values():
            if network.refresh():
                self._graphs.clear()
                self._per_sample = {1}
        self._proven.clear()
        assert noise.seeds is not None  # checked by check_run
        self._seeds.copy_(noise.seeds)
        self._log_u.copy_(log_uniforms(self._seeds, self._ids))
        self._make_row_noise()
        self.x.copy_(noise.x_T() if x_T is None else x_T)
        self._guess.zero_()
        self._rejected.zero_()
        self._position.copy_(self._begin)
        for network in self._networks.values():
            network.start_run()

    def _make_row_noise(self) -> None:
        """Make the noise of all rows, on the PyTorch path and where it fits: a step may be drafted several times."""
        batch, steps = self._rejected.shape
        if self.backend == "torch" and batch * steps * self._drafts[0, 0].numel() <= MOST_NORMALS:
            seeds, ids = self._seeds.repeat_interleave(steps), self._ids[:, 1].repeat(batch)
            flat = normal(seeds, ids, Stream.STEP, self.shape[1:], backend="torch")
            self._row_noise = flat.view(batch, steps, *self.shape[1:])

    def _width(self, rows: Sequence[int], rounds: int) -> int:
        """Return the least width that has room for the windows of samples in these rows, for so many rounds."""
        needed = 1
        for row in rows:
            reach = row + 1 + (rounds - 1) * self._widths[-1]
            needed = max([needed, *self._window_of_row[row:reach].tolist()])
        return next(width for width in self._widths if width >= needed)

    def _advance(self, width: int) -> None:
        """Do one round, once calls of this width are proven to be the model's own."""
        if width in self._proven:
            self._launch(width)
            return
        kept = [buffer.clone() for buffer in self._state]
        while not self._agrees(width, self._launch(width)):
            for buffer, value in zip(self._state, kept, strict=True):
                buffer.copy_(value)
        self._proven.add(width)

    def _launch(self, width: int) -> Tensor:
        """Replay the graph of a round, or run the round eagerly; return the network's output."""
        if self._records() and width not in self._graphs:
            self._record(width)
        if width not in self._graphs:
            return self._round(self.network(width), width)
        self._graphs[width].replay()
        output: Tensor = self._graphs[width].output
        return output

    def _agrees(self, width: int, output: Tensor) -> bool:
        """Return whether the output of the round that was just done is the model's; prepare the network anew if not.

        Raises:
            ValueError: A sample's output depends on what else is in its call.
            RuntimeError: A graph is demanded, and the recorded call gives other numbers.
        """
        network = self.network(width)
        recorded = width in self._graphs
        if self.execution.verify and (recorded or network.prepared) and not network.agrees(output):
            self._graphs.clear()
            if width not in self._rebuilt:
                self._rebuilt.add(width)
                logger.info("the network gives other numbers than the model does now: it is prepared anew")
                network.rebuild()
                return False
            reason = "the model's own calls give other numbers than the network that was hoisted, compiled or recorded"
            if recorded and self.mode == "graph":
                raise RuntimeError(reason)
            logger.warning("%s; running as the model is", reason)
            network.give_up()
            self.mode = "eager"
            return False
        self._rebuilt.discard(width)
        if self.execution.verify and width not in self._per_sample:
            self._check_drafts(network, output, width)
            self._per_sample.add(width)
        return True

    def _check_drafts(self, network: Network, output: Tensor, width: int) -> None:
        """Raise ValueError unless the last draft of every sample gets the output of a call with one draft each."""
        alone = self.network(1)

        def last(tensor: Tensor) -> Tensor:
            drafts: Tensor = tensor.reshape(-1, width, *tensor.shape[1:])
            return drafts[:, -1]

        alone.input.copy_(last(network.input))
        alone.timestep.copy_(last(network.timestep))
        if not alone.agrees(last(output)):
            raise ValueError(
                f"speculate needs outputs that depend on their own sample alone: with {width} drafts of every sample "
                "in a call the model gives other numbers; call model.eval(), and name in shared_kwargs the keywords "
                f"that belong to all samples together (a size of {self.call.batch} is taken for one entry a sample)"
            )

    def _record(self, width: int) -> None:
        """Record a round; where that fails, rounds run eagerly from now on."""
        network = self.network(width)
        kept = [buffer.clone() for buffer in self._state]
        try:
            network.watch()
            with network.recording():
                self._graphs[width] = StepGraph(lambda: self._round(network, width), self.device, self._pool)
        except (CaptureError, torch.OutOfMemoryError) as error:
            reason = f"the rounds cannot be recorded in a CUDA graph: {line_of(error)}"
            if self.mode == "graph":
                raise RuntimeError(reason) from error
            logger.warning("%s; running eagerly", reason)
            self.mode = "eager"
        for buffer, value in zip(self._state, kept, strict=True):  # the warm-up of a recording runs real rounds
            buffer.copy_(value)

    @property
    def _state(self) -> tuple[Tensor, ...]:
        """The buffers that a round changes and the next one reads."""
        return self.x, self._guess, self._position, self._rejected

    def _round(self, network: Network, width: int) -> Tensor:
        """Draft, call the network, verify, decide and commit, on the fixed buffers; return the network's output."""
        drafted = self._drafts, self._noise, self._guess
        shared: dict[str, Any] = {}
        if self.backend == "torch":
            rows = RoundRows(self._coefficients, self._position, self._window_rows, width, self.x.dim())
            shared = {"rows": rows}
        self._draft(
            self.x, self._guess, self._position, self._window_rows, self._coefficients, self._ids, self._seeds, width,
            drafts=self._drafts, noise=self._noise, model_input=network.input, timestep=network.timestep, **shared,
            **({} if self._row_noise is None else {"row_noise": self._row_noise}),
        )  # fmt: skip
        output = network()
        limits = self._limits(network, output, width)
        self._verify(
            *drafted, output, self._position, self._window_rows, self._coefficients, width, dots=self._dots,
            **limits, **shared,
        )  # fmt: skip
        self._decide(
            self._dots, self._position, self._window_rows, self._coefficients, self._log_u, width,
            factor=self._factor, rejected=self._rejected, **shared,
        )  # fmt: skip
        self._commit(
            self.x, *drafted, output, self._position, self._factor, self._window_rows, self._coefficients, width,
            **limits, **shared,
        )  # fmt: skip
        return output

    def _limits(self, network: Network, output: Tensor, width: int) -> dict[str, Any]:
        """Return the clipping and the guidance of every draft, and whether the output enters a step by itself."""
        common = {"guidance": network.call.guidance, "use_output": self._use_output}
        if self.clipping.ratio is None:
            return {"clip": self.clipping.limit, **common}
        offsets = torch.arange(width, device=self.device, dtype=torch.int32)
        rows = (self._position[:, Position.ROW, None] + offsets).clamp(max=len(self.table) - 1).flatten()
        bound = threshold_bound(
            self._drafts[:, :width].flatten(0, 1).contiguous(), output, self._coefficients, rows,
            ratio=self.clipping.ratio, max_value=self.clipping.max_value, guidance=network.call.guidance,
            backend=self.backend,
        )  # fmt: skip
        return {"bound": bound, **common}

    def _parts(self) -> int:
        if self.backend == "torch":
            return 1
        from ddpm_fast.kernels.speculate_triton import parts

        return parts(self.x[0].numel())

    def _dtype_of_sums(self) -> torch.dtype:
        return torch.float64 if self.backend == "torch" else torch.float32

    def _not_finite_error(self, low: int, high: int) -> str:
        below = f"(timestep {self.table.timestep[low]} and below)"
        return self._not_finite(f"in steps {low} to {high} of {len(self.table)} {below}")


def check_run(*, from_seeds: bool = True, known: bool = False, watched: bool = False) -> None:
    """Raise ValueError for a run that is impossible with `speculate`, whatever the plan is.

    Args:
        from_seeds: Whether the noise comes from seeds.
        known: Whether there is a known image.
        watched: Whether something is wanted after every step.
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
