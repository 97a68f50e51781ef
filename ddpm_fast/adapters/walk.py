"""What all adapters share: an object's state under a faster class, where noise comes from, and the last walk's loop."""

import contextlib
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ddpm_fast.engine.device import Model
from ddpm_fast.engine.execution import DEFAULT, Execution
from ddpm_fast.engine.graph import GraphPool
from ddpm_fast.engine.loop import Correction, Loop
from ddpm_fast.engine.network import Network
from ddpm_fast.engine.noise import GeneratorNoise, Noise, PhiloxNoise, global_generator
from ddpm_fast.seeding import Seeds, resolve_seeds
from ddpm_fast.speculation.choose import Speculate, check_speculate, speculative_loop
from ddpm_fast.speculation.loop import Speculation, SpeculativeLoop, check_walk
from ddpm_fast.table import Clipping, StepTable
from ddpm_fast.validate import one_of

NOISES = ("auto", "library", "philox")
KEPT = 4  # loops: walks of as many shapes, schedules or guidance scales in turn
_HUMAN = 2**32  # torch's own seeds are drawn from 2^64 numbers (2^53 on CUDA); people's are small

T = TypeVar("T")
AnyLoop = Loop | SpeculativeLoop


def adopt(obj: Any, cls: type[T], **attributes: Any) -> T:
    """`obj` as an instance of `cls`, a subclass of its class: another object that shares all that `obj` holds."""
    fast = cls.__new__(cls)
    fast.__dict__.update(obj.__dict__)
    fast.__dict__.update(attributes)
    return fast


def is_globally_seeded(device: torch.device) -> bool:
    """Whether torch.manual_seed was called with a number below 2^32, and not by torch itself."""
    return global_generator(device).initial_seed() < _HUMAN


@dataclass(frozen=True)
class Options:
    """How an accelerated object walks.

    Attributes:
        noise: where noise comes from when no generator is passed: "library", torch's global generator in the order
            in which the library draws; "philox", a seed a sample; "auto", the library's if torch.manual_seed was
            called (with a seed below 2^32), else philox.
        how: it is executed.
        speculate: several steps a network call (`ddpm_fast.sample.Sampler`).
    """

    noise: str = "auto"
    how: Execution = DEFAULT
    speculate: Speculate = False

    def __post_init__(self) -> None:
        one_of("noise", self.noise, NOISES)
        check_speculate(self.speculate)


class Walker:
    """Makes loops, and keeps the last few: the same walk again costs no new buffers and no new graph.

    Attributes:
        options: how to walk.
        last_seeds: the seeds of the last walk, one a sample; None where its noise came from a generator.
    """

    def __init__(self, options: Options) -> None:
        self.options = options
        self.last_seeds: list[int] | None = None
        self._loops: list[tuple[tuple[Any, ...], AnyLoop]] = []  # the last used one first
        self._pool = GraphPool()
        self._lock = threading.Lock()
        self._walks: int | None = None  # the thread; 0 for a generator's walk, which any thread may go on with

    def __reduce__(self) -> tuple[type, tuple[Options]]:
        return Walker, (self.options,)  # a copy walks in the same way; buffers and graphs are not copied

    @property
    def last_loop(self) -> AnyLoop | None:
        """The loop of the last walk, of those that are kept."""
        return self._loops[0][1] if self._loops else None

    @property
    def last_speculation(self) -> Speculation | None:
        """What the last walk did, if it speculated."""
        loop = self.last_loop
        return loop.last if isinstance(loop, SpeculativeLoop) else None

    @contextlib.contextmanager
    def alone(self, generator: bool = False) -> Iterator["Walker"]:
        """This walker, whose loops have one set of buffers, for one walk at a time: other threads wait.

        Where waiting might never end, for a walk inside of another one or beside one that a generator holds open, it
        is a walker of its own.
        """
        own = 0 if generator else threading.get_ident()
        if not self._lock.acquire(blocking=not generator and self._walks not in (0, own)):
            another = Walker(self.options)
            try:
                yield another
            finally:
                self.last_seeds = another.last_seeds
            return
        self._walks = own
        try:
            yield self
        finally:
            self._walks = None
            self._lock.release()

    def loop(
        self,
        model: Model,
        shape: Sequence[int],
        table: StepTable,
        clipping: Clipping,
        *,
        owner: Any,
        device: torch.device,
        dtype: torch.dtype | None = None,
        model_kwargs: Mapping[str, Any] | None = None,
        uncond_kwargs: Mapping[str, Any] | None = None,
        guidance_scale: float | None = None,
        correction: Correction | None = None,
        keep_x0: bool = False,
        inference_mode: bool = False,
        execution: str | None = None,
        module: nn.Module | None = None,
        hoistable: bool = True,
        watched: bool = False,
    ) -> AnyLoop:
        """The loop of a walk; one of the last few if nothing but the values of tensors in kwargs differs from it.

        Args:
            model: what the loop calls; compared by
            owner: what makes it the same model: anything that can be compared, all of it kept alive. None: a loop for
                this walk alone, as is one with a correction.
            shape, device, dtype, model_kwargs, uncond_kwargs: those of `Network`.
            table, clipping, correction, keep_x0, inference_mode: those of `Loop`.
            guidance_scale: for all samples.
            execution: instead of that of the options.
            module: that of `Network`.
            hoistable: whether a call of `module` is all that `model` does.
            watched: whether something is wanted after every step.
        """
        if self.options.speculate is not False:
            check_walk(watched=watched)
            if correction is not None or keep_x0:
                raise ValueError("speculate does not go with cond_fn or self-conditioning, which follow every step")
        shape = tuple(shape)
        rows = (table.coefficients().numpy().tobytes(), table.ids().numpy().tobytes(), table.draws.tobytes())
        kwargs = {**(model_kwargs or {}), **{f"uncond {name}": v for name, v in (uncond_kwargs or {}).items()}}
        key = (shape, rows, table.learned, table.doubled, clipping, device, dtype, _signature(kwargs),
               guidance_scale, keep_x0, inference_mode, execution, owner)  # fmt: skip
        kept = owner is not None and correction is None
        if kept:
            for place, (known, same) in enumerate(self._loops):
                if known == key:
                    self._loops.insert(0, self._loops.pop(place))
                    if kwargs:
                        same.update_kwargs(model_kwargs or {}, uncond_kwargs)
                    return same
        channels = shape[1] * (2 if table.doubled else 1)
        scale = None if guidance_scale is None else torch.full(shape[:1], float(guidance_scale), device=device)
        how = self.options.how
        how = replace(how, execution=execution or how.execution, optimize=how.optimize if hoistable else None)
        _, ahead = speculative_loop(
            self.options.speculate, model, shape, table=table, clipping=clipping, model_kwargs=model_kwargs,
            uncond_kwargs=uncond_kwargs, device=device, dtype=dtype, module=module, guidance=scale,
            inference_mode=inference_mode, how=how,
        )  # fmt: skip
        loop = ahead or Loop(
            Network(model, shape, channels, model_kwargs, uncond_kwargs, device, dtype, module),
            table,
            clipping,
            guidance=scale,
            correction=correction,
            keep_x0=keep_x0,
            inference_mode=inference_mode,
            how=how,
            pool=self._pool,
        )
        if kept:  # loops of another network would keep that alive
            alike = [(known, other) for known, other in self._loops if known[-1] == owner]
            self._loops = [(key, loop), *alike[: KEPT - 1]]
        return loop

    def free(self) -> None:
        """Let go of the loops' buffers and graphs."""
        with self._lock:
            self._loops.clear()

    def noise(
        self,
        generator: torch.Generator | Sequence[torch.Generator] | None,
        loop: AnyLoop,
        *,
        seeds: Seeds = None,
        dtype: torch.dtype = torch.float32,
        copies: int = 1,
        z_from_global: bool = False,
    ) -> Noise:
        """The walk's noise: from seeds, from generators, or as the options say.

        Args:
            generator, dtype, copies: those of `GeneratorNoise`.
            loop: whose walk it is.
            seeds: one a sample.
            z_from_global: for libraries that draw x_T alone from the generator; the caller then draws it.

        Raises:
            ValueError, TypeError: seeds and generators; too few or too many of them; a generator on another device.
        """
        if seeds is not None and generator is not None:
            raise ValueError("noise comes from seeds or from generators, not from both")
        if isinstance(generator, (list, tuple)) and len(generator) == 1:
            generator = generator[0]
        choice = self.options.noise
        library = choice == "library" or (choice == "auto" and is_globally_seeded(loop.device))
        if seeds is None and isinstance(loop, SpeculativeLoop):
            seeds = _drawn_seeds(generator, loop.shape[0])
        elif seeds is None and (generator is not None or library):
            self.last_seeds = None
            noise = GeneratorNoise(generator, loop.shape, loop.table, loop.device, dtype=dtype, copies=copies)
            if not z_from_global or generator is None:
                return noise
            return GeneratorNoise(None, loop.shape, loop.table, loop.device, dtype=dtype, copies=copies)
        if seeds is None:
            seeds = int(torch.randint(2**48, ()))  # follows torch.manual_seed, whatever the seed
        self.last_seeds = resolve_seeds(seeds, loop.shape[0])
        return PhiloxNoise(self.last_seeds, loop.shape, loop.table, loop.device, loop.backend)


def _drawn_seeds(generator: torch.Generator | Sequence[torch.Generator] | None, count: int) -> list[int]:
    """A seed for each sample from the generators, or from torch's global one: the same generator, the same samples."""
    if isinstance(generator, (list, tuple)):
        return [_drawn_seeds(each, 1)[0] for each in generator]
    device = "cpu" if generator is None else generator.device  # type: ignore[union-attr]
    return torch.randint(2**62, (count,), generator=generator, device=device).tolist()  # type: ignore[arg-type]


def _signature(kwargs: Mapping[str, Any]) -> tuple[Any, ...]:
    """What must be equal for new values to fit into old buffers."""
    return tuple(
        (name, tuple(value.shape), value.dtype) if isinstance(value, Tensor) else (name, _Same(value))
        for name, value in sorted(kwargs.items())
    )


class _Same:
    """Compares by value where that is plain, else by identity; never asks for a hash."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, _Same):
            return False
        plain = isinstance(self.value, (bool, int, float, str, type(None))) and type(self.value) is type(other.value)
        return self.value is other.value or (plain and self.value == other.value)

    __hash__ = None  # type: ignore[assignment]
