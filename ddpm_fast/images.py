"""Samples on disk: a PNG grid, a folder of PNGs, or an .npz, each with metadata about how it was made."""

import contextlib
import json
import math
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from einops import rearrange
from numpy.typing import NDArray
from PIL import Image, PngImagePlugin

from ddpm_fast.files import StrPath, check_writable, whole_file

Bytes = NDArray[np.uint8]

METADATA = "ddpm_fast"  # name of the PNG text chunk and of the npz array that hold the metadata as JSON
GAP = 1  # pixels between the pictures of a grid, before it is enlarged
GAP_SHADE = 96
GRID_SIDE = 512  # small grids are enlarged by a whole factor, up to about this many pixels
LARGEST_GRID = 80_000_000  # pixels; from 89 million on, Pillow takes a picture for a decompression bomb
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
MODES = {1: "L", 3: "RGB", 4: "RGBA"}


def output_kind(path: StrPath) -> str:
    """Return the form of output that the suffix asks for: "grid" (.png), "npz" (.npz) or "folder" (no suffix)."""
    suffix = Path(path).suffix.lower()
    kinds = {".png": "grid", ".npz": "npz", "": "folder"}
    if suffix not in kinds or not str(path) or Path(path).name.startswith("."):
        raise ValueError(f"the output must be a .png grid, an .npz or a folder (no suffix), got {str(path)!r}")
    return kinds[suffix]


def check_output(path: StrPath, shape: tuple[int, ...], seeds: Sequence[int]) -> str:
    """Return the kind of output; raise now the errors that would otherwise come after hours of sampling.

    Args:
        path: Output path, as for `output_kind`.
        shape: Shape of one sample, (C, H, W).
        seeds: Seeds of the samples, one each.
    """
    kind = output_kind(path)
    channels, height, width = shape
    if kind != "npz" and channels not in MODES:
        raise ValueError(f"an image has {sorted(MODES)} channels, the samples have {channels}: write an .npz instead")
    if kind == "folder" and len(set(seeds)) < len(seeds):
        raise ValueError("a seed is given twice, and in a folder a seed is a file")
    if kind == "grid" and len(seeds) * (height + GAP) * (width + GAP) > LARGEST_GRID:
        raise ValueError(f"a grid of {len(seeds)} samples is too large for most viewers: write an .npz or a folder")
    check_writable(path, folder=kind == "folder")
    return kind


def save(path: StrPath, images: Bytes, seeds: Sequence[int], about: Mapping[str, object]) -> None:
    """Write uint8 images [N, H, W, C] to `path`, in the form that its suffix asks for.

    `about` and the seeds are stored as JSON, in the PNG text chunk or npz array "ddpm_fast".
    """
    kind = output_kind(path)
    if kind == "grid":
        save_png(path, grid(images), {**about, "seeds": list(seeds)})
    elif kind == "npz":
        with whole_file(path) as part, open(part, "wb") as file:
            np.savez(file, arr_0=images, ddpm_fast=np.array(json.dumps({**about, "seeds": list(seeds)})))
    else:
        Path(path).mkdir(parents=True, exist_ok=True)
        for image, seed in zip(images, seeds, strict=True):
            save_png(Path(path) / f"{seed:06d}.png", image, {**about, "seeds": [seed]})


def save_png(path: StrPath, image: Bytes, metadata: Mapping[str, object]) -> None:
    """Write one uint8 image [H, W, C] with its metadata."""
    info = PngImagePlugin.PngInfo()
    info.add_text(METADATA, json.dumps(metadata))
    picture = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
    with whole_file(path) as part:
        picture.save(part, format="PNG", pnginfo=info)


def read_metadata(path: StrPath) -> dict[str, Any]:
    """Read the metadata of the PNG or npz at `path`."""
    if Path(path).suffix.lower() == ".npz":
        with np.load(path) as arrays:
            text = str(arrays[METADATA])
    else:
        with Image.open(path) as picture:
            text = picture.text[METADATA]
    metadata: dict[str, Any] = json.loads(text)
    return metadata


def pictures_in(folder: Path) -> list[Path]:
    """Return the pictures of a folder, in alphabetical order. Subfolders are ignored."""
    return sorted(file for file in folder.iterdir() if file.suffix.lower() in SUFFIXES)


def read(paths: Sequence[StrPath], shape: tuple[int, ...]) -> tuple[Bytes, list[str]]:
    """Read pictures of `shape` (C, H, W) from files, folders and arr_0 of .npz.

    Returns:
        The pixels, uint8 [N, H, W, C], and a name for each picture.

    Raises:
        ValueError: A file is missing, unreadable or of another size (the message names it), or a folder has none.
    """
    pictures: list[Bytes] = []
    names: list[str] = []
    for path in map(Path, paths):
        files = _all_pictures_in(path) if path.is_dir() else [path]
        for file in files:
            pixels = _read_npz(file) if file.suffix.lower() == ".npz" else _read_picture(file, shape[0])[None]
            channels, height, width = shape
            if pixels.shape[1:] != (height, width, channels):
                got = " x ".join(map(str, pixels.shape[1:]))
                raise ValueError(f"{file} is {got}, the model takes {height} x {width} x {channels}")
            pictures.append(pixels)
            names += [file.name] if len(pixels) == 1 else [f"{file.name}[{number}]" for number in range(len(pixels))]
    return np.concatenate(pictures), names


def shape_of(path: StrPath) -> tuple[int, int, int]:
    """Return (C, H, W) of a picture, or of the first picture in a folder.

    C is 1 for a grey picture, 4 for a transparent one, and 3 otherwise.
    """
    file = Path(path)
    if file.is_dir():
        file = _all_pictures_in(file)[0]
    with _open_picture(file) as picture:
        channels = {"1": 1, "L": 1, "I;16": 1, "LA": 4, "RGBA": 4}.get(picture.mode, 3)
        return channels, picture.height, picture.width


def _all_pictures_in(folder: Path) -> list[Path]:
    """Return the pictures of a folder; raise ValueError if there are none."""
    pictures = pictures_in(folder)
    if not pictures:
        raise ValueError(f"{folder} holds no picture ({', '.join(SUFFIXES)})")
    return pictures


@contextlib.contextmanager
def _open_picture(path: Path) -> Iterator[Image.Image]:
    """Open a picture; raise ValueError if the file is missing or unreadable."""
    if not path.is_file():
        raise ValueError(f"{path} is not there")
    try:
        with Image.open(path) as picture:
            yield picture
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as a picture: {error}") from error


def _read_picture(path: Path, channels: int) -> Bytes:
    """Read a picture with `channels` channels: uint8 [H, W, C]."""
    if channels not in MODES:
        raise ValueError(f"a picture has {sorted(MODES)} channels, the model takes {channels}: give an .npz")
    with _open_picture(path) as picture:
        pixels = np.asarray(picture.convert(MODES[channels]))
    return pixels[..., None] if pixels.ndim == 2 else pixels


def _read_npz(path: Path) -> Bytes:
    """Read arr_0 of an .npz: uint8 [N, H, W, C]."""
    try:
        with np.load(path) as arrays:
            pixels: Bytes = arrays["arr_0"]
    except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if pixels.dtype != np.uint8 or pixels.ndim != 4 or not len(pixels):
        raise ValueError(f"{path} must hold uint8 [N, H, W, C] in arr_0, got {pixels.dtype} {pixels.shape}")
    return pixels


def grid(images: Bytes, columns: int | None = None) -> Bytes:
    """Lay images [N, H, W, C] out in rows with thin lines between, enlarging small ones: [H', W', C]."""
    count, height, width, channels = images.shape
    columns = columns or math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    tiles = np.full((rows * columns, height + GAP, width + GAP, channels), GAP_SHADE, dtype=np.uint8)
    tiles[:count, :height, :width] = images
    sheet = rearrange(tiles, "(r c) h w k -> (r h) (c w) k", r=rows)[:-GAP, :-GAP]
    factor = max(1, GRID_SIDE // max(sheet.shape[:2]))
    return sheet.repeat(factor, axis=0).repeat(factor, axis=1)
