"""Tests of networks that take another time than the timestep."""

import numpy as np
import pytest
import torch

from ddpm_fast.config import SamplerConfig
from ddpm_fast.sample import Sampler, sample
from ddpm_fast.times import Retimed, continuous_times, log_snr_times, scaled_times
from tests.support.networks import Wavy

SHAPE = (2, 2, 4, 3)


class Timed(torch.nn.Module):
    """A network with a parameter that keeps the times of its calls."""

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(()))
        self.times = []

    def forward(self, x, t, shift=0.0):
        self.times.append(t.clone())
        return self.scale * x * torch.sigmoid(t).view(-1, 1, 1, 1) + shift


@pytest.mark.parametrize(
    ("times", "expected"),
    [
        (scaled_times(1000, 0.25), lambda t, _: 0.25 * t),
        (continuous_times(1000), lambda t, _: t / 1000),
        (continuous_times(1000, first=1), lambda t, _: (t + 1) / 1000),
        (log_snr_times(SamplerConfig().alphas_cumprod()), lambda t, alpha_bar: np.log(alpha_bar / (1 - alpha_bar))),
    ],
)
def test_the_network_gets_the_time_of_its_timestep(times, expected):
    network = Timed()
    result = sample(Retimed(network, times), SHAPE, seeds=0, num_inference_steps=5)
    config = SamplerConfig(num_inference_steps=5)
    t = config.inference_timesteps()
    assert len(network.times) == 5
    assert network.times[0].dtype == torch.float32
    seen = torch.stack(network.times)[:, 0].double().numpy()
    assert np.allclose(seen, expected(t, config.alphas_cumprod()[t]), rtol=1e-6)
    by_hand = sample(lambda x, t: network(x, torch.from_numpy(times).float()[t]), SHAPE, seeds=0, num_inference_steps=5)
    assert torch.equal(result, by_hand)


def test_keywords_reach_the_network():
    retimed = Retimed(Timed(), continuous_times(1000))
    x, t = torch.ones(SHAPE), torch.tensor([3, 700])
    assert torch.equal(retimed(x, t, shift=0.5), retimed(x, t) + 0.5)


def test_conditioning_reaches_the_network():
    class Conditional(Timed):
        def forward(self, x, t, labels):
            seen.append(labels.tolist())
            return super().forward(x, t) + labels.view(-1, 1, 1, 1)

    seen = []
    sampler = Sampler(
        Retimed(Conditional(), continuous_times(1000)), SHAPE, num_inference_steps=2,
        model_kwargs={"labels": torch.tensor([1, 2])}, guidance_scale=2.0,
        uncond_kwargs={"labels": torch.tensor([7, 7])},
    )  # fmt: skip
    assert sampler(seeds=0).shape == SHAPE
    assert seen == [[1, 2, 7, 7]] * 2


def test_times_keep_their_precision_in_a_network_of_half():
    network = Timed()
    Retimed(network, scaled_times(1000, 1.0)).bfloat16()(torch.zeros(1, 2, 4, 3), torch.tensor([999]))
    assert network.times[0].tolist() == [999.0]
    assert network.scale.dtype == torch.bfloat16


def test_log_snr_is_exact_at_both_ends():
    assert np.allclose(log_snr_times(np.array([1 - 1e-12, 0.5, 1e-12])), [27.631, 0.0, -27.631], atol=1e-3)


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda: Retimed(lambda x, t: x, continuous_times(5)), TypeError, "model must be a torch.nn.Module"),
        (lambda: Retimed(Wavy(2, 2), np.zeros((2, 2))), ValueError, "times must be finite numbers"),
        (lambda: Retimed(Wavy(2, 2), np.array([np.inf])), ValueError, "times must be finite numbers"),
        (lambda: log_snr_times(np.array([1.0, 0.5])), ValueError, r"inside \(0, 1\)"),
        (lambda: continuous_times(0), ValueError, "num_train_timesteps"),
        (lambda: continuous_times(10, first=2), ValueError, "first must be"),
        (lambda: scaled_times(10, float("nan")), ValueError, "scale must be"),
    ],
)
def test_bad_input(make, error, match):
    with pytest.raises(error, match=match):
        make()
