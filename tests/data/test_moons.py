"""Tests of the moons: their areas against brute force, their law, their reproducibility, and the fit."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from scipy import stats

from ddpm_fast.data.moons import EARTHSHINE, MARGIN, RADIUS_RANGE, SIZE, Moons, batch, draw_parameters, measure, render

FINE = 32  # brute-force samples along a side of a pixel

PHASES = {
    "new": (0.0, 1, 16.0, 16.0, 10.0),
    "crescent": (0.1, 1, 14.3, 17.9, 9.7),
    "thin-left": (0.02, -1, 12.0, 20.5, 10.4),
    "quarter": (0.5, 1, 16.0, 15.5, 11.0),
    "quarter-left": (0.5, -1, 9.2, 8.1, 5.0),
    "gibbous": (0.83, -1, 20.4, 18.8, 6.3),
    "full": (1.0, 1, 12.6, 13.7, 8.0),
}


def some_moons(count, seed=0):
    return draw_parameters(count, torch.Generator().manual_seed(seed))


def one_moon(*values):
    return Moons(*(torch.tensor([float(value)]) for value in values))


def brute_force(lit, side, x, y, radius):
    """Return the covered share of every pixel by counting points: disc and lit part, float64 [SIZE, SIZE]."""
    axis = (np.arange(SIZE * FINE) + 0.5) / FINE
    u, v = axis[None, :] - x, axis[:, None] - y
    disc = u**2 + v**2 <= radius**2
    h = np.sqrt(np.maximum(radius**2 - v**2, 0))
    bright = disc & (side * u > (1 - 2 * lit) * h)
    return [part.reshape(SIZE, FINE, SIZE, FINE).mean((1, 3)) for part in (disc, bright)]


@pytest.mark.parametrize("values", PHASES.values(), ids=PHASES)
def test_pictures_against_brute_force(values):
    lit, _, _, _, radius = values
    disc, bright = brute_force(*values)
    want = -1 + (EARTHSHINE + 1) * disc + (1 - EARTHSHINE) * bright
    got = render(one_moon(*values))
    assert got.shape == (1, 1, SIZE, SIZE)
    assert got.dtype == torch.float32
    got = got[0, 0].double().numpy()
    np.testing.assert_allclose(got, want, atol=0.1)  # the limb may touch a line of pixels; far less elsewhere
    assert abs(got - want).mean() < 1e-3
    lit_area = ((got + 1).sum() - (EARTHSHINE + 1) * math.pi * radius**2) / (1 - EARTHSHINE)
    assert lit_area == pytest.approx(bright.sum(), abs=0.2)  # in pixels; the disc has at least 78
    assert lit_area / (math.pi * radius**2) == pytest.approx(lit, abs=1e-3)


def test_left_is_the_mirror_of_right():
    moon = some_moons(20)
    mirrored = dataclasses.replace(moon, side=-moon.side, x=SIZE - moon.x)
    torch.testing.assert_close(render(mirrored), render(moon).flip(3), atol=1e-5, rtol=0)


def test_pixels_lie_between_minus_one_and_one():
    x = batch(500, 3)
    assert x.shape == (500, 1, SIZE, SIZE)
    assert (x.min(), x.max()) == (-1, 1)
    assert (x == EARTHSHINE).any()


def test_the_sky_around_every_disc_is_free():
    x = batch(500, 4)
    assert (x[:, :, 0] == -1).all()
    assert (x[:, :, -1] == -1).all()
    assert (x[..., 0] == -1).all()
    assert (x[..., -1] == -1).all()


def test_a_batch_depends_on_count_seed_and_index_alone():
    x = batch(6, 1, 2)
    torch.manual_seed(99)
    assert torch.equal(batch(6, 1, 2), x)
    state = torch.get_rng_state()
    others = [batch(6, 1, 3), batch(6, 2, 2), batch(6, 2, 1), batch(7, 1, 2)[:6]]
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(torch.equal(other, x) for other in others)
    assert torch.equal(batch(6, 1), batch(6, 1, 0))


def test_batches_share_no_picture():
    pictures = torch.cat([batch(20, seed, index) for seed in range(3) for index in range(3)])
    assert len(pictures.flatten(1).unique(dim=0)) == 180


def test_the_law_of_the_parameters():
    moon = some_moons(20_000)
    low, high = RADIUS_RANGE
    reach = SIZE - 2 * (moon.radius + MARGIN)
    uniform = {
        "lit": moon.lit,
        "radius": (moon.radius - low) / (high - low),
        "x": (moon.x - moon.radius - MARGIN) / reach,
        "y": (moon.y - moon.radius - MARGIN) / reach,
    }
    for name, value in uniform.items():
        assert stats.kstest(value.double().numpy(), "uniform").pvalue > 1e-3, name
    assert stats.binomtest(int((moon.side > 0).sum()), 20_000).pvalue > 1e-3
    assert set(moon.side.tolist()) == {-1.0, 1.0}
    columns = np.stack([value.double().numpy() for value in (*uniform.values(), moon.side)])
    correlation = np.corrcoef(columns) - np.eye(5)
    assert abs(correlation).max() < 5 / math.sqrt(20_000)


def test_parameters_follow_the_global_generator_without_one_of_their_own():
    torch.manual_seed(7)
    a = draw_parameters(3)
    torch.manual_seed(7)
    assert torch.equal(draw_parameters(3).lit, a.lit)


def test_measure_reads_the_parameters_back():
    moon = some_moons(150)
    fitted, distance = measure(render(moon))
    assert torch.equal(fitted.side, moon.side)
    assert distance.max() < 0.005
    for name, tolerance in {"x": 0.01, "y": 0.01, "radius": 0.01, "lit": 0.001}.items():
        error = (getattr(fitted, name) - getattr(moon, name)).abs()
        assert error.quantile(0.99) < tolerance, name
        assert error.max() < 2 * tolerance, name  # needed next to new and full moon


def test_measure_bears_noise():
    moon = some_moons(60, seed=1)
    noise = 0.05 * torch.randn(60, 1, SIZE, SIZE, generator=torch.Generator().manual_seed(2))
    fitted, distance = measure(render(moon) + noise)
    assert (fitted.x - moon.x).abs().max() < 0.15
    assert (fitted.radius - moon.radius).abs().max() < 0.15
    assert (fitted.lit - moon.lit).abs().max() < 0.02
    assert ((distance > 0.02) & (distance < 0.05)).all()  # the noise is partly clipped away


def test_measure_tells_moons_from_other_pictures():
    axis = torch.arange(SIZE) - SIZE / 2 + 0.5
    square = torch.where((axis.abs() < 8) & (axis[:, None].abs() < 8), 1.0, -1.0)
    r = (axis.square() + axis[:, None].square()).sqrt()
    ring = torch.where((r < 10) & (r > 6), 1.0, -1.0)
    chequers = torch.where((axis + axis[:, None]) % 2 == 0, 1.0, -1.0)
    noise = torch.randn(SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    two = torch.maximum(render(one_moon(1, 1, 8, 8, 6)), render(one_moon(1, 1, 24, 24, 6)))[0, 0]
    _, distance = measure(torch.stack([square, ring, chequers, noise, two])[:, None])
    assert (distance > 0.1).all(), distance
