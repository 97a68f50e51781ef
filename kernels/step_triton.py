"""The kernel behind `step`."""

from typing import TYPE_CHECKING, Any

import triton
import triton.language as tl
from torch import Tensor

from ddpm_fast.kernels.dispatch import ptx, warps
from ddpm_fast.kernels.launch_triton import Compiled, addresses_of, launch
from ddpm_fast.kernels.layout import with_layout
from ddpm_fast.kernels.philox import Stream, quarter
from ddpm_fast.kernels.philox_triton import polar4, tie
from ddpm_fast.kernels.rows_triton import COLUMNS, STEP, clip_form, guide, place4, predict_x0, to_float32
from ddpm_fast.kernels.step_options import StepOptions, with_defaults
from ddpm_fast.kernels.tile_triton import BLOCK, PARTS, block_start, grid, lanes, load4, sample_index

if TYPE_CHECKING:
    from typing_extensions import Unpack


INPAINT = tl.constexpr(int(Stream.INPAINT))
# The fourth word of the noise's counter. The kernel takes the word at run time: with a compiled-in 0 the compiler keeps
# too few registers and spills (sm_89 and sm_100, Triton 3.7.1).
ZERO = 0
HALF_LOG2_E = tl.constexpr(0.7213475204444817)


@triton.jit
def exp2(x, PTX: tl.constexpr):
    if PTX:
        return tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return tl.exp2(x)


# A count that changes from launch to launch must not compile the kernel again; and a 1 that is compiled in has no
# dtype.
@triton.jit(do_not_specialize=["offset", "steps", "visit", "batch"])
def step_kernel(
    x_ptr, output_ptr, z_ptr, coefficients_ptr, ids_ptr, base_ptr, seeds_ptr, bound_ptr, guidance_ptr,
    known_ptr, mask_ptr, new_ptr, x0_ptr, input_ptr, timestep_ptr,
    clip, offset, steps, visit, batch, n, q,  # visit: see ZERO
    pixels, output_batch, output_channel, output_pixel, output_variance, input_batch, input_channel, input_pixel,
    NOISE: tl.constexpr,  # "none", "philox" or "tensor"
    CLIP: tl.constexpr,  # "none", "fixed" or "bound"
    USE_OUTPUT: tl.constexpr,
    LEARNED: tl.constexpr,
    GUIDED: tl.constexpr,  # the conditional half of the output comes first
    INPAINT_KNOWN: tl.constexpr,
    WRITE_X0: tl.constexpr,
    WRITE_INPUT: tl.constexpr,
    WRITE_TIMESTEP: tl.constexpr,
    STRIDED_OUTPUT: tl.constexpr,  # not row-major: channels_last, for one
    STRIDED_INPUT: tl.constexpr,
    ONE_WRAP: tl.constexpr,  # a run of BLOCK elements meets one end of a channel at most
    PTX: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Take the step for PARTS blocks of counters of one sample, each four runs of BLOCK elements, a quarter apart."""
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
    if GUIDED:
        guidance = tl.load(guidance_ptr + i_sample)
    limit = clip
    if CLIP == "bound":
        limit = tl.load(bound_ptr + i_sample)
    following = tl.minimum(row + 1, steps - 1)
    if WRITE_TIMESTEP:
        if tl.program_id(0) == 0:
            timestep = tl.load(ids_ptr + following * 2).to(tl.int64)
            tl.store(timestep_ptr + i_sample, timestep)
            if GUIDED:
                tl.store(timestep_ptr + batch + i_sample, timestep)

    o_sample = i_sample.to(tl.int64) * n
    p_output = output_ptr + i_sample.to(tl.int64) * output_batch
    if GUIDED:
        p_unconditional = p_output + batch.to(tl.int64) * output_batch
    if WRITE_INPUT:
        p_input = input_ptr + i_sample.to(tl.int64) * input_batch
        p_input_twin = p_input + batch.to(tl.int64) * input_batch  # for the other half of a guided output

    for part in tl.static_range(PARTS):
        start = block_start(part, BLOCK)
        if start < q:
            j = start + tl.arange(0, BLOCK)
            begins, masks = lanes(j, n, q)
            # All loads come before the first store: a store would delay the next loads.
            xs = load4(x_ptr + o_sample, begins, j, masks)
            if STRIDED_OUTPUT:
                places = place4(begins, start, pixels, output_channel, output_pixel, ONE_WRAP, BLOCK)
                j_output = 0
            else:
                places = begins
                j_output = j
            outs = load4(p_output, places, j_output, masks)
            if GUIDED:
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
                if not GUIDED:
                    out = to_float32(outs[lane], PTX)
                else:
                    out = guide(outs[lane], unconditionals[lane], guidance, PTX)
                _, x0 = predict_x0(x, out, a, b, limit, CLIP)
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
                    rounded = new.to(input_ptr.dtype.element_ty)
                    if STRIDED_INPUT:
                        o_input = input_places[lane]
                    else:
                        o_input = begins[lane] + j
                    tl.store(p_input + o_input, rounded, mask=mask)
                    if GUIDED:
                        tl.store(p_input_twin + o_input, rounded, mask=mask)


def step_triton(
    x: Tensor,
    output: Tensor,
    coefficients: Tensor,
    ids: Tensor,
    base: Tensor,
    offset: int = 0,
    **options: "Unpack[StepOptions]",
) -> Tensor:
    """Launch `step_kernel`; the contract is `kernels.step.step`."""
    given: Any = with_defaults(options)
    clip, mask, target = given.clip, given.mask, given.model_input
    tensors = (
        x, output, given.z, coefficients, ids, base, given.seeds, given.bound, given.guidance, given.known, mask,
        given.x_new, given.x0_new, target, given.timestep,
    )  # fmt: skip
    form = (
        x.shape, x.get_device(), len(coefficients), output.shape, output.stride(), output.dtype,
        None if target is None else (target.stride(), target.dtype), None if mask is None else mask.dtype,
        given.z is None, given.seeds is None, given.bound is None, given.guidance is None, clip is None,
        given.x0_new is None, given.timestep is None, given.learned, given.use_output,
    )  # fmt: skip
    plan = _PLANS.get(form)
    if plan is not None:
        addresses, aligned = addresses_of(tensors)
        if aligned:
            run, tail = plan
            run(*addresses, clip or 0.0, offset, *tail)
            x_new: Tensor = given.x_new
            return x_new
    return _launch(x, output, tensors, offset, given, form)


_PLANS: dict[tuple[Any, ...], Compiled] = {}  # what follows clip and offset in a launch, by all that it depends on


def _launch(x: Tensor, output: Tensor, tensors: tuple[Any, ...], offset: int, given: Any, form: Any) -> Tensor:
    """Launch the first step of a form, and remember what steps of this form have in common."""
    batch, channels = x.shape[:2]
    n = x.numel() // batch
    laid_out, source = with_layout(output)
    target = None if given.model_input is None else with_layout(given.model_input)[1]
    noise = "tensor" if given.z is not None else "philox" if given.seeds is not None else "none"
    strided_output, strided_input = not source.row_major, target is not None and not target.row_major
    scalars = (
        float(given.clip or 0.0), offset, len(tensors[3]), ZERO, batch, n, quarter(n),
        source.pixels if strided_output or strided_input else None,
        source.batch,
        *((source.channel, source.pixel) if strided_output else (None, None)),
        channels * source.channel if given.learned else None,
        target.batch if target else None,
        *((target.channel, target.pixel) if target and strided_input else (None, None)),
    )  # fmt: skip
    compiled = launch(
        step_kernel, grid(batch, n), (x, laid_out, *tensors[2:]), scalars,
        NOISE=noise, CLIP=clip_form(given.clip, given.bound), USE_OUTPUT=given.use_output, LEARNED=given.learned,
        GUIDED=given.guidance is not None, INPAINT_KNOWN=given.known is not None, WRITE_X0=given.x0_new is not None,
        WRITE_INPUT=given.model_input is not None, WRITE_TIMESTEP=given.timestep is not None,
        STRIDED_OUTPUT=strided_output, STRIDED_INPUT=strided_input,
        ONE_WRAP=(strided_output or strided_input) and source.pixels >= BLOCK,
        PTX=ptx(), BLOCK=BLOCK, num_warps=warps(),
    )  # fmt: skip
    if compiled is not None and laid_out is output:
        _PLANS[form] = compiled[0], (*scalars[2:], *compiled[1])
    x_new: Tensor = given.x_new
    return x_new
