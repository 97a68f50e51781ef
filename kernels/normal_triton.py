"""The kernel behind `normal`."""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ddpm_fast.kernels.dispatch import ptx, warps
from ddpm_fast.kernels.launch_triton import launch
from ddpm_fast.kernels.philox import quarter
from ddpm_fast.kernels.philox_triton import polar4
from ddpm_fast.kernels.tile_triton import BLOCK, PARTS, block_start, grid, lanes, sample_index


@triton.jit(do_not_specialize=["stream", "samples"])
def normal_kernel(
    z_ptr, seeds_ptr, ids_ptr, visits_ptr, stream, samples, n, q, PTX: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    i_sample = sample_index()
    if i_sample >= samples:
        return
    seed = tl.load(seeds_ptr + i_sample)
    noise_id = tl.load(ids_ptr + i_sample)
    visit = tl.load(visits_ptr + i_sample)
    p_sample = z_ptr + i_sample.to(tl.int64) * n
    for part in tl.static_range(PARTS):
        start = block_start(part, BLOCK)
        if start < q:
            j = start + tl.arange(0, BLOCK)
            begins, masks = lanes(j, n, q)
            radii, directions = polar4(seed, j, noise_id, stream, visit, 1.0, PTX)
            for lane in tl.static_range(4):
                tl.store(p_sample + begins[lane] + j, radii[lane] * directions[lane], mask=masks[lane])


def normal_triton(
    seeds: Tensor, noise_ids: Tensor, stream: int, shape: tuple[int, ...], *, visit: Tensor | int = 0
) -> Tensor:
    """Launch `normal_kernel`; the contract is `kernels.normal.normal`."""
    n = math.prod(shape)
    z = torch.empty(len(seeds), *shape, dtype=torch.float32, device=seeds.device)
    ids = noise_ids.to(torch.int32)
    visits = visit.to(torch.int32).contiguous() if isinstance(visit, Tensor) else torch.full_like(ids, visit)
    launch(
        normal_kernel, grid(len(seeds), n), (z, seeds, ids, visits), (int(stream), len(seeds), n, quarter(n)),
        PTX=ptx(), BLOCK=BLOCK, num_warps=warps(),
    )  # fmt: skip
    return z
