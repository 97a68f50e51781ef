"""Where a walk's noise comes from: Philox, keyed by each sample's seed, or torch generators in torch's own order."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ddpm_fast.kernels.normal import normal
from ddpm_fast.kernels.philox import Stream
from ddpm_fast.seeding import seed_tensor
from ddpm_fast.table import StepTable

AHEAD = 1 << 16  # normals made at a time on the PyTorch path: one call serves several steps


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
        self.seeds = seed_tensor(seeds).to(device)
        self.shape = shape
        self.backend = backend
        self.in_kernel = backend == "triton"
        self._ids = torch.from_numpy(table.noise_id).to(device)
        self._noisy = (table.sigma != 0).tolist()
        self._first = 0
        self._block: Tensor | None = None

    def restart(self) -> None:
        """Go back to the first draw: nothing to do, no draw depends on another."""

    def x_T(self) -> Tensor:
        """The start of the walk: [B, C, ...]."""
        return normal(self.seeds, torch.zeros_like(self.seeds), Stream.X_T, self.shape[1:], backend=self.backend)

    def z(self, step: int) -> Tensor | None:
        """The noise of step number `step`, or None where there is none or the kernel makes it."""
        if self.in_kernel or not self._noisy[step]:
            return None
        if self._block is None or not 0 <= step - self._first < len(self._block):
            batch = self.shape[0]
            ids = self._ids[step : step + max(1, AHEAD // math.prod(self.shape))]
            seeds, ids = self.seeds.repeat(len(ids)), ids.repeat_interleave(batch)
            flat = normal(seeds, ids, Stream.STEP, self.shape[1:], backend=self.backend)
            self._first, self._block = step, flat.unflatten(0, (-1, batch))
        return self._block[step - self._first]


class GeneratorNoise:
    """torch.randn in the order of a plain sampling loop: x_T first, then one draw a step where sigma is not 0.

    Args:
        generator: one for the batch, or a list with one a sample; each draws on its own device. From a CPU to a GPU
            every draw is copied, and the host waits for it: seeds do without.
    """

    in_kernel = False
    seeds = None

    def __init__(
        self,
        generator: torch.Generator | Sequence[torch.Generator],
        shape: tuple[int, ...],
        table: StepTable,
        device: torch.device,
    ) -> None:
        if not isinstance(generator, torch.Generator):
            if not isinstance(generator, Sequence) or not all(isinstance(g, torch.Generator) for g in generator):
                raise TypeError(f"generator must be a torch.Generator or a list with one a sample, got {generator!r}")
            if len(generator) != shape[0]:
                raise ValueError(f"generators must be one a sample: {shape[0]} samples, got {len(generator)}")
        self.generator = generator
        self.shape = shape
        self.device = device
        self._noisy = (table.sigma != 0).tolist()
        self._states = [g.get_state() for g in self._generators()]

    def restart(self) -> None:
        """Go back to the first draw."""
        for g, state in zip(self._generators(), self._states, strict=True):
            g.set_state(state)

    def x_T(self) -> Tensor:
        """The start of the walk: [B, C, ...]."""
        return self._draw()

    def z(self, step: int) -> Tensor | None:
        """The noise of step number `step`, or None where sigma is 0."""
        return self._draw() if self._noisy[step] else None

    def _generators(self) -> list[torch.Generator]:
        return [self.generator] if isinstance(self.generator, torch.Generator) else list(self.generator)

    def _draw(self) -> Tensor:
        if isinstance(self.generator, torch.Generator):
            return torch.randn(self.shape, generator=self.generator, device=self.generator.device).to(self.device)
        rows = [torch.randn((1, *self.shape[1:]), generator=g, device=g.device) for g in self.generator]
        return torch.cat([row.to(self.device) for row in rows])
