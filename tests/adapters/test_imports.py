"""The libraries are optional: nothing of them is imported before an object of theirs is handed in."""

import subprocess
import sys

import pytest

LIBRARIES = ("diffusers", "denoising_diffusion_pytorch", "transformers", "accelerate", "torchvision", "triton")


def imported(code):
    """Which of the libraries are imported after `code`, in a fresh interpreter."""
    told = f"import sys\n{code}\nprint(*[name for name in {LIBRARIES} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", told], capture_output=True, text=True, check=True)
    return done.stdout.split("\n")[-2].split()


@pytest.mark.parametrize(
    "code",
    [
        "import ddpm_fast, ddpm_fast.sample, ddpm_fast.cli, ddpm_fast.adapters.load",
        "import ddpm_fast, torch\ntry: ddpm_fast.accelerate(torch.nn.Linear(1, 1))\nexcept TypeError: pass",
        "from ddpm_fast.adapters import guided_diffusion",
        "import ddpm_fast\nfrom tests.adapters import guided_standin\n"
        "ddpm_fast.accelerate(guided_standin.make(guided_standin, dict("
        "schedule='linear', steps=25, mean='EPSILON', variance='FIXED_SMALL', rescale=False, respacing=None)))",
    ],
    ids=["package", "refused", "guided", "accelerated"],
)
def test_nothing_is_imported_that_was_not_asked_for(code):
    assert imported(code) == []


def test_diffusers_alone_is_imported_for_its_objects():
    pytest.importorskip("diffusers")
    code = "from diffusers import DDPMScheduler\nimport ddpm_fast\nddpm_fast.accelerate(DDPMScheduler())"
    assert "denoising_diffusion_pytorch" not in imported(code)


def test_a_library_that_is_not_there_is_named(tmp_path):
    (tmp_path / "diffusers").mkdir()
    (tmp_path / "diffusers" / "__init__.py").write_text("raise ImportError('not here')")
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text('{"_class_name": "UNet2DModel"}')
    code = (
        f"import sys\nsys.path.insert(0, {str(tmp_path)!r})\n"
        f"from ddpm_fast.adapters.load import load_model\nload_model({str(folder)!r})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "the model is of diffusers, which cannot be imported here: not here" in done.stderr
