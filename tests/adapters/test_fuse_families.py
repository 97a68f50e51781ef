"""The networks that people bring, fused: how many operations are left, and that the numbers are the networks' own."""

import copy

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("denoising_diffusion_pytorch")

from diffusers import UNet2DModel

from ddpm_fast.engine.hoist import Hoisted
from tests.adapters.test_hoist_families import FAMILIES, LABELS, TIMES, made, tensor_of

# Operations on x before and after, and what is left besides fused layers and attention.
EXPECTED = {
    "diffusers UNet2DModel": (108, 32, set()),
    "diffusers UNet2DModel, classes": (108, 32, set()),
    "diffusers UNet2DConditionModel": (172, 84, {"layer_norm", "add", "gelu", "mul"}),
    "diffusers DiTTransformer2DModel": (43, 39, {"conv2d", "add", "layer_norm", "mul", "gelu", "einsum"}),
    "our own": (117, 47, {"upsample_nearest2d", "channel_stats", "norm_affine"}),
}
T = torch.tensor([700, 0, 999])


def fused(name, dtype):
    network, x, kwargs, *_ = made(name, dtype)
    hoisted = Hoisted(network, x, TIMES, kwargs)
    return network, x, kwargs, hoisted, hoisted.fuse(x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", EXPECTED)
@torch.no_grad()
def test_families(name, dtype):
    network, x, kwargs, hoisted, fusion = fused(name, dtype)
    before, after, left = EXPECTED[name]
    assert (fusion.before, fusion.after) == (before, after)
    assert set(fusion.left) - {"scaled_dot_product_attention"} == left
    plain = tensor_of(network(x, T, **kwargs)).double()
    double = {key: value.double() if value.is_floating_point() else value for key, value in kwargs.items()}
    exact = tensor_of(copy.deepcopy(network).double()(x.double(), T, **double))
    for got in (hoisted(x, T), hoisted(x.contiguous(memory_format=torch.channels_last), T)):
        error = (got.double() - exact).norm()
        assert error <= 1.5 * (plain - exact).norm() + 2 * torch.finfo(torch.float32).eps * exact.norm()
    row = torch.full_like(T, TIMES[2])
    torch.testing.assert_close(hoisted(x, row, 2), hoisted(x, row), rtol=0, atol=0)


@torch.no_grad()
def test_lucidrains_products_are_fused_with_their_sums():
    network, x, kwargs, hoisted, fusion = fused("lucidrains Unet", torch.float32)
    assert fusion.after < fusion.before
    assert list(fusion.reasons.values()) == ["its kernel is 7 x 7"]
    torch.testing.assert_close(hoisted(x, T), network(x, T, **kwargs), rtol=0, atol=1e-5)


@torch.no_grad()
def test_ddpm_cifar10s_259_operations_become_70():
    """google/ddpm-cifar10-32's configuration, from its config.json, with random weights."""
    network = UNet2DModel(
        sample_size=32, block_out_channels=(128, 256, 256, 256), layers_per_block=2, downsample_padding=0,
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"), norm_eps=1e-6,
        up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"), attention_head_dim=None,
        flip_sin_to_cos=False, freq_shift=1,
    ).eval()  # fmt: skip
    x = torch.randn(1, 3, 32, 32)
    fusion = Hoisted(network, x, [999, 0], {}).fuse(x)
    assert (fusion.before, fusion.after, fusion.layers) == (259, 70, 64)
    assert dict(fusion.left) == {"scaled_dot_product_attention": 6}


@torch.no_grad()
def test_keywords_and_new_weights_reach_a_fused_network():
    network, x, kwargs, hoisted, _ = fused("diffusers UNet2DModel, classes", torch.float32)
    kwargs["class_labels"].copy_(LABELS["class_labels"].flip(0) + 1)
    for parameter in network.parameters():
        parameter.mul_(1.1)
    hoisted.refresh()
    torch.testing.assert_close(hoisted(x, T), network(x, T, **kwargs).sample, rtol=0, atol=1e-4)


def test_all_families_are_here():
    assert set(EXPECTED) | {"lucidrains Unet"} == set(FAMILIES)
