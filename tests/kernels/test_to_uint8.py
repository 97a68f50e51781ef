"""`to_uint8`: the kernel and its PyTorch twin against numpy, byte by byte."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ddpm_fast.kernels.to_uint8 import to_uint8, to_uint8_torch
from tests.kernels.guarded import guard_empty

ROUNDINGS = ("round", "truncate")
BACKENDS = ("torch", "triton")


def judge(x, rounding):
    """The formulas of diffusers and of guided-diffusion, in float32 and in their order: bytes [B, H, W, C]."""
    x = x.astype(np.float32).transpose(0, 2, 3, 1)
    if rounding == "round":
        return np.rint(np.clip(x / np.float32(2) + np.float32(0.5), 0, 1) * np.float32(255)).astype(np.uint8)
    return np.clip((x + np.float32(1)) * np.float32(127.5), 0, 255).astype(np.uint8)


def edges():
    """Every byte's own value, the points halfway, the points where truncation jumps, and what lies outside."""
    k = np.arange(256)
    centres = np.concatenate([k / 255 * 2 - 1, (k + 0.5) / 255 * 2 - 1, k / 127.5 - 1]).astype(np.float32)
    near = [centres]
    for direction in (np.float32(-9), np.float32(9)):
        moved = centres
        for _ in range(3):
            moved = np.nextafter(moved, direction)
            near.append(moved)
    outside = np.array([-np.inf, -1e30, -2, -1.0000001, -0.0, 0.0, 1e-40, 1.0000001, 2, 300, 1e30, np.inf])
    return np.concatenate([*near, outside.astype(np.float32)])


def convert(backend, kernel_device, x, rounding):
    device = kernel_device if backend == "triton" else torch.device("cpu")
    result = to_uint8(torch.from_numpy(x).to(device), rounding=rounding, backend=backend)
    assert result.dtype == torch.uint8
    assert result.is_contiguous()
    return result.cpu().numpy()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rounding", ROUNDINGS)
class TestBytes:
    def test_every_edge(self, backend, rounding, kernel_device):
        x = edges().reshape(1, 1, 1, -1)
        np.testing.assert_array_equal(convert(backend, kernel_device, x, rounding), judge(x, rounding))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
    def test_nan_becomes_0(self, dtype, backend, rounding, kernel_device):
        device = kernel_device if backend == "triton" else torch.device("cpu")
        x = torch.tensor([[torch.nan, 1.0, 1e-42], [-torch.nan, torch.inf, -torch.inf]], dtype=dtype, device=device)
        found = to_uint8(x.view(1, 1, 2, 3), rounding=rounding, backend=backend).flatten().tolist()
        assert found == [0, 255, {"round": 128, "truncate": 127}[rounding], 0, 255, 0]

    def test_exact_arithmetic_away_from_the_edges(self, backend, rounding, kernel_device):
        """Float64 on a grid of 65,536 values: only points within float32's rounding of a jump may differ."""
        x = np.linspace(-1.1, 1.1, 1 << 16, dtype=np.float32).reshape(1, 1, 256, 256)
        value = np.clip(x.astype(np.float64) / 2 + 0.5, 0, 1) * 255
        exact = np.rint(value) if rounding == "round" else np.floor(value)
        jump = value + 0.5 if rounding == "round" else value
        clear = abs(jump - np.rint(jump)) > 255 * 2.0**-23
        clear |= (value == 0) | (value == 255)
        assert clear.mean() > 0.99
        result = convert(backend, kernel_device, x, rounding).reshape(x.shape)
        np.testing.assert_array_equal(result[clear], exact[clear])

    def test_bytes_survive_the_round_trip(self, backend, rounding, kernel_device):
        """A byte k made into k / 127.5 - 1 comes back; truncation may lose one to rounding."""
        k = np.arange(256)
        x = (k / 127.5 - 1).astype(np.float32).reshape(1, 1, 16, 16)
        result = convert(backend, kernel_device, x, rounding).reshape(-1).astype(int)
        lost = k - result
        assert (lost == 0).all() if rounding == "round" else ((lost == 0) | (lost == 1)).all()

    @pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 3, 4, 5), (3, 1, 33, 7), (1, 4, 16, 17)], ids=str)
    def test_channels_move_last(self, backend, rounding, shape, kernel_device, monkeypatch):
        """Every pixel has its own byte, so that a wrong place shows."""
        given = guard_empty(monkeypatch) if backend == "triton" else []
        place = np.arange(np.prod(shape)).reshape(shape) * 37 % 256
        x = ((place + 0.25) / 127.5 - 1).astype(np.float32)
        result = convert(backend, kernel_device, x, rounding)
        monkeypatch.undo()
        np.testing.assert_array_equal(result, place.transpose(0, 2, 3, 1))
        assert all(buffer.is_intact() for buffer in given)
        assert bool(given) == (backend == "triton")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rounding", ROUNDINGS)
class TestInput:
    @pytest.mark.parametrize("shape", [(2, 3, 4, 5), (1, 4, 16, 17), (2, 1, 9, 9)], ids=str)
    def test_any_layout(self, backend, rounding, shape, kernel_device):
        device = kernel_device if backend == "triton" else torch.device("cpu")
        x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(device)
        expected = to_uint8(x, rounding=rounding, backend=backend)
        for same in (
            x.contiguous(memory_format=torch.channels_last),
            torch.cat([x, x.flip(1)], 1)[:, : shape[1]],
            x.mT.contiguous().mT,
            torch.nn.functional.pad(x, (1, 2, 0, 1))[:, :, :-1, 1:-2],
            torch.cat([x, x])[:: len(x)][:1],
        ):
            assert torch.equal(to_uint8(same, rounding=rounding, backend=backend), expected[: len(same)])

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
    def test_half_precision_is_computed_in_float32(self, backend, rounding, dtype, kernel_device):
        device = kernel_device if backend == "triton" else torch.device("cpu")
        x = torch.linspace(-1.1, 1.1, 4096).to(dtype).view(1, 1, 64, 64).to(device)
        expected = judge(x.float().cpu().numpy(), rounding)
        np.testing.assert_array_equal(to_uint8(x, rounding=rounding, backend=backend).cpu().numpy(), expected)


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_twin_takes_float64(rounding):
    x = torch.linspace(-1.5, 1.5, 999, dtype=torch.float64).view(1, 1, 27, 37)
    value = (x.clamp(-1, 1) + 1) * 127.5
    exact = value.round() if rounding == "round" else value.floor()
    assert torch.equal(to_uint8_torch(x, rounding=rounding).flatten().double(), exact.flatten())


@settings(max_examples=25, deadline=None, derandomize=True, database=None)
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 20), st.integers(1, 20)),
    rounding=st.sampled_from(ROUNDINGS),
    seed=st.integers(0, 2**32),
)
def test_triton_is_the_twin(kernel_device, shape, rounding, seed):
    x = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
    torch_bytes, triton_bytes = (convert(backend, kernel_device, x, rounding) for backend in BACKENDS)
    np.testing.assert_array_equal(torch_bytes, triton_bytes)
    np.testing.assert_array_equal(torch_bytes, judge(x, rounding))


@pytest.mark.parametrize(
    ("x", "rounding", "message"),
    [
        (torch.zeros(3, 4, 5), "round", r"x must be a non-empty \[B, C, H, W\] tensor, got shape \(3, 4, 5\)"),
        (torch.zeros(0, 3, 4, 5), "round", "x must be a non-empty"),
        (torch.zeros(1, 3, 4, 5).double(), "round", "x must be one of .* got torch.float64"),
        (torch.zeros(1, 3, 4, 5), "floor", r"rounding must be one of \['round', 'truncate'\], got 'floor'"),
    ],
    ids=["three dimensions", "empty", "float64", "rounding"],
)
def test_errors(x, rounding, message):
    with pytest.raises(ValueError, match=message):
        to_uint8(x, rounding=rounding)


def test_unknown_backend():
    with pytest.raises(ValueError, match="backend must be one of"):
        to_uint8(torch.zeros(1, 1, 1, 1), backend="pillow")
