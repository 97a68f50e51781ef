"""Layers are found by their algebra, and a fused network gives the network's numbers."""

import copy
import logging

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ddpm_fast.engine import fuse
from ddpm_fast.engine.hoist import Hoisted
from ddpm_fast.engine.trace import HoistError
from ddpm_fast.models.checkpoint import load_checkpoint
from ddpm_fast.sample import Sampler
from tests.support.unets import random_unet

TIMES = [9, 5, 0]
SHAPE = (2, 12, 6, 10)


class Net(nn.Module):
    """A network of one function of its layers, the input and a vector that depends on the timestep."""

    def __init__(self, body, **layers: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = body
        self.time = nn.Linear(1, 24)
        for name, layer in layers.items():
            self.add_module(name, copy.deepcopy(layer))
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.3)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.body(self, x, self.time(t[:, None].to(x) / 10)[:, :, None, None])


def conv(channels_in=12, channels_out=12, size=3, **options):
    return nn.Conv2d(channels_in, channels_out, size, padding=options.pop("padding", size // 2), **options)


def norm(channels=12, groups=3):
    return nn.GroupNorm(groups, channels)


def attend(m, x, e):
    rows = m.n(x.flatten(2)).transpose(1, 2)
    heads = (each(rows).unflatten(2, (3, 4)).transpose(1, 2) for each in (m.q, m.k, m.v))
    found = F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)
    return (m.o(found).transpose(1, 2).reshape(x.shape) + x) / 1.5


def block(m, x, e):
    h = m.a(F.silu(m.n(x))) + e[:, :12]
    return m.b(F.silu(m.o(h))) + x


def up(m, x, e):
    h = m.a(F.silu(m.n(x)))
    wide = torch.cat([h, x], 1)
    return m.c(wide) + m.b(F.silu(m.o(wide)))


LINEAR = {name: nn.Linear(12, 12) for name in "qkvo"}
# What is computed, its layers, and the operations on x that are left besides fused layers.
BODIES = {
    "a convolution alone": (lambda m, x, e: m.a(x), {"a": conv()}, 1, {}),
    "without bias": (lambda m, x, e: m.a(x), {"a": conv(bias=False)}, 1, {}),
    "1 x 1": (lambda m, x, e: m.a(x), {"a": conv(12, 5, 1)}, 1, {}),
    "other numbers of channels": (lambda m, x, e: m.a(x), {"a": conv(12, 7)}, 1, {}),
    "stride": (lambda m, x, e: m.a(x), {"a": conv(stride=2)}, 1, {}),
    "stride, padded on one side": (
        lambda m, x, e: m.a(F.pad(x, (0, 1, 0, 1))), {"a": conv(stride=2, padding=0)}, 1, {},
    ),
    "enlarged": (lambda m, x, e: m.a(F.interpolate(x, scale_factor=2.0, mode="nearest")), {"a": conv()}, 1, {}),
    "SiLU": (lambda m, x, e: m.a(F.silu(x)), {"a": conv()}, 1, {}),
    "norm": (lambda m, x, e: m.a(m.n(x)), {"a": conv(), "n": norm()}, 1, {"channel_stats": 1, "norm_affine": 1}),
    "norm of an inner activation": (lambda m, x, e: m.b(m.n(m.a(x))), {"a": conv(), "b": conv(), "n": norm()}, 2, {}),
    "norm, enlarged": (
        lambda m, x, e: m.b(F.interpolate(F.silu(m.n(m.a(x))), scale_factor=2.0)),
        {"a": conv(), "b": conv(), "n": norm()}, 2, {},
    ),
    "norm without weights": (
        lambda m, x, e: m.b(m.n(m.a(x))), {"a": conv(), "b": conv(), "n": nn.GroupNorm(3, 12, affine=False)}, 2, {},
    ),
    "modulated norm": (
        lambda m, x, e: m.b(F.silu(m.n(m.a(x)) * (1 + e[:, :12]) + e[:, 12:])),
        {"a": conv(), "b": conv(), "n": norm()}, 2, {},
    ),
    "shifted norm": (
        lambda m, x, e: m.b(F.silu(e[:, :12] + m.n(m.a(x)))), {"a": conv(), "b": conv(), "n": norm()}, 2, {},
    ),
    "vectors and a factor": (lambda m, x, e: (e[:, :12] + (m.a(x) + e[:, 12:])) * 0.5, {"a": conv()}, 1, {}),
    "a factor before a sum": (lambda m, x, e: m.a(x) * 0.5 + x, {"a": conv()}, 1, {"add": 1}),
    "residual": (lambda m, x, e: x + m.a(x), {"a": conv()}, 1, {}),
    "two residuals": (lambda m, x, e: x + (m.a(x) + F.silu(x)), {"a": conv()}, 1, {"silu": 1, "add": 1}),
    "block": (block, {"a": conv(), "b": conv(), "n": norm(), "o": norm()}, 2, {"channel_stats": 1, "norm_affine": 1}),
    "concat and shortcut": (
        up, {"a": conv(12, 9), "b": conv(21, 8), "c": conv(21, 8, 1), "n": norm(), "o": norm(21)}, 2,
        {"channel_stats": 1, "norm_affine": 1},
    ),
    "shortcut on the other side": (
        lambda m, x, e: m.a(F.silu(x)) + m.c(x), {"a": conv(), "c": conv(size=1)}, 1, {},
    ),
    "a shortcut with stride stays a residual": (
        lambda m, x, e: m.a(x) + m.c(x), {"a": conv(stride=2), "c": conv(size=1, stride=2)}, 2, {},
    ),
    "two plain products": (lambda m, x, e: m.a(x) + m.c(x), {"a": conv(size=1), "c": conv(size=1)}, 1, {}),
    "attention": (attend, {"n": norm(), **LINEAR}, 2,
                  {"channel_stats": 1, "norm_affine": 1, "scaled_dot_product_attention": 1}),
    "1-dimensional product": (
        lambda m, x, e: (x.flatten(2) + m.o(m.n(x.flatten(2)))).reshape(x.shape),
        {"n": norm(), "o": nn.Conv1d(12, 12, 1)}, 1, {"channel_stats": 1, "norm_affine": 1},
    ),
    "an activation that others read": (
        lambda m, x, e: (h := m.a(x)) + m.b(F.silu(h)) + h, {"a": conv(), "b": conv()}, 2, {"add": 1},
    ),
    "a sum that is read before its end": (
        lambda m, x, e: (h := m.a(x) + x) * torch.sigmoid(h), {"a": conv()}, 1, {"sigmoid": 1, "mul": 1},
    ),
    "a norm over rows and columns exchanged": (
        lambda m, x, e: m.b(m.n(m.a(x).transpose(2, 3)).transpose(2, 3)), {"a": conv(), "b": conv(), "n": norm()}, 2,
        {"group_norm": 1},
    ),
    "a mean is no vector": (
        lambda m, x, e: m.a(x) + x.mean((2, 3), keepdim=True), {"a": conv()}, 1, {"mean": 1, "add": 1},
    ),
    "a map is no vector": (
        lambda m, x, e: m.a(x) + e[:, :12].expand(x.shape).cumsum(3), {"a": conv()}, 1, {"add": 1},
    ),
    "a norm with a factor alone": (
        lambda m, x, e: m.b(m.n(m.a(x)) * (1 + e[:, :12])), {"a": conv(), "b": conv(), "n": norm()}, 2, {},
    ),
    "a factor of the network's own": (
        lambda m, x, e: m.b(m.n(m.a(x)) * m.g.weight[:, :, None] + m.g.bias[:, None, None]),
        {"a": conv(), "b": conv(), "n": norm(), "g": nn.Linear(1, 12)}, 2, {},
    ),
    "twice the same": (
        lambda m, x, e: m.b(m.n(torch.cat([h := m.a(x), h.clone()], 1))),
        {"a": conv(), "b": conv(24), "n": norm(24)}, 2, {"norm_affine": 1},
    ),
    "a norm over the pixels of rows": (
        lambda m, x, e: m.o(m.n(m.q(x.flatten(2).transpose(1, 2)))),
        {"q": nn.Linear(12, 60), "n": norm(60), "o": nn.Conv1d(60, 8, 1)}, 2, {"channel_stats": 1, "norm_affine": 1},
    ),
    "a sum over channels and pixels exchanged": (
        lambda m, x, e: m.o(F.silu(y := x.flatten(2)[:, :, :12])) + m.q(y),
        {"o": nn.Conv1d(12, 12, 1), "q": nn.Linear(12, 12)}, 2, {},
    ),
    "1 x 1 with zeros around another shape": (
        lambda m, x, e: m.a(x.reshape(-1, 12, 10, 6)), {"a": conv(size=1, padding=1)}, 1, {},
    ),
    "zeros behind the channels": (
        lambda m, x, e: m.q(F.pad(x.permute(0, 2, 3, 1), (0, 4))), {"q": nn.Linear(16, 12)}, 1, {"pad": 1},
    ),
    "rounded on the way": (
        lambda m, x, e: m.b(m.a(x).half().to(x)), {"a": conv(), "b": conv()}, 2, {"to": 2},
    ),
    "no group norm": (lambda m, x, e: m.a(x * e[:, :12] + e[:, 12:]), {"a": conv()}, 1, {"mul": 1, "add": 1}),
}  # fmt: skip


def hoisted(net, shape=SHAPE, dtype=torch.float32):
    return Hoisted(net.eval().to(dtype), torch.zeros(shape, dtype=dtype), TIMES)


@pytest.mark.parametrize("name", BODIES)
def test_patterns(name):
    body, layers, count, left = BODIES[name]
    net = Net(body, **layers)
    h, x, t = hoisted(net), torch.randn(SHAPE), torch.tensor([9, 5])
    with torch.no_grad():
        fusion = h.fuse(x)
        assert (fusion.layers, dict(fusion.left)) == (count, left)
        assert fusion.after == count + sum(left.values())
        exact = net.double()(x.double(), t)
        plain = (net.float()(x, t) - exact).norm()
        for memory_format in (torch.contiguous_format, torch.channels_last):
            error = (h(x.contiguous(memory_format=memory_format), t) - exact).norm()
            assert error <= 1.5 * plain + 4e-7 * exact.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["block", "concat and shortcut", "attention", "modulated norm"])
def test_half_precision_errs_no_more_than_the_network_itself(name, dtype):
    body, layers, *_ = BODIES[name]
    net = Net(body, **layers).to(dtype)
    x, t = torch.randn(SHAPE).to(dtype), torch.tensor([9, 5])
    h = hoisted(net, dtype=dtype)
    with torch.no_grad():
        h.fuse(x)
        plain, fused = net(x, t).double(), h(x, t).double()
        exact = net.double()(x.double(), t)
    assert (fused - exact).norm() <= 1.5 * (plain - exact).norm()


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (conv(groups=3), "it has 3 groups"),
        (conv(dilation=2, padding=2), "it is dilated"),
        (conv(size=5), "its kernel is 5 x 5"),
        (nn.Conv2d(12, 12, (1, 3), padding=(0, 1)), "its kernel is 1 x 3"),
        (conv(stride=3), "its stride is [3, 3]"),
        (conv(stride=(1, 2)), "its stride is [1, 2]"),
    ],
    ids=lambda each: each if isinstance(each, str) else "",
)
def test_what_is_not_fused_is_said(layer, reason):
    net = Net(lambda m, x, e: m.b(m.a(x)), a=layer, b=conv())
    h, x = hoisted(net), torch.randn(SHAPE)
    fusion = h.fuse(x)
    assert list(fusion.reasons.values()) == [reason]
    assert f"is not fused, {reason}" in str(fusion)
    assert fusion.layers == 1


def _only(part, function):
    """Return `function` where it leaves a trace of `part` alone: the window stays as it was."""
    return lambda window, place: window if part in str(place.node.target) else function(window, place)


FAULTS = {
    "a bias is lost": ("sum_of_biases", lambda *biases: torch.zeros_like(biases[0])),
    "padding is lost": ("_padded", _only("pad", fuse._padded)),
    "an enlargement is lost": ("_enlarged", _only("upsample", fuse._enlarged)),
    "vectors are lost": ("side_vector", lambda vectors, n: 0 * vectors[0].reshape(-1, n)),
    "modulation is lost": ("described_norm", lambda *given, f=fuse.described_norm: f(*given[:4], None, None)),
    "weights in another order": ("side_by_side", lambda *w, f=fuse.side_by_side: f(*w).flip(0).contiguous()),
    "everything is a vector": ("Fuser._is_vector", lambda *_: True),
    "factors are lost": ("Layer.scale", property(lambda _: 1.0, lambda *_: None)),
}
BITTEN = {
    "a bias is lost": "block", "padding is lost": "stride, padded on one side", "factors are lost": "attention",
    "an enlargement is lost": "enlarged", "vectors are lost": "block", "modulation is lost": "modulated norm",
    "weights in another order": "block", "everything is a vector": "residual",
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_mistake_in_the_pass_is_found_before_a_walk(fault, monkeypatch):
    body, layers, *_ = BODIES[BITTEN[fault]]
    h = hoisted(Net(body, **layers))
    monkeypatch.setattr(f"ddpm_fast.engine.fuse.{FAULTS[fault][0]}", FAULTS[fault][1])
    with pytest.raises((HoistError, RuntimeError, ValueError, AttributeError)):
        h.fuse(torch.randn(SHAPE))


@pytest.mark.parametrize("name", ["block", "concat and shortcut", "attention", "modulated norm", "enlarged"])
def test_a_network_through_the_kernels(name, monkeypatch, kernel_device):
    body, layers, *_ = BODIES[name]
    monkeypatch.setattr("ddpm_fast.kernels.conv_fused.choose_backend", lambda device, backend=None: backend or "triton")
    net = Net(body, **layers).to(kernel_device).eval()
    x, t = torch.randn(SHAPE, device=kernel_device), torch.tensor([9, 5], device=kernel_device)
    h = Hoisted(net, torch.zeros_like(x), TIMES)
    with torch.no_grad():
        h.fuse(x)
        torch.testing.assert_close(h(x, t), net(x, t), rtol=0, atol=2e-5 if kernel_device.type == "cpu" else 1e-2)


def test_a_mistake_in_the_pass_leaves_the_network_hoisted(monkeypatch, caplog):
    name, function = FAULTS["weights in another order"]
    monkeypatch.setattr(fuse, name, function)
    model, options = random_unet(), {"num_inference_steps": 6}
    shape = (2, model.config.channels, model.config.image_size, model.config.image_size)
    sampler = Sampler(model, shape, optimize="fuse", **options)
    assert not sampler.loop.network.fused
    assert "the network is not fused: what is left of it gives other numbers" in caplog.text
    assert torch.equal(sampler(seeds=0), Sampler(model, shape, optimize="hoist", **options)(seeds=0))


OPTIONS = {
    "plain": {},
    "contiguous": {"memory_format": "contiguous"},
    "the faster format": {"memory_format": "auto"},
    "speculation": {"speculate": {0: 2, 500: 3}},
    "verified": {"verify": True},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_walks(name):
    checkpoint = load_checkpoint()
    options = {"config": checkpoint.diffusion, "num_inference_steps": 20, **OPTIONS[name]}
    shape = (2, *checkpoint.shape)
    fused = Sampler(checkpoint.model, shape, optimize="fuse", **options)
    plain = Sampler(checkpoint.model, shape, optimize=None, **options)
    torch.testing.assert_close(fused(seeds=3), plain(seeds=3), rtol=0, atol=2e-4)
    networks = [fused.loop.network] if hasattr(fused.loop, "_graph") else list(fused.loop._networks.values())
    assert all(network.fused for network in networks)


def test_guidance_and_labels():
    checkpoint = load_checkpoint("digits")
    options = {
        "config": checkpoint.diffusion, "num_inference_steps": 12, "guidance_scale": 2.0,
        "model_kwargs": {"class_labels": torch.tensor([3, 8])},
        "uncond_kwargs": {"class_labels": torch.tensor([10, 10])},
    }  # fmt: skip
    shape = (2, *checkpoint.shape)
    fused = Sampler(checkpoint.model, shape, optimize="fuse", **options)
    plain = Sampler(checkpoint.model, shape, optimize=None, **options)
    torch.testing.assert_close(fused(seeds=3), plain(seeds=3), rtol=0, atol=2e-4)
    other = {"model_kwargs": {"class_labels": torch.tensor([1, 2])}, "uncond_kwargs": options["uncond_kwargs"]}
    torch.testing.assert_close(fused(seeds=3, **other), plain(seeds=3, **other), rtol=0, atol=2e-4)
    assert fused.loop.network.fused


@pytest.mark.parametrize("how", ["in place", "data", "swapped"])
def test_packed_weights_follow_the_weights(how):
    net = Net(BODIES["concat and shortcut"][0], **BODIES["concat and shortcut"][1]).eval()
    sampler = Sampler(Chosen(net), SHAPE, optimize="fuse", num_inference_steps=4)
    before = sampler(seeds=0)
    with torch.no_grad():
        if how == "in place":
            net.c.weight.mul_(2)
        elif how == "data":
            net.b.bias.data.add_(1)
        else:
            net.load_state_dict({name: 0.9 * value for name, value in net.state_dict().items()})
    after = sampler(seeds=0)
    assert sampler.loop.network.fused
    assert (after - before).abs().max() > 1e-3
    fresh = Sampler(Chosen(net), SHAPE, optimize=None, num_inference_steps=4)(seeds=0)
    torch.testing.assert_close(after, fresh, rtol=0, atol=1e-4)


class Chosen(nn.Module):
    """A network that returns as many channels as it reads."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return F.pad(self.net(x, t), (0, 0, 0, 0, 0, 4))[:, :12]


class Volume(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv3d(2, 2, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.conv(x)


class Sequence(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(2, 2, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.conv(x)


@pytest.mark.parametrize(
    ("net", "shape", "said"),
    [
        (Volume(), (1, 2, 4, 4, 4), "no layer of it is of a kind that is fused"),
        (Sequence(), (1, 2, 8), "no layer of it is of a kind that is fused"),
        (Volume().double(), (1, 2, 4, 4, 4), "no layer of it is of a kind that is fused"),
        (nn.Sequential(Volume()).train(), (1, 2, 4, 4, 4), "the network is not"),
        (lambda x, t: 0.1 * x, (1, 2, 4, 4), "it is no torch.nn.Module"),
    ],
    ids=["volume", "sequence", "float64", "training", "function"],
)
def test_other_networks_run_as_they_are(net, shape, said, caplog):
    call = net if not isinstance(net, nn.Sequential) else (lambda x, t, f=net[0]: f(x, t))
    with caplog.at_level(logging.WARNING, logger="ddpm_fast"):
        sampler = Sampler(call, shape, optimize="fuse", num_inference_steps=3)
    assert not sampler.loop.network.fused
    assert (
        sum(said in record.message or "the network is not hoisted" in record.message for record in caplog.records) == 1
    )
    assert torch.equal(sampler(seeds=0), Sampler(call, shape, optimize=None, num_inference_steps=3)(seeds=0))


def test_a_fused_network_is_not_compiled(caplog):
    model = random_unet()
    shape = (1, model.config.channels, model.config.image_size, model.config.image_size)
    sampler = Sampler(model, shape, optimize="fuse", compile=True, num_inference_steps=3)
    assert sampler.loop.network.fused
    assert "the network is not compiled: it is fused" in caplog.text
