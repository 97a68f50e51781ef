"""The fused layer on a GPU: an implicit matrix product with the norm on load, and sums and statistics on store.

A program computes BM pixels by BN channels of one sample, from a part of the sum over taps and input channels. The last
program of a tile to finish adds the parts in a fixed order and stores the tile. The last tile of a sample to finish
merges the statistics of the tiles in a fixed order. Who is last is told by tickets, which are left as they were: zero.
"""

import functools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ddpm_fast.kernels.conv_fused import Affine, GroupNorm, Window
from ddpm_fast.kernels.dispatch import ptx
from ddpm_fast.kernels.launch_triton import launch as launch_kernel
from ddpm_fast.kernels.tiles import GPU, H100, Tiles, power_of_2, tiles_for

BLOCK = 64  # channels of a program of `channel_stats`
PIXELS = 64  # that a program of `channel_stats` reads at once
MOST_TILES = 1024  # of a sample, whose statistics one program merges; those of more are computed afterwards


@triton.jit
def _silu(x, PTX: tl.constexpr):
    """Return x / (1 + exp(-x)); in PTX with approximations of 2 units in the last place."""
    if PTX:
        return tl.inline_asm_elementwise(
            """{ .reg .f32 t;
                 mul.f32 t, $1, 0fBFB8AA3B;  // -log2 e
                 ex2.approx.ftz.f32 t, t;
                 add.f32 t, t, 0f3F800000;
                 rcp.approx.ftz.f32 t, t;
                 mul.f32 $0, $1, t; }""",
            "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1,
        )  # fmt: skip
    else:
        return x * tl.sigmoid(x)


@triton.jit
def _add_source(
    acc, x, w, a, d, first, last, y, z, valid, n, keep, H, W, C, offset, total, N,
    SIZE: tl.constexpr, UP: tl.constexpr, AFFINE: tl.constexpr, SILU: tl.constexpr, BK: tl.constexpr,
    PRECISION: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """Add the product of one source: the units first … last - 1, which are taps of channel blocks."""
    for unit in tl.range(first, last):
        block = unit // (SIZE * SIZE)
        tap = unit - block * (SIZE * SIZE)
        c = block * BK + tl.arange(0, BK)
        own = c < C
        under = y + tap // SIZE
        beside = z + tap % SIZE
        if UP:
            inside = valid & (under >= 0) & (under < 2 * H) & (beside >= 0) & (beside < 2 * W)
            under, beside = under >> 1, beside >> 1
        else:
            inside = valid & (under >= 0) & (under < H) & (beside >= 0) & (beside < W)
        values = tl.load(
            x + ((under * W + beside) * C)[:, None] + c[None, :], mask=inside[:, None] & own[None, :], other=0.0
        )
        if AFFINE or SILU:
            mapped = values.to(tl.float32)
            if AFFINE:
                factor = tl.load(a + c, mask=own, other=0.0)[None, :]
                mapped = mapped * factor + tl.load(d + c, mask=own, other=0.0)[None, :]
            if SILU:
                mapped = _silu(mapped, PTX)
            values = tl.where(inside[:, None], mapped, 0.0).to(x.dtype.element_ty)
        weights = tl.load(
            w + (tap * total + offset + c)[:, None] * N + n[None, :], mask=own[:, None] & keep[None, :], other=0.0
        )
        acc = tl.dot(values, weights, acc, input_precision=PRECISION)
    return acc


@triton.jit
def _affine(
    b, stats, beside, gamma, beta, gain, shift, next_a, next_d, N, M, groups, each, pixels, gain_stride, shift_stride,
    eps, GROUPS: tl.constexpr, EACH: tl.constexpr,
):  # fmt: skip
    """Write a group norm over the N channels of `stats` and the M channels of `beside` as an affine map."""
    g = tl.arange(0, GROUPS)[:, None]
    j = tl.arange(0, EACH)[None, :]
    c = g * each + j
    known = (g < groups) & (j < each)
    own = known & (c < N)
    place = (b * N + c) * 2
    mean = tl.load(stats + place, mask=own, other=0.0, cache_modifier=".cg")
    squares = tl.load(stats + place + 1, mask=own, other=0.0, cache_modifier=".cg")
    if beside is not None:
        other = known & (c >= N)
        place = (b * M + c - N) * 2
        mean += tl.load(beside + place, mask=other, other=0.0)
        squares += tl.load(beside + place + 1, mask=other, other=0.0)
    center = tl.sum(mean, 1)[:, None] / each
    deviation = tl.where(known, mean - center, 0.0)
    variance = tl.sum(squares + pixels * deviation * deviation, 1)[:, None] / each / pixels
    factor = 1 / tl.sqrt_rn(variance + eps)
    factor = tl.broadcast_to(factor, (GROUPS, EACH))
    if gamma is not None:
        factor = factor * tl.load(gamma + c, mask=known, other=0.0).to(tl.float32)
    summand = -center * factor
    if beta is not None:
        summand += tl.load(beta + c, mask=known, other=0.0).to(tl.float32)
    if gain is not None:
        given = tl.load(gain + b * gain_stride + c, mask=known, other=0.0).to(tl.float32)
        factor, summand = factor * given, summand * given
    if shift is not None:
        summand += tl.load(shift + b * shift_stride + c, mask=known, other=0.0).to(tl.float32)
    at = b * (N + M) + c
    tl.store(next_a + at, factor, mask=known)
    tl.store(next_d + at, summand, mask=known)


@triton.jit
def conv_fused_kernel(
    x_ptr, x2_ptr, s_ptr, s2_ptr, w_ptr, a_ptr, d_ptr, bias_ptr, vector_ptr, residual_ptr, out_ptr, part_ptr,
    tickets_ptr, tile_stats_ptr, stats_ptr, beside_ptr, gamma_ptr, beta_ptr, gain_ptr, shift_ptr, next_a_ptr,
    next_d_ptr,
    H, W, HO, WO, C, C2, S, S2, N, M, top, left, tiles, tickets, groups, each, vector_stride, gain_stride,
    shift_stride, scale, eps,
    SIZE: tl.constexpr, STRIDE: tl.constexpr, UP: tl.constexpr, SILU: tl.constexpr, STATS: tl.constexpr,
    SPLIT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, TILES: tl.constexpr,
    MERGED: tl.constexpr, GROUPS: tl.constexpr, EACH: tl.constexpr, PRECISION: tl.constexpr,
    PTX: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    column = tl.program_id(1)
    b = tl.program_id(2) // SPLIT
    part = tl.program_id(2) % SPLIT
    P = HO * WO
    p = tile * BM + tl.arange(0, BM)
    valid = p < P
    n = column * BN + tl.arange(0, BN)
    keep = n < N
    y = (p // WO) * STRIDE - top
    z = (p % WO) * STRIDE - left
    sample = b.to(tl.int64)
    total = C + C2

    # The units of work: the taps of the sources' channel blocks, then the channel blocks of the shortcut.
    blocks = tl.cdiv(C, BK) * (SIZE * SIZE)
    blocks2 = tl.cdiv(C2, BK) * (SIZE * SIZE)
    units_s = tl.cdiv(S, BK)
    units = blocks + blocks2 + units_s + tl.cdiv(S2, BK)
    share = tl.cdiv(units, SPLIT)
    low = part * share
    high = tl.minimum(low + share, units)

    AFFINE: tl.constexpr = a_ptr is not None
    acc = tl.zeros((BM, BN), tl.float32)
    a = a_ptr + b * total if AFFINE else a_ptr
    d = d_ptr + b * total if AFFINE else d_ptr
    acc = _add_source(
        acc, x_ptr + sample * (H * W * C), w_ptr, a, d, low, tl.minimum(high, blocks), y, z, valid, n, keep, H, W, C,
        0, total, N, SIZE, UP, AFFINE, SILU, BK, PRECISION, PTX,
    )  # fmt: skip
    if x2_ptr is not None:
        acc = _add_source(
            acc, x2_ptr + sample * (H * W * C2), w_ptr, a + C if AFFINE else a, d + C if AFFINE else d,
            tl.maximum(low - blocks, 0), tl.minimum(high - blocks, blocks2), y, z, valid, n, keep, H, W, C2,
            C, total, N, SIZE, UP, AFFINE, SILU, BK, PRECISION, PTX,
        )  # fmt: skip
    w = w_ptr + SIZE * SIZE * total * N
    before = blocks + blocks2
    if s_ptr is not None:
        acc = _add_source(
            acc, s_ptr + sample * (P * S), w, a, d, tl.maximum(low - before, 0),
            tl.minimum(high - before, units_s), p * 0, p, valid, n, keep, 1, P, S, 0, S + S2, N,
            1, False, False, False, BK, PRECISION, PTX,
        )  # fmt: skip
    if s2_ptr is not None:
        before += units_s
        acc = _add_source(
            acc, s2_ptr + sample * (P * S2), w, a, d, tl.maximum(low - before, 0),
            tl.minimum(high - before, units - before), p * 0, p, valid, n, keep, 1, P, S2, S, S + S2, N,
            1, False, False, False, BK, PRECISION, PTX,
        )  # fmt: skip

    inner = p[:, None] * N + n[None, :]
    mask = valid[:, None] & keep[None, :]
    done = True
    if SPLIT > 1:
        parts = part_ptr + sample * SPLIT * (P * N)
        tl.store(parts + part.to(tl.int64) * (P * N) + inner, acc, mask=mask)
        ticket = tickets_ptr + (b * tl.num_programs(1) + column) * tiles + tile
        tl.debug_barrier()  # all threads have stored before the ticket is drawn
        done = tl.atomic_add(ticket, 1, sem="acq_rel") == SPLIT - 1
        if done:
            acc = tl.zeros((BM, BN), tl.float32)
            for first in range(0, SPLIT, 4):
                for other in tl.static_range(4):  # loads that wait together
                    there = mask & (first + other < SPLIT)
                    of_part = parts + tl.cast(first + other, tl.int64) * (P * N) + inner
                    acc += tl.load(of_part, mask=there, other=0.0, cache_modifier=".cg")
            tl.store(ticket, 0)
    if done:
        if bias_ptr is not None:
            acc += tl.load(bias_ptr + n, mask=keep, other=0.0)[None, :]
        if vector_ptr is not None:
            acc += tl.load(vector_ptr + b * vector_stride + n, mask=keep, other=0.0).to(tl.float32)[None, :]
        if residual_ptr is not None:
            acc += tl.load(residual_ptr + sample * (P * N) + inner, mask=mask, other=0.0).to(tl.float32)
        result = (acc * scale).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + sample * (P * N) + inner, result, mask=mask)
        if STATS:
            stored = result.to(tl.float32)
            count = tl.minimum(P - tile * BM, BM).to(tl.float32)
            mean = tl.sum(tl.where(mask, stored, 0.0), 0) / count
            deviation = tl.where(mask, stored - mean[None, :], 0.0)
            at = ((b * tiles + tile) * N + n) * 2
            tl.store(tile_stats_ptr + at, mean, mask=keep)
            tl.store(tile_stats_ptr + at + 1, tl.sum(deviation * deviation, 0), mask=keep)
            tl.debug_barrier()
            ticket = tickets_ptr + tickets + b
            all_tiles = tiles * tl.num_programs(1)
            if tl.atomic_add(ticket, 1, sem="acq_rel") == all_tiles - 1:
                t = tl.arange(0, TILES)[:, None]
                counts = tl.where(t < tiles, tl.minimum(P - t * BM, BM), 0).to(tl.float32)
                for first in range(0, N, MERGED):
                    m = first + tl.arange(0, MERGED)
                    there = (t < tiles) & (m < N)[None, :]
                    of_tile = ((b * tiles + t) * N + m[None, :]) * 2
                    means = tl.load(tile_stats_ptr + of_tile, mask=there, other=0.0, cache_modifier=".cg")
                    squares = tl.load(tile_stats_ptr + of_tile + 1, mask=there, other=0.0, cache_modifier=".cg")
                    center = tl.sum(means * counts, 0) / P
                    apart = tl.where(there, means - center[None, :], 0.0)
                    of_channel = stats_ptr + (b * N + m) * 2
                    tl.store(of_channel, center, mask=m < N)
                    tl.store(of_channel + 1, tl.sum(squares + counts * apart * apart, 0), mask=m < N)
                tl.store(ticket, 0)
                if next_a_ptr is not None:
                    tl.debug_barrier()  # the statistics are stored
                    _affine(
                        b, stats_ptr, beside_ptr, gamma_ptr, beta_ptr, gain_ptr, shift_ptr, next_a_ptr, next_d_ptr,
                        N, M, groups, each, P.to(tl.float32), gain_stride, shift_stride, eps, GROUPS, EACH,
                    )  # fmt: skip


@triton.jit
def norm_affine_kernel(
    stats_ptr, beside_ptr, gamma_ptr, beta_ptr, gain_ptr, shift_ptr, next_a_ptr, next_d_ptr,
    N, M, groups, each, pixels, gain_stride, shift_stride, eps, GROUPS: tl.constexpr, EACH: tl.constexpr,
):  # fmt: skip
    _affine(
        tl.program_id(0), stats_ptr, beside_ptr, gamma_ptr, beta_ptr, gain_ptr, shift_ptr, next_a_ptr, next_d_ptr,
        N, M, groups, each, pixels, gain_stride, shift_stride, eps, GROUPS, EACH,
    )  # fmt: skip


@triton.jit
def channel_stats_kernel(x_ptr, stats_ptr, P, C, PIXELS: tl.constexpr, BLOCK: tl.constexpr):
    b = tl.program_id(1)
    c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    own = c < C
    base = x_ptr + b.to(tl.int64) * (P * C)
    mean = tl.zeros((BLOCK,), tl.float32)
    squares = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, P, PIXELS):
        p = first + tl.arange(0, PIXELS)
        mask = (p < P)[:, None] & own[None, :]
        values = tl.load(base + p[:, None] * C + c[None, :], mask=mask, other=0.0).to(tl.float32)
        count = tl.minimum(P - first, PIXELS).to(tl.float32)
        here = tl.sum(values, 0) / count
        apart = tl.where(mask, values - here[None, :], 0.0)
        shift = here - mean
        share = count / (first + count)
        squares += tl.sum(apart * apart, 0) + shift * shift * (first * share)
        mean += shift * share
    tl.store(stats_ptr + (b * C + c) * 2, mean, mask=own)
    tl.store(stats_ptr + (b * C + c) * 2 + 1, squares, mask=own)


def launch(
    sources: Sequence[Tensor],
    weight: Tensor,
    window: Window,
    affine: Affine | None,
    silu: bool,
    shortcut: Sequence[Tensor],
    bias: Tensor | None,
    vector: Tensor | None,
    residual: Tensor | None,
    scale: float,
    stats: bool,
    then: GroupNorm | None,
    beside: Sequence[Tensor],
    tf32: bool,
    tiles: Tiles | None,
    tickets: Tensor | None,
) -> tuple[Tensor, Tensor | None, Affine | None]:
    """Launch the layer; the arguments are those of `conv_fused`."""
    first = sources[0]
    (batch, _, height, width), device = first.shape, first.device
    rows, columns = window.output_size(height, width)
    outputs, pixels = weight.shape[1], rows * columns
    if tiles is None:
        own, other = (tuple(each.shape[1] for each in tensors) for tensors in (sources, shortcut))
        mapped = affine is not None or silu
        tiles = tiles_for(
            batch,
            pixels,
            own,
            outputs,
            window.size,
            other,
            mapped=mapped,
            element=first.element_size(),
            gpu=_gpu(device),
        )
    across, along = triton.cdiv(pixels, tiles.pixels), triton.cdiv(outputs, tiles.channels)
    out = torch.empty(
        (batch, outputs, rows, columns), dtype=first.dtype, device=device, memory_format=torch.channels_last
    )
    wanted = stats or then is not None
    with_stats = wanted and across <= MOST_TILES
    found = _floats(device, batch, outputs, 2) if with_stats else None
    tile_stats = _floats(device, batch, across, outputs, 2) if with_stats else None
    part = _floats(device, batch, tiles.split, pixels, outputs) if tiles.split > 1 else None
    following, normed = None, outputs + sum(each.shape[1] for each in beside)
    if with_stats and then is not None:
        following = Affine(_floats(device, batch, normed), _floats(device, batch, normed))
    of_tiles = batch * across * along if tiles.split > 1 else 0
    if tickets is None or tickets.numel() < of_tiles + batch:
        tickets = torch.zeros(of_tiles + batch, dtype=torch.int32, device=device)
    norm, groups, each = _described(then if with_stats else None, normed)
    counted = power_of_2(across)
    launch_kernel(
        conv_fused_kernel,
        (across, along, batch * tiles.split),
        (
            first, _at(sources, 1), _at(shortcut, 0), _at(shortcut, 1), weight, *_both(affine), bias, vector, residual,
            out, part, tickets, tile_stats, found, _at(beside, 0), *norm, *_both(following),
        ),
        (
            height, width, rows, columns, first.shape[1], _channels(sources, 1), _channels(shortcut, 0),
            _channels(shortcut, 1), outputs, normed - outputs, window.top, window.left, across, of_tiles, groups, each,
            _stride(vector), _stride(norm[2]), _stride(norm[3]), float(scale), then.eps if then else 0.0,
        ),
        SIZE=window.size, STRIDE=window.stride, UP=window.upsample, SILU=silu, STATS=with_stats, SPLIT=tiles.split,
        BM=tiles.pixels, BN=tiles.channels, BK=tiles.depth, TILES=counted,
        MERGED=max(16, min(power_of_2(outputs), 4096 // counted)), GROUPS=power_of_2(groups), EACH=power_of_2(each),
        PRECISION="tf32" if tf32 else "ieee", PTX=ptx(), num_warps=tiles.num_warps, num_stages=tiles.num_stages,
    )  # fmt: skip
    if wanted and not with_stats:
        found = launch_stats(out)
        following = None if then is None else launch_affine([found, *beside], pixels, then)
    return out, found, following


def launch_affine(stats: Sequence[Tensor], pixels: int, norm: GroupNorm) -> Affine:
    """Launch `norm_affine`."""
    first = stats[0]
    batch, own, _ = first.shape
    channels = own + _channels(stats, 1)
    found = Affine(_floats(first.device, batch, channels), _floats(first.device, batch, channels))
    tensors, groups, each = _described(norm, channels)
    launch_kernel(
        norm_affine_kernel, (batch,), (first, _at(stats, 1), *tensors, found.a, found.d),
        (own, channels - own, groups, each, float(pixels), _stride(tensors[2]), _stride(tensors[3]), norm.eps),
        GROUPS=power_of_2(groups), EACH=power_of_2(each), num_warps=4,
    )  # fmt: skip
    return found


def launch_stats(x: Tensor) -> Tensor:
    """Launch `channel_stats`."""
    batch, channels, height, width = x.shape
    found = _floats(x.device, batch, channels, 2)
    grid = (triton.cdiv(channels, BLOCK), batch)
    launch_kernel(
        channel_stats_kernel, grid, (x, found), (height * width, channels), PIXELS=PIXELS, BLOCK=BLOCK, num_warps=4
    )
    return found


@functools.cache
def _gpu(device: torch.device) -> GPU:
    """Return what a GPU has; the interpreter plays an H100."""
    if device.type != "cuda":
        return H100
    found = torch.cuda.get_device_properties(device)
    return GPU(found.multi_processor_count, getattr(found, "shared_memory_per_block_optin", H100.shared_bytes))


def _described(norm: GroupNorm | None, channels: int) -> tuple[tuple[Tensor | None, ...], int, int]:
    """Return the tensors of a norm, the number of its groups and the channels of each."""
    if norm is None:
        return (None,) * 4, 1, 1
    return (norm.gamma, norm.beta, norm.gain, norm.shift), norm.groups, channels // norm.groups


def _floats(device: torch.device, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device=device)


def _both(affine: Affine | None) -> tuple[Tensor | None, Tensor | None]:
    return (None, None) if affine is None else (affine.a, affine.d)


def _at(tensors: Sequence[Tensor], place: int) -> Tensor | None:
    return tensors[place] if place < len(tensors) else None


def _channels(tensors: Sequence[Tensor], place: int) -> int:
    return tensors[place].shape[1] if place < len(tensors) else 0


def _stride(rows: Tensor | None) -> int:
    """Return the distance of the rows of two samples; 0 where there is one row for all."""
    return 0 if rows is None or rows.shape[0] == 1 else rows.stride(0)
