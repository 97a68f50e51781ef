"""NVIDIA's approximations against the specification of the noise: what their documented errors can do to a normal.

The errors are those of the PTX ISA and the CUDA programming guide. On a CPU they are emulated, at their worst in every
combination of signs; with a GPU the instructions themselves are measured, with the portable form beside them.
"""

import itertools

import numpy as np
import pytest
import torch

from ddpm_fast.kernels import normal
from ddpm_fast.kernels.philox import Stream
from tests.kernels.judges import uniform

LG2_ABSOLUTE, LG2_RELATIVE = 2.0**-22, 2.0**-22  # lg2.approx.ftz.f32: for u in (0.5, 2), and elsewhere
SQRT_RELATIVE = 2.0**-23  # sqrt.approx.ftz.f32
SINE_ABSOLUTE = 2.0**-20.5  # sin.approx.ftz.f32 and cos.approx.ftz.f32 in [-2 pi, 2 pi]
ROOT, TURN = np.float32(1.1774100225154747), 2 * np.pi

SMALL_RADIUS = 0.04  # one draw in 1,250 is below
NEAR_ZERO, ELSEWHERE = 6e-4, 1.2e-5  # the bounds that philox_triton.py states: below SMALL_RADIUS, and above


def words(count=4000):
    """Words of all sizes: random ones, both ends one by one, and the neighbourhood of every power of two."""
    rng = np.random.default_rng(0)
    ends = np.arange(600)
    powers = [2**k + d for k in range(8, 32) for d in (-129, -1, 0, 1, 127, 128)]
    found = np.concatenate([rng.integers(0, 2**32, count), ends, 2**32 - 1 - ends, 2**32 - 256 * ends - 1, powers])
    return found[(found >= 0) & (found < 2**32)].astype(np.uint64)


def radii(w):
    """The specified radius in float64, and those of the approximation at its worst: [4, n]."""
    u = np.array([uniform(int(word)) for word in w])
    exact = np.sqrt(-2 * np.log(u))
    lg = np.log2(u)
    size = np.where(u > 0.5, LG2_ABSOLUTE, LG2_RELATIVE * abs(lg))
    worst = []
    for lg_sign, root_sign in itertools.product((-1, 1), repeat=2):
        root = np.sqrt(abs(lg + lg_sign * size)) * (1 + root_sign * SQRT_RELATIVE)
        worst.append(np.float32(root) * ROOT)  # two roundings: of the root and of the product
    return exact, np.array(worst, dtype=np.float64)


def directions(w):
    """cos and sin as specified, [2, n], and as approximated, without their own error, [2, n]."""
    u = np.array([uniform(int(word)) for word in w])
    exact = np.array([np.cos(TURN * u), np.sin(TURN * u)])
    # One multiply-add of the rounded word; its constants are float32.
    angle = w.astype(np.float32).astype(np.float64) * np.float32(TURN * 2.0**-32) + np.float32(TURN * 2.0**-33)
    angle = angle.astype(np.float32).astype(np.float64)
    return exact, np.array([np.cos(angle), np.sin(angle)])


def test_what_the_documented_errors_allow():
    exact_radius, worst_radius = radii(words())
    exact_direction, direction = directions(words())
    assert np.all(abs(exact_direction - direction) < 2.0**-20.9)  # the angle's roundings: half a unit at 2 pi, twice
    largest_direction_error = abs(exact_direction - direction).max() + SINE_ABSOLUTE
    # |r' d' - r d| <= |r' - r| |d'| + r |d' - d|, and one rounding of the product
    error = abs(worst_radius - exact_radius).max(0) * (1 + SINE_ABSOLUTE)
    error += exact_radius * (largest_direction_error + 2.0**-24)
    assert error[exact_radius < SMALL_RADIUS].max() < NEAR_ZERO
    assert error[exact_radius >= SMALL_RADIUS].max() < ELSEWHERE
    # and the bounds are no larger than they must be
    assert error[exact_radius < SMALL_RADIUS].max() > NEAR_ZERO / 2
    assert error[exact_radius >= SMALL_RADIUS].max() > ELSEWHERE / 2


def test_without_the_absolute_value_there_would_be_nan():
    """lg2 may come out above 0 where u is near 1."""
    lg = np.log2(np.array([uniform(2**32 - 1), uniform(2**32 - 512)]))
    assert (lg + LG2_ABSOLUTE > 0).all()


def test_how_rare_small_radii_are():
    assert 1 - np.exp(-(SMALL_RADIUS**2) / 2) < 1 / 1250


@pytest.mark.gpu
def test_the_instructions_themselves(monkeypatch):
    """On this GPU: both forms against float64, within the bounds."""
    from ddpm_fast.kernels import normal_triton
    from ddpm_fast.kernels.philox import normals

    seeds, n = torch.arange(64), 4 * 48 * 1024
    ids = torch.arange(64)
    exact = normals(seeds, ids, Stream.STEP, n, dtype=torch.float64)
    found = {}
    for form in (True, False):
        monkeypatch.setattr(normal_triton, "ptx", lambda form=form: form)
        found[form] = normal(seeds.cuda(), ids.cuda(), Stream.STEP, (n,)).double().cpu()
    lanes = exact.view(64, 2, 2, -1)
    small = lanes.square().sum(2, keepdim=True).sqrt().expand_as(lanes).reshape(64, n) < SMALL_RADIUS
    for form, z in found.items():
        error = (z - exact).abs()
        assert error[small].max() < NEAR_ZERO
        assert error[~small].max() < (ELSEWHERE if form else 4e-6)
    assert not torch.equal(found[True], found[False])  # they are two forms
