"""The whole walk as a recording on the CPU: nothing may depend on the host or on tensors that move."""

import pytest
import torch
from torch import nn

from ddpm_fast.engine.loop import Loop
from ddpm_fast.engine.noise import PhiloxNoise
from ddpm_fast.sample import Sampler, sample
from tests.support.fake_cuda import LAUNCH_FAILURE, FakeCuda
from tests.support.networks import Wavy

SHAPE = (3, 2, 3, 5)
OPTIONS = {"num_inference_steps": 10, "backend": "torch"}


@pytest.fixture(autouse=True)
def cuda(monkeypatch):
    # As with Triton's kernels: the step makes its own noise, so that several steps fit in one recording.
    monkeypatch.setattr(PhiloxNoise, "in_kernel", property(lambda self: True, lambda self, value: None), raising=False)
    return FakeCuda().install(monkeypatch)


class Conditional(nn.Module):
    """Has operations of t, of the condition, and of both."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.time, self.prompt, self.both = nn.Linear(1, 2), nn.Linear(4, 2), nn.Linear(2, 2)
        self.conv = nn.Conv2d(2, 2, 3, padding=1)

    def forward(self, x, t, c):
        emb = torch.sin(self.time(t[:, None] / 100))
        both = self.both(emb * self.prompt(c))
        return torch.tanh(self.conv(x) * (1 + self.prompt(c)[..., None, None]) + (emb + both)[..., None, None])


def eager(model, **options):
    return sample(model, SHAPE, **{**OPTIONS, **options}, execution="eager", progress=False)


@pytest.mark.parametrize("stride", [1, 3, 5, 16])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"sampler": "ddim", "eta": 0.5},
        {"thresholding": True, "sample_max_value": 1.5},
        {"guidance_scale": [1.0, 2.0, 3.0], "model_kwargs": {"shift": 0.1}, "uncond_kwargs": {"shift": 0.1}},
        {"dtype": torch.bfloat16},
    ],
    ids=["plain", "ddim", "threshold", "guided", "autocast"],
)
def test_walks(cuda, options, stride):
    model = Wavy(2, 2)
    sampler = Sampler(model, SHAPE, execution="graph", steps_per_replay=stride, **OPTIONS, **options)
    for seed in (3, 4):
        expected = eager(model, seeds=seed, **options)
        torch.testing.assert_close(sampler(seeds=seed, progress=False), expected, atol=1e-5, rtol=0)
    assert cuda.made == 1
    assert cuda.replays == 2 * (1 + -(-10 // stride))  # the first replay of a run is compared


def test_noise_of_a_generator():
    sampler = Sampler(Wavy(2, 2), SHAPE, execution="graph", **OPTIONS)
    for seed in (1, 2):
        expected = eager(Wavy(2, 2), generator=torch.Generator().manual_seed(seed))
        torch.testing.assert_close(sampler(generator=torch.Generator().manual_seed(seed), progress=False), expected)


@pytest.mark.parametrize("optimize", [None, "hoist"])
def test_new_conditions_and_parameters(cuda, optimize):
    """Of one condition for all, of several, of fewer: copied into what the recording reads."""
    model = Conditional().eval()
    conditions = torch.randn(4, 3, 4)
    conditions[0] = conditions[0, 0]
    conditions[3] = conditions[3, 0]
    sampler = Sampler(model, SHAPE, execution="graph", optimize=optimize, model_kwargs={"c": conditions[0]}, **OPTIONS)
    assert (sampler.loop.network.hoisted is not None) == (optimize is not None)
    for seed, c in enumerate(conditions):
        images = sampler(seeds=seed, model_kwargs={"c": c}, progress=False)
        torch.testing.assert_close(images, eager(model, seeds=seed, model_kwargs={"c": c}), atol=1e-5, rtol=0)
        with torch.no_grad():  # as when averaged weights take the place of the last ones
            for parameter in model.parameters():
                parameter.mul_(0.9)
    assert cuda.made == (1 if optimize is None else 2)  # three conditions need more room than one


def test_a_rebound_buffer_is_seen(monkeypatch):
    """The planted mistake: x' in a new tensor; calling the function again would hide it."""
    right = Loop._step

    def rebinding(self, *args, **kwargs):
        output = right(self, *args, **kwargs)
        self.x = self.x.clone()
        return output

    expected = eager(Wavy(2, 2), seeds=1)
    monkeypatch.setattr(Loop, "_step", rebinding)
    torch.testing.assert_close(eager(Wavy(2, 2), seeds=1), expected)
    with pytest.raises(RuntimeError, match=LAUNCH_FAILURE):
        Sampler(Wavy(2, 2), SHAPE, execution="graph", **OPTIONS)(seeds=1, progress=False)


def test_a_network_with_a_host_sync_is_reported(caplog):
    def syncing(x, t):
        return torch.tanh(x) if t.float().mean().item() > 0 else x

    with pytest.raises(
        RuntimeError,
        match=r"cannot be captured in a CUDA graph: the host waits for the GPU \(test_recorded.py, line \d+: return",
    ):
        Sampler(syncing, SHAPE, execution="graph", device="cpu", **OPTIONS)(seeds=1, progress=False)
    result = Sampler(syncing, SHAPE, device="cpu", **OPTIONS)(seeds=1, progress=False)
    assert "running eagerly" in caplog.text
    torch.testing.assert_close(result, eager(syncing, seeds=1, device="cpu"), atol=1e-5, rtol=0)


def test_what_is_freed_is_recorded_anew(cuda):
    sampler = Sampler(Wavy(2, 2), SHAPE, execution="graph", **OPTIONS)
    first = sampler(seeds=1, progress=False)
    sampler.free()
    assert torch.equal(sampler(seeds=1, progress=False), first)
    assert cuda.made == 2
