"""Tests of models on disk of other libraries: their configuration, and their samples from the command line."""

import json
import sys
import textwrap

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("denoising_diffusion_pytorch")

from denoising_diffusion_pytorch import GaussianDiffusion, LearnedGaussianDiffusion, Trainer, Unet
from diffusers import DDIMPipeline, DDIMScheduler, DDPMPipeline, DDPMScheduler, DiTPipeline, PNDMScheduler, UNet2DModel

from ddpm_fast import cli, images
from ddpm_fast.adapters.load import SelfConditioned, _of_lucidrains, load_model, parse_arguments
from ddpm_fast.config import SamplerConfig
from ddpm_fast.models.checkpoint import Classes
from ddpm_fast.sample import Sampler
from tests.adapters import diffusers_models, guided_standin, lucidrains_models
from tests.adapters.test_lucidrains import saved

# Our tables are float64, the libraries' are float32.
NEAR = 2e-4


def draw(checkpoint, batch=2, **kwargs):
    """Return samples with the noise of torch.Generator().manual_seed(0)."""
    sampler = Sampler(checkpoint.model, (batch, *checkpoint.shape), config=checkpoint.diffusion, **kwargs)
    return sampler(generator=torch.Generator().manual_seed(0), progress=False)


def quiet(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


# diffusers

SCHEDULERS = {
    "default": DDPMScheduler(),
    "cosine, v, range": DDPMScheduler(
        beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction", clip_sample_range=2.0
    ),
    "sigmoid": DDPMScheduler(beta_schedule="sigmoid", prediction_type="sample"),
    "own betas": DDPMScheduler(trained_betas=np.linspace(1e-3, 0.05, 100).tolist(), num_train_timesteps=100),
    "trailing, zero SNR": DDPMScheduler(
        rescale_betas_zero_snr=True, timestep_spacing="trailing", prediction_type="sample", variance_type="fixed_large"
    ),
    "thresholding": DDPMScheduler(thresholding=True, sample_max_value=1.5, dynamic_thresholding_ratio=0.9),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_ddpm_pipelines_folder(name, tmp_path):
    pipeline = quiet(DDPMPipeline(diffusers_models.unet(), SCHEDULERS[name]))
    pipeline.save_pretrained(tmp_path / "model")
    checkpoint = load_model(tmp_path / "model", {"num_inference_steps": 10})
    assert checkpoint.shape == (3, 8, 8)
    assert not checkpoint.model.training
    theirs = pipeline(2, torch.Generator().manual_seed(0), 10, output_type="pt").images
    assert torch.allclose((draw(checkpoint) / 2 + 0.5).clamp(0, 1), theirs, atol=NEAR)


def test_a_ddim_pipelines_folder(tmp_path):
    pipeline = quiet(DDIMPipeline(diffusers_models.unet(), DDIMScheduler(steps_offset=1, set_alpha_to_one=False)))
    pipeline.save_pretrained(tmp_path / "model")
    assert load_model(tmp_path / "model").diffusion.num_inference_steps == 50
    checkpoint = load_model(tmp_path / "model", {"num_inference_steps": 10})
    theirs = pipeline(2, torch.Generator().manual_seed(0), num_inference_steps=10, output_type="pt").images
    assert torch.allclose((draw(checkpoint) / 2 + 0.5).clamp(0, 1), theirs, atol=NEAR)


def test_a_unets_folder(tmp_path):
    unet = UNet2DModel(
        sample_size=(8, 12), in_channels=1, out_channels=1, num_class_embeds=5, **diffusers_models.CONFIG
    )
    unet.save_pretrained(tmp_path / "unet")
    checkpoint = load_model(tmp_path / "unet", {"beta_schedule": "squaredcos_cap_v2"})
    assert checkpoint.shape == (1, 8, 12)
    assert checkpoint.diffusion == SamplerConfig(beta_schedule="squaredcos_cap_v2")
    assert checkpoint.classes == Classes("class_labels", 5)
    out = tmp_path / "out.npz"
    arguments = ["sample", "--quiet", "--device", "cpu", "--model", str(tmp_path / "unet"), "--out", str(out)]
    assert cli.main([*arguments, "--steps", "3", "--seeds", "0-2", "--label", "4"]) == 0
    assert images.read_metadata(out)["label"] == "4"
    with np.load(out) as arrays:
        assert arrays["arr_0"].shape == (3, 8, 12, 1)
    for label, says in (([], "one of 5 classes"), (["--label", "5"], r"--label must be an integer in [0, 4], got 5")):
        assert cli.main([*arguments, *label]) == 2, says


def test_weights_that_would_run_code_are_not_loaded(tmp_path):
    unet = diffusers_models.unet()
    unet.save_pretrained(tmp_path / "unet", safe_serialization=False)
    (weights,) = (tmp_path / "unet").glob("*.bin")
    torch.save({"conv_in.weight": Bomb()}, weights)
    with pytest.raises(ValueError, match="cannot be loaded"):
        load_model(tmp_path / "unet")
    torch.save({"ema": Bomb()}, tmp_path / "model-1.pt")
    for arguments in ({"unet": lucidrains_models.ROOM, "diffusion": {"image_size": 8}}, {"image_size": 64}):
        if "unet" in arguments:
            with pytest.raises(ValueError, match="torch.load cannot read it"):
                load_model(tmp_path / "model-1.pt", arguments)


class Bomb:
    def __reduce__(self):
        return pytest.fail, ("a pickle was run",)


def test_other_folders_of_diffusers(tmp_path):
    quiet(DDPMPipeline(diffusers_models.unet(), PNDMScheduler())).save_pretrained(tmp_path / "pndm")
    with pytest.raises(
        ValueError, match="its scheduler must be diffusers' DDPMScheduler or DDIMScheduler, got .*PNDMScheduler"
    ):
        load_model(tmp_path / "pndm")
    dit = DiTPipeline(diffusers_models.transformer(), diffusers_models.vae(), DDIMScheduler())
    dit.save_pretrained(tmp_path / "dit")
    with pytest.raises(ValueError, match=r"holds a DiTPipeline; .*accelerate takes DiTPipeline"):
        load_model(tmp_path / "dit")
    diffusers_models.unet().save_pretrained(tmp_path / "unet")
    with pytest.raises(TypeError, match="unknown option 'beta_shedule'; did you mean 'beta_schedule'"):
        load_model(tmp_path / "unet", {"beta_shedule": "linear"})
    next((tmp_path / "unet").glob("*.safetensors")).write_bytes(b"short")
    with pytest.raises(ValueError, match="cannot be loaded: "):
        load_model(tmp_path / "unet")


# lucidrains


@pytest.mark.parametrize("ddim", [False, True])
@pytest.mark.parametrize("self_condition", [False, True])
@pytest.mark.parametrize("objective", lucidrains_models.OBJECTIVES)
def test_a_trainers_file(objective, self_condition, ddim, tmp_path):
    unet = {**lucidrains_models.ROOM, "self_condition": self_condition}
    diffusion = {"image_size": 8, "timesteps": 20, "objective": objective}
    if ddim:
        diffusion |= {"sampling_timesteps": 7, "ddim_sampling_eta": 0.5}
    torch.manual_seed(1)
    theirs = GaussianDiffusion(Unet(**unet), **diffusion)
    path, averaged = saved(Trainer, theirs, tmp_path)
    checkpoint = load_model(path, {"unet": unet, "diffusion": diffusion})
    assert checkpoint.shape == (3, 8, 8)
    torch.manual_seed(0)
    expected = averaged.sample(2)
    if ddim:  # the library draws from the global generator
        assert checkpoint.diffusion.sampler == "ddim"
    assert torch.allclose((draw(checkpoint) + 1) / 2, expected, atol=NEAR)


def test_ddim_visits_the_librarys_timesteps():
    """Check 26 of 250 steps, where float32 and float64 round differently."""
    theirs = lucidrains_models.diffusion(timesteps=250, sampling_timesteps=26)
    seen = []
    theirs.model.register_forward_pre_hook(lambda module, args: seen.append(int(args[1][0])))
    theirs.sample(1)
    assert list(_of_lucidrains(theirs).diffusion.timesteps) == seen


def test_a_trainers_file_with_learned_variance(tmp_path):
    unet, diffusion = {**lucidrains_models.ROOM, "learned_variance": True}, {"image_size": 8, "timesteps": 20}
    theirs = LearnedGaussianDiffusion(Unet(**unet), **diffusion)
    path, averaged = saved(Trainer, theirs, tmp_path)
    torch.manual_seed(0)
    expected = averaged.sample(2)
    assert torch.allclose((draw(load_model(path, {"unet": unet, "diffusion": diffusion})) + 1) / 2, expected, atol=NEAR)


def test_self_conditioning_begins_anew_in_every_run():
    class Remembering(torch.nn.Module):
        def forward(self, x, t, last):
            seen.append(last.abs().max().item())
            return 0.1 * x + 0.1 * last

    seen = []
    sampler = Sampler(SelfConditioned(Remembering(), SamplerConfig()), (2, 1, 4, 4), num_inference_steps=3)
    first = sampler(seeds=0, progress=False)
    assert torch.equal(sampler(seeds=0, progress=False), first)
    assert [value > 0 for value in seen] == 2 * [False, True, True]


def test_self_conditioning_takes_no_keywords():
    class Labelled(torch.nn.Module):
        def forward(self, x, t, last, labels=None):
            return x

    model = SelfConditioned(Labelled(), SamplerConfig())
    with pytest.raises(TypeError, match="labels"):
        model(torch.zeros(2, 1, 4, 4), torch.tensor([5, 5]), labels=torch.tensor([0, 1]))


def test_a_trainers_file_wants_its_arguments(tmp_path):
    theirs = lucidrains_models.diffusion()
    path, _ = saved(Trainer, theirs, tmp_path)
    with pytest.raises(ValueError, match="holds weights alone: pass the arguments"):
        load_model(path)
    with pytest.raises(TypeError, match="unknown section 'unets'; did you mean 'unet'"):
        load_model(path, {"unets": {}, "diffusion": {}})
    with pytest.raises(ValueError, match="is of another diffusion"):
        load_model(path, {"unet": {"dim": 16}, "diffusion": {"image_size": 8}})
    with pytest.raises(ValueError, match="makes no model of these arguments .*'dims'"):
        load_model(path, {"unet": {"dims": 16}, "diffusion": {"image_size": 8}})


# guided-diffusion: functions of its names, with the stand-in's processes


SCRIPT_UTIL = """
    from tests.adapters import guided_standin as stand_in
    import torch

    def model_and_diffusion_defaults():
        return dict(image_size=64, num_channels=4, class_cond=False, attention_resolutions="16,8", learn_sigma=False,
                    diffusion_steps=1000, noise_schedule="linear", timestep_respacing="", rescale_timesteps=False,
                    predict_xstart=False, use_fp16=False)

    class Net(torch.nn.Module):
        def __init__(self, channels, classes):
            super().__init__()
            self.num_classes = classes
            self.conv = torch.nn.Conv2d(3, channels, 3, padding=1)

        def forward(self, x, t, y=None):
            assert (y is None) == (self.num_classes is None)
            shift = 0.001 * t if y is None else 0.001 * t + y
            return torch.sin(self.conv(x) + shift.view(-1, 1, 1, 1))

        def convert_to_fp16(self):
            self.conv.double()

    def create_model_and_diffusion(image_size, num_channels, class_cond, attention_resolutions, learn_sigma,
                                   diffusion_steps, noise_schedule, timestep_respacing, rescale_timesteps,
                                   predict_xstart, use_fp16):
        assert isinstance(attention_resolutions, str)
        case = dict(schedule=noise_schedule, steps=diffusion_steps, rescale=rescale_timesteps,
                    mean="START_X" if predict_xstart else "EPSILON",
                    variance="LEARNED_RANGE" if learn_sigma else "FIXED_LARGE", respacing=timestep_respacing)
        net = Net(6 if learn_sigma else 3, 10 if class_cond else None)
        return net, stand_in.make(stand_in, case)
"""


@pytest.fixture
def guided(tmp_path, monkeypatch):
    """Return a function that makes a guided-diffusion checkpoint: its path, network and diffusion.

    The library is a checkout of stand-ins.
    """
    package = tmp_path / "checkout" / "guided_diffusion"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "script_util.py").write_text(textwrap.dedent(SCRIPT_UTIL))
    monkeypatch.syspath_prepend(package.parent)

    def make(**flags):
        from guided_diffusion import script_util

        torch.manual_seed(2)
        network, diffusion = script_util.create_model_and_diffusion(
            **{**script_util.model_and_diffusion_defaults(), "image_size": 4, **flags}
        )
        torch.save(network.state_dict(), tmp_path / "model.pt")
        return tmp_path / "model.pt", network, diffusion

    yield make
    for name in [name for name in sys.modules if name.startswith("guided_diffusion")]:
        del sys.modules[name]


@pytest.mark.parametrize(
    "flags",
    [
        {},
        {"learn_sigma": True, "timestep_respacing": "10", "diffusion_steps": 50},
        {"learn_sigma": True, "noise_schedule": "cosine", "diffusion_steps": 30, "rescale_timesteps": True},
        {"predict_xstart": True, "diffusion_steps": 30, "timestep_respacing": "ddim10", "use_ddim": True},
        {"diffusion_steps": 30, "clip_denoised": False, "predict_xstart": True},
    ],
)
def test_a_guided_checkpoint(guided, flags):
    sampling = {name: flags[name] for name in ("use_ddim", "clip_denoised") if name in flags}
    path, network, diffusion = guided(**{name: value for name, value in flags.items() if name not in sampling})
    checkpoint = load_model(path, {"image_size": 4, **flags})
    assert checkpoint.shape == (3, 4, 4)
    assert checkpoint.classes is None
    shape = (guided_standin.SHAPE[0], *checkpoint.shape)
    z = Recorded(shape)
    loop = diffusion.ddim_sample_loop if sampling.get("use_ddim") else diffusion.p_sample_loop
    expected = loop(network, shape, z.x_T, clip_denoised=sampling.get("clip_denoised", True), device="cpu")
    sampler = Sampler(checkpoint.model, shape, config=checkpoint.diffusion)
    # The library also draws noise at the last step, without using it.
    ours = sampler(generator=z.generator(), x_T=z.x_T, progress=False)
    assert torch.allclose(ours, expected, atol=NEAR)


def test_a_guided_checkpoint_with_classes_and_rescaled_times(guided):
    path, network, _ = guided(class_cond=True, rescale_timesteps=True, diffusion_steps=50)
    flags = {"image_size": 4, "class_cond": True, "rescale_timesteps": True, "diffusion_steps": 50}
    checkpoint = load_model(path, flags)
    assert checkpoint.classes == Classes("y", 10)
    x, t, y = torch.ones(2, 3, 4, 4), torch.tensor([0, 49]), torch.tensor([3, 8])
    expected = network(x, t * (1000 / 50), y=y)
    torch.testing.assert_close(checkpoint.model(x, t, y=y), expected)


class Recorded:
    """The x_T of a run and the state of the global generator behind it, so that both sides draw the same noise."""

    def __init__(self, shape):
        self.x_T = torch.randn(shape, generator=torch.Generator().manual_seed(5))
        torch.manual_seed(0)
        self.state = torch.get_rng_state()

    def generator(self):
        made = torch.Generator()
        made.set_state(self.state)
        return made


def test_a_guided_checkpoint_from_the_command_line(guided, tmp_path):
    path, _, _ = guided(class_cond=True, diffusion_steps=25)
    arguments = ["sample", "--quiet", "--device", "cpu", "--seeds", "0-1", "--model", str(path)]
    flags = "--model-args=--image_size 4 --class_cond True --diffusion_steps 25"
    assert cli.main([*arguments, flags, "--label", "3", "--out", str(tmp_path / "a.png")]) == 0
    about = images.read_metadata(tmp_path / "a.png")
    assert (about["model"], about["label"]) == ("model.pt", "3")
    assert SamplerConfig(**about["config"]).num_train_timesteps == 25
    assert cli.main([*arguments, flags, "--out", str(tmp_path / "b.png")]) == 2
    assert not (tmp_path / "b.png").exists()


def test_guided_checkpoints_that_do_not_fit(guided, tmp_path):
    path, _, _ = guided()
    with pytest.raises(TypeError, match="unknown flag 'image_sise'; did you mean 'image_size'"):
        load_model(path, {"image_sise": 4})
    with pytest.raises(ValueError, match="does not fit its flags"):
        load_model(path, {"image_size": 4, "learn_sigma": True})
    torch.save({"a": 1}, tmp_path / "b.pt")
    with pytest.raises(ValueError, match="maps names to tensors"):
        load_model(tmp_path / "b.pt", {"image_size": 4})
    (tmp_path / "c.pt").write_bytes(b"PK")
    with pytest.raises(ValueError, match="torch.load cannot read it"):
        load_model(tmp_path / "c.pt", {"image_size": 4})


def test_without_a_checkout(tmp_path):
    torch.save({}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match="put a checkout of it"):
        load_model(tmp_path / "a.pt", {"image_size": 64})


# factories


FACTORIES = """
    import torch
    from ddpm_fast.config import SamplerConfig

    class Models:
        @staticmethod
        def tanh(gain=0.5):
            return lambda x, t: torch.tanh(gain * x), (1, 4, 4), {"num_train_timesteps": 5}

    def plain():
        return torch.nn.Conv2d(3, 3, 1), (3, 4, 4)

    def sound():
        return torch.nn.Conv1d(3, 3, 1), (3, 4)

    def nothing():
        return None

    def diffusers():
        from diffusers import DDPMPipeline, DDPMScheduler
        from tests.adapters.diffusers_models import unet
        return DDPMPipeline(unet(), DDPMScheduler())

    def lucidrains():
        from tests.adapters.lucidrains_models import diffusion
        return diffusion()

    def embedded():
        from ddpm_fast.models.checkpoint import load_checkpoint
        return load_checkpoint()
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    (tmp_path / "own_models.py").write_text(textwrap.dedent(FACTORIES))
    monkeypatch.syspath_prepend(tmp_path)
    yield "own_models:{}".format
    sys.modules.pop("own_models", None)


def test_factories(own, tmp_path):
    checkpoint = load_model(own("Models.tanh"), {"gain": 0.25})
    assert checkpoint.diffusion.num_train_timesteps == 5
    assert torch.equal(checkpoint.model(torch.ones(1), None), torch.tanh(torch.tensor([0.25])))
    assert load_model(own("plain")).diffusion == SamplerConfig()
    assert load_model(own("diffusers")).diffusion.noise_free == "t_zero"
    assert load_model(own("lucidrains")).diffusion.num_train_timesteps == 25
    assert load_model(own("embedded")).shape == (1, 32, 32)
    arguments = ["sample", "--quiet", "--model", own("Models.tanh"), "--model-args", '{"gain": 0.1}', "--seeds", "0-3"]
    assert cli.main([*arguments, "--device", "cpu", "--out", str(tmp_path / "a.png")]) == 0


@pytest.mark.parametrize(
    ("name", "error", "says"),
    [
        ("missing", ValueError, "has no attribute 'missing'"),
        ("torch", TypeError, "must be a function that returns a model"),
        ("nothing", TypeError, "must return .* got NoneType"),
        ("sound", ValueError, r"only images \(C, H, W\)"),
    ],
)
def test_factories_that_do_not_work(own, name, error, says):
    with pytest.raises(error, match=says):
        load_model(own(name))


def test_a_module_that_is_not_there():
    with pytest.raises(ValueError, match="no module 'nowhere'"):
        load_model("nowhere:model")


# arguments


def test_arguments(tmp_path):
    (tmp_path / "args.json").write_text(json.dumps({"unet": {"dim": 8}}))
    assert parse_arguments(str(tmp_path / "args.json")) == {"unet": {"dim": 8}}
    assert parse_arguments('{"a": [1, 2]}') == {"a": [1, 2]}
    flags = "--image_size 64 --learn_sigma True --channel_mult 1,2,4 --dropout 0.1 --class_cond false"
    expected = {"image_size": 64, "learn_sigma": True, "channel_mult": "1,2,4", "dropout": 0.1, "class_cond": False}
    assert parse_arguments(flags) == expected


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("--image_size", "flags look like"),
        ("--image_size 64 32", "flags look like"),
        ("nowhere.json", "cannot read nowhere.json"),
        ("{", "not valid JSON"),
        ('{"a"}', "not valid JSON"),
    ],
)
def test_bad_arguments(text, says, capsys):
    with pytest.raises(ValueError, match=says):
        parse_arguments(text)
    assert cli.main(["sample", f"--model-args={text}"]) == 2
    assert says in capsys.readouterr().err


def test_arguments_that_nothing_asked_for(tmp_path):
    with pytest.raises(ValueError, match="no arguments, got dim"):
        load_model("moons", {"dim": 3})
    (tmp_path / "list.json").write_text("[1]")
    with pytest.raises(ValueError, match="must be a JSON object, got list"):
        parse_arguments(str(tmp_path / "list.json"))
    out = ["--seeds", "0", "--steps", "2", "--out", str(tmp_path / "a.png")]
    assert cli.main(["sample", "--label", "3", *out]) == 2
