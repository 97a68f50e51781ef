"""The kernels behind a round of speculative sampling; `kernels.speculate` is their contract."""

import triton
import triton.language as tl
from torch import Tensor

from ddpm_fast.kernels.dispatch import ptx, warps
from ddpm_fast.kernels.launch_triton import launch
from ddpm_fast.kernels.layout import with_layout
from ddpm_fast.kernels.philox import quarter
from ddpm_fast.kernels.philox_triton import polar4, tie
from ddpm_fast.kernels.rounds import Outcome, Position
from ddpm_fast.kernels.rows_triton import COLUMNS, STEP, clip_form, guide, predict_x0, to_float32
from ddpm_fast.kernels.tile_triton import BLOCK, PARTS, block_start, grid, lanes, load4, sample_index

POSITION = tl.constexpr(len(Position))
ROW = tl.constexpr(int(Position.ROW))
START = tl.constexpr(int(Position.START))
EVALUATED = tl.constexpr(int(Position.EVALUATED))
TAKEN = tl.constexpr(int(Position.TAKEN))
OUTCOME = tl.constexpr(int(Position.OUTCOME))
ACCEPTED = tl.constexpr(int(Outcome.ACCEPTED))
REJECTED = tl.constexpr(int(Outcome.REJECTED))
PLAIN = tl.constexpr(int(Outcome.PLAIN))
DONE = tl.constexpr(int(Outcome.DONE))


@triton.jit
def window_count(windows_ptr, row, steps, WIDTH: tl.constexpr):
    """Return the number of drafts of a round that begins in `row`; 0 past the end."""
    window = tl.load(windows_ptr + tl.minimum(row, steps - 1))
    return tl.minimum(tl.minimum(window, WIDTH), steps - row)


@triton.jit
def mean_scales(p_row):
    """Return the factors of guess and state in the mean of a draft."""
    through_output = tl.load(p_row + 4) / tl.load(p_row + 1)
    return tl.load(p_row + 2) + through_output, tl.load(p_row + 3) - through_output * tl.load(p_row)


@triton.jit
def distance_scales(p_row, sigma):
    """Return the factors of the clipped and the raw x0 prediction's errors in D."""
    inverse = tl.where(sigma == 0, 0.0, 1 / tl.where(sigma == 0, 1.0, sigma))
    return tl.load(p_row + 2) * inverse, tl.load(p_row + 4) / tl.load(p_row + 1) * inverse


@triton.jit
def draft_lane(y, radius, direction, guess, mask, o_room, o_input, guess_ptr, drafts_ptr, noise_ptr, input_ptr,
               twin, g_scale, y_scale, sigma, GUIDED: tl.constexpr):  # fmt: skip
    """Write what belongs to a draft, and return the next draft."""
    z = radius * direction
    tl.store(guess_ptr + o_room, guess, mask=mask)
    tl.store(drafts_ptr + o_room, y, mask=mask)
    tl.store(noise_ptr + o_room, z, mask=mask)
    rounded = y.to(input_ptr.dtype.element_ty)
    tl.store(input_ptr + o_input, rounded, mask=mask)
    if GUIDED:
        tl.store(input_ptr + twin + o_input, rounded, mask=mask)
    return g_scale * guess + y_scale * y + sigma * z


@triton.jit(do_not_specialize=["steps", "batch"])
def draft_kernel(
    x_ptr, guess_ptr, drafts_ptr, noise_ptr, input_ptr, timestep_ptr, position_ptr, windows_ptr, coefficients_ptr,
    ids_ptr, seeds_ptr, steps, batch, room, n, q,
    GUIDED: tl.constexpr,
    WIDTH: tl.constexpr,
    SPAN: tl.constexpr,  # WIDTH, rounded up to a power of 2
    PTX: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Take PARTS blocks of counters of one sample through all of its drafts."""
    i_sample = sample_index()
    if i_sample >= batch:
        return
    p_position = position_ptr + i_sample * POSITION
    row = tl.load(p_position + ROW)
    count = window_count(windows_ptr, row, steps, WIDTH)
    if count <= 0:
        return
    evaluated = tl.load(p_position + EVALUATED)
    taken = tl.load(p_position + TAKEN)
    seed = tl.load(seeds_ptr + i_sample)
    wide = i_sample.to(tl.int64)
    o_sample = wide * n
    o_first = wide * room * n
    o_input = wide * WIDTH * n
    twin = batch.to(tl.int64) * WIDTH * n  # to the other half of a guided input

    if tl.program_id(0) == 0:
        k = tl.arange(0, SPAN)
        timesteps = tl.load(ids_ptr + (row + k) * 2, mask=k < count, other=0).to(tl.int64)
        tl.store(timestep_ptr + wide * WIDTH + k, timesteps, mask=k < count)
        if GUIDED:
            tl.store(timestep_ptr + batch.to(tl.int64) * WIDTH + wide * WIDTH + k, timesteps, mask=k < count)

    for part in tl.static_range(PARTS):
        start = block_start(part, BLOCK)
        if start < q:
            j = start + tl.arange(0, BLOCK)
            begins, masks = lanes(j, n, q)
            y0, y1, y2, y3 = load4(x_ptr + o_sample, begins, j, masks)
            # Sums of 64 bits: the drafts of one sample may take more than 2^31 elements.
            o_k = o_first
            o_in = o_input
            for k in range(WIDTH):
                if k < count:
                    p_row = coefficients_ptr + (row + k) * COLUMNS
                    sigma = tl.load(p_row + 5)
                    g_scale, y_scale = mean_scales(p_row)
                    source = tl.minimum(taken + k, evaluated - 1).to(tl.int64)
                    guesses = load4(guess_ptr + o_first + source * n, begins, j, masks)
                    noise_id = tl.load(ids_ptr + (row + k) * 2 + 1)
                    radii, directions = polar4(seed, tie(j, y0), noise_id, STEP, 0, 1.0, PTX)
                    y0 = draft_lane(y0, radii[0], directions[0], guesses[0], masks[0], o_k + begins[0] + j,
                                    o_in + begins[0] + j, guess_ptr, drafts_ptr, noise_ptr,
                                    input_ptr, twin, g_scale, y_scale, sigma, GUIDED)  # fmt: skip
                    y1 = draft_lane(y1, radii[1], directions[1], guesses[1], masks[1], o_k + begins[1] + j,
                                    o_in + begins[1] + j, guess_ptr, drafts_ptr, noise_ptr,
                                    input_ptr, twin, g_scale, y_scale, sigma, GUIDED)  # fmt: skip
                    y2 = draft_lane(y2, radii[2], directions[2], guesses[2], masks[2], o_k + begins[2] + j,
                                    o_in + begins[2] + j, guess_ptr, drafts_ptr, noise_ptr,
                                    input_ptr, twin, g_scale, y_scale, sigma, GUIDED)  # fmt: skip
                    y3 = draft_lane(y3, radii[3], directions[3], guesses[3], masks[3], o_k + begins[3] + j,
                                    o_in + begins[3] + j, guess_ptr, drafts_ptr, noise_ptr,
                                    input_ptr, twin, g_scale, y_scale, sigma, GUIDED)  # fmt: skip
                    o_k += n
                    o_in += n


@triton.jit(do_not_specialize=["steps", "batch"])
def verify_kernel(
    drafts_ptr, noise_ptr, guess_ptr, output_ptr, bound_ptr, guidance_ptr, dots_ptr, position_ptr, windows_ptr,
    coefficients_ptr, clip, steps, batch, room, n, q, output_batch,
    CLIP: tl.constexpr,  # "none", "fixed" or "bound"
    USE_OUTPUT: tl.constexpr, GUIDED: tl.constexpr, WIDTH: tl.constexpr, PTX: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sum D z and |D|^2 over PARTS blocks of counters of one draft."""
    i_draft = sample_index()
    if i_draft >= batch * WIDTH:
        return
    i_sample = i_draft // WIDTH
    k = i_draft % WIDTH
    row = tl.load(position_ptr + i_sample * POSITION + ROW)
    if k >= window_count(windows_ptr, row, steps, WIDTH):
        return
    p_row = coefficients_ptr + (row + k) * COLUMNS
    a = tl.load(p_row)
    b = tl.load(p_row + 1)
    clipped_scale, raw_scale = distance_scales(p_row, tl.load(p_row + 5))
    limit = clip
    if CLIP == "bound":
        limit = tl.load(bound_ptr + i_draft)
    if GUIDED:
        guidance = tl.load(guidance_ptr + i_draft)
    o_room = (i_sample.to(tl.int64) * room + k) * n
    p_output = output_ptr + i_draft.to(tl.int64) * output_batch
    p_unconditional = p_output + (batch * WIDTH).to(tl.int64) * output_batch
    along = tl.zeros((BLOCK,), tl.float32)
    square = tl.zeros((BLOCK,), tl.float32)
    for part in tl.static_range(PARTS):
        start = block_start(part, BLOCK)
        if start < q:
            j = start + tl.arange(0, BLOCK)
            begins, masks = lanes(j, n, q)
            ys = load4(drafts_ptr + o_room, begins, j, masks)
            zs = load4(noise_ptr + o_room, begins, j, masks)
            guesses = load4(guess_ptr + o_room, begins, j, masks)
            outs = load4(p_output, begins, j, masks)
            if GUIDED:
                unconditionals = load4(p_unconditional, begins, j, masks)
            for lane in tl.static_range(4):
                if GUIDED:
                    out = guide(outs[lane], unconditionals[lane], guidance, PTX)
                else:
                    out = to_float32(outs[lane], PTX)
                raw, x0 = predict_x0(ys[lane], out, a, b, limit, CLIP)
                apart = clipped_scale * (x0 - guesses[lane])
                if USE_OUTPUT:
                    apart += raw_scale * (raw - guesses[lane])
                apart = tl.where(masks[lane], apart, 0.0)
                along += tl.where(masks[lane], apart * zs[lane], 0.0)
                square += apart * apart
    parts = tl.num_programs(0)
    p_dots = dots_ptr + ((i_sample.to(tl.int64) * room + k) * parts + tl.program_id(0)) * 2
    tl.store(p_dots, tl.sum(along, 0))
    tl.store(p_dots + 1, tl.sum(square, 0))


@triton.jit(do_not_specialize=["steps", "parts"])
def decide_kernel(
    dots_ptr, factor_ptr, rejected_ptr, position_ptr, windows_ptr, coefficients_ptr, log_u_ptr, steps, room, parts,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Decide for one sample; the order of the sums does not depend on the launch."""
    i_sample = tl.program_id(0)
    p_position = position_ptr + i_sample * POSITION
    row = tl.load(p_position + ROW)
    count = window_count(windows_ptr, row, steps, WIDTH)
    p_log_u = log_u_ptr + i_sample.to(tl.int64) * steps + row
    p_dots = dots_ptr + i_sample.to(tl.int64) * room * parts * 2
    zero = (row * 0).to(tl.float32)
    alive = row * 0 + 1
    taken = row * 0
    outcome = row * 0 + ACCEPTED
    factor = zero
    for k in range(WIDTH):
        if (k < count) & (alive == 1):
            sigma = tl.load(coefficients_ptr + (row + k) * COLUMNS + 5)
            along = zero
            square = zero
            for start in range(0, parts, BLOCK):
                part = start + tl.arange(0, BLOCK)
                p_parts = p_dots + (k * parts + part) * 2
                along += tl.sum(tl.load(p_parts, mask=part < parts, other=0.0), 0)
                square += tl.sum(tl.load(p_parts + 1, mask=part < parts, other=0.0), 0)
            plain = (sigma == 0) | (count == 1)
            accepted = (tl.load(p_log_u + k) <= along - square / 2) & (plain == 0)
            taken = k + 1 + row * 0
            if accepted == 0:
                alive = alive * 0
                outcome = tl.where(plain, PLAIN, REJECTED) + row * 0
                factor = tl.where(plain, 0.0, 2 * along / tl.where(plain, 1.0, square))
    if count <= 0:
        outcome = row * 0 + DONE
    if outcome == REJECTED:
        tl.store(rejected_ptr + i_sample.to(tl.int64) * steps + row + taken - 1, 1)
    tl.store(factor_ptr + i_sample, factor)
    tl.store(p_position + ROW, row + taken)
    tl.store(p_position + START, row)
    tl.store(p_position + EVALUATED, tl.maximum(count, 0))
    tl.store(p_position + TAKEN, taken)
    tl.store(p_position + OUTCOME, outcome)


@triton.jit(do_not_specialize=["batch"])
def commit_kernel(
    x_ptr, drafts_ptr, noise_ptr, guess_ptr, output_ptr, bound_ptr, guidance_ptr, factor_ptr, position_ptr,
    coefficients_ptr, clip, batch, room, n, q, output_batch,
    CLIP: tl.constexpr, USE_OUTPUT: tl.constexpr, GUIDED: tl.constexpr, WIDTH: tl.constexpr, PTX: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Commit PARTS blocks of counters of one sample."""
    i_sample = sample_index()
    if i_sample >= batch:
        return
    p_position = position_ptr + i_sample * POSITION
    first = tl.load(p_position + START)
    evaluated = tl.load(p_position + EVALUATED)
    taken = tl.load(p_position + TAKEN)
    accepted = tl.load(p_position + OUTCOME) == ACCEPTED
    factor = tl.load(factor_ptr + i_sample)
    wide = i_sample.to(tl.int64)
    to_unconditional = (batch * WIDTH).to(tl.int64) * output_batch
    for part in tl.static_range(PARTS):
        start = block_start(part, BLOCK)
        if start < q:
            j = start + tl.arange(0, BLOCK)
            begins, masks = lanes(j, n, q)
            for k in range(WIDTH):
                if k < evaluated:
                    p_row = coefficients_ptr + (first + k) * COLUMNS
                    a = tl.load(p_row)
                    b = tl.load(p_row + 1)
                    sigma = tl.load(p_row + 5)
                    limit = clip
                    if CLIP == "bound":
                        limit = tl.load(bound_ptr + i_sample * WIDTH + k)
                    if GUIDED:
                        guidance = tl.load(guidance_ptr + i_sample * WIDTH + k)
                    o_room = (wide * room + k) * n
                    p_output = output_ptr + (wide * WIDTH + k) * output_batch
                    ys = load4(drafts_ptr + o_room, begins, j, masks)
                    guesses = load4(guess_ptr + o_room, begins, j, masks)
                    outs = load4(p_output, begins, j, masks)
                    if GUIDED:
                        unconditionals = load4(p_output + to_unconditional, begins, j, masks)
                    for lane in tl.static_range(4):
                        y = ys[lane]
                        guess = guesses[lane]
                        if GUIDED:
                            out = guide(outs[lane], unconditionals[lane], guidance, PTX)
                        else:
                            out = to_float32(outs[lane], PTX)
                        raw, x0 = predict_x0(y, out, a, b, limit, CLIP)
                        tl.store(guess_ptr + o_room + begins[lane] + j, x0, mask=masks[lane])
                        if k == taken - 1:
                            z = tl.load(noise_ptr + o_room + begins[lane] + j, mask=masks[lane])
                            if accepted:
                                g_scale, y_scale = mean_scales(p_row)
                                new = g_scale * guess + y_scale * y + sigma * z
                            else:
                                clipped_scale, raw_scale = distance_scales(p_row, sigma)
                                apart = clipped_scale * (x0 - guess)
                                new = tl.load(p_row + 2) * x0 + tl.load(p_row + 3) * y
                                if USE_OUTPUT:
                                    apart += raw_scale * (raw - guess)
                                    new += tl.load(p_row + 4) * out
                                new += sigma * (z - factor * apart)
                            tl.store(x_ptr + wide * n + begins[lane] + j, new, mask=masks[lane])


def parts(n: int) -> int:
    """Return the number of programs that a draft of n elements is divided among."""
    return grid(1, n)[0]


def draft_triton(
    x: Tensor, guess: Tensor, position: Tensor, windows: Tensor, coefficients: Tensor, ids: Tensor, seeds: Tensor,
    width: int, *, drafts: Tensor, noise: Tensor, model_input: Tensor, timestep: Tensor,
) -> None:  # fmt: skip
    """Launch `draft_kernel`."""
    batch, n = len(x), x[0].numel()
    guided = len(model_input) > batch * width
    target = model_input if with_layout(model_input)[1].row_major else model_input.new_empty(model_input.shape)
    launch(
        draft_kernel, grid(batch, n),
        (x, guess, drafts, noise, target, timestep, position, windows, coefficients, ids, seeds),
        (len(coefficients), batch, guess.shape[1], n, quarter(n)),
        GUIDED=guided, WIDTH=width, SPAN=triton.next_power_of_2(width), PTX=ptx(), BLOCK=BLOCK, num_warps=warps(),
    )  # fmt: skip
    if target is not model_input:
        model_input.copy_(target)


def verify_triton(
    drafts: Tensor, noise: Tensor, guess: Tensor, output: Tensor, position: Tensor, windows: Tensor,
    coefficients: Tensor, width: int, *, clip: float | None = None, bound: Tensor | None = None,
    guidance: Tensor | None = None, use_output: bool = True, dots: Tensor,
) -> None:  # fmt: skip
    """Launch `verify_kernel`."""
    batch, n = len(guess), guess[0, 0].numel()
    output, stride = _row_major(output)
    launch(
        verify_kernel, grid(batch * width, n),
        (drafts, noise, guess, output, bound, guidance, dots, position, windows, coefficients),
        (float(clip or 0.0), len(coefficients), batch, guess.shape[1], n, quarter(n), stride),
        CLIP=clip_form(clip, bound), USE_OUTPUT=use_output, GUIDED=guidance is not None, WIDTH=width, PTX=ptx(),
        BLOCK=BLOCK, num_warps=warps(),
    )  # fmt: skip


def decide_triton(
    dots: Tensor, position: Tensor, windows: Tensor, coefficients: Tensor, log_u: Tensor, width: int, *,
    factor: Tensor, rejected: Tensor,
) -> None:  # fmt: skip
    """Launch `decide_kernel`."""
    launch(
        decide_kernel, (len(position),), (dots, factor, rejected, position, windows, coefficients, log_u),
        (len(coefficients), dots.shape[1], dots.shape[2]), WIDTH=width, BLOCK=BLOCK, num_warps=warps(),
    )  # fmt: skip


def commit_triton(
    x: Tensor, drafts: Tensor, noise: Tensor, guess: Tensor, output: Tensor, position: Tensor, factor: Tensor,
    windows: Tensor, coefficients: Tensor, width: int, *, clip: float | None = None, bound: Tensor | None = None,
    guidance: Tensor | None = None, use_output: bool = True,
) -> None:  # fmt: skip
    """Launch `commit_kernel`."""
    batch, n = len(x), x[0].numel()
    output, stride = _row_major(output)
    launch(
        commit_kernel, grid(batch, n),
        (x, drafts, noise, guess, output, bound, guidance, factor, position, coefficients),
        (float(clip or 0.0), batch, guess.shape[1], n, quarter(n), stride),
        CLIP=clip_form(clip, bound), USE_OUTPUT=use_output, GUIDED=guidance is not None, WIDTH=width, PTX=ptx(),
        BLOCK=BLOCK, num_warps=warps(),
    )  # fmt: skip


def _row_major(output: Tensor) -> tuple[Tensor, int]:
    """Return the output, copied where its samples are not row-major, and the elements between two samples."""
    output, layout = with_layout(output)
    if not layout.row_major:
        output, layout = with_layout(output.contiguous())
    return output, layout.batch
