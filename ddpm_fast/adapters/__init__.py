"""Drop-in samplers for models of other libraries: `accelerate(obj)`.

Nothing of another library is imported before an object of that library is handed in.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, TypeVar, cast

from ddpm_fast.adapters.runner import Options
from ddpm_fast.config import listed
from ddpm_fast.engine.execution import Execution, ExecutionOptions
from ddpm_fast.options import execution_of
from ddpm_fast.speculation.choose import Speculate

if TYPE_CHECKING:
    from typing_extensions import Unpack

T = TypeVar("T")

# Package of the object's class, or of one of its bases → the adapter of that library.
_ADAPTERS = {
    "diffusers": "ddpm_fast.adapters.diffusers",
    "denoising_diffusion_pytorch": "ddpm_fast.adapters.lucidrains",
}
_SUPPORTED = (
    "diffusers: DDPMPipeline, DDIMPipeline, DiTPipeline, LDMPipeline, DDPMScheduler, DDIMScheduler",
    "denoising-diffusion-pytorch: GaussianDiffusion, LearnedGaussianDiffusion, GaussianDiffusion1D",
    "guided-diffusion, improved-diffusion: GaussianDiffusion, SpacedDiffusion",
)


@listed(Execution)
def accelerate(obj: T, *, noise: str = "auto", speculate: Speculate = False, **options: Unpack[ExecutionOptions]) -> T:
    """Return a fast sampler with the interface of `obj`: an instance of a subclass of the class of `obj`.

        pipeline = accelerate(DDPMPipeline.from_pretrained("google/ddpm-cifar10-32"))
        images = pipeline(batch_size=16, generator=torch.manual_seed(0)).images

    `obj` is left as it is; network and weights are shared with `obj`, not copied. The same generator or the same global
    seed gives the image that `obj` gives, up to float rounding in float32. With a network in half precision the state
    between its calls is float32, so that the image is nearer to the float32 image.

    Args:
        obj: A diffusers pipeline or scheduler, a lucidrains GaussianDiffusion, or an OpenAI GaussianDiffusion.
        noise: Source of the noise where no generator is passed. "library": torch's global generator, in the order in
            which the library draws. "philox": one seed for each sample, drawn from torch's global generator and
            reported as `last_seeds`. "auto": the library's source if torch.manual_seed was called (with a seed below
            2^32), else philox.
        speculate: Whether to draw in a few dozen sequential network calls (`ddpm_fast.sample.Sampler`): True, a window,
            or {timestep: window}. Samples then have the law of `obj`, but are no longer its images: their noise comes
            from seeds, which are drawn from the generator or the global seed (`last_seeds`; `last_speculation`).
        options: The fields of `ddpm_fast.engine.execution.Execution`. A scheduler uses `backend` alone.

    Raises:
        TypeError: No adapter supports the object; the message lists the supported classes.
        ValueError: The object's configuration is not supported; the message names the field.
    """
    settings = Options(noise, execution_of(options), speculate)
    for base in type(obj).__mro__:
        adapter = _ADAPTERS.get(base.__module__.partition(".")[0])
        if adapter is not None:
            return cast("T", importlib.import_module(adapter).accelerate(obj, settings))
    from ddpm_fast.adapters import guided_diffusion

    if guided_diffusion.recognises(obj):  # not on PyPI, often copied into other projects: recognised by its attributes
        return cast("T", guided_diffusion.accelerate(obj, settings))
    raise TypeError(unsupported(obj))


def unsupported(obj: object, hint: str = "a plain network goes to ddpm_fast.sample.Sampler") -> str:
    """Return the message for an object that cannot be accelerated."""
    kind = f"{type(obj).__module__}.{type(obj).__name__}"
    return f"accelerate knows {'; '.join(_SUPPORTED)}. Got {kind}: {hint}"
