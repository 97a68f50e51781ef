"""Sampling: `from ddpm_fast.sample import sample, Sampler`."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, Literal, TypedDict, TypeVar, cast, overload

import torch
from torch import Tensor

from ddpm_fast.config import SamplerConfig, listed
from ddpm_fast.engine.call import Call
from ddpm_fast.engine.device import Model
from ddpm_fast.engine.execution import Execution
from ddpm_fast.engine.locks import make_reentrant_lock
from ddpm_fast.engine.noise import GeneratorNoise, Noise, PhiloxNoise
from ddpm_fast.engine.progress import Show, check_progress
from ddpm_fast.engine.report import OfThread, Speculation
from ddpm_fast.kernels.dispatch import on_device
from ddpm_fast.options import RunOptions, SamplerOptions, split_options
from ddpm_fast.seeding import Seeds, resolve_seeds
from ddpm_fast.speculation.choose import Speculate, build_loop, check_speculate
from ddpm_fast.speculation.loop import check_run
from ddpm_fast.table import Clipping, StepTable, build_table
from ddpm_fast.validate import check_callable, checked_known, checked_shape, checked_start, kept_steps

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["SampleResult", "Sampler", "SamplerConfig", "sample"]

logger = logging.getLogger("ddpm_fast")

S = TypeVar("S")  # what `decode` makes of x_0; the tensor itself without `decode`
Generators = torch.Generator | Sequence[torch.Generator]
Callback = Callable[[int, int, Tensor], Any]
WithFrames = Literal["result", "x0", "trajectory"]


class DrawOptions(TypedDict, total=False):
    """The keyword options of a draw: of `Sampler.__call__` and `sample`, but `output`."""

    seeds: Seeds
    generator: Generators | None
    x_T: Tensor | None
    known: Tensor | None
    mask: Tensor | None
    output_steps: Sequence[int] | None
    callback: Callback | None
    progress: Show


class CallOptions(DrawOptions, total=False):
    """The keyword options of `Sampler.__call__` but `output`."""

    model_kwargs: Mapping[str, Any] | None
    uncond_kwargs: Mapping[str, Any] | None


class SampleOptions(DrawOptions, SamplerOptions, total=False):
    """The keyword options of `sample` but `decode` and `output`."""


@dataclass(frozen=True)
class SampleResult(Generic[S]):
    """The result of a run.

    Attributes:
        sample: x_0, float32 [B, C, ...], or what `decode` made of x_0.
        seeds: One seed for each sample; None if the noise came from generators.
        frames: [K, B, C, ...]: the states after K chosen steps ("trajectory"), or the x0 predictions there ("x0"). None
            for "result".
        frame_timesteps: The K timesteps that those steps started from.
        speculation: The report of a speculative run: windows, calls and acceptance.
    """

    sample: S
    seeds: list[int] | None
    frames: Tensor | None
    frame_timesteps: list[int]
    speculation: Speculation | None = None


class Sampler(Generic[S]):
    """A sampler for a trained diffusion model: built once, called many times.

    Args:
        model: Any callable `model(x, t, **model_kwargs)` with x [B, C, ...] and t int64 [B] that returns a tensor or an
            object with `.sample`. The model is never changed.
        shape: Shape of the batch: (B, C, H, W), (B, C, L), (B, C, D, H, W), ….
        model_kwargs: Keywords of the model.
        guidance_scale: Scale of classifier-free guidance, uncond + scale (cond - uncond): one number, or one for each
            sample. Needs `uncond_kwargs`.
        uncond_kwargs: Keywords of the model for the unconditional half.
        shared_kwargs: Names of keywords whose tensors belong to all samples together. Any other tensor whose first size
            is that of the batch has an entry for each sample.
        decode: A function that is applied to x_0 at the end, such as latents to images.
        device: "cpu" or "cuda[:i]". None takes the device of the model.
        dtype: Dtype that the network computes in; another dtype than that of its parameters means autocast. The state
            is always float32.
        speculate: Whether to draw in a few dozen sequential network calls instead of one call for each step
            (`ddpm_fast.speculation`). True measures the network once, in the time of two samples at most, and chooses
            how many steps to draft at once. A whole number of steps or {timestep: steps} chooses without measuring.
            Samples have the same law, but are not the images of a run one step at a time; with equal seeds and windows
            they are always the same. Speculation costs more network evaluations in all.
        config: A `SamplerConfig`, such as a checkpoint's. The options change it.
        table: The rows of the run, instead of the rows that the config describes (`ddpm_fast.edit` makes some). Only
            the clipping of the config counts then.
        options: The fields of `SamplerConfig`, which say what was trained and which run to take; and the fields of
            `ddpm_fast.engine.execution.Execution`, which say how to execute the run.

    Attributes:
        config: The resolved `SamplerConfig`.
        table: The `StepTable` of the run.
        last_seeds: The seeds of this thread's last call, or of the last call of any thread where this thread has made
            none; None before a call, and after a call with generators.
        windows: The `WindowPlan`: how many steps are drafted at once, by timestep. None without speculation.
        loop: The sampling loop.

    Raises:
        ValueError, TypeError: Something does not fit; one sentence says what, before any network call.
    """

    @overload
    def __init__(
        self: Sampler[Tensor],
        model: Model,
        shape: Sequence[int],
        *,
        decode: None = None,
        **options: Unpack[SamplerOptions],
    ) -> None: ...

    @overload
    def __init__(
        self, model: Model, shape: Sequence[int], *, decode: Callable[[Tensor], S], **options: Unpack[SamplerOptions]
    ) -> None: ...

    @listed(SamplerConfig, Execution)
    def __init__(
        self,
        model: Model,
        shape: Sequence[int],
        *,
        model_kwargs: Mapping[str, Any] | None = None,
        guidance_scale: float | Sequence[float] | None = None,
        uncond_kwargs: Mapping[str, Any] | None = None,
        shared_kwargs: Sequence[str] = (),
        decode: Callable[[Tensor], S] | None = None,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        speculate: Speculate = False,
        config: SamplerConfig | None = None,
        table: StepTable | None = None,
        **options: Unpack[RunOptions],
    ) -> None:
        self._describe(
            model, shape, model_kwargs=model_kwargs, guidance_scale=guidance_scale, uncond_kwargs=uncond_kwargs,
            shared_kwargs=shared_kwargs, decode=decode, device=device, dtype=dtype, speculate=speculate, config=config,
            table=table, **options,
        )  # fmt: skip
        self._build()

    def _describe(
        self,
        model: Model,
        shape: Sequence[int],
        *,
        model_kwargs: Mapping[str, Any] | None = None,
        guidance_scale: float | Sequence[float] | None = None,
        uncond_kwargs: Mapping[str, Any] | None = None,
        shared_kwargs: Sequence[str] = (),
        decode: Any = None,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        speculate: Speculate = False,
        config: SamplerConfig | None = None,
        table: StepTable | None = None,
        **options: Unpack[RunOptions],
    ) -> None:
        """Check and keep what the sampler was asked for, without a call of the network."""
        self.config, self._execution = split_options(options, config)
        if table is not None and not isinstance(table, StepTable):
            raise TypeError(f"table must be a StepTable, got {type(table).__name__}")
        self.table = build_table(self.config) if table is None else table
        self.shape = checked_shape(shape)
        check_speculate(speculate)
        self._speculate: Speculate = speculate
        self._call = Call.of(
            model, self.shape, model_kwargs=model_kwargs, uncond_kwargs=uncond_kwargs, guidance_scale=guidance_scale,
            device=device, dtype=dtype, shared_kwargs=shared_kwargs,
        )  # fmt: skip
        self.device = self._call.device
        check_callable("decode", decode)
        self.decode = decode

    def _build(self) -> None:
        """Build the loop."""
        self._lock, self._runs_in = make_reentrant_lock(), 0
        self._seeds: OfThread[list[int] | None] = OfThread(None)
        clipping = Clipping.of(self.config)
        self.loop, self.windows = build_loop(
            self._speculate, self._call, self.table, clipping, execution=self._execution
        )

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy is made from: the copy builds a loop of its own, for the windows that were chosen."""
        state = {
            name: value for name, value in vars(self).items() if name not in ("loop", "windows", "_lock", "_seeds")
        }
        return {**state, "_call": self.loop.call, "_speculate": self.windows or self._speculate}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._build()

    @overload
    def __call__(self, *, output: Literal["sample"] = "sample", **options: Unpack[CallOptions]) -> S: ...

    @overload
    def __call__(self, *, output: WithFrames, **options: Unpack[CallOptions]) -> SampleResult[S]: ...

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
    ) -> S | SampleResult[S]:
        """Draw samples: run from noise to data.

        Args:
            seeds: An int s for the seeds s, s + 1, …; or a range or sequence with one seed for each sample. None draws
                fresh seeds and reports them (`last_seeds`, and the log). A sample depends on its seed alone, not on its
                batch.
            generator: A torch.Generator, or one for each sample, instead of seeds: the noise is drawn in the order of a
                plain loop.
            x_T: Start of the run, instead of noise: a float tensor of the sampler's shape.
            known, mask: An image that is known where the mask is 1; both broadcast to the sampler's shape. After every
                step the image, noised to the level of the step, replaces its place (`ddpm_fast.edit.inpaint`). A known
                image needs seeds.
            model_kwargs, uncond_kwargs: New values of the keywords that the sampler was built with; shapes stay.
            output: "sample" returns x_0. "result" returns a `SampleResult`, with the seeds; "x0" adds frames of x0
                predictions, "trajectory" frames of the states.
            output_steps: Numbers of the steps, 0 … steps - 1, after which a frame is kept; by default ten, evenly
                spread.
            callback: A function that is called as callback(step, timestep, x) after every step; x is a copy of the
                state.
            progress: True or a label shows a bar on stderr, None shows a bar on terminals only; a tqdm bar is
                continued.

        Returns:
            x_0, float32 [B, C, ...], or what `decode` made of x_0; a `SampleResult` unless `output` is "sample".

        Raises:
            ValueError, TypeError: An argument does not fit, which is said before any network call; or the model returns
                another shape.
            FloatingPointError: The model returned NaN, or an infinity that no clipping bounds; says at which step.
            RuntimeError: `execution` is "graph" and the network cannot be captured.
        """
        check_progress(progress)
        keep, known_image = self._checked(seeds, generator, x_T, known, mask, output, output_steps, callback)
        watched = bool(keep) or callback is not None
        with self._alone():
            noise = self._make_noise(seeds, generator)
            loop = self.loop
            if model_kwargs is not None or uncond_kwargs is not None:
                loop.update_kwargs(model_kwargs or {}, uncond_kwargs)
            frames: list[Tensor] = []
            previews = output == "x0"
            for done in loop.steps(
                noise, x_T, known=known_image, previews=previews, every_step=watched, progress=progress
            ):
                if done - 1 in keep:
                    frame = loop.x0 if previews else loop.x
                    frames.append(cast("Tensor", frame).clone())
                if callback is not None:
                    callback(done - 1, int(self.table.timestep[done - 1]), loop.x.clone())
            with on_device(self.device), torch.no_grad():
                x_0 = loop.x.clone()
                sample = cast("S", x_0) if self.decode is None else self.decode(x_0)
            if output == "sample":
                return sample
            timesteps = self.table.timestep[sorted(keep)].tolist()
            speculation = None
            if self.windows is not None:
                speculation = loop.speculation or Speculation.sequential(self.table.timestep)
            return SampleResult(
                sample, self.last_seeds, torch.stack(frames) if frames else None, timesteps, speculation
            )

    def _checked(
        self,
        seeds: Seeds,
        generator: Generators | None,
        x_T: Tensor | None,
        known: Tensor | None,
        mask: Tensor | None,
        output: str,
        output_steps: Sequence[int] | None,
        callback: Callback | None,
    ) -> tuple[frozenset[int], tuple[Tensor, Tensor] | None]:
        """Check the arguments of a call; return the steps after which a frame is kept, and the known image."""
        check_callable("callback", callback)
        keep = kept_steps(output, output_steps, len(self.table))
        checked_start(x_T, self.shape)
        known_image = checked_known(known, mask, self.shape)
        if self._speculate is not False:
            watched = bool(keep) or callback is not None
            check_run(from_seeds=generator is None, known=known_image is not None, watched=watched)
        if seeds is not None:
            resolve_seeds(seeds, self.shape[0])
        if generator is not None:
            if seeds is not None:
                raise ValueError("noise comes from seeds or from generators, not from both")
            if known_image is not None:
                raise ValueError("a known image is noised from seeds: not with a generator")
            GeneratorNoise(generator, self.shape, self.table, self.device)
        return keep, known_image

    @property
    def last_seeds(self) -> list[int] | None:
        """The seeds of the last call."""
        return self._seeds.get()

    def free(self) -> None:
        """Drop the recorded graphs and their memory; the next call records again."""
        with self._alone():
            self.loop.free()

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Hold the sampler for one call, because there is one set of buffers; calls of other threads wait."""
        with self._lock:
            if self._runs_in == threading.get_ident():
                raise RuntimeError("a sampler cannot be called from its own callback: build another")
            self._runs_in = threading.get_ident()
            try:
                yield
            finally:
                self._runs_in = 0

    def _make_noise(self, seeds: Seeds, generator: Generators | None) -> Noise:
        if generator is not None:
            self._seeds.set(None)
            return GeneratorNoise(generator, self.shape, self.table, self.device)
        resolved = resolve_seeds(seeds, self.shape[0])
        if seeds is None:
            logger.info("drew seeds %d … %d", resolved[0], resolved[-1])
        self._seeds.set(resolved)
        return PhiloxNoise(resolved, self.shape, self.table, self.device, self.loop.backend)


@overload
def sample(
    model: Model,
    shape: Sequence[int],
    *,
    decode: None = None,
    output: Literal["sample"] = "sample",
    **options: Unpack[SampleOptions],
) -> Tensor: ...


@overload
def sample(
    model: Model, shape: Sequence[int], *, decode: None = None, output: WithFrames, **options: Unpack[SampleOptions]
) -> SampleResult[Tensor]: ...


@overload
def sample(
    model: Model,
    shape: Sequence[int],
    *,
    decode: Callable[[Tensor], S],
    output: Literal["sample"] = "sample",
    **options: Unpack[SampleOptions],
) -> S: ...


@overload
def sample(
    model: Model,
    shape: Sequence[int],
    *,
    decode: Callable[[Tensor], S],
    output: WithFrames,
    **options: Unpack[SampleOptions],
) -> SampleResult[S]: ...


@listed(Sampler.__init__)
def sample(
    model: Model,
    shape: Sequence[int],
    *,
    seeds: Seeds = None,
    generator: Generators | None = None,
    x_T: Tensor | None = None,
    known: Tensor | None = None,
    mask: Tensor | None = None,
    output: Any = "sample",
    output_steps: Sequence[int] | None = None,
    callback: Callback | None = None,
    progress: Show = None,
    decode: Any = None,
    **options: Unpack[SamplerOptions],
) -> Any:
    """Draw x_0 ~ p(x_0) from a trained diffusion model: all ancestral steps, float32 of the given shape.

        images = sample(model, (16, 3, 32, 32), seeds=0)

    Args:
        model: Any callable `model(x, t, **model_kwargs)` with x [B, C, ...] and t int64 [B] that returns a tensor or an
            object with `.sample`.
        shape: Shape of the batch: (B, C, H, W), (B, C, L), (B, C, D, H, W), ….
        seeds, generator, x_T, known, mask, output, output_steps, callback, progress: See `Sampler.__call__`.
        decode: See `Sampler`.
        options: The keyword options of `Sampler`, among them the fields of `SamplerConfig` (num_inference_steps,
            sampler, eta, beta_schedule, prediction_type, …) and of `ddpm_fast.engine.execution.Execution`.

    Returns:
        x_0, or a `SampleResult` where `output` is "result", "x0" or "trajectory".

    Raises:
        ValueError, TypeError: Something does not fit; one sentence says what, before the network is called.
        FloatingPointError: The model returned NaN, or an infinity that no clipping bounds; says at which step.
    """
    sampler: Sampler[Any] = Sampler.__new__(Sampler)
    sampler._describe(model, shape, decode=decode, **options)
    check_progress(progress)
    sampler._checked(seeds, generator, x_T, known, mask, output, output_steps, callback)  # before building takes long
    sampler._build()
    return sampler(
        seeds=seeds, generator=generator, x_T=x_T, known=known, mask=mask, output=output, output_steps=output_steps,
        callback=callback, progress=progress,
    )  # fmt: skip
