"""A run gives what the caller's model would give now, or runs as the model is: no change and no effect goes unseen."""

import dataclasses
import functools
import gc
import linecache
import logging
import threading
import weakref

import pytest
import torch
from torch import fx, nn

from ddpm_fast.engine.hoist import Hoisted, _fingerprint, same_up_to_rounding
from ddpm_fast.engine.network import Network
from ddpm_fast.engine.noise import PhiloxNoise
from ddpm_fast.sample import Sampler, sample
from tests.support.fake_cuda import FakeCuda

SHAPE = (2, 2, 4, 4)
STEPS = {"num_inference_steps": 12, "backend": "torch"}


class Net(nn.Module):
    """A network with a time embedding that is scaled by `factor`, which each subclass keeps elsewhere."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.time, self.mix, self.out = nn.Linear(1, 4), nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 2, 3, padding=1)

    def embedding(self, t):
        return torch.sin(self.time(t[:, None].float() / 100))[..., None, None]

    def factor(self):
        return 1.0

    def forward(self, x, t):
        return torch.tanh(self.out(torch.relu(self.mix(x) + self.factor() * self.embedding(t))))


HIDDEN = {"factor": 1.0}


class Hidden(Net):
    """Reads a number of its module's file: no fingerprint of the module sees the number."""

    def factor(self):
        return HIDDEN["factor"]


@pytest.fixture(autouse=True)
def hidden():
    HIDDEN["factor"] = 1.0
    yield
    HIDDEN["factor"] = 1.0


@pytest.fixture
def cuda(monkeypatch):
    monkeypatch.setattr(PhiloxNoise, "in_kernel", property(lambda self: True, lambda self, value: None), raising=False)
    return FakeCuda().install(monkeypatch)


def plain(model, shape=SHAPE, **options):
    return sample(model, shape, seeds=3, execution="eager", optimize=None, **STEPS, **options)


def same(a, b):
    return torch.allclose(a, b, atol=1e-5, rtol=0)


class TestTheCallOfARun:
    @pytest.mark.parametrize("options", [{"optimize": "hoist"}, {"execution": "graph", "optimize": None}], ids=str)
    def test_a_change_that_nothing_else_shows(self, options, cuda, caplog):
        model = Hidden().eval()
        sampler = Sampler(model, SHAPE, **STEPS, **options)
        first = sampler(seeds=3)
        assert same(first, plain(model))
        HIDDEN["factor"] = 3.0
        with caplog.at_level(logging.INFO, "ddpm_fast"):
            changed = sampler(seeds=3)
        assert not same(changed, first)
        assert same(changed, plain(model))
        assert "prepared anew" in caplog.text
        assert sampler.loop.network.hoisted is not None or sampler.loop.mode == "graph"

    def test_without_it_the_change_is_missed(self, cuda):
        """What the call is for: the option that leaves it out leaves the old images."""
        model = Hidden().eval()
        sampler = Sampler(model, SHAPE, optimize="hoist", verify=False, **STEPS)
        first = sampler(seeds=3)
        HIDDEN["factor"] = 3.0
        assert same(sampler(seeds=3), first)

    def test_a_closure(self, cuda):
        model, scale = Net().eval(), [1.0]
        sampler = Sampler(lambda x, t: scale[0] * model(x, t), SHAPE, execution="graph", **STEPS)
        sampler(seeds=3)
        scale[0] = 0.5
        assert same(sampler(seeds=3), plain(lambda x, t: scale[0] * model(x, t)))
        model.mix.weight = nn.Parameter(2 * model.mix.weight)
        assert same(sampler(seeds=3), plain(lambda x, t: scale[0] * model(x, t)))

    def test_a_network_that_is_never_the_same_runs_as_it_is(self, cuda, caplog):
        class Alternating(Net):
            calls = 0

            def factor(self):
                self.calls += 1
                return 1.0 if self.calls % 2 else 3.0

        model = Alternating().eval()
        sampler = Sampler(model, SHAPE, optimize=None, **STEPS)
        assert torch.isfinite(sampler(seeds=3)).all()
        assert sampler.loop.mode == "eager"
        assert "running as the model is" in caplog.text
        with pytest.raises(RuntimeError, match="the model's own calls give other numbers"):
            Sampler(Alternating().eval(), SHAPE, optimize=None, execution="graph", **STEPS)(seeds=3)

    def test_dropout_in_a_graph_draws_the_same_numbers_as_the_model(self, cuda):
        """Both calls begin with the generator's state; the caller's generator stays where it was."""
        network = Network(Sampler(Net().eval(), SHAPE, **STEPS).loop.call)
        torch.manual_seed(5)
        with network.undone():
            first = torch.rand(3)
        with network.undone():
            assert torch.equal(torch.rand(3), first)
        assert torch.equal(torch.rand(3), first)

    def test_rows_vary_from_run_to_run(self, monkeypatch):
        seen = []
        agrees = Network.agrees
        monkeypatch.setattr(
            Network, "agrees", lambda self, output: (seen.append(int(self.timestep[0])), agrees(self, output))[1]
        )
        sampler = Sampler(Net().eval(), SHAPE, optimize="hoist", **STEPS)
        for _ in range(12):
            sampler(seeds=3)
        assert len(set(seen)) > 6

    def test_a_model_that_returns_a_view_of_its_input(self, cuda, caplog):
        for model in (lambda x, t: x, lambda x, t: x.flip(-1), lambda x, t: x.mT):
            assert same(Sampler(model, SHAPE, execution="graph", **STEPS)(seeds=3), plain(model))
        assert "other numbers" not in caplog.text


class TestValues:
    def test_a_fingerprint_sees_every_bit_and_the_order(self):
        values = torch.randn(3, 5)
        before = _fingerprint([values])
        values.data[[0, 1]] = values.data[[1, 0]].clone()
        assert _fingerprint([values]) != before
        for dtype in (torch.float64, torch.bfloat16, torch.int64, torch.bool, torch.complex64, torch.uint8):
            tensor = torch.ones(300_000).to(dtype)
            before = _fingerprint([tensor])
            tensor.data[299_999] = 0
            assert _fingerprint([tensor]) != before

    def test_the_tolerance_is_that_of_the_arithmetic(self):
        generator = torch.Generator().manual_seed(0)
        right = torch.randn(4, 100, generator=generator)
        assert same_up_to_rounding(right * (1 + 1e-6), right)
        assert not same_up_to_rounding(right * (1 + 1e-3), right)
        assert same_up_to_rounding(right.bfloat16(), right, torch.bfloat16)
        assert not same_up_to_rounding(right * 1.04, right, torch.bfloat16)
        one_sample = right.clone()
        one_sample[2] *= 1.001  # hidden in the norm of a batch whose other samples are larger
        right[[0, 1, 3]] *= 1e3
        one_sample[[0, 1, 3]] *= 1e3
        assert not same_up_to_rounding(one_sample, right)
        right[0, 0] = one_sample[0, 0] = torch.nan
        assert not same_up_to_rounding(one_sample, right)
        assert same_up_to_rounding(right, right)


class InPlace(Net):
    def forward(self, x, t):
        h = self.mix(x)
        h += self.embedding(t)
        h[:, :2] *= 0.5
        return torch.tanh(self.out(nn.functional.relu(h, inplace=True)))


class InNoGrad(Net):
    def embedding(self, t):
        with torch.no_grad():
            return super().embedding(t)


class DrawsInNoGrad(Net):
    def embedding(self, t):
        with torch.no_grad():
            return super().embedding(t) + torch.randn(4)[:, None, None]


class DrawsInAutocast(Net):
    def embedding(self, t):
        with torch.autocast("cpu", enabled=False):
            return super().embedding(t) + torch.randn(4)[:, None, None]


class WritesInNoGrad(Net):
    def __init__(self):
        super().__init__()
        self.register_buffer("count", torch.ones(()))

    def factor(self):
        with torch.no_grad():
            self.count.mul_(0.99)
        return self.count


class TestEffects:
    @pytest.mark.parametrize("kind", [InPlace, InNoGrad])
    def test_arithmetic_in_place_is_hoisted(self, kind):
        model = kind().eval()
        sampler = Sampler(model, SHAPE, optimize="hoist", **STEPS)
        assert sampler.loop.network.hoisted.counts.of_t > 0
        assert same(sampler(seeds=3), plain(model))

    @pytest.mark.parametrize("kind", [DrawsInNoGrad, DrawsInAutocast, WritesInNoGrad])
    def test_effects_in_regions_are_refused(self, kind, caplog):
        sampler = Sampler(kind().eval(), SHAPE, optimize="hoist", **STEPS)
        assert sampler.loop.network.hoisted is None
        assert "it draws random numbers" in caplog.text or "it writes into a tensor" in caplog.text

    def test_looking_at_a_network_leaves_its_buffers(self):
        model = WritesInNoGrad().eval()
        Sampler(model, SHAPE, optimize="hoist", **STEPS)
        assert model.count == 1

    def test_the_output_is_the_one_that_the_engine_takes(self):
        @dataclasses.dataclass
        class Output:
            first: torch.Tensor
            sample: torch.Tensor

        torch.utils._pytree.register_dataclass(Output)

        class Two(Net):
            def forward(self, x, t):
                return Output(torch.zeros_like(x), super().forward(x, t))

        model = Two().eval()
        sampler = Sampler(model, SHAPE, optimize="hoist", **STEPS)
        assert sampler.loop.network.hoisted is not None
        assert same(sampler(seeds=3), plain(model))

    def test_expanded_constants_take_new_values(self):
        class Expanded(Net):
            def __init__(self):
                super().__init__()
                self.register_buffer("position", torch.randn(1, 4))

            def embedding(self, t):
                return (self.position @ self.position.T).expand(len(t), 4)[..., None, None] + super().embedding(t)

        model = Expanded().eval()
        sampler = Sampler(model, SHAPE, optimize="hoist", **STEPS)
        sampler(seeds=3)
        model.position.mul_(0.5)
        assert same(sampler(seeds=3), plain(model))


class Conditioned(Net):
    def forward(self, x, t, added):
        shift = added["text"][0] if isinstance(added["text"], list) else added["text"]
        return torch.tanh(self.out(torch.relu(self.mix(x) + self.embedding(t) + shift[..., None, None])))


class TestKeywords:
    @pytest.mark.parametrize("optimize", [None, "hoist"])
    def test_tensors_in_containers_are_buffers(self, optimize):
        model, added = Conditioned().eval(), {"text": torch.zeros(2, 4)}
        sampler = Sampler(model, SHAPE, model_kwargs={"added": added}, optimize=optimize, **STEPS)
        sampler(seeds=3)
        added["text"] = torch.full((2, 4), 2.0)
        got = sampler(seeds=3, model_kwargs={"added": added})
        assert same(got, plain(model, model_kwargs={"added": added}))

    @pytest.mark.parametrize("wrap", [lambda text: text, lambda text: [text]], ids=["dict", "list in a dict"])
    def test_guidance_joins_tensors_in_containers(self, wrap):
        model = Conditioned().eval()
        cond, none = torch.randn(2, 4), torch.zeros(2, 4)
        guided = plain(
            model, guidance_scale=2.0, model_kwargs={"added": {"text": wrap(cond)}},
            uncond_kwargs={"added": {"text": wrap(none)}},
        )  # fmt: skip

        def by_hand(x, t):
            of_none = model(x, t, {"text": none})
            return of_none + 2 * (model(x, t, {"text": cond}) - of_none)

        assert same(guided, plain(by_hand))

    def test_speculation_follows_tensors_in_containers(self):
        model, cond = Conditioned().eval(), torch.randn(2, 4)
        kwargs = {"model_kwargs": {"added": {"text": cond}}, "speculate": 3}
        together = sample(model, SHAPE, seeds=[3, 4], **STEPS, **kwargs)
        kwargs["model_kwargs"] = {"added": {"text": cond[1:]}}
        assert same(together[1:], sample(model, (1, *SHAPE[1:]), seeds=[4], **STEPS, **kwargs))

    def test_which_tensors_go_with_the_samples_is_checked(self):
        """A tensor of all samples whose first size is that of the batch: by its name, or an error."""

        class Mixing(Net):
            def forward(self, x, t, weights):
                return super().forward(x, t) + weights.sum()

        model, weights = Mixing().eval(), torch.full((2, 3), 0.01)
        options = {"seeds": 3, "model_kwargs": {"weights": weights}, "speculate": 3, **STEPS}
        with pytest.raises(ValueError, match=r"outputs that depend on their own sample alone: .* shared_kwargs"):
            sample(model, SHAPE, **options)
        got = sample(model, SHAPE, shared_kwargs=["weights"], **options)
        assert torch.isfinite(got).all()
        with pytest.raises(ValueError, match=r"shared_kwargs must name keywords of model_kwargs, \['weights'\], got"):
            sample(model, SHAPE, shared_kwargs=["weight"], **options)
        with pytest.raises(TypeError, match="shared_kwargs must be a sequence of names"):
            sample(model, SHAPE, shared_kwargs="weights", **options)

    def test_batch_norm_in_training_mode_cannot_speculate(self):
        model = nn.Sequential(nn.Conv2d(2, 2, 3, padding=1), nn.BatchNorm2d(2)).train()
        with pytest.raises(ValueError, match=r"call model.eval\(\)"):
            sample(lambda x, t: model(x), SHAPE, seeds=3, speculate=3, device="cpu", **STEPS)


@pytest.mark.parametrize("optimize", [None, "hoist"])
def test_the_autocast_around_a_call_is_that_of_the_call(optimize):
    model = Net().eval()
    outside = plain(model)
    sampler = Sampler(model, SHAPE, optimize=optimize, **STEPS)
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16):
            inside = sampler(seeds=3)
            assert same(inside, plain(model))
        assert not torch.equal(inside, outside)
        assert same(sampler(seeds=3), outside)


@functools.lru_cache
def frequencies(count):
    return torch.exp(-torch.arange(count) / count)


def _whole_graphs():
    """Count the graphs that have nodes."""
    return sum(type(each) is fx.Graph and bool(vars(each)) for each in gc.get_objects())


class TestTracing:
    def test_memories_hold_no_tensor_of_a_trace(self):
        class Memo(Net):
            held = None

            def __init__(self):
                super().__init__()
                self.by_batch = {}

            def embedding(self, t):
                if self.held is None:
                    self.held = torch.ones(4)
                self.by_batch.setdefault(len(t), torch.ones(4))
                scale = self.held * self.by_batch[len(t)] * frequencies(4) * frequencies(len(t))[:1]
                return scale[:, None, None] * super().embedding(t)

        frequencies.cache_clear()
        model = Memo().eval()
        sampler = Sampler(model, SHAPE, optimize="hoist", **STEPS)
        assert same(sampler(seeds=3), plain(model))
        held = [model.held, *model.by_batch.values(), *(frequencies(count) for count in (2, 4, 61))]
        assert {type(tensor) for tensor in held} == {torch.Tensor}

    @pytest.mark.parametrize("error", [RuntimeError("odd"), KeyError("odd"), torch.OutOfMemoryError("odd")], ids=repr)
    def test_what_fails_on_the_automatic_path_is_logged(self, error, monkeypatch, caplog):
        def broken(*args, **kwargs):
            raise error

        monkeypatch.setattr(Hoisted, "__init__", broken)
        monkeypatch.setattr(Network, "seconds_to_hoist", 0)
        model = Net().eval()
        sampler = Sampler(model, SHAPE, **STEPS)
        with caplog.at_level(logging.INFO, "ddpm_fast"):
            for _ in range(2):
                assert same(sampler(seeds=3), plain(model))
        assert "the network is not hoisted" in caplog.text
        assert "odd" in caplog.text

    def test_threads_may_call_the_network_meanwhile(self):
        model, errors, stop = Net().eval(), [], threading.Event()
        x, t = torch.randn(SHAPE), torch.tensor([3, 4])
        expected = model(x, t)

        def call():
            while not stop.is_set():
                got = model(x, t)
                if type(got) is not torch.Tensor or not torch.allclose(got, expected, atol=1e-6):
                    errors.append(type(got))

        threads = [threading.Thread(target=call) for _ in range(2)]
        for thread in threads:
            thread.start()
        samplers = [Sampler(model, (batch, *SHAPE[1:]), optimize="hoist", **STEPS) for batch in (1, 2, 3)]
        stop.set()
        for thread in threads:
            thread.join()
        assert errors == []
        assert all(sampler.loop.network.hoisted is not None for sampler in samplers)

    def test_a_sampler_is_freed_at_once_and_leaves_no_sources(self):
        model = Net().eval()
        Sampler(model, SHAPE, optimize="hoist", **STEPS)
        before = set(linecache.cache)
        gc.collect()
        graphs = _whole_graphs()
        gc.disable()
        try:
            sampler = Sampler(model, (5, *SHAPE[1:]), optimize="hoist", **STEPS)
            sampler(seeds=3)
            alive = [weakref.ref(sampler), weakref.ref(sampler.loop), weakref.ref(sampler.loop.network.hoisted)]
            del sampler
            assert [ref() for ref in alive] == [None] * 3
            assert _whole_graphs() == graphs
        finally:
            gc.enable()
        assert {name for name in set(linecache.cache) - before if "eval_with_key" in name} == set()
