"""`q_sample` and `q_step`: the kernel and its PyTorch twin against the square roots in float64."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ddpm_fast.kernels.philox import Stream
from ddpm_fast.kernels.q_sample import q_sample, q_sample_torch, q_step
from tests.kernels.guarded import Guarded
from tests.kernels.judges import EPS, noise

BACKENDS = ("torch", "triton")
SHAPES = [(2,), (3, 5), (2, 63), (2, 3, 4, 5), (1, 144), (3, 145), (2, 3, 33, 7), (2, 2, 3, 4, 5), (1, 3, 32, 32)]
NORMAL_ATOL = 6e-4 if torch.cuda.is_available() else 4e-6  # of test_normal.py
# 1 - alpha_bar goes down to 1e-12, where float32 has nothing left of it: 1 - float32(1 - 1e-12) is 0.
ALPHAS_CUMPROD = 1 - np.geomspace(1e-12, 1, 25)


def problem(shape, seed=0):
    """x0, t and z in float64, all exact in float32."""
    rng = np.random.default_rng([seed, *shape])
    x0, z = rng.standard_normal((2, *shape)).astype(np.float32).astype(np.float64)
    return x0, rng.integers(0, len(ALPHAS_CUMPROD), shape[0]), z


def judge(x0, t, z):
    """x_t, and the bound of its float32 rounding: two roundings of either term, one of the sum."""
    alpha_bar = ALPHAS_CUMPROD[t].reshape(-1, *[1] * (x0.ndim - 1))
    signal, noisy = np.sqrt(alpha_bar) * x0, np.sqrt(1 - alpha_bar) * z
    return signal + noisy, 4 * EPS * (abs(signal) + abs(noisy)), np.sqrt(1 - alpha_bar)


def device_of(backend, kernel_device):
    return kernel_device if backend == "triton" else torch.device("cpu")


def launch(backend, device, x0, t, *, t_dtype=torch.int64, in_place=False, **noise_arguments):
    x0 = torch.tensor(x0, dtype=torch.float32, device=device)
    target = Guarded(x0.shape, device=device)
    if in_place:
        target.tensor.copy_(x0)
        x0 = target.tensor
    result = q_sample(
        x0,
        torch.tensor(t, dtype=t_dtype, device=device),
        torch.tensor(ALPHAS_CUMPROD, device=device),
        x_t=target.tensor,
        backend=backend,
        **noise_arguments,
    )
    assert result is target.tensor
    assert target.is_intact()
    return result.double().cpu().numpy()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
class TestAgainstFloat64:
    def test_given_noise(self, backend, shape, kernel_device):
        x0, t, z = problem(shape)
        device = device_of(backend, kernel_device)
        x_t = launch(backend, device, x0, t, z=torch.tensor(z, dtype=torch.float32, device=device))
        expected, bound, _ = judge(x0, t, z)
        assert np.all(abs(x_t - expected) <= bound)

    def test_own_noise(self, backend, shape, kernel_device):
        x0, t, _ = problem(shape, 1)
        device = device_of(backend, kernel_device)
        seeds = [2**40 + i for i in range(shape[0])]
        n = int(np.prod(shape[1:]))
        z = np.stack([noise(s, int(i), 2, 5, n) for s, i in zip(seeds, t, strict=True)]).reshape(shape)
        x_t = launch(backend, device, x0, t, seeds=torch.tensor(seeds, device=device), visit=5)
        expected, bound, deviation = judge(x0, t, z)
        assert np.all(abs(x_t - expected) <= bound + NORMAL_ATOL * deviation)


@pytest.mark.parametrize("shape", [(3, 5), (2, 3, 33, 7)], ids=str)
def test_twin_in_float64(shape):
    x0, t, z = problem(shape)
    seeds = torch.arange(shape[0])
    arguments = torch.tensor(x0), torch.tensor(t), torch.tensor(ALPHAS_CUMPROD)
    target = torch.full(shape, float("nan"), dtype=torch.float64)
    x_t = q_sample_torch(*arguments, Stream.FORWARD, z=torch.tensor(z), x_t=target).numpy()
    expected, bound, _ = judge(x0, t, z)
    assert np.all(abs(x_t - expected) <= bound * 2.0**-29)  # the same roundings at 53 bits instead of 24
    z = np.stack([noise(s, int(i), 2, 0, int(np.prod(shape[1:]))) for s, i in enumerate(t)]).reshape(shape)
    x_t = q_sample_torch(*arguments, Stream.FORWARD, seeds=seeds, x_t=target)
    np.testing.assert_allclose(x_t, judge(x0, t, z)[0], rtol=0, atol=1e-13)


@pytest.mark.parametrize("backend", BACKENDS)
class TestEither:
    def test_no_cancellation_near_t_0(self, backend, kernel_device):
        """x0 = 0 leaves the noise alone, so its factor sqrt(1 - alpha_bar) must be right to float32's last places."""
        device = device_of(backend, kernel_device)
        steps = np.arange(len(ALPHAS_CUMPROD))
        z = np.ones((len(steps), 3))
        x_t = launch(backend, device, 0 * z, steps, z=torch.ones(z.shape, device=device))
        np.testing.assert_allclose(x_t, np.sqrt(1 - ALPHAS_CUMPROD)[:, None] * z, rtol=2 * EPS)
        in_float32 = np.sqrt(1 - ALPHAS_CUMPROD.astype(np.float32))[:, None] * z
        assert not np.allclose(in_float32, x_t, rtol=1e-2)  # what this test is there to catch

    @pytest.mark.parametrize("t_dtype", [torch.int32, torch.int64], ids=str)
    def test_every_sample_at_its_own_timestep(self, backend, t_dtype, kernel_device):
        device = device_of(backend, kernel_device)
        x0, _, z = problem((5, 2, 7))
        t = np.array([24, 0, 12, 24, 3])
        z32 = torch.tensor(z, dtype=torch.float32, device=device)
        x_t = launch(backend, device, x0, t, z=z32, t_dtype=t_dtype)
        expected, bound, _ = judge(x0, t, z)
        assert np.all(abs(x_t - expected) <= bound)

    @pytest.mark.parametrize("own", [True, False], ids=["seeds", "z"])
    def test_in_place(self, backend, own, kernel_device):
        device = device_of(backend, kernel_device)
        x0, t, z = problem((2, 3, 33, 7))
        arguments = {"seeds": torch.tensor([1, 2], device=device)} if own else {"z": torch.tensor(z).float().to(device)}
        apart = launch(backend, device, x0, t, **arguments)
        np.testing.assert_array_equal(launch(backend, device, x0, t, in_place=True, **arguments), apart)

    def test_makes_its_own_target(self, backend, kernel_device):
        device = device_of(backend, kernel_device)
        x0, t, z = problem((2, 5))
        x_t = q_sample(
            torch.tensor(x0, dtype=torch.float32, device=device),
            torch.tensor(t, device=device),
            torch.tensor(ALPHAS_CUMPROD, device=device),
            z=torch.tensor(z, dtype=torch.float32, device=device),
            backend=backend,
        )
        assert np.all(abs(x_t.double().cpu().numpy() - judge(x0, t, z)[0]) <= judge(x0, t, z)[1])

    def test_strided_arguments(self, backend, kernel_device):
        """Views as people make them: one timestep for all, every second alpha_bar, every second seed.

        All inside larger tensors, so that reading on as if they were contiguous gives a wrong image, not a crash.
        """
        device = device_of(backend, kernel_device)
        x0 = torch.zeros(3, 5, device=device)
        t = torch.tensor([11, 1, 2], device=device)[:1].expand(3)
        alphas_cumprod = torch.tensor(ALPHAS_CUMPROD, device=device)[::2]
        seeds = torch.arange(6, device=device)[::2]
        x_t = q_sample(x0, t, alphas_cumprod, seeds=seeds, backend=backend)
        expected = np.sqrt(1 - ALPHAS_CUMPROD[22]) * np.stack([noise(s, 11, 2, 0, 5) for s in (0, 2, 4)])
        np.testing.assert_allclose(x_t.cpu(), expected, rtol=1e-6, atol=NORMAL_ATOL)


@pytest.mark.parametrize("backend", BACKENDS)
class TestOneStep:
    def test_against_float64(self, backend, kernel_device):
        """The formula is that of q_sample with alpha for alpha_bar, the noise another stream's."""
        device = device_of(backend, kernel_device)
        x, t, _ = problem((2, 3, 33, 7), 2)
        arguments = {
            "x": torch.tensor(x, dtype=torch.float32, device=device),
            "t": torch.tensor(t, device=device),
            "alphas": torch.tensor(ALPHAS_CUMPROD, device=device),
        }
        target = Guarded(x.shape, device=device)
        x_t = q_step(
            **arguments, seeds=torch.tensor([5, 6], device=device), visit=2, x_t=target.tensor, backend=backend
        )
        assert x_t is target.tensor
        assert target.is_intact()
        z = np.stack([noise(s, int(i), 4, 2, 693) for s, i in zip((5, 6), t, strict=True)]).reshape(x.shape)
        expected, bound, deviation = judge(x, t, z)
        assert np.all(abs(x_t.double().cpu().numpy() - expected) <= bound + NORMAL_ATOL * deviation)
        given = torch.tensor(z, dtype=torch.float32, device=device)
        x_t = q_step(**arguments, z=given, backend=backend).double().cpu().numpy()
        assert np.all(abs(x_t - expected) <= bound + 1e-7 * deviation * abs(z))

    def test_all_steps_have_the_law_of_the_closed_form(self, backend, kernel_device):
        """x_t of 12 single steps: mean sqrt(alpha_bar) x_0, variance 1 - alpha_bar; noise of its own."""
        device = device_of(backend, kernel_device)
        alphas = torch.linspace(0.99, 0.7, 12, dtype=torch.float64, device=device)
        seeds, n = torch.arange(4, device=device), 2000
        x = torch.full((4, n), 2.0, device=device)
        at_once = q_sample(x, torch.full_like(seeds, 11), alphas.cumprod(0), seeds=seeds, backend=backend)
        for t in range(12):
            x = q_step(x, torch.full_like(seeds, t), alphas, seeds=seeds, x_t=x, backend=backend)
        alpha_bar = alphas.prod().item()
        for x_t in (x, at_once):
            assert abs(x_t.mean().item() - 2 * alpha_bar**0.5) < 5 * ((1 - alpha_bar) / (4 * n)) ** 0.5
            assert abs(x_t.var().item() / (1 - alpha_bar) - 1) < 5 * (2 / (4 * n)) ** 0.5
        correlation = torch.corrcoef(torch.stack([x.flatten(), at_once.flatten()]))[0, 1].item()
        assert abs(correlation) < 5 / (4 * n) ** 0.5

    def test_errors_name_the_argument(self, backend, kernel_device):
        x, t, alphas = torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64), torch.ones(4, dtype=torch.float64)
        with pytest.raises(ValueError, match="x must be one of .* got torch.float64"):
            q_step(x.double(), t, alphas, z=x, backend=backend)
        with pytest.raises(ValueError, match="alphas must be one of .* got torch.float32"):
            q_step(x, t, alphas.float(), z=x, backend=backend)


def test_overlaps():
    buffer = torch.zeros(7)
    x0, t, alphas_cumprod = buffer[:6].view(2, 3), torch.zeros(2, dtype=torch.int64), torch.ones(4, dtype=torch.float64)
    with pytest.raises(ValueError, match="x_t must not share memory with x0"):
        q_sample(x0, t, alphas_cumprod, seeds=t, x_t=buffer[1:].view(2, 3))
    with pytest.raises(ValueError, match="x_t must not share memory with z"):
        q_sample(torch.zeros(2, 3), t, alphas_cumprod, z=x0, x_t=x0)


@pytest.mark.parametrize(
    ("name", "own"), [("x0", False), ("x0", True), ("z", False), ("alphas_cumprod", False), ("alphas_cumprod", True)]
)
def test_special_values(name, own, kernel_device):
    """NaN, infinity and denormals: the kernel says what its twin says."""
    special, found = torch.tensor([torch.nan, torch.inf, -torch.inf, 1e-42, -1e-42, 1e-310], dtype=torch.float64), []
    for backend in BACKENDS:
        given = {name: torch.linspace(-1, 1, 12).view(6, 2) for name in ("x0", "z")}
        given |= {"alphas_cumprod": torch.linspace(0, 1, 6, dtype=torch.float64), "t": torch.arange(6)}
        given[name].view(6, -1)[:, -1] = special
        if own:
            given["seeds"] = torch.arange(len(given.pop("z")))
        device = device_of(backend, kernel_device)
        found.append(q_sample(**{n: tensor.to(device) for n, tensor in given.items()}, backend=backend).cpu())
    assert found[0][0].isnan().any()
    torch.testing.assert_close(found[1], found[0], equal_nan=True, rtol=1e-4, atol=NORMAL_ATOL)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["x0", "z"])
def test_denormals_are_kept(name, backend, kernel_device):
    device = device_of(backend, kernel_device)
    tiny, zero = torch.full((1, 3), 2.0**-140, device=device), torch.zeros(1, 3, device=device)
    alphas_cumprod = torch.tensor([0.0, 1.0], dtype=torch.float64, device=device)
    t = torch.tensor([1 if name == "x0" else 0], device=device)
    given = {"x0": zero, "z": zero, name: tiny}
    assert torch.equal(q_sample(t=t, alphas_cumprod=alphas_cumprod, backend=backend, **given), tiny)


@settings(max_examples=25, deadline=None, derandomize=True, database=None)
@given(
    shape=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    own=st.booleans(),
    in_place=st.booleans(),
    seed=st.integers(0, 2**63 - 9),
)
def test_triton_is_the_twin(kernel_device, shape, own, in_place, seed):
    x0, t, z = problem(tuple(shape), seed)
    results = []
    for backend in BACKENDS:
        device = device_of(backend, kernel_device)
        seeds, given_z = torch.arange(shape[0]) + seed, torch.tensor(z, dtype=torch.float32)
        arguments = {"seeds": seeds.to(device)} if own else {"z": given_z.to(device)}
        results.append(launch(backend, device, x0, t, in_place=in_place, **arguments))
    _, bound, deviation = judge(x0, t, 7 + 0 * z if own else z)  # 7: more than any |z|
    assert np.all(abs(results[0] - results[1]) <= 2 * bound + (2 * NORMAL_ATOL * deviation if own else 0))


def good():
    return {
        "x0": torch.zeros(2, 3),
        "t": torch.zeros(2, dtype=torch.int64),
        "alphas_cumprod": torch.ones(4, dtype=torch.float64),
        "seeds": torch.zeros(2, dtype=torch.int64),
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x0": torch.zeros(0, 3)}, r"x0 must not be empty, got shape \(0, 3\)"),
        ({"x0": torch.zeros(2, 3, dtype=torch.float16)}, "x0 must be one of .* got torch.float16"),
        ({"x0": torch.zeros(3, 2).T}, r"x0 must be contiguous, got strides \(1, 2\) for shape \(2, 3\)"),
        ({"t": torch.zeros(3, dtype=torch.int64)}, r"t must have shape \(2,\), got \(3,\)"),
        ({"t": torch.zeros(2)}, "t must be one of .* got torch.float32"),
        ({"t": torch.zeros(2, dtype=torch.int64, device="meta")}, "t must be on cpu, got meta"),
        ({"alphas_cumprod": torch.ones(4)}, "alphas_cumprod must be one of .* got torch.float32"),
        ({"alphas_cumprod": torch.ones(4, 1).double()}, r"alphas_cumprod must have shape \(4,\), got \(4, 1\)"),
        ({"seeds": None}, "noise comes from exactly one of seeds and z"),
        ({"z": torch.zeros(2, 3)}, "noise comes from exactly one of seeds and z"),
        ({"seeds": torch.zeros(2, dtype=torch.int32)}, "seeds must be one of .* got torch.int32"),
        ({"seeds": torch.zeros(1, dtype=torch.int64)}, r"seeds must have shape \(2,\), got \(1,\)"),
        ({"seeds": None, "z": torch.zeros(2, 4)}, r"z must have shape \(2, 3\), got \(2, 4\)"),
        ({"seeds": None, "z": torch.zeros(3, 2).T}, "z must be contiguous"),
        ({"x_t": torch.zeros(2, 4)}, r"x_t must have shape \(2, 3\), got \(2, 4\)"),
        ({"x_t": torch.zeros(3, 2).T}, "x_t must be contiguous"),
        ({"x_t": torch.zeros(2, 3).double()}, "x_t must be one of .* got torch.float64"),
        ({"backend": "numpy"}, "backend must be one of .* got 'numpy'"),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_errors(changes, message):
    with pytest.raises(ValueError, match=message):
        q_sample(**good() | changes)


def test_the_arguments_of_the_error_tests_are_good():
    assert q_sample(**good()).shape == (2, 3)
