"""Graphs beside everything else that uses a GPU: whatever happens in between, a replay gives what it gave first.

    pytest -m gpu tests/engine/test_graph_stress.py

The order of events follows a crash: a sampler of a compiled network ran, then a network under
torch.compile(mode="reduce-overhead") and other samplers were built and ran, then the first sampler ran again.
"""

import functools
import gc
import inspect
import random

import pytest
import torch
from torch import nn

from ddpm_fast.sample import Sampler

pytestmark = pytest.mark.gpu
STEPS = 10
REPLAYS = 500


class Net(nn.Module):
    """Products, convolutions, a norm and a time embedding, large enough for workspaces of cuBLAS and cuDNN."""

    def __init__(self, width=128):
        super().__init__()
        torch.manual_seed(0)
        self.time = nn.Sequential(nn.Linear(1, width), nn.SiLU(), nn.Linear(width, width))
        self.enter, self.inner = nn.Conv2d(3, width, 3, padding=1), nn.Conv2d(width, width, 3, padding=1)
        self.norm, self.mix = nn.GroupNorm(8, width), nn.Linear(width, width)
        self.leave = nn.Conv2d(width, 3, 3, padding=1)

    def forward(self, x, t):
        h = self.enter(x) + self.time(t[:, None].to(x.dtype) / 1000)[..., None, None]
        h = self.inner(nn.functional.silu(self.norm(h)))
        h = h + self.mix(h.flatten(2).transpose(1, 2)).transpose(1, 2).view_as(h)
        return torch.tanh(self.leave(h))


def capture(weight):
    """Return a replay of a graph that is recorded as torch's documentation says."""
    x = torch.randn(256, 256, device="cuda")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        x @ weight
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = torch.tanh(x @ weight)

    def replay():
        graph.replay()
        return y.clone()

    return replay


def poison():
    """Overwrite free memory: what a graph still reads there is NaN from now on."""
    free, _ = torch.cuda.mem_get_info()
    sizes = [size for size in (1 << 12, 1 << 16, 1 << 20, 1 << 24, min(1 << 28, free // 16)) for _ in range(8)]
    held = [torch.full((size // 4,), torch.nan, device="cuda") for size in sizes]
    del held


def churn(seed):
    """Do one of the things that free or reuse memory."""
    [
        torch.cuda.empty_cache,
        torch._C._cuda_clearCublasWorkspaces,
        gc.collect,
        poison,
        lambda: capture(torch.randn(256, 256, device="cuda"))(),
        torch.cuda.synchronize,
    ][seed % 6]()


@pytest.fixture
def liveness(monkeypatch):
    """Let torch itself look after the inputs of graphs, where it can."""
    if "check_input_liveness" in inspect.signature(torch.cuda.graph).parameters:
        monkeypatch.setattr(torch.cuda, "graph", functools.partial(torch.cuda.graph, check_input_liveness=True))


@pytest.mark.usefixtures("liveness")
def test_replays_in_any_order_give_what_they_gave_first():
    model = Net().cuda().eval()
    low = {"dtype": torch.bfloat16}
    samplers, actors = [], {}

    def add(name, batch, **options):
        sampler = Sampler(model, (batch, 3, 16, 16), num_inference_steps=STEPS, execution="graph", **options)
        samplers.append(sampler)
        actors[name] = lambda: sampler(seeds=7, progress=False)
        return actors[name]()

    first = {}
    first["compiled 32"] = add("compiled 32", 32, compile=True, optimize="hoist", memory_format="auto", **low)
    trees = torch.compile(Net().cuda().eval(), mode="reduce-overhead")
    x, t = torch.randn(32, 3, 16, 16, device="cuda"), torch.full((32,), 3, device="cuda")

    @torch.no_grad()
    def call_trees():
        torch.compiler.cudagraph_mark_step_begin()
        return trees(x, t).clone()

    for _ in range(3):
        call_trees()
    actors["graph trees"] = call_trees
    for batch in (1, 4, 32):
        first[f"plain {batch}"] = add(f"plain {batch}", batch, optimize=None)
        first[f"hoisted {batch}"] = add(f"hoisted {batch}", batch, optimize="hoist", memory_format="channels_last")
    first["compiled 1"] = add("compiled 1", 1, compile=True, optimize=None, **low)
    first["speculative 2"] = add("speculative 2", 2, speculate={0: 2, 300: 4})
    actors["own capture"] = capture(torch.randn(256, 256, device="cuda"))
    for name in ("graph trees", "own capture"):
        first[name] = actors[name]()

    order = random.Random(0)
    for number in range(REPLAYS // STEPS):
        churn(order.randrange(6))
        name = order.choice(sorted(actors))
        result = actors[name]()
        assert torch.equal(result, first[name]), f"{name} differs in draw {number}"
    torch._dynamo.reset()  # drops the caches of compiled functions
    gc.collect()
    churn(0)
    poison()
    for name in ("compiled 32", "compiled 1"):
        assert torch.equal(actors[name](), first[name]), name
