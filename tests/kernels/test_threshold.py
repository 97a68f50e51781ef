"""The bound of dynamic thresholding against numpy's quantile."""

import numpy as np
import pytest
import torch
from judges import EPS

from ddpm_fast.kernels.threshold import threshold_bound

ROWS = np.array([[0.5, -1.0], [2.0, 0.25], [-0.75, 3.0], [1.0, 0.0]])  # a, b


@pytest.mark.parametrize("ratio", [0.0, 0.5, 0.995, 1.0])
@pytest.mark.parametrize("guided", [False, True], ids=["plain", "guided"])
@pytest.mark.parametrize("shape", [(3, 1), (3, 2, 9), (3, 3, 8, 9)], ids=str)
def test_against_numpy(shape, guided, ratio):
    rng = np.random.default_rng(list(shape))
    x, conditional, unconditional = rng.standard_normal((3, *shape)).astype(np.float32)
    guidance = np.array([0.5, 1.0, 3.0], np.float32)
    base = np.array([0, 2, 1])
    rows = np.concatenate([ROWS, np.full((4, 6), 99.0)], axis=1).astype(np.float32)
    bound = threshold_bound(
        torch.tensor(x),
        torch.tensor(np.concatenate([conditional, unconditional]) if guided else conditional),
        torch.tensor(rows),
        torch.tensor(base, dtype=torch.int32),
        1,
        ratio=ratio,
        max_value=4.0,
        guidance=torch.tensor(guidance) if guided else None,
    )
    a, b = (ROWS[base + 1, i].reshape(3, *[1] * (len(shape) - 1)) for i in (0, 1))
    out = conditional.astype(np.float64)
    if guided:
        out = unconditional + guidance.reshape(a.shape).astype(np.float64) * (out - unconditional)
    expected = np.quantile(abs(a * x + b * out).reshape(3, -1), ratio, axis=1).clip(1, 4)
    # Values of up to about 40 before the clip, each term rounded a few times.
    np.testing.assert_allclose(bound, expected, rtol=0, atol=16 * EPS * 40)
