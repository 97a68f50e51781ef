"""What the process is set to changes no image: default dtype and device, deterministic algorithms, anomaly mode."""

import ast
import contextlib
from pathlib import Path

import pytest
import torch

import ddpm_fast
from ddpm_fast.edit import denoise, inpaint, interpolate, invert
from ddpm_fast.likelihood import bits_per_dimension
from ddpm_fast.models.checkpoint import load_checkpoint
from ddpm_fast.sample import sample

ROOT = Path(ddpm_fast.__file__).parents[1]
FACTORIES = frozenset(
    [
        "arange",
        "as_tensor",
        "empty",
        "eye",
        "full",
        "linspace",
        "logspace",
        "ones",
        "rand",
        "randint",
        "randn",
        "randperm",
        "tensor",
        "zeros",
    ]
)


@contextlib.contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def deterministic():
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


SETTINGS = {
    "float64": lambda: default_dtype(torch.float64),
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "meta": lambda: torch.device("meta"),
    "deterministic": deterministic,
    "anomaly": lambda: torch.autograd.set_detect_anomaly(True),
    "inference": torch.inference_mode,
}


@pytest.fixture(scope="module")
def checkpoint():
    return load_checkpoint()


def images():
    return 0.5 * torch.randn(
        2, 1, 32, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float32, device="cpu"
    )


PATHS = {
    "ddpm": lambda model: sample(model, (2, 1, 32, 32), seeds=1, num_inference_steps=6),
    "ddim": lambda model: sample(model, (2, 1, 32, 32), seeds=1, num_inference_steps=6, sampler="ddim", eta=0.5),
    "hoisted": lambda model: sample(model, (2, 1, 32, 32), seeds=1, num_inference_steps=6, optimize="hoist"),
    "speculative": lambda model: sample(model, (2, 1, 32, 32), seeds=1, num_inference_steps=6, speculate=3),
    "thresholding": lambda model: sample(model, (2, 1, 32, 32), seeds=1, num_inference_steps=6, thresholding=True),
    "guided": lambda model: sample(
        lambda x, t, scale: scale * model(x, t),
        (2, 1, 32, 32),
        seeds=1,
        num_inference_steps=6,
        guidance_scale=[1, 2],
        model_kwargs={"scale": 1.0},
        uncond_kwargs={"scale": 1.0},
        device="cpu",
    ),
    "generator": lambda model: sample(
        model, (2, 1, 32, 32), generator=torch.Generator().manual_seed(1), num_inference_steps=6
    ),
    "denoise": lambda model: denoise(model, IMAGES, 300, seeds=1, num_inference_steps=10),
    "interpolate": lambda model: interpolate(
        model, IMAGES, IMAGES.flip(0), 300, seeds=1, num_inference_steps=10, mixing="spherical"
    ),
    "inpaint": lambda model: inpaint(
        model, IMAGES, IMAGES > 0, seeds=1, num_inference_steps=6, resamplings=2, jump_length=2
    ),
    "invert": lambda model: invert(model, IMAGES, num_inference_steps=6),
    "likelihood": lambda model: bits_per_dimension(model, IMAGES.clamp(-1, 1), seeds=1, num_inference_steps=4).total,
}
IMAGES = images()


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("path", PATHS)
def test_a_setting_changes_no_image(path, setting, checkpoint):
    expected = torch.as_tensor(PATHS[path](checkpoint.model))
    with SETTINGS[setting]():
        got = PATHS[path](checkpoint.model)
    torch.testing.assert_close(torch.as_tensor(got), expected, atol=1e-5, rtol=1e-5)


def test_factories_name_dtype_and_device():
    found = []
    for path in sorted([*ROOT.glob("ddpm_fast/**/*.py"), *ROOT.glob("kernels/*.py")]):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            made_by_torch = isinstance(node.func.value, ast.Name) and node.func.value.id == "torch"
            if made_by_torch and node.func.attr in FACTORIES:
                missing = {"dtype", "device"} - {keyword.arg for keyword in node.keywords}
                if missing:
                    found.append(f"{path.relative_to(ROOT)}:{node.lineno} {node.func.attr} lacks {sorted(missing)}")
    assert found == []
