"""What a graph reads is the graph's own; what a recording changes around it is put back. On a stand-in for CUDA."""

import gc
import sys
import threading
import types
import warnings
import weakref

import pytest
import torch
from torch import nn

import ddpm_fast.engine.graph
from ddpm_fast.engine.graph import CaptureError, GraphPool, StepGraph, host_waits, memory_read
from ddpm_fast.engine.noise import PhiloxNoise
from ddpm_fast.sample import Sampler, sample
from tests.support.fake_cuda import LAUNCH_FAILURE, FakeCuda
from tests.support.networks import Wavy

SHAPE = (3, 2, 3, 5)
CPU = torch.device("cpu")
OPTIONS = {"num_inference_steps": 10, "backend": "torch"}


@pytest.fixture
def cuda(monkeypatch):
    monkeypatch.setattr(PhiloxNoise, "in_kernel", property(lambda self: True, lambda self, value: None), raising=False)
    return FakeCuda().install(monkeypatch)


class Owner(nn.Module):
    """Reads a parameter, a buffer, a plain attribute and a tensor in a closure, each of them replaceable."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.weight = nn.Parameter(torch.randn(2, 2))
        self.register_buffer("scale", torch.rand(2))
        self.shift = torch.rand(2)
        self.cell = [torch.rand(2)]

    def forward(self, x, t):
        mixed = torch.einsum("oc,bchw->bohw", self.weight, x)
        return torch.tanh(mixed * self.scale.view(-1, 1, 1) + (self.shift + self.cell[0]).view(-1, 1, 1))

    def replace(self, name):
        if name == "cell":
            self.cell[0] = self.cell[0] + 1
        elif name == "weight":
            self.weight.data = self.weight.data + 1
        else:
            setattr(self, name, getattr(self, name) + 1)


@pytest.mark.parametrize("name", ["weight", "scale", "shift", "cell"])
@pytest.mark.parametrize("owned", [True, False], ids=["owned", "planted"])
def test_a_graph_owns_what_it_reads(cuda, monkeypatch, name, owned):
    """What the model replaces in the middle of a run stays with the graph; without ownership the replay fails."""
    model = Owner()
    expected = sample(model, SHAPE, seeds=1, execution="eager", **OPTIONS)
    if not owned:
        monkeypatch.setattr(ddpm_fast.engine.graph, "memory_read", lambda body: (body(), [])[1])
    sampler = Sampler(model, SHAPE, execution="graph", **OPTIONS)

    def draw():
        return sampler(seeds=1, callback=lambda step, *rest: model.replace(name) if step == 4 else None)

    if owned:
        torch.testing.assert_close(draw(), expected, atol=1e-5, rtol=0)
        assert cuda.replays == 11
    else:
        with pytest.raises(RuntimeError, match=LAUNCH_FAILURE):
            draw()


def test_a_graph_of_a_hoisted_network_owns_its_tables(cuda):
    model = Wavy(2, 2)
    sampler = Sampler(model, SHAPE, execution="graph", optimize="hoist", **OPTIONS)
    first = sampler(seeds=1)
    graph = next(iter(sampler.loop._graphs.values()))
    held = {storage.data_ptr() for storage in graph._owned if isinstance(storage, torch.UntypedStorage)}
    network = sampler.loop.network
    read = [*network.hoisted._constants, *(bank.table.values for bank in network.hoisted._banks), network.input]
    assert {tensor.untyped_storage().data_ptr() for tensor in read} <= held
    assert torch.equal(sampler(seeds=1), first)


def test_a_graph_owns_generated_code(cuda, monkeypatch):
    """torch.compile's modules hold constants; clearing its caches drops the modules."""
    modules = [types.ModuleType("generated")]
    cache = types.SimpleNamespace(PyCodeCache=types.SimpleNamespace(modules=modules))
    monkeypatch.setitem(sys.modules, "torch._inductor.codecache", cache)
    reference = weakref.ref(modules[0])
    graph = StepGraph(lambda: None, CPU)
    modules.clear()
    assert reference() is not None
    del graph
    assert reference() is None


def test_only_what_was_there_before_is_listed():
    inside, outside = [], torch.randn(3)

    def body():
        made = torch.zeros(3)
        made.add_(outside[:2].sum())
        inside.append((made * 2).view(3, 1).squeeze())

    assert [storage.data_ptr() for storage in memory_read(body)] == [outside.untyped_storage().data_ptr()]


def test_an_operation_that_cannot_be_looked_at_is_reported(cuda, monkeypatch):
    def refuse(*args):
        raise NotImplementedError("no rule for this operation")

    monkeypatch.setattr(ddpm_fast.engine.graph._Reads, "__torch_dispatch__", refuse)
    with pytest.raises(RuntimeError, match="the memory that it reads cannot be listed: no rule for this operation"):
        sample(Wavy(2, 2), SHAPE, seeds=1, execution="graph", **OPTIONS)


# cuBLAS


class Product(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(5, 5)

    def forward(self, x, t):
        return torch.tanh(self.linear(x.flatten(0, -2)).view_as(x))


@pytest.mark.parametrize("cleared", [True, False], ids=["as-it-is", "planted"])
def test_workspaces_are_in_the_pool_of_the_graph(cuda, monkeypatch, cleared):
    model = Product()
    sampler = Sampler(model, SHAPE, execution="graph", **OPTIONS)
    if not cleared:
        monkeypatch.setattr(torch._C, "_cuda_clearCublasWorkspaces", lambda: None)
    first = sampler(seeds=1)
    assert cleared == (not cuda.workspaces)  # a workspace in the pool must not serve eager calls
    cuda.workspaces.clear()  # as the graph trees of torch.compile do
    if cleared:
        assert torch.equal(sampler(seeds=1), first)
    else:
        with pytest.raises(RuntimeError, match=LAUNCH_FAILURE):
            sampler(seeds=1)


# A capture that fails


def waiting(x):
    return float(x.sum())


def assert_untouched(cuda, offset=0):
    """Generators, allocator, streams and cuBLAS are as they were."""
    gc.collect()  # errors keep frames, and with them graphs
    assert (cuda.recording, sum(cuda.uses.values()), cuda.workspaces) == ([], 0, {})
    assert (cuda.stream, cuda.mode, cuda.capturing) == ("default", "default", None)
    assert not cuda.generator.state.capturing
    assert cuda.generator.get_offset() == offset
    cuda.generator.draw()


def test_a_host_that_waits_is_found_before_anything_is_captured(cuda, monkeypatch):
    monkeypatch.setattr(torch.cuda, "graph", None)
    x = torch.ones(3)
    before = torch.get_rng_state()
    with pytest.raises(CaptureError, match=r"\(test_graph_memory.py, line \d+: return float\(x.sum\(\)\)\)"):
        StepGraph(lambda: torch.rand(3) + waiting(x), CPU)
    assert torch.equal(torch.get_rng_state(), before)  # the warm-up draws nothing from the caller's generators
    assert_untouched(cuda)


def test_a_capture_that_breaks_leaves_no_trace(cuda, monkeypatch):
    monkeypatch.setattr(cuda, "wait", lambda wait=cuda.wait: wait() if cuda.capturing else None)  # not found before
    x, pool = torch.ones(3, 3), GraphPool()
    recorded = StepGraph(lambda: x.mul_(0.5), CPU, pool)
    for _ in range(2):
        with pytest.raises(CaptureError, match="^CUDA error: operation not permitted when stream is capturing$"):
            StepGraph(lambda: waiting(x @ x), CPU, pool)
    recorded.replay()
    assert torch.equal(x, torch.full((3, 3), 0.5**6))  # five calls of the body (the stand-in runs captures), a replay
    del recorded
    again = StepGraph(lambda: x.add_(1), CPU, pool)
    again.replay()
    del again
    assert_untouched(cuda)


def test_an_error_of_the_body_ends_the_capture(cuda):
    def body():
        if cuda.capturing:
            raise torch.OutOfMemoryError("no memory for 3 GiB")

    with pytest.raises(torch.OutOfMemoryError):
        StepGraph(body, CPU)
    assert_untouched(cuda)


@pytest.mark.parametrize("draws", [True, False])
def test_only_a_network_that_draws_is_recorded_with_the_callers_generator(cuda, draws):
    def body():
        if draws:
            cuda.generator.draw()

    own = cuda.generator.state
    graph = StepGraph(body, CPU)
    assert cuda.generator.state is own
    assert own.offset == 0
    graph.replay()
    assert own.offset == (4 if draws else 0)
    del graph
    assert_untouched(cuda, own.offset)


def test_the_waits_of_other_threads_are_not_shown(cuda, recwarn):
    def elsewhere():
        warnings.warn("called a synchronizing CUDA operation (Triggered internally)", stacklevel=1)

    with host_waits() as found:
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
        warnings.warn("something else", stacklevel=1)
    assert found == []
    assert [str(warning.message) for warning in recwarn] == ["something else"]
