"""The division of a fused layer among programs, and the time that a model of the GPU predicts for it.

The model needs no GPU. The machine code tells how many instructions a program issues in a turn of its loop
(benchmarks/machine_code/layers.py); a scheduler issues a share of an instruction a clock, which grows with the warps
that it has to choose from. The constants were fitted to layers that an H100 measured with an earlier kernel of this
kind, which issued a third more instructions; the test shows how well (tests/kernels/test_tiles.py).
"""

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

CLOCK = 1755.0  # MHz
LAUNCH = 2.3  # µs: the gap before a kernel in a graph, its prologue and its epilogue
ISSUE = 0.30  # instructions a clock that a scheduler issues for a single warp; twice that for two and more
MERGE, MERGED = 0.45, 4  # µs for adding so many parts of a split sum
BANDWIDTH = 2.5e6  # bytes a µs, of weights from the memory
PARTS = 4e6  # bytes a µs, of parts through the L2 cache
# Instructions in a turn: a constant, and for elements of the source and of the weights that a thread handles.
MAPPED, RAW = (82.0, 14.5, 1.3), (60.0, 2.8, 1.6)


@dataclass(frozen=True)
class Tiles:
    """The division of a layer among programs; each field but `split` is a power of 2.

    Attributes:
        pixels, channels: Pixels and output channels of a tile, at least 16.
        depth: Input channels that are read at once, at least 16.
        split: Programs that share the sum of a tile.
        num_warps, num_stages: Triton's options.
    """

    pixels: int
    channels: int
    depth: int
    split: int
    num_warps: int = 4
    num_stages: int = 3

    def shared_bytes(self, element: int = 2) -> int:
        """Return the shared memory that the tiles of the loop take, for elements of so many bytes."""
        return self.num_stages * (self.pixels + self.channels) * self.depth * element


@dataclass(frozen=True)
class GPU:
    """What a GPU has.

    Attributes:
        processors: Number of multiprocessors.
        shared_bytes: Shared memory that a program may take.
    """

    processors: int = 132
    shared_bytes: int = 232448


H100 = GPU()


def predicted_us(
    tiles: Tiles, batch: int, pixels: int, channels: Sequence[int], outputs: int, size: int,
    shortcut: Sequence[int] = (), *, mapped: bool = True, gpu: GPU = H100, instructions: float | None = None,
) -> float:  # fmt: skip
    """Return the microseconds that the model predicts for a layer in a graph.

    Args:
        tiles: The division among programs.
        batch, pixels, channels, outputs, size, shortcut, mapped, gpu: The arguments of `tiles_for`.
        instructions: Instructions in a turn of the loop; None takes those of this kernel.
    """
    units = units_of(tiles.depth, channels, size, shortcut)
    turns = -(-units // tiles.split)
    programs = batch * -(-pixels // tiles.pixels) * -(-outputs // tiles.channels) * tiles.split
    if instructions is None:
        constant, of_source, of_weight = MAPPED if mapped else RAW
        each = tiles.depth / (32 * tiles.num_warps)
        instructions = constant + (of_source * tiles.pixels + of_weight * tiles.channels) * each
    waiting = -(-programs // gpu.processors)
    together = max(1, min(waiting, gpu.shared_bytes // max(1, tiles.shared_bytes()), 64 // tiles.num_warps, 4))
    warps = together * tiles.num_warps / 4  # of a scheduler
    computing = turns * -(-waiting // together) * instructions * warps / (ISSUE * min(warps, 2.0)) / CLOCK
    weights = (sum(channels) * size**2 + sum(shortcut)) * outputs * 2 / BANDWIDTH
    adding = 0.0
    if tiles.split > 1:
        moved = 8 * batch * pixels * outputs * tiles.split / PARTS
        adding = 0.3 + math.ceil(tiles.split / MERGED) * MERGE + moved
    return LAUNCH + max(computing, weights) + adding


@functools.lru_cache(maxsize=1024)
def tiles_for(
    batch: int, pixels: int, channels: tuple[int, ...], outputs: int, size: int, shortcut: tuple[int, ...] = (),
    *, mapped: bool = True, element: int = 2, gpu: GPU = H100,
) -> Tiles:  # fmt: skip
    """Return the tiles for which the model predicts the shortest time.

    Args:
        batch: Number of samples.
        pixels: Pixels of the output.
        channels: Channels of the sources.
        outputs: Output channels.
        size: Kernel size.
        shortcut: Channels of the shortcut's sources.
        mapped: Whether a norm or SiLU stands before the product.
        element: Bytes of an element.
        gpu: What the GPU has.

    Raises:
        ValueError: No tiles fit into the GPU's shared memory.
    """
    found = [
        (predicted_us(tiles, batch, pixels, channels, outputs, size, shortcut, mapped=mapped, gpu=gpu), number, tiles)
        for number, tiles in enumerate(_candidates(pixels, (*channels, *shortcut), outputs))
        if tiles.shared_bytes(element) <= gpu.shared_bytes * 0.9
        and tiles.split <= max(1, units_of(tiles.depth, channels, size, shortcut) // 2)
    ]
    if not found:
        raise ValueError(f"no tiles of a layer fit into {gpu.shared_bytes} bytes of shared memory")
    return min(found)[2]


def units_of(depth: int, channels: Sequence[int], size: int, shortcut: Sequence[int] = ()) -> int:
    """Return the turns that the loop of an unsplit sum takes: taps of channel blocks, then blocks of the shortcut."""
    return sum(-(-each // depth) for each in channels) * size**2 + sum(-(-each // depth) for each in shortcut)


def _candidates(pixels: int, channels: Sequence[int], outputs: int) -> Iterator[Tiles]:
    deepest, widest = max(16, power_of_2(max(channels))), max(16, power_of_2(outputs))
    for tall in (16, 32, 64, 128):
        if tall > 16 and tall >= 2 * pixels:
            continue
        for wide in sorted({min(each, widest) for each in (32, 64, 128)}):
            for depth in sorted({min(each, deepest) for each in (32, 64, 128)}):
                for split in range(1, 17):
                    for warps in (4, 8):
                        yield Tiles(tall, wide, depth, split, warps, 4 if tall * wide <= 4096 else 3)


def power_of_2(number: int) -> int:
    """Return the next power of 2."""
    return 1 << (number - 1).bit_length()
