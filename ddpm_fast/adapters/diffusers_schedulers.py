"""diffusers' DDPM and DDIM schedulers, with `step` in one kernel on CUDA.

    pipe.scheduler = accelerate(pipe.scheduler)     # of any pipeline

`step` is diffusers' own, bit for bit, on a CPU, where a gradient is wanted, and for a configuration that has no table.
"""

import logging
from typing import Any

import torch
from diffusers import DDIMScheduler, DDPMScheduler
from diffusers.schedulers.scheduling_ddim import DDIMSchedulerOutput
from diffusers.schedulers.scheduling_ddpm import DDPMSchedulerOutput
from diffusers.schedulers.scheduling_utils import SchedulerMixin  # diffusers looks for it in the module of a scheduler
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from ddpm_fast.adapters.diffusers_tables import clipping_of, table_of
from ddpm_fast.kernels.step import step
from ddpm_fast.kernels.threshold import threshold_bound

logger = logging.getLogger("ddpm_fast")

__all__ = ["FastDDIMScheduler", "FastDDPMScheduler", "SchedulerMixin"]


class _Rows:
    """A scheduler's table on a device.

    Attributes:
        exists: Whether the row's timestep is one of the schedule: the others are left to diffusers.
        positions: The row of every timestep.
        draws: Whether diffusers draws noise, by row.
    """

    def __init__(self, scheduler: Any, device: torch.device, **options: Any) -> None:
        table = table_of(scheduler, **options, only_valid=False)
        exists = [t < len(scheduler.alphas_cumprod) for t in scheduler.timesteps.tolist()]
        self.exists = exists
        self.coefficients, self.ids = table.coefficients(device), table.ids(device)
        self.positions = {t: row for row, t in enumerate(table.timestep.tolist()) if exists[row]}
        self.draws = table.draws.tolist()
        self.learned = table.learned
        self.use_output = bool((table.c_out != 0).any())
        self._first: Tensor | None = None

    def first(self, batch: int) -> Tensor:
        """Return the first row for every sample of a batch, int32 [B]."""
        if self._first is None or len(self._first) != batch:
            self._first = torch.zeros(batch, dtype=torch.int32, device=self.ids.device)
        return self._first


class _Fused:
    """A fused step for any of the schedulers."""

    _backend: str | None = None  # a chosen backend is used on a CPU as well
    _cached: tuple[tuple[Any, ...], _Rows | None] | None = None  # the rows, and what they were made from

    def _fuses(self, model_output: Tensor, sample: Tensor) -> bool:
        wants_gradient = torch.is_grad_enabled() and (model_output.requires_grad or sample.requires_grad)
        floats = sample.dtype != torch.float64 and model_output.dtype != torch.float64
        return (sample.is_cuda or self._backend is not None) and floats and not wants_gradient

    def _rows(self, device: torch.device, **options: Any) -> _Rows | None:
        """Return the table of the scheduler as it is now; None for a configuration that is left to diffusers."""
        key = (self.timesteps, self.alphas_cumprod, device, *options.values())  # type: ignore[attr-defined]
        if self._cached is None or not all(map(_same, self._cached[0], key)):
            try:
                rows = _Rows(self, device, **options)
            except ValueError as reason:
                logger.info("%s is left to diffusers: %s", type(self).__name__, reason)
                rows = None
            self._cached = key, rows
        return self._cached[1]

    def _row(self, rows: _Rows | None, timestep: Any) -> int | None:
        """Return the row of a timestep.

        The row of an element of `timesteps` follows from its place in memory, so that the host does not wait.
        """
        if rows is None:
            return None
        timesteps: Tensor = self.timesteps  # type: ignore[attr-defined]
        if isinstance(timestep, Tensor) and timestep.numel() == 1:
            if timestep.untyped_storage().data_ptr() == timesteps.untyped_storage().data_ptr():
                row = (timestep.storage_offset() - timesteps.storage_offset()) // timesteps.stride(0)
                return row if rows.exists[row] else None
            timestep = timestep.item()
        return rows.positions.get(timestep) if isinstance(timestep, int) else None

    def _fused(self, rows: _Rows, row: int, model_output: Tensor, sample: Tensor, z: Tensor | None) -> list[Tensor]:
        """Return x_{t-1} and the x0 prediction, in the dtype of diffusers' results."""
        x = sample.to(torch.float32).contiguous()
        base = rows.first(len(x))
        clipping = clipping_of(self)
        bound = None
        if clipping.ratio is not None:
            bound = threshold_bound(
                x, model_output, rows.coefficients, base, row, ratio=clipping.ratio, max_value=clipping.max_value,
                backend=self._backend,
            )  # fmt: skip
        x0 = torch.empty_like(x)
        x_new = step(
            x, model_output, rows.coefficients, rows.ids, base, row, z=z, clip=clipping.limit, bound=bound,
            learned=rows.learned, use_output=rows.use_output, x_new=torch.empty_like(x), x0_new=x0,
            backend=self._backend,
        )  # fmt: skip
        dtype = torch.promote_types(sample.dtype, model_output.dtype)
        return [x_new.to(dtype), x0.to(dtype)]


class FastDDPMScheduler(_Fused, DDPMScheduler):
    """A DDPMScheduler with a fused `step`; same configuration, same files."""

    def step(
        self,
        model_output: Tensor,
        timestep: int,
        sample: Tensor,
        generator: torch.Generator | None = None,
        return_dict: bool = True,
    ) -> DDPMSchedulerOutput | tuple[Tensor, Tensor]:
        """Take the step of DDPMScheduler, x_t → x_{t-1}: same arguments, same noise, same results up to rounding."""
        if not self._fuses(model_output, sample):
            return super().step(model_output, timestep, sample, generator, return_dict)
        rows = self._rows(sample.device)
        row = self._row(rows, timestep)
        if rows is None or row is None:
            return super().step(model_output, timestep, sample, generator, return_dict)
        z = _draw(sample.shape, generator, model_output) if rows.draws[row] else None
        x_new, x0 = self._fused(rows, row, model_output, sample, z)
        return DDPMSchedulerOutput(prev_sample=x_new, pred_original_sample=x0) if return_dict else (x_new, x0)


class FastDDIMScheduler(_Fused, DDIMScheduler):
    """A DDIMScheduler with a fused `step`; same configuration, same files."""

    def step(
        self,
        model_output: Tensor,
        timestep: int,
        sample: Tensor,
        eta: float = 0.0,
        use_clipped_model_output: bool = False,
        generator: torch.Generator | None = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
    ) -> DDIMSchedulerOutput | tuple[Tensor, Tensor]:
        """Take the step of DDIMScheduler, x_t → x_s: same arguments, same noise, same results up to rounding."""
        fuses = self.num_inference_steps is not None and self._fuses(model_output, sample)
        contradiction = eta > 0 and variance_noise is not None and generator is not None  # diffusers raises an error
        rows = self._rows(sample.device, eta=float(eta), use_clipped_model_output=bool(use_clipped_model_output)) \
            if fuses and not contradiction else None  # fmt: skip
        row = None if rows is None else self._row(rows, timestep)
        if rows is None or row is None:
            return super().step(
                model_output, timestep, sample, eta, use_clipped_model_output, generator, variance_noise, return_dict
            )
        z = None
        if eta > 0:
            if variance_noise is None:
                z = _draw(sample.shape, generator, model_output)
            else:
                z = variance_noise.to(torch.float32).contiguous()
        x_new, x0 = self._fused(rows, row, model_output, sample, z)
        return DDIMSchedulerOutput(prev_sample=x_new, pred_original_sample=x0) if return_dict else (x_new, x0)


def _draw(shape: torch.Size, generator: Any, like: Tensor) -> Tensor:
    """Draw noise as diffusers does, in the network's dtype, and return the draw in float32 for the kernel."""
    z: Tensor = randn_tensor(shape, generator=generator, device=like.device, dtype=like.dtype)
    return z.to(torch.float32)


def _same(old: Any, new: Any) -> bool:
    return old is new or (not isinstance(old, Tensor) and not isinstance(new, Tensor) and old == new)
