"""The kernel behind `step`."""

import triton
import triton.language as tl
from torch import Tensor

from ddpm_fast.kernels.dispatch import ptx, warps
from ddpm_fast.kernels.layout import with_layout
from ddpm_fast.kernels.philox import Stream, quarter
from ddpm_fast.kernels.philox_triton import polar4, tie
from ddpm_fast.kernels.tile_triton import BLOCK, PARTS, block_start, grid, lanes, load4, sample_index

COLUMNS = tl.constexpr(11)
STEP = tl.constexpr(int(Stream.STEP))
INPAINT = tl.constexpr(int(Stream.INPAINT))
HALF_LOG2_E = tl.constexpr(0.7213475204444817)


@triton.jit
def to_float32(values, PTX: tl.constexpr):
    if PTX and values.dtype == tl.bfloat16:
        # Two at a time, an instruction each; Triton's own takes three for the pair.
        return tl.inline_asm_elementwise(
            "shl.b32 $0, $2, 16;\nand.b32 $1, $2, 0xffff0000;", "=r,=r,r", [values],
            dtype=tl.float32, is_pure=True, pack=2,
        )  # fmt: skip
    else:
        return values.to(tl.float32)


@triton.jit
def guide(out, unconditional, guidance, PTX: tl.constexpr):
    """The guided output, from both halves as the network stored them."""
    unconditional = to_float32(unconditional, PTX)
    return unconditional + guidance * (to_float32(out, PTX) - unconditional)


@triton.jit
def estimate(x, out, a, b, limit, CLIP: tl.constexpr):
    """The estimate of the origin, raw and clipped."""
    raw = a * x + b * out
    origin = raw
    if CLIP != "none":
        origin = tl.clamp(raw, -limit, limit, propagate_nan=tl.PropagateNan.ALL)
    if CLIP == "bound":
        origin = origin / limit
    return raw, origin


@triton.jit
def place(first, pixels, channel_stride, pixel_stride, ONE_WRAP: tl.constexpr, BLOCK: tl.constexpr):
    """Where the BLOCK elements from `first` on, row-major in a sample, lie in memory with these strides."""
    channel = first // pixels
    pixel = first - channel * pixels + tl.arange(0, BLOCK)
    if ONE_WRAP:
        wraps = (pixel >= pixels).to(tl.int32)
    else:
        wraps = pixel // pixels
    pixel -= wraps * pixels
    inner = wraps.to(tl.int64) * channel_stride + pixel.to(tl.int64) * pixel_stride
    return channel.to(tl.int64) * channel_stride + inner


@triton.jit
def place4(begins, start, pixels, channel_stride, pixel_stride, ONE_WRAP: tl.constexpr, BLOCK: tl.constexpr):
    """`place` for the four lanes of the block at counter `start`."""
    return (
        place(begins[0] + start, pixels, channel_stride, pixel_stride, ONE_WRAP, BLOCK),
        place(begins[1] + start, pixels, channel_stride, pixel_stride, ONE_WRAP, BLOCK),
        place(begins[2] + start, pixels, channel_stride, pixel_stride, ONE_WRAP, BLOCK),
        place(begins[3] + start, pixels, channel_stride, pixel_stride, ONE_WRAP, BLOCK),
    )


@triton.jit
def exp2(x, PTX: tl.constexpr):
    if PTX:
        return tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return tl.exp2(x)


# Counts that change from launch to launch are no reason to compile again; and a 1, compiled in, has no dtype to widen.
@triton.jit(do_not_specialize=["offset", "steps", "visit", "batch"])
def step_kernel(
    x_ptr, output_ptr, z_ptr, coefficients_ptr, ids_ptr, base_ptr, seeds_ptr, bound_ptr, guidance_ptr,
    known_ptr, mask_ptr, new_ptr, x0_ptr, input_ptr, timestep_ptr,
    clip, offset, steps, visit, batch, n, q,
    pixels, output_batch, output_channel, output_pixel, output_variance, input_batch, input_channel, input_pixel,
    NOISE: tl.constexpr,  # "none", "philox" or "tensor"
    CLIP: tl.constexpr,  # "none", "fixed" or "bound"
    USE_OUTPUT: tl.constexpr,
    LEARNED: tl.constexpr,
    GUIDED: tl.constexpr,  # "none", or the half of the output that comes first: "conditional" or "unconditional"
    INPAINT_KNOWN: tl.constexpr,
    WRITE_X0: tl.constexpr,
    WRITE_INPUT: tl.constexpr,
    SCALE_INPUT: tl.constexpr,
    WRITE_TIMESTEP: tl.constexpr,
    STRIDED_OUTPUT: tl.constexpr,  # not row-major: channels_last, for one
    STRIDED_INPUT: tl.constexpr,
    ONE_WRAP: tl.constexpr,  # a run of BLOCK elements meets one end of a channel at most
    PTX: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One program takes PARTS blocks of counters of one sample, each four runs of BLOCK elements, a quarter apart."""
    i_sample = sample_index()
    if i_sample >= batch:
        return
    row = tl.load(base_ptr + i_sample) + offset
    if (row < 0) | (row >= steps):
        return

    p_row = coefficients_ptr + row * COLUMNS
    a = tl.load(p_row)
    b = tl.load(p_row + 1)
    c_x0 = tl.load(p_row + 2)
    c_x = tl.load(p_row + 3)
    if USE_OUTPUT:
        c_out = tl.load(p_row + 4)
    if NOISE != "none":
        sigma = tl.load(p_row + 5)
    if LEARNED:
        # log2 of the standard deviation is middle + slope v
        log_min = tl.load(p_row + 6)
        log_max = tl.load(p_row + 7)
        middle = 0.5 * HALF_LOG2_E * (log_max + log_min)
        slope = 0.5 * HALF_LOG2_E * (log_max - log_min)
    if INPAINT_KNOWN:
        known_scale = tl.load(p_row + 8)
        known_sigma = tl.load(p_row + 9)
    if NOISE == "philox" or INPAINT_KNOWN:
        seed = tl.load(seeds_ptr + i_sample)
        noise_id = tl.load(ids_ptr + row * 2 + 1)
    if GUIDED != "none":
        guidance = tl.load(guidance_ptr + i_sample)
    limit = clip
    if CLIP == "bound":
        limit = tl.load(bound_ptr + i_sample)
    following = tl.minimum(row + 1, steps - 1)
    if SCALE_INPUT:
        input_scale = tl.load(coefficients_ptr + following * COLUMNS + 10)
    if WRITE_TIMESTEP:
        if tl.program_id(0) == 0:
            timestep = tl.load(ids_ptr + following * 2).to(tl.int64)
            tl.store(timestep_ptr + i_sample, timestep)
            if GUIDED != "none":
                tl.store(timestep_ptr + batch + i_sample, timestep)

    o_sample = i_sample.to(tl.int64) * n
    p_output = output_ptr + i_sample.to(tl.int64) * output_batch
    if GUIDED == "conditional":
        p_unconditional = p_output + batch.to(tl.int64) * output_batch
    if GUIDED == "unconditional":
        p_unconditional = p_output
        p_output += batch.to(tl.int64) * output_batch
    if WRITE_INPUT:
        p_input = input_ptr + i_sample.to(tl.int64) * input_batch
        p_input_twin = p_input + batch.to(tl.int64) * input_batch  # for the other half of a guided output

    for part in tl.static_range(PARTS):
        start = block_start(part, BLOCK)
        if start < q:
            j = start + tl.arange(0, BLOCK)
            begins, masks = lanes(j, n, q)
            # Everything that is read comes before anything that is written: a store would hold the next loads back.
            xs = load4(x_ptr + o_sample, begins, j, masks)
            if STRIDED_OUTPUT:
                places = place4(begins, start, pixels, output_channel, output_pixel, ONE_WRAP, BLOCK)
                j_output = 0
            else:
                places = begins
                j_output = j
            outs = load4(p_output, places, j_output, masks)
            if GUIDED != "none":
                unconditionals = load4(p_unconditional, places, j_output, masks)
            if LEARNED:
                variances = load4(p_output + output_variance, places, j_output, masks)
            if NOISE == "tensor":
                zs = load4(z_ptr + o_sample, begins, j, masks)
            if INPAINT_KNOWN:
                knowns = load4(known_ptr + o_sample, begins, j, masks)
                keeps = load4(mask_ptr + o_sample, begins, j, masks)

            if NOISE == "philox":
                radii, directions = polar4(seed, tie(j, xs[0]), noise_id, STEP, visit, sigma, PTX)
            if INPAINT_KNOWN:
                known_radii, known_directions = polar4(seed, tie(j, xs[0]), noise_id, INPAINT, visit, known_sigma, PTX)
            if STRIDED_INPUT:
                input_places = place4(begins, start, pixels, input_channel, input_pixel, ONE_WRAP, BLOCK)

            for lane in tl.static_range(4):
                mask = masks[lane]
                o_lane = o_sample + begins[lane]
                x = xs[lane]
                if GUIDED == "none":
                    out = to_float32(outs[lane], PTX)
                else:
                    out = guide(outs[lane], unconditionals[lane], guidance, PTX)
                _, x0 = estimate(x, out, a, b, limit, CLIP)
                if WRITE_X0:
                    tl.store(x0_ptr + o_lane + j, x0, mask=mask)
                new = c_x0 * x0 + c_x * x
                if USE_OUTPUT:
                    new += c_out * out
                if NOISE == "philox":
                    scale, z = radii[lane], directions[lane]
                if NOISE == "tensor":
                    scale, z = sigma, zs[lane]
                if NOISE != "none":
                    if LEARNED:
                        factor = exp2(middle + slope * to_float32(variances[lane], PTX), PTX)
                        scale *= tl.where(sigma == 0, 0.0, factor)  # no noise is no noise, whatever the network says
                    new += scale * z
                if INPAINT_KNOWN:
                    known = known_scale * knowns[lane] + known_radii[lane] * known_directions[lane]
                    keep = keeps[lane].to(tl.float32)
                    new = keep * known + (1 - keep) * new
                tl.store(new_ptr + o_lane + j, new, mask=mask)
                if WRITE_INPUT:
                    if SCALE_INPUT:
                        new *= input_scale
                    rounded = new.to(input_ptr.dtype.element_ty)
                    if STRIDED_INPUT:
                        o_input = input_places[lane]
                    else:
                        o_input = begins[lane] + j
                    tl.store(p_input + o_input, rounded, mask=mask)
                    if GUIDED != "none":
                        tl.store(p_input_twin + o_input, rounded, mask=mask)


def clip_form(clip: float | None, bound: Tensor | None) -> str:
    """The CLIP of a kernel."""
    return "bound" if bound is not None else "fixed" if clip is not None else "none"


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
    conditional_first: bool = True,
    learned: bool = False,
    use_output: bool = True,
    known: Tensor | None = None,
    mask: Tensor | None = None,
    x_new: Tensor,
    x0_new: Tensor | None = None,
    model_input: Tensor | None = None,
    scale_input: bool = False,
    timestep: Tensor | None = None,
) -> Tensor:
    """Launch `step_kernel`; the contract is `kernels.step.step`."""
    batch, channels = x.shape[:2]
    n = x[0].numel()
    output, source = with_layout(output)
    target = None if model_input is None else with_layout(model_input)[1]
    noise = "tensor" if z is not None else "philox" if seeds is not None else "none"
    order = "none" if guidance is None else "conditional" if conditional_first else "unconditional"
    strided_output, strided_input = not source.row_major, target is not None and not target.row_major
    step_kernel[grid(batch, n)](
        x, output, z, coefficients, ids, base, seeds, bound, guidance, known, mask,
        x_new, x0_new, model_input, timestep,
        float(clip or 0.0), offset, len(coefficients), visit, batch, n, quarter(n),
        source.pixels if strided_output or strided_input else None,
        source.batch,
        *((source.channel, source.pixel) if strided_output else (None, None)),
        channels * source.channel if learned else None,
        target.batch if target else None,
        *((target.channel, target.pixel) if target and strided_input else (None, None)),
        NOISE=noise, CLIP=clip_form(clip, bound), USE_OUTPUT=use_output, LEARNED=learned, GUIDED=order,
        INPAINT_KNOWN=known is not None, WRITE_X0=x0_new is not None, WRITE_INPUT=model_input is not None,
        SCALE_INPUT=scale_input, WRITE_TIMESTEP=timestep is not None,
        STRIDED_OUTPUT=strided_output, STRIDED_INPUT=strided_input,
        ONE_WRAP=(strided_output or strided_input) and source.pixels >= BLOCK,
        PTX=ptx(), BLOCK=BLOCK, num_warps=warps(),
    )  # fmt: skip
    return x_new
