"""What a run does is what the model would do now: every change of the model is seen by the next run."""

import types

import pytest
import torch
from torch import nn

from ddpm_fast.engine.structure import changed_by, structure_of
from ddpm_fast.sample import Sampler, sample
from tests.support.fake_cuda import FakeCuda

SHAPE = (2, 2, 4, 4)
STEPS = {"num_inference_steps": 6}


class Processor:
    """An object that is no module, as diffusers' attention processors are."""

    def __init__(self, factor):
        self.factor = factor

    def __call__(self, h):
        return self.factor * h


class Adapted(nn.Module):
    """A network with all that users change: a scale, a processor, a submodule, dropout, a counter of its calls."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.time, self.mix = nn.Linear(1, 2), nn.Conv2d(2, 2, 3, padding=1)
        self.activation, self.dropout = nn.Tanh(), nn.Dropout(0.5)
        self.scale, self.scaling, self.processor = 1.0, {"default": [1.0]}, Processor(1.0)
        self.calls, self.last = 0, None

    def forward(self, x, t):
        self.calls += 1
        self.last = x.shape[0]
        h = self.mix(x) + torch.sin(self.time(t[:, None] / 100))[..., None, None]
        h = self.dropout(self.processor(self.activation(self.scale * h)))
        return self.scaling["default"][0] * h


def patched(self, x, t):
    return 0.5 * x


CHANGES = {
    "a number": lambda model: setattr(model, "scale", 0.5),
    "a number in a container": lambda model: model.scaling["default"].__setitem__(0, 0.5),
    "a processor": lambda model: setattr(model, "processor", Processor(0.5)),
    "a hook": lambda model: model.activation.register_forward_hook(lambda module, given, result: 0.5 * result),
    "a hook before": lambda model: model.mix.register_forward_pre_hook(lambda module, given: (0.5 * given[0],)),
    "a patched forward": lambda model: setattr(model, "forward", types.MethodType(patched, model)),
    "a submodule without parameters": lambda model: setattr(model, "activation", nn.Sigmoid()),
    "dropout switched on": lambda model: model.dropout.train(),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("options", [{}, {"memory_format": "channels_last"}], ids=str)
def test_changes_are_seen_by_the_next_run(change, options):
    model = Adapted().eval()
    sampler = Sampler(model, SHAPE, optimize="hoist", **STEPS, **options)
    assert sampler.loop.network.hoisted is not None
    sampler(seeds=1)
    for _ in range(2):  # the change, and no change after it
        CHANGES[change](model)
        torch.manual_seed(3)
        got = sampler(seeds=1)
        torch.manual_seed(3)
        expected = sample(model, SHAPE, seeds=1, optimize=None, **STEPS)
        if change != "dropout switched on":  # the noise of dropout is drawn in another order
            torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)
        else:
            assert sampler.loop.network.hoisted is None


@pytest.mark.parametrize("change", [name for name in CHANGES if name != "dropout switched on"])
def test_changes_are_seen_by_recorded_graphs(change, monkeypatch):
    cuda = FakeCuda().install(monkeypatch)
    model = Adapted().eval()
    sampler = Sampler(model, SHAPE, execution="graph", backend="torch", optimize=None, **STEPS)
    sampler(seeds=1)
    assert cuda.made == 1
    sampler(seeds=2)
    assert cuda.made == 1  # the counter of its own calls is no change
    CHANGES[change](model)
    got = sampler(seeds=1)
    assert cuda.made == 2
    expected = sample(model, SHAPE, seeds=1, execution="eager", optimize=None, **STEPS)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)


def test_what_a_call_changes_itself_is_no_change():
    model = Adapted().eval()
    x, t = torch.zeros(SHAPE), torch.zeros(2, dtype=torch.int64)
    assert changed_by(lambda: model(x, t), model) == {("0 ", "calls"), ("0 ", "last")}
    sampler = Sampler(model, SHAPE, optimize="hoist", **STEPS)
    hoisted = sampler.loop.network.hoisted
    for seed in range(3):
        sampler(seeds=seed)
        model.calls += 100
    assert sampler.loop.network.hoisted is hoisted


def test_a_callable_has_no_structure():
    assert structure_of(lambda x, t: x) == {}


def test_nan_is_equal_to_itself():
    model = Adapted()
    model.scale = float("nan")
    assert structure_of(model) == structure_of(model)


@pytest.mark.parametrize("made", [types.SimpleNamespace, dict], ids=["record", "nested dicts"])
def test_a_number_deep_inside_an_attribute_is_looked_at(made):
    model = Adapted().eval()
    model.settings = made(inner={"gain": {"value": 1.0}}) if made is dict else made(gain=1.0)
    before = structure_of(model)
    if made is dict:
        model.settings["inner"]["gain"]["value"] = 2.0
    else:
        model.settings.gain = 2.0
    assert structure_of(model) != before


class Caches(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Conv2d(2, 2, 1)

    def forward(self, x, t):
        if not hasattr(self, "cache"):
            self.cache = torch.arange(4) / 4
        return self.layer(x + 0 * self.cache)


@pytest.mark.parametrize("optimize", ["auto", "hoist", None])
def test_a_cache_that_was_made_in_inference_mode(optimize, monkeypatch):
    monkeypatch.setattr("ddpm_fast.engine.network.Network.seconds_to_hoist", 0.0)
    model = Caches().eval()
    with torch.inference_mode():
        first = sample(model, SHAPE, seeds=0, optimize=None, **STEPS)
        sampler = Sampler(model, SHAPE, optimize=optimize, **STEPS)
        for _ in range(3):
            torch.testing.assert_close(sampler(seeds=0), first)
