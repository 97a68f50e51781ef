"""Tests of the losses: definitions, gradients, and networks that learn."""

import itertools
import json
import math

import numpy as np
import pytest
import torch

from ddpm_fast.config import PREDICTION_TYPES, SamplerConfig
from ddpm_fast.edit import noised
from ddpm_fast.likelihood import bits_per_dimension
from ddpm_fast.models.checkpoint import load_checkpoint
from ddpm_fast.sample import sample
from ddpm_fast.training import Trainer, TrainingConfig
from ddpm_fast.training.losses import HYBRID_WEIGHT, Loss
from tests.support.networks import Wavy
from tests.support.unets import TINY
from tests.training.test_trainer import assert_same_run, small_moons

T = 50


def drawn(count=6, seed=0):
    """Return x_0 of 256 values, x_t, noise, t and alpha_bar. The first and the last timestep are among the t."""
    generator = torch.Generator().manual_seed(seed)
    x_0 = torch.randint(256, (count, 2, 3, 5), generator=generator) / 127.5 - 1
    x_0[0, 0, 0] = torch.tensor([-1.0, 1.0, -1.0, 1.0, 0.5])
    noise, t = torch.randn(x_0.shape, generator=generator), torch.randint(T, (count,), generator=generator)
    t[:3] = torch.tensor([0, T - 1, 0])
    alpha_bar = torch.from_numpy(SamplerConfig(num_train_timesteps=T).alphas_cumprod())[t].float().view(-1, 1, 1, 1)
    return x_0, alpha_bar.sqrt() * x_0 + (1 - alpha_bar).sqrt() * noise, noise, t, alpha_bar


def outputs_for(x0, x_t, alpha_bar):
    """Return the outputs, one for each prediction type, that stand for the same x0."""
    epsilon = (x_t - alpha_bar.sqrt() * x0) / (1 - alpha_bar).sqrt()
    v = alpha_bar.sqrt() * epsilon - (1 - alpha_bar).sqrt() * x0
    return {"epsilon": epsilon, "sample": x0, "v_prediction": v}


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_the_squared_error_is_of_what_is_predicted(prediction_type):
    x_0, x_t, noise, t, alpha_bar = drawn()
    loss = Loss(SamplerConfig(num_train_timesteps=T, prediction_type=prediction_type))
    right = outputs_for(x_0, x_t, alpha_bar)[prediction_type]
    assert loss(right, x_0, x_t, noise, t).max() < 1e-6
    torch.testing.assert_close(loss(right + 0.5, x_0, x_t, noise, t), torch.full((6,), 0.25), atol=1e-3, rtol=0)


@pytest.mark.parametrize("gamma", [0.5, 5.0])
def test_min_snr_weighs_x_0_alike_in_every_prediction(gamma):
    x_0, x_t, noise, t, alpha_bar = drawn()
    x0 = 0.9 * x_0 + 0.05
    losses = []
    for name, output in outputs_for(x0, x_t, alpha_bar).items():
        config = SamplerConfig(num_train_timesteps=T, prediction_type=name)
        losses.append(Loss(config, min_snr_gamma=gamma)(output, x_0, x_t, noise, t))
    weight = (alpha_bar / (1 - alpha_bar)).clamp(max=gamma).flatten()
    expected = weight * (x0 - x_0).square().flatten(1).mean(1)
    for loss in losses:
        torch.testing.assert_close(loss, expected, rtol=2e-3, atol=1e-6)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large", "learned_range", "learned"])
def test_the_bound_is_that_of_the_likelihood(prediction_type, variance_type):
    """Check that the loss is T times the likelihood's term, for a batch of mixed timesteps."""
    learned = variance_type.startswith("learned")
    model = Wavy(2, 4 if learned else 2)
    options = {"prediction_type": prediction_type, "variance_type": variance_type, "clip_sample": False}
    config = SamplerConfig(num_train_timesteps=T, **options)
    x_0, _, noise, t, _ = drawn()
    expected = bits_per_dimension(model, x_0, config=config, seeds=0, progress=False)
    x_t = torch.cat([noised(x_0[i : i + 1], int(t[i]), config, [i]) for i in range(len(x_0))])
    bound = Loss(config, "vlb")(model(x_t, t), x_0, x_t, noise, t)
    terms = [expected.terms[i, T - 1 - int(t[i])] for i in range(len(x_0))]
    np.testing.assert_allclose(bound.numpy(), T * np.array(terms), rtol=2e-3)


def test_hybrid_teaches_the_mean_by_the_error_and_the_variance_by_the_bound():
    config = SamplerConfig(num_train_timesteps=T, variance_type="learned_range")
    x_0, x_t, noise, t, _ = drawn()
    output = torch.randn(6, 4, 3, 5, generator=torch.Generator().manual_seed(1), requires_grad=True)
    Loss(config, "hybrid")(output, x_0, x_t, noise, t).sum().backward()
    mean, variance = output.grad[:, :2].clone(), output.grad[:, 2:].clone()
    simple = output.detach()[:, :2].requires_grad_()
    Loss(SamplerConfig(num_train_timesteps=T))(simple, x_0, x_t, noise, t).sum().backward()
    torch.testing.assert_close(mean, simple.grad)
    output.grad = None
    Loss(config, "vlb")(output, x_0, x_t, noise, t).sum().backward()
    torch.testing.assert_close(variance, HYBRID_WEIGHT * output.grad[:, 2:])
    assert variance.abs().max() > 0


@pytest.mark.parametrize("variance_type", ["fixed_small", "learned_range"])
def test_gradients_are_finite_and_are_slopes(variance_type):
    """Compare gradients with differences in float64, also at t = 0 and at the ends of the scale.

    The decoder's bins are open at the ends.
    """
    config = SamplerConfig(num_train_timesteps=T, variance_type=variance_type)
    x_0, x_t, noise, t, _ = drawn()
    loss = Loss(config, "vlb")
    output = 0.3 * torch.randn(
        6, 4 if "learned" in variance_type else 2, 3, 5, generator=torch.Generator().manual_seed(1)
    )
    output.requires_grad_()
    loss(output, x_0, x_t, noise, t).sum().backward()
    assert torch.isfinite(output.grad).all()
    direction = torch.randn(output.shape, generator=torch.Generator().manual_seed(2))
    step = 1e-2
    with torch.no_grad():
        up, down = (loss(output + sign * step * direction, x_0, x_t, noise, t).double() for sign in (1, -1))
    slopes = (output.grad * direction).flatten(1).sum(1).double()
    torch.testing.assert_close((up - down) / (2 * step), slopes, rtol=0.05, atol=0.05 * slopes.abs().max().item())


@pytest.mark.parametrize(
    ("diffusion", "kind", "gamma", "message"),
    [
        ({}, "l1", None, "loss must be one of"),
        ({}, "hybrid", None, "loss='hybrid' teaches a learned variance, not variance_type='fixed_small'"),
        ({"variance_type": "learned"}, "mse", None, "does not teach variance_type='learned': take 'hybrid'"),
        ({}, "vlb", 5.0, "min_snr_gamma weighs the squared error"),
        ({}, "mse", 0.0, "min_snr_gamma must be"),
    ],
)
def test_what_does_not_fit_together(diffusion, kind, gamma, message):
    with pytest.raises(ValueError, match=message):
        Loss(SamplerConfig(**diffusion), kind, gamma)


WAYS = [
    *itertools.product(PREDICTION_TYPES, ["mse"], ["fixed_small"]),
    ("epsilon", "vlb", "fixed_large"),
    ("epsilon", "hybrid", "learned_range"),
    ("v_prediction", "hybrid", "learned_range"),
]


@pytest.mark.parametrize(("prediction_type", "kind", "variance_type"), WAYS)
def test_networks_learn_by_every_loss(prediction_type, kind, variance_type, tmp_path):
    """Check that the loss falls, and that the trained network loads, samples, and resumes bit for bit."""
    learned = variance_type == "learned_range"
    network = TINY.__class__(**{**TINY.to_dict(), "learned_variance": learned})
    diffusion = SamplerConfig(num_train_timesteps=T, prediction_type=prediction_type, variance_type=variance_type)
    options = {
        "batch_size": 8,
        "learning_rate": 1e-2,
        "warmup": 5,
        "save_every": 20,
        "loss": kind,
        "mixed_precision": "no",
    }
    config = TrainingConfig(steps=80, **options)
    Trainer(tmp_path / "a", config, network, diffusion, small_moons).run(progress=False)
    losses = [json.loads(line)["loss"] for line in (tmp_path / "a" / "metrics.jsonl").read_text().splitlines()]
    assert losses[-1] < 0.8 * losses[0]
    checkpoint = load_checkpoint(tmp_path / "a")
    x = sample(checkpoint.model, (2, *checkpoint.shape), seeds=0, config=checkpoint.diffusion, progress=False)
    assert torch.isfinite(x).all()

    def interrupted(count, seed, step):
        if step == 33:
            raise KeyboardInterrupt
        return small_moons(count, seed, step)

    interrupted.__module__ = small_moons.__module__  # the checkpoint records the module as the name of the data
    with pytest.raises(KeyboardInterrupt):
        Trainer(tmp_path / "b", config, network, diffusion, interrupted).run(progress=False)
    Trainer(tmp_path / "b", config, network, diffusion, small_moons).run(progress=False)
    assert_same_run(tmp_path / "a", tmp_path / "b")


def test_a_network_whose_channels_do_not_fit_is_refused(tmp_path):
    with pytest.raises(ValueError, match="needs learned_variance in the network"):
        Trainer(
            tmp_path, TrainingConfig(loss="hybrid"), TINY, SamplerConfig(variance_type="learned_range"), small_moons
        )


@pytest.mark.parametrize(("steps", "warned"), [(T, True), (1000, False)])
def test_a_schedule_that_does_not_reach_noise_is_mentioned(steps, warned, tmp_path, caplog):
    Trainer(tmp_path, TrainingConfig(), TINY, SamplerConfig(num_train_timesteps=steps), small_moons)
    assert ("x_T is no pure noise" in caplog.text) == warned
    if warned:
        left = math.sqrt(SamplerConfig(num_train_timesteps=steps).alphas_cumprod()[-1])
        assert f"sqrt(alpha_bar_T) = {left:.2f}" in caplog.text
