"""Tests of checkpoints: the round trip, and one sentence for every possible defect."""

import dataclasses
import json
import os
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from ddpm_fast.config import SamplerConfig
from ddpm_fast.models import checkpoint
from ddpm_fast.models.checkpoint import EMBEDDED, CheckpointError, load_checkpoint, save_checkpoint
from tests.support.unets import TINY, random_unet

DIFFUSION = SamplerConfig(num_train_timesteps=20, beta_schedule="scaled_linear", clip_sample_range=1.5)


@pytest.fixture
def folder(tmp_path):
    save_checkpoint(tmp_path / "model", random_unet(), DIFFUSION)
    return tmp_path / "model"


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.bfloat16], ids=str)
def test_round_trip(tmp_path, dtype):
    model = random_unet()
    about = {"data": {"name": "moons"}, "training": {"steps": 3}}
    save_checkpoint(tmp_path / "a" / "b", model, DIFFUSION, about, dtype)
    assert sorted(os.listdir(tmp_path / "a" / "b")) == ["config.json", "model.safetensors"]
    with safe_open(tmp_path / "a" / "b" / "model.safetensors", "pt") as file:
        assert {file.get_tensor(name).dtype for name in file.keys()} == {dtype}  # noqa: SIM118
    checkpoint = load_checkpoint(tmp_path / "a" / "b")
    assert (checkpoint.diffusion, checkpoint.about, checkpoint.shape) == (DIFFUSION, about, (1, 8, 8))
    assert checkpoint.model.config == TINY
    assert not checkpoint.model.training
    want = model.state_dict()
    for name, value in checkpoint.model.state_dict().items():
        assert value.dtype == torch.float32
        assert torch.equal(value, want[name].to(dtype).float()), name
    assert not any(parameter.requires_grad for parameter in checkpoint.model.parameters())


def test_float16_is_the_default(folder):
    count = sum(parameter.numel() for parameter in random_unet().parameters())
    assert 2 * count < (folder / "model.safetensors").stat().st_size < 2 * count + 10_000


def test_saving_leaves_the_model_alone(tmp_path):
    model = random_unet().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    save_checkpoint(tmp_path, model, DIFFUSION)
    assert model.training
    assert all(p.requires_grad and p.dtype == torch.float32 for p in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    "config",
    [
        DIFFUSION,
        SamplerConfig(num_train_timesteps=5, trained_betas=[0.1, 0.2, 0.3, 0.4, 0.5]),
        SamplerConfig(timesteps=[900, 500, 0], sampler="ddim", eta=0.5),
        SamplerConfig(prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing"),
    ],
    ids=["schedule", "betas", "timesteps", "zero-snr"],
)
def test_the_diffusion_comes_back(tmp_path, config):
    save_checkpoint(tmp_path, random_unet(), config)
    assert load_checkpoint(tmp_path).diffusion == config


def test_embedded():
    checkpoint = load_checkpoint()
    assert checkpoint.shape == (1, 32, 32)
    assert checkpoint.diffusion == SamplerConfig()
    assert all(parameter.isfinite().all() for parameter in checkpoint.model.parameters())
    assert checkpoint.model(torch.randn(1, 1, 32, 32), torch.tensor([500])).any()  # an untrained network returns zero
    size = sum(path.stat().st_size for path in EMBEDDED["moons"].iterdir())
    assert size < 4e6


def test_an_interrupted_save_leaves_the_old_checkpoint(folder, monkeypatch):
    before = load_checkpoint(folder).model.state_dict()

    def write_half(weights, path, metadata):
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "save_file", write_half)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(folder, random_unet(seed=1), SamplerConfig())
    after = load_checkpoint(folder).model.state_dict()
    assert all(torch.equal(value, before[name]) for name, value in after.items())
    assert sorted(os.listdir(folder)) == ["config.json", "model.safetensors"]


def edit(**sections):
    """Return a function that changes fields of config.json. None removes a section."""

    def change(folder):
        config = json.loads((folder / "config.json").read_text())
        for section, fields in sections.items():
            if isinstance(fields, dict):
                config[section] |= fields
            elif fields is None:
                del config[section]
            else:
                config[section] = fields
        (folder / "config.json").write_text(json.dumps(config))

    return change


def write(name, data):
    return lambda folder: (folder / name).write_bytes(data)


def shorten(name, size):
    return lambda folder: os.truncate(folder / name, size)


def other_weights(folder):
    save_file(random_unet(dataclasses.replace(TINY, embedding=32)).state_dict(), folder / "model.safetensors")


CONFIG_BROKEN = {
    "missing": (lambda folder: (folder / "config.json").unlink(), "config.json is missing: not a checkpoint"),
    "empty": (write("config.json", b""), "config.json is not valid JSON"),
    "truncated": (shorten("config.json", 100), "config.json is not valid JSON"),
    "not-text": (write("config.json", b"\xff\xfe\x00"), "config.json is not valid JSON"),
    "list": (write("config.json", b"[1, 2]"), "no format 'ddpm_fast.checkpoint.v1'"),
    "other-format": (edit(format="ddpm_fast.checkpoint.v2"), "no format 'ddpm_fast.checkpoint.v1'"),
    "diffusers": (write("config.json", b'{"_class_name": "UNet2DModel"}'), "no format 'ddpm_fast.checkpoint.v1'"),
    "no-network": (edit(network=None), "config.json lacks the section 'network'"),
    "no-diffusion": (edit(diffusion=None), "config.json lacks the section 'diffusion'"),
    "network-list": (edit(network=[8, 8]), "config.json lacks the section 'network'"),
    "unknown-network": (edit(network={"width": 8}), "unknown network field 'width'; did you mean 'widths'"),
    "unknown-option": (edit(diffusion={"beta_stat": 0.1}), "unknown option 'beta_stat'; did you mean 'beta_start'"),
    "bad-network": (edit(network={"image_size": 9}), r"config.json: image_size must be divisible"),
    "bad-diffusion": (edit(diffusion={"beta_end": 2}), r"config.json: beta_end must be a finite number in"),
    "bad-type": (edit(diffusion={"timesteps": 5}), "config.json: "),
}
WEIGHTS_BROKEN = {
    "missing": (lambda folder: (folder / "model.safetensors").unlink(), "model.safetensors is missing"),
    "empty": (write("model.safetensors", b""), "model.safetensors is truncated or not a safetensors file"),
    "header-only": (shorten("model.safetensors", 500), "model.safetensors is truncated"),
    "truncated": (shorten("model.safetensors", 9_000), "model.safetensors is truncated"),
    "text": (write("model.safetensors", b"not what you think" * 100), "not a safetensors file"),
    "other-network": (other_weights, "model.safetensors does not fit its config.json"),
}


@pytest.mark.parametrize(("break_it", "says"), CONFIG_BROKEN.values(), ids=CONFIG_BROKEN)
def test_broken_config(folder, break_it, says):
    break_it(folder)
    with pytest.raises(CheckpointError, match=says):
        load_checkpoint(folder)


@pytest.mark.parametrize(("break_it", "says"), WEIGHTS_BROKEN.values(), ids=WEIGHTS_BROKEN)
def test_broken_weights(folder, break_it, says):
    break_it(folder)
    with pytest.raises(CheckpointError, match=says):
        load_checkpoint(folder)


@pytest.mark.parametrize(
    "fields",
    [
        {"groups": 0},
        {"heads": 0},
        {"widths": [], "attention": []},
        {"widths": [-8, 8]},
        {"widths": [8.0, 8.0]},
        {"embedding": "x"},
        {"channels": -1},
        {"image_size": 0},
    ],
    ids=lambda fields: "-".join(f"{name}={value}" for name, value in fields.items()),
)
def test_a_senseless_network(folder, fields):
    edit(network=fields)(folder)
    with pytest.raises(CheckpointError, match="config.json"):
        load_checkpoint(folder)


@pytest.mark.parametrize("make", [lambda path: None, lambda path: path.write_text("x")], ids=["nothing", "a-file"])
def test_no_folder(tmp_path, make):
    make(tmp_path / "model")
    with pytest.raises(CheckpointError, match="no checkpoint folder at .*model|model is a file"):
        load_checkpoint(tmp_path / "model")


def test_a_pickle_is_refused(folder):
    """Check that a pickle in place of the safetensors file is refused and not loaded."""
    torch.save(random_unet().state_dict(), folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        load_checkpoint(folder)
    shutil.copy(folder / "model.safetensors", folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="model.safetensors is missing"):
        load_checkpoint(folder)
