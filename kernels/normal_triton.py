"""The kernel behind `normal`."""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ddpm_fast.kernels.philox import quarter
from ddpm_fast.kernels.philox_triton import normals4, pick_lane

BLOCK, WARPS = 256, 2  # four elements a thread: 16 bytes an access


@triton.jit(do_not_specialize=["stream"])
def normal_kernel(z_ptr, seeds_ptr, ids_ptr, visits_ptr, stream, n, q, BLOCK: tl.constexpr):
    blocks = tl.cdiv(q, BLOCK)
    i_sample = tl.program_id(0) // blocks
    j = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    seed = tl.load(seeds_ptr + i_sample)
    z0, z1, z2, z3 = normals4(seed, j, tl.load(ids_ptr + i_sample), stream, tl.load(visits_ptr + i_sample))
    for lane in tl.static_range(4):
        e = lane * q.to(tl.int64) + j
        tl.store(z_ptr + i_sample.to(tl.int64) * n + e, pick_lane(lane, z0, z1, z2, z3), mask=(j < q) & (e < n))


def normal_triton(
    seeds: Tensor, noise_ids: Tensor, stream: int, shape: tuple[int, ...], *, visit: Tensor | int = 0
) -> Tensor:
    """Launch `normal_kernel`; the contract is `kernels.normal.normal`."""
    n = math.prod(shape)
    q = quarter(n)
    z = torch.empty(len(seeds), *shape, dtype=torch.float32, device=seeds.device)
    ids = noise_ids.to(torch.int32)
    visits = visit.to(torch.int32).contiguous() if isinstance(visit, Tensor) else torch.full_like(ids, visit)
    programs = len(seeds) * triton.cdiv(q, BLOCK)
    normal_kernel[(programs,)](z, seeds, ids, visits, int(stream), n, q, BLOCK=BLOCK, num_warps=WARPS)
    return z
