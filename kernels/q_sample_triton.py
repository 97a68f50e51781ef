"""The kernel behind `q_sample`."""

import triton
import triton.language as tl
from torch import Tensor

from ddpm_fast.kernels.philox import Stream, quarter
from ddpm_fast.kernels.philox_triton import normals4, pick_lane

BLOCK, WARPS = 256, 2  # four elements a thread: 16 bytes an access
STREAM = tl.constexpr(int(Stream.FORWARD))


@triton.jit(do_not_specialize=["visit"])
def q_sample_kernel(
    x0_ptr, t_ptr, alphas_cumprod_ptr, seeds_ptr, z_ptr, x_t_ptr, visit, n, q, PHILOX: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    blocks = tl.cdiv(q, BLOCK)
    i_sample = tl.program_id(0) // blocks
    j = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    t = tl.load(t_ptr + i_sample)
    alpha_bar = tl.load(alphas_cumprod_ptr + t)  # float64: 1 - alpha_bar cancels near t = 0
    signal = tl.sqrt(alpha_bar).to(tl.float32)
    noise = tl.sqrt(1 - alpha_bar).to(tl.float32)
    if PHILOX:
        z0, z1, z2, z3 = normals4(tl.load(seeds_ptr + i_sample), j, t.to(tl.int32), STREAM, visit)
    o_sample = i_sample.to(tl.int64) * n
    for lane in tl.static_range(4):
        e = lane * q.to(tl.int64) + j
        mask = (j < q) & (e < n)
        x_t = signal * tl.load(x0_ptr + o_sample + e, mask=mask)
        if PHILOX:
            x_t += noise * pick_lane(lane, z0, z1, z2, z3)
        else:
            x_t += noise * tl.load(z_ptr + o_sample + e, mask=mask)
        tl.store(x_t_ptr + o_sample + e, x_t, mask=mask)


def q_sample_triton(
    x0: Tensor,
    t: Tensor,
    alphas_cumprod: Tensor,
    *,
    seeds: Tensor | None = None,
    z: Tensor | None = None,
    visit: int = 0,
    x_t: Tensor,
) -> Tensor:
    """Launch `q_sample_kernel`; the contract is `kernels.q_sample.q_sample`."""
    n = x0[0].numel()
    q = quarter(n)
    q_sample_kernel[(len(x0) * triton.cdiv(q, BLOCK),)](
        x0, t, alphas_cumprod, seeds, z, x_t, visit, n, q, PHILOX=seeds is not None, BLOCK=BLOCK, num_warps=WARPS
    )
    return x_t
