"""Standard normal noise keyed by (seed, noise id, stream, visit)."""

import math

import torch
from torch import Tensor

from ddpm_fast.kernels import philox
from ddpm_fast.kernels.checks import check_seeds, check_tensor, check_visit
from ddpm_fast.kernels.dispatch import choose_backend, on_device


def normal(
    seeds: Tensor,
    noise_ids: Tensor,
    stream: int,
    shape: tuple[int, ...],
    *,
    visit: Tensor | int = 0,
    backend: str | None = None,
) -> Tensor:
    """Draw z ~ N(0, I) for M samples: float32 [M, *shape]; `philox.py` is the specification.

    Args:
        seeds: The 64 bits of each sample's seed, int64 [M].
        noise_ids: Noise ids, int32 or int64 [M].
        stream: A `philox.Stream`.
        shape: Shape of one sample; () for a single number.
        visit: Fourth word of the counter: an int in [0, 2^31), or int32 or int64 [M].
        backend: "triton" or "torch"; None chooses by device.

    Raises:
        ValueError: A tensor has the wrong shape, dtype or device, or there is nothing to draw.
    """
    check_seeds(seeds, len(noise_ids), seeds.device)
    check_tensor("noise_ids", noise_ids, (len(noise_ids),), (torch.int32, torch.int64), seeds.device)
    if isinstance(visit, Tensor):
        check_tensor("visit", visit, (len(seeds),), (torch.int32, torch.int64), seeds.device)
    else:
        check_visit(visit)
    if len(seeds) == 0 or math.prod(shape) == 0:
        raise ValueError(f"there must be something to draw, got {len(seeds)} seeds and shape {tuple(shape)}")
    seeds, noise_ids = seeds.contiguous(), noise_ids.contiguous()
    if choose_backend(seeds.device, backend) == "torch":
        return normal_torch(seeds, noise_ids, stream, shape, visit=visit)
    from ddpm_fast.kernels.normal_triton import normal_triton

    with on_device(seeds.device):
        return normal_triton(seeds, noise_ids, stream, shape, visit=visit)


def normal_torch(
    seeds: Tensor,
    noise_ids: Tensor,
    stream: int,
    shape: tuple[int, ...],
    *,
    visit: Tensor | int = 0,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Draw on PyTorch: the twin of `normal`, in float64 on request."""
    flat = philox.normals(seeds, noise_ids, stream, math.prod(shape), visit, dtype)
    return flat.view(len(seeds), *shape)
