"""The kernel behind `step`."""

import triton
import triton.language as tl
from torch import Tensor

from ddpm_fast.kernels.philox import Stream, quarter
from ddpm_fast.kernels.philox_triton import normals4, pick_lane

BLOCK, WARPS = 256, 2  # four elements a thread: 16 bytes an access
STREAM = tl.constexpr(int(Stream.STEP))


# Counts that change from launch to launch are no reason to compile again; and a 1, compiled in, has no dtype to widen.
@triton.jit(do_not_specialize=["offset", "steps", "visit", "batch"])
def step_kernel(
    x_ptr, output_ptr, z_ptr, coefficients_ptr, ids_ptr, base_ptr, seeds_ptr, bound_ptr, guidance_ptr,
    new_ptr, x0_ptr, input_ptr, timestep_ptr,
    clip, offset, steps, visit, batch, n, q, output_stride,
    NOISE: tl.constexpr,  # "none", "philox" or "tensor"
    CLIP: tl.constexpr,  # "none", "fixed" or "bound"
    USE_OUTPUT: tl.constexpr,
    LEARNED: tl.constexpr,
    GUIDED: tl.constexpr,
    WRITE_X0: tl.constexpr,
    WRITE_INPUT: tl.constexpr,
    WRITE_TIMESTEP: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One program takes BLOCK counters of one sample: four runs of BLOCK elements, a quarter of the sample apart."""
    blocks = tl.cdiv(q, BLOCK)
    i_sample = tl.program_id(0) // blocks
    i_block = tl.program_id(0) % blocks
    j = i_block * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(base_ptr + i_sample) + offset
    m_row = (row >= 0) & (row < steps)
    row = tl.where(m_row, row, 0)

    p_row = coefficients_ptr + row * 8
    a = tl.load(p_row)
    b = tl.load(p_row + 1)
    c_x0 = tl.load(p_row + 2)
    c_x = tl.load(p_row + 3)
    c_out = tl.load(p_row + 4)
    sigma = tl.load(p_row + 5)

    if NOISE == "philox":
        z0, z1, z2, z3 = normals4(tl.load(seeds_ptr + i_sample), j, tl.load(ids_ptr + row * 2 + 1), STREAM, visit)
    if GUIDED:
        scale = tl.load(guidance_ptr + i_sample)
    if CLIP == "bound":
        limit = tl.load(bound_ptr + i_sample)
    if CLIP == "fixed":
        limit = clip
    o_sample = i_sample.to(tl.int64) * n
    p_output = output_ptr + i_sample.to(tl.int64) * output_stride
    o_twin = batch.to(tl.int64) * output_stride

    for lane in tl.static_range(4):
        e = lane * q.to(tl.int64) + j
        mask = m_row & (j < q) & (e < n)
        x = tl.load(x_ptr + o_sample + e, mask=mask)
        out = tl.load(p_output + e, mask=mask).to(tl.float32)
        if GUIDED:
            unconditional = tl.load(p_output + o_twin + e, mask=mask).to(tl.float32)
            out = unconditional + scale * (out - unconditional)
        x0 = a * x + b * out
        if CLIP != "none":
            # Written so that NaN stays NaN: a comparison with it is false.
            x0 = tl.where(x0 > limit, limit, tl.where(x0 < -limit, -limit, x0))
        if CLIP == "bound":
            x0 = x0 / limit
        if WRITE_X0:
            tl.store(x0_ptr + o_sample + e, x0, mask=mask)
        new = c_x0 * x0 + c_x * x
        if USE_OUTPUT:
            new += c_out * out
        if NOISE != "none":
            deviation = sigma
            if LEARNED:
                log_min = tl.load(p_row + 6)
                log_max = tl.load(p_row + 7)
                share = 0.5 * (tl.load(p_output + n + e, mask=mask).to(tl.float32) + 1)
                deviation = sigma * tl.exp(0.5 * (log_min + share * (log_max - log_min)))
                deviation = tl.where(sigma == 0, 0.0, deviation)  # no noise is no noise, whatever the network says
            if NOISE == "philox":
                new += deviation * pick_lane(lane, z0, z1, z2, z3)
            else:
                new += deviation * tl.load(z_ptr + o_sample + e, mask=mask)
        tl.store(new_ptr + o_sample + e, new, mask=mask)
        if WRITE_INPUT:
            tl.store(input_ptr + o_sample + e, new.to(input_ptr.dtype.element_ty), mask=mask)
            if GUIDED:
                o_half = batch.to(tl.int64) * n
                tl.store(input_ptr + o_half + o_sample + e, new.to(input_ptr.dtype.element_ty), mask=mask)

    if WRITE_TIMESTEP:
        if (i_block == 0) & m_row:
            following = tl.load(ids_ptr + tl.minimum(row + 1, steps - 1) * 2).to(tl.int64)
            tl.store(timestep_ptr + i_sample, following)
            if GUIDED:
                tl.store(timestep_ptr + batch + i_sample, following)


def step_triton(
    x: Tensor,
    output: Tensor,
    coefficients: Tensor,
    ids: Tensor,
    base: Tensor,
    offset: int = 0,
    *,
    seeds: Tensor | None = None,
    z: Tensor | None = None,
    visit: int = 0,
    clip: float | None = None,
    bound: Tensor | None = None,
    guidance: Tensor | None = None,
    learned: bool = False,
    use_output: bool = True,
    x_new: Tensor,
    x0_new: Tensor | None = None,
    model_input: Tensor | None = None,
    timestep: Tensor | None = None,
) -> Tensor:
    """Launch `step_kernel`; the contract is `kernels.step.step`."""
    batch, n = len(x), x[0].numel()
    q = quarter(n)
    output = output.contiguous()  # a network that answers in channels_last costs a copy here
    noise = "philox" if seeds is not None else "tensor" if z is not None else "none"
    limit = "bound" if bound is not None else "fixed" if clip is not None else "none"
    step_kernel[(batch * triton.cdiv(q, BLOCK),)](
        x, output, z, coefficients, ids, base, seeds, bound, guidance,
        x_new, x0_new, model_input, timestep,
        float(clip or 0.0), offset, len(coefficients), visit, batch, n, q, output.stride(0),
        NOISE=noise, CLIP=limit, USE_OUTPUT=use_output, LEARNED=learned, GUIDED=guidance is not None,
        WRITE_X0=x0_new is not None, WRITE_INPUT=model_input is not None,
        WRITE_TIMESTEP=timestep is not None, BLOCK=BLOCK, num_warps=WARPS,
    )  # fmt: skip
    return x_new
