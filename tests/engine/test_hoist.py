"""What does not depend on x leaves the loop, and nothing else changes."""

import gc
import logging
import weakref

import pytest
import torch
from torch import nn

from ddpm_fast.engine.hoist import Hoisted
from ddpm_fast.engine.trace import HoistError
from ddpm_fast.models.checkpoint import load_checkpoint
from ddpm_fast.sample import Sampler

TIMES = [90, 60, 31, 30, 2]
SHAPE = (3, 2, 4, 4)


class Net(nn.Module):
    """An operation of every class: of t, of the condition, of both, of parameters alone, neutral ones."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.time = nn.Sequential(nn.Linear(1, 8), nn.SiLU(), nn.Linear(8, 2))
        self.prompt = nn.Linear(5, 2)
        self.both = nn.Linear(2, 2)
        self.conv = nn.Conv2d(2, 2, 3, padding=1)
        self.position = nn.Parameter(torch.randn(2))
        self.dropout = nn.Dropout(0.5)
        self.calls = 0

    def forward(self, x, t, c=None):
        self.calls += 1
        emb = self.time(t[:, None] / 100)
        h = self.conv(x) / 1.0 + emb[..., None, None] + torch.exp(self.position)[:, None, None]
        if c is not None:
            prompt = self.prompt(c)
            h = h * torch.tanh(prompt)[..., None, None] + self.both(emb * prompt)[..., None, None]
        return self.dropout(torch.sin(h))


@pytest.fixture
def net():
    return Net().eval()


def inputs(seed=1):
    torch.manual_seed(seed)
    return torch.randn(SHAPE), {"c": torch.randn(3, 5)}


def close(a, b):
    return torch.allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("conditional", [False, True])
def test_the_results_are_the_networks(net, conditional):
    x, kwargs = inputs()
    kwargs = kwargs if conditional else {}
    hoisted = Hoisted(net, x, TIMES, kwargs)
    with torch.no_grad():
        for row, t in enumerate(TIMES):
            times = torch.full((3,), t)
            assert close(hoisted(x, times), net(x, times, **kwargs))
            assert close(hoisted(x, times, row), net(x, times, **kwargs))
        mixed = torch.tensor([31, 90, 2])  # every sample at a timestep of its own
        assert close(hoisted(x, mixed), net(x, mixed, **kwargs))


def test_what_left_the_loop(net):
    x, kwargs = inputs()
    counts = Hoisted(net, x, TIMES, kwargs).counts
    assert counts.neutral == 2  # the division by 1 and the dropout
    assert counts.of_t >= 5
    assert counts.of_condition >= 4
    assert counts.of_both >= 3
    assert counts.tables == 2
    assert counts.table_bytes == 4 * (len(TIMES) * 2 + len(TIMES) * 3 * 2)
    assert counts.before == counts.neutral + counts.of_t + counts.of_condition + counts.of_both + counts.after
    plain = Hoisted(net, x, TIMES).counts
    assert (plain.of_both, plain.tables) == (0, 1)


def test_the_network_itself_is_not_called_and_the_tables_are_read(net):
    x, kwargs = inputs()
    hoisted = Hoisted(net, x, TIMES, kwargs)
    calls, times = net.calls, torch.full((3,), TIMES[2])
    expected = hoisted(x, times, 2)
    assert net.calls == calls
    for bank in hoisted._banks:
        kept = bank.table.values.clone()
        bank.table.values.add_(0.1)
        assert not close(hoisted(x, times), expected)
        bank.table.values.copy_(kept)
        bank.table.values[-1].add_(1)  # of another timestep
        assert close(hoisted(x, times), expected)
        bank.table.values.copy_(kept)
    hoisted._constants[0].add_(0.1)
    assert not close(hoisted(x, times), expected)


@pytest.mark.parametrize("write", [lambda p: p.mul_(1.5), lambda p: p.data.mul_(1.5)], ids=["in place", "data"])
@pytest.mark.parametrize("name", ["time.0.weight", "both.bias", "prompt.weight", "position", "conv.weight"])
def test_new_parameters_are_seen_by_the_next_walk(net, name, write):
    x, kwargs = inputs()
    hoisted = Hoisted(net, x, TIMES, kwargs)
    times = torch.full((3,), TIMES[1])
    before = hoisted(x, times, 1)
    with torch.no_grad():
        write(dict(net.named_parameters())[name])
    assert not hoisted.refresh()
    assert not close(hoisted(x, times, 1), before)
    with torch.no_grad():
        assert close(hoisted(x, times, 1), net(x, times, **kwargs))
        assert close(hoisted(x, times), net(x, times, **kwargs))


def test_new_conditions_are_seen_by_the_next_walk(net):
    x, kwargs = inputs()
    kwargs["c"][:] = kwargs["c"][0]  # one condition for all
    hoisted = Hoisted(net, x, TIMES, kwargs)
    assert hoisted.counts.table_bytes == 4 * 2 * (len(TIMES) * 2)
    times = torch.full((3,), TIMES[1])
    for rows, moved in (
        ([0, 0, 0], False),
        ([0, 1, 1], True),
        ([2, 2, 0], False),
        ([0, 1, 2], True),
        ([1, 1, 1], False),
    ):
        kwargs["c"].copy_(torch.randn(3, 5)[rows])
        assert hoisted.refresh() == moved  # room for more conditions than ever before
        with torch.no_grad():
            assert close(hoisted(x, times, 1), net(x, times, **kwargs))
            assert close(hoisted(x, times), net(x, times, **kwargs))
    assert not hoisted.refresh()


def test_tables_within_the_memory(net):
    x, kwargs = inputs()
    times = torch.full((3,), TIMES[1])
    for memory, tables in ((0, 0), (4 * len(TIMES) * 2, 1), (10**6, 2)):
        hoisted = Hoisted(net, x, TIMES, kwargs, memory=memory)
        assert hoisted.counts.tables == tables
        assert hoisted.counts.table_bytes <= memory
        with torch.no_grad():
            assert close(hoisted(x, times, 1), net(x, times, **kwargs))
    kwargs["c"][:] = kwargs["c"][0]
    hoisted = Hoisted(net, x, TIMES, kwargs, memory=4 * 2 * (len(TIMES) * 2))
    kwargs["c"].copy_(torch.randn(3, 5))
    with pytest.raises(HoistError, match="3 conditions at every timestep exceed"):
        hoisted.refresh()


def test_what_mixes_the_samples_stays():
    class Mixing(Net):
        def forward(self, x, t):
            emb = self.time(t[:, None] / 100)
            return self.conv(x) + (emb - emb.mean(0))[..., None, None]

    x, _ = inputs()
    mixing = Mixing().eval()
    hoisted = Hoisted(mixing, x, TIMES)
    assert hoisted.counts.tables == 0
    for times in (torch.tensor([90, 2, 31]), torch.full((3,), 60)):
        with torch.no_grad():
            assert close(hoisted(x, times), mixing(x, times))


class Numbers(Net):
    """A network with numbers that happen to be the batch size of the trace."""

    def forward(self, x, t):
        emb = self.time(t[:, None] / 100)
        h = torch.clamp(self.conv(x) + emb[..., None, None], max=61)
        return h * torch.where(t < 61, 2.0, 1.0)[:, None, None, None]


@pytest.mark.parametrize("batch", [1, 8])
def test_numbers_that_are_no_sizes_stay(batch, exports):
    numbers = Numbers().eval()
    x = 200 * torch.randn(batch, 2, 4, 4)
    hoisted = Hoisted(numbers, x, TIMES)
    assert exports == [61]
    for row, t in enumerate(TIMES):
        times = torch.full((batch,), t)
        with torch.no_grad():
            assert close(hoisted(x, times, row), numbers(x, times))


class Sized(Net):
    """A network with a size that is a sum: 61, like the batch size of the trace. It fails ahead of the loop."""

    def __init__(self):
        super().__init__()
        self.short, self.long = nn.Parameter(torch.randn(30, 2)), nn.Parameter(torch.randn(31, 2))

    def forward(self, x, t):
        scale = torch.cat([self.short, self.long]).view(61, 2).mean(0)
        return self.conv(x) * scale[:, None, None] + self.time(t[:, None] / 100)[..., None, None]


class Counted(Net):
    """A network that reads the batch size as a number."""

    def forward(self, x, t):
        return self.conv(x) + self.time(t[:, None] / 100)[..., None, None] / float(x.shape[0])


@pytest.mark.parametrize("make", [Sized, Counted])
def test_a_batch_size_that_the_shared_trace_does_not_fit_is_traced_by_itself(make, exports):
    network = make().eval()
    for batch in (3, 1):
        x, times = torch.randn(batch, 2, 4, 4), torch.full((batch,), TIMES[3])
        hoisted = Hoisted(network, x, TIMES)
        with torch.no_grad():
            assert close(hoisted(x, times, 3), network(x, times))
            assert close(hoisted(x, times), network(x, times))
    assert exports == [61, 3, 1]


@pytest.mark.parametrize("batch", [1, 2, 5])
@pytest.mark.parametrize("wrong", [0, len(TIMES) // 2, len(TIMES) - 1])
def test_the_first_the_middle_and_the_last_row_are_verified(batch, wrong, net, monkeypatch):
    fill = Hoisted._fill

    def spoilt(self, bank):
        fill(self, bank)
        bank.table.values[wrong] += 1

    monkeypatch.setattr(Hoisted, "_fill", spoilt)
    with pytest.raises(HoistError, match="gives other numbers"):
        Hoisted(net, torch.randn(batch, 2, 4, 4), TIMES)


def test_a_network_that_was_changed_is_traced_anew(exports):
    class Scaled(Net):
        scale = None

        def forward(self, x, t):
            return super().forward(x, t) * self.scale

    network, (x, _) = Scaled().eval(), inputs()
    for scale in (1.0, 3.0):
        network.scale = scale
        network.calls = 0  # counted by Python code that is no part of a trace
        hoisted = Hoisted(network, x, TIMES)
        with torch.no_grad():
            assert close(hoisted(x, torch.full((3,), 31), 2), network(x, torch.full((3,), 31)))
    assert exports == [61, 61]


def test_tables_and_replaced_parameters_are_freed(net):
    x, _ = inputs()
    tables, parameters = [], []
    for steps in (3, 4, 5):
        net.conv.weight = nn.Parameter(torch.randn(2, 2, 3, 3))
        parameters.append(weakref.ref(net.conv.weight))
        hoisted = Hoisted(net, x, range(steps))
        tables += [weakref.ref(bank.table) for bank in hoisted._banks]
        del hoisted
    gc.collect()
    assert not any(table() for table in tables)
    assert [weight() is not None for weight in parameters] == [False, False, True]


class Branching(Net):
    def forward(self, x, t):
        return self.conv(x) if x.sum() > 0 else x


class Writing(Net):
    def __init__(self):
        super().__init__()
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x, t):
        self.count.add_(1)
        return self.conv(x) * self.count


class Random(Net):
    def forward(self, x, t):
        return self.conv(x) + torch.randn_like(x)


def hooked():
    net = Net()
    net.conv.register_forward_hook(lambda module, args, output: output)
    return net.eval()


REFUSED = {
    "branches on data": (lambda: Branching().eval(), "torch.export cannot trace it"),
    "writes": (lambda: Writing().eval(), "writes into a tensor"),
    "random": (lambda: Random().eval(), "draws random numbers"),
    "dropout": (lambda: Net().train(), "draws random numbers"),
    "hooks": (hooked, "its Conv2d has hooks"),
    "no module": (lambda: lambda x, t: x, "no torch.nn.Module but a function"),
}


@pytest.mark.parametrize(("make", "reason"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_hoisted_runs_as_it_is_and_says_why(make, reason, caplog):
    with pytest.raises(HoistError, match=reason):
        Hoisted(make(), torch.zeros(SHAPE), TIMES)
    with caplog.at_level(logging.WARNING, logger="ddpm_fast"):
        sampler = Sampler(make(), SHAPE, num_inference_steps=3, device="cpu", optimize="hoist")
    assert "the network is not hoisted: " in caplog.text
    assert "\n" not in caplog.messages[-1]
    assert sampler(seeds=0, progress=False).shape == SHAPE


def test_a_network_switched_to_training_runs_as_it_is(net, caplog):
    sampler = Sampler(net, SHAPE, num_inference_steps=3, optimize="hoist")
    sampler(seeds=0, progress=False)
    calls = net.calls
    net.train()
    sampler(seeds=0, progress=False)
    assert net.calls == calls + 3
    assert "the network is not hoisted: it draws random numbers" in caplog.text
    caplog.clear()
    sampler(seeds=0, progress=False)
    assert caplog.text == ""  # said once


@pytest.mark.parametrize("options", [{}, {"sampler": "ddim"}, {"variance_type": "fixed_large", "clip_sample": False}])
def test_samples_are_the_same(net, options):
    options = {"num_inference_steps": 20, "model_kwargs": {"c": torch.randn(3, 5)}, **options}
    plain, hoisted = (Sampler(net, SHAPE, optimize=optimize, **options) for optimize in (None, "hoist"))
    calls = net.calls
    assert close(hoisted(seeds=0, progress=False), plain(seeds=0, progress=False))
    assert net.calls == calls + 21  # those of the plain one, and one that the hoisted run is compared with
    for _ in range(2):  # conditions of the next call
        kwargs = {"c": torch.randn(3, 5)}
        results = [one(seeds=1, model_kwargs=kwargs, progress=False) for one in (plain, hoisted)]
        assert close(*results)


def test_guided_samples_are_the_same(net):
    options = {
        "num_inference_steps": 10, "guidance_scale": 2.0, "model_kwargs": {"c": torch.randn(3, 5)},
        "uncond_kwargs": {"c": torch.zeros(3, 5)},
    }  # fmt: skip
    plain, hoisted = (Sampler(net, SHAPE, optimize=optimize, **options) for optimize in (None, "hoist"))
    assert hoisted.loop.network.hoisted.counts.tables == 2
    assert close(hoisted(seeds=0, progress=False), plain(seeds=0, progress=False))


def test_the_embedded_network():
    model = load_checkpoint().model
    plain, hoisted = (
        Sampler(model, (2, 1, 32, 32), num_inference_steps=10, optimize=optimize) for optimize in (None, "hoist")
    )
    counts = hoisted.loop.network.hoisted.counts
    print(counts)
    assert counts.after < 0.7 * counts.before
    assert counts.tables == 18
    assert close(hoisted(seeds=0, progress=False), plain(seeds=0, progress=False))


def test_under_autocast(net):
    plain, hoisted = (
        Sampler(net, SHAPE, num_inference_steps=10, dtype=torch.bfloat16, optimize=optimize)
        for optimize in (None, "hoist")
    )
    counts = hoisted.loop.network.hoisted.counts
    assert counts.before == counts.neutral + counts.of_t + counts.of_condition + counts.of_both + counts.after
    assert counts.of_condition >= 6  # weight and bias of the convolution and of the time embedding's linears
    difference = (hoisted(seeds=0, progress=False) - plain(seeds=0, progress=False)).abs().max()
    print(f"{difference:.1e}")
    assert difference < 1e-3
    with torch.no_grad():
        net.conv.weight.mul_(1.5)
    assert (hoisted(seeds=0, progress=False) - plain(seeds=0, progress=False)).abs().max() < 1e-3


def test_unknown_optimizations():
    with pytest.raises(ValueError, match="optimize must be one of"):
        Sampler(lambda x, t: x, SHAPE, optimize="fast")
