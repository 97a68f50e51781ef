"""Files from strangers: what differs by a name is read, what is no model is refused by the name of its file."""

import json
import shutil

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("denoising_diffusion_pytorch")

from diffusers import (
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    UNet2DModel,
)
from safetensors.torch import load_file, save_file

from ddpm_fast import accelerate, cli
from ddpm_fast.adapters.load import load_model
from ddpm_fast.adapters.lucidrains import load_trainer_checkpoint
from ddpm_fast.config import SamplerConfig
from ddpm_fast.edit import from_level
from ddpm_fast.models.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from ddpm_fast.models.unet import UNet, UNetConfig
from ddpm_fast.training.losses import Loss
from tests.adapters import diffusers_models, lucidrains_models

TINY = UNetConfig(channels=1, image_size=8, widths=(8, 8), attention=(False, False), embedding=8, heads=2, groups=4)


@pytest.fixture
def folder(tmp_path):
    DDPMPipeline(diffusers_models.unet(), DDPMScheduler()).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


class TestDiffusers:
    @pytest.mark.parametrize("part", ["unet", "scheduler"])
    def test_no_class_is_imported_by_a_name_in_the_file(self, folder, part):
        index = json.loads((folder / "model_index.json").read_text())
        (folder / part / "evil.py").write_text("raise SystemExit('the code of the folder ran')")
        for named in (["evil", "Evil"], ["diffusers", "DiffusionPipeline"], "UNet2DModel", None):
            index[part] = named
            (folder / "model_index.json").write_text(json.dumps(index))
            with pytest.raises(CheckpointError, match=f"its {part} must be diffusers' "):
                load_model(folder)

    def test_the_only_variant_is_read(self, tmp_path):
        pipeline = DDPMPipeline(diffusers_models.unet(), DDPMScheduler())
        pipeline.save_pretrained(tmp_path / "model", variant="fp16")
        got = load_model(tmp_path / "model").model.state_dict()
        assert all(torch.equal(got[name], value) for name, value in pipeline.unet.state_dict().items())
        weights = tmp_path / "model" / "unet" / "diffusion_pytorch_model.fp16.safetensors"
        shutil.copy(weights, weights.with_name("diffusion_pytorch_model.ema.safetensors"))
        with pytest.raises(CheckpointError, match="several variants"):
            load_model(tmp_path / "model")

    @pytest.mark.parametrize("change", ["missing", "nan", "shape"])
    def test_weights_that_do_not_do(self, folder, change):
        path = folder / "unet" / "diffusion_pytorch_model.safetensors"
        weights = load_file(path)
        name = sorted(weights)[0]
        if change == "missing":
            del weights[name]
        else:
            weights[name] = weights[name] * torch.nan if change == "nan" else weights[name][:1].clone()
        save_file(weights, path, {"format": "pt"})
        with pytest.raises(CheckpointError, match=str(folder)):
            load_model(folder)

    def test_a_size_that_is_no_number(self, tmp_path):
        UNet2DModel.save_pretrained(diffusers_models.unet(), tmp_path / "unet")
        config = json.loads((tmp_path / "unet" / "config.json").read_text())
        (tmp_path / "unet" / "config.json").write_text(json.dumps({**config, "sample_size": "8"}))
        with pytest.raises(ValueError, match="sample_size .* must be one or two whole numbers, got '8'"):
            load_model(tmp_path / "unet")

    @pytest.mark.parametrize(
        ("pipeline", "scheduler"),
        [(DDPMPipeline, DDPMScheduler(steps_offset=1)), (DDIMPipeline, DDIMScheduler(num_train_timesteps=20))],
    )
    def test_a_folder_is_checked_for_the_run_that_is_taken(self, pipeline, scheduler, tmp_path):
        pipeline(diffusers_models.unet(), scheduler).save_pretrained(tmp_path / "model")
        for more in (["--steps", "10"], ["--model-args", '{"num_inference_steps": 10}']):
            command = ["sample", "--model", str(tmp_path / "model"), "--seeds", "0", "--quiet", *more]
            assert cli.main([*command, "--out", str(tmp_path / "o.png")]) == 0


class TestSchedulers:
    @pytest.mark.parametrize("kind", [DDPMScheduler, DDIMScheduler])
    def test_only_the_timestep_that_does_not_exist_fails(self, kind):
        stock = kind(steps_offset=1)
        fast = accelerate(stock, backend="torch")
        for scheduler in (stock, fast):
            scheduler.set_timesteps(1000)
        x, output = torch.randn(1, 1, 4, 4), torch.randn(1, 1, 4, 4)
        for place in (1, 200, 999):
            results = [
                each.step(output, each.timesteps[place], x, generator=torch.Generator().manual_seed(0)).prev_sample
                for each in (stock, fast)
            ]
            torch.testing.assert_close(*results, atol=1e-5, rtol=0)
        with pytest.raises(IndexError):
            fast.step(output, fast.timesteps[0], x)

    def test_seeds_are_never_dropped(self):
        pipeline = accelerate(DDPMPipeline(diffusers_models.unet(), DDPMScheduler()))
        pipeline.set_progress_bar_config(disable=True)
        found = pipeline(seeds=[3], num_inference_steps=3, output_type="np")
        assert found.seeds == pipeline.last_seeds == [3]
        pipeline.scheduler = DPMSolverMultistepScheduler()
        with pytest.raises(ValueError, match="seeds need a DDPMScheduler or DDIMScheduler, not DPMSolver"):
            pipeline(seeds=[3], num_inference_steps=3)
        pipeline(num_inference_steps=3, output_type="np")
        assert pipeline.last_seeds is None


def test_a_loss_needs_the_schedule_alone():
    plain, offset = (Loss(SamplerConfig(**options)) for options in ({}, {"steps_offset": 1, "set_alpha_to_one": False}))
    x, t = torch.randn(4, 3, 1, 2, 2), torch.tensor([0, 1, 500])
    assert torch.equal(plain(*x, t), offset(*x, t))


def test_a_stride_that_is_the_spacing_may_begin_anywhere():
    stride = SamplerConfig(sampler="ddim", num_inference_steps=50, previous_timestep="stride")
    assert from_level(stride, 300).inference_timesteps()[0] == 300
    odd = SamplerConfig(sampler="ddim", num_inference_steps=7, previous_timestep="stride", timestep_spacing="trailing")
    with pytest.raises(ValueError, match="take 'spacing'"):
        from_level(odd, 300)


class TestTrainersFiles:
    @pytest.mark.parametrize("ema", [True, False])
    @pytest.mark.parametrize(
        "renamed",
        [
            lambda key: f"module.{key}",
            lambda key: f"_orig_mod.{key}",
            lambda key: key.replace("model.", "model._orig_mod.", 1),
            lambda key: f"module._orig_mod.{key}",
            lambda key: key.replace("loss_weight", "p2_loss_weight"),
            lambda key: None if key == "loss_weight" else key,
        ],
        ids=["module", "_orig_mod", "model._orig_mod", "both", "an old name", "without"],
    )
    def test_names_of_wrappers_do_not_count(self, renamed, ema, tmp_path):
        state = lucidrains_models.diffusion().state_dict()
        weights = {renamed(key): value for key, value in state.items() if renamed(key) is not None}
        averaged = {f"ema_model.{key}": value for key, value in weights.items()}
        torch.save({"model": weights, "ema": averaged}, tmp_path / "model-1.pt")
        with torch.no_grad():
            target = lucidrains_models.diffusion()
            for parameter in target.parameters():
                parameter.zero_()
        load_trainer_checkpoint(tmp_path / "model-1.pt", target, ema=ema)
        assert all(torch.equal(value, state[key]) for key, value in target.state_dict().items())

    @pytest.mark.parametrize(
        "change",
        [
            lambda value: value * torch.nan if value.is_floating_point() else value,
            lambda value: value.to(torch.int8),
            lambda value: value.to(torch.complex64),
            lambda value: value.to("meta"),
            lambda value: value.to_sparse() if value.dim() else value,
            lambda value: 3,
            lambda value: None,
        ],
        ids=["NaN", "integers", "complex", "meta", "sparse", "numbers", "None"],
    )
    def test_what_is_no_weight_is_refused(self, change, tmp_path):
        state = lucidrains_models.diffusion().state_dict()
        torch.save({"ema": {f"ema_model.{key}": change(v) for key, v in state.items()}}, tmp_path / "model-1.pt")
        target = lucidrains_models.diffusion()
        with pytest.raises(ValueError, match=r"model-1\.pt"):
            load_trainer_checkpoint(tmp_path / "model-1.pt", target)
        assert all(torch.equal(value, state[key]) for key, value in target.state_dict().items())


class TestCheckpoints:
    def test_weights_that_float16_cannot_hold_are_kept_wider(self, tmp_path):
        model = UNet(TINY)
        with torch.no_grad():
            next(model.parameters()).fill_(1e6)
        save_checkpoint(tmp_path, model, SamplerConfig())
        assert next(load_checkpoint(tmp_path).model.parameters()).max() == 1e6

    @pytest.mark.parametrize(
        ("section", "name", "value"),
        [
            ("network", "channels", 10**9), ("network", "channels", 2**63), ("network", "embedding", 10**9),
            ("network", "num_classes", 10**30), ("diffusion", "steps_offset", 10**400),
            ("diffusion", "num_train_timesteps", 10**15), ("diffusion", "trained_betas", [float("nan")] * 1000),
        ],
    )  # fmt: skip
    def test_absurd_configurations(self, section, name, value, tmp_path):
        save_checkpoint(tmp_path, UNet(TINY), SamplerConfig())
        config = json.loads((tmp_path / "config.json").read_text())
        config[section][name] = value
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(CheckpointError, match=name):
            load_model(tmp_path)
        (tmp_path / "config.json").write_text("[" * 100_000)
        with pytest.raises(CheckpointError, match="nested too deeply"):
            load_model(tmp_path)

    def test_a_model_that_is_not_there(self, tmp_path):
        with pytest.raises(CheckpointError, match="does not exist"):
            load_model(tmp_path / "model-7.pt", {"unet": {"dim": 8}})


def test_inpainting_gives_the_known_image_back_for_every_table():
    from ddpm_fast.edit import inpaint, inverted
    from ddpm_fast.table import previous_alpha_bars

    known = torch.rand(2, 1, 4, 4) * 2 - 1
    mask = torch.zeros(4, 4)
    mask[:, :2] = 1
    strided = {
        "sampler": "ddim",
        "num_inference_steps": 7,
        "timestep_spacing": "trailing",
        "previous_timestep": "stride",
    }
    for options in ({}, {"set_alpha_to_one": False}, {"set_alpha_to_one": False, "sampler": "ddim"}, strided):
        got = inpaint(lambda x, t: 0.1 * x, known, mask, seeds=0, **{"num_inference_steps": 20, **options})
        assert torch.equal(got * mask, known * mask)
        # The way back begins where the way there ends, and goes through its levels.
        config = SamplerConfig(**{"num_inference_steps": 20, **options, "sampler": "ddim"})
        levels = previous_alpha_bars(config, config.inference_timesteps())[::-1]
        np.testing.assert_allclose(1 / inverted(config).a ** 2, levels)
