"""The fused layer, on both backends, against plain operations in float64."""

import itertools

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from ddpm_fast.kernels.conv_fused import (
    Affine,
    GroupNorm,
    Window,
    channel_stats,
    conv_fused,
    norm_affine,
    pack_weight,
)
from ddpm_fast.kernels.tiles import Tiles

SAME = Window(3, 1, 1, 1, 1, 1)
SMALL = Tiles(16, 16, 16, 3)
# Relative to the largest element: products of rounded numbers, sums of float32, and one rounding of the result.
BOUNDS = {torch.float32: 3e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def image(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64).contiguous(memory_format=torch.channels_last)


def problem(channels, size, outputs, window, *, batch=2, shortcut=(), then=None, beside=0, **switches):
    """A layer in float64: the tensors of its operands, and plain options."""
    rows, columns = window.output_size(*size)
    total, chosen = sum(channels), {"affine": True, "bias": True, "vector": batch, "residual": True, **switches}
    given = {
        "sources": [image(batch, each, *size) for each in channels],
        "shortcut": [image(batch, each, rows, columns) for each in shortcut],
        "weight": torch.randn(outputs, total, window.size, window.size, dtype=torch.float64) / total**0.5 / window.size,
        "own": torch.randn(outputs, sum(shortcut), dtype=torch.float64) / max(sum(shortcut), 1) ** 0.5,
        "a": torch.rand(batch, total, dtype=torch.float64) + 0.5 if chosen["affine"] else None,
        "d": torch.randn(batch, total, dtype=torch.float64) if chosen["affine"] else None,
        "bias": torch.randn(outputs, dtype=torch.float64) if chosen["bias"] else None,
        "vector": torch.randn(chosen["vector"], outputs, dtype=torch.float64) if chosen["vector"] else None,
        "residual": image(batch, outputs, rows, columns) if chosen["residual"] else None,
        "beside": image(batch, beside, rows, columns) if beside else None,
        "silu": chosen.get("silu", True),
        "scale": chosen.get("scale", 1.0),
    }
    if then is not None:
        groups, gamma, gain = then
        normed = outputs + beside
        given["then"] = GroupNorm(
            groups,
            1e-5,
            torch.randn(normed) if gamma else None,
            torch.randn(normed) if gamma else None,
            torch.randn(gain, normed) if gain else None,
            torch.randn(gain, normed) if gain else None,
        )
    return given


def exactly(given, window, dtype):
    """The output in float64, of operands that are rounded to `dtype` as the contract says."""

    def rounded(each):
        return each.to(dtype).double()

    x = torch.cat([rounded(each) for each in given["sources"]], 1)
    if given["a"] is not None:
        x = x * given["a"].float().double()[:, :, None, None] + given["d"].float().double()[:, :, None, None]
    if given["silu"]:
        x = F.silu(x)
    x = rounded(x) if dtype != torch.float32 else x
    if window.upsample:
        x = F.interpolate(x, scale_factor=2.0, mode="nearest")
    x = F.pad(x, (window.left, window.right, window.top, window.bottom))
    out = F.conv2d(x, rounded(given["weight"]), stride=window.stride)
    if given["shortcut"]:
        raw = torch.cat([rounded(each) for each in given["shortcut"]], 1)
        out = out + F.conv2d(raw, rounded(given["own"])[:, :, None, None])
    for name, where in (("bias", (None, slice(None), None, None)), ("vector", (..., None, None))):
        out = out + given[name].float().double()[where] if given[name] is not None else out
    out = out + rounded(given["residual"]) if given["residual"] is not None else out
    return out * given["scale"]


def computed(given, window, dtype, backend, device, tiles=None, **options):
    """What the operation returns on a backend."""
    device = device if backend == "triton" else torch.device("cpu")

    def on(each, kind=dtype):
        return None if each is None else each.to(device, kind)

    then = given.get("then")
    if then is not None:
        parts = (None if each is None else each.to(device) for each in (then.gamma, then.beta, then.gain, then.shift))
        then = GroupNorm(then.groups, then.eps, *parts)
    weight = pack_weight(on(given["weight"]), on(given["own"]) if given["shortcut"] else None)
    affine = None if given["a"] is None else Affine(on(given["a"], torch.float32), on(given["d"], torch.float32))
    beside = [] if given["beside"] is None else [channel_stats(on(given["beside"]), backend=backend)]
    return conv_fused(
        [on(each) for each in given["sources"]], weight, window, affine=affine, silu=given["silu"],
        shortcut=[on(each) for each in given["shortcut"]], bias=on(given["bias"], torch.float32),
        vector=on(given["vector"], torch.float32), residual=on(given["residual"]), scale=given["scale"],
        stats=options.get("stats", True), then=then, beside=beside, tiles=tiles, backend=backend,
        tickets=options.get("tickets"),
    )  # fmt: skip


CASES = {
    "3 x 3": ([12], (5, 7), 9, SAME, {}),
    "1 x 1": ([12], (5, 7), 9, Window(), {}),
    "bare": ([16], (4, 4), 16, SAME, {"affine": False, "silu": False, "bias": False, "vector": 0, "residual": False}),
    "affine alone": ([16], (4, 4), 16, SAME, {"silu": False}),
    "SiLU alone": ([16], (4, 4), 16, SAME, {"affine": False}),
    "a vector for all": ([16], (4, 4), 16, SAME, {"vector": 1}),
    "scaled": ([16], (4, 4), 16, SAME, {"scale": 0.5}),
    "three channels": ([3], (6, 6), 3, SAME, {}),
    "one pixel": ([5], (1, 1), 3, SAME, {}),
    "stride": ([12], (6, 8), 9, Window(3, 2, 1, 1, 1, 1), {}),
    "stride, odd size": ([12], (7, 5), 9, Window(3, 2, 1, 1, 1, 1), {}),
    "stride, zeros on one side": ([12], (6, 8), 9, Window(3, 2, 0, 0, 1, 1), {}),
    "1 x 1 with stride": ([12], (6, 7), 9, Window(1, 2), {}),
    "enlarged": ([12], (3, 5), 9, Window(3, 1, 1, 1, 1, 1, True), {}),
    "enlarged 1 x 1": ([12], (3, 5), 9, Window(1, 1, 0, 0, 0, 0, True), {}),
    "two sources": ([20, 13], (4, 6), 9, SAME, {}),
    "two sources, enlarged": ([20, 13], (2, 3), 9, Window(3, 1, 1, 1, 1, 1, True), {}),
    "shortcut": ([9], (4, 6), 18, SAME, {"shortcut": (17,)}),
    "shortcut of two": ([9], (4, 6), 18, SAME, {"shortcut": (17, 20), "residual": False}),
    "everything": ([20, 13], (4, 6), 18, SAME, {"shortcut": (17, 20), "scale": 2.0, "then": (6, True, 2), "beside": 6}),
    "then": ([12], (5, 7), 24, SAME, {"then": (4, True, 0)}),
    "then without weights": ([12], (5, 7), 24, SAME, {"then": (4, False, 0)}),
    "then, modulated alike": ([12], (5, 7), 24, SAME, {"then": (3, True, 1)}),
    "then, groups across the border": ([12], (5, 7), 20, SAME, {"then": (5, True, 2), "beside": 15}),
    "then, a channel a group": ([12], (5, 7), 10, SAME, {"then": (10, True, 0)}),
    "then, one group": ([12], (5, 7), 10, SAME, {"then": (1, True, 0), "beside": 7}),
    "many tiles": ([16], (12, 11), 40, SAME, {"then": (8, True, 0)}),
}
HALVES = ("3 x 3", "two sources", "shortcut of two", "everything", "enlarged", "stride, zeros on one side")
RUNS = [
    *((name, torch.float32, backend, tiles) for name, backend in itertools.product(CASES, ("torch", "triton"))
      for tiles in ((None, SMALL) if backend == "triton" else (None,))),
    *((name, torch.float16, backend, None) for name, backend in itertools.product(HALVES, ("torch", "triton"))),
    *((name, torch.bfloat16, "torch", None) for name in HALVES),
]  # fmt: skip


@pytest.mark.parametrize(("name", "dtype", "backend", "tiles"), RUNS, ids=str)
def test_layer(name, dtype, backend, tiles, kernel_device):
    channels, size, outputs, window, options = CASES[name]
    torch.manual_seed(0)
    given = problem(channels, size, outputs, window, **options)
    expected = exactly(given, window, dtype)
    out, stats, affine = computed(given, window, dtype, backend, kernel_device, tiles)
    assert out.dtype == dtype
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert (out.double().cpu() - expected).abs().max() <= BOUNDS[dtype] * expected.abs().max()
    stored = out.double().cpu().flatten(2)  # the statistics are of what was stored
    mean, squares = stats.double().cpu().unbind(2)
    assert (mean - stored.mean(2)).abs().max() <= 1e-6 * stored.abs().max()
    deviations = (stored - stored.mean(2, keepdim=True)).square().sum(2)
    assert (squares - deviations).abs().max() <= 1e-5 * deviations.max() + 1e-12
    assert (affine is None) == ("then" not in given)
    if affine is not None:
        then = given["then"]
        both = [stored, *([given["beside"].to(dtype).double().flatten(2)] if given["beside"] is not None else [])]
        x = torch.cat(both, 1)
        parts = [None if each is None else each.double() for each in (then.gamma, then.beta)]
        normed = F.group_norm(x, then.groups, *parts, then.eps)
        if then.gain is not None:
            normed = normed * then.gain.double()[..., None] + then.shift.double()[..., None]
        got = x * affine.a.double().cpu()[..., None] + affine.d.double().cpu()[..., None]
        assert (got - normed).abs().max() <= 1e-5 * normed.abs().max()


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
def test_layer_on_a_gpu(name, dtype, kernel_device):
    test_layer(name, dtype, "triton", None, kernel_device)
    for split in (1, 2, 5):
        test_layer(name, dtype, "triton", Tiles(32, 32, 32, split), kernel_device)


def test_tickets_are_zero_again_and_the_bits_are_the_same(kernel_device):
    channels, size, outputs, window, options = CASES["everything"]
    given = problem(channels, size, outputs, window, **options)
    tickets = torch.zeros(64, dtype=torch.int32, device=kernel_device)
    first, second = (
        computed(given, window, torch.float32, "triton", kernel_device, SMALL, tickets=tickets) for _ in range(2)
    )
    assert not tickets.any()
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])
    assert torch.equal(first[2].a, second[2].a)


def test_more_samples_than_tickets(kernel_device):
    given = problem([4], (2, 2), 4, SAME, batch=5, then=(2, True, 5))
    tickets = torch.zeros(2, dtype=torch.int32, device=kernel_device)
    out, *_ = computed(given, SAME, torch.float32, "triton", kernel_device, SMALL, tickets=tickets)
    torch.testing.assert_close(out.double().cpu(), exactly(given, SAME, torch.float32), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_nan_and_infinity_reach_what_reads_them_and_nothing_else(backend, kernel_device):
    given = problem([6], (5, 5), 4, SAME, batch=2, affine=False, silu=False, residual=False)
    given["sources"][0][0, 3, 2, 2], given["sources"][0][1, 3, 0, 0] = torch.nan, torch.inf
    out, stats, _ = computed(given, SAME, torch.float32, backend, kernel_device, SMALL)
    finite = out.isfinite().all(1).cpu()
    near = torch.zeros(2, 5, 5, dtype=torch.bool)
    near[0, 1:4, 1:4] = near[1, :2, :2] = True
    assert torch.equal(~finite, near)
    assert not stats[0].isfinite().any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(1, 3, 1, 1), (2, 70, 9, 11), (1, 64, 8, 8)], ids=str)
def test_channel_statistics_without_cancellation(shape, dtype, kernel_device):
    x = (image(*shape) * 0.01 + 100).to(dtype)
    values = x.double().flatten(2)
    for backend in ("torch", "triton"):
        device = kernel_device if backend == "triton" else torch.device("cpu")
        mean, squares = channel_stats(x.to(device), backend=backend).double().cpu().unbind(2)
        expected = (values - values.mean(2, keepdim=True)).square().sum(2)
        torch.testing.assert_close(mean, values.mean(2), rtol=1e-6, atol=0)
        torch.testing.assert_close(squares, expected, rtol=1e-2, atol=1e-7)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("gain", [0, 1, 3])
def test_affine_map_of_two_tensors(backend, gain, kernel_device):
    device = kernel_device if backend == "triton" else torch.device("cpu")
    x, y = image(3, 10, 4, 5) + 3, image(3, 14, 4, 5)
    rows = [torch.randn(gain, 24) for _ in range(2)] if gain else [None, None]
    norm = GroupNorm(6, 1e-6, torch.randn(24), torch.randn(24), *rows)
    parts = (None if each is None else each.to(device) for each in (norm.gamma, norm.beta, norm.gain, norm.shift))
    stats = [channel_stats(each.float().to(device), backend=backend) for each in (x, y)]
    found = norm_affine(stats, 20, GroupNorm(6, 1e-6, *parts), backend=backend)
    both = torch.cat([x, y], 1)
    expected = F.group_norm(both, 6, norm.gamma.double(), norm.beta.double(), 1e-6)
    if gain:
        expected = expected * rows[0].double()[..., None, None] + rows[1].double()[..., None, None]
    got = both * found.a.double().cpu()[..., None, None] + found.d.double().cpu()[..., None, None]
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


CL = image(2, 4, 5, 5).float()
W = torch.zeros(36, 6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sources": [CL, CL, CL]}, "one or two sources"),
        ({"sources": []}, "one or two sources"),
        ({"window": Window(5)}, "kernels are 1 or 3 wide"),
        ({"window": Window(3, 3)}, "stride 1 or 2"),
        ({"sources": [CL[:, :, :2, :2].contiguous(memory_format=torch.channels_last)], "window": Window(3)}, "smaller"),
        ({"sources": [CL.contiguous()]}, r"sources\[0\] must be channels_last"),
        ({"sources": [CL, CL.half()]}, r"sources\[1\] must be one of .*float32"),
        ({"sources": [CL.double()], "weight": W.double()}, "weight must be contiguous and one of"),
        ({"weight": W[:35]}, r"weight must have shape \(36, 6\)"),
        ({"weight": W.t().contiguous().t()}, "weight must be contiguous"),
        ({"affine": Affine(torch.ones(2, 4), torch.ones(1, 4))}, r"affine.d must have shape \(2, 4\)"),
        ({"bias": torch.zeros(5)}, r"bias must have shape \(6,\)"),
        ({"vector": torch.zeros(3, 6)}, r"vector must have shape \(2, 6\) or \(1, 6\)"),
        ({"residual": CL}, "residual must have 6 channels"),
        ({"then": GroupNorm(4, 1e-5)}, "4 groups do not divide 6 channels"),
        ({"beside": [CL, CL]}, "at most one beside"),
    ],
)  # fmt: skip
def test_bad_input(change, message):
    given = {"sources": [CL], "weight": W, "window": SAME, **change}
    with pytest.raises(ValueError, match=message):
        conv_fused(**given)
