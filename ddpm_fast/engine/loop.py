"""The loop around the network: buffers, table and graph built once, then walked many times."""

import contextlib
import logging
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ddpm_fast.engine.execution import DEFAULT, Execution, tf32
from ddpm_fast.engine.graph import CaptureError, GraphPool, StepGraph, can_capture
from ddpm_fast.engine.network import Network
from ddpm_fast.engine.noise import Noise
from ddpm_fast.engine.progress import Progress, Show
from ddpm_fast.kernels.dispatch import choose_backend, on_device
from ddpm_fast.kernels.step import implementation, rows_on_host
from ddpm_fast.kernels.threshold import threshold_bound
from ddpm_fast.table import Clipping, StepTable
from ddpm_fast.validate import line_of

logger = logging.getLogger("ddpm_fast")

LOOK = 16  # steps between two looks for NaN on a CPU
PAYS = 1000  # steps walked, after which optimize="auto" hoists: they took longer than tracing the network does

Known = tuple[Tensor, Tensor]
Correction = Callable[[int, Tensor, Tensor], Tensor]


class _Form(NamedTuple):
    """What a walk's steps take in and write, besides x: a recorded graph is of one form.

    Attributes:
        noise: "none", "philox" (made by the kernel) or "tensor".
        previews: whether the origin estimate is written.
        known: whether an image is known in part.
    """

    noise: str
    previews: bool
    known: bool


class Loop:
    """Walks a table with a network, from any noise.

    Args:
        network: on its own fixed buffers.
        table: the rows to walk.
        clipping: of the origin estimate.
        guidance: float32 [B], where the network is guided.
        correction: called as correction(step, x, output) before every step; what it returns is added to x after it.
            Such a walk is never recorded.
        keep_x0: always write the origin estimate to `x0`.
        inference_mode: run under torch.inference_mode, which spares the host work; not for a network or a correction
            that takes gradients inside, nor for one that keeps tensors and is trained later.
        how: it is executed.
        pool: memory for its graphs, shared with loops that never walk at the same time.

    Attributes:
        x: the state, float32 [B, C, ...]; a buffer, to be copied.
        x0: the origin estimate of the last step, where it is written; zeros before the first.
    """

    @torch.inference_mode(False)  # buffers made inside it could not be written outside
    def __init__(
        self,
        network: Network,
        table: StepTable,
        clipping: Clipping,
        *,
        guidance: Tensor | None = None,
        correction: Correction | None = None,
        keep_x0: bool = False,
        inference_mode: bool = False,
        how: Execution = DEFAULT,
        pool: GraphPool | None = None,
    ) -> None:
        self.network = network
        self.table = table
        self.clipping = clipping
        self.device = network.device
        if how.execution == "graph" and not can_capture(self.device):
            raise ValueError(f"execution='graph' needs a CUDA device, got {self.device}")
        self.how = how
        self.execution = "eager" if correction is not None else how.execution
        self.steps_per_replay = how.steps_per_replay
        self.correction = correction
        self.keep_x0 = keep_x0
        self._no_gradients = torch.inference_mode if inference_mode else torch.no_grad

        batch, *sizes = network.output_shape
        batch = network.batch
        self.shape = (batch, network.input.shape[1], *sizes[1:])
        self.backend = choose_backend(self.device, how.backend)
        self._step = implementation(self.backend)  # the buffers are the loop's own: nothing to check
        self._rows: tuple[Any, Any] = table.coefficients(self.device), table.ids(self.device)
        self._rows_on_host = rows_on_host(table.coefficients(), table.ids())
        self._base = torch.zeros(batch, dtype=torch.int32, device=self.device)
        self._seeds = torch.zeros(batch, dtype=torch.int64, device=self.device)
        self._guidance = guidance
        self.x = torch.zeros(self.shape, device=self.device)
        # The PyTorch step builds it there anyway.
        self.x0: Tensor | None = torch.zeros_like(self.x) if keep_x0 or self.backend == "torch" else None
        self._z: Tensor | None = None
        self._use_output = bool(np.any(table.c_out != 0))
        self._noisy = bool(np.any(table.sigma != 0))
        self._pool = pool or GraphPool()
        self._known: Known | None = None
        self._graphs: dict[tuple[int, _Form], StepGraph] = {}
        self._walked = 0
        self._ready = how.optimize is None and not how.at_once
        if how.at_once:
            with self._settings():
                self._prepare()

    def steps(
        self,
        noise: Noise,
        x_T: Tensor | None = None,
        *,
        known: Known | None = None,
        previews: bool = False,
        every_step: bool = False,
        progress: Show = None,
    ) -> Iterator[int]:
        """Walk; from time to time (with `every_step`, after every step) the number of steps done so far.

        What is asked for in between stands in `x`, and with `previews` in `x0`. To be drawn to the end, or left.
        `known` is an image and a mask, 1 where it holds (`kernels.step`); it needs noise from seeds.

        Raises:
            FloatingPointError: NaN, or an infinity that no clipping bounds; says at which step.
            RuntimeError: execution="graph" and the network cannot be captured.
        """
        previews = previews or self.keep_x0
        if previews and self.x0 is None:
            with torch.inference_mode(False):
                self.x0 = torch.zeros_like(self.x)
        with self._settings():
            if self.network.refresh():
                self._graphs.clear()
            if not self._ready and self._walked >= PAYS:
                self._prepare()
            kind = "none" if not self._noisy else "philox" if noise.in_kernel else "tensor"
            form = _Form(kind, previews, known is not None)
            self._take_known(known)
            stride, graph = self._graph(1 if every_step or kind == "tensor" else self.steps_per_replay, form)
            noise.begin()
            self._start(noise, x_T)
        at_once = 1 if every_step else max(stride, LOOK // stride * stride)
        # On a GPU looking for NaN would stall the queue, so there one looks at the end.
        look = len(self.table) if self.device.type == "cuda" else at_once
        bar = Progress(len(self.table), self.device, progress)
        finished = False
        try:
            for first in range(0, len(self.table), at_once):
                reached = min(first + at_once, len(self.table))
                with self._settings():
                    for done in range(first, reached, stride):
                        self._advance(done, graph, noise, form)
                        bar.advance(min(stride, reached - done))
                if (reached == len(self.table) or reached % look == 0) and not self._is_finite():
                    raise FloatingPointError(
                        self._not_finite_error(first) if look == 1 else self._find_not_finite(noise, x_T, form)
                    )
                yield reached
            finished = True
            self._walked += len(self.table)
        finally:
            bar.close(finished)

    @property
    def guided(self) -> bool:
        """Whether the network is guided."""
        return self.network.guided

    def update_kwargs(self, model_kwargs: Mapping[str, Any], uncond_kwargs: Mapping[str, Any] | None) -> None:
        """New values of what the model is given; see `Network.update_kwargs`."""
        self.network.update_kwargs(model_kwargs, uncond_kwargs)

    def run(self, noise: Noise, x_T: Tensor | None = None, *, progress: Show = None) -> Tensor:
        """Walk to the end and return a copy of x: float32 [B, C, ...]."""
        for _ in self.steps(noise, x_T, progress=progress):
            pass
        return self.x.clone()

    def free(self) -> None:
        """Let go of the recorded graphs."""
        self._graphs.clear()

    @contextlib.contextmanager
    def _settings(self) -> Iterator[None]:
        """What torch is set to while the network and the steps run."""
        with on_device(self.device), self._no_gradients(), tf32(self.how.tf32 if self.device.type == "cuda" else None):
            yield

    def _prepare(self) -> None:
        """Make the network's calls faster; graphs of the calls as they were no longer hold."""
        row = 0 if self.backend == "torch" and not self._records() else None
        self.network.prepare(self.table.timestep.tolist(), self.how, row)
        self._ready = True
        self._graphs.clear()

    def _records(self) -> bool:
        """Whether steps are to be recorded in graphs."""
        return self.execution != "eager" and can_capture(self.device)

    @torch.inference_mode(False)
    def _take_known(self, known: Known | None) -> None:
        if known is not None:
            if self._known is None:
                self._known = torch.zeros_like(self.x), torch.zeros_like(self.x)
            for held, value in zip(self._known, known, strict=True):
                held.copy_(value.detach())

    def _advance(self, done: int, graph: StepGraph | None, noise: Noise, form: _Form) -> None:
        z = noise.z(done)
        if graph is None:
            self._step_eagerly(done, z if form.noise == "tensor" else None, form)
        else:
            if z is not None and form.noise == "tensor":
                self._z.copy_(z, non_blocking=True)  # type: ignore[union-attr]
            graph.replay()

    def _start(self, noise: Noise, x_T: Tensor | None) -> None:
        """Put every buffer where the first step expects it."""
        self._base.zero_()
        if noise.seeds is not None:
            self._seeds.copy_(noise.seeds)
        start = noise.x_T() if x_T is None else x_T
        self.x.copy_(start)
        if self.x0 is not None:
            self.x0.zero_()
        self.network.timestep.fill_(int(self.table.timestep[0]))
        for half in self.network.input.split(self.shape[0]):
            half.copy_(start)

    def _step_eagerly(self, number: int, z: Tensor | None, form: _Form) -> None:
        if self.backend == "torch":
            self._iterate(number, 0, z, form)
        else:
            self._iterate(self._base, 0, z, form, number)
            self._base.add_(1)

    def _iterate(
        self, base: Tensor | int, offset: int, z: Tensor | None, form: _Form, number: int | None = None
    ) -> None:
        """Network and step, on the fixed buffers."""
        output = self.network(base if isinstance(base, int) else None)
        coefficients, ids = self._rows_on_host if isinstance(base, int) else self._rows
        extra = None
        if self.correction is not None:
            extra = self.correction(base if isinstance(base, int) else number or 0, self.x, output)
        known, mask = self._known if form.known and self._known else (None, None)
        clipping, bound = self.clipping, None
        if clipping.ratio is not None:
            bound = threshold_bound(
                self.x, output, coefficients, base, offset, ratio=clipping.ratio, max_value=clipping.max_value,
                guidance=self._guidance, backend=self.backend,
            )  # fmt: skip
        self._step(
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
            guidance=self._guidance,
            learned=self.table.learned,
            use_output=self._use_output,
            known=known,
            mask=mask,
            x_new=self.x,
            x0_new=self.x0 if form.previews or self.backend == "torch" else None,
            model_input=self.network.input,
            timestep=self.network.timestep,
        )
        if extra is not None:
            self.x.add_(extra)
            for half in self.network.input.split(self.shape[0]):
                half.copy_(self.x)

    def _graph(self, stride: int, form: _Form) -> tuple[int, StepGraph | None]:
        """The graph, recorded on first use, and how many steps are in it; 1 and None where steps run eagerly."""
        if not self._records():
            return 1, None
        if form.noise == "tensor" and self._z is None:
            with torch.inference_mode(False):
                self._z = torch.zeros_like(self.x)
        key = stride, form
        if key not in self._graphs:
            failed = self._record(stride, form)
            if failed is not None:
                why, smaller = failed
                if self.execution == "graph":
                    raise RuntimeError(why)
                logger.warning("%s; %s", why, "recording one step" if smaller else "running eagerly")
                if smaller:
                    self.steps_per_replay = 1
                    return self._graph(1, form)
                self.execution = "eager"
                return 1, None
        return stride, self._graphs[key]

    def _record(self, stride: int, form: _Form) -> tuple[str, bool] | None:
        """Record a graph; or why that failed, and whether a smaller one may succeed."""
        try:
            graph = StepGraph(lambda: self._body(stride, form), self.device, self._pool)
        except CaptureError as error:
            return f"the network cannot be captured in a CUDA graph: {line_of(error)}", False
        except torch.OutOfMemoryError as error:
            failed = f"a CUDA graph of {stride} steps does not fit into memory: {line_of(error)}", stride > 1
        else:
            self._graphs[stride, form] = graph
            return None
        torch.cuda.empty_cache()  # here the error no longer holds what had been allocated
        return failed

    def _body(self, stride: int, form: _Form) -> None:
        for offset in range(stride):
            self._iterate(self._base, offset, self._z if form.noise == "tensor" else None, form)
        self._base.add_(stride)

    def _is_finite(self) -> bool:
        # One sum tells in all but the rarest case: that of finite numbers whose sum is not.
        return math.isfinite(self.x.sum().item()) or bool(torch.isfinite(self.x).all())

    def _find_not_finite(self, noise: Noise, x_T: Tensor | None, form: _Form) -> str:
        """Walk once more, looking after every step: that is how a GPU run finds out where it went wrong."""
        noise.restart()
        with self._settings():
            self._start(noise, x_T)
            for done in range(len(self.table)):
                self._step_eagerly(done, noise.z(done), form._replace(previews=self.keep_x0))
                if not self._is_finite():
                    return self._not_finite_error(done)
        return "the model returned NaN or infinity at some step, but not when the walk was repeated"

    def _not_finite_error(self, number: int) -> str:
        bad = (~torch.isfinite(self.x).flatten(1).all(1)).nonzero().flatten().tolist()
        return (
            f"the model returned NaN or infinity at step {number} of {len(self.table)} "
            f"(timestep {self.table.timestep[number]}), for sample {', '.join(map(str, bad[:5]))} of the batch"
        )
