"""Expressions whose types the type checker must infer; checked by mypy, never run."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import Tensor, nn

from ddpm_fast import Sampler, SampleResult, accelerate
from ddpm_fast.sample import sample

if TYPE_CHECKING:
    from typing_extensions import assert_type


def samples_are_tensors(model: nn.Module) -> None:
    """Infer what `sample` and a `Sampler` return."""
    sampler = Sampler(model, (1, 3, 8, 8), num_inference_steps=10, execution="eager")
    assert_type(sampler, Sampler[Tensor])
    assert_type(sampler(seeds=0), Tensor)
    assert_type(sampler(seeds=0, output="trajectory"), SampleResult[Tensor])
    assert_type(sample(model, (1, 3, 8, 8), seeds=0), Tensor)
    assert_type(sample(model, (1, 3, 8, 8), seeds=0, output="result").sample, Tensor)


def decoded_samples_are_what_decode_returns(model: nn.Module, decode: Callable[[Tensor], list[str]]) -> None:
    """Infer what a function that decodes x_0 makes of the results."""
    sampler = Sampler(model, (1, 3, 8, 8), decode=decode)
    assert_type(sampler(), list[str])
    assert_type(sample(model, (1, 3, 8, 8), decode=decode), list[str])
    assert_type(sample(model, (1, 3, 8, 8), decode=decode, output="x0"), SampleResult[list[str]])


def accelerated_objects_keep_their_type(module: nn.Linear) -> None:
    """Infer the type of an accelerated object."""
    assert_type(accelerate(module, tf32=True), nn.Linear)


def mistakes_are_found(model: nn.Module) -> None:
    """Report wrong names and wrong types of options."""
    Sampler(model, (1, 3, 8, 8), memory_fromat="auto")  # type: ignore[call-overload]
    sample(model, (1, 3, 8, 8), eta="much")  # type: ignore[call-overload]
    accelerate(model, compile="max")  # type: ignore[arg-type]
