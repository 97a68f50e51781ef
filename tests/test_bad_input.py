"""Tests of wrong arguments: each is reported in one sentence, before the network is called."""

import logging

import pytest
import torch

from ddpm_fast.engine.loop import CHECK_EVERY
from ddpm_fast.models.unet import UNet
from ddpm_fast.sample import Sampler, sample
from tests.support.networks import Wavy

SHAPE = (2, 2, 3, 5)


def never(x, t, **kwargs):
    raise AssertionError("the network was called")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_inference_steps": 1001}, "num_inference_steps=1001 is more than the schedule has"),
        ({"num_inference_steps": 0}, "num_inference_steps must be an integer >= 1, got 0"),
        (
            {"prediction_type": "eps"},
            r"prediction_type must be one of \['epsilon', 'sample', 'v_prediction'\], got 'eps'",
        ),
        ({"variance_type": "small"}, "variance_type must be one of"),
        ({"beta_schedule": "cosine"}, "beta_schedule must be one of"),
        ({"timestep_spacing": "even"}, "timestep_spacing must be one of"),
        ({"sampler": "euler"}, r"sampler must be one of \['ddpm', 'ddim'\], got 'euler'"),
        ({"ddim_direction": "raw"}, "ddim_direction must be one of"),
        ({"eta": 0.5}, "eta belongs to sampler='ddim'"),
        ({"execution": "fast"}, r"execution must be one of \['auto', 'graph', 'eager'\], got 'fast'"),
        ({"execution": "graph", "device": "cpu"}, "execution='graph' needs a CUDA device, got cpu"),
        ({"backend": "cuda"}, "backend must be one of"),
        ({"steps_per_replay": 0}, "steps_per_replay must be an integer >= 1"),
        ({"output": "video"}, r"output must be one of \['sample', 'result', 'x0', 'trajectory'\], got 'video'"),
        ({"output_steps": [1]}, "output_steps needs output="),
        ({"output": "x0", "output_steps": [1000]}, r"output_steps must be an integer in \[0, 999\], got 1000"),
        ({"output": "x0", "output_steps": []}, "output_steps must name at least one step"),
        ({"seeds": [1]}, "seeds must be one a sample: 2 samples, got 1 seeds"),
        ({"seeds": range(3)}, "2 samples, got 3 seeds"),
        ({"seeds": -1}, r"seeds must lie in \[0, 2\^64\), got -1"),
        ({"seeds": 1, "generator": torch.Generator()}, "from seeds or from generators, not from both"),
        ({"generator": [torch.Generator()]}, "generators must be one a sample: 2 samples, got 1"),
        ({"x_T": torch.zeros(2, 2, 3, 4)}, r"x_T must be a float tensor of shape \(2, 2, 3, 5\)"),
        ({"x_T": torch.zeros(SHAPE, dtype=torch.int64)}, "x_T must be a float tensor"),
        ({"x_T": torch.full(SHAPE, torch.nan)}, "x_T must be finite"),
        ({"guidance_scale": 2.0}, "guidance_scale and uncond_kwargs belong together"),
        ({"uncond_kwargs": {}}, "guidance_scale and uncond_kwargs belong together"),
        (
            {"guidance_scale": [1.0], "uncond_kwargs": {}},
            r"guidance_scale must be one finite number or one a sample \(2\)",
        ),
        (
            {"guidance_scale": 1.0, "uncond_kwargs": {"y": 1}, "model_kwargs": {"z": 1}},
            r"uncond_kwargs must have the names of model_kwargs, \['z'\], got \['y'\]",
        ),
        (
            {"guidance_scale": 1.0, "uncond_kwargs": {"y": torch.zeros(1)}, "model_kwargs": {"y": torch.ones(1)}},
            r"must have equal shapes \(2, ...\)",
        ),
        ({"guidance_scale": 1.0, "uncond_kwargs": {"y": 1}, "model_kwargs": {"y": 2}}, "must be two tensors or equal"),
        ({"dtype": torch.int32}, "dtype must be a floating point torch.dtype"),
        ({"dtype": "bfloat16"}, "dtype must be a floating point torch.dtype such as torch.bfloat16, got 'bfloat16'"),
        ({"device": 3.5}, "device 3.5 is not a device"),
        ({"guidance_scale": "a", "uncond_kwargs": {}}, "guidance_scale must be one finite number"),
        ({"device": "gpu"}, "device 'gpu' is not a device"),
        ({"device": "mps"}, "device must be 'cpu' or 'cuda"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_options(options, message):
    with pytest.raises(ValueError, match=message):
        sample(never, SHAPE, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"decode": 3}, "decode must be a callable or None, got 3"),
        ({"callback": 3}, "callback must be a callable or None, got 3"),
        ({"generator": 5}, "generator must be a torch.Generator or a list"),
        ({"generator": [1, 2]}, "generator must be a torch.Generator or a list"),
        ({"output": "x0", "output_steps": 2}, "output_steps must be a list of step numbers, got 2"),
        ({"config": {}}, "config must be a SamplerConfig, got dict"),
        ({"seeds": 0.5}, "seeds must be an int, a range or sequence"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_wrong_types(options, message):
    with pytest.raises(TypeError, match=message):
        sample(never, SHAPE, **options)


def test_a_dtype_that_autocast_does_not_have():
    with pytest.raises(ValueError, match=r"parameters are torch.float32; to compute in torch.float64, convert"):
        sample(Wavy(2, 2), SHAPE, dtype=torch.float64)


def test_containers_in_the_conditioning_may_change_by_their_tensors_alone():
    held = {"a": torch.zeros(2), "b": 3}
    sampler = Sampler(lambda x, t, added: x, SHAPE, num_inference_steps=2, model_kwargs={"added": held})
    sampler(seeds=0, model_kwargs={"added": held})
    sampler(seeds=0, model_kwargs={"added": {"a": torch.ones(2), "b": 3}})
    with pytest.raises(ValueError, match=r"model_kwargs\['added'\]\['b'\] was 3"):
        sampler(seeds=0, model_kwargs={"added": {"a": torch.zeros(2), "b": 4}})
    with pytest.raises(ValueError, match=r"must keep the names .*\['b'\].*, got \['added'\]"):
        sampler(seeds=0, model_kwargs={"added": {"a": torch.zeros(2)}})
    other = {"added": {**held, "b": 4}}
    with pytest.raises(ValueError, match=r"model_kwargs\['added'\]\['b'\] and .* must be two tensors or equal"):
        Sampler(never, SHAPE, guidance_scale=2.0, model_kwargs={"added": held}, uncond_kwargs=other)


def test_unconditional_values_without_guidance():
    with pytest.raises(ValueError, match="uncond_kwargs belong to guidance, which this sampler was built without"):
        Sampler(never, SHAPE)(uncond_kwargs={"y": 1})


@pytest.mark.parametrize("shape", [(2, 3, 32, 32), (2, 1, 30, 30), (2, 1, 32)], ids=str)
def test_a_shape_that_the_network_does_not_take(shape):
    with pytest.raises(ValueError, match=r"x must be \[B, 1, H, W\] with H and W divisible by 8"):
        sample(UNet(), shape)


@pytest.mark.parametrize("shape", [(), (4,), (0, 1, 2, 2), (2, -1, 3), (1.5, 2), "ab", 5, None], ids=str)
def test_shapes(shape):
    with pytest.raises(ValueError, match=r"shape must be \(batch, channels, ...\)"):
        sample(never, shape)


def test_unknown_names_are_listed_with_the_nearest():
    with pytest.raises(TypeError, match="unknown option 'num_steps'; .*num_inference_steps"):
        sample(never, SHAPE, num_steps=3)
    with pytest.raises(TypeError, match="did you mean 'clip_sample'"):
        sample(never, SHAPE, clip_samples=True)


def test_what_is_no_model():
    with pytest.raises(TypeError, match="model must be a callable"):
        sample("unet", SHAPE)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_device_that_is_not_there():
    with pytest.raises(ValueError, match="device 'cuda:1' is not there: torch finds no CUDA GPU"):
        sample(never, SHAPE, device="cuda:1")


def test_a_model_on_another_device():
    with pytest.raises(ValueError, match="the model is on meta, but device='cpu': move it"):
        sample(Wavy(2, 2).to("meta"), SHAPE, device="cpu")


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (lambda x, t: x[:, :1], {}, r"must return shape \(2, 2, 3, 5\), got \(2, 1, 3, 5\)"),
        (lambda x, t: torch.cat([x, x], 1), {}, "needs variance_type='learned_range'"),
        (lambda x, t: x, {"variance_type": "learned"}, "needs another variance_type"),
        (lambda x, t: x.long(), {}, "must return floating point numbers, got torch.int64"),
    ],
    ids=["shape", "twice the channels", "half the channels", "integers"],
)
def test_what_the_model_returns(model, options, message):
    calls = []

    def counted(x, t):
        calls.append(t)
        return model(x, t)

    with pytest.raises(ValueError, match=message):
        sample(counted, SHAPE, **options)
    assert len(calls) == 1


def test_a_model_that_returns_nothing():
    with pytest.raises(TypeError, match="must return a tensor or an object with a tensor .sample, got tuple"):
        sample(lambda x, t: (), SHAPE)


def test_large_finite_states_are_no_nan():
    huge = torch.full(SHAPE, 2e38)
    options = {"prediction_type": "sample", "clip_sample": False, "num_inference_steps": 3}
    assert torch.isfinite(sample(lambda x, t: huge, SHAPE, seeds=0, **options)).all()


def test_a_model_that_returns_no_tensor():
    with pytest.raises(TypeError, match="must return a tensor or an object with a tensor .sample, got dict"):
        sample(lambda x, t: {"out": x}, SHAPE)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_nan_stops_the_run_soon_and_its_step_is_named(bad):
    calls = []

    def model(x, t):
        calls.append(t)
        out = x.clone()
        if t[0] == 997:
            out[1, 0, 2, 3] = bad
        return out

    with pytest.raises(FloatingPointError, match=r"step 2 of 1000 \(timestep 997\), for sample 1 of the batch"):
        sample(model, SHAPE, seeds=0, clip_sample=False)
    assert len(calls) == CHECK_EVERY + 3  # one check, and a second run that finds the step


def test_changed_conditioning_must_fit():
    sampler = Sampler(Wavy(2, 2), SHAPE, num_inference_steps=2, model_kwargs={"shift": torch.zeros(2, 1, 1, 1)})
    with pytest.raises(ValueError, match=r"model_kwargs\['shift'\] must keep shape \(2, 1, 1, 1\)"):
        sampler(model_kwargs={"shift": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"must keep the names \['shift'\], got \['y'\]"):
        sampler(model_kwargs={"y": 1})
    with pytest.raises(ValueError, match=r"model_kwargs\['shift'\] was"):
        sampler(model_kwargs={"shift": 0.5})


def test_dropout_that_is_still_on_is_mentioned(caplog):
    class Dropping(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.drop = torch.nn.Dropout(0.5)

        def forward(self, x, t):
            return self.drop(x)

    with caplog.at_level(logging.WARNING, "ddpm_fast"):
        Sampler(Dropping().eval(), SHAPE)
        assert not caplog.records
        Sampler(Dropping(), SHAPE)
    assert "model.eval()" in caplog.text
