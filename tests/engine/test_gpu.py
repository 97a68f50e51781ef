"""The real thing on a CUDA GPU: graph, kernels, streams. Skipped, visibly, without one: `pytest -m gpu` runs them."""

import contextlib
import gc
import logging

import pytest
import torch

import ddpm_fast.engine.graph
from ddpm_fast.adapters.runner import Options, Runner
from ddpm_fast.config import SamplerConfig
from ddpm_fast.engine.call import Call
from ddpm_fast.engine.execution import Execution
from ddpm_fast.engine.graph import CaptureError, GraphPool, StepGraph
from ddpm_fast.engine.tf32 import tf32
from ddpm_fast.kernels import normal, q_sample, to_uint8
from ddpm_fast.kernels.philox import Stream
from ddpm_fast.models.checkpoint import load_checkpoint
from ddpm_fast.sample import Sampler, sample
from ddpm_fast.seeding import seed_tensor
from ddpm_fast.table import Clipping, build_table
from tests.support.networks import Wavy

pytestmark = pytest.mark.gpu
SHAPE = (4, 2, 9, 7)


def on_gpu():
    return Wavy(2, 2).cuda()


@pytest.fixture
def exact_matmul():
    """float32 products without TF32, so that CPU and GPU differ by rounding alone."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def assert_same_noise(actual, expected):
    """Up to the approximations of a GPU (tests/kernels/test_approximations.py)."""
    error = (actual - expected).abs()
    assert error.max() < 6.1e-4
    assert (error > 2e-5).double().mean() < 2e-3


def test_noise_is_the_same_on_both_devices():
    seeds, ids = seed_tensor([0, 1, 2**64 - 1]), torch.tensor([0, 5, 999])
    for shape in ((3, 32, 32), (1, 5), (1000, 1003)):
        on_cpu = normal(seeds, ids, Stream.STEP, shape)
        on_device = normal(seeds.cuda(), ids.cuda(), Stream.STEP, shape)
        assert_same_noise(on_device.cpu(), on_cpu)


def test_forward_noising_and_bytes_are_the_same_on_both_devices():
    x0 = torch.rand(3, 3, 17, 19) * 2 - 1
    alphas_cumprod = torch.linspace(0.9999, 1e-5, 1000, dtype=torch.float64)
    t, seeds = torch.tensor([0, 500, 999]), seed_tensor([1, 2, 3])
    on_cpu = q_sample(x0, t, alphas_cumprod, seeds=seeds)
    on_device = q_sample(x0.cuda(), t.cuda(), alphas_cumprod.cuda(), seeds=seeds.cuda())
    assert_same_noise(on_device.cpu(), on_cpu)
    for rounding in ("round", "truncate"):
        assert torch.equal(to_uint8(x0.cuda(), rounding=rounding).cpu(), to_uint8(x0, rounding=rounding))


@pytest.mark.parametrize("options", [{}, {"variance_type": "fixed_large"}, {"sampler": "ddim", "eta": 0.7}], ids=str)
@pytest.mark.usefixtures("exact_matmul")
def test_a_thousand_steps_make_the_same_image_on_both_devices(options):
    on_device = sample(on_gpu(), SHAPE, seeds=3, execution="graph", **options)
    torch.testing.assert_close(on_device.cpu(), sample(Wavy(2, 2), SHAPE, seeds=3, **options), atol=1e-3, rtol=0)


@pytest.mark.parametrize("stride", [1, 7])
@pytest.mark.parametrize("source", ["seeds", "generator"])
def test_the_graph_equals_eager_and_replays_differ(stride, source):
    def noise(seed):
        return {"seeds": seed} if source == "seeds" else {"generator": torch.Generator("cuda").manual_seed(seed)}

    sampler = Sampler(on_gpu(), SHAPE, num_inference_steps=50, execution="graph", steps_per_replay=stride)
    eager = Sampler(on_gpu(), SHAPE, num_inference_steps=50, execution="eager")
    for seed in (1, 2):
        torch.testing.assert_close(sampler(**noise(seed)), eager(**noise(seed)), atol=1e-5, rtol=0)
    assert not torch.equal(sampler(**noise(1)), sampler(**noise(2)))


@pytest.mark.parametrize(
    "options",
    [
        {"variance_type": "learned_range"},
        {"thresholding": True, "sample_max_value": 2.0},
        {"guidance_scale": 2.0, "model_kwargs": {"shift": 0.5}, "uncond_kwargs": {"shift": 0.5}},
        {"output": "x0"},
        {"backend": "torch"},
        {"dtype": torch.bfloat16},
    ],
    ids=lambda options: next(iter(options)),
)
def test_every_option_is_captured(options):
    model = Wavy(2, 4 if "variance_type" in options else 2).cuda()
    walks = [
        sample(model, SHAPE, seeds=1, num_inference_steps=20, execution=execution, **options)
        for execution in ("graph", "eager")
    ]
    if "output" in options:
        walks = [walk.frames for walk in walks]
    torch.testing.assert_close(*walks, atol=1e-4, rtol=0)


@pytest.mark.parametrize("shape", [(3, 2), (2, 2, 17), (1, 2, 3, 4, 5)], ids=str)
def test_any_rank(shape):
    walks = [
        sample(on_gpu(), shape, seeds=1, num_inference_steps=20, execution=execution)
        for execution in ("graph", "eager")
    ]
    torch.testing.assert_close(*walks, atol=1e-5, rtol=0)


def test_a_cpu_generator_feeds_a_gpu_walk():
    noise = [torch.Generator().manual_seed(4) for _ in range(2)]
    on_device = sample(on_gpu(), SHAPE, generator=noise[0], num_inference_steps=20, execution="graph")
    on_cpu = sample(Wavy(2, 2), SHAPE, generator=noise[1], num_inference_steps=20)
    torch.testing.assert_close(on_device.cpu(), on_cpu, atol=1e-4, rtol=0)


def test_new_conditioning_is_seen_by_the_next_replay():
    shift = torch.zeros(4, 1, 1, 1, device="cuda")
    sampler = Sampler(on_gpu(), SHAPE, num_inference_steps=10, execution="graph", model_kwargs={"shift": shift})
    before = sampler(seeds=0)
    after = sampler(seeds=0, model_kwargs={"shift": shift + 0.5})
    assert not torch.equal(before, after)
    eager = sample(
        on_gpu(), SHAPE, seeds=0, num_inference_steps=10, execution="eager", model_kwargs={"shift": shift + 0.5}
    )
    torch.testing.assert_close(after, eager, atol=1e-5, rtol=0)


def test_a_model_without_parameters_goes_to_the_gpu():
    assert sample(lambda x, t: torch.tanh(x), SHAPE, seeds=0, num_inference_steps=3).is_cuda


def test_the_embedded_model_draws_the_same_moons_on_both_devices():
    on_cpu, on_device = load_checkpoint(), load_checkpoint(device="cuda")
    options = {"seeds": 0, "config": on_cpu.diffusion}
    images = sample(on_device.model, (4, *on_device.shape), execution="graph", **options)
    torch.testing.assert_close(images.cpu(), sample(on_cpu.model, (4, *on_cpu.shape), **options), atol=0.02, rtol=0)


def test_nothing_waits_for_the_device_between_the_first_and_the_last_replay(monkeypatch):
    sampler = Sampler(on_gpu(), SHAPE, num_inference_steps=50, execution="graph")
    sampler(seeds=0)
    (graph,) = sampler.loop._graphs.values()
    replay, calls = graph.replay, []

    def watched():
        torch.cuda.set_sync_debug_mode("error" if len(calls) < 49 else "default")
        calls.append(None)
        replay()

    monkeypatch.setattr(graph, "replay", watched)
    try:
        sampler(seeds=1, progress=True)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(calls) == 50


def test_a_network_that_waits_for_the_device_is_reported(caplog):
    class Waiting(Wavy):
        def forward(self, x, t):
            return super().forward(x, t) * float(x.abs().max() > 0)

    before = torch.cuda.current_stream()
    with caplog.at_level(logging.WARNING, "ddpm_fast"):
        x = sample(Waiting(2, 2).cuda(), SHAPE, seeds=0, num_inference_steps=5)
    assert "cannot be captured in a CUDA graph" in caplog.text
    assert "(test_gpu.py, line" in caplog.text
    assert "return super().forward(x, t) * float(x.abs().max() > 0)" in caplog.text
    assert torch.cuda.current_stream() == before
    torch.randn(3, device="cuda")
    torch.testing.assert_close(x, sample(on_gpu(), SHAPE, seeds=0, num_inference_steps=5, execution="eager"))
    with pytest.raises(RuntimeError, match="cannot be captured"):
        sample(Waiting(2, 2).cuda(), SHAPE, seeds=0, num_inference_steps=5, execution="graph")


def test_a_capture_that_breaks_leaves_no_trace(monkeypatch):
    """What breaks is a wait that the warm-up did not show."""
    monkeypatch.setattr(ddpm_fast.engine.graph, "host_waits", lambda: contextlib.nullcontext([]))
    x, linear, own = torch.ones(64, 64, device="cuda"), torch.nn.Linear(64, 64).cuda(), torch.Generator("cuda")

    def waiting():
        return float(linear(x).sum())

    def draws():
        torch.manual_seed(5)
        own.manual_seed(6)
        return torch.randn(99, device="cuda"), torch.randn(99, device="cuda", generator=own)

    expected, stream, pool = draws(), torch.cuda.current_stream(), GraphPool()
    sampler = Sampler(on_gpu(), SHAPE, num_inference_steps=10, execution="graph")
    image = sampler(seeds=1, progress=False)
    torch.cuda.empty_cache()
    reserved = torch.cuda.memory_reserved()
    for _ in range(20):
        with pytest.raises(CaptureError, match="operation"):
            StepGraph(waiting, x.device, pool)
    gc.collect()
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() <= reserved + (64 << 20)  # cuBLAS' workspaces of the current stream
    assert torch.cuda.current_stream() == stream
    for value, other in zip(draws(), expected, strict=True):
        assert torch.equal(value, other)
    assert torch.equal(sampler(seeds=1, progress=False), image)  # a graph that was recorded before
    y = torch.zeros(64, 64, device="cuda")
    again = StepGraph(lambda: y.copy_(linear(x)), x.device, pool)  # into the pool of the broken captures
    again.replay()
    torch.testing.assert_close(y, linear(x))
    side, blocks = torch.cuda.Stream(), set()
    for _ in range(20):  # an allocator that still records never takes back what another stream has used
        with torch.cuda.stream(side):
            used = torch.zeros(1 << 20, device="cuda")
        used.record_stream(stream)
        blocks.add(used.data_ptr())
        del used
        torch.cuda.synchronize()
    assert len(blocks) < 20


def test_a_network_that_draws_follows_the_callers_generator():
    class Noisy(Wavy):
        def forward(self, x, t):
            return super().forward(x, t) + 0.1 * torch.randn_like(x)

    model = Noisy(2, 2).cuda()
    samplers = [Sampler(model, SHAPE, num_inference_steps=10, execution=execution) for execution in ("graph", "eager")]
    for seed in (1, 2):
        images = []
        for sampler in samplers:
            torch.manual_seed(seed)
            images.append(sampler(seeds=0, progress=False))
        torch.testing.assert_close(*images, atol=1e-5, rtol=0)


def test_weights_changed_in_place_are_seen_by_the_next_replay():
    model = on_gpu()
    sampler = Sampler(model, SHAPE, num_inference_steps=10, execution="graph")
    before = sampler(seeds=0)
    with torch.no_grad():
        model.mix.mul_(0.5)
    after = sampler(seeds=0)
    assert not torch.equal(before, after)
    torch.testing.assert_close(after, sample(model, SHAPE, seeds=0, num_inference_steps=10, execution="eager"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_networks_keep_a_float32_state(dtype):
    checkpoint = load_checkpoint(device="cuda")
    shape = (4, *checkpoint.shape)
    low = sample(checkpoint.model, shape, seeds=0, dtype=dtype, execution="graph", config=checkpoint.diffusion)
    high = sample(checkpoint.model, shape, seeds=0, execution="graph", config=checkpoint.diffusion)
    assert low.dtype == torch.float32
    assert 0 < (low - high).abs().mean() < 0.05


def test_nan_is_found_and_its_step_named():
    class Breaking(Wavy):
        def forward(self, x, t):
            return torch.where((t == 40).view(-1, 1, 1, 1), torch.nan, super().forward(x, t))

    with pytest.raises(FloatingPointError, match=r"step 5 of 10 \(timestep 40\)"):
        sample(Breaking(2, 2).cuda(), SHAPE, seeds=0, timesteps=range(90, -1, -10))


class Net(torch.nn.Module):
    """Convolutions and a time embedding: something to hoist, to lay out and to compile."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = torch.nn.Conv2d(3, 32, 3, padding=1), torch.nn.Conv2d(32, 3, 3, padding=1)
        self.time, self.prompt = torch.nn.Linear(1, 32), torch.nn.Linear(4, 32)

    def forward(self, x, t, c=None):
        emb = torch.sin(self.time(t[:, None] / 100))
        emb = emb if c is None else emb * self.prompt(c)
        return torch.tanh(self.last(torch.nn.functional.silu(self.first(x) + emb[..., None, None])))


IMAGES = (4, 3, 16, 16)


@pytest.mark.parametrize(
    "how",
    [
        {"optimize": "hoist"},
        {"optimize": "fuse"},
        {"optimize": "fuse", "steps_per_replay": 5},
        {"optimize": "fuse", "dtype": torch.bfloat16},
        {"memory_format": "channels_last"},
        {"memory_format": "auto"},
        {"compile": True},
        {"compile": True, "memory_format": "channels_last"},
        {"compile": True, "optimize": None},
        {"optimize": "hoist", "steps_per_replay": 5},
        {"dtype": torch.bfloat16, "memory_format": "auto", "compile": True},
    ],
    ids=str,
)
@pytest.mark.usefixtures("exact_matmul")
def test_no_way_to_execute_changes_the_samples(how):
    model = Net().cuda()
    options = {"num_inference_steps": 20, "progress": False, "seeds": 1}
    dtype = {"dtype": how["dtype"]} if "dtype" in how else {}
    expected = sample(model, IMAGES, execution="eager", optimize=None, **dtype, **options)
    got = sample(model, IMAGES, execution="graph", **how, **options)
    torch.testing.assert_close(got, expected, atol=0.1 if dtype else 1e-4, rtol=0)


class Product(torch.nn.Module):
    """One product of matrices or of a convolution, large enough for TF32: its result then differs by up to 1e-3."""

    def __init__(self, kind):
        super().__init__()
        torch.manual_seed(0)
        self.product = torch.nn.Linear(512, 512) if kind == "matmul" else torch.nn.Conv2d(256, 256, 3, padding=1)

    def forward(self, x, t):
        return torch.tanh(self.product(x))


PRODUCTS = {"matmul": (64, 8, 512), "convolution": (8, 256, 16, 16)}
needs_tf32 = pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 0), reason="this GPU has no TF32"
)


@needs_tf32
@pytest.mark.parametrize("process", [False, True, None])
@pytest.mark.parametrize("allowed", [False, True])
@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize("kind", PRODUCTS)
@torch.no_grad()
def test_products_are_taken_in_tf32_where_that_is_allowed(kind, recorded, allowed, process):
    """Against float64, in an eager call and in a graph's, whatever the process is set to (None: as torch is)."""
    product = Product(kind).product
    x = torch.randn(PRODUCTS[kind])
    expected = product.double()(x.double())
    product, x, result = product.float().cuda(), x.cuda(), torch.zeros(expected.shape, device="cuda")

    def body():
        result.copy_(product(x))

    with tf32(process):
        with tf32(allowed):
            graph = StepGraph(body, x.device) if recorded else None
            if graph is None:
                body()
        if graph is not None:  # the precision was recorded: a replay needs no setting
            result.zero_()
            graph.replay()
    error = (result.cpu() - expected).abs().max() / expected.std()  # rounding: about 2e-6; TF32: about 1.5e-3
    assert error > 3e-4 if allowed else error < 1e-4


@needs_tf32
@pytest.mark.parametrize("execution", ["graph", "eager"])
@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("kind", PRODUCTS)
def test_tf32_is_what_the_option_says(kind, compile, execution):
    model = Product(kind).cuda()
    options = {"num_inference_steps": 3, "progress": False, "seeds": 1}
    exact, coarse, again = (
        sample(model, PRODUCTS[kind], tf32=allowed, execution=execution, compile=compile, **options)
        for allowed in (False, True, False)
    )
    assert 2e-4 < (exact - coarse).abs().max() < 0.05  # with inputs cut to 10 bits on a CPU: 6e-3
    assert torch.equal(exact, again)
    on_cpu = sample(Product(kind), PRODUCTS[kind], **options)
    torch.testing.assert_close(exact.cpu(), on_cpu, atol=1e-4, rtol=0)


class Timed(Product):
    """A product that depends on the timestep alone, to be hoisted, and one that depends on x."""

    def __init__(self):
        super().__init__("matmul")
        self.time = torch.nn.Linear(512, 512)

    def forward(self, x, t):
        waves = torch.sin(t[:, None] * torch.linspace(0, 1, 512, device=t.device))
        return super().forward(x + self.time(waves)[:, None], t)


@needs_tf32
@pytest.mark.parametrize(
    "how",
    [
        {"optimize": None},
        {"optimize": "hoist"},
        {"optimize": "hoist", "compile": True},
        {"optimize": "hoist", "speculate": {0: 1, 300: 2}},
    ],
    ids=str,
)
def test_what_the_process_is_set_to_does_not_matter(how):
    model, images = Timed().cuda(), []
    for process in (False, True):
        with tf32(process):
            images.append(sample(model, PRODUCTS["matmul"], num_inference_steps=3, seeds=1, tf32=False, **how))
    assert torch.equal(*images)


def test_hoisted_conditions_and_parameters_are_seen_by_the_next_replay():
    model, steps = Net().cuda(), {"num_inference_steps": 10}
    c = torch.randn(3, 4, 4, device="cuda")
    sampler = Sampler(model, IMAGES, execution="graph", optimize="hoist", model_kwargs={"c": c[0]}, **steps)
    for number in range(3):
        images = sampler(seeds=number, model_kwargs={"c": c[number]}, progress=False)
        eager = sample(model, IMAGES, seeds=number, model_kwargs={"c": c[number]}, execution="eager", **steps)
        torch.testing.assert_close(images, eager, atol=1e-4, rtol=0)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(0.9)
    model.load_state_dict({name: value * 0.5 for name, value in model.state_dict().items()}, assign=True)
    replaced = sampler(seeds=0, progress=False, model_kwargs={"c": c[0]})
    eager = sample(model, IMAGES, seeds=0, model_kwargs={"c": c[0]}, execution="eager", **steps)
    torch.testing.assert_close(replaced, eager, atol=1e-4, rtol=0)


def test_graphs_of_several_shapes_share_their_memory():
    """Interleaved walks of three batch sizes: what one graph leaves in the pool, another overwrites."""
    runner = Runner(Options("philox", Execution(execution="graph")))
    model, table = Net().cuda(), build_table(SamplerConfig(num_inference_steps=20))
    alone = {}
    for batch in (1, 16, 64, 16, 1, 64, 1):
        shape = (batch, 3, 32, 32)
        with runner.alone() as own:
            call = Call.of(model, shape, device="cuda:0")
            loop = own.loop(call, table, Clipping(1.0), owner=model)
            x = loop.run(own.noise(None, loop, seeds=7), progress=False)
        if batch not in alone:
            alone[batch] = sample(model, shape, seeds=7, num_inference_steps=20, execution="eager", progress=False)
        torch.testing.assert_close(x, alone[batch], atol=1e-4, rtol=0)
    assert len(runner._loops) == 3


def test_where_memory_ends_the_message_says_what_was_needed(caplog):
    total = torch.cuda.get_device_properties(0).total_memory

    class Greedy(Wavy):
        """Fits only as long as it is called outside of a recording."""

        def forward(self, x, t):
            if torch.cuda.is_current_stream_capturing():
                torch.empty(2 * total, dtype=torch.uint8, device="cuda")
            return super().forward(x, t)

    model = Greedy(2, 2).cuda()
    with caplog.at_level(logging.WARNING, "ddpm_fast"):
        x = sample(model, SHAPE, seeds=0, num_inference_steps=6, steps_per_replay=3, progress=False)
    said = [record.message for record in caplog.records]
    assert len(said) == 2
    assert "graph of 3 steps does not fit into memory" in said[0]
    assert "Tried to allocate" in said[0]
    assert said[0].endswith("recording one step")
    assert said[1].endswith("running eagerly")
    torch.testing.assert_close(x, sample(on_gpu(), SHAPE, seeds=0, num_inference_steps=6, execution="eager"))


def test_freed_graphs_give_their_memory_back():
    model = Net().cuda()
    sampler = Sampler(model, (64, 3, 64, 64), num_inference_steps=5, execution="graph")
    sampler(seeds=0, progress=False)
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    sampler.free()
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() < before


SPECULATED = {"speculate": {0: 2, 100: 8, 500: 16}, "output": "result", "progress": False}


def test_speculation_in_a_graph_is_that_run_eagerly():
    """The same seeds and windows give the same images where the arithmetic is the same.

    One window for all steps makes all calls of one width, in a graph and eagerly, and TF32 is off. Calls of several
    widths may be wider in a graph, which looks at the positions less often; their products round differently.
    """
    model = load_checkpoint(device="cuda").model
    options = {**SPECULATED, "speculate": 8, "tf32": False}
    graph, eager = (
        sample(model, (3, 1, 32, 32), seeds=0, execution=execution, **options) for execution in ("graph", "eager")
    )
    assert graph.speculation.calls == eager.speculation.calls < 500
    torch.testing.assert_close(graph.sample, eager.sample, rtol=1e-5, atol=1e-5)


def test_speculation_in_graphs_of_several_widths_is_repeatable():
    model = load_checkpoint(device="cuda").model
    first, again = (sample(model, (3, 1, 32, 32), seeds=0, execution="graph", **SPECULATED) for _ in range(2))
    assert torch.equal(again.sample, first.sample)
    assert first.speculation.calls < 300


def test_speculation_measures_and_is_worth_it_for_one_sample():
    checkpoint = load_checkpoint("digits", device="cuda")
    sampler = Sampler(
        checkpoint.model, (1, 1, 8, 8), config=checkpoint.diffusion, speculate=True,
        model_kwargs={"class_labels": torch.tensor([3])},
    )  # fmt: skip
    found = sampler(seeds=0, output="result", progress=False)
    assert bool(torch.isfinite(found.sample).all())
    assert found.speculation.calls < 500


def test_speculation_under_autocast_in_channels_last():
    model = load_checkpoint(device="cuda").model
    options = {**SPECULATED, "dtype": torch.bfloat16, "memory_format": "channels_last", "optimize": "hoist"}
    x = sample(model, (2, 1, 32, 32), seeds=0, **options).sample
    assert x.dtype == torch.float32
    assert x.min() >= -1.01
    assert x.max() <= 1.01
