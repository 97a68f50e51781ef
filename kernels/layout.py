"""Layouts: where the elements of a tensor [B, C, ...] lie in memory, as three strides."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """A layout of three strides: element (i, c, p) lies at i · batch + c · channel + p · pixel.

    Attributes:
        batch, channel, pixel: Strides in elements.
        channels, pixels: Sizes of one sample; pixels is the product of all dimensions after the channels.
    """

    batch: int
    channel: int
    pixel: int
    channels: int
    pixels: int

    @property
    def row_major(self) -> bool:
        """Whether a sample's elements follow one another in row-major order."""
        return (self.pixel == 1 or self.pixels == 1) and (self.channel == self.pixels or self.channels == 1)

    def overlaps_itself(self, batch: int) -> bool:
        """Return whether two elements of the tensor, of `batch` samples, may share memory."""
        extents = ((self.batch, batch), (self.channel, self.channels), (self.pixel, self.pixels))
        reached = 1
        for stride, size in sorted(extent for extent in extents if extent[1] > 1):
            if stride < reached:
                return True
            reached += stride * (size - 1)
        return False


def layout_of(tensor: Tensor) -> Layout | None:
    """Return the layout of `tensor`, or None if its pixels do not lie at one stride (a crop of an image, say)."""
    shape, strides = tensor.shape, tensor.stride()
    pixels, pixel_stride = 1, 1
    for size, stride in zip(reversed(shape[2:]), reversed(strides[2:]), strict=True):
        if size == 1:
            continue
        if pixels == 1:
            pixel_stride = stride
        elif stride != pixels * pixel_stride:
            return None
        pixels *= size
    return Layout(strides[0], strides[1], pixel_stride, shape[1], pixels)


def with_layout(tensor: Tensor) -> tuple[Tensor, Layout]:
    """Return `tensor`, or a contiguous copy where the tensor has no layout, and the layout."""
    layout = layout_of(tensor)
    if layout is None:
        tensor = tensor.contiguous(memory_format=torch.contiguous_format)
        layout = layout_of(tensor)
        assert layout is not None
    return tensor, layout
