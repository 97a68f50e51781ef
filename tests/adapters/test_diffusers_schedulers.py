"""diffusers' schedulers and ours: the same step. `backend="torch"` takes on a CPU the path that CUDA takes."""

import itertools

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers")

from diffusers import DDIMPipeline, DDIMScheduler, DDPMPipeline, DDPMScheduler
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from ddpm_fast import accelerate
from ddpm_fast.adapters.diffusers import FastDDIMScheduler, FastDDPMScheduler
from tests.adapters.diffusers_models import unet

SHAPE = (2, 3, 6, 5)
CLIPPINGS = ({}, {"clip_sample": False}, {"clip_sample_range": 2.0}, {"thresholding": True, "sample_max_value": 1.5})


def tensors(channels=3, dtype=torch.float32):
    g = torch.Generator().manual_seed(1)
    return torch.randn(2, channels, 6, 5, generator=g).to(dtype), torch.randn(SHAPE, generator=g).to(dtype)


def compare(stock, steps, tolerance, channels=3, dtype=torch.float32, backend="torch", **options):
    """One step from every timestep, both results, and what is left of the generator."""
    fast = accelerate(stock, backend=backend)
    stock.set_timesteps(steps)
    fast.set_timesteps(steps)
    output, sample = tensors(channels, dtype)
    for t in stock.timesteps:
        mine, theirs = torch.Generator().manual_seed(2), torch.Generator().manual_seed(2)
        ours = fast.step(output, t, sample, generator=mine, **options)
        expected = stock.step(output, t, sample, generator=theirs, **options)
        for name in ("prev_sample", "pred_original_sample"):
            a, b = getattr(ours, name), getattr(expected, name)
            assert (a.shape, a.dtype) == (b.shape, b.dtype)
            scale = max(1.0, b.abs().max().item())
            if name == "pred_original_sample":  # (x - sqrt(1 - alpha_bar) epsilon) / sqrt(alpha_bar)
                scale = max(scale, stock.alphas_cumprod[t].item() ** -0.5)
            assert (a - b).abs().max().item() <= tolerance * scale, (name, int(t))
        assert torch.equal(mine.get_state(), theirs.get_state())


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("variance", ["fixed_small", "fixed_small_log", "fixed_large", "learned_range"])
def test_ddpm_step(prediction, variance, spacing):
    for clipping, steps in itertools.product(CLIPPINGS, (1, 10, 1000)):
        stock = DDPMScheduler(prediction_type=prediction, variance_type=variance, timestep_spacing=spacing, **clipping)
        compare(stock, steps if steps < 1000 or not clipping else 9, 2e-6, 6 if variance == "learned_range" else 3)


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("clipped", [True, False])
def test_ddim_step(prediction, eta, clipped):
    for clipping, to_one in itertools.product(CLIPPINGS, (True, False)):
        stock = DDIMScheduler(prediction_type=prediction, set_alpha_to_one=to_one, **clipping)
        compare(stock, 12, 1e-5, eta=eta, use_clipped_model_output=clipped)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_its_dtype(dtype):
    tolerance = 3 * torch.finfo(dtype).eps
    compare(DDPMScheduler(), 10, tolerance, dtype=dtype)
    compare(DDIMScheduler(), 10, tolerance, dtype=dtype, eta=1.0)


def test_on_a_cpu_it_is_diffusers_to_the_bit():
    for stock in (DDPMScheduler(), DDPMScheduler(variance_type="learned_range"), DDIMScheduler()):
        channels = 6 if stock.config.get("variance_type") == "learned_range" else 3
        compare(stock, 10, 0.0, channels=channels, backend=None)


def test_strided_tensors():
    stock = DDPMScheduler()
    fast = accelerate(stock, backend="torch")
    output, sample = (x.permute(2, 3, 1, 0).contiguous().permute(3, 2, 0, 1) for x in tensors())
    assert not output.is_contiguous()
    ours = fast.step(output, 500, sample, generator=torch.Generator().manual_seed(0)).prev_sample
    expected = stock.step(output, 500, sample, generator=torch.Generator().manual_seed(0)).prev_sample
    assert torch.allclose(ours, expected, atol=1e-6)


def test_one_and_three_dimensions():
    for shape in ((2, 3, 17), (2, 3, 4, 3, 5)):
        stock = DDPMScheduler()
        output, sample = torch.randn(shape), torch.randn(shape)
        ours = accelerate(stock, backend="torch").step(output, 7, sample, torch.Generator().manual_seed(0)).prev_sample
        expected = stock.step(output, 7, sample, torch.Generator().manual_seed(0)).prev_sample
        assert torch.allclose(ours, expected, atol=1e-6)


def test_custom_timesteps_and_timesteps_of_any_kind():
    stock, fast = DDPMScheduler(), accelerate(DDPMScheduler(), backend="torch")
    output, sample = tensors()
    for scheduler in (stock, fast):
        scheduler.set_timesteps(timesteps=[900, 500, 10, 0])
    for t in (900, torch.tensor(500), fast.timesteps[2], fast.timesteps[1:][2]):
        ours = fast.step(output, t, sample, torch.Generator().manual_seed(0)).prev_sample
        expected = stock.step(output, int(t), sample, torch.Generator().manual_seed(0)).prev_sample
        assert torch.allclose(ours, expected, atol=1e-6), t


def test_the_position_in_timesteps_is_found_without_reading_it():
    """On CUDA reading an element of `timesteps` would make the host wait."""
    fast = accelerate(DDPMScheduler(), backend="torch")
    fast.set_timesteps(10)
    rows = fast._rows(torch.device("cpu"))

    class Unread(torch.Tensor):
        def item(self):
            raise AssertionError("the device was asked")

    for place, t in enumerate(fast.timesteps):
        assert fast._row(rows, t.as_subclass(Unread)) == place
    sliced = fast.timesteps[4:]
    assert fast._row(rows, sliced[0].as_subclass(Unread)) == 4


def test_a_changed_schedule_is_noticed():
    fast = accelerate(DDPMScheduler(), backend="torch")
    output, sample = tensors()
    fast.set_timesteps(10)
    first = fast.step(output, 500, sample, torch.Generator().manual_seed(0)).prev_sample
    fast.set_timesteps(20)
    second = fast.step(output, 500, sample, torch.Generator().manual_seed(0)).prev_sample
    assert (first - second).abs().max() > 1e-3
    fast.alphas_cumprod = fast.alphas_cumprod**2
    third = fast.step(output, 500, sample, torch.Generator().manual_seed(0)).prev_sample
    assert (second - third).abs().max() > 1e-3


def test_gradients_go_through_diffusers():
    output, sample = tensors()
    output.requires_grad_()
    fast = accelerate(DDPMScheduler(), backend="torch")
    fast.step(output, 500, sample).prev_sample.sum().backward()
    assert output.grad is not None


def test_variance_noise():
    stock, fast = DDIMScheduler(), accelerate(DDIMScheduler(), backend="torch")
    output, sample = tensors()
    noise = torch.randn(SHAPE)
    for scheduler in (stock, fast):
        scheduler.set_timesteps(10)
    ours = fast.step(output, 500, sample, eta=1.0, variance_noise=noise).prev_sample
    assert torch.allclose(ours, stock.step(output, 500, sample, eta=1.0, variance_noise=noise).prev_sample, atol=1e-6)
    with pytest.raises(ValueError, match="Cannot pass both generator and variance_noise"):
        fast.step(output, 500, sample, eta=1.0, variance_noise=noise, generator=torch.Generator())


@pytest.mark.parametrize(
    ("stock", "fast_class"), [(DDPMScheduler, FastDDPMScheduler), (DDIMScheduler, FastDDIMScheduler)]
)
def test_configuration_and_files(stock, fast_class, tmp_path):
    original = stock(beta_end=0.01, prediction_type="v_prediction")
    fast = accelerate(original)
    assert type(fast) is fast_class
    assert isinstance(fast, SchedulerMixin)
    assert isinstance(fast, stock)
    assert fast.config == original.config
    assert fast_class.from_config(original.config).config.beta_end == 0.01
    assert stock.from_config(fast.config).config.prediction_type == "v_prediction"
    fast.register_to_config(beta_end=0.03)
    assert (fast.config.beta_end, original.config.beta_end) == (0.03, 0.01)
    fast.save_pretrained(tmp_path)
    assert fast_class.from_pretrained(tmp_path).config.beta_end == 0.03
    assert stock.from_pretrained(tmp_path).config.beta_end == 0.03
    assert set(fast.compatibles) == set(original.compatibles)


def test_a_stock_pipeline_with_our_scheduler_is_saved_and_loaded(tmp_path):
    pipeline = DDPMPipeline(unet(), accelerate(DDPMScheduler()))
    pipeline.set_progress_bar_config(disable=True)
    expected = pipeline(generator=torch.Generator().manual_seed(0), num_inference_steps=3, output_type="np").images
    pipeline.save_pretrained(tmp_path)
    again = DDPMPipeline.from_pretrained(tmp_path)
    assert type(again.scheduler) is FastDDPMScheduler
    again.set_progress_bar_config(disable=True)
    ours = again(generator=torch.Generator().manual_seed(0), num_inference_steps=3, output_type="np").images
    assert np.abs(ours - expected).max() <= 1e-5


def test_stock_pipelines_with_the_fused_step_give_the_same_images():
    for make, scheduler in ((DDPMPipeline, DDPMScheduler()), (DDPMPipeline, DDIMScheduler())):
        results = []
        for chosen in (scheduler, accelerate(scheduler, backend="torch")):
            pipeline = make(unet(), chosen)
            pipeline.set_progress_bar_config(disable=True)
            g = torch.Generator().manual_seed(0)
            results.append(pipeline(generator=g, num_inference_steps=8, output_type="np").images)
        assert np.abs(results[0] - results[1]).max() <= 2e-5
    converted = DDIMPipeline(unet(), accelerate(DDPMScheduler()))  # converts every scheduler to its own class
    assert type(converted.scheduler) is DDIMScheduler


def test_nothing_that_was_given_is_changed():
    stock = DDPMScheduler()
    before = dict(stock.__dict__)
    fast = accelerate(stock, backend="torch")
    fast.set_timesteps(5)
    fast.step(*tensors()[:1], 800, tensors()[1])
    assert stock.__dict__ == before
    assert type(stock) is DDPMScheduler


def test_subclasses():
    class Mine(DDPMScheduler):
        extra = 5

    class Changed(DDPMScheduler):
        def step(self, *args, **kwargs):
            return None

    assert accelerate(Mine()).extra == 5
    with pytest.raises(TypeError, match="Changed has a step of its own"):
        accelerate(Changed())
    with pytest.raises(ValueError, match="variance_type='learned' is not supported"):
        accelerate(DDPMScheduler(variance_type="learned"))


def test_the_original_takes_the_square_root_of_a_learned_log_variance():
    """Why variance_type='learned' is refused: half of all log-variances are negative."""
    output, sample = tensors(6)
    result = DDPMScheduler(variance_type="learned").step(output, 500, sample).prev_sample
    assert result.isnan().any()


@pytest.mark.gpu
def test_on_a_gpu_nothing_waits_for_the_device():
    for stock, options in ((DDPMScheduler(), {}), (DDIMScheduler(), {"eta": 1.0})):
        fast = accelerate(stock)
        fast.set_timesteps(10, device="cuda")
        stock.set_timesteps(10)
        output, sample = (x.cuda() for x in tensors())
        fast.step(output, fast.timesteps[0], sample, **options)  # compiles, fills its table
        torch.cuda.set_sync_debug_mode("error")
        try:
            results = [
                fast.step(output, t, sample, generator=torch.Generator("cuda").manual_seed(0), **options).prev_sample
                for t in fast.timesteps
            ]
        finally:
            torch.cuda.set_sync_debug_mode("default")
        for t, ours in zip(stock.timesteps, results, strict=True):
            g = torch.Generator("cuda").manual_seed(0)
            assert torch.allclose(ours, stock.step(output, t, sample, generator=g, **options).prev_sample, atol=1e-5)
