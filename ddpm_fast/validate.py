"""Checks of arguments: each error says in one sentence which values are allowed and which one came."""

import contextlib
import difflib
import math
import numbers
import operator
from collections.abc import Iterable, Sequence
from typing import SupportsIndex

import numpy as np
import torch
from torch import Tensor

OUTPUTS = ("sample", "result", "x0", "trajectory")
DEFAULT_FRAMES = 10


def one_of(name: str, value: object, allowed: Iterable[object]) -> None:
    """Raise ValueError unless `value` is one of `allowed`."""
    allowed = list(allowed)
    if isinstance(value, (Tensor, np.ndarray)) or value not in allowed:  # arrays compare element by element
        raise ValueError(f"{name} must be one of {allowed}, got {value!r:.80}")


def within(name: str, value: object, low: float, high: float, ends: str = "[]") -> float:
    """Return `value` as a float; raise ValueError unless it is a finite number in the interval with such `ends`."""
    number = math.nan
    if isinstance(value, numbers.Real) and not isinstance(value, bool):
        with contextlib.suppress(OverflowError):
            number = float(value)
    above = low <= number if ends[0] == "[" else low < number
    below = number <= high if ends[1] == "]" else number < high
    if not (math.isfinite(number) and above and below):
        raise ValueError(f"{name} must be a finite number in {ends[0]}{low:g}, {high:g}{ends[1]}, got {value!r:.80}")
    return number


def whole(name: str, value: object, low: int, high: int | None = None) -> int:
    """Return `value` as an int; raise ValueError unless it is an integer >= low and <= high (below 2^31 by default)."""
    limit = 2**31 - 1 if high is None else high
    number = int(value) if isinstance(value, numbers.Integral) and not isinstance(value, bool) else None
    if number is None or not low <= number <= limit:
        span = f">= {low}" if high is None else f"in [{low}, {high}]"
        bound = " and below 2^31" if high is None and number is not None and number > limit else ""
        raise ValueError(f"{name} must be an integer {span}{bound}, got {value!r:.80}")
    return number


def check_names(kind: str, given: Iterable[str], allowed: Iterable[str]) -> None:
    """Raise TypeError for the first of `given` that is not in `allowed`; the message suggests the nearest name."""
    allowed = list(allowed)
    for name in given:
        if name not in allowed:
            near = difflib.get_close_matches(name, allowed, 1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise TypeError(f"unknown {kind} {name!r}; {hint}allowed are {sorted(allowed)}")


def line_of(error: BaseException) -> str:
    """Return the first line of an error's message that is not empty, at most 200 characters; else the error's type."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)[:200]


def checked_shape(shape: Iterable[SupportsIndex]) -> tuple[int, ...]:
    """Return the shape as plain ints; raise ValueError unless it is (batch, channels, ...) with positive sizes."""
    try:
        sizes = tuple(operator.index(size) for size in shape)
    except TypeError:
        sizes = ()
    if len(sizes) < 2 or min(sizes) < 1:
        raise ValueError(f"shape must be (batch, channels, ...) with positive sizes, got {shape!r}")
    return sizes


def check_callable(name: str, value: object) -> None:
    """Raise TypeError unless `value` is None or can be called."""
    if value is not None and not callable(value):
        raise TypeError(f"{name} must be a callable or None, got {value!r}")


def per_sample(name: str, value: float | Sequence[float] | None, batch: int, device: torch.device) -> Tensor | None:
    """Return one number, or one number a sample, as float32 [batch]. None stays None."""
    if value is None:
        return None
    try:
        tensor = torch.as_tensor(value, dtype=torch.float32, device=device)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise ValueError(f"{name} must be one finite number or one a sample ({batch}), got {value!r:.80}") from error
    if tensor.dim() == 0:
        tensor = tensor.repeat(batch)
    if tensor.shape != (batch,) or not bool(torch.isfinite(tensor).all()):
        raise ValueError(f"{name} must be one finite number or one a sample ({batch}), got {value!r}")
    return tensor


def checked_start(x_T: Tensor | None, shape: tuple[int, ...], name: str = "x_T") -> None:
    """Raise ValueError unless `x_T` is None or a finite float tensor of the shape."""
    if x_T is None:
        return
    if not isinstance(x_T, Tensor) or not x_T.is_floating_point() or tuple(x_T.shape) != shape:
        got = f"{x_T.dtype} {tuple(x_T.shape)}" if isinstance(x_T, Tensor) else type(x_T).__name__
        raise ValueError(f"{name} must be a float tensor of shape {shape}, got {got}")
    if not bool(torch.isfinite(x_T).all()):
        raise ValueError(f"{name} must be finite, got NaN or infinity")


def checked_known(known: Tensor | None, mask: Tensor | None, shape: tuple[int, ...]) -> tuple[Tensor, Tensor] | None:
    """Return a known image and its mask, expanded to `shape`, in float32; None if neither is given.

    Raises:
        ValueError: Only one of the two is given, a shape does not broadcast, a value is not finite, or the mask leaves
            [0, 1].
    """
    if known is None and mask is None:
        return None
    if known is None or mask is None:
        raise ValueError("known and mask belong together: give both or neither")
    tensors = []
    for name, value in (("known", known), ("mask", mask)):
        if not isinstance(value, Tensor) or not (value.is_floating_point() or value.dtype == torch.bool):
            raise ValueError(f"{name} must be a float{' or bool' if name == 'mask' else ''} tensor, got {value!r:.80}")
        try:
            tensors.append(value.float().expand(shape))
        except RuntimeError:
            raise ValueError(f"{name} must broadcast to {shape}, got {tuple(value.shape)}") from None
        if not bool(torch.isfinite(tensors[-1]).all()):
            raise ValueError(f"{name} must be finite, got NaN or infinity")
    if tensors[1].min() < 0 or tensors[1].max() > 1:
        raise ValueError("mask must lie in [0, 1]: 1 where the image is known")
    return tensors[0], tensors[1]


def kept_steps(output: str, output_steps: Sequence[int] | None, steps: int) -> frozenset[int]:
    """Return the step numbers after which a frame is kept."""
    one_of("output", output, OUTPUTS)
    if output in ("sample", "result"):
        if output_steps is not None:
            raise ValueError("output_steps needs output='x0' or 'trajectory'")
        return frozenset()
    if output_steps is None:
        return frozenset(np.linspace(0, steps - 1, DEFAULT_FRAMES).round().astype(int).tolist())
    if not isinstance(output_steps, Iterable):
        raise TypeError(f"output_steps must be a list of step numbers, got {output_steps!r}")
    kept = frozenset(whole("output_steps", number, 0, steps - 1) for number in output_steps)
    if not kept:
        raise ValueError("output_steps must name at least one step")
    return kept
