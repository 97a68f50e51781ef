"""The options of a step: listed once, for the contract, its twin and its kernel."""

import inspect
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, TypedDict, TypeVar

from torch import Tensor

F = TypeVar("F", bound=Callable[..., Any])


class StepOptions(TypedDict, total=False):
    """The keyword options of `kernels.step.step`; an absent option is None, or as said.

    Attributes:
        seeds: Seeds of the samples, int64 [B]. The step's noise comes from `philox.Stream.STEP`.
        z: Noise of the step, float32, the shape of x, instead of seeds. Without seeds and z there is no noise.
        clip: Largest |x0|, >= 0.
        bound: Bound of every sample for dynamic thresholding, float32 [B], instead of `clip`.
        guidance: Scale of classifier-free guidance (Ho & Salimans 2022) of every sample, float32 [B]. The conditional
            half of the output comes first.
        learned: Whether the second half of the output's channels sets the variance; default False.
        use_output: False promises that c_out is 0 in every row; default True.
        known: An image that is known in part, float32, the shape of x, contiguous. The step noises the image to the
            level of x' with z_k from `philox.Stream.INPAINT`, and so needs `seeds`; `z`, if given, is then the step's
            noise.
        mask: 1 where `known` holds (Lugmayr et al. 2022, eq. 8): float32 or bool, the shape of x, contiguous.
        x_new: Where to write x', which may be x itself; by default a new tensor.
        x0_new: Where to write the (clipped) x0 prediction as well, float32, the shape of x, contiguous.
        model_input: Where to write x' as well, as the denoiser's next input: any float dtype and dense memory format
            (contiguous, channels_last, …), the shape of x, or with `guidance` twice that batch.
        timestep: Where to write the timestep of each sample's next row, int64 [B], with `guidance` [2B]. The last row
            repeats its own timestep.
    """

    seeds: Tensor | None
    z: Tensor | None
    clip: float | None
    bound: Tensor | None
    guidance: Tensor | None
    learned: bool
    use_output: bool
    known: Tensor | None
    mask: Tensor | None
    x_new: Tensor | None
    x0_new: Tensor | None
    model_input: Tensor | None
    timestep: Tensor | None


_DEFAULTS: dict[str, Any] = {**dict.fromkeys(StepOptions.__annotations__), "learned": False, "use_output": True}


def with_defaults(options: StepOptions) -> Any:
    """Return the options as attributes, the absent ones with their defaults.

    Raises:
        TypeError: An option has an unknown name.
    """
    given = {**_DEFAULTS, **options}
    if len(given) != len(_DEFAULTS):
        raise TypeError(f"unknown options {sorted(given.keys() - _DEFAULTS)}; a step takes {sorted(_DEFAULTS)}")
    return SimpleNamespace(**given)


def list_options(function: F) -> F:
    """Decorate a function whose last parameter is **options: `help` then names each option with its default."""
    *parameters, _ = inspect.signature(function).parameters.values()
    named = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=_DEFAULTS[name], annotation=annotation)
        for name, annotation in StepOptions.__annotations__.items()
    ]
    function.__signature__ = inspect.signature(function).replace(parameters=[*parameters, *named])  # type: ignore[attr-defined]
    return function
