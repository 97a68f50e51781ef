"""The engine against the textbook, with the same noise, and the contract of `sample`."""

import logging
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from ddpm_fast.config import PREDICTION_TYPES, VARIANCE_TYPES
from ddpm_fast.kernels.normal import normal_torch
from ddpm_fast.kernels.philox import Stream
from ddpm_fast.reference import Diffusion
from ddpm_fast.sample import Sampler, SampleResult, sample
from ddpm_fast.seeding import seed_tensor
from tests.support.networks import Wavy

SHAPE = (2, 2, 3, 5)
SEEDS = [11, 12]


def noise_of(seeds, timesteps, shape):
    """x_T and the noise of every step, float64, from the PyTorch twin of the specification."""
    keys = seed_tensor(seeds)
    options = {"dtype": torch.float64}
    x_T = normal_torch(keys, torch.zeros_like(keys), Stream.X_T, shape[1:], **options)
    steps = [normal_torch(keys, torch.full_like(keys, int(t)), Stream.STEP, shape[1:], **options) for t in timesteps]
    return x_T, steps


def model_pair(variance_type, channels=2):
    out = channels * (2 if variance_type.startswith("learned") else 1)
    return Wavy(channels, out), Wavy(channels, out, torch.float64)


@pytest.mark.parametrize("variance_type", VARIANCE_TYPES)
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_whole_walk_equals_the_reference(prediction_type, variance_type):
    """All 1000 steps with the same noise; the judge runs in float64, so the distance is the engine's rounding."""
    model, judge = model_pair(variance_type)
    options = {"prediction_type": prediction_type, "variance_type": variance_type}
    got = sample(model, SHAPE, seeds=SEEDS, output="trajectory", output_steps=[0, 499, 998, 999], **options)

    diffusion = Diffusion(torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64))
    x_T, noises = noise_of(SEEDS, range(999, -1, -1), SHAPE)
    if variance_type == "learned":  # exp(v) of a wave is a variance near 1: noisy, but a fair comparison
        assert got.frames.std() > 0.5
    walk = diffusion.sample(judge, x_T, noises, **options)
    for step, frame in zip([0, 499, 998, 999], got.frames, strict=True):
        torch.testing.assert_close(frame.double(), walk[step], atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("direction", ["x0", "output"])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_ddim_equals_the_reference(prediction_type, eta, direction):
    model, judge = model_pair("fixed_small")
    options = {"prediction_type": prediction_type, "eta": eta}
    spacing = {"num_inference_steps": 50, "timestep_spacing": "trailing"}
    got = sample(model, SHAPE, seeds=SEEDS, sampler="ddim", ddim_direction=direction, **options, **spacing)

    timesteps = Sampler(model, SHAPE, **spacing).table.timestep
    diffusion = Diffusion(torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).respaced(timesteps.tolist())
    x_T, noises = noise_of(SEEDS, timesteps, SHAPE)
    walk = diffusion.ddim_sample(judge, x_T, noises, direction=direction, **options)
    torch.testing.assert_close(got.double(), walk[-1], atol=2e-4, rtol=2e-4)


def test_ddim_with_full_noise_and_the_clipped_direction_is_ddpm():
    model = Wavy(2, 2)
    options = {"num_inference_steps": 100, "seeds": SEEDS}
    ddim = sample(model, SHAPE, sampler="ddim", eta=1.0, ddim_direction="x0", **options)
    torch.testing.assert_close(ddim, sample(model, SHAPE, **options), atol=1e-4, rtol=1e-4)


def test_a_seed_makes_the_same_image_alone_in_a_batch_and_in_any_order():
    model = Wavy(1, 1)
    whole = sample(model, (64, 1, 5, 7), seeds=100, num_inference_steps=100)
    alone = sample(model, (1, 1, 5, 7), seeds=137, num_inference_steps=100)
    shuffled = sample(model, (3, 1, 5, 7), seeds=[163, 100, 137], num_inference_steps=100)
    torch.testing.assert_close(alone[0], whole[37], atol=1e-5, rtol=0)
    torch.testing.assert_close(shuffled, whole[[63, 0, 37]], atol=1e-5, rtol=0)
    assert (whole[0] - whole[1]).abs().max() > 0.1


@pytest.mark.parametrize("variance_type", ["fixed_small", "learned_range"])
def test_the_kernels_make_the_same_image_as_pytorch(variance_type, kernel_device):
    model = model_pair(variance_type)[0].to(kernel_device)
    walks = [
        sample(model, SHAPE, seeds=SEEDS, num_inference_steps=40, variance_type=variance_type, backend=backend)
        for backend in ("triton", "torch")
    ]
    torch.testing.assert_close(*walks, atol=2e-5, rtol=0)


@pytest.mark.parametrize("shape", [(3, 2), (2, 1, 17), (2, 3, 4, 6), (1, 2, 3, 4, 5)], ids=str)
def test_any_rank(shape):
    x = sample(Wavy(shape[1], shape[1]), shape, seeds=0, num_inference_steps=10)
    assert tuple(x.shape) == shape
    assert x.dtype == torch.float32
    assert torch.isfinite(x).all()


def test_a_generator_draws_in_the_order_of_a_plain_loop():
    model = Wavy(2, 2)
    got = sample(model, SHAPE, generator=torch.Generator().manual_seed(5), num_inference_steps=20)
    generator = torch.Generator().manual_seed(5)
    x_T = torch.randn(SHAPE, generator=generator)
    noises = [torch.randn(SHAPE, generator=generator) for _ in range(19)] + [torch.zeros(SHAPE)]
    diffusion = Diffusion(torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).respaced(range(0, 1000, 50))
    walk = diffusion.sample(Wavy(2, 2, torch.float64), x_T.double(), [noise.double() for noise in noises])
    torch.testing.assert_close(got.double(), walk[-1], atol=2e-5, rtol=0)


def test_one_generator_a_sample_makes_samples_independent_of_the_batch():
    model = Wavy(2, 2)
    generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    both = sample(model, SHAPE, generator=generators, num_inference_steps=20)
    second = sample(model, (1, *SHAPE[1:]), generator=torch.Generator().manual_seed(2), num_inference_steps=20)
    torch.testing.assert_close(both[1:], second, atol=1e-5, rtol=0)


def test_given_x_T_is_where_the_walk_starts():
    x_T = torch.linspace(-1, 1, 60).view(SHAPE)
    model = Wavy(2, 2)
    options = {"sampler": "ddim", "num_inference_steps": 5, "x_T": x_T}
    torch.testing.assert_close(sample(model, SHAPE, seeds=1, **options), sample(model, SHAPE, seeds=2, **options))
    assert torch.equal(x_T, torch.linspace(-1, 1, 60).view(SHAPE))


def test_temperature_zero_follows_the_mean():
    model = Wavy(2, 2)
    x_T = torch.zeros(SHAPE)
    walks = [sample(model, SHAPE, seeds=s, x_T=x_T, temperature=0.0, num_inference_steps=30) for s in (1, 2)]
    assert torch.equal(*walks)
    diffusion = Diffusion(torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).respaced(range(0, 990, 33))
    walk = diffusion.sample(Wavy(2, 2, torch.float64), x_T.double(), [torch.zeros(SHAPE)] * 30, temperature=0.0)
    torch.testing.assert_close(walks[0].double(), walk[-1], atol=2e-5, rtol=0)


def test_dynamic_thresholding_bounds_by_the_quantile_and_divides():
    model, seen = Wavy(2, 2), []
    options = {"thresholding": True, "dynamic_thresholding_ratio": 0.7, "sample_max_value": 3.0}
    result = sample(
        model, SHAPE, seeds=SEEDS, timesteps=[600], output="x0", callback=lambda *a: seen.append(a), **options
    )
    x_T, _ = noise_of(SEEDS, [], SHAPE)
    diffusion = Diffusion(torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64))
    raw = diffusion.predict_x_0(x_T, 600, Wavy(2, 2, torch.float64)(x_T, torch.full((2,), 600)))
    bound = torch.quantile(raw.abs().flatten(1), 0.7, dim=1).clamp(1, 3).view(2, 1, 1, 1)
    expected = raw.clamp(-bound, bound) / bound
    assert (raw.abs() > bound).any()
    torch.testing.assert_close(result.frames[0].double(), expected, atol=1e-4, rtol=0)
    assert [(number, t) for number, t, _ in seen] == [(0, 600)]


@pytest.mark.parametrize("scale", [3.0, [1.5, 4.0]], ids=["one scale", "one a sample"])
def test_guidance_mixes_the_two_halves(scale):
    model = Wavy(2, 2)
    cond, uncond = torch.full((2, 1, 1, 1), 0.3), torch.full((2, 1, 1, 1), -0.2)
    scales = torch.as_tensor(scale).view(-1, 1, 1, 1)

    def guided(x, t):
        return model(x, t, uncond) + scales * (model(x, t, cond) - model(x, t, uncond))

    options = {"seeds": SEEDS, "num_inference_steps": 50}
    got = sample(
        model, SHAPE, model_kwargs={"shift": cond}, uncond_kwargs={"shift": uncond}, guidance_scale=scale, **options
    )
    torch.testing.assert_close(got, sample(guided, SHAPE, **options), atol=1e-4, rtol=0)


class TestOutputs:
    model = Wavy(2, 2)

    def test_trajectory_ends_in_the_sample(self):
        result = sample(self.model, SHAPE, seeds=3, num_inference_steps=20, output="trajectory")
        assert isinstance(result, SampleResult)
        assert result.frames.shape == (10, *SHAPE)
        assert result.seeds == [3, 4]
        assert result.frame_timesteps[0] == 950
        assert result.frame_timesteps[-1] == 0
        assert torch.equal(result.frames[-1], result.sample)

    def test_previews_are_the_clipped_origin(self):
        states = sample(self.model, SHAPE, seeds=3, num_inference_steps=20, output="trajectory", output_steps=[6, 7])
        previews = sample(self.model, SHAPE, seeds=3, num_inference_steps=20, output="x0", output_steps=[7])
        diffusion = Diffusion(torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64))
        x, t = states.frames[0], previews.frame_timesteps[0]
        x_0 = diffusion.predict_x_0(x.double(), t, self.model(x, torch.full((2,), t)).double()).clamp(-1, 1)
        torch.testing.assert_close(previews.frames[0].double(), x_0, atol=1e-4, rtol=0)
        assert torch.equal(previews.sample, sample(self.model, SHAPE, seeds=3, num_inference_steps=20))

    def test_callback_sees_copies_of_every_state(self):
        seen = []
        x = sample(self.model, SHAPE, seeds=3, num_inference_steps=4, callback=lambda *args: seen.append(args))
        assert [(step, t) for step, t, _ in seen] == [(0, 750), (1, 500), (2, 250), (3, 0)]
        assert torch.equal(seen[-1][2], x)
        assert not torch.equal(seen[0][2], seen[1][2])

    def test_decode_makes_the_result(self):
        plain = sample(self.model, SHAPE, seeds=3, num_inference_steps=4)
        assert torch.equal(sample(self.model, SHAPE, seeds=3, num_inference_steps=4, decode=lambda x: x * 2), plain * 2)

    def test_a_result_carries_the_seeds(self):
        result = sample(self.model, SHAPE, num_inference_steps=4, output="result")
        assert result.frames is None
        again = sample(self.model, SHAPE, num_inference_steps=4, seeds=result.seeds)
        assert torch.equal(result.sample, again)

    def test_fresh_seeds_are_reported(self, caplog):
        sampler = Sampler(self.model, SHAPE, num_inference_steps=4)
        with caplog.at_level(logging.INFO, "ddpm_fast"):
            first = sampler()
        seeds = sampler.last_seeds
        assert str(seeds[0]) in caplog.text
        assert seeds[1] == seeds[0] + 1
        assert torch.equal(sampler(seeds=seeds), first)
        assert not torch.equal(sampler(), first)

    def test_results_survive_the_next_call(self):
        sampler = Sampler(self.model, SHAPE, num_inference_steps=4)
        first = sampler(seeds=1)
        kept = first.clone()
        sampler(seeds=2)
        assert torch.equal(first, kept)


class TestReuse:
    def test_buffers_never_move_and_calls_repeat(self):
        seen = []

        def model(x, t):
            seen.append((x.data_ptr(), t.data_ptr()))
            return torch.tanh(x)

        sampler = Sampler(model, SHAPE, num_inference_steps=5)
        assert torch.equal(sampler(seeds=1), sampler(seeds=1))
        assert len(seen) == 10
        assert len(set(seen)) == 1

    def test_new_conditioning_goes_into_the_old_buffers(self):
        model, shift = Wavy(2, 2), torch.zeros(2, 1, 1, 1)
        sampler = Sampler(model, SHAPE, num_inference_steps=5, model_kwargs={"shift": shift})
        pointer = sampler.loop.network.kwargs["shift"].data_ptr()
        changed = sampler(seeds=1, model_kwargs={"shift": shift + 0.5})
        assert sampler.loop.network.kwargs["shift"].data_ptr() == pointer
        fresh = sample(model, SHAPE, seeds=1, num_inference_steps=5, model_kwargs={"shift": shift + 0.5})
        assert torch.equal(changed, fresh)
        assert torch.equal(shift, torch.zeros(2, 1, 1, 1))

    def test_a_model_that_changes_its_input_does_no_harm(self):
        def careless(x, t):
            return x.mul_(0.5)

        def careful(x, t):
            return x * 0.5

        options = {"seeds": 1, "num_inference_steps": 10}
        assert torch.equal(sample(careless, SHAPE, **options), sample(careful, SHAPE, **options))

    def test_the_timestep_that_the_model_sees(self):
        seen = []

        def model(x, t):
            seen.append(t.clone())
            return x

        sample(model, SHAPE, seeds=0, timesteps=[900, 37, 4])
        assert torch.equal(torch.stack(seen), torch.tensor([[900, 900], [37, 37], [4, 4]]))
        assert seen[0].dtype == torch.int64

    def test_gradients_are_off(self):
        model = Wavy(2, 2).requires_grad_(True)
        assert not sample(model, SHAPE, seeds=0, num_inference_steps=2).requires_grad


def test_bfloat16_network_keeps_a_float32_state():
    seen = []

    class Linear(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(4, 4)

        def forward(self, x, t):
            out = self.layer(x)
            seen.append((x.dtype, out.dtype))
            return out

    model = Linear()
    low = sample(model, (2, 4), seeds=0, num_inference_steps=20, dtype=torch.bfloat16)
    high = sample(model, (2, 4), seeds=0, num_inference_steps=20)
    assert seen[0] == (torch.bfloat16, torch.bfloat16)
    assert seen[-1] == (torch.float32, torch.float32)
    assert low.dtype == torch.float32
    assert 0 < (low - high).abs().max() < 0.1
    assert next(model.parameters()).dtype == torch.float32


def test_a_callback_does_not_run_in_the_networks_precision():
    seen = []

    class Linear(torch.nn.Linear):
        def forward(self, x, t):
            return super().forward(x)

    sample(
        Linear(4, 4), (2, 4), seeds=0, num_inference_steps=1, dtype=torch.bfloat16,
        callback=lambda step, t, x: seen.append((x @ x.T).dtype), decode=lambda x: seen.append((x @ x.T).dtype),
    )  # fmt: skip
    assert seen == [torch.float32] * 2


@pytest.mark.filterwarnings("ignore:overflow")  # of the interpreter
@pytest.mark.parametrize("bad", [400.0, torch.nan])
def test_where_there_is_no_noise_the_learned_variance_does_not_matter(bad, kernel_device):
    class Model(Wavy):
        def forward(self, x, t):
            out = super().forward(x, t)
            return torch.where(
                (t == 0).view(-1, 1, 1, 1) & (torch.arange(4, device=x.device) > 1)[:, None, None], bad, out
            )

    options = {"seeds": 0, "timesteps": [500, 0], "variance_type": "learned"}
    walks = [
        sample(Model(2, 4).to(kernel_device), SHAPE, backend=backend, **options) for backend in ("torch", "triton")
    ]
    torch.testing.assert_close(*walks, atol=2e-5, rtol=0)


def test_a_float64_network_is_fed_float64():
    model = Wavy(2, 2, torch.float64)
    torch.testing.assert_close(
        sample(model, SHAPE, seeds=0, num_inference_steps=20),
        sample(Wavy(2, 2), SHAPE, seeds=0, num_inference_steps=20),
        atol=1e-4,
        rtol=0,
    )


def test_an_object_with_sample_and_a_tuple_are_understood():
    model = Wavy(2, 2)

    class Output:
        def __init__(self, sample):
            self.sample = sample

    options = {"seeds": 0, "num_inference_steps": 3}
    plain = sample(model, SHAPE, **options)
    assert torch.equal(sample(lambda x, t: Output(model(x, t)), SHAPE, **options), plain)
    assert torch.equal(sample(lambda x, t: (model(x, t),), SHAPE, **options), plain)


def test_numpy_sizes_are_sizes():
    assert sample(Wavy(2, 2), np.array([2, 2, 3]), seeds=0, num_inference_steps=2).shape == (2, 2, 3)


def test_a_sampler_made_and_called_in_inference_mode_works_outside():
    conv = torch.nn.Conv2d(3, 3, 1)
    with torch.inference_mode():
        sampler = Sampler(lambda x, t: conv(x), (2, 3, 4, 4), num_inference_steps=3, device="cpu")
        inside = sampler(seeds=0)
        sampler(seeds=0, output="x0")
    outside = sampler(seeds=0)
    assert torch.equal(inside, outside)
    assert not outside.is_inference()
    assert sampler(seeds=0, output="x0").frames is not None


def test_calls_from_several_threads_wait_for_one_another():
    sampler = Sampler(Wavy(2, 2), (2, 2, 4, 4), num_inference_steps=30)
    expected = [sampler(seeds=seed, progress=False) for seed in range(8)]
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda seed: sampler(seeds=seed, progress=False), range(8)))
    assert all(map(torch.equal, results, expected))


def test_a_call_from_its_own_callback_is_refused():
    sampler = Sampler(Wavy(2, 2), (2, 2, 4, 4), num_inference_steps=3)
    with pytest.raises(RuntimeError, match="cannot be called from its own callback"):
        sampler(seeds=0, callback=lambda *args: sampler(seeds=1))
    assert sampler(seeds=0, progress=False).shape == (2, 2, 4, 4)
