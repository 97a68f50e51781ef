"""The networks that people bring: what leaves their loops, and that nothing else changes."""

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("denoising_diffusion_pytorch")

from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler, DiTPipeline, UNet2DConditionModel, UNet2DModel

from ddpm_fast import accelerate
from ddpm_fast.engine.hoist import Hoisted
from ddpm_fast.engine.trace import needed_by
from ddpm_fast.models.checkpoint import load_checkpoint
from tests.adapters import diffusers_models, lucidrains_models

TIMES = [999, 700, 350, 20, 0]
BLOCKS = {"block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4}


def unet_2d_condition():
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8, cross_attention_dim=6, attention_head_dim=4, **BLOCKS,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip


def classes_unet():
    torch.manual_seed(0)
    return UNet2DModel(sample_size=8, in_channels=3, out_channels=3, num_class_embeds=10, **diffusers_models.CONFIG)


LABELS = {"class_labels": torch.tensor([1, 7, 1])}
# network, channels, keywords, tables, and classes that must have something: of t, of the condition or nothing, of both
FAMILIES = {
    "diffusers UNet2DModel": (diffusers_models.unet, 3, {}, 8, (True, True, False)),
    "diffusers UNet2DModel, classes": (classes_unet, 3, LABELS, 8, (True, True, True)),
    "diffusers UNet2DConditionModel": (
        unet_2d_condition, 4, {"encoder_hidden_states": torch.randn(3, 5, 6)}, 8, (True, True, False),
    ),
    "diffusers DiTTransformer2DModel": (diffusers_models.transformer, 4, LABELS, 14, (True, True, True)),
    "lucidrains Unet": (lucidrains_models.unet, 3, {}, 22, (True, True, False)),
    "our own": (lambda: load_checkpoint().model, 1, {}, 18, (True, True, False)),
}  # fmt: skip


def tensor_of(output):
    return output if isinstance(output, torch.Tensor) else output.sample


def made(name, dtype=torch.float32):
    make, channels, kwargs, tables, classes = FAMILIES[name]
    network = make().eval()
    torch.manual_seed(1)
    for parameter in network.parameters():  # some begin as zeros, and hide what they are multiplied with
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    kwargs = {key: value.to(dtype) if value.is_floating_point() else value for key, value in kwargs.items()}
    return network.to(dtype), torch.randn(3, channels, 8, 8, dtype=dtype), kwargs, tables, classes


@pytest.mark.parametrize("name", FAMILIES)
def test_how_much_leaves(name):
    network, x, kwargs, _, classes = made(name)
    counts = Hoisted(network, x, TIMES, kwargs).counts
    assert (counts.of_t > 0, counts.of_condition > 0, counts.of_both > 0) == classes
    assert counts.neutral > 0
    assert counts.after < 0.75 * counts.before


@pytest.mark.parametrize(
    ("name", "dtype"),
    # lucidrains' Unet makes its time embedding in float32 and cannot run in bfloat16, hoisted or not.
    [(name, torch.float32) for name in FAMILIES]
    + [(name, torch.bfloat16) for name in FAMILIES if not name.startswith("lucidrains")],
)
def test_the_results_are_the_networks(name, dtype):
    network, x, kwargs, *_ = made(name, dtype)
    hoisted = Hoisted(network, x, TIMES, kwargs)
    allowed = 1e-5 if dtype == torch.float32 else 0.02
    with torch.no_grad():
        for times, row in (
            (torch.full((3,), 350), 2),
            (torch.full((3,), 350), None),
            (torch.tensor([0, 999, 700]), None),
        ):
            expected = tensor_of(network(x, times, **kwargs)).float()
            difference = (hoisted(x, times, row).float() - expected).abs().max()
            assert difference <= allowed * expected.abs().max()


@pytest.mark.parametrize("name", FAMILIES)
def test_every_table_is_read(name):
    network, x, kwargs, tables, _ = made(name)
    hoisted = Hoisted(network, x, TIMES, kwargs)
    assert hoisted.counts.tables == tables
    times = torch.full((3,), TIMES[1])
    with torch.no_grad():
        expected = hoisted(x, times)
        for bank in hoisted._banks:
            start = 0
            for size in bank.sizes:
                kept = bank.table.values.clone()
                bank.table.values[:, start : start + size] += torch.randn(size)
                assert not torch.allclose(hoisted(x, times), expected, rtol=1e-4, atol=1e-6)
                bank.table.values.copy_(kept)
                start += size


@pytest.mark.parametrize("name", FAMILIES)
def test_one_trace_serves_all_batch_sizes(name, exports):
    network, x, kwargs, tables, _ = made(name)
    filled = set()
    for batch in (3, 1, 2, 8, 64):
        rows = torch.arange(batch) % 3
        sized = {key: value[rows] for key, value in kwargs.items()}
        hoisted = Hoisted(network, x[rows], TIMES, sized)
        assert hoisted.counts.tables == tables
        filled.update(id(bank.table) for bank in hoisted._banks if not bank.conditional)
        times = torch.tensor(TIMES)[torch.arange(batch) % len(TIMES)]
        with torch.no_grad():
            expected = tensor_of(network(x[rows], times, **sized))
            torch.testing.assert_close(hoisted(x[rows], times), expected, rtol=1e-4, atol=1e-5)
    assert exports == [61]
    assert len(filled) == len([bank for bank in hoisted._banks if not bank.conditional])  # shared


def test_an_accelerated_object_traces_once(exports):
    pipe = accelerate(DDPMPipeline(diffusers_models.unet(), DDPMScheduler()), optimize="hoist")
    for batch in (1, 3, 2):
        pipe(batch_size=batch, num_inference_steps=2, output_type="np")
    assert exports == [61]


def test_accelerated_pipelines():
    stock = DDPMPipeline(diffusers_models.unet(), DDPMScheduler())
    fast = accelerate(stock, optimize="hoist")
    options = {"batch_size": 2, "num_inference_steps": 10, "output_type": "pt"}
    images = [one(generator=torch.manual_seed(0), **options).images for one in (stock, fast)]
    assert fast._runner.last_loop.network.hoisted is not None
    assert torch.allclose(*images, atol=1e-4)


def test_accelerated_dit():
    pipeline = DiTPipeline(diffusers_models.transformer(), diffusers_models.vae(), DDIMScheduler())
    fast = accelerate(pipeline, optimize="hoist")
    for labels in ([1, 7], [3, 3]):
        options = {"class_labels": labels, "num_inference_steps": 5, "output_type": "np"}
        images = [torch.tensor(one(generator=torch.manual_seed(0), **options).images) for one in (pipeline, fast)]
        assert fast._runner.last_loop.network.hoisted.counts.of_both > 0
        assert torch.allclose(*images, atol=1e-4)


def test_accelerated_lucidrains():
    theirs = lucidrains_models.calm()
    theirs.model = lucidrains_models.unet()
    fast = accelerate(theirs, optimize="hoist")
    images = []
    for one in (theirs, fast):
        torch.manual_seed(0)
        images.append(one.sample(2))
    assert fast._runner.last_loop.network.hoisted is not None
    assert torch.allclose(*images, atol=1e-4)


def test_ddpm_cifar10s_linears_and_silus_leave():
    """The layers of google/ddpm-cifar10-32, with fewer channels."""
    torch.manual_seed(0)
    network = UNet2DModel(
        sample_size=32, block_out_channels=(8, 16, 16, 16), layers_per_block=2, downsample_padding=0,
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"), attention_head_dim=None,
        norm_num_groups=4, norm_eps=1e-6, flip_sin_to_cos=False, freq_shift=1,
    ).eval()  # fmt: skip
    hoisted = Hoisted(network, torch.randn(1, 3, 32, 32), TIMES)
    (bank,) = hoisted._banks
    gone = [str(node.target) for node in needed_by(bank.nodes)]
    assert (gone.count("aten.linear.default"), gone.count("aten.silu.default")) == (24, 23)
    assert hoisted.counts.tables == 22
