"""The graph path on the CPU: a stand-in for the recording, everything around it for real."""

import logging

import pytest
import torch

import ddpm_fast.engine.loop
from ddpm_fast.engine.graph import WARMUPS, CaptureError, root_cause
from ddpm_fast.sample import Sampler, sample
from ddpm_fast.validate import line_of
from tests.support.networks import Wavy

SHAPE = (2, 2, 3, 5)


class Replayed:
    """Runs `body` where a CUDA graph would replay its recording; warms up on live buffers, as the real one does."""

    made = 0
    replays = 0

    def __init__(self, body, device, pool):
        for _ in range(WARMUPS):
            body()
        self.body = body
        self.output = None
        Replayed.made += 1

    def replay(self):
        Replayed.replays += 1
        self.output = self.body()


class Refused:
    def __init__(self, body, device, pool):
        raise CaptureError("operation not permitted when stream is capturing")


@pytest.fixture
def recording(monkeypatch):
    monkeypatch.setattr("ddpm_fast.engine.base.can_capture", lambda device: True)
    monkeypatch.setattr(ddpm_fast.engine.loop, "StepGraph", Replayed)
    Replayed.made = Replayed.replays = 0


@pytest.mark.parametrize("stride", [1, 3, 4, 10, 16])
def test_any_stride_gives_the_eager_walk(recording, stride, kernel_device):
    """10 steps in strides that divide them and strides that do not: what runs past the end changes nothing."""
    model = Wavy(2, 2).to(kernel_device)
    options = {"num_inference_steps": 10, "backend": "triton", "optimize": None}
    sampler = Sampler(model, SHAPE, steps_per_replay=stride, execution="graph", **options)
    eager = sample(model, SHAPE, seeds=7, execution="eager", **options)
    for _ in range(2):
        torch.testing.assert_close(sampler(seeds=7), eager, atol=1e-6, rtol=0)
    assert Replayed.made == 1
    assert Replayed.replays == 2 * (1 + -(-10 // stride))  # the first replay of a run is compared
    assert not torch.equal(sampler(seeds=8), eager)


def test_noise_from_outside_goes_through_one_buffer(recording):
    model = Wavy(2, 2)
    for source in ({"seeds": 7}, {"generator": torch.Generator().manual_seed(3)}):
        sampler = Sampler(model, SHAPE, num_inference_steps=10, steps_per_replay=5, backend="torch")
        graphed = sampler(**source)
        if "generator" in source:
            source["generator"].manual_seed(3)
        torch.testing.assert_close(graphed, sample(model, SHAPE, num_inference_steps=10, execution="eager", **source))


def test_previews_callbacks_and_guidance_replay_one_step_at_a_time(recording, kernel_device):
    model, seen = Wavy(2, 2).to(kernel_device), []
    shift = torch.full((2, 1, 1, 1), 0.3)
    options = {
        "num_inference_steps": 8, "backend": "triton", "output": "x0", "output_steps": [2, 5], "guidance_scale": 2.0,
        "model_kwargs": {"shift": shift}, "uncond_kwargs": {"shift": -shift}, "seeds": 1,
    }  # fmt: skip
    graphed = sample(model, SHAPE, steps_per_replay=4, callback=lambda *a: seen.append(a[0]), **options)
    eager = sample(model, SHAPE, execution="eager", **options)
    torch.testing.assert_close(graphed.frames, eager.frames, atol=1e-6, rtol=0)
    assert seen == list(range(8))
    assert Replayed.replays == 9


def test_a_network_that_cannot_be_captured_runs_eagerly_and_says_so_once(recording, monkeypatch, caplog):
    monkeypatch.setattr(ddpm_fast.engine.loop, "StepGraph", Refused)
    sampler = Sampler(Wavy(2, 2), SHAPE, num_inference_steps=5)
    with caplog.at_level(logging.WARNING, "ddpm_fast"):
        first, _ = sampler(seeds=1), sampler(seeds=2)
    assert [record.message for record in caplog.records] == [
        "the network cannot be captured in a CUDA graph: "
        "operation not permitted when stream is capturing; running eagerly"
    ]
    assert torch.equal(first, sample(Wavy(2, 2), SHAPE, num_inference_steps=5, seeds=1, execution="eager"))


def test_demanding_a_graph_makes_that_an_error(recording, monkeypatch):
    monkeypatch.setattr(ddpm_fast.engine.loop, "StepGraph", Refused)
    with pytest.raises(RuntimeError, match="cannot be captured in a CUDA graph: operation not permitted"):
        sample(Wavy(2, 2), SHAPE, num_inference_steps=5, seeds=1, execution="graph")


def test_the_reason_of_a_broken_capture_is_the_first_error():
    def capture():
        try:
            raise RuntimeError("operation not permitted when stream is capturing\nand more lines")
        finally:
            raise RuntimeError("operation failed due to a previous error during capture")

    with pytest.raises(RuntimeError) as error:
        capture()
    assert line_of(root_cause(error.value)) == "operation not permitted when stream is capturing"
    assert line_of(RuntimeError()) == "RuntimeError"


@pytest.mark.parametrize("execution", ["auto", "graph"])
def test_what_fails_in_the_warm_up_is_the_models_own_error(recording, execution):
    def broken(x, t):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="^mat1 and mat2"):
        sample(broken, SHAPE, num_inference_steps=5, seeds=1, execution=execution)


def test_an_error_of_the_model_itself_is_not_blamed_on_the_capture(recording):
    def wrong(x, t):
        return x[:, :1]

    with pytest.raises(ValueError, match="model must return shape"):
        sample(wrong, SHAPE, num_inference_steps=5, seeds=1)


def test_nan_in_a_replayed_walk_names_the_step(recording):
    """A GPU run looks at the end only, then walks once more to find the step."""

    def model(x, t):
        return torch.where(t[0] == 40, torch.full_like(x, torch.nan), x)

    sampler = Sampler(model, SHAPE, timesteps=range(90, -1, -10))
    for source in ({"seeds": 1}, {"generator": torch.Generator().manual_seed(0)}):
        with pytest.raises(FloatingPointError, match=r"step 5 of 10 \(timestep 40\)"):
            sampler(**source)
