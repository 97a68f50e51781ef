"""diffusers' pipelines and ours: the same network, the same seed, the same images."""

import copy
import itertools
import logging

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers")

from diffusers import (
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiffusionPipeline,
    DiTPipeline,
    DPMSolverMultistepScheduler,
    LDMPipeline,
    UNet2DModel,
)
from diffusers.pipelines.ddpm import pipeline_ddpm
from diffusers.schedulers import scheduling_ddpm
from diffusers.utils.torch_utils import randn_tensor

from ddpm_fast import accelerate
from ddpm_fast.adapters.runner import is_globally_seeded
from tests.adapters.diffusers_models import Denoiser, Elementwise, transformer, unet, vae, vqvae

# Images lie in [0, 1]. Measured: 1e-6 over 1000 steps; more where a step divides by a small sqrt(alpha_bar) unclipped.
SAME = 1e-5


def quiet(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def images(pipeline, seed=0, **options):
    return pipeline(**{"batch_size": 2, "generator": generator(seed), "output_type": "np", **options}).images


def difference(stock, options, fast=None):
    fast = fast or accelerate(quiet(stock))
    theirs, ours = images(stock, **options), images(fast, **options)
    assert theirs.shape == ours.shape
    assert theirs.dtype == ours.dtype
    assert theirs.std() > 0.05  # not all clipped to one colour
    return np.abs(theirs - ours).max()


def ddpm(network=None, **config):
    return quiet(DDPMPipeline(network or unet(), DDPMScheduler(**config)))


def ddim(network=None, **config):
    return quiet(DDIMPipeline(network or unet(), DDIMScheduler(**config)))


@pytest.mark.parametrize("make", [ddpm, ddim])
def test_a_thousand_steps_give_the_same_images(make):
    assert difference(make(unet(kind=Denoiser)), {"num_inference_steps": 1000}) <= SAME


CLIPPINGS = ({}, {"clip_sample": False}, {"clip_sample_range": 2.0}, {"thresholding": True, "sample_max_value": 1.5})


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("variance", ["fixed_small", "fixed_small_log", "fixed_large", "learned_range"])
def test_ddpm(prediction, variance, spacing):
    network = unet(out_channels=6 if variance == "learned_range" else 3, kind=Elementwise)
    for clipping, steps in itertools.product(CLIPPINGS, (7, 25)):
        schedule = {"beta_schedule": "squaredcos_cap_v2"} if steps == 7 else {}
        config = {"prediction_type": prediction, "variance_type": variance, "timestep_spacing": spacing}
        stock = ddpm(network, **config, **clipping, **schedule)
        assert difference(stock, {"num_inference_steps": steps}) <= 5 * SAME, (clipping, steps)


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ddim(prediction, eta, spacing):
    network = unet(kind=Elementwise)
    for clipping, clipped, to_one in itertools.product(CLIPPINGS, (None, True), (True, False)):
        stock = ddim(network, prediction_type=prediction, timestep_spacing=spacing, set_alpha_to_one=to_one, **clipping)
        options = {"num_inference_steps": 10, "eta": eta, "use_clipped_model_output": clipped}
        assert difference(stock, options) <= 5 * SAME, (clipping, clipped, to_one)


def test_the_end_of_trailing_spacing_at_minus_one():
    for make in (ddpm, ddim):
        stock = make(unet(kind=Denoiser), timestep_spacing="trailing")
        stock.scheduler.set_timesteps(61)
        assert stock.scheduler.timesteps[-1] == -1
        assert difference(stock, {"num_inference_steps": 61}) <= 5 * SAME


def test_further_fields():
    network = unet(kind=Elementwise)
    for config in (
        {"steps_offset": 1},
        {"beta_schedule": "scaled_linear", "beta_start": 0.001, "beta_end": 0.01},
        {"trained_betas": np.linspace(0.001, 0.05, 100).tolist(), "num_train_timesteps": 100},
        {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction", "timestep_spacing": "trailing"},
    ):
        for make in (ddpm, ddim):
            assert difference(make(network, **config), {"num_inference_steps": 10}) <= 5 * SAME, (make, config)
    for config in ({"beta_schedule": "sigmoid"}, {"beta_schedule": "laplace"}):
        assert difference(ddpm(network, **config), {"num_inference_steps": 10}) <= 5 * SAME, config


def test_fixed_large_log_is_not_a_number_there_and_has_the_law_of_fixed_large_here():
    options = {"num_inference_steps": 10}
    assert np.isnan(images(ddpm(variance_type="fixed_large_log"), **options)).any()
    ours = images(accelerate(ddpm(variance_type="fixed_large_log")), **options)
    assert np.array_equal(ours, images(accelerate(ddpm(variance_type="fixed_large")), **options))


def test_ddpm_pipeline_with_a_ddim_scheduler():
    stock = quiet(DDPMPipeline(unet(), DDIMScheduler()))
    assert difference(stock, {"num_inference_steps": 10}) <= 5 * SAME


@pytest.mark.parametrize(("make", "options"), [(ddpm, {}), (ddim, {"eta": 1.0}), (ddim, {"eta": 0.0})])
@pytest.mark.parametrize("source", ["one", "list", "list of one", "global"])
def test_noise_is_drawn_in_the_same_order(make, options, source):
    if source == "list of one" and make is ddim:
        pytest.skip("DDIMPipeline refuses it")
    stock = make(unet(kind=Denoiser), timestep_spacing="trailing")
    results = []
    for pipeline in (stock, accelerate(stock)):
        torch.manual_seed(7)
        generators = {"one": generator(3), "list": [generator(1), generator(2)], "list of one": [generator(3)]}
        chosen = generators.get(source)
        result = images(pipeline, generator=chosen, num_inference_steps=7, **options)
        after = [
            torch.get_rng_state(),
            *(g.get_state() for g in (chosen if isinstance(chosen, list) else [chosen]) if g),
        ]
        results.append((result, after))
    (theirs, states), (ours, our_states) = results
    assert np.abs(theirs - ours).max() <= SAME
    assert all(torch.equal(a, b) for a, b in zip(states, our_states, strict=True))


def test_without_a_seed_every_image_has_one_of_its_own():
    fast = accelerate(ddpm(), noise="philox")
    together = images(fast, generator=None, batch_size=3, num_inference_steps=5)
    seeds = fast.last_seeds
    assert len(seeds) == 3
    alone = np.concatenate([images(fast, generator=None, batch_size=1, num_inference_steps=5, seeds=s) for s in seeds])
    assert np.abs(together - alone).max() <= SAME
    assert np.abs(together[0] - together[1]).max() > 0.1
    images(fast, num_inference_steps=5)
    assert fast.last_seeds is None


def test_auto_takes_a_global_seed_for_one():
    fast = accelerate(ddpm())
    torch.seed()  # as in a fresh process: 64 random bits
    assert not is_globally_seeded(torch.device("cpu"))
    images(fast, generator=None, num_inference_steps=2)
    assert fast.last_seeds is not None
    torch.manual_seed(0)
    images(fast, generator=None, num_inference_steps=2)
    assert fast.last_seeds is None
    library = accelerate(ddpm(), noise="library")
    torch.seed()
    images(library, generator=None, num_inference_steps=2)
    assert library.last_seeds is None


def test_philox_follows_a_global_seed_of_any_size():
    fast = accelerate(ddpm(), noise="philox")
    runs = []
    for _ in range(2):
        torch.manual_seed(2**60)
        runs.append(images(fast, generator=None, num_inference_steps=2))
    assert np.array_equal(*runs)


def test_output_types_and_tuples():
    stock = ddpm()
    fast = accelerate(stock)
    for output_type in ("pil", "np", "pt"):
        theirs, ours = images(stock, output_type=output_type, num_inference_steps=3), images(
            fast, output_type=output_type, num_inference_steps=3
        )  # fmt: skip
        assert type(theirs) is type(ours)
        assert type(theirs[0]) is type(ours[0])
        if output_type == "pil":
            assert (theirs[0].size, theirs[0].mode) == (ours[0].size, ours[0].mode)
        else:
            assert (theirs.shape, theirs.dtype) == (ours.shape, ours.dtype)
    (theirs,) = stock(num_inference_steps=1, output_type="np", return_dict=False)
    (ours,) = fast(num_inference_steps=1, output_type="np", return_dict=False)
    assert theirs.shape == ours.shape
    one_channel = ddpm(unet(channels=1))
    assert (
        accelerate(one_channel)(num_inference_steps=1).images[0].mode
        == one_channel(num_inference_steps=1).images[0].mode
    )


def test_positional_arguments_are_those_of_diffusers():
    for stock, arguments in (
        (ddpm(), (2, generator(), 3, "np", False)),
        (ddim(), (2, generator(), 0.5, 3, True, "np", False)),
    ):
        theirs = stock(*arguments)[0]
        arguments[1].manual_seed(0)
        assert np.abs(theirs - accelerate(stock)(*arguments)[0]).max() <= SAME


def test_files_are_those_of_diffusers(tmp_path):
    fast = accelerate(ddpm())
    expected = images(fast, num_inference_steps=3)
    fast.save_pretrained(tmp_path)
    stock = quiet(DDPMPipeline.from_pretrained(tmp_path))
    assert type(stock) is DDPMPipeline
    assert type(stock.scheduler) is DDPMScheduler
    assert np.abs(images(stock, num_inference_steps=3) - expected).max() <= SAME
    again = quiet(type(fast).from_pretrained(tmp_path))
    assert type(again) is type(fast)
    assert np.array_equal(images(again, num_inference_steps=3), expected)


def test_nothing_that_was_given_is_changed():
    stock = ddpm()
    weights = {name: value.clone() for name, value in stock.unet.state_dict().items()}
    before, timesteps, config = dict(stock.__dict__), stock.scheduler.timesteps, copy.deepcopy(stock.config)
    fast = accelerate(stock)
    images(fast, num_inference_steps=3)
    assert type(stock) is DDPMPipeline
    assert dict(stock.__dict__) == before
    assert stock.config == config
    assert stock.scheduler.timesteps is timesteps
    assert all(torch.equal(weights[name], value) for name, value in stock.unet.state_dict().items())
    assert fast.unet is stock.unet


def test_the_same_call_again_builds_nothing_new():
    fast = accelerate(ddpm())
    images(fast, num_inference_steps=3)
    loop = fast._runner.last_loop
    images(fast, num_inference_steps=3)
    assert fast._runner.last_loop is loop
    images(fast, num_inference_steps=4)
    assert fast._runner.last_loop is not loop
    before = images(fast, num_inference_steps=3)
    fast.scheduler = DDPMScheduler(beta_end=0.01)
    assert np.abs(images(fast, num_inference_steps=3) - before).max() > 1e-3  # a new table is noticed
    copied = copy.deepcopy(fast)
    assert np.array_equal(images(copied, num_inference_steps=3), images(fast, num_inference_steps=3))


def test_a_new_network_is_noticed():
    fast = accelerate(ddpm())
    first = images(fast, num_inference_steps=3)
    torch.manual_seed(9)
    fast.unet = UNet2DModel.from_config(fast.unet.config).eval()
    assert np.abs(images(fast, num_inference_steps=3) - first).max() > 1e-3


def test_in_half_precision_ours_is_nearer_to_float32(monkeypatch):
    """diffusers rounds the state to bfloat16 after every step; ours stays float32 between the network's calls."""
    call = {"batch_size": 1, "num_inference_steps": 1000, "output_type": "pt"}
    half = ddpm(unet(kind=Denoiser).to(torch.bfloat16))
    theirs, ours = images(half, **call).float(), images(accelerate(half), **call).float()

    def in_bfloat16(shape, generator=None, device=None, dtype=None, layout=None):  # other numbers than in float32
        return randn_tensor(shape, generator=generator, device=device, dtype=torch.bfloat16).float()

    monkeypatch.setattr(pipeline_ddpm, "randn_tensor", in_bfloat16)
    monkeypatch.setattr(scheduling_ddpm, "randn_tensor", in_bfloat16)
    exact = images(ddpm(unet(kind=Denoiser)), **call)
    their_error, our_error = ((images - exact).abs().max().item() for images in (theirs, ours))
    print(f"largest difference to float32 after 1000 steps: diffusers {their_error:.4f}, ddpm_fast {our_error:.4f}")
    assert our_error < 0.1 * their_error


def test_offload_hooks_are_left_alone():
    pytest.importorskip("accelerate")
    from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

    class Counting(ModelHook):
        calls = 0

        def pre_forward(self, module, *args, **kwargs):
            Counting.calls += 1
            return args, kwargs

    stock = ddpm()
    expected = images(stock, num_inference_steps=4)
    add_hook_to_module(stock.unet, Counting())
    fast = accelerate(stock)
    assert np.abs(images(fast, num_inference_steps=4) - expected).max() <= SAME
    assert Counting.calls == 4
    assert fast._runner.last_loop.mode == "eager"
    remove_hook_from_module(stock.unet)


def test_compiled_networks_are_called_as_they_are():
    stock = ddpm()
    expected = images(stock, num_inference_steps=3)
    stock.unet = torch.compile(stock.unet, backend="eager")
    assert np.abs(images(accelerate(stock), num_inference_steps=3) - expected).max() <= SAME


def test_another_scheduler_runs_as_in_diffusers(caplog):
    stock = quiet(DDPMPipeline(unet(), DPMSolverMultistepScheduler()))
    with caplog.at_level(logging.INFO, "ddpm_fast"):
        fast = accelerate(stock)
    assert "DPMSolverMultistepScheduler is not accelerated" in caplog.text
    options = {"num_inference_steps": 5}
    assert np.array_equal(images(stock, **options), images(fast, **options))


def test_subclasses():
    class Mine(DDPMPipeline):
        def draw(self):
            return self(num_inference_steps=2, generator=generator(), output_type="np").images

    class Changed(DDPMPipeline):
        def __call__(self):
            return None

    stock = quiet(Mine(unet(), DDPMScheduler()))
    fast = accelerate(stock)
    assert isinstance(fast, Mine)
    assert np.abs(fast.draw() - stock.draw()).max() <= SAME
    with pytest.raises(TypeError, match="Changed has a __call__ of its own"):
        accelerate(Changed(unet(), DDPMScheduler()))
    twice = accelerate(fast, noise="philox")
    assert isinstance(twice, Mine)
    assert twice._runner.options.noise == "philox"


def dit(scheduler, learned=True):
    return quiet(DiTPipeline(transformer(learned), vae(), scheduler, id2label={"0": "tench, fish", "7": "cock"}))


@pytest.mark.parametrize("scheduler", [DDPMScheduler(clip_sample=False), DDIMScheduler(clip_sample=False)])
@pytest.mark.parametrize("guidance", [1.0, 4.0])
@pytest.mark.parametrize("learned", [True, False])
def test_dit(scheduler, guidance, learned):
    stock = dit(scheduler, learned)
    results = []
    for pipeline in (stock, accelerate(stock)):
        torch.manual_seed(5)
        result = pipeline([7, 3], guidance, generator(1), 12, "np").images
        results.append((result, torch.get_rng_state()))
    (theirs, state), (ours, our_state) = results
    assert theirs.std() > 0.01
    assert np.abs(theirs - ours).max() <= 5 * SAME
    assert torch.equal(state, our_state)


def test_dit_with_other_labels_keeps_its_loop():
    fast = accelerate(dit(DDIMScheduler(clip_sample=False)))
    first = fast([7, 3], 4.0, generator(), 4, "np").images
    loop = fast._runner.last_loop
    second = fast([7, 900], 4.0, generator(), 4, "np").images
    assert fast._runner.last_loop is loop
    assert np.array_equal(first[0], second[0])
    assert np.abs(first[1] - second[1]).max() > 1e-4
    assert fast.get_label_ids(["cock"]) == [7]
    assert fast([7], seeds=3, num_inference_steps=2, output_type="np").images.shape == first[:1].shape


def test_dit_variance_cannot_be_learned():
    with pytest.raises(ValueError, match="variance_type: DiTPipeline drops"):
        accelerate(dit(DDPMScheduler(variance_type="learned_range")))([1], num_inference_steps=2)


@pytest.mark.parametrize(("scheduler", "eta"), [(DDIMScheduler(), 0.0), (DDIMScheduler(), 1.0), (DDPMScheduler(), 0.0)])
def test_ldm(scheduler, eta):
    stock = quiet(LDMPipeline(vqvae(), unet(), scheduler))
    results = []
    for pipeline in (stock, accelerate(stock)):
        torch.manual_seed(5)
        result = pipeline(2, generator(1), eta, 12, "np").images
        results.append((result, torch.get_rng_state()))
    (theirs, state), (ours, our_state) = results
    assert np.abs(theirs - ours).max() <= 5 * SAME
    assert torch.equal(state, our_state)
    assert accelerate(stock)(seeds=3, num_inference_steps=2).images[0].size == (8, 8)


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        ({"batch_size": 0}, ValueError, "batch_size must be an integer >= 1"),
        ({"num_inference_steps": 0}, ValueError, "num_inference_steps must be an integer >= 1"),
        ({"num_inference_steps": 2000}, ValueError, "num_inference_steps"),
        ({"output_type": "jpeg"}, ValueError, "output_type must be one of"),
        ({"generator": [generator()] * 3, "batch_size": 2}, ValueError, "one a sample: 2 samples, got 3"),
        ({"generator": 5}, TypeError, "generator must be a torch.Generator"),
        ({"seeds": [1, 2, 3], "batch_size": 2, "generator": None}, ValueError, "one a sample: 2 samples, got 3"),
        ({"seeds": 1}, ValueError, "from seeds or from generators"),
    ],
)
def test_bad_calls_are_refused_before_the_network_runs(call, error, match):
    fast = accelerate(ddpm())
    fast.unet.forward = None  # whoever calls it fails otherwise
    with pytest.raises(error, match=match):
        images(fast, **call)


def test_a_pipeline_elsewhere_than_its_network(monkeypatch):
    stock = quiet(LDMPipeline(vqvae(), unet().to("meta"), DDIMScheduler()))
    # diffusers asks any of the components, in an order that changes from run to run.
    monkeypatch.setattr(LDMPipeline, "_execution_device", torch.device("cpu"))
    with pytest.raises(ValueError, match="the pipeline runs on cpu, but its network is on meta"):
        accelerate(stock)(num_inference_steps=2)


def test_a_generator_elsewhere():
    class OnAGPU(torch.Generator):
        device = torch.device("cuda:0")

    for generators in (OnAGPU(), [generator(), OnAGPU()]):
        with pytest.raises(ValueError, match="a generator must be on the CPU or on cpu, got one on cuda:0"):
            images(accelerate(ddpm()), batch_size=2, generator=generators, num_inference_steps=2)


@pytest.mark.parametrize("eta", [-0.5, 1.5, float("nan")])
def test_eta_that_leaves_no_room(eta):
    with pytest.raises(ValueError, match="eta"):
        images(accelerate(ddim()), eta=eta)


@pytest.mark.parametrize(
    ("config", "channels", "match"),
    [
        ({"variance_type": "learned"}, 6, "variance_type='learned' is not supported"),
        ({"variance_type": "learned_range"}, 3, "out_channels: the network returns 3 channels for 3"),
        ({}, 6, "out_channels: the network returns 6 channels for 3"),
        ({"prediction_type": "score"}, 3, "prediction_type must be one of"),
        ({"thresholding": True, "sample_max_value": 0.5}, 3, "sample_max_value must be >= 1"),
        ({"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}, 3, "divides by zero"),
    ],
)
def test_what_is_not_supported_is_named(config, channels, match):
    with pytest.raises(ValueError, match=match):
        images(accelerate(ddpm(unet(out_channels=channels), **config)))


def test_what_is_not_known_is_listed():
    class Other:
        pass

    for obj in (Other(), torch.nn.Linear(1, 1), None, DPMSolverMultistepScheduler()):
        with pytest.raises(TypeError, match="accelerate knows diffusers: DDPMPipeline.*guided-diffusion"):
            accelerate(obj)
    with pytest.raises(ValueError, match="noise must be one of"):
        accelerate(ddpm(), noise="random")


def test_another_pipeline_is_told_about_its_scheduler():
    class Other(DiffusionPipeline):
        pass

    with pytest.raises(TypeError, match="the scheduler can be accelerated"):
        accelerate(Other())


def test_the_progress_bar_is_that_of_the_pipeline(capsys):
    stock = DDPMPipeline(unet(), DDPMScheduler())
    stock.set_progress_bar_config(desc="drawing", disable=False)
    accelerate(stock)(num_inference_steps=4)
    assert "drawing: 100%" in capsys.readouterr().err
