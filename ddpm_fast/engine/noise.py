"""Where a walk's noise comes from: Philox, keyed by each sample's seed, or torch generators in torch's own order."""

import math
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from ddpm_fast.kernels.normal import normal
from ddpm_fast.kernels.philox import Stream
from ddpm_fast.seeding import seed_tensor
from ddpm_fast.table import StepTable

AHEAD = 1 << 16  # normals made at a time on the PyTorch path: one call serves several steps


class Noise(Protocol):
    """What a loop draws from.

    Attributes:
        in_kernel: whether the step kernel makes the steps' noise itself, from
        seeds: int64 [B] on the loop's device.
    """

    in_kernel: bool
    seeds: Tensor | None

    def begin(self) -> None:
        """Remember this place."""

    def restart(self) -> None:
        """Go back to where it began."""

    def x_T(self) -> Tensor:
        """The start of the walk: [B, C, ...]."""

    def z(self, step: int) -> Tensor | None:
        """The noise of step number `step`, asked for in order; None where there is none or the kernel makes it."""


class PhiloxNoise:
    """Noise that depends on (seed, timestep, element) alone (kernels/philox.py).

    Args:
        seeds: one a sample.
        shape: (B, C, ...).
        table: the walk's rows.
        device: of the noise.
        backend: "torch" makes it ahead, for several steps at a time; "triton" leaves that of the steps to the step
            kernel, and `z` gives None.
    """

    def __init__(
        self, seeds: Sequence[int], shape: tuple[int, ...], table: StepTable, device: torch.device, backend: str
    ) -> None:
        self.seeds: Tensor | None = seed_tensor(seeds).to(device)
        self._seeds = self.seeds
        self.shape = shape
        self.backend = backend
        self.in_kernel = backend == "triton"
        self._ids = torch.from_numpy(table.noise_id).to(device)
        self._noisy = (table.sigma != 0).tolist()
        self._first = 0
        self._block: Tensor | None = None

    def begin(self) -> None:
        """Remember this place: nothing to do, no draw depends on another."""

    def restart(self) -> None:
        """Go back to where it began: nothing to do."""

    def x_T(self) -> Tensor:
        """The start of the walk: [B, C, ...]."""
        return normal(self._seeds, torch.zeros_like(self._seeds), Stream.X_T, self.shape[1:], backend=self.backend)

    def z(self, step: int) -> Tensor | None:
        """The noise of step number `step`, or None where there is none or the kernel makes it."""
        if self.in_kernel or not self._noisy[step]:
            return None
        if self._block is None or not 0 <= step - self._first < len(self._block):
            batch = self.shape[0]
            ids = self._ids[step : step + max(1, AHEAD // math.prod(self.shape))]
            seeds, ids = self._seeds.repeat(len(ids)), ids.repeat_interleave(batch)
            flat = normal(seeds, ids, Stream.STEP, self.shape[1:], backend=self.backend)
            self._first, self._block = step, flat.unflatten(0, (-1, batch))
        return self._block[step - self._first]


class GeneratorNoise:
    """torch.randn in the order of a plain sampling loop: x_T first, then one draw at every step of `table.draws`.

    Args:
        generator: one for the batch, or a list with one a sample; each draws on its own device. From a CPU to a GPU
            every draw is copied, and the host waits for it: seeds do without. None: torch's global generator of
            `device`.
        shape: (B, C, ...).
        table: the walk's rows.
        device: of the noise.
        dtype: what is drawn in, where a plain loop draws in its network's dtype: other numbers than in float32.
        copies: a loop that draws z for `copies` batches at once, and uses the first.
    """

    in_kernel = False
    seeds: Tensor | None = None

    def __init__(
        self,
        generator: torch.Generator | Sequence[torch.Generator] | None,
        shape: tuple[int, ...],
        table: StepTable,
        device: torch.device,
        *,
        dtype: torch.dtype = torch.float32,
        copies: int = 1,
    ) -> None:
        if generator is not None and not isinstance(generator, torch.Generator):
            if not isinstance(generator, Sequence) or not all(isinstance(g, torch.Generator) for g in generator):
                raise TypeError(f"generator must be a torch.Generator or a list with one a sample, got {generator!r}")
            if len(generator) != shape[0]:
                raise ValueError(f"generators must be one a sample: {shape[0]} samples, got {len(generator)}")
        for g in [generator] if isinstance(generator, torch.Generator) else generator or []:
            if g.device.type not in ("cpu", device.type):
                raise ValueError(f"a generator must be on the CPU or on {device}, got one on {g.device}")
        self.generator = generator
        self.shape = shape
        self.device = device
        self.dtype = dtype
        self.copies = copies
        self._draws = table.draws.tolist()
        self._states: list[Tensor] = []
        # On a generator's own device and in its dtype; drawing into one place spares the allocation.
        self._drawn: Tensor | None = None

    def begin(self) -> None:
        """Remember this place."""
        self._states = self._get_states()

    def restart(self) -> None:
        """Go back to where it began."""
        if self.generator is None:
            global_generator(self.device).set_state(self._states[0])
        for g, state in zip(self._generators(), self._states, strict=False):
            g.set_state(state)

    def x_T(self) -> Tensor:
        """The start of the walk: [B, C, ...]."""
        return self._draw(self._empty(1))

    def z(self, step: int) -> Tensor | None:
        """The noise of step number `step`, until the next is asked for; None where nothing is drawn."""
        if not self._draws[step]:
            return None
        if self._drawn is None:
            self._drawn = self._empty(self.copies)
        return self._draw(self._drawn)

    def _get_states(self) -> list[Tensor]:
        if self.generator is None:
            return [global_generator(self.device).get_state()]
        return [g.get_state() for g in self._generators()]

    def _generators(self) -> list[torch.Generator]:
        if self.generator is None:
            return []
        return [self.generator] if isinstance(self.generator, torch.Generator) else list(self.generator)

    def _empty(self, copies: int) -> Tensor:
        own = self.generator if isinstance(self.generator, torch.Generator) else None
        device = self.device if own is None else own.device
        return torch.empty((copies * self.shape[0], *self.shape[1:]), dtype=self.dtype, device=device)

    def _draw(self, z: Tensor) -> Tensor:
        """Draw into z; its first batch as float32 on the device of the walk."""
        if isinstance(self.generator, Sequence):
            rows = (torch.randn(z[:1].shape, generator=g, device=g.device, dtype=self.dtype) for g in self.generator)
            return torch.cat([row.to(self.device, torch.float32) for row in rows])
        z.normal_(generator=self.generator)
        batch = self.shape[0]
        return (z if len(z) == batch else z[:batch]).to(self.device, torch.float32)


def global_generator(device: torch.device) -> torch.Generator:
    """torch's own generator of the device."""
    if device.type == "cuda":
        return torch.cuda.default_generators[torch.cuda.current_device() if device.index is None else device.index]
    return torch.default_generator
