"""Tests that pictures and arrays keep their content, or are refused by name, in every command that reads them."""

import logging
import os
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, TiffImagePlugin

from ddpm_fast import cli, images
from ddpm_fast.data.pictures import Pictures
from ddpm_fast.models.checkpoint import load_checkpoint
from ddpm_fast.models.unet import UNetConfig
from ddpm_fast.training import Trainer, TrainingConfig

RAMP = np.arange(64).reshape(8, 8)
GREY = (RAMP * 4).astype(np.uint8)
COLOUR = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)


def trained_on(path):
    """Return the first image of a data set as bytes [H, W, C]."""
    return ((Pictures.read(path)(1, 0, 0)[0] + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()


def both(path, expected):
    """Check that training and the other commands read the same, right bytes [H, W, C]."""
    np.testing.assert_array_equal(trained_on(path.parent), expected)
    height, width, channels = expected.shape
    np.testing.assert_array_equal(images.read([path], (channels, height, width))[0], expected[None])


def refused(path, says, shape=(1, 8, 8)):
    for read in (lambda: Pictures.read(path.parent), lambda: images.read([path], shape)):
        with pytest.raises(ValueError, match=says) as caught:
            read()
        assert path.name in str(caught.value)


@pytest.mark.parametrize(
    ("pixels", "name", "expected"),
    [
        ((RAMP * 1000).astype(np.uint16), "a.png", np.rint(RAMP * 1000 / 257)),
        ((RAMP * 1000).astype(np.uint16), "a.tif", np.rint(RAMP * 1000 / 257)),
        ((RAMP / 63).astype(np.float32), "a.tif", np.rint(RAMP / 63 * 255)),
    ],
    ids=["16-bit PNG", "16-bit TIFF", "float TIFF"],
)
def test_deep_pictures_are_scaled(tmp_path, pixels, name, expected):
    Image.fromarray(pixels).save(tmp_path / name)
    both(tmp_path / name, expected.astype(np.uint8)[..., None])


def test_twelve_bits_in_sixteen_are_logged(tmp_path, caplog):
    Image.fromarray((RAMP * 65).astype(np.uint16)).save(tmp_path / "a.png")
    both(tmp_path / "a.png", np.rint(RAMP * 65 / 257).astype(np.uint8)[..., None])
    assert "a.png, are nearly black, with less than 1/16 of the range" in caplog.text


def test_tiff_says_that_zero_is_white(tmp_path):
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    tags[262] = 0
    pixels = (RAMP * 1000).astype(np.uint16)
    Image.fromarray(pixels).save(tmp_path / "a.tif", tiffinfo=tags)
    both(tmp_path / "a.tif", 255 - np.rint(pixels / 257).astype(np.uint8)[..., None])


@pytest.mark.parametrize(
    ("pixels", "says"),
    [
        ((RAMP * 1000).astype(np.int32), "holds 32-bit integers, whose range is unknown"),
        ((RAMP * 4).astype(np.float32), "holds floats from 0 to 252, not on"),
        (np.full((8, 8), np.nan, np.float32), "holds floats from nan to nan"),
    ],
    ids=["int32", "float 0…252", "nan"],
)
def test_a_range_that_is_unknown_is_refused(tmp_path, pixels, says):
    Image.fromarray(pixels).save(tmp_path / "a.tif")
    refused(tmp_path / "a.tif", says)


TURNED = {
    2: lambda x: x[:, ::-1], 3: lambda x: x[::-1, ::-1], 4: lambda x: x[::-1], 5: lambda x: x.swapaxes(0, 1),
    6: lambda x: np.rot90(x, -1), 7: lambda x: x[::-1, ::-1].swapaxes(0, 1), 8: lambda x: np.rot90(x),
}  # fmt: skip


@pytest.mark.parametrize("orientation", TURNED)
@pytest.mark.parametrize("kind", ["colour png", "16-bit png", "colour tif"])
def test_pictures_stand_upright(tmp_path, orientation, kind):
    exif = Image.Exif()
    exif[274] = orientation
    pixels = (RAMP[:6] * 257).astype(np.uint16) if kind.startswith("16") else COLOUR[:6]
    path = tmp_path / f"a.{kind[-3:]}"
    Image.fromarray(pixels).save(path, exif=exif)
    shown = TURNED[orientation](RAMP[:6].astype(np.uint8)[..., None] if kind.startswith("16") else pixels)
    both(path, shown)


def test_a_palette_keeps_its_transparency(tmp_path):
    picture = Image.fromarray((RAMP % 3).astype(np.uint8), mode=None).convert("P")
    picture.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    picture.putdata((RAMP % 3).ravel().tolist())
    picture.save(tmp_path / "a.png", transparency=1)
    colours = np.array([[255, 0, 0, 255], [0, 255, 0, 0], [0, 0, 255, 255]], np.uint8)
    both(tmp_path / "a.png", colours[RAMP % 3])
    with pytest.raises(ValueError, match=r"a\.png is transparent, 3 channels are wanted"):
        images.read([tmp_path / "a.png"], (3, 8, 8))
    picture.putdata((RAMP % 2 * 2).ravel().tolist())  # no pixel has the transparent colour
    picture.save(tmp_path / "a.png", transparency=1)
    both(tmp_path / "a.png", colours[RAMP % 2 * 2][..., :3])


def test_opaque_pictures_lose_nothing_with_their_alpha(tmp_path):
    alpha = np.full((8, 8, 1), 255, np.uint8)
    Image.fromarray(np.concatenate([COLOUR, alpha], 2)).save(tmp_path / "a.png")
    np.testing.assert_array_equal(images.read([tmp_path / "a.png"], (3, 8, 8))[0][0], COLOUR)


def test_cmyk(tmp_path):
    inks = np.zeros((8, 8, 4), np.uint8)
    inks[:4, :, 0] = 255  # cyan
    Image.fromarray(inks, "CMYK").save(tmp_path / "a.tif")
    expected = np.full((8, 8, 3), 255, np.uint8)
    expected[:4, :, 0] = 0
    both(tmp_path / "a.tif", expected)


def test_colour_wins_over_grey(tmp_path, caplog):
    Image.fromarray(GREY).save(tmp_path / "a.png")
    Image.fromarray(COLOUR).save(tmp_path / "b.png")
    pixels, _ = images.read([tmp_path])
    np.testing.assert_array_equal(pixels, [np.repeat(GREY[..., None], 3, 2), COLOUR])
    assert "1 grey, 1 colour" in caplog.text
    assert Pictures.read(tmp_path).shape == (3, 8, 8)


def test_lost_colours_are_logged(tmp_path, caplog):
    Image.fromarray(np.repeat(GREY[..., None], 3, 2)).save(tmp_path / "a.png")
    np.testing.assert_array_equal(images.read([tmp_path], (1, 8, 8))[0][0], GREY[..., None])
    assert not caplog.records  # grey in three equal channels
    Image.fromarray(COLOUR).save(tmp_path / "b.png")
    images.read([tmp_path], (1, 8, 8))
    assert "in colour and the model is grey: their colours are lost" in caplog.text
    assert "1 pictures, such as" in caplog.text
    assert "b.png" in caplog.text


def test_the_size_is_checked_while_reading(tmp_path):
    """Check that a folder of other sizes is refused at the second picture, not when all are in memory."""
    Image.fromarray(GREY).save(tmp_path / "a.png")
    Image.fromarray(GREY[:6]).save(tmp_path / "b.png")
    (tmp_path / "c.png").write_bytes(b"never read")
    refused(tmp_path / "b.png", r"is 6 x 8 x 1, .* 8 x 8 x 1")


def test_hidden_files_are_no_data(tmp_path):
    for folder in (tmp_path / "cats", tmp_path / "dogs", tmp_path / "__MACOSX", tmp_path / ".trash"):
        folder.mkdir()
        Image.fromarray(COLOUR).save(folder / "a.png")
        (folder / "._a.png").write_bytes(b"\x00\x05\x16\x07")
    (tmp_path / "._cats.png").write_bytes(b"\x00\x05\x16\x07")
    data = Pictures.read(tmp_path)
    assert (len(data), data.classes) == (2, ["cats", "dogs"])


def test_stray_pictures(tmp_path, caplog):
    (tmp_path / "cats").mkdir()
    for name in ("cats/a.png", "cats/b.png", "preview.png"):
        Image.fromarray(COLOUR).save(tmp_path / name)
    with pytest.raises(ValueError, match=r"\(1, such as preview.png\) beside folders of pictures \(2 in 1\)"):
        Pictures.read(tmp_path)
    assert len(images.read([tmp_path], (3, 8, 8))[0]) == 1
    assert "2 pictures in subfolders" in caplog.text


def test_frames_that_are_not_read_are_logged(tmp_path, caplog):
    frames = [Image.fromarray(GREY), Image.fromarray(255 - GREY)]
    frames[0].save(tmp_path / "a.tif", save_all=True, append_images=frames[1:])
    np.testing.assert_array_equal(trained_on(tmp_path), GREY[..., None])
    assert "a.tif, are moving: the first frame of each is read" in caplog.text


@pytest.fixture
def bomb(tmp_path):
    """Return a PNG of 60,000 x 60,000 pixels by its header."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 1, 0, 0, 0, 0)
    path = tmp_path / "bomb.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b""))
    return path


def test_a_decompression_bomb_is_refused(bomb, tmp_path, capsys):
    train = ["train", "--data", str(tmp_path), "--steps", "1", "--out", str(tmp_path / "run")]
    fuse = ["interpolate", str(bomb), str(bomb), "--level", "3", "--out", str(tmp_path / "o.png")]
    for command in (train, ["likelihood", str(bomb)], fuse):
        assert cli.main(command) == 2
        said = capsys.readouterr().err
        assert "bomb.png is too large for a picture" in said
        assert said.count("\n") == 1


def test_a_pipe_is_no_picture(tmp_path):
    for name in ("a.png", "a.npz"):
        os.mkfifo(tmp_path / name)
        with pytest.raises(ValueError, match=f"{name} is not there, or is no file"):
            images.read([tmp_path / name], (1, 8, 8))


def test_training_takes_the_middle_of_pictures_that_are_not_square(tmp_path, caplog):
    folder = tmp_path / "data"
    folder.mkdir()
    wide = np.random.default_rng(0).integers(0, 256, (8, 14, 3), np.uint8)
    Image.fromarray(wide).save(folder / "a.png")
    Image.fromarray(wide.swapaxes(0, 1)).save(folder / "b.png")
    np.save(tmp_path / "a.npy", wide[None])
    np.save(tmp_path / "f.npy", wide[None].transpose(0, 3, 1, 2) / np.float32(127.5) - 1)
    middle = torch.from_numpy(wide[:, 3:11]).permute(2, 0, 1).float() / 127.5 - 1
    for name in ("a.npy", "f.npy"):
        torch.testing.assert_close(Pictures.read(tmp_path / name, square=True)(1, 0, 0)[0], middle)
    drawn = Pictures.read(folder, square=True)(2, 0, 0)
    assert {bool(torch.equal(x, middle)) for x in drawn} == {True, False}
    assert any(torch.equal(x, middle.transpose(1, 2)) for x in drawn)
    assert "are not square: the middle of each is taken" in caplog.text
    run = tmp_path / "run"
    command = ["train", "--data", str(folder), "--out", str(run), "--steps", "1", "--batch", "2", "--quiet"]
    assert cli.main(command) == 0
    assert load_checkpoint(run).shape == (3, 8, 8)


PIXELS = np.zeros((2, 8, 8, 1), np.uint8)


@pytest.mark.parametrize(
    ("arrays", "says"),
    [
        ({}, r"must hold the images as arr_0, its arrays are \[\]"),
        ({"images": PIXELS}, r"must hold the images as arr_0, its arrays are \['images'\]"),
        ({"arr_0": PIXELS.astype(np.int64)}, "must hold uint8"),
        ({"arr_0": PIXELS > 0}, "must hold uint8"),
        ({"arr_0": np.zeros((2, 3, 8, 8), np.uint8)}, "move the channels to the end"),
        ({"arr_0": np.zeros((2, 8, 8, 3), np.float32)}, "move the channels to axis 1"),
        ({"arr_0": PIXELS, "labels": np.array([0, 2**64 - 1], np.uint64)}, "got 0 … 18446744073709551615"),
        ({"arr_0": PIXELS, "labels": np.array([0, 2**27])}, "up to 65535, got 0 … 134217728"),
        ({"arr_0": PIXELS, "labels": np.array([-1, 2], np.int8)}, "got -1 … 2"),
        ({"arr_0": PIXELS, "labels": np.array([True, False])}, "got bool"),
        ({"arr_0": PIXELS, "arr_1": np.eye(2, dtype=np.int64)}, r"got int64 \(2, 2\)"),
    ],
)
def test_arrays_are_refused_by_name(tmp_path, arrays, says):
    path = tmp_path / "a.npz"
    np.savez(path, **arrays)
    for read in (lambda: Pictures.read(path), lambda: images.read([path], (1, 8, 8))):
        with pytest.raises(ValueError, match=rf"a\.npz.*{says}"):
            read()


def test_the_content_and_the_suffix_of_an_array_agree(tmp_path):
    np.savez(tmp_path / "a.npz", arr_0=PIXELS)
    (tmp_path / "b.npy").write_bytes((tmp_path / "a.npz").read_bytes())
    np.save(tmp_path / "c.npy", PIXELS)
    (tmp_path / "d.npz").write_bytes((tmp_path / "c.npy").read_bytes())
    for name, suffix in (("b.npy", ".npz"), ("d.npz", ".npy")):
        with pytest.raises(ValueError, match=rf"{name} is an {suffix} by its content"):
            Pictures.read(tmp_path / name)
    assert images.read([tmp_path / "c.npy"], (1, 8, 8))[1] == ["c.npy[0]", "c.npy[1]"]


def test_an_array_that_seems_to_lie_on_0_1_is_logged(tmp_path, caplog):
    np.save(tmp_path / "a.npy", np.linspace(0, 1, 128).reshape(2, 1, 8, 8))
    Pictures.read(tmp_path / "a.npy")
    assert "a.npy lies on [0, 1]: black is -1 here" in caplog.text


@pytest.mark.parametrize(
    ("labels", "classes", "says"),
    [
        (torch.tensor([0, 1], dtype=torch.uint8), "ab", "labels must be int64"),
        (torch.tensor([0]), "ab", "labels must be int64"),
        (torch.tensor([0, -1]), "ab", r"labels must lie in 0 … 1, got -1 … 0"),
        (torch.tensor([0, 2]), "ab", r"labels must lie in 0 … 1, got 0 … 2"),
        (torch.tensor([0, 1]), None, "labels and classes go together"),
    ],
)
def test_labels_of_a_data_set_fit(labels, classes, says):
    with pytest.raises(ValueError, match=says):
        Pictures(torch.zeros(2, 1, 8, 8), "a", labels=labels, classes=classes)


def test_no_class_does_not_wrap_to_a_class(tmp_path):
    """Check that with 256 classes and uint8 labels the label 256, "no class", is 256 and not 0."""
    network = UNetConfig.for_images(1, 4, (8,), embedding=8, num_classes=256)
    options = TrainingConfig(steps=1, batch_size=2, label_dropout=1.0, mixed_precision="no")

    def data(count, seed, step):
        return torch.zeros(count, 1, 4, 4), torch.full((count,), 255, dtype=torch.uint8)

    trainer = Trainer(tmp_path, options, network, data=data)
    seen = []
    trainer.model.embed_class.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].tolist()))
    trainer.run(progress=False)
    assert seen == [[256, 256]]
    trainer.data = lambda count, seed, step: (torch.zeros(count, 1, 4, 4), torch.full((count,), 0.5))
    trainer.step = 0
    with pytest.raises(ValueError, match=r"labels must be integers \[2\], got torch.float32"):
        trainer.run(progress=False)


@pytest.fixture(autouse=True)
def _warnings_are_seen(caplog):
    caplog.set_level(logging.WARNING, logger="ddpm_fast")
