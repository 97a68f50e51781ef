"""Standard normal noise keyed by (seed, noise id, stream, visit)."""

import torch
from torch import Tensor

from ddpm_fast.kernels import philox
from ddpm_fast.kernels.checks import check_seeds
from ddpm_fast.kernels.dispatch import choose_backend


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
        seeds: int64 [M], the 64 bits of each sample's seed.
        noise_ids: int32 or int64 [M].
        stream: a `philox.Stream`.
        shape: of one sample.
        visit: int, or integers [M].
        backend: "triton" or "torch"; None chooses by device.
    """
    check_seeds(seeds, len(noise_ids), seeds.device)
    if choose_backend(seeds.device, backend) == "torch":
        return normal_torch(seeds, noise_ids, stream, shape, visit=visit)
    from ddpm_fast.kernels.normal_triton import normal_triton

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
    """The PyTorch twin of `normal`; float64 on request."""
    n = 1
    for size in shape:
        n *= size
    return philox.normals(seeds, noise_ids, stream, n, visit, dtype).unflatten(1, shape)
