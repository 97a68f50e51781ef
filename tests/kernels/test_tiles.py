"""The division of layers among programs, and the model of time behind it."""

import pytest

from ddpm_fast.kernels.tiles import GPU, H100, MAPPED, RAW, Tiles, predicted_us, tiles_for, units_of

# What an H100 measured with an earlier kernel: batch, pixels, channels in and out, tiles, instructions in a turn of its
# loop (from its machine code for sm_90), µs in a graph.
MEASURED = [
    (1, 1024, 128, 128, Tiles(32, 32, 64, 2, 4, 4), 429, 13.44),
    (1, 1024, 256, 128, Tiles(64, 64, 64, 4, 4, 5), 814, 20.97),
    (1, 256, 256, 256, Tiles(32, 32, 64, 3, 4, 4), 429, 17.18),
    (1, 256, 512, 256, Tiles(32, 32, 64, 3, 4, 4), 429, 29.66),
    (1, 64, 256, 256, Tiles(32, 32, 64, 9, 4, 3), 429, 8.44),
    (1, 64, 512, 256, Tiles(32, 32, 64, 9, 4, 3), 429, 12.72),
    (1, 16, 256, 256, Tiles(16, 32, 64, 9, 4, 4), 259, 4.83),
    (1, 16, 512, 256, Tiles(16, 32, 64, 9, 4, 4), 259, 6.44),
    (16, 1024, 128, 128, Tiles(128, 128, 64, 1, 4, 3), 1531, 63.98),
    (16, 256, 256, 256, Tiles(64, 64, 64, 4, 4, 4), 816, 66.64),
    (16, 64, 256, 256, Tiles(64, 64, 64, 4, 4, 4), 816, 23.01),
    (256, 1024, 128, 128, Tiles(128, 128, 64, 1, 4, 3), 1531, 592.90),
]


@pytest.mark.parametrize("layer", MEASURED, ids=str)
def test_the_model_against_an_h100(layer):
    batch, pixels, channels, outputs, tiles, instructions, measured = layer
    predicted = predicted_us(tiles, batch, pixels, (channels,), outputs, 3, instructions=instructions)
    assert 1 / 1.5 < predicted / measured < 1.5


@pytest.mark.parametrize("batch", [1, 16, 256])
@pytest.mark.parametrize(
    ("pixels", "channels", "outputs"),
    [(1024, (128,), 128), (1024, (256, 128), 128), (256, (512,), 256), (16, (256,), 256), (1, (3,), 3)],
)
def test_tiles_are_what_the_kernel_takes(batch, pixels, channels, outputs):
    for element in (2, 4):
        tiles = tiles_for(batch, pixels, channels, outputs, 3, element=element)
        for size in (tiles.pixels, tiles.channels, tiles.depth):
            assert size >= 16
            assert size & (size - 1) == 0
        assert tiles.shared_bytes(element) <= H100.shared_bytes
        assert 2 * tiles.split <= max(2, units_of(tiles.depth, channels, 3))
        best = predicted_us(tiles, batch, pixels, channels, outputs, 3)
        plain = predicted_us(Tiles(32, 32, 32, 1), batch, pixels, channels, outputs, 3)
        assert best <= plain


def test_small_gpus_take_small_tiles():
    small = tiles_for(1, 1024, (256,), 256, 3, element=4, gpu=GPU(46, 65536))
    assert small.shared_bytes(4) <= 65536
    with pytest.raises(ValueError, match="no tiles of a layer fit into 2048 bytes"):
        tiles_for(1, 1024, (256,), 256, 3, gpu=GPU(46, 2048))


def test_a_norm_before_the_product_costs_instructions():
    assert all(mapped > raw for mapped, raw in zip(MAPPED[:2], RAW[:2], strict=True))
    tiles = Tiles(32, 128, 128, 4, 8)
    layer = (1, 1024, (256,), 128, 3)
    assert predicted_us(tiles, *layer) > predicted_us(tiles, *layer, mapped=False)
