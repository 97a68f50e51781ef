"""Tests of classes from end to end: data with labels, networks, training, guidance, the command line."""

import dataclasses
import itertools
import json

import numpy as np
import pytest
import torch
from PIL import Image

from ddpm_fast import cli, images
from ddpm_fast.config import SamplerConfig
from ddpm_fast.data.pictures import Pictures
from ddpm_fast.kernels import to_uint8
from ddpm_fast.likelihood import bits_per_dimension
from ddpm_fast.models.checkpoint import Classes, load_checkpoint, save_checkpoint
from ddpm_fast.models.unet import UNet, UNetConfig
from ddpm_fast.sample import Sampler, sample
from ddpm_fast.training import Trainer, TrainingConfig
from tests.support.unets import TINY, random_unet

THREE_CLASSES = dataclasses.replace(TINY, num_classes=3)
DIFFUSION = SamplerConfig(num_train_timesteps=20)
CONFIG = TrainingConfig(steps=6, batch_size=8, learning_rate=3e-3, warmup=2, save_every=3)
QUIET = {"progress": False}


def shades(count, seed, step):
    """Return images of one shade each, -0.5, 0 or 0.5, with the class as label."""
    labels = torch.randint(3, (count,), generator=torch.Generator().manual_seed(1000 * seed + step))
    return (labels.float() / 2 - 0.5).view(-1, 1, 1, 1).expand(-1, 1, 8, 8).clone(), labels


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Return a checkpoint of a random network with classes."""
    folder = tmp_path_factory.mktemp("models") / "classes"
    save_checkpoint(folder, random_unet(THREE_CLASSES), DIFFUSION, dtype=torch.float32)
    return folder


# The network


def test_the_output_depends_on_the_class_and_on_no_neighbour():
    model, x = random_unet(THREE_CLASSES), torch.randn(1, 1, 8, 8).expand(4, 1, 8, 8)
    labels = torch.tensor([0, 1, 2, 3])
    together = model(x, torch.full((4,), 5), labels)
    for row, other in itertools.combinations(together, 2):
        assert (row - other).abs().max() > 1e-3
    alone = torch.cat([model(x[:1], torch.tensor([5]), label[None]) for label in labels])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-6)


def test_no_label_is_no_class():
    model, x, t = random_unet(THREE_CLASSES), torch.randn(2, 1, 8, 8), torch.tensor([3, 9])
    assert torch.equal(model(x, t), model(x, t, torch.tensor([3, 3])))


def test_a_network_without_classes_takes_no_label():
    model = random_unet(TINY)
    with pytest.raises(ValueError, match="knows no classes"):
        model(torch.randn(1, 1, 8, 8), torch.tensor([0]), torch.tensor([0]))


@pytest.mark.parametrize("count", [0, -1, 1.5, "3", True])
def test_a_senseless_number_of_classes(count):
    with pytest.raises(ValueError, match="num_classes must be an integer >= 1"):
        dataclasses.replace(TINY, num_classes=count)


@pytest.mark.parametrize(
    ("size", "levels"), [(4, 1), (7, 1), (8, 2), (12, 2), (16, 3), (28, 3), (32, 4), (64, 4), (256, 4), (1, 1)]
)
def test_the_network_for_a_size(size, levels):
    config = UNetConfig.for_images(3, size)
    assert (config.channels, config.image_size, len(config.widths)) == (3, size, levels)
    assert config.attention == tuple(level >= levels // 2 for level in range(levels))
    model = UNet(config)
    assert model(torch.zeros(1, 3, size, size), torch.tensor([0])).shape == (1, 3, size, size)


def test_the_default_network_is_the_one_for_its_size():
    assert UNetConfig.for_images(1, 32) == UNetConfig()
    assert UNetConfig.for_images(1, 8, widths=(16, 24, 32)).widths == (16, 24, 32)


def test_a_checkpoint_says_its_classes(model):
    assert load_checkpoint(model).classes == Classes("class_labels", 3, none=3)


# The data


@pytest.fixture
def folders(tmp_path):
    """Return three folders of pictures: black, grey and white ones."""
    root = tmp_path / "pictures"
    for name, shade, count in (("black", 10, 3), ("grey", 120, 4), ("white", 240, 5)):
        (root / name).mkdir(parents=True)
        for number in range(count):
            Image.new("L", (8, 8), shade + number).save(root / name / f"{number}.png")
    (root / ".hidden").mkdir()
    return root


def test_subfolders_are_classes(folders):
    data = Pictures.read(folders)
    assert (len(data), data.shape, data.classes) == (12, (1, 8, 8), ["black", "grey", "white"])
    pixels, labels = data(12, 0, 0)
    assert labels.bincount().tolist() == [3, 4, 5]
    assert labels.tolist() == [0 if shade < -0.5 else 1 if shade < 0.5 else 2 for shade in pixels.mean((1, 2, 3))]
    assert data.about["classes"] == ["black", "grey", "white"]


def test_other_labels_are_other_data(folders):
    before = Pictures.read(folders).about["checksum"]
    (folders / "black" / "2.png").rename(folders / "grey" / "00.png")  # the order of the pixels stays
    assert Pictures.read(folders).about["checksum"] != before


@pytest.mark.parametrize("name", ["labels", "arr_1"])
def test_labels_in_an_array(tmp_path, name):
    pixels = np.arange(5, dtype=np.uint8)[:, None, None, None] * np.ones((1, 8, 8, 1), np.uint8)
    np.savez(tmp_path / "a.npz", arr_0=pixels, **{name: np.array([0, 2, 1, 2, 0], np.int32)})
    data = Pictures.read(tmp_path / "a.npz")
    assert data.classes == ["0", "1", "2"]
    drawn, labels = data(5, 0, 0)
    shades = ((drawn[:, 0, 0, 0] + 1) * 127.5).round().long()
    assert labels.dtype == torch.int64
    assert labels.tolist() == [[0, 2, 1, 2, 0][shade] for shade in shades]


@pytest.mark.parametrize(
    ("labels", "says"),
    [
        (np.zeros(4, int), r"integers \[5\] from 0 on, got int64 \(4,\)"),
        (np.zeros(5), "got float64"),
        (np.full(5, -1), "from 0 on"),
    ],
)
def test_bad_labels_are_named(tmp_path, labels, says):
    np.savez(tmp_path / "a.npz", arr_0=np.zeros((5, 8, 8, 1), np.uint8), labels=labels)
    with pytest.raises(ValueError, match=rf"a\.npz: labels must be .*{says}"):
        Pictures.read(tmp_path / "a.npz")


def test_bad_class_folders_are_named(folders):
    Image.new("L", (9, 8)).save(folders / "white" / "9.png")
    with pytest.raises(ValueError, match=r"white/9\.png is 8 x 9 x 1"):
        Pictures.read(folders)
    (folders / "empty").mkdir()
    with pytest.raises(ValueError, match="empty holds no picture"):
        Pictures.read(folders)


# Training


def seen_labels(folder, dropout, steps=40):
    """Return the labels that the network gets in training, and the labels of the data."""
    config = dataclasses.replace(CONFIG, steps=steps, save_every=steps, label_dropout=dropout)
    run = Trainer(folder, config, THREE_CLASSES, DIFFUSION, shades)
    seen = []
    run.model.register_forward_pre_hook(lambda module, given: seen.append(given[2]))
    run.run(**QUIET)
    return torch.cat(seen), torch.cat([shades(CONFIG.batch_size, 0, step)[1] for step in range(steps)])


@pytest.mark.parametrize("dropout", [0.0, 0.3, 1.0])
def test_a_share_of_labels_is_withheld(tmp_path, dropout):
    seen, true = seen_labels(tmp_path, dropout)
    dropped = seen == 3
    assert torch.equal(seen[~dropped], true[~dropped])
    assert abs(dropped.double().mean() - dropout) <= 4 * (dropout * (1 - dropout) / len(seen)) ** 0.5


def test_it_learns_the_classes_and_guidance_sharpens_them(tmp_path):
    config = dataclasses.replace(CONFIG, steps=300, batch_size=32, save_every=300, learning_rate=1e-2, ema_decay=0.99)
    diffusion = SamplerConfig(num_train_timesteps=20, beta_schedule="squaredcos_cap_v2")
    Trainer(tmp_path, config, THREE_CLASSES, diffusion, shades).run(**QUIET)
    checkpoint = load_checkpoint(tmp_path)
    labels, none = torch.arange(48) % 3, torch.full((48,), 3)

    def drawn(**options):
        x = sample(checkpoint.model, (48, 1, 8, 8), seeds=0, config=checkpoint.diffusion, **options, **QUIET)
        return x.mean((1, 2, 3))

    conditioning = {"model_kwargs": {"class_labels": labels}}
    centres = torch.stack([drawn(**conditioning)[labels == k].mean() for k in range(3)])
    assert centres.tolist() == pytest.approx([-0.5, 0, 0.5], abs=0.15)
    free = drawn(model_kwargs={"class_labels": none})
    assert free.std() > 0.25  # 0.41 for all classes, 0 for a single one
    guided = drawn(**conditioning, guidance_scale=2.0, uncond_kwargs={"class_labels": none})
    # Guidance leads away from the middle of all classes.
    assert guided[labels == 0].mean() < centres[0]
    assert guided[labels == 2].mean() > centres[2]


def test_an_interrupted_run_with_classes_resumes_bit_for_bit(tmp_path):
    def interrupted(count, seed, step):
        if step == 5:
            raise KeyboardInterrupt
        return shades(count, seed, step)

    Trainer(tmp_path / "a", CONFIG, THREE_CLASSES, DIFFUSION, shades).run(**QUIET)
    with pytest.raises(KeyboardInterrupt):
        Trainer(tmp_path / "b", CONFIG, THREE_CLASSES, DIFFUSION, interrupted).run(**QUIET)
    resumed = Trainer(tmp_path / "b", CONFIG, THREE_CLASSES, DIFFUSION, shades)
    assert resumed.step == 3
    resumed.run(**QUIET)
    a, b = load_checkpoint(tmp_path / "a").model.state_dict(), load_checkpoint(tmp_path / "b").model.state_dict()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


def test_samples_on_the_way_are_of_every_class(tmp_path):
    Trainer(tmp_path, CONFIG, THREE_CLASSES, DIFFUSION, shades, samples=4).run(**QUIET)
    checkpoint = load_checkpoint(tmp_path)
    options = {"config": checkpoint.diffusion, "sampler": "ddim", "num_inference_steps": 20, **QUIET}
    labels = {"class_labels": torch.tensor([0, 1, 2, 0])}
    x = sample(checkpoint.model, (4, 1, 8, 8), seeds=0, model_kwargs=labels, **options)
    with Image.open(tmp_path / "samples.png") as picture:
        apart = np.asarray(picture).astype(int) - images.grid(to_uint8(x).numpy())[..., 0]
    assert abs(apart).max() <= 2  # the checkpoint's weights are rounded


@pytest.mark.parametrize(
    ("network", "data", "says"),
    [
        (THREE_CLASSES, lambda *key: shades(*key)[0], "the data have none, the network takes 3 classes"),
        (TINY, shades, "the data have labels, the network takes none"),
        (dataclasses.replace(TINY, num_classes=2), shades, r"labels must lie in 0 … 1, got 0 … 2"),
    ],
    ids=["no-labels", "no-classes", "too-few"],
)
def test_data_and_network_must_fit(tmp_path, network, data, says):
    with pytest.raises(ValueError, match=says):
        Trainer(tmp_path, CONFIG, network, DIFFUSION, data).run(**QUIET)


# Sampling


def test_labels_may_change_between_calls_of_a_hoisted_network(model):
    """Check that hoisted tensors that depend on the class are computed anew when the class changes."""
    checkpoint = load_checkpoint(model)
    first, second, none = (torch.tensor(labels) for labels in ([0, 1], [2, 0], [3, 3]))
    options = {"config": checkpoint.diffusion, "guidance_scale": 3.0, "uncond_kwargs": {"class_labels": none}}
    plain, hoisted = (
        Sampler(checkpoint.model, (2, 1, 8, 8), model_kwargs={"class_labels": first}, optimize=optimize, **options)
        for optimize in (None, "hoist")
    )
    for labels in (first, second):
        conditioning = {"model_kwargs": {"class_labels": labels}, "uncond_kwargs": {"class_labels": none}}
        expected = plain(seeds=0, **conditioning, **QUIET)
        torch.testing.assert_close(hoisted(seeds=0, **conditioning, **QUIET), expected, rtol=1e-5, atol=1e-5)
    assert hoisted.loop.network.hoisted is not None


def command(model, out, *arguments):
    return cli.main(["sample", "--quiet", "--device", "cpu", "--model", str(model), "--out", str(out), *arguments])


def test_the_command_draws_classes_in_turn_in_any_batches(model, tmp_path):
    checkpoint = load_checkpoint(model)
    options = ["--seeds", "0-6", "--label", "0-2", "--guidance", "2"]
    assert command(model, tmp_path / "a.npz", *options) == 0
    assert command(model, tmp_path / "b.npz", *options, "--batch", "3") == 0
    a, b = (np.load(tmp_path / name)["arr_0"] for name in ("a.npz", "b.npz"))
    assert abs(a.astype(int) - b).max() <= 1
    labels, none = torch.arange(7) % 3, torch.full((7,), 3)
    x = sample(
        checkpoint.model, (7, 1, 8, 8), seeds=0, config=checkpoint.diffusion, guidance_scale=2.0,
        model_kwargs={"class_labels": labels}, uncond_kwargs={"class_labels": none}, **QUIET,
    )  # fmt: skip
    assert abs(to_uint8(x).numpy().astype(int) - a).max() <= 1
    about = images.read_metadata(tmp_path / "a.npz")
    assert (about["label"], about["guidance"]) == ("0-2", 2.0)


def test_the_likelihood_command_passes_the_labels(model, tmp_path):
    checkpoint = load_checkpoint(model)
    assert command(model, tmp_path / "pictures", "--seeds", "0-2", "--label", "1") == 0
    arguments = ["--model", str(model), "--device", "cpu", "--quiet", "--label", "0-2"]
    assert cli.main(["likelihood", str(tmp_path / "pictures"), *arguments, "--out", str(tmp_path / "bits.json")]) == 0
    rows = json.loads((tmp_path / "bits.json").read_text())["pictures"]
    pixels, _ = images.read([tmp_path / "pictures"], checkpoint.shape)
    x_0 = torch.from_numpy(pixels).permute(0, 3, 1, 2) / 127.5 - 1
    options = {"config": checkpoint.diffusion, "seeds": range(3), **QUIET}
    bound = bits_per_dimension(checkpoint.model, x_0, model_kwargs={"class_labels": torch.arange(3)}, **options)
    np.testing.assert_allclose([row["total"] for row in rows], bound.total, rtol=1e-6)
    other = bits_per_dimension(checkpoint.model, x_0, model_kwargs={"class_labels": torch.full((3,), 3)}, **options)
    assert not np.allclose(other.total, bound.total, rtol=1e-4)


def test_the_samples_of_a_save_are_of_all_classes(tmp_path):
    run = Trainer(tmp_path, CONFIG, THREE_CLASSES, DIFFUSION, shades, samples=5)
    for parameter in run.ema.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    run.save()
    x = sample(
        run.ema, (5, 1, 8, 8), seeds=range(5), config=DIFFUSION, sampler="ddim", num_inference_steps=20,
        model_kwargs={"class_labels": torch.arange(5) % 3}, **QUIET,
    )  # fmt: skip
    with Image.open(tmp_path / "samples.png") as picture:
        assert np.array_equal(np.asarray(picture), images.grid(to_uint8(x).numpy())[..., 0])


def test_without_a_label_it_draws_of_all_classes(model, tmp_path):
    checkpoint = load_checkpoint(model)
    x = sample(checkpoint.model, (2, 1, 8, 8), seeds=0, config=checkpoint.diffusion, **QUIET)
    for options in ([], ["--label", "none"]):
        assert command(model, tmp_path / "a.npz", "--seeds", "0-1", *options) == 0
        assert abs(np.load(tmp_path / "a.npz")["arr_0"].astype(int) - to_uint8(x).numpy()).max() <= 1


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--label", "3"], "--label must be an integer in [0, 2], got 3"),
        (["--label", "moon"], "--label is a class, several such as 0-9 or 1,4,7, or none, got 'moon'"),
        (["--guidance", "2"], "--guidance leads to a class: say which with --label"),
        (["--guidance", "2", "--label", "none"], "--guidance leads to a class"),
        (["--guidance", "nan", "--label", "1"], "guidance_scale must be one finite number"),
        (["--model", "moons", "--label", "1"], "the model knows no classes, got --label 1"),
        (["--model", "moons", "--guidance", "2"], "the model knows no classes, got --guidance 2"),
    ],
)
def test_what_the_command_refuses(model, tmp_path, capsys, options, says):
    assert command(model, tmp_path / "a.png", "--seeds", "0", "--steps", "2", *options) == 2
    assert says in capsys.readouterr().err
    assert not (tmp_path / "a.png").exists()


def test_the_command_trains_on_class_folders(folders, tmp_path, capsys):
    run = tmp_path / "run"
    options = ["--steps", "2", "--batch", "4", "--samples", "3", "--widths", "8,16", "--label-dropout", "0.2"]
    assert cli.main(["train", "--data", str(folders), "--out", str(run), "--quiet", *options]) == 0
    checkpoint = load_checkpoint(run)
    assert checkpoint.classes == Classes("class_labels", 3, none=3)
    assert checkpoint.model.config.widths == (8, 16)
    assert (checkpoint.about["training"]["label_dropout"], checkpoint.about["data"]["classes"][2]) == (0.2, "white")
    assert command(run, tmp_path / "a.png", "--seeds", "0", "--steps", "2", "--label", "2", "--guidance", "1.5") == 0
    assert cli.main(["train", "--data", str(folders), "--out", str(run), "--quiet", *options[:-1], "0.5"]) == 2
    assert "training.label_dropout is 0.2 there and 0.5 here" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["train", "--out", str(run), "--widths", "8,x"])
    assert "--widths" in capsys.readouterr().err
