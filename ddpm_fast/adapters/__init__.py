"""Drop-in samplers for models of other libraries: `accelerate(obj)`.

Nothing of another library is imported before an object of it is handed in.
"""

import importlib
from typing import Any

from ddpm_fast.adapters.walk import Options
from ddpm_fast.engine.execution import Execution
from ddpm_fast.speculation.choose import Speculate

# Package of the object's class, or of one of its bases → the adapter that knows it.
_ADAPTERS = {
    "diffusers": "ddpm_fast.adapters.diffusers",
    "denoising_diffusion_pytorch": "ddpm_fast.adapters.lucidrains",
}
_KNOWN = (
    "diffusers: DDPMPipeline, DDIMPipeline, DiTPipeline, LDMPipeline, DDPMScheduler, DDIMScheduler",
    "denoising-diffusion-pytorch: GaussianDiffusion, LearnedGaussianDiffusion, GaussianDiffusion1D",
    "guided-diffusion, improved-diffusion: GaussianDiffusion, SpacedDiffusion",
)


def accelerate(
    obj: Any,
    *,
    noise: str = "auto",
    execution: str = "auto",
    steps_per_replay: int = 1,
    backend: str | None = None,
    optimize: str | None = "auto",
    memory_format: str | None = None,
    compile: bool = False,
    tf32: bool | None = None,
    speculate: Speculate = False,
) -> Any:
    """Return a fast sampler with the interface of `obj`, an instance of a subclass of its class.

        pipeline = accelerate(DDPMPipeline.from_pretrained("google/ddpm-cifar10-32"))
        images = pipeline(batch_size=16, generator=torch.manual_seed(0)).images

    `obj` is left as it is; network and weights are shared with it, not copied. The same generator or the same global
    seed gives the image that `obj` gives, up to float rounding in float32; with a network in half precision the state
    between its calls is float32, so that the image is nearer to the float32 one.

    Args:
        obj: a diffusers pipeline or scheduler, a lucidrains GaussianDiffusion, an OpenAI GaussianDiffusion.
        noise: where noise comes from when no generator is passed: "library", torch's global generator in the order in
            which the library draws; "philox", a seed a sample, drawn from torch's global generator and reported as
            `last_seeds`; "auto", as the library if torch.manual_seed was called (with a seed below 2^32), else philox.
        execution, steps_per_replay, backend, optimize, memory_format, compile, tf32: how it is executed
            (`ddpm_fast.engine.execution.Execution`); a scheduler uses `backend` alone.
        speculate: draw in a few dozen sequential network calls (`ddpm_fast.sample.Sampler`): True, a window, or
            {timestep: window}. Samples then have the law of `obj`, but are no longer its images: their noise comes
            from seeds, which are drawn from the generator or the global seed (`last_seeds`; `last_speculation`).

    Raises:
        TypeError: an object that no adapter knows; names those that are known.
        ValueError: a configuration that is not supported; names the field.
    """
    how = Execution(execution, steps_per_replay, backend, optimize, memory_format, compile, tf32)
    options = Options(noise, how, speculate)
    for base in type(obj).__mro__:
        adapter = _ADAPTERS.get(base.__module__.partition(".")[0])
        if adapter is not None:
            return importlib.import_module(adapter).accelerate(obj, options)
    from ddpm_fast.adapters import guided_diffusion

    if guided_diffusion.recognises(obj):  # not on PyPI, often copied into other projects: known by its attributes
        return guided_diffusion.accelerate(obj, options)
    raise TypeError(unknown(obj))


def unknown(obj: Any, hint: str = "a plain network goes to ddpm_fast.sample.Sampler") -> str:
    """What is said of an object that cannot be accelerated."""
    kind = f"{type(obj).__module__}.{type(obj).__name__}"
    return f"accelerate knows {'; '.join(_KNOWN)}. Got {kind}: {hint}"
