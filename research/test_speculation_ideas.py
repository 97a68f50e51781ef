"""The ideas that the speculative loop is compared with keep the law. Otherwise their counts would mean nothing."""

import numpy as np
import pytest
import torch
from scipy import integrate, stats

from research import speculation_ideas
from research.speculation_ideas import IDEAS, SpeculativeSampler, drawn_excess, excess
from tests.speculation.problems import ALPHA_BAR, TABLE, Gaussian, gaussian_p_values

CHAINS, SIZE, WIDTH = 1000, 8, 8


def p_value(idea):
    model = Gaussian(SIZE)
    sampler = SpeculativeSampler(model, TABLE, ALPHA_BAR.numpy(), (1, SIZE), WIDTH, **IDEAS[idea])
    samples = [sampler(seed) for seed in range(CHAINS)]
    assert 3 < sum(len(each.rejected) for each in samples) / CHAINS < 0.5 * len(TABLE)
    p_values = gaussian_p_values(torch.stack([each.x[0] for each in samples]), model.law())
    return min(p_values) * len(p_values)


@pytest.mark.parametrize("idea", IDEAS)
def test_the_law_of_a_gaussian(idea):
    assert p_value(idea) > 1e-3


def test_a_block_that_is_mended_with_the_wrong_law_is_rejected(monkeypatch):
    """The wrong law is the true law, instead of the part of the true law that the drafts lack."""
    monkeypatch.setattr(speculation_ideas, "drawn_excess", lambda weight, length, u: length + stats.norm.ppf(u))
    assert p_value("frozen, one block") < 1e-6


@pytest.mark.parametrize(("weight", "length"), [(1.0, 0.3), (0.7, 0.3), (0.2, 2.0), (1.0, 1e-3), (0.9, 4.0)])
def test_the_excess_of_a_block(weight, length):
    def density(s):
        return np.maximum(weight * stats.norm.pdf(s - length) - stats.norm.pdf(s), 0)

    meet = length / 2 - np.log(weight) / length
    mass = integrate.quad(density, meet, meet + 40)[0]
    assert excess(weight, length) == pytest.approx(mass, rel=1e-6, abs=1e-12)
    for u in (0.01, 0.5, 0.99):
        s = drawn_excess(weight, length, u)
        assert integrate.quad(density, s, s + 40)[0] == pytest.approx(u * mass, rel=1e-5, abs=1e-12)
