"""Tests of pictures as training data: files, order, and error messages that name the file."""

import numpy as np
import pytest
import torch
from PIL import Image

from ddpm_fast import cli
from ddpm_fast.data.pictures import Pictures
from ddpm_fast.models.checkpoint import load_checkpoint

PIXELS = np.random.default_rng(0).integers(0, 256, (7, 8, 8, 3), np.uint8)


@pytest.fixture
def folder(tmp_path):
    """Return a folder of seven pictures and one other file."""
    made = tmp_path / "pictures"
    made.mkdir()
    for number, pixels in enumerate(PIXELS):
        Image.fromarray(pixels).save(made / f"{number}.png")
    (made / "notes.txt").write_text("no picture")
    return made


def seen(data, count, steps, seed=0):
    return torch.cat([data(count, seed, step) for step in range(steps)])


def scaled(pixels):
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1


def test_every_picture_once_an_epoch_in_another_order(folder):
    data = Pictures.read(folder)
    assert (len(data), data.shape) == (7, (3, 8, 8))
    drawn = seen(data, 2, 7).reshape(2, 7, -1)  # two epochs
    expected = scaled(PIXELS).flatten(1)
    orders = []
    for epoch in drawn:
        rows = (epoch[:, None] == expected).all(2)
        assert rows.sum(1).tolist() == rows.sum(0).tolist() == [1] * 7
        orders.append(rows.int().argmax(1).tolist())
    assert orders[0] != orders[1]


def test_a_batch_depends_on_seed_and_step_alone(folder):
    data = Pictures.read(folder, flip=True)
    later = data(3, 5, 8)
    seen(data, 3, 4, seed=2)
    assert torch.equal(data(3, 5, 8), later)
    assert torch.equal(Pictures.read(folder, flip=True)(3, 5, 8), later)
    assert not torch.equal(data(3, 6, 8), later)


def test_half_are_mirrored(folder):
    plain, flipped = seen(Pictures.read(folder), 7, 60), seen(Pictures.read(folder, flip=True), 7, 60)
    same = (plain == flipped).flatten(1).all(1)
    mirrored = (plain.flip(3) == flipped).flatten(1).all(1)
    assert bool((same ^ mirrored).all())
    assert 0.4 < mirrored.double().mean() < 0.6


@pytest.mark.parametrize("kind", ["npz", "npy", "grey", "float"])
def test_arrays(tmp_path, kind):
    arrays = {"npz": PIXELS, "npy": PIXELS, "grey": PIXELS[..., 0], "float": scaled(PIXELS).numpy()}
    path = tmp_path / ("data.npz" if kind == "npz" else "data.npy")
    (np.savez if kind == "npz" else np.save)(path, arrays[kind])
    data = Pictures.read(path)
    assert data.shape == ((1 if kind == "grey" else 3), 8, 8)
    expected = scaled(PIXELS[..., :1] if kind == "grey" else PIXELS)
    drawn = seen(data, 7, 1).flatten(1).sum(1).sort().values
    torch.testing.assert_close(drawn, expected.flatten(1).sum(1).sort().values)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: Image.new("RGB", (8, 9)).save(folder / "5.png"), r"5\.png is 9 x 8 x 3, .* 8 x 8 x 3"),
        (lambda folder: (folder / "3.png").write_bytes(b"broken"), r"3\.png cannot be read as a picture"),
        (lambda folder: [file.unlink() for file in folder.iterdir()], "holds no picture"),
        (lambda folder: (folder / "0.png").write_bytes(b"broken"), r"0\.png cannot be read as a picture"),
    ],
    ids=["size", "broken", "empty", "first broken"],
)
def test_bad_folders_are_named(folder, spoil, message):
    spoil(folder)
    with pytest.raises(ValueError, match=message):
        Pictures.read(folder)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((3, 8, 8, 3)) + 2, "must lie on"),
        (np.zeros((3, 3, 8, 8)) + 255.0, r"must lie on \[-1, 1\], got values from 255 to 255"),
        (np.full((3, 3, 8, 8), np.nan), "must lie on"),
        (np.zeros((8, 8), np.uint8), "must hold uint8"),
        (np.zeros((0, 8, 8, 3), np.uint8), "holds no image"),
        (np.array([None]), "cannot be read"),
    ],
)
def test_bad_arrays_are_named(tmp_path, array, message):
    np.save(tmp_path / "data.npy", array)
    with pytest.raises(ValueError, match=rf"data\.npy.*{message}"):
        Pictures.read(tmp_path / "data.npy")
    with pytest.raises(ValueError, match="is not there"):
        Pictures.read(tmp_path / "none.npy")
    with pytest.raises(ValueError, match="is not there"):
        Pictures.read(tmp_path / "none")


def command(folder, *arguments):
    return cli.main(
        ["train", "--steps", "2", "--batch", "2", "--save-every", "1", "--quiet", "--out", str(folder), *arguments]
    )


def test_the_command_trains_on_pictures(folder, tmp_path, capsys):
    run = tmp_path / "run"
    options = ["--data", str(folder), "--flip", "--loss", "hybrid", "--predict", "v_prediction"]
    assert command(run, *options, "--schedule", "squaredcos_cap_v2") == 0
    checkpoint = load_checkpoint(run)
    assert checkpoint.shape == (3, 8, 8)
    assert checkpoint.model.config.learned_variance
    assert checkpoint.diffusion.prediction_type == "v_prediction"
    assert checkpoint.diffusion.variance_type == "learned_range"
    assert checkpoint.about["data"]["count"] == 7
    assert (
        cli.main(
            ["sample", "--model", str(run), "--steps", "2", "--seeds", "0", "--out", str(tmp_path / "a.png"), "--quiet"]
        )
        == 0
    )
    capsys.readouterr()
    Image.fromarray(255 - PIXELS[0]).save(folder / "0.png")  # other data under the same name
    assert command(run, *options, "--schedule", "squaredcos_cap_v2") == 2
    assert "data.checksum is" in capsys.readouterr().err


def test_what_the_command_refuses(folder, tmp_path, capsys):
    for options, message in (
        (["--flip"], "--flip is for pictures"),
        (["--data", str(tmp_path / "none")], "is not there"),
        (["--loss", "vlb", "--min-snr", "5"], "min_snr_gamma weighs the squared error"),
    ):
        assert command(tmp_path / "run", *options) == 2
        assert message in capsys.readouterr().err
