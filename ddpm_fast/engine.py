"""The engine: buffers, table and graph built once, then walks from noise to data."""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ddpm_fast.arguments import check_callable, checked_shape, checked_start, kept_steps, per_sample
from ddpm_fast.config import SamplerConfig, with_config_options
from ddpm_fast.graph import CaptureError, StepGraph, can_capture
from ddpm_fast.kernels.dispatch import choose_backend, on_device
from ddpm_fast.kernels.step import implementation
from ddpm_fast.kernels.threshold import threshold_bound
from ddpm_fast.network import Model, Network
from ddpm_fast.noise import GeneratorNoise, PhiloxNoise
from ddpm_fast.progress import Progress
from ddpm_fast.seeding import Seeds, resolve_seeds
from ddpm_fast.table import build_table
from ddpm_fast.validate import one_of, whole

logger = logging.getLogger("ddpm_fast")

EXECUTIONS = ("auto", "graph", "eager")

Generators = torch.Generator | Sequence[torch.Generator]
Callback = Callable[[int, int, Tensor], Any]


@dataclass(frozen=True)
class SampleResult:
    """What a walk gave.

    Attributes:
        sample: x_0, float32 [B, C, ...], or what `decode` made of it.
        seeds: one a sample; None if the noise came from generators.
        frames: [K, B, C, ...]: the states after K chosen steps ("trajectory"), or the x_0 estimates there ("x0"); None
            for "result".
        frame_timesteps: the K timesteps that those steps started from.
    """

    sample: Any
    seeds: list[int] | None
    frames: Tensor | None
    frame_timesteps: list[int]


class Sampler:
    """Draws samples from a trained diffusion model; build once, call many times.

    Args:
        model: any callable `model(x, t, **model_kwargs)` with x [B, C, ...] and t int64 [B], that returns a tensor
            or an object with `.sample`. It is never changed.
        shape: of the batch: (B, C, H, W), (B, C, L), (B, C, D, H, W), ….
        model_kwargs: passed to the model.
        guidance_scale: classifier-free guidance, uncond + scale (cond - uncond): a number or one a sample. Needs
        uncond_kwargs: the model_kwargs of the unconditional half.
        decode: applied to x_0 at the end (latents to images).
        device: "cpu" or "cuda[:i]". None: where the model is.
        dtype: what the network computes in; another dtype than its parameters' means autocast. The state is always
            float32.
        execution: "graph" replays a CUDA graph of network + step; "eager" calls them one by one; "auto" takes the
            graph on CUDA where the network allows it.
        steps_per_replay: steps in one graph.
        backend: "triton" or "torch" kernels; None chooses by device.
        config: a `SamplerConfig`, such as a checkpoint's; the options are changes to it.
        options: the fields of `SamplerConfig`.

    Attributes:
        config: the resolved `SamplerConfig`.
        table: its `StepTable`.
        last_seeds: the seeds of the last call; None before it, and after one with generators.

    Raises:
        ValueError, TypeError: in one sentence, what does not fit, before any network call.
    """

    @with_config_options()
    def __init__(
        self,
        model: Model,
        shape: Sequence[int],
        *,
        model_kwargs: Mapping[str, Any] | None = None,
        guidance_scale: float | Sequence[float] | None = None,
        uncond_kwargs: Mapping[str, Any] | None = None,
        decode: Callable[[Tensor], Any] | None = None,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        execution: str = "auto",
        steps_per_replay: int = 1,
        backend: str | None = None,
        config: SamplerConfig | None = None,
        **options: Any,
    ) -> None:
        one_of("execution", execution, EXECUTIONS)
        whole("steps_per_replay", steps_per_replay, 1)
        self.config = SamplerConfig.from_options(options, config)
        self.table = build_table(self.config)
        self.shape = checked_shape(shape)
        if (guidance_scale is None) != (uncond_kwargs is None):
            raise ValueError("guidance_scale and uncond_kwargs belong together: give both or neither")
        out_channels = self.shape[1] * (2 if self.table.doubled else 1)
        self.network = Network(model, self.shape, out_channels, model_kwargs, uncond_kwargs, device, dtype)
        self.device = self.network.device
        if execution == "graph" and not can_capture(self.device):
            raise ValueError(f"execution='graph' needs a CUDA device, got {self.device}")
        check_callable("decode", decode)
        self.execution = execution
        self.steps_per_replay = steps_per_replay
        self.decode = decode
        self.last_seeds: list[int] | None = None

        batch = self.shape[0]
        self._backend = choose_backend(self.device, backend)
        self._step = implementation(self._backend)  # the buffers are the engine's own: nothing to check
        self._coefficients = self.table.coefficients(self.device)
        self._ids = self.table.ids(self.device)
        self._base = torch.zeros(batch, dtype=torch.int32, device=self.device)
        self._seeds = torch.zeros(batch, dtype=torch.int64, device=self.device)
        self._guidance = per_sample("guidance_scale", guidance_scale, batch, self.device)
        self._x = torch.zeros(self.shape, device=self.device)
        self._x0: Tensor | None = None
        self._z: Tensor | None = None
        self._use_output = bool(np.any(self.table.c_out != 0))
        self._noisy = bool(np.any(self.table.sigma != 0))
        # On the CPU looking for NaN costs nothing; on a GPU it would stall the queue, so there one looks at the end.
        self._look_at_every_step = self.device.type == "cpu"
        self._graphs: dict[tuple[int, str, bool], StepGraph] = {}

    def __call__(
        self,
        *,
        seeds: Seeds = None,
        generator: Generators | None = None,
        x_T: Tensor | None = None,
        model_kwargs: Mapping[str, Any] | None = None,
        uncond_kwargs: Mapping[str, Any] | None = None,
        output: str = "sample",
        output_steps: Sequence[int] | None = None,
        callback: Callback | None = None,
        progress: bool | str | None = None,
    ) -> Any:
        """Walk from noise to data.

        Args:
            seeds: an int s for s, s + 1, …; a range or sequence with one a sample; None draws fresh ones and reports
                them (`last_seeds`, and the log). A sample depends on its seed alone, not on its batch.
            generator: instead, a torch.Generator or one a sample: noise in the order in which a plain loop draws it.
            x_T: float tensor of the sampler's shape: the start, instead of noise.
            model_kwargs, uncond_kwargs: new values of what the sampler was built with; shapes stay.
            output: "sample"; or a `SampleResult`: with the seeds ("result"), and with frames, estimates of x_0 on the
                way ("x0") or the states themselves ("trajectory").
            output_steps: step numbers, 0 … steps - 1, after which to keep a frame; default ten, evenly spread.
            callback: called as callback(step, timestep, x) after every step, x a copy of the state.
            progress: a bar on stderr, with a label if it is a text; None shows it on terminals only.

        Returns:
            x_0, float32 [B, C, ...] (or what `decode` made of it); a `SampleResult` unless output is "sample".

        Raises:
            ValueError, TypeError: bad arguments, before any network call; a model that returns another shape.
            FloatingPointError: the model returned NaN, or an infinity that no clipping bounds; says at which step.
            RuntimeError: execution="graph" and the network cannot be captured.
        """
        check_callable("callback", callback)
        keep = kept_steps(output, output_steps, len(self.table))
        noise = self._make_noise(seeds, generator)
        checked_start(x_T, self.shape)
        if model_kwargs is not None or uncond_kwargs is not None:
            self.network.update_kwargs(model_kwargs or {}, uncond_kwargs)
        frames: list[Tensor] = []
        previews = output == "x0"
        if previews and self._x0 is None:
            self._x0 = torch.zeros_like(self._x)

        def watch(done: int) -> None:
            if done - 1 in keep:
                frames.append((self._x0 if previews else self._x).clone())  # type: ignore[union-attr]
            if callback is not None:
                callback(done - 1, int(self.table.timestep[done - 1]), self._x.clone())

        watched = bool(keep) or callback is not None
        with on_device(self.device), torch.no_grad():
            self._walk(noise, x_T, previews, watch if watched else None, progress)
            sample = self._x.clone()
            if self.decode is not None:
                sample = self.decode(sample)
        if output == "sample":
            return sample
        timesteps = self.table.timestep[sorted(keep)].tolist()
        return SampleResult(sample, self.last_seeds, torch.stack(frames) if frames else None, timesteps)

    def _walk(
        self,
        noise: PhiloxNoise | GeneratorNoise,
        x_T: Tensor | None,
        previews: bool,
        watch: Callable[[int], None] | None,
        progress: bool | str | None,
    ) -> None:
        """All steps, from x_T to x_0."""
        kind = "none" if not self._noisy else "philox" if noise.in_kernel else "tensor"
        stride = 1 if watch or kind == "tensor" else self.steps_per_replay
        graph = self._graph(stride, kind, previews)
        stride = stride if graph else 1
        self._start(noise, x_T)
        bar = Progress(len(self.table), self.device, progress)
        finished = False
        try:
            for done in range(0, len(self.table), stride):
                z = noise.z(done)
                if graph is None:
                    self._step_eagerly(done, z, kind, previews)
                else:
                    if z is not None:
                        self._z.copy_(z, non_blocking=True)  # type: ignore[union-attr]
                    graph.replay()
                if self._look_at_every_step and not self._is_finite():
                    raise FloatingPointError(self._not_finite_error(done))
                reached = min(done + stride, len(self.table))
                bar.advance(reached - done)
                if watch is not None:
                    watch(reached)
            if not self._is_finite():
                raise FloatingPointError(self._find_not_finite(noise, x_T, kind))
            finished = True
        finally:
            bar.close(finished)

    def _start(self, noise: PhiloxNoise | GeneratorNoise, x_T: Tensor | None) -> None:
        """Put every buffer where the first step expects it."""
        self._base.zero_()
        if noise.in_kernel:
            self._seeds.copy_(noise.seeds)  # type: ignore[arg-type]
        start = noise.x_T() if x_T is None else x_T
        self._x.copy_(start)
        self.network.timestep.fill_(int(self.table.timestep[0]))
        for half in self.network.input.split(self.shape[0]):
            half.copy_(start)

    def _step_eagerly(self, number: int, z: Tensor | None, kind: str, previews: bool) -> None:
        if self._backend == "torch":
            self._iterate(number, 0, z, kind, previews)
        else:
            self._iterate(self._base, 0, z, kind, previews)
            self._base.add_(1)

    def _iterate(self, base: Tensor | int, offset: int, z: Tensor | None, kind: str, previews: bool) -> None:
        """Network and step, on the fixed buffers."""
        output = self.network()
        config, bound = self.config, None
        if config.thresholding:
            bound = threshold_bound(
                self._x, output, self._coefficients, base, offset,
                ratio=config.dynamic_thresholding_ratio, max_value=config.sample_max_value, guidance=self._guidance,
                backend=self._backend,
            )  # fmt: skip
        self._step(
            self._x,
            output,
            self._coefficients,
            self._ids,
            base,
            offset,
            seeds=self._seeds if kind == "philox" else None,
            z=z,
            clip=config.clip_sample_range if config.clip_sample and bound is None else None,
            bound=bound,
            guidance=self._guidance,
            learned=self.table.learned,
            use_output=self._use_output,
            x_new=self._x,
            x0_new=self._x0 if previews else None,
            model_input=self.network.input,
            timestep=self.network.timestep,
        )

    def _graph(self, stride: int, kind: str, previews: bool) -> StepGraph | None:
        """The graph of `stride` steps, recorded on first use; None where steps run eagerly."""
        if self.execution == "eager" or not can_capture(self.device):
            return None
        if kind == "tensor" and self._z is None:
            self._z = torch.zeros_like(self._x)
        key = (stride, kind, previews)
        if key not in self._graphs:
            try:
                self._graphs[key] = StepGraph(lambda: self._body(stride, kind, previews), self.device)
            except CaptureError as error:
                if self.execution == "graph":
                    raise RuntimeError(f"the network cannot be captured in a CUDA graph: {error}") from error
                logger.warning("the network cannot be captured in a CUDA graph (%s): running eagerly", error)
                self.execution = "eager"
                return None
        return self._graphs[key]

    def _body(self, stride: int, kind: str, previews: bool) -> None:
        for offset in range(stride):
            self._iterate(self._base, offset, self._z if kind == "tensor" else None, kind, previews)
        self._base.add_(stride)

    def _make_noise(self, seeds: Seeds, generator: Generators | None) -> PhiloxNoise | GeneratorNoise:
        if generator is not None:
            if seeds is not None:
                raise ValueError("noise comes from seeds or from generators, not from both")
            self.last_seeds = None
            return GeneratorNoise(generator, self.shape, self.table, self.device)
        resolved = resolve_seeds(seeds, self.shape[0])
        if seeds is None:
            logger.info("drew seeds %d … %d", resolved[0], resolved[-1])
        self.last_seeds = resolved
        return PhiloxNoise(resolved, self.shape, self.table, self.device, self._backend)

    def _is_finite(self) -> bool:
        # One sum tells in all but the rarest case: that of finite numbers whose sum is not.
        return math.isfinite(self._x.sum().item()) or bool(torch.isfinite(self._x).all())

    def _find_not_finite(self, noise: PhiloxNoise | GeneratorNoise, x_T: Tensor | None, kind: str) -> str:
        """Walk once more, looking after every step: that is how a GPU run finds out where it went wrong."""
        noise.restart()
        self._start(noise, x_T)
        for done in range(len(self.table)):
            self._step_eagerly(done, noise.z(done), kind, previews=False)
            if not self._is_finite():
                return self._not_finite_error(done)
        return "the model returned NaN or infinity at some step, but not when the walk was repeated"

    def _not_finite_error(self, number: int) -> str:
        bad = (~torch.isfinite(self._x).flatten(1).all(1)).nonzero().flatten().tolist()
        return (
            f"the model returned NaN or infinity at step {number} of {len(self.table)} "
            f"(timestep {self.table.timestep[number]}), for sample {', '.join(map(str, bad[:5]))} of the batch"
        )
