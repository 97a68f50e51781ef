"""Images on disk: samples with metadata about how they were made, and the one reader of pictures and arrays."""

import json
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from einops import rearrange
from numpy.typing import NDArray
from PIL import Image, ImageOps, PngImagePlugin

from ddpm_fast.files import StrPath, check_writable, whole_file

logger = logging.getLogger("ddpm_fast")

Bytes = NDArray[np.uint8]

METADATA = "ddpm_fast"  # name of the PNG text chunk and of the npz array that hold the metadata as JSON
GAP = 1  # pixels between the pictures of a grid, before it is enlarged
GAP_SHADE = 96
GRID_SIDE = 512  # small grids are enlarged by a whole factor, up to about this many pixels
LARGEST_GRID = 80_000_000  # pixels; from 89 million on, Pillow takes a picture for a decompression bomb
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
MODES = {1: "L", 3: "RGB", 4: "RGBA"}
MOST_CLASSES = 2**16  # a label names a class, and every class up to the largest has its row of weights
BITS_PER_SAMPLE, PHOTOMETRIC, WHITE_IS_ZERO = 258, 262, 0  # tags of TIFF, and a value


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
    """Return the pictures of a folder, in alphabetical order. Subfolders and hidden files are ignored."""
    return sorted(file for file in folder.iterdir() if is_picture(file) and not file.is_dir())


def is_picture(file: Path) -> bool:
    """Return True for the suffix of a picture, unless the file is hidden, as macOS' companions "._name.png" are."""
    return file.suffix.lower() in SUFFIXES and not file.name.startswith(".")


def read(
    paths: Sequence[StrPath], shape: tuple[int, ...] | None = None, square: bool = False
) -> tuple[Bytes, list[str]]:
    """Read pictures of one size from files, folders, and arr_0 of .npz.

    Pictures stand upright (EXIF). 16 bits, and floats on [0, 1], become 8 bits. What a conversion loses is logged.

    Args:
        paths: Files and folders.
        shape: (C, H, W) of the pictures. None takes the size of the first, and channels that hold them all: 1 for grey,
            3 for colour, 4 with transparency.
        square: True cuts the largest square out of the middle of each picture.

    Returns:
        The pixels, uint8 [N, H, W, C], and a name for each picture.

    Raises:
        ValueError: A file is missing, unreadable, of unknown range, transparent where `shape` has no such channel, or
            of another size (the message names it), or a folder has none.
    """
    if shape is not None and shape[0] not in MODES and any(_array_suffix(path) is None for path in paths):
        raise ValueError(f"a picture has {sorted(MODES)} channels, the model takes {shape[0]}: give an .npz")
    files = [file for path in map(Path, paths) for file in (_all_pictures_in(path) if path.is_dir() else [path])]
    pictures: list[Bytes] = []
    losses: dict[str, list[Path]] = {}
    for file in files:
        pixels, lost = _read_file(file)
        if square and pixels.shape[1] != pixels.shape[2]:
            lost.append("not square: the middle of each is taken")
            pixels = centre_square(pixels)
        if shape is not None and shape[0] == 1 and (pixels[..., :3] != pixels[..., :1]).any():
            lost.append("in colour and the model is grey: their colours are lost")
        for loss in lost:
            losses.setdefault(loss, []).append(file)
        expected = (shape[1], shape[2], shape[0]) if shape is not None else (pictures or [pixels])[0].shape[1:]
        array = _array_suffix(file) is not None
        if pixels.shape[1:3] != expected[:2] or (array and pixels.shape[1:] != expected):
            got, wanted = (" x ".join(map(str, size)) for size in (pixels.shape[1:], expected))
            raise ValueError(f"{file} is {got}, {'the model takes' if shape else f'{files[0]} is'} {wanted}")
        pictures.append(pixels)
    channels = shape[0] if shape is not None else _common_channels([pixels.shape[3] for pixels in pictures])
    names: list[str] = []
    for number, (file, pixels) in enumerate(zip(files, pictures, strict=True)):
        if _array_suffix(file) is None:
            pictures[number] = _with_channels(file, pixels[0], channels)[None]
        names += [file.name] if len(pixels) == 1 else [f"{file.name}[{row}]" for row in range(len(pixels))]
    for loss, losers in losses.items():
        logger.warning("%d pictures, such as %s, are %s", len(losers), losers[0], loss)
    return np.concatenate(pictures), names


def centre_square(pixels: NDArray[Any]) -> NDArray[Any]:
    """Return the largest square in the middle of images [N, H, W, C]."""
    height, width = pixels.shape[1:3]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return pixels[:, top : top + side, left : left + side]


def read_arrays(path: Path) -> tuple[NDArray[Any], NDArray[Any] | None]:
    """Read images of an .npy or .npz, and labels, or None without labels.

    Returns:
        Images, uint8 [N, H, W, C] or float32 [N, C, H, W] on [-1, 1], and labels, int64 [N] on 0 … `MOST_CLASSES` - 1.

    Raises:
        ValueError: The file is missing or unreadable, or holds something else; the message names it.
    """
    if not path.is_file():
        raise ValueError(f"{path} is not there, or is no file")
    labels = None
    try:
        with open(path, "rb") as file:
            arrays = np.load(file, allow_pickle=False)
            zipped = isinstance(arrays, np.lib.npyio.NpzFile)
            names = list(arrays.files) if zipped else ["arr_0"]
            pixels = arrays if not zipped else arrays["arr_0"] if "arr_0" in names else None
            label_name = next((name for name in ("labels", "arr_1") if zipped and name in names), None)
            if label_name is not None:
                labels = arrays[label_name]
    except Exception as error:  # a file of another kind can fail in any way
        raise ValueError(f"{path} cannot be read: {error}") from error
    suffix = ".npz" if zipped else ".npy"
    if suffix != path.suffix.lower():
        raise ValueError(f"{path} is an {suffix} by its content: name it so")
    if pixels is None:
        raise ValueError(f"{path} must hold the images as arr_0, its arrays are {names}")
    pixels = _checked_pixels(path, pixels)
    return pixels, None if labels is None else _checked_labels(path, labels, len(pixels))


def _checked_pixels(path: Path, pixels: NDArray[Any]) -> NDArray[Any]:
    """Return the images of a file; raise ValueError unless shape, dtype and range fit."""
    wanted, got = "must hold uint8 [N, H, W, C] or float [N, C, H, W]", f"{pixels.dtype} {pixels.shape}"
    if not pixels.size:
        raise ValueError(f"{path} holds no image, got {got}")
    if pixels.dtype == np.uint8 and pixels.ndim in (3, 4):
        pixels = pixels[..., None] if pixels.ndim == 3 else pixels
        if pixels.shape[1] in MODES and pixels.shape[3] not in MODES:
            raise ValueError(f"{path} {wanted}, got {got}: move the channels to the end")
        return np.ascontiguousarray(pixels)
    if np.issubdtype(pixels.dtype, np.floating) and pixels.ndim == 4:
        low, high = float(pixels.min()), float(pixels.max())
        if not -1 - 1e-6 <= low <= high <= 1 + 1e-6:
            raise ValueError(f"{path} must lie on [-1, 1], got values from {low:g} to {high:g}")
        if pixels.shape[3] in MODES and pixels.shape[1] not in MODES:
            raise ValueError(f"{path} {wanted}, got {got}: move the channels to axis 1")
        if low >= 0 and high > low:
            logger.warning("%s lies on [%g, %g]: black is -1 here, so [0, 1] must be scaled before", path, low, high)
        return np.ascontiguousarray(pixels, np.float32)
    raise ValueError(f"{path} {wanted}, got {got}")


def _checked_labels(path: Path, labels: NDArray[Any], count: int) -> NDArray[Any]:
    """Return the labels of a file as int64 [count]; raise ValueError unless they are small integers from 0 on."""
    if labels.shape != (count,) or not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(f"{path}: labels must be integers [{count}] from 0 on, got {labels.dtype} {labels.shape}")
    low, high = int(labels.min()), int(labels.max())
    if not 0 <= low <= high < MOST_CLASSES:
        raise ValueError(f"{path}: labels must be integers from 0 on, up to {MOST_CLASSES - 1}, got {low} … {high}")
    return labels.astype(np.int64)


def _array_suffix(path: StrPath) -> str | None:
    """Return the suffix of an .npy or .npz, or None."""
    suffix = Path(path).suffix.lower()
    return suffix if suffix in (".npy", ".npz") else None


def _all_pictures_in(folder: Path) -> list[Path]:
    """Return the pictures of a folder; raise ValueError if there are none, and log those in its subfolders."""
    pictures = pictures_in(folder)
    if not pictures:
        raise ValueError(f"{folder} holds no picture ({', '.join(SUFFIXES)})")
    below = sum(len(pictures_in(inner)) for inner in subfolders(folder))
    if below:
        logger.warning("%d pictures in subfolders of %s are not read", below, folder)
    return pictures


def subfolders(folder: Path) -> list[Path]:
    """Return the folders in a folder, in alphabetical order, without hidden ones and macOS' __MACOSX."""
    names = (inner for inner in folder.iterdir() if not inner.name.startswith(".") and inner.name != "__MACOSX")
    return sorted(inner for inner in names if inner.is_dir())


def _read_file(path: Path) -> tuple[Bytes, list[str]]:
    """Read a picture with the channels that it has, or an array: uint8 [N, H, W, C], and what is lost, in words."""
    if _array_suffix(path) is None:
        picture, lost = _read_picture(path)
        return picture[None], lost
    pixels, _ = read_arrays(path)
    if pixels.dtype != np.uint8:
        raise ValueError(f"{path} must hold uint8 [N, H, W, C], got {pixels.dtype} {pixels.shape}")
    return pixels, []


def _read_picture(path: Path) -> tuple[Bytes, list[str]]:
    """Read a picture upright, with the channels that it has: uint8 [H, W, 1, 3 or 4], and what is lost, in words."""
    if not path.is_file():
        raise ValueError(f"{path} is not there, or is no file")
    try:
        with Image.open(path) as opened:
            tags = dict(getattr(opened, "tag_v2", {}))  # of a TIFF
            sixteen_bits = opened.mode == "I" and opened.format in ("PNG", "PPM")  # what older Pillows call I;16
            frames = 1 if opened.format == "MPO" else getattr(opened, "n_frames", 1)  # a phone's JPEG with a preview
            opened.seek(0)
            opened.load()
            picture = ImageOps.exif_transpose(opened)
            mode, transparent = picture.mode, picture.has_transparency_data
            deep = sixteen_bits or mode.startswith("I;16") or mode in ("I", "F")
            if not deep:
                picture = picture.convert("RGBA" if transparent else "L" if mode in ("1", "L") else "RGB")
            pixels = np.asarray(picture)
            if transparent and "A" not in mode.upper() and not deep and pixels[..., 3].min() == 255:
                pixels = pixels[..., :3]  # a palette with a transparent colour that no pixel has
    except Image.DecompressionBombError as error:
        raise ValueError(f"{path} is too large for a picture, make it smaller: {error}") from error
    except Exception as error:  # a damaged file can fail in any way
        raise ValueError(f"{path} cannot be read as a picture: {error}") from error
    lost = ["moving: the first frame of each is read"] if frames > 1 else []
    if deep:
        if transparent:
            raise ValueError(f"{path} is transparent, with more than 8 bits: save it with 8 bits")
        bits = 16 if mode == "I" else tags.get(BITS_PER_SAMPLE, (16,))[0]
        if pixels.dtype != np.float32 and 0 < pixels.max() < 2 ** (bits - 4):
            lost.append("nearly black, with less than 1/16 of the range of their bits: spread them over the range")
        pixels = _scaled(path, pixels, None if mode == "I" and not sixteen_bits else bits)
        pixels = 255 - pixels if tags.get(PHOTOMETRIC) == WHITE_IS_ZERO else pixels
    return pixels[..., None] if pixels.ndim == 2 else pixels, lost


def _scaled(path: Path, pixels: NDArray[Any], bits: int | None) -> Bytes:
    """Return grey of `bits` bits, or floats on [0, 1], as uint8; raise ValueError if the range is unknown."""
    low, high = pixels.min(), pixels.max()
    if np.issubdtype(pixels.dtype, np.floating):
        if not 0 <= low <= high <= 1:
            raise ValueError(f"{path} holds floats from {low:g} to {high:g}, not on [0, 1]: save it with 8 or 16 bits")
        most = 1
    elif bits is None:
        raise ValueError(f"{path} holds 32-bit integers, whose range is unknown: save it with 8 or 16 bits")
    else:
        most = 2**bits - 1
    return np.rint(pixels.astype(np.float64) * (255 / most)).astype(np.uint8)


def _common_channels(channels: Sequence[int]) -> int:
    """Return the channels that hold all pictures; log a mixture."""
    counts = {name: channels.count(number) for number, name in ((1, "grey"), (3, "colour"), (4, "transparent"))}
    if len(set(channels)) > 1:
        mixture = ", ".join(f"{count} {name}" for name, count in counts.items() if count)
        logger.warning("the pictures are mixed (%s): all are read with %d channels", mixture, max(channels))
    return max(channels)


def _with_channels(path: Path, pixels: Bytes, channels: int) -> Bytes:
    """Return a picture [H, W, 1, 3 or 4] with `channels` channels; raise ValueError if its transparency were lost."""
    if pixels.shape[-1] == 4 and channels < 4 and pixels[..., 3].min() < 255:
        raise ValueError(f"{path} is transparent, {channels} channels are wanted: put it on a background")
    picture = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).convert(MODES[channels])
    converted = np.asarray(picture)
    return converted[..., None] if converted.ndim == 2 else converted


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
