"""Tests of the U-Net: its config, its output, its number of parameters."""

import dataclasses
import json
import math

import pytest
import torch

from ddpm_fast.models.unet import Attention, UNet, UNetConfig, timestep_embedding
from tests.support.unets import TINY, random_unet

TWO_WIDTHS = dataclasses.replace(TINY, widths=(8, 16))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        pytest.param({"attention": (True,)}, r"equally long, got \(8, 16\) and \(True,\)", id="attention"),
        pytest.param({"image_size": 9}, r"divisible by 2\^\(levels - 1\), got 9", id="image_size"),
        pytest.param({"groups": 3}, r"divisible by groups and heads, got \(8, 16\), 3, 2", id="groups"),
        pytest.param({"heads": 3}, r"divisible by groups and heads, got \(8, 16\), 4, 3", id="heads"),
    ],
)
def test_config_errors(changes, says):
    with pytest.raises(ValueError, match=says):
        dataclasses.replace(TWO_WIDTHS, **changes)


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"groups": 0}, id="groups-0"),
        pytest.param({"heads": 0}, id="heads-0"),
        pytest.param({"widths": (), "attention": ()}, id="no-levels"),
        pytest.param({"widths": (-8, 8)}, id="negative-width"),
        pytest.param({"widths": (8.0, 16.0)}, id="float-widths"),
        pytest.param({"widths": 5}, id="one-width"),
        pytest.param({"image_size": 0}, id="image_size-0"),
        pytest.param({"image_size": "32"}, id="image_size-text"),
        pytest.param({"channels": 0}, id="channels-0"),
        pytest.param({"embedding": -4}, id="embedding-negative"),
        pytest.param({"widths": (3,), "attention": (True,), "groups": 3, "heads": 1}, id="odd-first-width"),
    ],
)
def test_config_says_which_value_is_bad(changes):
    with pytest.raises(ValueError, match="channels|image_size|width|attention|embedding|heads|groups"):
        dataclasses.replace(TWO_WIDTHS, **changes)


def test_config_survives_json():
    assert UNetConfig(**json.loads(json.dumps(TWO_WIDTHS.to_dict()))) == TWO_WIDTHS
    assert UNetConfig(widths=[8, 16], attention=[False, True], image_size=8).widths == (8, 16)


@pytest.mark.parametrize(
    ("changes", "size"),
    [
        pytest.param({}, 8, id="tiny"),
        pytest.param({"channels": 3}, 8, id="rgb"),
        pytest.param({}, 16, id="larger-than-trained"),
        pytest.param({"widths": (8,), "attention": (True,)}, 5, id="one-level"),
        pytest.param({"widths": (8, 16, 8), "attention": (True, False, True)}, 12, id="three-levels"),
    ],
)
def test_output_shape(changes, size):
    config = dataclasses.replace(TWO_WIDTHS, **{"image_size": size, **changes})
    x = torch.randn(3, config.channels, size, size)
    y = random_unet(config)(x, torch.tensor([0, 5, 999]))
    assert y.shape == x.shape
    assert y.dtype == torch.float32
    assert y.isfinite().all()


def test_starts_at_zero():
    assert (UNet(TWO_WIDTHS)(torch.randn(2, 1, 8, 8), torch.tensor([3, 4])) == 0).all()


@pytest.mark.parametrize("width", [2, 8, 32])
def test_timestep_embedding_formula(width):
    t = [0, 1, 7, 999]
    half = width // 2
    want = [
        [f(s * 10_000 ** (-k / half)) for f in (math.cos, math.sin) for k in range(half)] for s in t
    ]  # Vaswani et al. 2017, section 3.5, cosines first
    torch.testing.assert_close(timestep_embedding(torch.tensor(t), width), torch.tensor(want), atol=1e-4, rtol=0)


def test_integer_and_float_timesteps_agree():
    model, x, t = random_unet(TWO_WIDTHS), torch.randn(3, 1, 8, 8), torch.tensor([0, 5, 999])
    want = model(x, t)
    for dtype in (torch.int32, torch.float32, torch.float64):
        assert torch.equal(model(x, t.to(dtype)), want)


def test_every_input_matters():
    model, x, t = random_unet(TWO_WIDTHS), torch.randn(2, 1, 8, 8), torch.tensor([5, 5])
    y = model(x, t)
    assert not torch.allclose(model(x, t + 1), y)
    far = x.clone()
    far[:, :, 0, 0] += 1  # attention carries the change into the opposite corner
    assert not torch.equal(model(far, t)[:, :, -1, -1], y[:, :, -1, -1])


def test_samples_do_not_mix():
    model, x, t = random_unet(TWO_WIDTHS), torch.randn(4, 1, 8, 8), torch.tensor([1, 5, 30, 999])
    alone = torch.cat([model(x[i : i + 1], t[i : i + 1]) for i in range(4)])
    torch.testing.assert_close(model(x, t), alone)


def test_attention_formula():
    """Check x + out(softmax(q k^T / sqrt(d)) v), each head on its own channels (Vaswani et al. 2017, eq. 1)."""
    torch.manual_seed(0)
    module = Attention(8, TWO_WIDTHS).double()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter)
    x = torch.randn(2, 8, 3, 4, dtype=torch.float64)
    q, k, v = module.qkv(module.norm(x)).flatten(2).split(8, dim=1)  # [2, channels, positions]
    heads = []
    for h in range(2):
        own = slice(4 * h, 4 * h + 4)
        scores = q[:, own].transpose(1, 2) @ k[:, own] / math.sqrt(4)
        heads.append(v[:, own] @ scores.softmax(-1).transpose(1, 2))
    want = x + module.out(torch.cat(heads, dim=1).reshape(x.shape))
    torch.testing.assert_close(module(x), want)


def test_gradient_reaches_every_number():
    model = random_unet(TWO_WIDTHS)
    model(torch.randn(4, 1, 8, 8), torch.tensor([1, 5, 90, 900])).square().sum().backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or (p.grad == 0).any()]
    # A softmax does not see the bias of the keys: that gradient is zero up to rounding.
    assert [name for name in without if not name.endswith("qkv.bias")] == []
    for name, p in model.named_parameters():
        if name.endswith("qkv.bias"):
            query, _, value = p.grad.chunk(3)
            assert (query != 0).all()
            assert (value != 0).all()


def test_the_default_fits_four_megabytes_in_float16():
    assert 2 * sum(value.numel() for value in UNet().state_dict().values()) < 4e6
