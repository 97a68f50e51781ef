"""Weights under autocast are cast once, and the casts follow the weights."""

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ddpm_fast.engine.call import Call
from ddpm_fast.engine.network import Network
from ddpm_fast.sample import Sampler

SHAPE = (2, 3, 8, 8)


class Tied(nn.Module):
    """Convolutions, a product with a tied weight, and a weight that is read in float32 as well."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.norm, self.leave = nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.Conv2d(8, 3, 1)
        self.mix = nn.Linear(8, 8, bias=False)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        h = self.norm(self.enter(x)) + t[:, None, None, None] / 1000
        h = self.mix(h.movedim(1, -1)) @ self.mix.weight
        return self.leave((h * self.mix.weight.float().sum(0)).movedim(-1, 1)).float()


class _Casts(TorchDispatchMode):
    """A list of the shapes that were cast."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._to_copy.default:
            self.shapes.append(tuple(args[0].shape))
        return func(*args, **(kwargs or {}))


def _network(model: nn.Module, dtype: torch.dtype = torch.bfloat16) -> Network:
    network = Network(Call.of(model, SHAPE, dtype=dtype))
    network._recording = True  # as while a graph is recorded
    network.input.copy_(torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)))
    return network


@pytest.fixture
def model() -> Tied:
    torch.manual_seed(1)
    return Tied().eval()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_the_casts_change_no_bit_and_are_made_once(model, dtype):
    network = _network(model, dtype)
    expected = network.plain()
    assert torch.equal(network(), expected)
    weights = {tuple(p.shape) for p in model.parameters()} - {(8,)}
    with _Casts() as plain:
        network.plain()
    with _Casts() as kept:
        assert torch.equal(network(), expected)
    assert weights <= set(plain.shapes)
    assert not weights & set(kept.shapes)


@torch.no_grad()
def test_the_casts_follow_a_weight_that_changes_between_two_calls(model):
    network = _network(model)
    first = network()
    model.enter.weight.mul_(2)
    assert torch.equal(network(), network.plain())
    assert not torch.equal(network(), first)
    model.mix.weight = nn.Parameter(model.mix.weight * 3)
    assert torch.equal(network(), network.plain())


@torch.no_grad()
def test_a_write_that_leaves_no_trace_is_seen_by_the_next_walk_and_after_a_callback(model):
    for refresh in (Network.refresh, Network.recast):
        network = _network(model)
        before = network()
        model.leave.weight.data.mul_(1.5)
        refresh(network)
        assert torch.equal(network(), network.plain())
        assert not torch.equal(network(), before)


class Writes(nn.Module):
    """A network that writes into its weight, unseen by torch, in every call."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)
        self.base = self.layer.weight.detach().clone()

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        self.layer.weight.data.copy_(self.base * (1 + t[0] / 1000))
        return self.layer(x)


@pytest.mark.parametrize("optimize", ["auto", "hoist", None])
def test_a_network_that_writes_into_its_weights(optimize):
    net = Writes().eval()

    def itself(x: Tensor, t: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
            return net(x, t)

    options = {"num_inference_steps": 6}
    expected = Sampler(itself, SHAPE, **options)(seeds=0)
    assert torch.equal(Sampler(net, SHAPE, dtype=torch.bfloat16, optimize=optimize, **options)(seeds=0), expected)


class Mixed(nn.Module):
    """A network that computes in float32 or float16 inside, whatever the autocast around."""

    def __init__(self, dtype: torch.dtype | None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Parameter(torch.randn(8, 8)), nn.Parameter(torch.randn(8, 8))
        self.layer, self.dtype = nn.Linear(8, 8), dtype

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        with torch.autocast("cpu", self.dtype, enabled=self.dtype is not None):
            both = torch.nn.functional.linear(x.float(), self.layer.weight, self.layer.bias) @ (self.a @ self.b)
        return self.layer(both).float()


@pytest.mark.parametrize("dtype", [None, torch.float16], ids=str)
@torch.no_grad()
def test_another_autocast_inside(dtype):
    network = _network(Mixed(dtype).eval())
    assert torch.equal(network(), network.plain())
    assert torch.equal(network(), network.plain())


@torch.no_grad()
def test_parameters_that_a_call_makes_are_not_kept(model):
    class Made(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 8)

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return torch.nn.functional.linear(x, nn.Parameter(self.layer.weight * 2), self.layer.bias)

    network = _network(Made().eval())
    for _ in range(3):
        assert torch.equal(network(), network.plain())
    assert len(network._casts._kept) == 1


def test_gradients_reach_the_weights(model):
    network = _network(model)
    with torch.no_grad():
        network()
    network().sum().backward()
    assert model.enter.weight.grad is not None


def test_inference_mode_leaves_casts_that_other_modes_can_read(model):
    network = _network(model)
    with torch.inference_mode():
        network()
    with torch.no_grad():
        assert torch.equal(network(), network.plain())
        network.input.requires_grad_()
        with torch.enable_grad():
            network().sum().backward()
    assert network.input.grad is not None


def test_a_model_under_the_callers_own_autocast(model):
    options = {"num_inference_steps": 4, "optimize": None}
    with torch.autocast("cpu", torch.bfloat16):
        around = Sampler(model, SHAPE, **options)(seeds=0)
    assert torch.equal(around, Sampler(model, SHAPE, dtype=torch.bfloat16, **options)(seeds=0))


@torch.no_grad()
def test_weights_in_double_precision_are_left_alone():
    class Double(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.eye(3, dtype=torch.float64))
            self.conv = nn.Conv2d(3, 3, 1)

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return torch.matmul(self.conv(x).double().movedim(1, -1), self.weight).movedim(-1, 1).float()

    network = _network(Double())
    assert torch.equal(network(), network.plain())


@torch.no_grad()
def test_compiled_parts(model):
    class Part(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model, self.run = model, torch.compile(model, backend="aot_eager")

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return self.run(x, t)

    network = _network(Part().eval())
    torch.testing.assert_close(network(), network.plain(), rtol=0, atol=0)
    model.enter.weight.data.mul_(2)
    network.refresh()
    torch.testing.assert_close(network(), network.plain(), rtol=0, atol=0)
