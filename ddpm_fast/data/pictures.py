"""Images as training data: a folder of pictures or of folders, an .npy or an .npz, with classes or without."""

import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ddpm_fast import images
from ddpm_fast.seeding import keyed_generator

ORDER_STREAM, FLIP_STREAM = 3, 4


class Pictures:
    """A data set of images, in batches, with each image once an epoch.

    A batch depends on (batch size, seed, step) alone.

    Args:
        pixels: uint8 [N, C, H, W], or float32 on [-1, 1].
        name: Name of the data.
        flip: True mirrors each image left to right with probability 1/2.
        labels: int64 [N], 0 … len(classes) - 1. Batches are then pairs of images and labels.
        classes: Names of the classes.

    Attributes:
        shape: Shape of one image, (C, H, W).
        classes: Names of the classes, or None without labels.
        about: Identity of the data: name, count, shape, flip, classes, a checksum.
    """

    def __init__(
        self,
        pixels: Tensor,
        name: str,
        flip: bool = False,
        labels: Tensor | None = None,
        classes: Sequence[str] | None = None,
    ) -> None:
        self._pixels, self._labels, self.flip = pixels, labels, flip
        self.shape = tuple(pixels.shape[1:])
        self.classes = None if classes is None else list(classes)
        checksum = zlib.crc32(pixels.numpy().tobytes())
        if labels is not None:
            checksum = zlib.crc32(labels.numpy().tobytes(), checksum)
        self.about = {"name": name, "count": len(self), "shape": list(self.shape), "flip": flip, "checksum": checksum}
        if self.classes is not None:
            self.about["classes"] = self.classes
        self._orders: dict[tuple[int, int], Tensor] = {}

    @classmethod
    def read(cls, path: str | Path, flip: bool = False) -> "Pictures":
        """Read images from disk.

        Args:
            path: A folder of pictures of one size (the first decides size and channels); a folder of such folders, each
                a class; or an .npy or .npz with uint8 [N, H, W, C] or [N, H, W], or float [N, C, H, W] on [-1, 1]. An
                .npz may hold labels, integers [N], in the array "labels", or in arr_1 as guided-diffusion writes them.
            flip: True mirrors images at random, as in `Pictures`.

        Raises:
            ValueError: A file is missing, unreadable, of another size, or holds values outside the range; the message
                names the file.
        """
        path = Path(path)
        if path.suffix.lower() in (".npy", ".npz"):
            pixels, labels = _arrays(path)
            classes = None if labels is None else [str(number) for number in range(int(labels.max()) + 1)]
            return cls(pixels, path.name, flip, labels, classes)
        folders = _class_folders(path)
        if not folders:
            return cls(_folder([path], path), path.name, flip)
        counts = [len(images.pictures_in(folder)) for folder in folders]
        labels = torch.arange(len(folders)).repeat_interleave(torch.tensor(counts))
        return cls(_folder(folders, folders[0]), path.name, flip, labels, [folder.name for folder in folders])

    def __len__(self) -> int:
        return len(self._pixels)

    def __call__(self, count: int, seed: int, step: int) -> Tensor | tuple[Tensor, Tensor]:
        """Return batch number `step`.

        The images are float32 [count, C, H, W] on [-1, 1]. With labels the batch is a pair, with labels int64 [count].
        """
        positions = range(step * count, (step + 1) * count)
        rows = torch.stack([self._order(seed, position // len(self))[position % len(self)] for position in positions])
        batch = self._pixels[rows]
        batch = batch.float() / 127.5 - 1 if batch.dtype == torch.uint8 else batch.clone()
        if self.flip:
            mirrored = torch.rand(count, generator=keyed_generator(FLIP_STREAM, seed, step)) < 0.5
            batch[mirrored] = batch[mirrored].flip(3)
        return batch if self._labels is None else (batch, self._labels[rows])

    def _order(self, seed: int, epoch: int) -> Tensor:
        """Return the order of the images in an epoch. The orders of this epoch and the one before are kept."""
        if (seed, epoch) not in self._orders:
            self._orders = {key: order for key, order in self._orders.items() if key == (seed, epoch - 1)}
            self._orders[seed, epoch] = torch.randperm(len(self), generator=keyed_generator(ORDER_STREAM, seed, epoch))
        return self._orders[seed, epoch]


def _class_folders(path: Path) -> list[Path]:
    """Return the class folders of a folder that holds no pictures itself, in alphabetical order."""
    if not path.is_dir() or images.pictures_in(path):
        return []
    return sorted(folder for folder in path.iterdir() if folder.is_dir() and not folder.name.startswith("."))


def _folder(paths: Sequence[Path], first: Path) -> Tensor:
    """Read the pictures of folders: uint8 [N, C, H, W], all of the size of the first."""
    pixels, _ = images.read(paths, images.shape_of(first))
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()


def _arrays(path: Path) -> tuple[Tensor, Tensor | None]:
    """Read images, uint8 or float32 [N, C, H, W], and labels, int64 [N], or None without labels."""
    try:
        arrays = np.load(path, allow_pickle=False)
        names = set(arrays.files) if path.suffix.lower() == ".npz" else set()
        pixels = arrays["arr_0"] if names else arrays
        labels = next((arrays[name] for name in ("labels", "arr_1") if name in names), None)
    except FileNotFoundError:
        raise ValueError(f"{path} is not there") from None
    except Exception as error:  # a file of another kind can fail in any way
        raise ValueError(f"{path} cannot be read: {error}") from error
    return _checked_pixels(path, pixels), None if labels is None else _checked_labels(path, labels, len(pixels))


def _checked_pixels(path: Path, pixels: NDArray[Any]) -> Tensor:
    """Return the pixels of a file as [N, C, H, W]; raise ValueError unless shape, dtype and range fit."""
    got = f"{pixels.dtype} {pixels.shape}"
    if not pixels.size:
        raise ValueError(f"{path} holds no image, got {got}")
    if pixels.dtype == np.uint8 and pixels.ndim in (3, 4):
        pixels = pixels[..., None] if pixels.ndim == 3 else pixels
        return torch.from_numpy(np.ascontiguousarray(np.moveaxis(pixels, -1, 1)))
    if np.issubdtype(pixels.dtype, np.floating) and pixels.ndim == 4:
        low, high = float(pixels.min()), float(pixels.max())
        if not -1 - 1e-6 <= low <= high <= 1 + 1e-6:
            raise ValueError(f"{path} must lie on [-1, 1], got values from {low:g} to {high:g}")
        return torch.from_numpy(pixels.astype(np.float32))
    raise ValueError(f"{path} must hold uint8 [N, H, W, C] or float [N, C, H, W], got {got}")


def _checked_labels(path: Path, labels: NDArray[Any], count: int) -> Tensor:
    """Return the labels of a file as int64 [count]; raise ValueError unless they are integers from 0 on."""
    if labels.shape != (count,) or not np.issubdtype(labels.dtype, np.integer) or labels.min() < 0:
        raise ValueError(f"{path}: labels must be integers [{count}] from 0 on, got {labels.dtype} {labels.shape}")
    return torch.from_numpy(labels.astype(np.int64))
