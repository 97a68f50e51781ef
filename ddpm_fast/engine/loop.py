"""The sampling loop: buffers, table and graph are built once, then run many times."""

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

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
from ddpm_fast.kernels.rows import rows_on_host
from ddpm_fast.kernels.step import implementation
from ddpm_fast.kernels.threshold import threshold_bound
from ddpm_fast.table import Clipping, StepTable
from ddpm_fast.validate import line_of

logger = logging.getLogger("ddpm_fast")

CHECK_EVERY = 16  # steps between two checks for NaN on a CPU

Correction = Callable[[int, Tensor, Tensor], Tensor]


class _Form(NamedTuple):
    """A form of step: what the steps of a run read and write besides x. Every recorded graph has one form.

    Attributes:
        noise: "none", "philox" (the kernel makes the noise) or "tensor".
        previews: Whether the x0 prediction is written.
        known: Whether there is a known image.
    """

    noise: str
    previews: bool
    known: bool


class Loop(SamplingLoop):
    """A sampling loop that takes one step at a time, or replays a few.

    Args:
        call, table, clipping, inference_mode, execution: See `SamplingLoop`.
        correction: A function that is called as `correction(step, x, output)` before every step; its result is added to
            x after the step. A loop with a correction is never recorded.
        keep_x0: Whether the x0 prediction is always written to `x0`.
        pool: Memory for the graphs, shared with loops that never run at the same time.
    """

    @torch.inference_mode(False)  # a buffer made in inference mode could not be written outside of that mode
    def __init__(
        self,
        call: Call,
        table: StepTable,
        clipping: Clipping,
        *,
        correction: Correction | None = None,
        keep_x0: bool = False,
        inference_mode: bool = False,
        execution: Execution = DEFAULT,
        pool: GraphPool | None = None,
    ) -> None:
        super().__init__(call, table, clipping, inference_mode, execution)
        self.network = Network(call, table.doubled)
        self.correction, self.keep_x0 = correction, keep_x0
        if correction is not None:
            self.mode = "eager"
        self.steps_per_replay = execution.steps_per_replay
        if keep_x0 or self.backend == "torch":  # the PyTorch step builds the x0 prediction anyway
            self.x0 = torch.zeros_like(self.x)
        self._base = torch.zeros(self.shape[0], dtype=torch.int32, device=self.device)
        self._seeds = torch.zeros(self.shape[0], dtype=torch.int64, device=self.device)
        self._z: Tensor | None = None
        self._rows: tuple[Any, Any] = table.coefficients(self.device), table.ids(self.device)
        self._rows_on_host = rows_on_host(table.coefficients(), table.ids())
        self._take_step = implementation(self.backend)
        self._use_output = bool(np.any(table.c_out != 0))
        self._noisy = bool(np.any(table.sigma != 0))
        self._pool = pool or GraphPool()
        self._known: KnownImage | None = None
        self._graphs: dict[tuple[int, _Form], StepGraph] = {}
        self._seconds, self._checks = 0.0, 0
        self._prepared = execution.optimize is None and not execution.at_once
        if execution.at_once:
            with self._settings():
                self._prepare()

    def update_kwargs(self, model_kwargs: Mapping[str, Any], uncond_kwargs: Mapping[str, Any] | None) -> None:
        """Replace the values of the model's keywords; see `SamplingLoop`."""
        call = self.call.with_kwargs(model_kwargs, uncond_kwargs)
        self.network.update(call)
        self.call = call

    def set_state(self, x: Tensor) -> None:
        """Replace the state between two steps; see `SamplingLoop`."""
        with torch.no_grad():
            self.x.copy_(x)
            self._write_input(x)

    def free(self) -> None:
        """Drop the recorded graphs."""
        self._graphs.clear()

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
        """Run the sampler; see `SamplingLoop`."""
        total = len(self.table)
        graph, stride, form = self._begin(noise, x_T, known, previews or self.keep_x0, every_step)
        chunk = 1 if every_step else max(stride, CHECK_EVERY // stride * stride)
        # On a GPU a check for NaN would drain the queue, so there only the last state is checked.
        check = total if self.device.type == "cuda" else chunk
        bar = ProgressBar(total, self.device, progress)
        finished = False
        try:
            for first in range(0, total, chunk):
                reached = min(first + chunk, total)
                began = time.perf_counter()
                with self._settings():
                    if every_step and first:
                        self.network.recast()  # a callback may have changed the weights
                    for number in range(first, reached, stride):
                        self._advance(number, graph, noise, form)
                        bar.advance(min(stride, reached - number))
                if (reached == total or reached % check == 0) and not self._is_finite():
                    raise FloatingPointError(
                        self._not_finite_error(first) if check == 1 else self._find_not_finite(noise, x_T, form)
                    )
                self._seconds += time.perf_counter() - began
                yield reached
            finished = True
        finally:
            bar.close(finished)

    def _begin(
        self, noise: Noise, x_T: Tensor | None, known: KnownImage | None, previews: bool, every_step: bool
    ) -> tuple[StepGraph | None, int, _Form]:
        """Bring network, graph and buffers up to date for a run; return the graph, its steps and their form."""
        kind = "none" if not self._noisy else "philox" if noise.in_kernel else "tensor"
        form = _Form(kind, previews, known is not None)
        self._make_room(form)
        with self._settings():
            if self.network.refresh():
                self._graphs.clear()
            if not self._prepared and self._seconds >= self.network.seconds_to_hoist:
                self._prepare()
            if known is not None:
                for buffer, value in zip(self._known or (), known, strict=True):
                    buffer.copy_(value.detach())
            noise.begin()
            start = noise.x_T() if x_T is None else x_T
            graph, stride = self._proven_graph(1 if every_step or kind == "tensor" else 0, form, start)
            self._start(noise, start)
            self.network.start_run()
        return graph, stride, form

    def _proven_graph(self, stride: int, form: _Form, start: Tensor) -> tuple[StepGraph | None, int]:
        """Return the graph and its number of steps as `_graph` does, once a call equals the model's own.

        Args:
            stride: Steps to record; 0 for as many as the options say.
            form: What the steps read and write.
            start: Any x, [B, C, ...].
        """
        for again in (True, False):
            graph, recorded = self._graph(stride or self.steps_per_replay, form)
            if not self.execution.verify or self._agrees(graph, start):
                return graph, recorded
            if again:
                logger.info("the network gives other numbers than the model does now: it is prepared anew")
                self.network.rebuild()
                self._graphs.clear()
        reason = "the model's own calls give other numbers than the network that was hoisted, compiled or recorded"
        if self.mode == "graph" and graph is not None:
            raise RuntimeError(reason)
        logger.warning("%s; running as the model is", reason)
        self.network.give_up()
        self._graphs.clear()
        self.mode = "eager"
        return None, 1

    def _agrees(self, graph: StepGraph | None, start: Tensor) -> bool:
        """Return whether a call that was prepared or recorded gives what the model gives, in a row that varies."""
        if graph is None and not self.network.prepared:
            return True
        total, self._checks = len(self.table), self._checks + 1
        # Multiples of the golden ratio reach every part of the table soon.
        row = min(int(self._checks * 0.6180339887498949 % 1 * total), total - self.steps_per_replay)
        row = max(row, 0)

        def set_input() -> None:
            self._write_input(start)
            self.network.timestep.fill_(int(self.table.timestep[row]))

        set_input()
        with self.network.undone():
            if graph is None:
                one_row = self.backend == "torch"
                output = self.network(row if one_row else None).clone()
            else:
                self._base.fill_(row)
                self.x.copy_(start)
                graph.replay()
                output = graph.output
                set_input()
        return self.network.agrees(output)

    @torch.inference_mode(False)
    def _make_room(self, form: _Form) -> None:
        """Make the buffers that steps of this form need besides x."""
        if form.previews and self.x0 is None:
            self.x0 = torch.zeros_like(self.x)
        if form.known and self._known is None:
            self._known = torch.zeros_like(self.x), torch.zeros_like(self.x)
        if form.noise == "tensor" and self._z is None and self._records():
            self._z = torch.zeros_like(self.x)

    def _prepare(self) -> None:
        """Prepare the network; graphs of its calls as they were no longer hold."""
        row = 0 if self.backend == "torch" and not self._records() else None
        self.network.prepare(self.table.timestep.tolist(), self.execution, row)
        self._prepared = True
        self._graphs.clear()

    def _start(self, noise: Noise, start: Tensor) -> None:
        """Fill every buffer with what the first step expects; the run starts from x = `start`."""
        self._base.zero_()
        if noise.seeds is not None:
            self._seeds.copy_(noise.seeds)
        self.x.copy_(start)
        if self.x0 is not None:
            self.x0.zero_()
        self.network.timestep.fill_(int(self.table.timestep[0]))
        self._write_input(start)

    def _write_input(self, x: Tensor) -> None:
        for half in self.network.input.split(self.shape[0]):
            half.copy_(x)

    def _advance(self, number: int, graph: StepGraph | None, noise: Noise, form: _Form) -> None:
        """Take the steps of one replay, or one step eagerly, from step `number` on."""
        z = noise.z(number)  # drawn even where no step reads the draw: a generator must stay in the library's order
        z = z if form.noise == "tensor" else None
        if graph is not None:
            if z is not None and self._z is not None:
                self._z.copy_(z, non_blocking=True)
            graph.replay()
        elif self.backend == "torch":
            self._step(number, number, 0, z, form)
        else:
            self._step(number, self._base, 0, z, form)
            self._base.add_(1)

    def _step(self, number: int, base: Tensor | int, offset: int, z: Tensor | None, form: _Form) -> Tensor:
        """Call the network and take one step, on the fixed buffers; return the network's output.

        Args:
            number: Number of the step, where the step is not recorded.
            base, offset: Row of the table: one int for all samples, or int32 [B], plus the offset.
            z: Noise of the step, where the kernel does not make the noise.
            form: What the step reads and writes.
        """
        one_row = isinstance(base, int)
        output = self.network(number if one_row else None)
        coefficients, ids = self._rows_on_host if one_row else self._rows
        clipping, guidance = self.clipping, self.call.guidance
        correction = self.correction(number, self.x, output) if self.correction is not None else None
        known, mask = self._known if form.known and self._known else (None, None)
        bound = None
        if clipping.ratio is not None:
            bound = threshold_bound(
                self.x, output, coefficients, base, offset, ratio=clipping.ratio, max_value=clipping.max_value,
                guidance=guidance, backend=self.backend,
            )  # fmt: skip
        self._take_step(
            self.x,
            output,
            coefficients,
            ids,
            base,
            offset,
            seeds=self._seeds if form.noise == "philox" or form.known else None,
            z=z,
            clip=clipping.limit if bound is None else None,
            bound=bound,
            guidance=guidance,
            learned=self.table.learned,
            use_output=self._use_output,
            known=known,
            mask=mask,
            x_new=self.x,
            x0_new=self.x0 if form.previews or self.backend == "torch" else None,
            model_input=self.network.input,
            timestep=self.network.timestep,
        )
        if correction is not None:
            self.x.add_(correction)
            self._write_input(self.x)
        return output

    def _graph(self, stride: int, form: _Form) -> tuple[StepGraph | None, int]:
        """Return the graph, recorded on first use, and its number of steps; None and 1 where steps run eagerly."""
        if not self._records():
            return None, 1
        if (stride, form) not in self._graphs:
            failure = self._record(stride, form)
            if failure is not None:
                reason, smaller = failure
                if self.mode == "graph":
                    raise RuntimeError(reason)
                logger.warning("%s; %s", reason, "recording one step" if smaller else "running eagerly")
                if smaller:
                    self.steps_per_replay = 1
                    return self._graph(1, form)
                self.mode = "eager"
                return None, 1
        return self._graphs[stride, form], stride

    def _record(self, stride: int, form: _Form) -> tuple[str, bool] | None:
        """Record a graph; where that fails, return the reason and whether a smaller graph may succeed."""

        def body() -> Tensor:
            outputs: list[Tensor] = []
            for offset in range(stride):
                output = self._step(0, self._base, offset, self._z if form.noise == "tensor" else None, form)
                outputs = outputs or [output]
            self._base.add_(stride)
            return outputs[0]

        try:
            self.network.watch()
            with self.network.recording():
                graph = StepGraph(body, self.device, self._pool)
        except CaptureError as error:
            return f"the network cannot be captured in a CUDA graph: {line_of(error)}", False
        except torch.OutOfMemoryError as error:
            failure = f"a CUDA graph of {stride} steps does not fit into memory: {line_of(error)}", stride > 1
        else:
            self._graphs[stride, form] = graph
            return None
        torch.cuda.empty_cache()  # here the error no longer holds the memory that was allocated
        return failure

    def _is_finite(self) -> bool:
        # One sum suffices but for finite numbers whose sum is not finite.
        return math.isfinite(self.x.sum().item()) or bool(torch.isfinite(self.x).all())

    def _find_not_finite(self, noise: Noise, x_T: Tensor | None, form: _Form) -> str:
        """Run once more, with a check after every step, and return the message that names the step."""
        noise.restart()
        with self._settings():
            self._start(noise, noise.x_T() if x_T is None else x_T)
            for number in range(len(self.table)):
                self._advance(number, None, noise, form._replace(previews=self.keep_x0))
                if not self._is_finite():
                    return self._not_finite_error(number)
        return "the model returned NaN or infinity at some step, but not when the run was repeated"

    def _not_finite_error(self, number: int) -> str:
        return self._not_finite(f"at step {number} of {len(self.table)} (timestep {self.table.timestep[number]})")
