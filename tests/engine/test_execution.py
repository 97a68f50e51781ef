"""How a walk is executed changes no sample: hoisting when it pays, memory formats, torch.compile, TF32."""

import itertools
import logging
import shutil

import pytest
import torch
from torch import nn

import ddpm_fast.engine.loop
import ddpm_fast.engine.network
from ddpm_fast.engine.execution import Execution
from ddpm_fast.engine.network import Network
from ddpm_fast.sample import Sampler

SHAPE = (2, 3, 8, 8)
OPTIONS = {"num_inference_steps": 10}


class Net(nn.Module):
    """Convolutions over any number of dimensions, with a time embedding."""

    def __init__(self, dimensions=2, channels=3):
        super().__init__()
        torch.manual_seed(0)
        conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dimensions - 1]
        self.first, self.last = conv(channels, 8, 3, padding=1), conv(8, channels, 3, padding=1)
        self.time = nn.Linear(1, 8)

    def forward(self, x, t):
        emb = torch.sin(self.time(t[:, None] / 100))
        h = self.first(x) + emb.view(*emb.shape, *(1,) * (x.dim() - 2))
        return torch.tanh(self.last(torch.nn.functional.silu(h)))


class Viewing(Net):
    """Cannot take channels_last."""

    def forward(self, x, t):
        return super().forward(x, t).view(len(x), -1).view(x.shape)


def drawn(model, shape=SHAPE, **how):
    sampler = Sampler(model, shape, **OPTIONS, **how)
    return sampler, sampler(seeds=1, progress=False)


@pytest.fixture
def plain():
    return drawn(Net())[1]


class TestAuto:
    def test_hoists_once_that_pays(self, monkeypatch):
        """After runs that took as long as hoisting will; the samples stay the same, bit by bit."""
        clock = itertools.count()  # a run of ten steps takes one second
        monkeypatch.setattr(ddpm_fast.engine.loop.time, "perf_counter", lambda: next(clock))
        monkeypatch.setattr(Network, "seconds_to_hoist", 2.5)
        sampler = Sampler(Net(), SHAPE, **OPTIONS)
        images, hoisted = [], []
        for _ in range(5):
            images.append(sampler(seeds=1, progress=False))
            hoisted.append(sampler.loop.network.hoisted is not None)
        assert hoisted == [False, False, False, True, True]
        assert all(torch.equal(image, images[0]) for image in images)

    def test_says_quietly_what_cannot_be_hoisted(self, monkeypatch, caplog):
        monkeypatch.setattr(Network, "seconds_to_hoist", 0)
        with caplog.at_level(logging.INFO, "ddpm_fast"):
            sampler = Sampler(lambda x, t: torch.tanh(x), SHAPE, device="cpu", **OPTIONS)
            for _ in range(2):
                sampler(seeds=1, progress=False)
        (said,) = [record for record in caplog.records if "hoisted" in record.message]
        assert said.levelno == logging.INFO
        assert "it is no torch.nn.Module but a function" in said.message

    def test_none_never_does(self, monkeypatch):
        monkeypatch.setattr(Network, "seconds_to_hoist", 0)
        assert drawn(Net(), optimize=None)[0].loop.network.hoisted is None


class TestMemoryFormat:
    @pytest.mark.parametrize("optimize", [None, "auto"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_channels_last_gives_the_same_samples(self, optimize, dtype):
        expected = drawn(Net(), dtype=dtype)[1]
        sampler, got = drawn(Net(), memory_format="channels_last", optimize=optimize, dtype=dtype)
        assert sampler.loop.network.input.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(got, expected, atol=1e-5 if dtype == torch.float32 else 0.05, rtol=0)

    def test_the_hoisted_weights_are_copies_and_follow_the_model(self):
        model = Net()
        before = [(p.data_ptr(), p.stride()) for p in model.parameters()]
        sampler, first = drawn(model, memory_format="channels_last")
        assert [(p.data_ptr(), p.stride()) for p in model.parameters()] == before
        weights = [value for value in sampler.loop.network.hoisted._constants if value.dim() == 4]
        assert len(weights) == 2
        assert all(weight.is_contiguous(memory_format=torch.channels_last) for weight in weights)
        with torch.no_grad():
            model.last.weight.mul_(0.5)
        again = sampler(seeds=1, progress=False)
        assert not torch.allclose(again, first, atol=1e-3)
        torch.testing.assert_close(again, drawn(model)[1], atol=1e-5, rtol=0)

    def test_volumes_have_it_and_sequences_have_not(self):
        expected = drawn(Net(3), (2, 3, 4, 4, 4))[1]
        sampler, got = drawn(Net(3), (2, 3, 4, 4, 4), memory_format="channels_last")
        assert sampler.loop.network.input.is_contiguous(memory_format=torch.channels_last_3d)
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)
        with pytest.raises(ValueError, match=r"channels_last.* got shape \(2, 3, 16\)"):
            Sampler(Net(1), (2, 3, 16), memory_format="channels_last", **OPTIONS)
        assert drawn(Net(1), (2, 3, 16), memory_format="auto")[0].loop.network.memory_format == "contiguous"

    @pytest.mark.parametrize("optimize", [None, "hoist"])
    def test_a_network_that_cannot_stays_contiguous_and_says_so(self, optimize, caplog):
        sampler, got = drawn(Viewing(), memory_format="channels_last", optimize=optimize)
        assert sampler.loop.network.memory_format == "contiguous"
        assert "the network cannot run in channels_last: view size is not compatible" in caplog.text
        torch.testing.assert_close(got, drawn(Viewing())[1], atol=1e-5, rtol=0)

    def test_auto_takes_what_the_network_can(self, caplog):
        sampler, got = drawn(Viewing(), memory_format="auto")
        assert sampler.loop.network.memory_format == "contiguous"
        assert "channels_last" not in caplog.text
        torch.testing.assert_close(got, drawn(Viewing())[1], atol=1e-5, rtol=0)

    @pytest.mark.parametrize("faster", ["contiguous", "channels_last"])
    def test_auto_takes_the_faster_one_and_remembers_it(self, faster, monkeypatch, plain):
        tried = []

        def seconds(call, device):
            call()
            tried.append(network.memory_format)
            return 1.0 if network.memory_format == faster else 1.1

        monkeypatch.setattr(ddpm_fast.engine.network, "seconds", seconds)
        model = Net()
        prepare = ddpm_fast.engine.network.Network.prepare

        def watched(self, *args):
            nonlocal network
            network = self
            prepare(self, *args)

        network = None
        monkeypatch.setattr(ddpm_fast.engine.network.Network, "prepare", watched)
        for _ in range(2):
            sampler, got = drawn(model, memory_format="auto")
            assert sampler.loop.network.memory_format == faster
            torch.testing.assert_close(got, plain, atol=1e-5, rtol=0)
        assert tried == ["contiguous", "channels_last"] * 2  # by the first of the two samplers
        drawn(model, (1, 3, 8, 8), memory_format="auto")
        assert len(tried) == 8  # another shape is another trial

    def test_the_trial_for_real(self, plain):
        sampler, got = drawn(Net(), memory_format="auto")
        assert sampler.loop.network.memory_format in ("contiguous", "channels_last")
        torch.testing.assert_close(got, plain, atol=1e-5, rtol=0)


class TestCompile:
    @pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor needs a C++ compiler on a CPU")
    def test_a_compiled_network_gives_the_same_samples(self, plain):
        sampler, got = drawn(Net(), compile=True)
        assert sampler.loop.network.hoisted is not None
        assert hasattr(sampler.loop.network.hoisted._rest, "_torchdynamo_orig_callable")
        torch.testing.assert_close(got, plain, atol=1e-5, rtol=0)

    @pytest.mark.parametrize("broken", ["raises", "wrong"])
    @pytest.mark.parametrize("optimize", [None, "hoist"])
    def test_where_it_fails_the_network_runs_as_it_is(self, broken, optimize, monkeypatch, caplog, plain):
        def failing(called, dynamic):
            def compiled(*args, **kwargs):
                if broken == "raises":
                    raise RuntimeError("no C++ compiler\nand more")
                result = called(*args, **kwargs)
                return [result[0] + 1] if isinstance(result, (list, tuple)) else result + 1

            return compiled

        monkeypatch.setattr(torch, "compile", failing)
        _, got = drawn(Net(), compile=True, optimize=optimize)
        why = "no C++ compiler" if broken == "raises" else "it gives other numbers then"
        said = [record.message for record in caplog.records if record.name == "ddpm_fast"]
        assert said == [f"the network is not compiled: {why}"]
        torch.testing.assert_close(got, plain, atol=1e-5, rtol=0)


class TestTF32:
    def test_it_means_nothing_on_a_cpu(self, plain):
        assert torch.equal(drawn(Net(), tf32=True)[1], plain)


class TestReplacedParameters:
    @pytest.mark.parametrize("optimize", [None, "hoist"])
    def test_are_seen_by_the_next_walk(self, optimize):
        model = Net()
        sampler, first = drawn(model, optimize=optimize)
        model.load_state_dict({name: value * 0.5 for name, value in model.state_dict().items()}, assign=True)
        again = sampler(seeds=1, progress=False)
        assert not torch.allclose(again, first, atol=1e-3)
        assert torch.equal(again, drawn(model)[1])

    def test_graphs_of_the_old_ones_are_dropped(self, monkeypatch):
        made = []

        class Recorded:
            def __init__(self, body, device, pool):
                made.append(pool)
                self.body = body

            def replay(self):
                self.output = self.body()

        monkeypatch.setattr("ddpm_fast.engine.base.can_capture", lambda device: True)
        monkeypatch.setattr(ddpm_fast.engine.loop, "StepGraph", Recorded)
        model = Net()
        sampler = Sampler(model, SHAPE, **OPTIONS)
        for _ in range(2):
            sampler(seeds=1, progress=False)
        model.first.weight = nn.Parameter(model.first.weight * 0.5)
        sampler(seeds=1, progress=False)
        assert len(made) == 2
        assert made[0] is made[1]  # one pool of memory for them all

    def test_another_dtype_is_refused(self):
        model = Net()
        sampler, _ = drawn(model)
        model.double()
        with pytest.raises(ValueError, match=r"was torch.float32 on cpu .* is torch.float64 on cpu now"):
            sampler(seeds=1, progress=False)


class Full:
    """A recording for which there is memory up to `most` steps."""

    most = 0

    def __init__(self, body, device, pool):
        steps = []
        loop_step = ddpm_fast.engine.loop.Loop._step
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ddpm_fast.engine.loop.Loop, "_step", lambda *args: (steps.append(1), loop_step(*args))[1])
            body()
        if len(steps) > Full.most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")
        self.body = body

    def replay(self):
        self.output = self.body()


class TestOutOfMemory:
    @pytest.fixture(autouse=True)
    def full(self, monkeypatch):
        monkeypatch.setattr("ddpm_fast.engine.base.can_capture", lambda device: True)
        monkeypatch.setattr(ddpm_fast.engine.loop, "StepGraph", Full)

    @pytest.mark.parametrize(
        ("most", "instead"), [(1, ["recording one step"]), (0, ["recording one step", "running eagerly"])]
    )
    def test_auto_takes_less_and_says_what_was_needed(self, most, instead, monkeypatch, caplog, kernel_device):
        monkeypatch.setattr(Full, "most", most)
        model = Net().to(kernel_device)
        sampler = Sampler(model, SHAPE, steps_per_replay=5, backend="triton", **OPTIONS)
        got = sampler(seeds=1, progress=False)
        needed = "does not fit into memory: CUDA out of memory. Tried to allocate 2.00 GiB."
        expected = [f"a CUDA graph of {n} steps {needed}; {what}" for n, what in zip((5, 1), instead, strict=False)]
        assert [record.message for record in caplog.records] == expected
        assert torch.equal(sampler(seeds=1, progress=False), got)
        assert len(caplog.records) == len(instead)  # said once
        torch.testing.assert_close(got.cpu(), drawn(Net())[1], atol=1e-3, rtol=0)

    def test_demanding_a_graph_makes_that_an_error(self):
        with pytest.raises(RuntimeError, match=r"graph of 1 steps does not fit into memory: .* 2\.00 GiB"):
            drawn(Net(), execution="graph")


@pytest.mark.parametrize(
    "option",
    [
        {"execution": "fast"}, {"steps_per_replay": 0}, {"backend": "cuda"}, {"optimize": "most"}, {"compile": "max"},
        {"memory_format": torch.channels_last}, {"tf32": "yes"}, {"verify": None},
    ],
    ids=str,
)  # fmt: skip
def test_bad_options_are_refused(option):
    with pytest.raises(ValueError, match=f"{next(iter(option))} must be"):
        Sampler(Net(), SHAPE, **option)
    with pytest.raises(ValueError, match=f"{next(iter(option))} must be"):
        Execution(**option)
