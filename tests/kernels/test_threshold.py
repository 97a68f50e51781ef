"""The bound of dynamic thresholding against numpy's quantile and torch's."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ddpm_fast.kernels.step import COLUMNS
from ddpm_fast.kernels.threshold import threshold_bound
from tests.kernels.judges import EPS

TORCH = tuple(int(part) for part in torch.__version__.split(".")[:2])
BACKENDS = ("torch", "triton")
ROWS = np.array([[0.5, -1.0], [2.0, 0.25], [-0.75, 3.0], [1.0, 0.0]])  # a, b
TABLE = torch.tensor(np.concatenate([ROWS, np.full((4, len(COLUMNS) - 2), 99.0)], axis=1), dtype=torch.float32)
IDENTITY = torch.zeros(1, len(COLUMNS))
IDENTITY[0, 0] = 1


def bound_of(values, backend, kernel_device, **arguments):
    """The bound where x0 is `values` itself, [B, ...]."""
    device = kernel_device if backend == "triton" else torch.device("cpu")
    x = torch.as_tensor(values).to(device, torch.float32)
    base = torch.zeros(len(x), dtype=torch.int32, device=device)
    output = torch.zeros_like(x)
    return threshold_bound(x, output, IDENTITY.to(device), base, backend=backend, **arguments).cpu()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("ratio", [0.0, 0.5, 0.995, 1.0])
@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("shape", [(3, 1), (3, 2, 9), (3, 3, 8, 9), (3, 3, 31, 32)], ids=str)
def test_against_numpy(shape, guided, ratio, backend, kernel_device):
    device = kernel_device if backend == "triton" else torch.device("cpu")
    rng = np.random.default_rng(list(shape))
    x, conditional, unconditional = rng.standard_normal((3, *shape)).astype(np.float32)
    guidance = np.array([0.5, 1.0, 3.0], np.float32)
    base = np.array([0, 2, 1])
    output = np.concatenate([conditional, unconditional]) if guided else conditional
    bound = threshold_bound(
        torch.tensor(x, device=device),
        torch.tensor(output, device=device),
        TABLE.to(device),
        torch.tensor(base, dtype=torch.int32, device=device),
        1,
        ratio=ratio,
        max_value=4.0,
        guidance=torch.tensor(guidance, device=device) if guided else None,
        backend=backend,
    )
    a, b = (ROWS[base + 1, i].reshape(3, *[1] * (len(shape) - 1)) for i in (0, 1))
    out = conditional.astype(np.float64)
    if guided:
        out = unconditional + guidance.reshape(a.shape).astype(np.float64) * (out - unconditional)
    expected = np.quantile(abs(a * x + b * out).reshape(3, -1), ratio, axis=1).clip(1, 4)
    # Values of up to about 40 before the clip, each term rounded a few times; and the rank is float32.
    np.testing.assert_allclose(bound.cpu(), expected, rtol=0, atol=16 * EPS * 40)


@pytest.mark.skipif(TORCH >= (2, 14), reason="its quantile takes the rank in double precision")
@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(data=st.data())
def test_the_kernel_is_torch_quantile(kernel_device, data):
    """Bit by bit, where values repeat, are 0, infinite or nearly equal, too."""
    n = data.draw(st.integers(1, 40), "n")
    numbers = st.one_of(
        st.sampled_from([0.0, 1.0, 1.5, -1.5, 2.0, float("inf"), 1e-42, 1 + 2.0**-23, 3.0e38]),
        st.floats(-4, 4, width=32),
    )
    values = torch.tensor(data.draw(st.lists(numbers, min_size=n, max_size=n), "values"))[None]
    ratio = data.draw(st.sampled_from([0.0, 0.3, 0.5, 0.9, 0.995, 1.0]), "ratio")
    expected = torch.quantile(values.abs(), ratio, dim=1).clamp(1, 1e38)
    for backend in BACKENDS:
        bound = bound_of(values, backend, kernel_device, ratio=ratio, max_value=1e38)
        assert torch.equal(bound, expected) or (bound.isnan() & expected.isnan()).all()


@pytest.mark.parametrize("backend", BACKENDS)
class TestEither:
    def test_nan_stays_nan(self, backend, kernel_device):
        values = torch.linspace(-3, 3, 5000).repeat(3, 1)
        values[1, 4321] = torch.nan
        bound = bound_of(values, backend, kernel_device, ratio=0.5, max_value=9.0)
        assert bound.isnan().tolist() == [False, True, False]

    def test_many_tiles_and_wide_output(self, backend, kernel_device):
        """More elements than a tile, in channels_last, as bfloat16."""
        device = kernel_device if backend == "triton" else torch.device("cpu")
        x = torch.randn(2, 3, 41, 43, generator=torch.Generator().manual_seed(0))
        output = x.flip(1).bfloat16().contiguous(memory_format=torch.channels_last)
        base = torch.tensor([0, 1], dtype=torch.int32)
        arguments = [tensor.to(device) for tensor in (x, output, TABLE, base)]
        bound = threshold_bound(*arguments, ratio=0.9, max_value=50.0, backend=backend)
        a, b = TABLE[:2, 0].view(2, 1, 1, 1), TABLE[:2, 1].view(2, 1, 1, 1)
        expected = torch.quantile((a * x + b * output.float()).abs().flatten(1), 0.9, dim=1).clamp(1, 50)
        torch.testing.assert_close(bound.cpu(), expected, rtol=1e-6, atol=0)

    def test_errors(self, backend, kernel_device):
        for arguments in ({"ratio": 1.5, "max_value": 2.0}, {"ratio": 0.5, "max_value": 0.5}):
            with pytest.raises(ValueError, match=r"ratio must be in \[0, 1\] and max_value >= 1, got"):
                bound_of([[1.0, 2.0]], backend, kernel_device, **arguments)


def test_more_than_torch_quantile_takes():
    """17 million elements: where torch.quantile gave up before 2.14."""
    values = torch.arange(17_000_000, dtype=torch.int32).view(1, -1).remainder(4_000_003).float().div_(1e6)
    if TORCH < (2, 14):
        with pytest.raises(RuntimeError, match="too large"):
            torch.quantile(values, 0.5)
    bound = bound_of(values, "torch", None, ratio=0.995, max_value=9.0)
    np.testing.assert_allclose(bound, np.quantile(values.numpy(), 0.995), rtol=1e-5)


def test_a_row_outside_the_table_keeps_its_bound(kernel_device):
    x = torch.full((2, 5), 3.0, device=kernel_device)
    bound = torch.full((2,), 7.0, device=kernel_device)
    base = torch.tensor([1, 0], dtype=torch.int32, device=kernel_device)
    table = IDENTITY.to(kernel_device)
    threshold_bound(x, x, table, base, ratio=0.5, max_value=9.0, bound=bound, backend="triton")
    assert bound.tolist() == [7.0, 3.0]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("values", "ratio", "expected"),
    [
        ([np.inf], 0.995, np.nan),  # torch.quantile between two infinite numbers
        ([np.inf, np.inf, 0.5], 0.9, np.nan),
        ([0.5, 0.25, np.inf], 0.7, 2.0),  # between a finite number and infinity
        ([0.5, -np.inf, 0.25, 0.1], 0.5, 1.0),
        ([1e-42, -1e-42, 0.0], 0.995, 1.0),
        ([np.nan, 0.5, np.inf], 0.0, np.nan),
        ([0.5, np.inf], 0.0, 1.0),  # a finite number itself, next to infinity
        ([0.5, np.inf, 0.25], 0.5, 1.0),
        ([-np.nan], 0.5, np.nan),
    ],
)
def test_special_values(values, ratio, expected, backend, kernel_device):
    """An infinite x0 prediction must not be hidden by a bound of 1."""
    bound = bound_of([values], backend, kernel_device, ratio=ratio, max_value=2.0)
    np.testing.assert_array_equal(bound, [expected])
    limits = {"ratio": ratio, "max_value": 2.0}
    quantile = torch.tensor(values).abs().quantile(ratio).clamp(1, 2)
    np.testing.assert_array_equal(bound_of([values], backend, kernel_device, **limits)[0], quantile)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["x", "output", "unconditional", "guidance", "a", "b"])
@pytest.mark.parametrize("ratio", [0.3, 1.0])
def test_special_values_in_every_tensor(name, ratio, dtype, kernel_device):
    """NaN, infinity and denormals: the kernel says what its twin says."""
    special, found = torch.tensor([torch.nan, torch.inf, -torch.inf, 1e-42, -1e-42]), []
    for backend, device in (("torch", torch.device("cpu")), ("triton", kernel_device)):
        generator = torch.Generator().manual_seed(0)
        x, conditional, unconditional = (torch.randn(5, 2, 3, 4, generator=generator) for _ in range(3))
        table, guidance = TABLE[:1].repeat(5, 1), torch.linspace(-1, 2, 5)
        if name in ("x", "output", "unconditional"):
            {"x": x, "output": conditional, "unconditional": unconditional}[name][:, 1, 2, 3] = special
        elif name == "guidance":
            guidance = special
        else:
            table[:, COLUMNS.index(name)] = special
        output = torch.cat([conditional, unconditional]).to(dtype)
        given = [tensor.to(device) for tensor in (x, output, table, torch.arange(5, dtype=torch.int32))]
        limits = {"ratio": ratio, "max_value": 3.0, "guidance": guidance.to(device)}
        found.append(threshold_bound(*given, **limits, backend=backend).cpu())
    torch.testing.assert_close(found[1], found[0], equal_nan=True, rtol=1e-5, atol=0)
    assert found[0][0].isnan()
