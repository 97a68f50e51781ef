"""The noise of a run: Philox, keyed by each sample's seed, or torch generators in torch's own order."""

import math
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from ddpm_fast.engine.device import global_generator
from ddpm_fast.kernels.normal import normal
from ddpm_fast.kernels.philox import Stream
from ddpm_fast.seeding import seed_tensor
from ddpm_fast.table import StepTable

NORMALS_AT_ONCE = 1 << 16  # on the PyTorch path: one call makes the noise of several steps


class Noise(Protocol):
    """A source of noise for a sampling loop.

    Attributes:
        in_kernel: Whether the step kernel makes the noise of the steps itself.
        seeds: The seeds that the kernel makes noise from, int64 [B] on the loop's device.
    """

    in_kernel: bool
    seeds: Tensor | None

    def begin(self) -> None:
        """Remember the state of the source at the start of a run."""

    def restart(self) -> None:
        """Return to the state at the start of the run."""

    def x_T(self) -> Tensor:
        """Draw the start of the run: [B, C, ...]."""

    def z(self, step: int) -> Tensor | None:
        """Draw the noise of step number `step`; steps are asked for in order.

        Returns:
            [B, C, ...], or None where the step has no noise or the kernel makes the noise.
        """


class PhiloxNoise:
    """Noise that depends on (seed, timestep, element) alone (kernels/philox.py).

    Args:
        seeds: One seed for each sample.
        shape: Shape of the batch, (B, C, ...).
        table: The rows of the run.
        device: Device of the noise.
        backend: "torch" makes the noise of several steps at a time. "triton" leaves the noise of the steps to the step
            kernel, so that `z` returns None.
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
        """Do nothing: no draw depends on an earlier draw."""

    def restart(self) -> None:
        """Do nothing: no draw depends on an earlier draw."""

    def x_T(self) -> Tensor:
        """Draw the start of the run: [B, C, ...]."""
        return normal(self._seeds, torch.zeros_like(self._seeds), Stream.X_T, self.shape[1:], backend=self.backend)

    def z(self, step: int) -> Tensor | None:
        """Return the noise of step number `step`, or None where there is none or the kernel makes the noise."""
        if self.in_kernel or not self._noisy[step]:
            return None
        if self._block is None or not 0 <= step - self._first < len(self._block):
            batch = self.shape[0]
            ids = self._ids[step : step + max(1, NORMALS_AT_ONCE // math.prod(self.shape))]
            seeds, ids = self._seeds.repeat(len(ids)), ids.repeat_interleave(batch)
            flat = normal(seeds, ids, Stream.STEP, self.shape[1:], backend=self.backend)
            self._first, self._block = step, flat.unflatten(0, (-1, batch))
        return self._block[step - self._first]


class GeneratorNoise:
    """Noise of torch.randn in the order of a plain sampling loop: x_T, then one draw at every step of `table.draws`.

    Args:
        generator: One generator for the batch, or a list with one for each sample. Each draws on its own device; a draw
            on a CPU is copied to a GPU, and the host waits for the copy. None takes torch's global generator of
            `device`.
        shape: Shape of the batch, (B, C, ...).
        table: The rows of the run.
        device: Device of the noise.
        dtype: Dtype of the draws. A plain loop draws in its network's dtype, which gives other numbers than float32.
        copies: Number of batches that the plain loop draws at once for z; the first batch is used.

    Raises:
        TypeError: There is something else than generators.
        ValueError: There are more or fewer generators than samples, or one is on another GPU.
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
        # On the generator's own device; one buffer for all draws spares the allocations.
        self._drawn: Tensor | None = None

    def begin(self) -> None:
        """Remember the generators' states."""
        self._states = self._get_states()

    def restart(self) -> None:
        """Set the generators back to the states that `begin` remembered."""
        if self.generator is None:
            global_generator(self.device).set_state(self._states[0])
        for g, state in zip(self._generators(), self._states, strict=False):
            g.set_state(state)

    def x_T(self) -> Tensor:
        """Draw the start of the run: [B, C, ...]."""
        return self._draw(self._empty(1))

    def z(self, step: int) -> Tensor | None:
        """Return the noise of step number `step`, None where nothing is drawn; the next draw overwrites it."""
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
        """Draw into z and return its first batch as float32 on the device of the run."""
        if isinstance(self.generator, Sequence):
            rows = (torch.randn(z[:1].shape, generator=g, device=g.device, dtype=self.dtype) for g in self.generator)
            return torch.cat([row.to(self.device, torch.float32) for row in rows])
        z.normal_(generator=self.generator)
        batch = self.shape[0]
        return (z if len(z) == batch else z[:batch]).to(self.device, torch.float32)
