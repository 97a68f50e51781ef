"""The kernel behind `q_sample` and `q_step`."""

import triton
import triton.language as tl
from torch import Tensor

from ddpm_fast.kernels.dispatch import ptx, warps
from ddpm_fast.kernels.launch_triton import launch
from ddpm_fast.kernels.philox import quarter
from ddpm_fast.kernels.philox_triton import polar4, tie
from ddpm_fast.kernels.tile_triton import BLOCK, PARTS, block_start, grid, lanes, load4, sample_index


@triton.jit(do_not_specialize=["visit", "batch"])
def q_sample_kernel(
    x_ptr, t_ptr, alphas_ptr, seeds_ptr, z_ptr, new_ptr, visit, batch, n, q,
    STREAM: tl.constexpr,  # of the noise; None reads it from z_ptr
    PTX: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    i_sample = sample_index()
    if i_sample >= batch:
        return
    t = tl.load(t_ptr + i_sample)
    alpha = tl.load(alphas_ptr + t)  # float64: 1 - alpha cancels near t = 0
    signal = tl.sqrt(alpha).to(tl.float32)
    noise = tl.sqrt(1 - alpha).to(tl.float32)
    if STREAM is not None:
        seed = tl.load(seeds_ptr + i_sample)
    o_sample = i_sample.to(tl.int64) * n
    for part in tl.static_range(PARTS):
        start = block_start(part, BLOCK)
        if start < q:
            j = start + tl.arange(0, BLOCK)
            begins, masks = lanes(j, n, q)
            xs = load4(x_ptr + o_sample, begins, j, masks)
            if STREAM is None:
                zs = load4(z_ptr + o_sample, begins, j, masks)
            else:
                radii, directions = polar4(seed, tie(j, xs[0]), t.to(tl.int32), STREAM, visit, noise, PTX)
            for lane in tl.static_range(4):
                new = signal * xs[lane]
                if STREAM is None:
                    new += noise * zs[lane]
                else:
                    new += radii[lane] * directions[lane]
                tl.store(new_ptr + o_sample + begins[lane] + j, new, mask=masks[lane])


def q_sample_triton(
    x: Tensor,
    t: Tensor,
    alphas: Tensor,
    stream: int,
    *,
    seeds: Tensor | None = None,
    z: Tensor | None = None,
    visit: int = 0,
    x_t: Tensor,
) -> Tensor:
    """Launch `q_sample_kernel`; the contract is `kernels.q_sample.q_sample_torch`."""
    n = x[0].numel()
    launch(
        q_sample_kernel, grid(len(x), n), (x, t, alphas, seeds, z, x_t), (visit, len(x), n, quarter(n)),
        STREAM=None if seeds is None else int(stream), PTX=ptx(), BLOCK=BLOCK, num_warps=warps(),
    )  # fmt: skip
    return x_t
