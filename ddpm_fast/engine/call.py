"""The call of a model: all that the model is given besides x and t, for one batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ddpm_fast.engine.device import Model, dtype_of, resolve_device
from ddpm_fast.validate import per_sample


@dataclass(frozen=True, eq=False)
class Call:
    """A model with the keywords, the batch, the device and the precision that it is called with.

    Attributes:
        model: Any callable `model(x, t, **kwargs)`.
        shape: Shape of the batch, (B, C, ...).
        kwargs: Keywords of the model; with guidance, of the conditional half. Tensors may stand in dicts, lists and
            tuples.
        uncond_kwargs: Keywords of the unconditional half. None means that the model is not guided.
        guidance: Guidance scale of every sample, float32 [B]. None without guidance.
        device: Device of the batch.
        dtype: Dtype of the model's input. Where the model's parameters have another dtype, the model runs under
            autocast.
        module: Module that is traced in place of a model that only wraps a module.
        shared_kwargs: Names of keywords whose tensors belong to all samples together, though their first size may be
            that of the batch.
    """

    model: Model
    shape: tuple[int, ...]
    kwargs: Mapping[str, Any]
    uncond_kwargs: Mapping[str, Any] | None
    guidance: Tensor | None
    device: torch.device
    dtype: torch.dtype
    module: Model
    shared_kwargs: frozenset[str] = frozenset()

    @classmethod
    def of(
        cls,
        model: Model,
        shape: tuple[int, ...],
        *,
        model_kwargs: Mapping[str, Any] | None = None,
        uncond_kwargs: Mapping[str, Any] | None = None,
        guidance_scale: float | Sequence[float] | None = None,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        module: nn.Module | None = None,
        shared_kwargs: Sequence[str] = (),
    ) -> Call:
        """Build a call from what a user gives, and check all of it.

        Args:
            model, shape: See the attributes.
            model_kwargs, uncond_kwargs: Keywords of the model; tensors may be on any device.
            shared_kwargs: See the attributes. A tensor under another keyword whose first size is that of the batch has
                an entry for each sample.
            guidance_scale: One number, or one for each sample.
            device: Device of the batch. None takes the model's own device, else CUDA where there is a GPU.
            dtype: Dtype of the model's input. None takes the dtype of the model's parameters, else float32.
            module: See the attributes. None takes the model itself.

        Raises:
            TypeError: The model is not callable, or keywords are no mapping.
            ValueError: The device, the dtype, the keywords or the guidance scale do not fit the model or the batch.
        """
        if not callable(model):
            raise TypeError(f"model must be a callable model(x, t, **model_kwargs), got {type(model).__name__}")
        resolved = resolve_device(model, device)
        if dtype is not None and (not isinstance(dtype, torch.dtype) or not dtype.is_floating_point):
            raise ValueError(f"dtype must be a floating point torch.dtype such as torch.bfloat16, got {dtype!r}")
        for name, kwargs in (("model_kwargs", model_kwargs), ("uncond_kwargs", uncond_kwargs)):
            if kwargs is not None and not isinstance(kwargs, Mapping):
                raise TypeError(f"{name} must be a mapping of names to values, got {type(kwargs).__name__}")
        if (guidance_scale is None) != (uncond_kwargs is None):
            raise ValueError("guidance_scale and uncond_kwargs belong together: give both or neither")
        own = dtype_of(model)
        lowered = dtype in (torch.bfloat16, torch.float16)
        if own is not None and dtype not in (None, own) and not lowered:
            raise ValueError(
                f"the model's parameters are {own}; to compute in {dtype}, convert the model with .to(...)"
            )
        call = cls(
            model, shape, {}, None, per_sample("guidance_scale", guidance_scale, shape[0], resolved),
            resolved, dtype or own or torch.float32, model if module is None else module, _names(shared_kwargs),
        )  # fmt: skip
        call = call._with(model_kwargs or {}, uncond_kwargs)
        if unknown := sorted(call.shared_kwargs - call.kwargs.keys()):
            raise ValueError(f"shared_kwargs must name keywords of model_kwargs, {sorted(call.kwargs)}, got {unknown}")
        return call

    @property
    def guided(self) -> bool:
        """Whether every step needs a conditional and an unconditional output."""
        return self.uncond_kwargs is not None

    @property
    def batch(self) -> int:
        """Samples in the batch, B."""
        return self.shape[0]

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of the model's input: [B, C, ...], or [2B, C, ...] with guidance, the conditional half first."""
        return (self.batch * (2 if self.guided else 1), *self.shape[1:])

    def keywords(self) -> dict[str, Any]:
        """Return the keywords of one call: tensors on the device, with guidance both halves in one batch.

        Raises:
            ValueError: The two halves' keywords do not fit together.
        """
        joined: dict[str, Any] = dict(self.kwargs)
        if self.uncond_kwargs is not None:
            places, halves, structure = named_leaves(self.kwargs)
            _, uncond, other_structure = named_leaves(self.uncond_kwargs)
            if structure != other_structure:
                raise ValueError(
                    f"uncond_kwargs must have the names of model_kwargs, {said(self.kwargs)}, "
                    f"got {said(self.uncond_kwargs)}"
                )
            joined = pytree.tree_unflatten(
                [self._joined(*each) for each in zip(places, halves, uncond, strict=True)], structure
            )
        return _mapped(lambda tensor: tensor.detach().to(self.device, copy=True), joined)

    def with_kwargs(self, kwargs: Mapping[str, Any], uncond_kwargs: Mapping[str, Any] | None) -> Call:
        """Return the same call with other keywords.

        Raises:
            ValueError: The call is not guided, but there are unconditional keywords; or the two halves do not fit.
        """
        if uncond_kwargs is not None and not self.guided:
            raise ValueError("uncond_kwargs belong to guidance, which this sampler was built without")
        return self._with(kwargs, {} if uncond_kwargs is None and self.guided else uncond_kwargs)

    def first(self) -> Call:
        """Return the call for the first sample of the batch."""
        return self._batched(1, lambda tensor: tensor[:1])

    def repeated(self, times: int) -> Call:
        """Return the call for `times` copies of every sample, the copies of one sample side by side."""
        return self._batched(self.batch * times, lambda tensor: tensor.repeat_interleave(times, 0))

    def _with(self, kwargs: Mapping[str, Any], uncond_kwargs: Mapping[str, Any] | None) -> Call:
        """Return the call with copies of these keywords, so that later changes of the caller's tensors do not count."""

        def copied(values: Mapping[str, Any]) -> dict[str, Any]:
            return _mapped(lambda tensor: tensor.detach().clone(), values)

        uncond = None if uncond_kwargs is None else copied(uncond_kwargs)
        call = replace(self, kwargs=copied(kwargs), uncond_kwargs=uncond)
        call.keywords()
        return call

    def _batched(self, batch: int, change: Callable[[Tensor], Tensor]) -> Call:
        """Return the call for another batch: `change` maps every tensor that has one entry for each sample."""

        def changed(kwargs: Mapping[str, Any]) -> dict[str, Any]:
            own = {name: value for name, value in kwargs.items() if name not in self.shared_kwargs}
            own = _mapped(lambda tensor: change(tensor) if tensor.shape[:1] == (self.batch,) else tensor, own)
            return {name: own.get(name, value) for name, value in kwargs.items()}

        return replace(
            self, shape=(batch, *self.shape[1:]), kwargs=changed(self.kwargs),
            uncond_kwargs=None if self.uncond_kwargs is None else changed(self.uncond_kwargs),
            guidance=None if self.guidance is None else change(self.guidance),
        )  # fmt: skip

    def _joined(self, place: str, cond: Any, uncond: Any) -> Any:
        """Return what stands at this place of the keywords for both halves in one batch."""
        if isinstance(cond, Tensor) and isinstance(uncond, Tensor):
            shared = cond.shape[:1] != (self.batch,) or place.split("'")[1] in self.shared_kwargs
            if shared and cond.dtype == uncond.dtype and torch.equal(cond.to(self.device), uncond.to(self.device)):
                return cond
            if shared or cond.shape != uncond.shape:
                raise ValueError(
                    f"with guidance, model_kwargs{place} and uncond_kwargs{place} must have equal shapes "
                    f"({self.batch}, ...), or be the same for all samples, "
                    f"got {tuple(cond.shape)} and {tuple(uncond.shape)}"
                )
            return torch.cat([cond.to(self.device), uncond.to(self.device, cond.dtype)])
        if isinstance(cond, Tensor) or isinstance(uncond, Tensor) or not same_value(cond, uncond):
            raise ValueError(
                f"model_kwargs{place} and uncond_kwargs{place} must be two tensors or equal, "
                f"got {cond!r} and {uncond!r}"
            )
        return cond


def signature(call: Call) -> tuple[Any, ...]:
    """Return what the time of a call depends on besides the module: names, shapes, dtypes, plain values, guidance."""
    described = [
        (name, tuple(value.shape), str(value.dtype)) if isinstance(value, Tensor) else (name, repr(value))
        for kwargs in (call.kwargs, call.uncond_kwargs or {})
        for name, value in sorted(zip(*named_leaves(kwargs)[:2], strict=True), key=lambda each: each[0])
    ]
    return tuple(described), None if call.guidance is None else tuple(call.guidance.tolist())


def same_value(a: Any, b: Any) -> bool:
    """Return whether two values that are no tensors are the same; containers are the same only as one object."""
    return a is b or (isinstance(a, (bool, int, float, str)) and type(a) is type(b) and a == b)


def named_leaves(kwargs: Mapping[str, Any]) -> tuple[list[str], list[Any], Any]:
    """Return the places, the values and the structure of keywords: "['added']['text']" is a place in a dict."""
    leaves, structure = pytree.tree_flatten_with_path(dict(kwargs))
    return [pytree.keystr(path) for path, _ in leaves], [value for _, value in leaves], structure


def said(kwargs: Mapping[str, Any]) -> list[str]:
    """Return what an error calls the keywords: their names, or the places of their values where there are several."""
    places = named_leaves(kwargs)[0]
    return sorted(kwargs) if len(places) == len(kwargs) else places


def output_of(result: Any) -> Any:
    """Return the output among what a model returned: a tensor, the first of a tuple, or `.sample`."""
    if isinstance(result, tuple) and result:
        result = result[0]
    return result if isinstance(result, Tensor) else getattr(result, "sample", result)


def _mapped(change: Callable[[Tensor], Tensor], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keywords with `change` applied to every tensor, to a tensor that stands in several places once."""
    made: dict[int, Tensor] = {}

    def changed(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            if id(leaf) not in made:
                made[id(leaf)] = change(leaf)
            return made[id(leaf)]
        return leaf

    return {name: pytree.tree_map(changed, value) for name, value in kwargs.items()}


def _names(names: Any) -> frozenset[str]:
    """Return the names of keywords; raise TypeError unless `names` is a sequence of them."""
    if isinstance(names, str) or not all(isinstance(name, str) for name in names):
        raise TypeError(f"shared_kwargs must be a sequence of names of keywords, got {names!r}")
    return frozenset(names)
