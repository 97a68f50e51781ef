"""The benchmark of fused layers: what it counts, predicts and would measure."""

from collections import Counter

import pytest
import torch

pytest.importorskip("diffusers")

from benchmarks.network import layers
from ddpm_fast.engine.fuse import Fusion, Shape
from ddpm_fast.kernels.conv_fused import Window

SAME = Window(3, 1, 1, 1, 1, 1)
LAYER = Shape(2, 4, 4, (8, 4), 16, SAME, (8, 4), True, True, True, True, True)


def test_predictions_are_sums_over_kernels():
    fusion = Fusion(
        20, 3, (LAYER,), Counter({"scaled_dot_product_attention": 2, "add": 1}), {"conv2d": "it is dilated"}
    )
    row = layers.predict("a network", fusion)
    assert row["layers_us"] == round(layers.layer_us(LAYER))
    assert row["call_us"] == round(layers.layer_us(LAYER) + 2 * layers.ATTENTION_US + layers.OTHER_US)
    assert row["reasons"] == ["it is dilated"]


@pytest.mark.parametrize(
    "shape",
    [
        LAYER,
        Shape(1, 4, 4, (8,), 3, Window(3, 1, 1, 1, 1, 1, True), (), False, False, False, False, False),
        Shape(1, 6, 6, (3,), 8, Window(3, 2, 0, 0, 1, 1), (), False, True, False, False, True),
    ],
)
def test_every_kind_of_layer_can_be_measured(shape):
    row = layers.measure(shape, 3, torch.device("cpu"))
    assert min(row["ours_us"], row["cudnn_us"], row["chain_us"], row["predicted_us"], row["TFLOP_per_s"]) > 0
    assert row["count"] == 3


def test_work_is_counted_in_multiply_adds():
    assert LAYER.multiply_adds == 2 * 16 * 16 * (9 * 12 + 12)
