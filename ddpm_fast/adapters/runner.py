"""What all adapters share: an object's state under a faster class, its noise, and the loops of its last runs."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from ddpm_fast.engine.base import SamplingLoop
from ddpm_fast.engine.call import Call, named_leaves
from ddpm_fast.engine.device import global_generator
from ddpm_fast.engine.execution import DEFAULT, Execution
from ddpm_fast.engine.graph import GraphPool
from ddpm_fast.engine.locks import make_lock
from ddpm_fast.engine.loop import Correction
from ddpm_fast.engine.noise import GeneratorNoise, Noise, PhiloxNoise
from ddpm_fast.engine.report import OfThread, Speculation
from ddpm_fast.seeding import Seeds, resolve_seeds
from ddpm_fast.speculation.choose import Speculate, build_loop, check_speculate
from ddpm_fast.speculation.loop import check_run
from ddpm_fast.table import Clipping, StepTable
from ddpm_fast.validate import one_of

NOISES = ("auto", "library", "philox")
KEPT = 4  # loops: for runs of as many shapes, schedules or guidance scales in turn
_HUMAN = 2**32  # torch draws its own seeds from 2^64 numbers (2^53 on CUDA); people choose small seeds

T = TypeVar("T")


def adopt(obj: Any, cls: type[T], **attributes: Any) -> T:
    """Return another object that shares the state of `obj`, of class `cls`, a subclass of the class of `obj`."""
    fast = cls.__new__(cls)
    fast.__dict__.update(obj.__dict__)
    fast.__dict__.update(attributes)
    return fast


def is_globally_seeded(device: torch.device) -> bool:
    """Return whether somebody called torch.manual_seed with a number below 2^32; torch itself does not."""
    return global_generator(device).initial_seed() < _HUMAN


@dataclass(frozen=True)
class Options:
    """The options of an accelerated object.

    Attributes:
        noise: Source of the noise where no generator is passed. "library": torch's global generator in the order in
            which the library draws. "philox": one seed for each sample. "auto": the library's source if
            torch.manual_seed was called (with a seed below 2^32), else philox.
        execution: How the loops are executed.
        speculate: Whether to take several steps in one network call (`ddpm_fast.sample.Sampler`).

    Raises:
        ValueError, TypeError: An option has a value that is not allowed.
    """

    noise: str = "auto"
    execution: Execution = DEFAULT
    speculate: Speculate = False

    def __post_init__(self) -> None:
        one_of("noise", self.noise, NOISES)
        check_speculate(self.speculate)


class Runner:
    """A maker of sampling loops that keeps the last few: the same run again needs no new buffers and no new graph.

    Attributes:
        options: The options of the loops.
        last_loop: The loop of the last run, if it is kept.
    """

    def __init__(self, options: Options) -> None:
        self.options = options
        self._seeds: OfThread[list[int] | None] = OfThread(None)
        self._speculation: OfThread[Speculation | None] = OfThread(None)
        self.last_loop: SamplingLoop | None = None
        self._loops: list[tuple[tuple[Any, ...], SamplingLoop]] = []  # the last used one first
        self._pool = GraphPool()
        self._lock = make_lock()
        self._runs_in: int | None = None  # a thread; 0 for the run of an iterator, which any thread may continue

    def __reduce__(self) -> tuple[type, tuple[Options]]:
        return Runner, (self.options,)  # a copy has the same options; buffers and graphs are not copied

    @property
    def last_seeds(self) -> list[int] | None:
        """The seeds of this thread's last run, one for each sample; None where a generator made the noise."""
        return self._seeds.get()

    @last_seeds.setter
    def last_seeds(self, seeds: list[int] | None) -> None:
        self._seeds.set(seeds)

    @property
    def last_speculation(self) -> Speculation | None:
        """The report of this thread's last run, if it speculated."""
        return self._speculation.get()

    @contextlib.contextmanager
    def alone(self, iterator: bool = False) -> Iterator[Runner]:
        """Hold this runner for one run, because its loops have one set of buffers; other threads wait.

        Where waiting might never end, the context is another runner: for a run inside another run, and for a run beside
        an iterator that is open.

        Args:
            iterator: Whether the run is an iterator, which its caller may leave open.
        """
        own = 0 if iterator else threading.get_ident()
        if not self._lock.acquire(blocking=not iterator and self._runs_in not in (0, own)):
            another = Runner(self.options)
            try:
                yield another
            finally:
                self.last_seeds = another.last_seeds
                self._speculation.set(_report(another.last_loop))
            return
        self._runs_in = own
        try:
            yield self
        finally:
            self._speculation.set(_report(self.last_loop))
            self._runs_in = None
            self._lock.release()

    def loop(
        self,
        call: Call,
        table: StepTable,
        clipping: Clipping,
        *,
        owner: Any,
        correction: Correction | None = None,
        keep_x0: bool = False,
        inference_mode: bool = False,
        execution: str | None = None,
        hoistable: bool = True,
        watched: bool = False,
    ) -> SamplingLoop:
        """Return the loop of a run: one of the last few, if only the values of tensors in the keywords differ.

        Args:
            call: The model and what it is called with. Two calls have the same model if they have the same owner.
            table, clipping, correction, keep_x0, inference_mode: See `Loop`.
            owner: Anything that can be compared and stands for the model; it is kept alive with the loop. None makes a
                loop for this run alone, and so does a correction.
            execution: "auto", "graph" or "eager", instead of the option's value.
            hoistable: Whether a call of the model does nothing but call its module.
            watched: Whether something is wanted after every step.

        Raises:
            ValueError: The run is impossible with `speculate`.
        """
        if self.options.speculate is not False:
            check_run(watched=watched)
        rows = (table.coefficients().numpy().tobytes(), table.ids().numpy().tobytes(), table.draws.tobytes())
        scale = None if call.guidance is None else call.guidance.tolist()
        key = (call.shape, rows, table.learned, table.doubled, clipping, call.device, call.dtype, _signature(call),
               scale, keep_x0, inference_mode, execution, owner)  # fmt: skip
        kept = owner is not None and correction is None
        if kept:
            for place, (other_key, other) in enumerate(self._loops):
                if other_key == key:
                    self._loops.insert(0, self._loops.pop(place))
                    if call.kwargs or call.uncond_kwargs:
                        other.update_kwargs(call.kwargs, call.uncond_kwargs)
                    self.last_loop = other
                    return other
        options = self.options.execution
        options = replace(
            options, execution=execution or options.execution, optimize=options.optimize if hoistable else None
        )
        loop, _ = build_loop(
            self.options.speculate, call, table, clipping, correction=correction, keep_x0=keep_x0,
            inference_mode=inference_mode, execution=options, pool=self._pool,
        )  # fmt: skip
        self.last_loop = loop if kept else None
        if kept:  # loops of another network would keep that network alive
            alike = [(other_key, other) for other_key, other in self._loops if other_key[-1] == owner]
            self._loops = [(key, loop), *alike[: KEPT - 1]]
        return loop

    def free(self) -> None:
        """Drop the buffers and graphs of the loops."""
        with self._lock:
            self._loops.clear()
            self.last_loop = None

    def noise(
        self,
        generator: torch.Generator | Sequence[torch.Generator] | None,
        loop: SamplingLoop,
        *,
        seeds: Seeds = None,
        dtype: torch.dtype = torch.float32,
        copies: int = 1,
        z_from_global: bool = False,
    ) -> Noise:
        """Return the noise of a run: from seeds, from generators, or from the source that the options name.

        Args:
            generator, dtype, copies: See `GeneratorNoise`.
            loop: The loop of the run.
            seeds: One seed for each sample.
            z_from_global: Whether the library draws x_T alone from the generator; the caller then draws x_T.

        Raises:
            ValueError, TypeError: There are seeds and generators, or too few or too many; or a generator is on another
                device.
        """
        if seeds is not None and generator is not None:
            raise ValueError("noise comes from seeds or from generators, not from both")
        if isinstance(generator, (list, tuple)) and len(generator) == 1:
            generator = generator[0]
        source = self.options.noise
        library = source == "library" or (source == "auto" and is_globally_seeded(loop.device))
        if seeds is None and loop.seeds_only:
            seeds = _drawn_seeds(generator, loop.shape[0])
        elif seeds is None and (generator is not None or library):
            self.last_seeds = None
            noise = GeneratorNoise(generator, loop.shape, loop.table, loop.device, dtype=dtype, copies=copies)
            if not z_from_global or generator is None:
                return noise
            return GeneratorNoise(None, loop.shape, loop.table, loop.device, dtype=dtype, copies=copies)
        if seeds is None:
            seeds = int(
                torch.randint(2**48, (), dtype=torch.int64, device="cpu")
            )  # follows torch.manual_seed, whatever the seed
        self.last_seeds = resolve_seeds(seeds, loop.shape[0])
        return PhiloxNoise(self.last_seeds, loop.shape, loop.table, loop.device, loop.backend)


class Accelerated:
    """A base of accelerated objects: what their last run did."""

    _runner: Runner

    @property
    def last_seeds(self) -> list[int] | None:
        """The seeds of this thread's last call, one for each sample; None where a generator made the noise.

        A thread that has made no call reads the seeds of the last call of any thread.
        """
        return self._runner.last_seeds

    @property
    def last_speculation(self) -> Speculation | None:
        """The report of the last call that this thread made, if the call speculated."""
        return self._runner.last_speculation


def _report(loop: SamplingLoop | None) -> Speculation | None:
    return None if loop is None else loop.speculation


def _drawn_seeds(generator: torch.Generator | Sequence[torch.Generator] | None, count: int) -> list[int]:
    """Draw a seed for each sample from the generators, or from torch's global generator."""
    if generator is None or isinstance(generator, torch.Generator):
        device = "cpu" if generator is None else generator.device
        seeds: list[int] = torch.randint(
            2**62, (count,), generator=generator, dtype=torch.int64, device=device
        ).tolist()
        return seeds
    return [_drawn_seeds(each, 1)[0] for each in generator]


def _signature(call: Call) -> tuple[Any, ...]:
    """Return what must be equal in two calls for new values to fit into old buffers."""
    found = []
    for kwargs in (call.kwargs, call.uncond_kwargs or {}):
        names, values, structure = named_leaves(kwargs)
        found += [structure, *names]
        found += [(v.shape, v.dtype) if isinstance(v, Tensor) else _ByValue(v) for v in values]
    return tuple(found)


class _ByValue:
    """A value that compares by value where it is plain, else by identity; it is never hashed."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, _ByValue):
            return False
        plain = isinstance(self.value, (bool, int, float, str, type(None))) and type(self.value) is type(other.value)
        return self.value is other.value or (plain and bool(self.value == other.value))

    __hash__ = None  # type: ignore[assignment]
