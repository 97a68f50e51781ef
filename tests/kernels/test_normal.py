"""`normal`: the kernel and its PyTorch twin against the page in philox.py."""

import numpy as np
import pytest
import torch

from ddpm_fast.kernels.normal import normal, normal_torch
from ddpm_fast.kernels.philox import Stream
from tests.kernels.guarded import guard_empty
from tests.kernels.judges import noise

# Float32: the angle, up to 2 pi, is rounded to 2.4e-7 and met by a radius of up to 6.8. A GPU approximates the
# logarithm besides, to 1e-7 where it comes near 0: a radius near 0 may be off by that number's square root.
NORMAL_ATOL = 6e-4 if torch.cuda.is_available() else 4e-6
SHAPES = [(1,), (5,), (63,), (3, 4, 5), (64,), (65,), (1, 12, 12), (145,), (3, 33, 7), (2, 3, 4, 5), (3, 32, 32)]
SEEDS = [0, 2**32 + 1, 2**64 - 3]


def seed_tensor(seeds):
    return torch.from_numpy(np.array(seeds, dtype=np.uint64).view(np.int64))


def expected(seeds, ids, stream, visits, shape):
    n = int(np.prod(shape))
    rows = [noise(s, i, int(stream), v, n) for s, i, v in zip(seeds, ids, visits, strict=True)]
    return np.stack(rows).reshape(len(seeds), *shape)


@pytest.fixture(params=["torch", "triton"])
def backend(request):
    return request.param


@pytest.fixture
def device(backend, kernel_device):
    return kernel_device if backend == "triton" else torch.device("cpu")


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_element(backend, device, shape, monkeypatch):
    given = guard_empty(monkeypatch)
    seeds, ids, visits = SEEDS, [0, 999, 999], [0, 0, 3]
    z = normal(
        seed_tensor(seeds).to(device),
        torch.tensor(ids, device=device),
        Stream.STEP,
        shape,
        visit=torch.tensor(visits, device=device),
        backend=backend,
    )
    monkeypatch.undo()
    assert z.dtype == torch.float32
    assert z.is_contiguous()
    np.testing.assert_allclose(z.cpu(), expected(seeds, ids, 1, visits, shape), rtol=0, atol=NORMAL_ATOL)
    assert given
    assert all(buffer.is_intact() for buffer in given)


@pytest.mark.parametrize("stream", Stream, ids=lambda stream: stream.name)
@pytest.mark.parametrize("visit", [0, 1, 16, 1000])
def test_stream_and_visit(backend, device, stream, visit):
    z = normal(
        seed_tensor([5]).to(device), torch.tensor([7], device=device), stream, (9,), visit=visit, backend=backend
    )
    np.testing.assert_allclose(z.cpu(), expected([5], [7], stream, [visit], (9,)), rtol=0, atol=NORMAL_ATOL)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_noise_ids_of_either_width(backend, device, dtype):
    ids = [0, 1, 2**31 - 1]
    z = normal(
        seed_tensor(SEEDS).to(device), torch.tensor(ids, dtype=dtype, device=device), Stream.X_T, (9,), backend=backend
    )
    np.testing.assert_allclose(z.cpu(), expected(SEEDS, ids, 0, [0] * 3, (9,)), rtol=0, atol=NORMAL_ATOL)


def test_float64_twin():
    z = normal_torch(seed_tensor(SEEDS), torch.tensor([4, 5, 6]), Stream.STEP, (3, 33, 7), dtype=torch.float64)
    assert z.dtype == torch.float64
    # Only float64 rounding: of the angle, 2^-52 of 2 pi, times the radius.
    np.testing.assert_allclose(z, expected(SEEDS, [4, 5, 6], 1, [0] * 3, (3, 33, 7)), rtol=0, atol=2e-14)


def test_strided_arguments(backend, device):
    """Views as people make them: every second seed, one noise id for all.

    All inside larger tensors, so that reading on as if they were contiguous gives wrong noise, not a crash.
    """
    seeds = seed_tensor([1, 99, 2, 99]).to(device)[::2]
    ids = torch.tensor([7, 8], dtype=torch.int32, device=device)[:1].expand(2)
    visits = torch.tensor([[1, 9], [2, 9]], dtype=torch.int32, device=device)[:, 0]
    z = normal(seeds, ids, Stream.STEP, (9,), visit=visits, backend=backend)
    np.testing.assert_allclose(z.cpu(), expected([1, 2], [7, 7], 1, [1, 2], (9,)), rtol=0, atol=NORMAL_ATOL)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seeds": torch.zeros(2, dtype=torch.int32)}, r"seeds must be one of \['torch.int64'\], got torch.int32"),
        ({"seeds": torch.zeros(3, dtype=torch.int64)}, r"seeds must have shape \(2,\), got \(3,\)"),
        ({"noise_ids": torch.zeros(3, dtype=torch.int32)}, r"seeds must have shape \(3,\), got \(2,\)"),
        ({"backend": "cuda"}, r"backend must be one of \['triton', 'torch'\], got 'cuda'"),
    ],
    ids=["seeds dtype", "too many seeds", "too many noise ids", "backend"],
)
def test_errors(changes, message):
    arguments = {"seeds": torch.zeros(2, dtype=torch.int64), "noise_ids": torch.zeros(2, dtype=torch.int32)} | changes
    with pytest.raises(ValueError, match=message):
        normal(stream=Stream.STEP, shape=(3,), **arguments)
