"""The network as the sampling loop sees it: fixed buffers in, one checked tensor out."""

import contextlib
import itertools
import logging
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ddpm_fast.engine import choices
from ddpm_fast.engine.ambient import Ambient
from ddpm_fast.engine.call import Call, named_leaves, output_of, said, same_value
from ddpm_fast.engine.casts import Casts
from ddpm_fast.engine.device import Model, device_of, dtype_of, global_generator
from ddpm_fast.engine.execution import Execution
from ddpm_fast.engine.hoist import Hoisted, same_up_to_rounding
from ddpm_fast.engine.structure import FLAGS, Structure, changed_by, modules_in, structure_of, trains
from ddpm_fast.engine.timer import seconds
from ddpm_fast.engine.trace import HoistError
from ddpm_fast.validate import line_of, one_of

logger = logging.getLogger("ddpm_fast")

_LAST: dict[int, torch.memory_format] = {4: torch.channels_last, 5: torch.channels_last_3d}
_FORMATS = ("contiguous", "channels_last")
_FASTER = 0.97  # channels_last is taken from this share of the contiguous call's time on
# The faster memory format of every network, by all that the trial depended on.
_TRIALS: weakref.WeakKeyDictionary[nn.Module, dict[tuple[Any, ...], str]] = weakref.WeakKeyDictionary()


class Network:
    """A model on buffers that never move.

    Args:
        call: The model and what it is called with.
        doubled: Whether the output has twice the channels of the input: the second half sets the variance.

    Attributes:
        call: The call as it was built; `update` changes the values of its keywords, not this attribute.
        input: The x that the model reads next, in the call's dtype, [B or 2B, C, ...].
        timestep: The t that the model reads next, int64 [B or 2B].
        kwargs: The keywords of every call; their tensors are buffers.
        hoisted: The part of the model that depends on x, once the rest is evaluated ahead; None before.
        memory_format: Memory format of the input, "contiguous" or "channels_last".
        ambient: The settings of the process that the model's calls depend on, as of the last `refresh`.
    """

    @torch.inference_mode(False)  # a buffer made in inference mode could not be written outside of that mode
    def __init__(self, call: Call, doubled: bool = False) -> None:
        self.call = call
        self.device = call.device
        self.guided = call.guided
        self.batch = call.batch
        self.hoisted: Hoisted | None = None
        self.memory_format = "contiguous"
        self._called, self._models = call.model, (call.model, call.module)
        self._prepared: tuple[Sequence[int], Execution, int | None] | None = None
        own_dtype = dtype_of(call.model)
        self._own = own_dtype, device_of(call.model)
        self._lowered = call.dtype if own_dtype not in (None, call.dtype) else None
        self.ambient = Ambient.now(self.device, self._lowered)
        self._casts: Casts | None = None
        self._recording = False
        self._addresses = _addresses(call.module)
        self._volatile: frozenset[tuple[str, str]] = frozenset()  # attributes that calls change
        self._structure: Structure = {}
        _warn_if_training(call.model)
        shape = call.input_shape
        self.input = torch.zeros(shape, dtype=call.dtype, device=call.device)
        self.timestep = torch.zeros(shape[0], dtype=torch.int64, device=call.device)
        self.output_shape = (shape[0], shape[1] * (2 if doubled else 1), *shape[2:])
        self.kwargs = call.keywords()

    def __call__(self, row: int | None = None) -> Tensor:
        """Return the model's output for the buffers as they are: [B or 2B, C or 2C, ...].

        Args:
            row: Number of the step in the run, where all samples are in the same step. It spares a hoisted model the
                lookup of its tables.

        Raises:
            TypeError: The model returned neither a tensor nor an object with a tensor `.sample`.
            ValueError: The output has another shape, or no floating point dtype.
        """
        with self.ambient.precision():
            if self.hoisted is not None:
                output: Any = self.hoisted(self.input, self.timestep, row)
            else:
                with self._weights_cast():
                    output = output_of(self._called(self.input, self.timestep, **self.kwargs))
        if not isinstance(output, Tensor):
            raise TypeError(
                f"model must return a tensor or an object with a tensor .sample, got {type(output).__name__}"
            )
        if tuple(output.shape) != self.output_shape:
            raise ValueError(self._shape_error(tuple(output.shape)))
        if not output.is_floating_point():
            raise ValueError(f"the model must return floating point numbers, got {output.dtype}")
        if output.untyped_storage().data_ptr() == self.input.untyped_storage().data_ptr():
            return output.clone()  # the step writes the next input
        return output.resolve_neg()  # kernels read memory, which holds the values of an imaginary part negated

    def plain(self) -> Tensor:
        """Return what the caller's model itself gives for the buffers as they are."""
        with self.ambient.precision():
            output: Tensor = output_of(self.call.model(self.input.contiguous(), self.timestep, **self.kwargs))
        return output

    def _weights_cast(self) -> contextlib.AbstractContextManager[Any]:
        """Return the context of a call that is not hoisted: recorded under autocast, its weights are cast once.

        Calls that are not recorded run the model's own code, which may change the weights from call to call.
        """
        if self.ambient.autocast is None or not self._recording:
            return contextlib.nullcontext()
        if self._casts is None:
            weights = (weight for module in self._modules() for weight in module.parameters(recurse=False))
            self._casts = Casts(self.device.type, self.ambient.autocast, weights)
        return self._casts

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """Let the calls inside be recorded in a graph, which `recast` keeps up to date."""
        self._recording = True
        try:
            yield
        finally:
            self._recording = False

    def recast(self) -> None:
        """Bring up to date what recorded calls read instead of the weights: somebody may have changed the weights."""
        if self._casts is not None:
            self._casts.refresh()

    @property
    def prepared(self) -> bool:
        """Whether a call is anything else than a call of the caller's model."""
        return self.hoisted is not None or self._called is not self.call.model or self.memory_format != "contiguous"

    @property
    def seconds_to_hoist(self) -> float:
        """The seconds that hoisting takes, about: from one second for a small network to ten for a large one."""
        module = self.call.module
        return 1.0 + 0.02 * sum(1 for _ in module.modules()) if isinstance(module, nn.Module) else 1.0

    def agrees(self, output: Tensor) -> bool:
        """Return whether the output for the buffers as they are is that of the caller's model, up to rounding."""
        with self.undone():
            try:
                expected = self.plain()
            except torch.OutOfMemoryError as error:
                logger.warning("the run is not compared with the model: %s", line_of(error))
                return True
            return same_up_to_rounding(output, expected, self.ambient.autocast)

    def start_run(self) -> None:
        """Tell the modules that keep a state along a run, by their method `start_run`, that one begins."""
        for module in self._modules():
            start = getattr(module, "start_run", None)
            if callable(start):
                start()

    @contextlib.contextmanager
    def undone(self) -> Iterator[None]:
        """Leave torch's generators and the model's buffers as they are, so that calls can be compared."""
        kept = [(buffer, buffer.clone()) for module in self._modules() for buffer in module.buffers(recurse=False)]
        # A hoisted network draws nothing; the generator may be in use by other threads.
        drawn = [] if self.hoisted is not None else [torch.default_generator]
        drawn += [global_generator(self.device)] if self.device.type == "cuda" else []
        states = [(generator, generator.get_state()) for generator in drawn]
        yield
        for generator, state in states:
            if not torch.equal(generator.get_state(), state):
                generator.set_state(state)
        for buffer, value in kept:
            if not torch.equal(buffer, value):
                buffer.copy_(value)

    def _modules(self) -> dict[nn.Module, None]:
        return dict.fromkeys(each for model in self._models for top in modules_in(model) for each in top.modules())

    def prepare(self, timesteps: Sequence[int], execution: Execution, row: int | None = None) -> None:
        """Hoist, change the memory format and compile, as the options say.

        What cannot be done is left out, and the log says why.

        Args:
            timesteps: Timesteps of the run.
            execution: The options `optimize`, `memory_format` and `compile` count.
            row: The argument `row` of the calls to come: None or any number.
        """
        self._prepared = timesteps, execution, row
        self.timestep.fill_(int(timesteps[0]))
        self.watch()
        if execution.optimize is not None:
            self._hoist(timesteps, logging.INFO if execution.optimize == "auto" else logging.WARNING)
        if execution.optimize == "fuse" and self.hoisted is not None:
            self._fuse(timesteps)
        if self.fused and execution.memory_format is None:
            self._set_format("channels_last")  # what fused layers read and write
        if execution.memory_format is not None:
            automatic = execution.memory_format == "auto"
            self._lay_out(self._faster_format(row) if automatic else execution.memory_format, row)
        if execution.compile and self.fused:
            logger.warning("the network is not compiled: it is fused")
        elif execution.compile:
            self._compile(row)

    def refresh(self) -> bool:
        """Bring up to date, before a run, what was prepared; return whether tensors of recorded graphs have moved.

        Raises:
            ValueError: The model has another dtype or is on another device than when the network was built.
        """
        model, module = self.call.model, self.call.module
        ambient = Ambient.now(self.device, self._lowered)
        if (dtype_of(model), device_of(model)) != self._own:
            raise ValueError(
                f"the model was {_words(self._own)} when the sampler was built and is "
                f"{_words((dtype_of(model), device_of(model)))} now: build another sampler"
            )
        addresses = _addresses(module)
        if (addresses, ambient) != (self._addresses, self.ambient) or self._changed():
            self._addresses, self.ambient = addresses, ambient
            self.rebuild()
            return True
        self.recast()
        if self.hoisted is None:
            return False
        try:
            with self.ambient.precision():
                return self.hoisted.refresh()
        except HoistError as reason:
            logger.warning("the network is not hoisted any more: %s", reason)
            self.hoisted = None
            return True

    def rebuild(self) -> None:
        """Prepare the network anew: what a call does has changed since it was prepared."""
        self.forget()
        if self._prepared is not None:
            self.prepare(*self._prepared)

    def give_up(self) -> None:
        """Call the caller's model from now on."""
        self._prepared = None
        self.forget()

    def forget(self) -> None:
        """Call the caller's model from now on, until it is prepared again."""
        self.hoisted, self._called, self._casts, self._structure = None, self.call.model, None, {}
        if self.memory_format != "contiguous":
            self._set_format("contiguous")

    def watch(self) -> None:
        """Look at the network's structure before something is made from it: a trace, compiled code, a recorded graph.

        `refresh` then sees what has changed. The network is called once, for what a call itself changes; in training
        mode a call would draw numbers and count statistics, so that there only modules, flags and hooks count.
        """
        training = trains(*self._models)
        if not self._structure and not training:
            with torch.no_grad(), self.undone():
                self._volatile = changed_by(self.plain, *self._models)
        if not self._structure:
            self._structure = structure_of(*self._models)
            if training:
                self._volatile = frozenset(key for key in self._structure if key[1] not in FLAGS)

    def _changed(self) -> bool:
        """Return whether the network's structure is another one than when it was looked at."""
        known, now = self._structure, structure_of(*self._models) if self._structure else {}
        return any(known.get(key) != now.get(key) for key in (known.keys() | now.keys()) - self._volatile)

    def update(self, call: Call) -> None:
        """Copy the keywords of `call` into the buffers.

        Raises:
            ValueError: A name, a shape, a dtype, or a value that is no tensor, has changed.
        """
        places, held_values, structure = named_leaves(self.kwargs)
        _, values, fresh_structure = named_leaves(call.keywords())
        if structure != fresh_structure:
            raise ValueError(f"model_kwargs must keep the names {said(self.kwargs)}, got {said(call.kwargs)}")
        for place, held, value in zip(places, held_values, values, strict=True):
            if isinstance(held, Tensor) and isinstance(value, Tensor):
                if held.shape != value.shape or held.dtype != value.dtype:
                    raise ValueError(
                        f"model_kwargs{place} must keep shape {tuple(held.shape)} and {held.dtype}, "
                        f"got {tuple(value.shape)} and {value.dtype}"
                    )
            elif isinstance(held, Tensor) or isinstance(value, Tensor) or not same_value(held, value):
                raise ValueError(f"model_kwargs{place} was {held!r} when the sampler was built, got {value!r}")
        for held, value in zip(held_values, values, strict=True):
            if isinstance(value, Tensor):
                held.copy_(value)

    def _hoist(self, timesteps: Sequence[int], level: int) -> None:
        """Evaluate ahead what does not depend on x; where that fails, log the reason at `level`."""
        try:
            with self.ambient.precision():
                self.hoisted = Hoisted(self.call.module, self.input, timesteps, self.kwargs, ambient=self.ambient)
        except HoistError as reason:
            logger.log(level, "the network is not hoisted: %s", reason)
        except Exception as error:  # of torch's tracer, or of the model in a call that it does not expect
            logger.log(level, "the network is not hoisted: %s: %s", type(error).__name__, line_of(error))

    @property
    def fused(self) -> bool:
        """Whether the network's layers are fused."""
        return self.hoisted is not None and self.hoisted.fusion is not None

    def _fuse(self, timesteps: Sequence[int]) -> None:
        """Fuse the hoisted network; where that fails, log the reason and leave it hoisted."""
        assert self.hoisted is not None
        try:
            with self.ambient.precision():
                fusion = self.hoisted.fuse(self.input)
        except Exception as error:
            logger.warning("the network is not fused: %s", line_of(error))
        else:
            if fusion.layers:
                logger.info("fused: %s", fusion)
                return
            logger.warning("the network is not fused: no layer of it is of a kind that is fused")
        self._hoist(timesteps, logging.WARNING)  # a fusion changes what was hoisted

    @torch.inference_mode(False)
    def _set_format(self, name: str) -> None:
        memory_format = torch.contiguous_format if name == "contiguous" else _LAST[self.input.dim()]
        self.input = torch.zeros_like(self.input, memory_format=memory_format)
        if self.hoisted is not None:
            with self.ambient.precision():
                self.hoisted.lay_out(memory_format)
        self.memory_format = name

    def _lay_out(self, name: str, row: int | None, level: int = logging.WARNING) -> None:
        """Use a memory format; fall back to contiguous memory where the model cannot run in it."""
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
        """Return the faster memory format; every network is tried once for a shape, precision and device."""
        if self.input.dim() not in _LAST:
            return "contiguous"
        module = self.call.module
        formats = _TRIALS.setdefault(module, {}) if isinstance(module, nn.Module) else {}
        key = (tuple(self.input.shape), self.call.dtype, self.device, self.hoisted is None, torch.get_num_threads())
        if key not in formats:
            lasting = choices.key_of(self.call, key)
            found = choices.recall("format", lasting, _format_of)
            if found is None and (found := self._try_formats(row)) is not None:
                about = f"memory format of {type(module).__name__} for input {tuple(self.input.shape)}"
                choices.remember("format", lasting, found, about)
            formats[key] = found or "contiguous"
        return formats[key]

    def _try_formats(self, row: int | None) -> str | None:
        """Return the memory format that took less time; None where the model cannot run in channels_last."""
        durations = dict.fromkeys(_FORMATS, float("inf"))
        for _ in range(2):  # in turns, because a machine may slow down
            for name in durations:
                self._lay_out(name, row, logging.INFO)
                if self.memory_format != name:
                    return None
                durations[name] = min(durations[name], seconds(lambda: self(row), self.device))
        return "channels_last" if durations["channels_last"] < _FASTER * durations["contiguous"] else "contiguous"

    def _compile(self, row: int | None) -> None:
        """Run the model, or its hoisted rest, through torch.compile; undo that where the outputs differ."""
        expected = self(row).clone()
        called = self._called
        undo = None
        if self.hoisted is not None:
            undo = self.hoisted.compile()
        else:
            self._called = torch.compile(self.call.model, dynamic=False)
        try:
            alike = same_up_to_rounding(self(row), expected, self.ambient.autocast)
            reason = None if alike else "it gives other numbers then"
        except Exception as error:
            reason = line_of(getattr(error, "inner_exception", error))  # torch.compile wraps the error that matters
        if reason is not None:
            logger.warning("the network is not compiled: %s", reason)
            self._called = called
            if undo is not None:
                undo()

    def _shape_error(self, shape: tuple[int, ...]) -> str:
        hint = ""
        if len(shape) == len(self.output_shape) and shape[1] == 2 * self.output_shape[1]:
            hint = "; twice the channels: a network with a learned variance needs variance_type='learned_range'"
        elif len(shape) == len(self.output_shape) and 2 * shape[1] == self.output_shape[1]:
            hint = "; half the channels: a network without a learned variance needs another variance_type"
        return f"the model must return shape {self.output_shape}, got {shape}{hint}"


def _format_of(value: Any) -> str:
    """Return a memory format that was remembered; raise ValueError for what is none."""
    one_of("memory format", value, _FORMATS)
    return str(value)


def _addresses(model: Model) -> tuple[int, ...]:
    """Return where the model's parameters and buffers are in memory."""
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


def _warn_if_training(model: Model) -> None:
    random = (nn.modules.dropout._DropoutNd, nn.modules.batchnorm._NormBase)
    if isinstance(model, nn.Module) and any(m.training for m in model.modules() if isinstance(m, random)):
        logger.warning("the model is in training mode (dropout or batch norm are active): call model.eval() first")
