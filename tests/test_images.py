"""Tests of samples on disk, read back by other readers: Pillow and NumPy."""

import json
import os

import numpy as np
import pytest
from PIL import Image

from ddpm_fast import images

COLUMNS = {1: 1, 3: 2, 4: 2, 5: 3, 16: 4, 17: 5}
ABOUT = {"version": "1.2.3", "config": {"eta": 0.5}, "model": "a “b” ü"}


def pictures(count, height=6, width=6, channels=1):
    shape = (count, height, width, channels)
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


@pytest.mark.parametrize("channels", [1, 3, 4], ids="{}ch".format)
@pytest.mark.parametrize("count", COLUMNS)
@pytest.mark.parametrize("size", [(6, 6), (5, 9), (33, 20)], ids="{0[0]}x{0[1]}".format)
def test_grid_puts_every_tile_in_its_place(count, size, channels):
    (height, width), columns = size, COLUMNS[count]
    x = pictures(count, height, width, channels)
    rows = -(-count // columns)
    small = (rows * (height + 1) - 1, columns * (width + 1) - 1)
    factor = images.GRID_SIDE // max(small)
    sheet = images.grid(x)
    assert sheet.dtype == np.uint8
    assert sheet.shape == (small[0] * factor, small[1] * factor, channels)
    rest = np.ones(sheet.shape[:2], dtype=bool)
    for i in range(count):
        top, left = i // columns * (height + 1) * factor, i % columns * (width + 1) * factor
        place = np.s_[top : top + height * factor, left : left + width * factor]
        np.testing.assert_array_equal(sheet[place], np.kron(x[i], np.ones((factor, factor, 1), dtype=np.uint8)))
        rest[place] = False
    assert (sheet[rest] == images.GAP_SHADE).all()


def test_grid_columns():
    assert images.grid(pictures(6, 300, 300), columns=6).shape == (300, 6 * 301 - 1, 1)
    assert images.grid(pictures(6, 300, 300), columns=1).shape == (6 * 301 - 1, 300, 1)


@pytest.mark.parametrize(("side", "factor"), [(8, 64), (256, 2), (257, 1), (512, 1), (700, 1)])
def test_grid_enlarges_by_whole_factors(side, factor):
    assert images.grid(pictures(1, side, side)).shape == (side * factor, side * factor, 1)


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB"), (4, "RGBA")])
def test_png_grid_round_trip(tmp_path, channels, mode):
    x = pictures(3, channels=channels)
    path = tmp_path / "a.PNG"
    images.save(path, x, [5, 2**64 - 1, 7], ABOUT)
    with Image.open(path) as picture:
        assert (picture.format, picture.mode) == ("PNG", mode)
        np.testing.assert_array_equal(np.asarray(picture).reshape(images.grid(x).shape), images.grid(x))
        assert json.loads(picture.text["ddpm_fast"]) == {**ABOUT, "seeds": [5, 2**64 - 1, 7]}
    assert images.read_metadata(path) == {**ABOUT, "seeds": [5, 2**64 - 1, 7]}


@pytest.mark.parametrize("channels", [1, 2, 3, 5])
def test_npz_round_trip(tmp_path, channels):
    x = pictures(7, 4, 9, channels)
    images.save(tmp_path / "a.npz", x, range(7), ABOUT)
    with np.load(tmp_path / "a.npz") as arrays:  # without allow_pickle
        assert arrays.files[0] == "arr_0"
        assert arrays["arr_0"].dtype == np.uint8
        np.testing.assert_array_equal(arrays["arr_0"], x)
    assert images.read_metadata(tmp_path / "a.npz") == {**ABOUT, "seeds": list(range(7))}


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB"), (4, "RGBA")])
def test_folder_of_pictures(tmp_path, channels, mode):
    x, seeds = pictures(3, channels=channels), [7, 123456, 2**64 - 1]
    images.save(tmp_path / "b" / "out", x, seeds, ABOUT)
    names = ["000007.png", "123456.png", "18446744073709551615.png"]
    assert sorted(os.listdir(tmp_path / "b" / "out")) == sorted(names)
    for name, image, seed in zip(names, x, seeds, strict=True):
        with Image.open(tmp_path / "b" / "out" / name) as picture:
            assert picture.mode == mode
            np.testing.assert_array_equal(np.asarray(picture).reshape(image.shape), image)
        assert images.read_metadata(tmp_path / "b" / "out" / name) == {**ABOUT, "seeds": [seed]}


def test_a_folder_keeps_its_other_pictures(tmp_path):
    out = tmp_path / "out"
    images.save(out, pictures(1), [1], ABOUT)
    old = (out / "000001.png").read_bytes()
    images.save(out, pictures(2), [2, 3], ABOUT)
    assert sorted(os.listdir(out)) == ["000001.png", "000002.png", "000003.png"]
    assert (out / "000001.png").read_bytes() == old


@pytest.mark.parametrize("name", ["a.png", "a.npz"])
def test_an_interrupted_save_leaves_the_old_file(tmp_path, monkeypatch, name):
    path = tmp_path / name
    images.save(path, pictures(2), [1, 2], ABOUT)
    old = path.read_bytes()

    def write_half(file, *_, **__):
        if hasattr(file, "write"):
            file.write(b"half")
        else:
            file.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(np, "savez", write_half)
    monkeypatch.setattr(Image.Image, "save", lambda self, file, **_: write_half(file))
    with pytest.raises(KeyboardInterrupt):
        images.save(path, pictures(3), [3, 4, 5], ABOUT)
    assert path.read_bytes() == old
    assert os.listdir(tmp_path) == [name]


@pytest.mark.parametrize(
    ("path", "kind"),
    [("a.png", "grid"), ("b/a.PNG", "grid"), ("a.npz", "npz"), ("a", "folder"), ("a.b/c", "folder"), ("a/", "folder")],
)
def test_output_kind(path, kind):
    assert images.output_kind(path) == kind


@pytest.mark.parametrize("path", ["a.jpg", "a.png.gz", "a.npy", "run.1"])
def test_output_kind_errors(path):
    with pytest.raises(ValueError, match=rf"a \.png grid, an \.npz or a folder \(no suffix\), got '{path}'"):
        images.output_kind(path)


@pytest.mark.parametrize(("name", "kind"), [("a.png", "grid"), ("a.npz", "npz"), ("a", "folder")])
def test_check_output(tmp_path, name, kind):
    assert images.check_output(tmp_path / name, (3, 8, 8), [0, 1]) == kind
    assert not (tmp_path / name).is_file()


@pytest.mark.parametrize(
    ("name", "channels", "error", "says"),
    [
        pytest.param("a.jpg", 3, ValueError, "got '.*a.jpg'", id="suffix"),
        pytest.param("a.png", 2, ValueError, r"has \[1, 3, 4\] channels, the samples have 2: write an .npz", id="2ch"),
        pytest.param("a", 5, ValueError, "the samples have 5", id="folder-5ch"),
        pytest.param("b/a.npz", 3, FileNotFoundError, "b does not exist", id="no-folder"),
        pytest.param("d.png", 3, IsADirectoryError, "d.png is a folder", id="is-a-folder"),
        pytest.param("file", 3, NotADirectoryError, "file is a file, not a folder", id="is-a-file"),
        pytest.param("file/a", 3, OSError, "file", id="below-a-file"),
    ],
)
def test_check_output_errors(tmp_path, name, channels, error, says):
    (tmp_path / "d.png").mkdir()
    (tmp_path / "file").write_text("old")
    with pytest.raises(error, match=says):
        images.check_output(tmp_path / name, (channels, 8, 8), [0, 1])
    assert sorted(os.listdir(tmp_path)) == ["d.png", "file"]


def test_what_a_folder_or_a_grid_cannot_hold(tmp_path):
    with pytest.raises(ValueError, match="a seed is given twice"):
        images.check_output(tmp_path / "a", (3, 8, 8), [1, 2, 1])
    with pytest.raises(ValueError, match="a grid of 50000 samples is too large"):
        images.check_output(tmp_path / "a.png", (3, 64, 64), range(50_000))
    assert images.check_output(tmp_path / "a.npz", (3, 64, 64), range(50_000)) == "npz"


def test_seeds_and_images_must_match(tmp_path):
    with pytest.raises(ValueError):
        images.save(tmp_path / "a", pictures(3), [1, 2], ABOUT)
