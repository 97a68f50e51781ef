"""Random configurations and damaged files: a result, or an error of ours that says what is wrong.

The cases are numbered, so that a failure can be repeated. `make test` runs some; `make fuzz` runs 20,000 configurations
and 3,000 files.
"""

import math
import os
import random
import traceback
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import ddpm_fast
from ddpm_fast import images
from ddpm_fast.adapters.load import load_model
from ddpm_fast.data.pictures import Pictures
from ddpm_fast.models.checkpoint import load_checkpoint, save_checkpoint
from ddpm_fast.sample import sample

CONFIGURATIONS = int(os.environ.get("DDPM_FAST_FUZZ_CONFIGURATIONS", 600))
FILES = int(os.environ.get("DDPM_FAST_FUZZ_FILES", 150))
OURS = tuple(
    str(path.resolve()) for path in (Path(ddpm_fast.__file__).parent, Path(ddpm_fast.__file__).parents[1] / "kernels")
)
REFUSALS = (ValueError, TypeError, OSError, FloatingPointError)

SHAPES = [(1, 1, 4), (2, 1, 4, 4), (3, 2, 2, 3, 2), (1, 3, 5, 7)]
BAD_NUMBERS = [
    -1,
    0,
    math.nan,
    math.inf,
    2**31,
    2**64,
    10**400,
    "3",
    None,
    True,
    1.5,
    [1],
    np.float32(0.5),
    torch.zeros(2),
]
POOLS = {
    "num_inference_steps": [None, 1, 2, 5, 7],
    "num_train_timesteps": [1, 2, 5, 20],
    "beta_schedule": ["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "sigmoid_alpha_bar", "cosine"],
    "beta_start": [1e-4, 0.01, 0.9, 1e-30],
    "beta_end": [0.02, 0.5, 0.9999],
    "trained_betas": [None, [0.1] * 5, [0.1, 0.2, 1.0], [math.nan] * 5, [0.5] * 20],
    "rescale_betas_zero_snr": [True, False],
    "prediction_type": ["epsilon", "sample", "v_prediction", "x"],
    "variance_type": ["fixed_small", "fixed_large", "fixed_small_log", "learned", "learned_range", "big"],
    "sampler": ["ddpm", "ddim", "euler"],
    "eta": [0.0, 0.5, 1.0],
    "ddim_direction": ["x0", "output"],
    "set_alpha_to_one": [True, False],
    "timestep_spacing": ["leading", "trailing", "linspace"],
    "steps_offset": [0, 1, 3],
    "timesteps": [None, [3, 1], [4, 3, 2, 1, 0], [0], [1, 2], []],
    "previous_timestep": ["spacing", "stride"],
    "noise_free": ["last_step", "t_zero"],
    "clip_sample": [True, False],
    "clip_sample_range": [1.0, 0.1, 5],
    "thresholding": [True, False],
    "dynamic_thresholding_ratio": [0.995, 0.5, 1.0],
    "sample_max_value": [1.0, 3.0],
    "temperature": [1.0, 0.0, 0.5],
    "execution": ["auto", "eager", "graph"],
    "steps_per_replay": [1, 3],
    "optimize": ["auto", None, "hoist"],
    "memory_format": [None, "contiguous", "channels_last"],
    "tf32": [None, True, False],
    "speculate": [False, 1, 2, {0: 2}, {0: 1, 3: 4}],
    "guidance_scale": [None, 1.0, 0.0, [2.0, 3.0]],
    "model_kwargs": [None, {}, {"c": 1.0}, {"c": {"a": 2.0}}],
    "uncond_kwargs": [None, {}, {"c": 0.5}],
    "dtype": [None, torch.float32, torch.bfloat16, torch.float16, torch.int64],
    "device": [None, "cpu", "cuda:7", "meta"],
    "seeds": [None, 0, 3, [5], [1, 2], range(3), -1],
    "generator": [None],
    "output": ["sample", "result", "x0", "trajectory", "film"],
    "output_steps": [None, [0], [1], [99]],
    "x_T": [None],
    "progress": [False],
}


class Model(nn.Module):
    """A network of any shape that knows no class."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.3))

    def forward(self, x, t, c=None):
        factor = c["a"] if isinstance(c, dict) else 1.0 if c is None else c
        return factor * self.scale * torch.tanh(x + t.view(-1, *[1] * (x.dim() - 1)) / 100)


def is_ours(error):
    """Whether our own code raised the error, or raised it from another one."""
    frames = traceback.extract_tb(error.__traceback__)
    return Path(frames[-1].filename).resolve().as_posix().startswith(OURS)


@pytest.mark.parametrize("part", range(20))
def test_configurations(part):
    found = []
    for number in range(part * CONFIGURATIONS // 20, (part + 1) * CONFIGURATIONS // 20):
        chance = random.Random(number)
        names = chance.sample(sorted(POOLS), chance.randint(1, 9))
        options = {name: chance.choice(POOLS[name]) for name in names}
        options.setdefault("num_train_timesteps", 5)
        if chance.random() < 0.3:
            options[chance.choice(names)] = chance.choice(BAD_NUMBERS)
        shape = chance.choice(SHAPES)
        try:
            result = sample(Model().eval(), shape, **{"progress": False, **options})
        except REFUSALS as error:
            if not is_ours(error):
                found.append((number, options, repr(error), traceback.extract_tb(error.__traceback__)[-1]))
        except Exception as error:
            found.append((number, options, repr(error), traceback.extract_tb(error.__traceback__)[-1]))
        else:
            x = getattr(result, "sample", result)
            if tuple(x.shape) != shape or x.dtype != torch.float32 or not torch.isfinite(x).all():
                found.append((number, options, x.shape, x.dtype))
    assert found == []


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Whole files of every kind, and what reads them."""
    folder = tmp_path_factory.mktemp("whole")
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (4, 8, 8, 3), np.uint8)
    Image.fromarray(pixels[0]).save(folder / "a.png")
    Image.fromarray(pixels[1]).save(folder / "b.jpg")
    Image.fromarray(pixels[2, ..., 0]).save(folder / "c.tif")
    np.savez(folder / "d.npz", images=pixels, labels=np.arange(4))
    np.savez(folder / "e.npz", arr_0=pixels)
    np.save(folder / "f.npy", pixels)
    checkpoint = load_checkpoint()
    save_checkpoint(folder / "model", checkpoint.model, checkpoint.diffusion)
    torch.save({"weight": torch.zeros(3)}, folder / "g.pt")
    return folder


def readers(folder, name):
    """Return the functions that read a file of the name."""
    path = folder / name
    if name.startswith("model"):
        return [lambda: load_checkpoint(path.parent), lambda: load_model(path.parent)]
    if name.endswith(".pt"):
        return [lambda: load_model(path)]
    if name.endswith((".npz", ".npy")):
        return [lambda: Pictures.read(path), lambda: images.read(path)]
    return [lambda: images.read(path), lambda: Pictures.read(path.parent)]


def damaged(data, chance):
    """Return the bytes with a damage of a kind."""
    kind = chance.randrange(6)
    data = bytearray(data)
    place = chance.randrange(max(1, min(len(data), 4096) if chance.random() < 0.7 else len(data)))
    if kind == 0:
        return bytes(data[:place])
    if kind == 1:
        data[place] ^= 1 << chance.randrange(8)
    elif kind == 2:
        data[place : place + 8] = chance.randbytes(8)
    elif kind == 3:
        data[place:place] = chance.randbytes(16)
    elif kind == 4:
        del data[place : place + chance.randint(1, 64)]
    else:
        data[place : place + 4] = (2**31 - 1).to_bytes(4, chance.choice(["little", "big"]))
    return bytes(data)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("part", range(10))
def test_damaged_files(part, whole, tmp_path):
    names = ["a.png", "b.jpg", "c.tif", "d.npz", "e.npz", "f.npy", "g.pt"]
    names += [str(path.relative_to(whole)) for path in sorted((whole / "model").iterdir())]
    found = []
    for number in range(part * FILES // 10, (part + 1) * FILES // 10):
        chance = random.Random(number)
        name = chance.choice(names)
        folder = tmp_path / str(number)
        source = whole / Path(name).parent
        (folder / Path(name).parent).mkdir(parents=True)
        for file in source.iterdir() if name.startswith("model") else [whole / name]:
            (folder / file.relative_to(whole)).write_bytes(file.read_bytes())
        (folder / name).write_bytes(damaged((whole / name).read_bytes(), chance))
        for read in readers(folder, name):
            try:
                read()
            except REFUSALS as error:
                if not is_ours(error):
                    found.append((number, name, repr(error)[:200], traceback.extract_tb(error.__traceback__)[-1]))
            except Exception as error:
                found.append((number, name, repr(error)[:200], traceback.extract_tb(error.__traceback__)[-1]))
    assert found == []
