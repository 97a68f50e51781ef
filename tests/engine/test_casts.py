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


@pytest.mark.parametrize("verify", [True, False])
def test_a_write_that_leaves_no_trace_is_seen_by_the_next_walk(model, verify):
    options = {"dtype": torch.bfloat16, "num_inference_steps": 4, "optimize": None, "verify": verify}
    sampler = Sampler(model, SHAPE, **options)
    before = sampler(seeds=0)
    model.leave.weight.data.mul_(1.5)
    after = sampler(seeds=0)
    assert not torch.equal(before, after)
    assert torch.equal(after, Sampler(model, SHAPE, **options)(seeds=0))


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
