"""Images as training data: a folder of pictures or of folders, an .npy or an .npz, with classes or without."""

import logging
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ddpm_fast import images
from ddpm_fast.seeding import keyed_generator

logger = logging.getLogger("ddpm_fast")

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

    Raises:
        ValueError: Pixels have another dtype or shape, or labels do not fit pixels and classes.

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
        if pixels.dtype not in (torch.uint8, torch.float32) or pixels.ndim != 4 or not pixels.numel():
            raise ValueError(f"pixels must be uint8 or float32 [N, C, H, W], got {pixels.dtype} {list(pixels.shape)}")
        if (labels is None) != (classes is None):
            raise ValueError("labels and classes go together, only one of them is given")
        if labels is not None and classes is not None:
            if labels.dtype != torch.int64 or labels.shape != (len(pixels),):
                raise ValueError(f"labels must be int64 [{len(pixels)}], got {labels.dtype} {list(labels.shape)}")
            if not 0 <= labels.min() <= labels.max() < len(classes):
                raise ValueError(f"labels must lie in 0 … {len(classes) - 1}, got {labels.min()} … {labels.max()}")
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
    def read(cls, path: str | Path, flip: bool = False, square: bool = False) -> "Pictures":
        """Read images from disk.

        Args:
            path: A folder of pictures of one size, grey, in colour or transparent as the richest of them; a folder of
                such folders, each a class; or an .npy or .npz with uint8 [N, H, W, C] or [N, H, W], or float
                [N, C, H, W] on [-1, 1]. An .npz holds them as arr_0, and may hold labels, integers [N] below 65536, in
                the array "labels", or in arr_1 as guided-diffusion writes them.
            flip: True mirrors images at random, as in `Pictures`.
            square: True cuts the largest square out of the middle of each picture.

        Raises:
            ValueError: A file is missing, unreadable, of another size, holds values outside the range, or pictures lie
                beside class folders; the message names the file.
        """
        path = Path(path)
        if path.suffix.lower() in (".npy", ".npz"):
            arrays, numbers = images.read_arrays(path)
            if arrays.dtype != np.uint8:
                arrays = np.moveaxis(arrays, 1, -1)
            if square and arrays.shape[1] != arrays.shape[2]:
                logger.warning("the images of %s are not square: the middle of each is taken", path)
                arrays = images.centre_square(arrays)
            pixels = torch.from_numpy(np.ascontiguousarray(np.moveaxis(arrays, -1, 1)))
            classes = None if numbers is None else [str(number) for number in range(int(numbers.max()) + 1)]
            labels = None if numbers is None else torch.from_numpy(numbers)
            return cls(pixels, path.name, flip, labels, classes)
        folders = _class_folders(path)
        if not folders:
            return cls(_folder([path], square), path.name, flip)
        counts = [len(images.pictures_in(folder)) for folder in folders]
        labels = torch.arange(len(folders), dtype=torch.int64, device="cpu").repeat_interleave(
            torch.tensor(counts, dtype=torch.int64, device="cpu")
        )
        return cls(_folder(folders, square), path.name, flip, labels, [folder.name for folder in folders])

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
            mirrored = (
                torch.rand(count, generator=keyed_generator(FLIP_STREAM, seed, step), dtype=torch.float32, device="cpu")
                < 0.5
            )
            batch[mirrored] = batch[mirrored].flip(3)
        return batch if self._labels is None else (batch, self._labels[rows])

    def _order(self, seed: int, epoch: int) -> Tensor:
        """Return the order of the images in an epoch. The orders of this epoch and the one before are kept."""
        if (seed, epoch) not in self._orders:
            self._orders = {key: order for key, order in self._orders.items() if key == (seed, epoch - 1)}
            self._orders[seed, epoch] = torch.randperm(
                len(self), generator=keyed_generator(ORDER_STREAM, seed, epoch), dtype=torch.int64, device="cpu"
            )
        return self._orders[seed, epoch]


def _class_folders(path: Path) -> list[Path]:
    """Return the class folders of a folder, in alphabetical order; raise ValueError if pictures lie beside them."""
    if not path.is_dir():
        return []
    folders, beside = images.subfolders(path), images.pictures_in(path)
    inside = sum(len(images.pictures_in(folder)) for folder in folders)
    if beside and inside:
        raise ValueError(
            f"{path} holds pictures ({len(beside)}, such as {beside[0].name}) beside folders of pictures ({inside} in "
            f"{len(folders)}), which are classes: move one or the other away"
        )
    return [] if beside else folders


def _folder(paths: Sequence[Path], square: bool) -> Tensor:
    """Read the pictures of folders: uint8 [N, C, H, W], all of one size."""
    pixels, _ = images.read(paths, square=square)
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()
