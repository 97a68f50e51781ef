"""accelerate(…, speculate=…) and `ddpm-fast sample --speculate`: fewer calls, one law, clear refusals."""

import numpy as np
import pytest
import torch

from ddpm_fast import accelerate, cli, images
from ddpm_fast.models.checkpoint import save_checkpoint
from ddpm_fast.sample import SamplerConfig, sample
from ddpm_fast.table import build_table
from tests.support.unets import random_unet

diffusers = pytest.importorskip("diffusers")
STEPS = 60


class Linear(diffusers.UNet2DModel):
    """A network whose noise prediction is 0.4 x, so that laws are known; it counts its calls."""

    def __init__(self, **config):
        super().__init__(**config)
        self.seen = []

    def forward(self, x, t, class_labels=None, return_dict=True):
        self.seen.append(len(x))
        return diffusers.models.unets.unet_2d.UNet2DOutput(sample=0.4 * x)


@pytest.fixture
def pipeline():
    unet = Linear(
        sample_size=4, in_channels=1, out_channels=1, block_out_channels=(8, 8), norm_num_groups=4,
        down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2,
    )  # fmt: skip
    scheduler = diffusers.DDPMScheduler(num_train_timesteps=STEPS, clip_sample=False)
    pipe = diffusers.DDPMPipeline(unet, scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_a_pipeline_in_fewer_calls_and_of_one_law(pipeline):
    fast = accelerate(pipeline, speculate=8)
    count = 400
    generator = torch.Generator().manual_seed(1)
    pipeline.unet.seen.clear()
    x = fast(count, generator=generator, num_inference_steps=STEPS, output_type="np").images
    did = fast.last_speculation
    assert did.windows == {0: 8}
    pipeline.unet.seen.remove(count)  # one call for the comparison with calls of one draft
    assert did.calls == len(pipeline.unet.seen) < STEPS / 2
    assert set(pipeline.unet.seen) == {8 * count}
    assert len(set(fast.last_seeds)) == count
    # The pipeline clips its images: compare how often, and the mean of the rest.
    expected = pipeline(count, generator=generator, num_inference_steps=STEPS, output_type="np").images
    for measure in (np.mean, np.std, lambda values: (values == 1).mean()):
        assert measure(x) == pytest.approx(measure(expected), abs=0.03)


def test_the_same_generator_gives_the_same_images(pipeline):
    fast = accelerate(pipeline, speculate={0: 2, 30: 8})
    images, seeds = [], []
    for _ in range(2):
        images.append(fast(3, generator=torch.Generator().manual_seed(5), num_inference_steps=STEPS, output_type="np"))
        seeds.append(fast.last_seeds)
    assert seeds[0] == seeds[1]
    np.testing.assert_array_equal(images[0].images, images[1].images)
    again = fast(3, seeds=seeds[0], num_inference_steps=STEPS, output_type="np")
    np.testing.assert_array_equal(again.images, images[0].images)


def test_a_window_of_one_is_the_accelerated_pipeline(pipeline):
    options = {"num_inference_steps": STEPS, "output_type": "np"}
    plain = accelerate(pipeline)(2, generator=torch.Generator().manual_seed(5), **options)
    one = accelerate(pipeline, speculate=1)(2, generator=torch.Generator().manual_seed(5), **options)
    np.testing.assert_array_equal(one.images, plain.images)


def test_what_accelerate_refuses(pipeline):
    with pytest.raises(ValueError, match="speculate is for pipelines"):
        accelerate(pipeline.scheduler, speculate=8)
    with pytest.raises(TypeError, match="speculate is False, True, a window"):
        accelerate(pipeline, speculate="yes")
    learned = diffusers.DDPMScheduler(num_train_timesteps=STEPS, variance_type="learned_range")
    pipe = diffusers.DDPMPipeline(pipeline.unet, learned)
    with pytest.raises(ValueError, match="variance"):
        accelerate(pipe, speculate=8)(1, num_inference_steps=STEPS)


def test_a_lucidrains_diffusion():
    pytest.importorskip("denoising_diffusion_pytorch")
    from tests.adapters.lucidrains_models import diffusion, learned

    fast = accelerate(diffusion(), speculate=4)
    torch.manual_seed(3)
    x = fast.sample(batch_size=2)
    assert x.shape[0] == 2
    assert bool(torch.isfinite(x).all())
    assert fast.last_speculation.calls < fast.num_timesteps
    with pytest.raises(ValueError, match="gives the samples alone"):
        fast.sample(batch_size=2, return_all_timesteps=True)
    with pytest.raises(ValueError, match="speculate needs a variance that is fixed"):
        accelerate(learned(), speculate=4).sample(batch_size=2)


# The command line

DIFFUSION = SamplerConfig(num_train_timesteps=40)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    network = random_unet(std=0.05)
    folder = tmp_path_factory.mktemp("models") / "tiny"
    save_checkpoint(folder, network, DIFFUSION, dtype=torch.float32)
    return folder, network.eval()


def draw(model, out, *options):
    return cli.main(["sample", "--device", "cpu", "--model", str(model), "--out", str(out), "--seeds", "0-4", *options])


def test_the_command(model, tmp_path, capsys):
    folder, network = model
    assert draw(folder, tmp_path / "a.npz", "--speculate", "0:2,10:8", "--batch", "3") == 0
    about = images.read_metadata(tmp_path / "a.npz")
    assert about["speculate"] == {"0": 2, "10": 8}
    assert "network calls in all" in capsys.readouterr().out
    x = sample(network, (5, 1, 8, 8), seeds=0, config=DIFFUSION, speculate={0: 2, 10: 8}, progress=False)
    drawn = np.load(tmp_path / "a.npz")["arr_0"].astype(int)
    assert abs(drawn - ((x + 1) * 127.5).round().clamp(0, 255).permute(0, 2, 3, 1).numpy()).max() <= 1


def test_the_command_measures_once(model, tmp_path):
    """The windows that the first batch chose are those of all, and stand in the file."""
    folder, _ = model
    assert draw(folder, tmp_path / "a.npz", "--batch", "4", "--quiet", "--speculate") == 0
    about = images.read_metadata(tmp_path / "a.npz")
    windows = ",".join(f"{t}:{window}" for t, window in about["speculate"].items())
    assert draw(folder, tmp_path / "b.npz", "--batch", "2", "--quiet", "--speculate", windows) == 0
    a, b = (np.load(tmp_path / name)["arr_0"].astype(int) for name in ("a.npz", "b.npz"))
    assert abs(a - b).max() <= 1


def test_what_the_command_refuses(model, tmp_path, capsys):
    folder, _ = model
    for text in ("zero", "0", "5:4", "0:4:2"):
        with pytest.raises(SystemExit):
            draw(folder, tmp_path / "a.png", "--speculate", text)
        assert "--speculate: windows are 16, or 0:4,100:16" in capsys.readouterr().err
    assert len(build_table(DIFFUSION)) == 40


GUIDED = {
    "schedule": "cosine", "steps": 40, "mean": "EPSILON", "variance": "FIXED_SMALL", "rescale": False,
    "respacing": None, "clip": True, "denoised": False, "cond": False, "eta": None,
}  # fmt: skip


def test_a_guided_diffusion():
    from tests.adapters import guided_standin

    fast = accelerate(guided_standin.make(guided_standin, GUIDED), speculate=4)
    x = guided_standin.walk(fast, GUIDED)
    assert bool(torch.isfinite(x).all())
    assert fast.last_speculation.calls <= 40
    torch.testing.assert_close(guided_standin.walk(fast, GUIDED), x)
    for change in ({"denoised": True}, {"cond": True}):
        with pytest.raises(ValueError, match="speculate does not go with denoised_fn or cond_fn"):
            guided_standin.walk(fast, {**GUIDED, **change})
    with pytest.raises(ValueError, match="gives the samples alone"):
        guided_standin.walk(fast, GUIDED, progressive=True)
