"""Sampling: `from ddpm_fast.sample import sample, Sampler`."""

import contextlib
import inspect
import logging
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ddpm_fast.config import SamplerConfig, with_config_options
from ddpm_fast.engine.device import Model
from ddpm_fast.engine.execution import Execution
from ddpm_fast.engine.loop import Loop
from ddpm_fast.engine.network import Network
from ddpm_fast.engine.noise import GeneratorNoise, Noise, PhiloxNoise
from ddpm_fast.engine.progress import Show
from ddpm_fast.kernels.dispatch import on_device
from ddpm_fast.seeding import Seeds, resolve_seeds
from ddpm_fast.speculation.choose import Speculate, speculative_loop
from ddpm_fast.speculation.loop import Speculation, SpeculativeLoop, check_walk
from ddpm_fast.table import Clipping, StepTable, build_table
from ddpm_fast.validate import check_callable, checked_known, checked_shape, checked_start, kept_steps, per_sample

__all__ = ["SampleResult", "Sampler", "SamplerConfig", "sample"]

logger = logging.getLogger("ddpm_fast")

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
        speculation: of a speculative walk, its windows, calls and acceptance.
    """

    sample: Any
    seeds: list[int] | None
    frames: Tensor | None
    frame_timesteps: list[int]
    speculation: Speculation | None = None


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
        execution, steps_per_replay, backend, optimize, memory_format, compile, tf32: how it is executed: CUDA graphs,
            kernels, and what is done to make the network faster (`ddpm_fast.engine.execution.Execution`).
        speculate: draw in a few dozen sequential network calls instead of one a step (`ddpm_fast.speculation`): True
            measures the network, once, in the time of two or three samples, and chooses how many steps to draft at
            once; a whole number of steps, or {timestep: steps}. Samples have the same law, but are not the images of
            the walk one step at a time; given seeds and windows they are always the same. Costs more network
            evaluations in all.
        config: a `SamplerConfig`, such as a checkpoint's; the options are changes to it.
        table: the rows to walk, instead of those that the config describes (`ddpm_fast.edit` has some); of the config
            the clipping remains.
        options: the fields of `SamplerConfig`.

    Attributes:
        config: the resolved `SamplerConfig`.
        table: its `StepTable`.
        last_seeds: the seeds of the last call; None before it, and after one with generators.
        windows: how many steps are drafted at once, by timestep; None without speculation.

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
        optimize: str | None = "auto",
        memory_format: str | None = None,
        compile: bool = False,
        tf32: bool | None = None,
        speculate: Speculate = False,
        config: SamplerConfig | None = None,
        table: StepTable | None = None,
        **options: Any,
    ) -> None:
        how = Execution(execution, steps_per_replay, backend, optimize, memory_format, compile, tf32)
        self.config = SamplerConfig.from_options(options, config)
        self.table = build_table(self.config) if table is None else table
        self.shape = checked_shape(shape)
        if (guidance_scale is None) != (uncond_kwargs is None):
            raise ValueError("guidance_scale and uncond_kwargs belong together: give both or neither")
        out_channels = self.shape[1] * (2 if self.table.doubled else 1)
        self.network = Network(model, self.shape, out_channels, model_kwargs, uncond_kwargs, device, dtype)
        self.device = self.network.device
        check_callable("decode", decode)
        self.decode = decode
        self.last_seeds: list[int] | None = None
        self._lock, self._walking = threading.RLock(), False
        clipping = Clipping.of(self.config)
        scale = per_sample("guidance_scale", guidance_scale, self.shape[0], self.device)
        self.windows, ahead = speculative_loop(
            speculate, model, self.shape, table=self.table, clipping=clipping, model_kwargs=model_kwargs,
            uncond_kwargs=uncond_kwargs, device=self.device, dtype=dtype, guidance=scale, how=how,
        )  # fmt: skip
        self.loop = ahead or Loop(self.network, self.table, clipping, guidance=scale, how=how)

    def __call__(
        self,
        *,
        seeds: Seeds = None,
        generator: Generators | None = None,
        x_T: Tensor | None = None,
        known: Tensor | None = None,
        mask: Tensor | None = None,
        model_kwargs: Mapping[str, Any] | None = None,
        uncond_kwargs: Mapping[str, Any] | None = None,
        output: str = "sample",
        output_steps: Sequence[int] | None = None,
        callback: Callback | None = None,
        progress: Show = None,
    ) -> Any:
        """Walk from noise to data.

        Args:
            seeds: an int s for s, s + 1, …; a range or sequence with one a sample; None draws fresh ones and reports
                them (`last_seeds`, and the log). A sample depends on its seed alone, not on its batch.
            generator: instead, a torch.Generator or one a sample: noise in the order in which a plain loop draws it.
            x_T: float tensor of the sampler's shape: the start, instead of noise.
            known, mask: an image that is known where the mask is 1, both broadcast to the sampler's shape: after every
                step its place is taken by the image, noised to the level of the step (`ddpm_fast.edit.inpaint`).
                Needs seeds.
            model_kwargs, uncond_kwargs: new values of what the sampler was built with; shapes stay.
            output: "sample"; or a `SampleResult`: with the seeds ("result"), and with frames, estimates of x_0 on the
                way ("x0") or the states themselves ("trajectory").
            output_steps: step numbers, 0 … steps - 1, after which to keep a frame; default ten, evenly spread.
            callback: called as callback(step, timestep, x) after every step, x a copy of the state.
            progress: a bar on stderr, with a label if it is a text; None shows it on terminals only; or a tqdm bar.

        Returns:
            x_0, float32 [B, C, ...] (or what `decode` made of it); a `SampleResult` unless output is "sample".

        Raises:
            ValueError, TypeError: bad arguments, before any network call; a model that returns another shape.
            FloatingPointError: the model returned NaN, or an infinity that no clipping bounds; says at which step.
            RuntimeError: execution="graph" and the network cannot be captured.
        """
        check_callable("callback", callback)
        keep = kept_steps(output, output_steps, len(self.table))
        with self._alone():
            checked_start(x_T, self.shape)
            held = checked_known(known, mask, self.shape)
            watched = bool(keep) or callback is not None
            if self.windows is not None:
                check_walk(from_seeds=generator is None, known=held is not None, watched=watched)
            noise = self._make_noise(seeds, generator)
            if held is not None and generator is not None:
                raise ValueError("a known image is noised from seeds: not with a generator")
            loop = self.loop
            if model_kwargs is not None or uncond_kwargs is not None:
                loop.update_kwargs(model_kwargs or {}, uncond_kwargs)
            frames: list[Tensor] = []
            previews = output == "x0"
            for done in loop.steps(noise, x_T, known=held, previews=previews, every_step=watched, progress=progress):
                if done - 1 in keep:
                    frames.append((loop.x0 if previews else loop.x).clone())  # type: ignore[union-attr]
                if callback is not None:
                    callback(done - 1, int(self.table.timestep[done - 1]), loop.x.clone())
            with on_device(self.device), torch.no_grad():
                sample = loop.x.clone()
                if self.decode is not None:
                    sample = self.decode(sample)
            if output == "sample":
                return sample
            timesteps = self.table.timestep[sorted(keep)].tolist()
            speculation = None if self.windows is None else self._speculation()
            return SampleResult(
                sample, self.last_seeds, torch.stack(frames) if frames else None, timesteps, speculation
            )

    def free(self) -> None:
        """Let go of the recorded graphs and their memory; the next call records anew."""
        with self._alone():
            self.loop.free()

    def _speculation(self) -> Speculation:
        """What the last walk did."""
        if isinstance(self.loop, SpeculativeLoop):
            assert self.loop.last is not None
            return self.loop.last
        return Speculation.sequential(self.table.timestep)

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """One call at a time: there is one set of buffers. Calls of other threads wait."""
        with self._lock:
            if self._walking:
                raise RuntimeError("a sampler cannot be called from its own callback: build another")
            self._walking = True
            try:
                yield
            finally:
                self._walking = False

    def _make_noise(self, seeds: Seeds, generator: Generators | None) -> Noise:
        if generator is not None:
            if seeds is not None:
                raise ValueError("noise comes from seeds or from generators, not from both")
            self.last_seeds = None
            return GeneratorNoise(generator, self.shape, self.table, self.device)
        resolved = resolve_seeds(seeds, self.shape[0])
        if seeds is None:
            logger.info("drew seeds %d … %d", resolved[0], resolved[-1])
        self.last_seeds = resolved
        return PhiloxNoise(resolved, self.shape, self.table, self.device, self.loop.backend)


# What goes to the call; all else builds the sampler, the conditioning included.
_CALL = set(inspect.signature(Sampler.__call__).parameters) - {"self", "model_kwargs", "uncond_kwargs"}


@with_config_options(Sampler.__call__, Sampler.__init__)
def sample(model: Model, shape: Sequence[int], **options: Any) -> Any:
    """Draw x_0 ~ p(x_0) from a trained diffusion model: all ancestral steps, float32 of the given shape.

        images = sample(model, (16, 3, 32, 32), seeds=0)

    Args:
        model: any callable `model(x, t, **model_kwargs)` with x [B, C, ...] and t int64 [B], that returns a tensor or
            an object with `.sample`.
        shape: (B, C, H, W), (B, C, L), (B, C, D, H, W), ….
        options: what to draw with (`Sampler.__call__`: seeds, generator, x_T, known, mask, output, output_steps,
            callback, progress), how to run (`Sampler`: model_kwargs, guidance_scale, uncond_kwargs, decode, device,
            dtype, speculate, config, table; `Execution`: execution, steps_per_replay, backend, optimize, memory_format,
            compile, tf32), and which walk (`SamplerConfig`: num_inference_steps, sampler, eta, beta_schedule,
            prediction_type, variance_type, timestep_spacing, clip_sample, temperature, …).

    Returns:
        x_0, or a `SampleResult` where `output` is "result", "x0" or "trajectory".

    Raises:
        ValueError, TypeError: in one sentence what does not fit, before the network is called.
        FloatingPointError: the model returned NaN, or an infinity that no clipping bounds; says at which step.
    """
    call = {name: options.pop(name) for name in _CALL if name in options}
    return Sampler(model, shape, **options)(**call)
