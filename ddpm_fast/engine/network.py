"""The network as the engine sees it: fixed buffers in, one checked tensor out."""

import contextlib
import itertools
import logging
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ddpm_fast.engine.device import Model, device_of, dtype_of, resolve_device
from ddpm_fast.engine.execution import Execution
from ddpm_fast.engine.hoist import Hoisted, same_up_to_rounding
from ddpm_fast.engine.timer import seconds
from ddpm_fast.engine.trace import HoistError
from ddpm_fast.validate import line_of

logger = logging.getLogger("ddpm_fast")


_LAST: dict[int, torch.memory_format] = {4: torch.channels_last, 5: torch.channels_last_3d}
_FASTER = 0.97  # of the time in contiguous memory: from there on channels_last is taken
# What a trial found, for a network and all that it was tried with.
_TRIALS: weakref.WeakKeyDictionary[nn.Module, dict[tuple, str]] = weakref.WeakKeyDictionary()


class Network:
    """Calls `model(x, t, **model_kwargs)` on buffers that never move.

    Args:
        model: any callable that returns a tensor, an object with `.sample`, or a tuple that begins with a tensor.
        shape: (B, C, ...).
        out_channels: channels that the output must have.
        model_kwargs: passed on; tensors are copied to the device once.
        uncond_kwargs: with guidance, the same names for the unconditional half; the batch is then doubled,
            conditional half first.
        device, dtype: of what the network is given. Where its parameters have another dtype, it runs under autocast.
        module: what is traced in the place of a model that only wraps it.

    Attributes:
        input: the x that the network reads next, `dtype`, [B or 2B, C, ...].
        timestep: the t that it reads next, int64 [B or 2B].
    """

    @torch.inference_mode(False)  # buffers made inside it could not be written outside
    def __init__(
        self,
        model: Model,
        shape: tuple[int, ...],
        out_channels: int,
        model_kwargs: Mapping[str, Any] | None = None,
        uncond_kwargs: Mapping[str, Any] | None = None,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        module: nn.Module | None = None,
    ) -> None:
        if not callable(model):
            raise TypeError(f"model must be a callable model(x, t, **model_kwargs), got {type(model).__name__}")
        self.model = self._called = model
        self.hoisted: Hoisted | None = None
        self.memory_format = "contiguous"
        self._module = model if module is None else module
        self._prepared: tuple[Sequence[int], Execution, int | None] | None = None
        self.guided = uncond_kwargs is not None
        self.device = resolve_device(model, device)
        if dtype is not None and (not isinstance(dtype, torch.dtype) or not dtype.is_floating_point):
            raise ValueError(f"dtype must be a floating point torch.dtype such as torch.bfloat16, got {dtype!r}")
        own_dtype = dtype_of(model)
        self.dtype = dtype or own_dtype or torch.float32
        self._own = own_dtype, device_of(model)
        self._addresses = _addresses(self._module)
        self._autocast = own_dtype is not None and own_dtype != self.dtype
        if self._autocast and self.dtype not in (torch.bfloat16, torch.float16):
            raise ValueError(
                f"the model's parameters are {own_dtype}; to compute in {self.dtype}, convert the model with .to(...)"
            )
        _warn_if_training(model)
        batch = shape[0] * (2 if self.guided else 1)
        self.batch = shape[0]
        self.input = torch.zeros(batch, *shape[1:], dtype=self.dtype, device=self.device)
        self.timestep = torch.zeros(batch, dtype=torch.int64, device=self.device)
        self.output_shape = (batch, out_channels, *shape[2:])
        self.kwargs = self._static_kwargs(dict(model_kwargs or {}), uncond_kwargs)

    def __call__(self, row: int | None = None) -> Tensor:
        """The model's output for the buffers as they are, its shape checked: [B or 2B, out_channels, ...].

        Args:
            row: number of the walk's step, where all samples are in the same; spares a hoisted network the lookup.
        """
        with self._precision():
            if self.hoisted is not None:
                output = self.hoisted(self.input, self.timestep, row)
            else:
                output = self._called(self.input, self.timestep, **self.kwargs)
        if isinstance(output, tuple) and output:
            output = output[0]
        if not isinstance(output, Tensor):
            output = getattr(output, "sample", output)
            if not isinstance(output, Tensor):
                raise TypeError(
                    f"model must return a tensor or an object with a tensor .sample, got {type(output).__name__}"
                )
        if tuple(output.shape) != self.output_shape:
            raise ValueError(self._shape_error(tuple(output.shape)))
        if not output.is_floating_point():
            raise ValueError(f"the model must return floating point numbers, got {output.dtype}")
        return output

    def prepare(self, timesteps: Sequence[int], how: Execution, row: int | None = None) -> None:
        """Hoist, lay out in memory and compile, as `how` says; what cannot be done is not, and the log says why.

        Args:
            timesteps: those of the walk.
            how: its optimize, memory_format and compile.
            row: as the calls of the walk will have it: None or a number.
        """
        self._prepared = timesteps, how, row
        self.timestep.fill_(int(timesteps[0]))
        if how.optimize is not None:
            self._hoist(timesteps, logging.INFO if how.optimize == "auto" else logging.WARNING)
        if how.memory_format is not None:
            self._lay_out(self._faster_format(row) if how.memory_format == "auto" else how.memory_format, row)
        if how.compile:
            self._compile(row)

    def refresh(self) -> bool:
        """Bring up to date what was prepared, before a walk; whether tensors of recorded graphs have moved.

        Raises:
            ValueError: the model has another dtype or is on another device than when this was built.
        """
        if (dtype_of(self.model), device_of(self.model)) != self._own:
            raise ValueError(
                f"the model was {_words(self._own)} when the sampler was built and is "
                f"{_words((dtype_of(self.model), device_of(self.model)))} now: build another sampler"
            )
        if (addresses := _addresses(self._module)) != self._addresses:  # parameters were replaced
            self._addresses = addresses
            self.hoisted, self._called = None, self.model
            if self._prepared is not None:
                self.prepare(*self._prepared)
            return True
        if self.hoisted is None:
            return False
        try:
            with self._precision():
                return self.hoisted.refresh()
        except HoistError as reason:
            logger.warning("the network is not hoisted any more: %s", reason)
            self.hoisted = None
            return True

    def _hoist(self, timesteps: Sequence[int], level: int) -> None:
        """Take out of the calls what does not depend on x."""
        try:
            with self._precision():
                self.hoisted = Hoisted(self._module, self.input, timesteps, self.kwargs)  # type: ignore[arg-type]
        except HoistError as reason:
            logger.log(level, "the network is not hoisted: %s", reason)

    @torch.inference_mode(False)
    def _set_format(self, name: str) -> None:
        memory_format = torch.contiguous_format if name == "contiguous" else _LAST[self.input.dim()]
        self.input = torch.zeros_like(self.input, memory_format=memory_format)
        if self.hoisted is not None:
            with self._precision():
                self.hoisted.lay_out(memory_format)
        self.memory_format = name

    def _lay_out(self, name: str, row: int | None, level: int = logging.WARNING) -> None:
        """Use a memory format; contiguous memory where the network cannot."""
        if name == "channels_last" and self.input.dim() not in _LAST:
            raise ValueError(
                "memory_format='channels_last' is for images [B, C, H, W] and volumes [B, C, D, H, W], got shape "
                f"{tuple(self.input.shape)}"
            )
        self._set_format(name)
        if name == "channels_last":
            try:
                self(row)
            except RuntimeError as error:
                logger.log(level, "the network cannot run in channels_last: %s", line_of(error))
                self._set_format("contiguous")

    def _faster_format(self, row: int | None) -> str:
        """The memory format in which a call is faster, tried once for a network, shape, precision and device."""
        if self.input.dim() not in _LAST:
            return "contiguous"
        key = (tuple(self.input.shape), self.dtype, self.device, self.hoisted is None, torch.get_num_threads())
        known = _TRIALS.setdefault(self._module, {}) if isinstance(self._module, nn.Module) else {}
        if key not in known:
            times = {"contiguous": float("inf"), "channels_last": float("inf")}
            for _ in range(2):  # in turns, for a machine that slows down
                for name in times:
                    self._lay_out(name, row, logging.INFO)
                    if self.memory_format != name:
                        known[key] = "contiguous"
                        return known[key]
                    times[name] = min(times[name], seconds(lambda: self(row), self.device))
            faster = times["channels_last"] < _FASTER * times["contiguous"]
            known[key] = "channels_last" if faster else "contiguous"
        return known[key]

    def _compile(self, row: int | None) -> None:
        """Run the network, or what is left of it, through torch.compile."""
        expected = self(row).clone()
        called = self._called
        undo = None
        if self.hoisted is not None:
            undo = self.hoisted.compile()
        else:
            self._called = torch.compile(self.model, dynamic=False)
        try:
            why = None if same_up_to_rounding(self(row), expected) else "it gives other numbers then"
        except Exception as error:
            why = line_of(getattr(error, "inner_exception", error))  # what torch.compile's own error is about
        if why is not None:
            logger.warning("the network is not compiled: %s", why)
            self._called = called
            if undo is not None:
                undo()

    def _precision(self) -> contextlib.AbstractContextManager:
        """Autocast where the network's parameters have another dtype than its input."""
        if self._autocast:
            return torch.autocast(self.device.type, self.dtype)
        return contextlib.nullcontext()

    def update_kwargs(self, model_kwargs: Mapping[str, Any], uncond_kwargs: Mapping[str, Any] | None) -> None:
        """Copy new values into the buffers; names, shapes and everything that is no tensor must stay as they were."""
        if uncond_kwargs is not None and not self.guided:
            raise ValueError("uncond_kwargs belong to guidance, which this sampler was built without")
        fresh = self._static_kwargs(dict(model_kwargs), uncond_kwargs)
        if fresh.keys() != self.kwargs.keys():
            raise ValueError(f"model_kwargs must keep the names {sorted(self.kwargs)}, got {sorted(fresh)}")
        for name, value in fresh.items():
            held = self.kwargs[name]
            if isinstance(held, Tensor) and isinstance(value, Tensor):
                if held.shape != value.shape or held.dtype != value.dtype:
                    raise ValueError(
                        f"model_kwargs[{name!r}] must keep shape {tuple(held.shape)} and {held.dtype}, "
                        f"got {tuple(value.shape)} and {value.dtype}"
                    )
            elif isinstance(held, Tensor) or isinstance(value, Tensor) or not _same(held, value):
                raise ValueError(f"model_kwargs[{name!r}] was {held!r} when the sampler was built, got {value!r}")
        for name, value in fresh.items():
            if isinstance(value, Tensor):
                self.kwargs[name].copy_(value)

    def _static_kwargs(self, cond: dict[str, Any], uncond: Mapping[str, Any] | None) -> dict[str, Any]:
        if self.guided:
            if uncond is None or cond.keys() != uncond.keys():
                raise ValueError(
                    f"uncond_kwargs must have the names of model_kwargs, {sorted(cond)}, got {sorted(uncond or {})}"
                )
            cond = {name: self._join(name, value, uncond[name]) for name, value in cond.items()}
        return {
            name: value.detach().to(self.device, copy=True) if isinstance(value, Tensor) else value
            for name, value in cond.items()
        }

    def _join(self, name: str, cond: Any, uncond: Any) -> Any:
        if isinstance(cond, Tensor) and isinstance(uncond, Tensor):
            if cond.shape != uncond.shape or not cond.dim() or len(cond) != self.batch:
                raise ValueError(
                    f"with guidance, model_kwargs[{name!r}] and uncond_kwargs[{name!r}] must have equal shapes "
                    f"({self.batch}, ...), got {tuple(cond.shape)} and {tuple(uncond.shape)}"
                )
            return torch.cat([cond.to(self.device), uncond.to(self.device, cond.dtype)])
        if isinstance(cond, Tensor) or isinstance(uncond, Tensor) or not _same(cond, uncond):
            raise ValueError(
                f"model_kwargs[{name!r}] and uncond_kwargs[{name!r}] must be two tensors or equal, "
                f"got {cond!r} and {uncond!r}"
            )
        return cond

    def _shape_error(self, shape: tuple[int, ...]) -> str:
        hint = ""
        if len(shape) == len(self.output_shape) and shape[1] == 2 * self.output_shape[1]:
            hint = "; twice the channels: a network with a learned variance needs variance_type='learned_range'"
        elif len(shape) == len(self.output_shape) and 2 * shape[1] == self.output_shape[1]:
            hint = "; half the channels: a network without a learned variance needs another variance_type"
        return f"the model must return shape {self.output_shape}, got {shape}{hint}"


def _addresses(model: Any) -> tuple[int, ...]:
    """Where the model's parameters and buffers are in memory."""
    if not isinstance(model, nn.Module):
        return ()
    return tuple(_address(tensor) for tensor in itertools.chain(model.parameters(), model.buffers()))


def _address(tensor: Tensor) -> int:
    try:
        return tensor.data_ptr()
    except RuntimeError:  # a tensor subclass without memory of its own
        return id(tensor)


def _words(own: tuple[torch.dtype | None, torch.device | None]) -> str:
    return " on ".join(str(part) for part in own if part is not None) or "without parameters"


def _same(a: Any, b: Any) -> bool:
    """Whether two values that are no tensors are the same; containers only if they are one object."""
    return a is b or (isinstance(a, (bool, int, float, str)) and type(a) is type(b) and a == b)


def _warn_if_training(model: Model) -> None:
    random = (nn.modules.dropout._DropoutNd, nn.modules.batchnorm._NormBase)
    if isinstance(model, nn.Module) and any(m.training for m in model.modules() if isinstance(m, random)):
        logger.warning("the model is in training mode (dropout or batch norm are active): call model.eval() first")
