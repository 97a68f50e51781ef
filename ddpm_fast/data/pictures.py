"""Images on disk as training data: a folder of pictures, an .npy or an .npz."""

import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ddpm_fast import images
from ddpm_fast.seeding import keyed_generator

ORDER_STREAM, FLIP_STREAM = 3, 4


class Pictures:
    """Batches of images, each image once an epoch; a batch depends on (batch size, seed, step) alone.

    Args:
        path: a folder of pictures of one size (their first decides size and channels; subfolders are not entered); an
            .npz or .npy with uint8 [N, H, W, C] or [N, H, W], or float [N, C, H, W] on [-1, 1].
        flip: mirror every other image, at random, left to right.

    Attributes:
        shape: (C, H, W).
        about: what tells these data from others: name, count, shape, flip, a checksum of the pixels.

    Raises:
        ValueError: names the file that is missing, unreadable, of another size, or with values outside the range.
    """

    def __init__(self, path: str | Path, flip: bool = False) -> None:
        path = Path(path)
        if path.suffix.lower() in (".npy", ".npz"):
            self._pixels = _array(path)
        else:
            found, _ = images.read([path], images.shape_of(path))
            self._pixels = torch.from_numpy(found).permute(0, 3, 1, 2).contiguous()
        self.flip = flip
        self.shape = tuple(self._pixels.shape[1:])
        checksum = zlib.crc32(self._pixels.numpy().tobytes())
        self.about = {
            "name": path.name, "count": len(self), "shape": list(self.shape), "flip": flip, "checksum": checksum,
        }  # fmt: skip
        self._orders: dict[tuple[int, int], Tensor] = {}

    def __len__(self) -> int:
        return len(self._pixels)

    def __call__(self, count: int, seed: int, step: int) -> Tensor:
        """Batch number `step`: float32 [count, C, H, W] on [-1, 1]."""
        places = range(step * count, (step + 1) * count)
        rows = torch.stack([self._order(seed, place // len(self))[place % len(self)] for place in places])
        batch = self._pixels[rows]
        batch = batch.float() / 127.5 - 1 if batch.dtype == torch.uint8 else batch.clone()
        if self.flip:
            mirrored = torch.rand(count, generator=keyed_generator(FLIP_STREAM, seed, step)) < 0.5
            batch[mirrored] = batch[mirrored].flip(3)
        return batch

    def _order(self, seed: int, epoch: int) -> Tensor:
        if (seed, epoch) not in self._orders:
            self._orders = {key: order for key, order in self._orders.items() if key == (seed, epoch - 1)}
            self._orders[seed, epoch] = torch.randperm(len(self), generator=keyed_generator(ORDER_STREAM, seed, epoch))
        return self._orders[seed, epoch]


def _array(path: Path) -> Tensor:
    """uint8 or float32 [N, C, H, W]."""
    try:
        found = np.load(path, allow_pickle=False)
        found = found["arr_0"] if path.suffix.lower() == ".npz" else found
    except FileNotFoundError:
        raise ValueError(f"{path} is not there") from None
    except Exception as error:  # a file of another kind can fail in any way
        raise ValueError(f"{path} cannot be read: {error}") from error
    got = f"{found.dtype} {found.shape}"
    if not found.size:
        raise ValueError(f"{path} holds no image, got {got}")
    if found.dtype == np.uint8 and found.ndim in (3, 4):
        found = found[..., None] if found.ndim == 3 else found
        return torch.from_numpy(np.ascontiguousarray(np.moveaxis(found, -1, 1)))
    if np.issubdtype(found.dtype, np.floating) and found.ndim == 4:
        low, high = float(found.min()), float(found.max())
        if not -1 - 1e-6 <= low <= high <= 1 + 1e-6:
            raise ValueError(f"{path} must lie on [-1, 1], got values from {low:g} to {high:g}")
        return torch.from_numpy(found.astype(np.float32))
    raise ValueError(f"{path} must hold uint8 [N, H, W, C] or float [N, C, H, W], got {got}")
