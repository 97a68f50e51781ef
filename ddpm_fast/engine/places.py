"""Where a value of a graph has its channels, and which operations only move its pixels about.

A network changes between images [B, C, H, W], rows [B, L, C] and columns [B, C, L] of the same numbers. A layer does
not care: it reads channels and pixels, whatever shape they have.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

aten = torch.ops.aten

COPIES = (aten.contiguous.default, aten.clone.default, aten.alias.default, aten.detach.default)
RESHAPES = (aten.view.default, aten.reshape.default, aten.flatten.using_ints, aten._unsafe_view.default)


@dataclass(frozen=True)
class Place:
    """A node's value, and which of its dimensions is that of the channels: 1 or -1. The others are pixels, in order."""

    node: fx.Node
    dim: int

    @property
    def value(self) -> Tensor:
        """The value, for its shape and dtype."""
        value: Tensor = self.node.meta["val"]
        return value

    @property
    def channels(self) -> int:
        """Number of channels."""
        return self.value.shape[self.dim]

    @property
    def pixels(self) -> int:
        """Number of pixels of a sample."""
        return self.value[0].numel() // self.channels

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the value as an image; a value that is no image has the width 1."""
        shape = self.value.shape
        return (shape[2], shape[3]) if len(shape) == 4 and self.dim == 1 else (self.pixels, 1)

    @property
    def args(self) -> tuple[Any, ...]:
        """The arguments of the node."""
        return self.node.args

    def before(self, keep_size: bool = False) -> "Place | None":
        """Return the place before an operation that only moves pixels or copies; None for other operations.

        Args:
            keep_size: Whether height and width of an image must stay.
        """
        if self.node.op != "call_function" or not self.args or not isinstance(self.args[0], fx.Node):
            return None
        source = self.args[0]
        value = source.meta.get("val")
        if not isinstance(value, Tensor):
            return None
        if self.node.target in COPIES:
            return Place(source, self.dim)
        dim = _channels_before(self, value.shape)
        if dim is None or (keep_size and (value.dim() != 4 or dim != 1 or value.shape != self.value.shape)):
            return None
        return Place(source, dim)

    def root(self, keep_size: bool = False) -> "Place":
        """Return the place where the value was made, before all operations that only move pixels."""
        place = self
        while (before := place.before(keep_size)) is not None:
            place = before
        return place

    def after(self, user: fx.Node) -> "Place | None":
        """Return the place after an operation that only moves pixels or copies; None for other operations."""
        value = user.meta.get("val")
        if not isinstance(value, Tensor) or not user.args or user.args[0] is not self.node:
            return None
        if user.target in COPIES:
            return Place(user, self.dim)
        for dim in (1, -1):
            if value.dim() > 2 and _channels_before(Place(user, dim), self.value.shape) == self.dim:
                return Place(user, dim)
        return None


def as_image(x: Tensor, dim: int, height: int, width: int) -> Tensor:
    """Return x, whose channels are in dimension `dim`, as [B, C, H, W] in channels_last memory: a view if possible."""
    image = x.movedim(dim, 1)
    if image.shape[2:] != (height, width):
        image = image.reshape(*image.shape[:2], height, width)
    return image.contiguous(memory_format=torch.channels_last)


def shaped(image: Tensor, shape: Sequence[int], dim: int) -> Tensor:
    """Return an image [B, C, H, W] in another shape, with the channels in dimension `dim`: a view."""
    return (image if dim == 1 else image.movedim(1, -1)).reshape(shape)


def _channels_before(place: Place, before: Sequence[int]) -> int | None:
    """Return the channels' dimension, 1 or -1, before a view, a transposition or a permutation; None if pixels move."""
    after, dims, target = tuple(place.value.shape), len(before), place.node.target
    if target in RESHAPES:
        if before[0] != after[0] or dims < 3:
            return None
        dim = 1 if place.dim == 1 else -1
        return dim if before[dim] == after[dim] else None
    if target is aten.transpose.int:
        order = list(range(dims))
        i, j = (each % dims for each in place.args[1:3])
        order[i], order[j] = order[j], order[i]
    elif target is aten.permute.default:
        order = [each % dims for each in place.args[1]]
    else:
        return None
    own = place.dim % dims
    pixels = [each for number, each in enumerate(order) if number not in (0, own)]
    if order[0] != 0 or pixels != sorted(pixels) or order[own] not in (1, dims - 1):
        return None
    return 1 if order[own] == 1 else -1
