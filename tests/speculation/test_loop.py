"""Speculative walks: their law, what breaks it, what they cost, and what they refuse."""

import json
import math

import numpy as np
import pytest
import torch
from scipy import stats

from ddpm_fast.config import SamplerConfig
from ddpm_fast.data import moons
from ddpm_fast.engine.call import Call
from ddpm_fast.engine.graph import CaptureError
from ddpm_fast.engine.noise import PhiloxNoise
from ddpm_fast.kernels.rounds import Outcome, Position
from ddpm_fast.models.checkpoint import load_checkpoint
from ddpm_fast.models.ideal import IdealDenoiser
from ddpm_fast.sample import Sampler, sample
from ddpm_fast.speculation import loop as speculation
from ddpm_fast.speculation.loop import SpeculativeLoop
from ddpm_fast.speculation.windows import WindowPlan
from ddpm_fast.table import Clipping, StepTable, build_table
from tests.engine.test_graph import Replayed
from tests.speculation.problems import (
    CPU,
    TABLE,
    Gaussian,
    Mixture,
    gaussian_p_values,
    mixture_p_value,
    walk,
)  # fmt: skip

CHAINS = 20_000
BY_T = {0: 4, 10: 8, 30: 16}
QUIET = {"progress": False}

# The law


@pytest.mark.parametrize("windows", [8, BY_T], ids=str)
def test_the_law_of_a_mixture(windows):
    x, did = walk(Mixture(), CHAINS, 1, windows)
    assert mixture_p_value(x) > 1e-3
    assert 0.5 < did.acceptance.min() < did.acceptance.mean() < 0.99  # neither trivial nor hopeless
    assert did.calls < 0.5 * len(TABLE)


def test_the_law_of_a_gaussian():
    model = Gaussian()
    x, did = walk(model, CHAINS, 8, 8)
    assert min(gaussian_p_values(x, model.law())) > 1e-3 / 10
    assert did.acceptance.mean() < 0.95


def without_reflection(loop):
    decide = loop._decide

    def spoilt(*given, factor, **more):
        decide(*given, factor=factor, **more)
        factor.zero_()

    loop._decide = spoilt


def with_noise_drawn_anew(loop):
    """At a rejection: not the rejected noise, reflected, but fresh noise."""
    commit, generator = loop._commit, torch.Generator().manual_seed(7)

    def spoilt(x, drafts, noise, guess, output, progress, factor, *given, **more):
        at = torch.arange(len(x)), (progress[:, Position.TAKEN].long() - 1).clamp(min=0)
        fresh = torch.randn(noise[at].shape, generator=generator)
        rejected = (progress[:, Position.OUTCOME] == Outcome.REJECTED).view(-1, 1, 1)
        noise[at] = torch.where(rejected, fresh, noise[at])
        commit(x, drafts, noise, guess, output, progress, torch.zeros_like(factor), *given, **more)

    loop._commit = spoilt


def with_guesses_from_the_future(loop):
    """All guesses are the estimate at the last draft, which the noise of later rows has made."""
    draft = loop._draft

    def spoilt(x, guess, progress, *given, **more):
        last = torch.arange(len(x)), (progress[:, Position.EVALUATED].long() - 1).clamp(min=0)
        guess.copy_(guess[last][:, None].expand_as(guess))
        draft(x, guess, progress, *given, **more)

    loop._draft = spoilt


@pytest.mark.parametrize("spoil", [without_reflection, with_noise_drawn_anew, with_guesses_from_the_future])
def test_broken_laws_are_rejected(spoil):
    model = Gaussian()
    x, _ = walk(model, CHAINS, 8, 8, spoil=spoil)
    assert min(gaussian_p_values(x, model.law())) < 1e-20
    if spoil is not with_guesses_from_the_future:
        x, _ = walk(Mixture(), CHAINS, 1, 8, spoil=spoil)
        assert mixture_p_value(x) < 1e-20


def one_step(length, chains, size=3):
    """Noise that is committed by one step whose two means are `length` deviations apart, and how often it is rejected.

    The step's table: x' = x0 / 2 + x / 2 + z / 2, then a step that changes nothing and has no noise. The network always
    says `away`, the guess is 0; so D = away, along the diagonal.
    """
    away = torch.full((size,), length / math.sqrt(size))
    table = StepTable.of(
        np.array([1, 0]), {"b": [1, 1], "c_x0": [0.5, 0], "c_x": [0.5, 1], "sigma": [0.5, 0]}, draws=[True, False]
    )
    shape = (chains, 1, size)
    call = Call.of(lambda x, t: away.expand_as(x), shape, device=CPU)
    loop = SpeculativeLoop(call, table, Clipping(), WindowPlan.of(2))
    noise = PhiloxNoise(list(range(chains)), shape, table, CPU, "torch")
    x = loop.run(noise, torch.zeros(shape), **QUIET)
    return ((x - 0.5 * away) / 0.5)[:, 0].double(), 1 - loop.speculation.acceptance[0]


@pytest.mark.parametrize("length", [0.1, 0.5, 1.0, 2.0, 4.0])
def test_the_coupling(length):
    """Committed noise is N(0, I) given D, and rejections are as frequent as the overlap of the Gaussians says."""
    chains = 100_000
    z, rejected = one_step(length, chains)
    expected = 1 - 2 * stats.norm.cdf(-length / 2)
    assert abs(rejected - expected) < 4 * math.sqrt(expected * (1 - expected) / chains)
    p_values = [stats.kstest(column.numpy(), "norm").pvalue for column in z.T]
    p_values.append(stats.kstest(z.square().sum(1).numpy(), "chi2", args=(3,)).pvalue)
    p_values.append(stats.kstest((z.sum(1) / math.sqrt(3)).numpy(), "norm").pvalue)  # along D
    assert min(p_values) > 1e-4


def test_the_embedded_model_against_its_sequential_samples():
    """Digits by the embedded model: pixel means of speculated and sequential draws, and how legible they are."""
    checkpoint = load_checkpoint("digits")
    count = 96
    options = {"config": checkpoint.diffusion, "num_inference_steps": 250, "model_kwargs": {
        "class_labels": torch.arange(count) % 10}, **QUIET}  # fmt: skip
    shape = (count, *checkpoint.shape)
    plain = sample(checkpoint.model, shape, seeds=0, **options)
    speculated = sample(checkpoint.model, shape, seeds=10_000, speculate=8, **options)
    brightness = [x.mean((1, 2, 3)).numpy() for x in (plain, speculated)]
    assert stats.ks_2samp(*brightness).pvalue > 1e-3
    spread = [x.flatten(1).norm(dim=1).numpy() for x in (plain, speculated)]
    assert stats.ks_2samp(*spread).pvalue > 1e-3


# What it costs


class Counting:
    """A model and how it was called."""

    def __init__(self, model):
        self.model, self.rows = model, []

    def __call__(self, x, t, **kwargs):
        self.rows.append(len(x))
        return self.model(x, t, **kwargs)


def test_calls_and_volume_are_what_the_model_saw():
    model = Counting(Mixture())
    x, did = walk(model, 3, 4, BY_T)
    assert did.calls == len(model.rows)
    assert did.volume == pytest.approx(sum(model.rows) / (3 * len(TABLE)))
    assert {rows // 3 for rows in model.rows} <= {4, 8, 16}
    assert x.shape == (3, 4)


def test_few_calls_where_the_guess_is_good():
    """Data of one point: after the first estimate every guess is right, and every draft is accepted."""
    model = Counting(Mixture(centres=(0.3,), weights=(1.0,), deviation=1e-4))
    _, did = walk(model, 2, 4, 16)
    assert did.calls <= math.ceil(len(TABLE) / 16) + 3
    assert did.acceptance.mean() > 0.9


# One row at a time it is the sequential sampler


def networks():
    data = moons.batch(16, seed=3)
    small = torch.nn.functional.avg_pool2d(data, 4)
    return {
        kind: IdealDenoiser(small, SamplerConfig(num_train_timesteps=50).alphas_cumprod(), kind)
        for kind in ("epsilon", "sample", "v_prediction")
    }


CONFIGS = {
    "ddpm": {},
    "large": {"variance_type": "fixed_large"},
    "unclipped": {"clip_sample": False},
    "x0": {"prediction_type": "sample"},
    "v": {"prediction_type": "v_prediction"},
    "thresholding": {"thresholding": True, "sample_max_value": 1.5, "dynamic_thresholding_ratio": 0.9},
    "ddim": {"sampler": "ddim", "eta": 0.7},
    "ddim from x0": {"sampler": "ddim", "eta": 1.0, "ddim_direction": "x0"},
    "ddim v": {"sampler": "ddim", "eta": 0.7, "prediction_type": "v_prediction"},
    "ddim without noise": {"sampler": "ddim", "eta": 0.0},
    "temperature 0": {"temperature": 0.0},
    "30 steps": {"num_inference_steps": 30, "timestep_spacing": "trailing"},
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_walk_of_plain_steps_is_the_sequential_walk(name):
    """Windows of one: the round's arithmetic is that of the step, for every kind of table."""
    fields = {"num_train_timesteps": 50, **CONFIGS[name]}
    model = networks()[fields.get("prediction_type", "epsilon")]
    config = SamplerConfig(**fields)
    expected = sample(model, (3, 1, 8, 8), seeds=5, config=config, **QUIET)
    table = build_table(config)
    call = Call.of(model, (3, 1, 8, 8), device=CPU)
    loop = SpeculativeLoop(call, table, Clipping.of(config), WindowPlan.of(1))
    x = loop.run(PhiloxNoise([5, 6, 7], (3, 1, 8, 8), table, CPU, "torch"), **QUIET)
    torch.testing.assert_close(x, expected, rtol=1e-5, atol=1e-5)
    assert loop.speculation.calls == len(table)


@pytest.mark.parametrize("name", CONFIGS)
def test_drafts_of_every_kind_of_table_are_accepted_where_the_guess_is_right(name):
    """One point of data: the estimate never changes, so speculated and sequential images are one."""
    fields = {"num_train_timesteps": 50, **CONFIGS[name]}
    point = torch.nn.functional.avg_pool2d(moons.batch(1, seed=3), 4)
    config = SamplerConfig(**fields)
    model = IdealDenoiser(point, config.alphas_cumprod(), config.prediction_type)
    found = sample(model, (2, 1, 8, 8), seeds=5, config=config, speculate=8, output="result", **QUIET)
    expected = sample(model, (2, 1, 8, 8), seeds=5, config=config, **QUIET)
    torch.testing.assert_close(found.sample, expected, rtol=1e-3, atol=1e-3)
    noisy = name not in ("ddim without noise", "temperature 0")
    if noisy:
        assert found.speculation.calls < 0.4 * len(build_table(config))


def test_speculate_1_is_the_sequential_sampler_bit_for_bit():
    model = networks()["epsilon"]
    config = SamplerConfig(num_train_timesteps=50)
    expected = sample(model, (3, 1, 8, 8), seeds=5, config=config, **QUIET)
    found = sample(model, (3, 1, 8, 8), seeds=5, config=config, speculate=1, output="result", **QUIET)
    assert torch.equal(found.sample, expected)
    did = found.speculation
    assert (did.windows, did.calls, did.volume, did.acceptance.tolist()) == ({0: 1}, 50, 1.0, [1.0] * 50)


# What a sample depends on


def test_a_sample_depends_on_its_seed_and_the_windows_alone():
    together, _ = walk(Mixture(), 6, 4, BY_T, seed=40)
    for place in range(6):
        alone, _ = walk(Mixture(), 1, 4, BY_T, seed=40 + place)
        torch.testing.assert_close(alone[0], together[place], rtol=1e-5, atol=1e-5)
    again, _ = walk(Mixture(), 6, 4, BY_T, seed=40)
    assert torch.equal(again, together)


def conditional(x, t, labels, scale=1.0):
    """A network whose noise prediction depends on a label for each sample."""
    return 0.3 * x + 0.1 * labels.view(-1, 1, 1, 1) * scale


def test_labels_and_guidance_go_with_their_samples():
    config = SamplerConfig(num_train_timesteps=40)
    labels, none = torch.tensor([0.0, 1.0, 2.0]), torch.zeros(3)
    how = {"config": config, "guidance_scale": [1.0, 2.0, 3.0], "uncond_kwargs": {"labels": none}}
    sampler = Sampler(conditional, (3, 1, 2, 2), model_kwargs={"labels": labels}, speculate=4, **how)
    together = sampler(seeds=0, **QUIET)
    for place in range(3):
        own = {"labels": labels[place : place + 1]}
        alone = Sampler(
            conditional, (1, 1, 2, 2), model_kwargs=own, speculate=4, config=config,
            guidance_scale=[1.0, 2.0, 3.0][place], uncond_kwargs={"labels": none[:1]},
        )(seeds=place, **QUIET)  # fmt: skip
        torch.testing.assert_close(alone[0], together[place], rtol=1e-5, atol=1e-5)
    other = sampler(seeds=0, model_kwargs={"labels": labels + 1}, uncond_kwargs={"labels": none}, **QUIET)
    assert (other - together).abs().max() > 1e-2


def test_a_hoisted_network_draws_the_same():
    checkpoint = load_checkpoint("digits")
    told = {"class_labels": torch.tensor([3, 8])}
    options = {"config": checkpoint.diffusion, "num_inference_steps": 40, "model_kwargs": told, "speculate": 4, **QUIET}
    plain, hoisted = (
        sample(checkpoint.model, (2, 1, 8, 8), seeds=0, optimize=optimize, **options) for optimize in (None, "hoist")
    )
    torch.testing.assert_close(hoisted, plain, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("shape", [(2, 3, 5), (2, 1, 2, 3, 4), (2, 7)], ids=str)
def test_any_rank(shape):
    x = sample(lambda x, t: 0.3 * x, shape, seeds=0, num_train_timesteps=40, speculate=8, **QUIET)
    assert x.shape == shape
    assert bool(torch.isfinite(x).all())


# What it refuses


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"speculate": 0}, ValueError, r"speculate must be an integer in \[1, 1024\], got 0"),
        ({"speculate": 2000}, ValueError, r"speculate must be an integer in \[1, 1024\]"),
        ({"speculate": 2.5}, TypeError, r"speculate is False, True, a window or \{timestep: window\}, got 2.5"),
        ({"speculate": "fast"}, TypeError, "speculate is False, True, a window"),
        ({"speculate": {}}, ValueError, "windows go by timesteps that ascend from 0"),
        ({"speculate": {10: 4}}, ValueError, "windows go by timesteps that ascend from 0"),
        ({"speculate": {0: 4, 2.5: 8}}, ValueError, "a timestep of the windows must be an integer >= 0, got 2.5"),
        ({"speculate": {"x": 4}}, ValueError, "a timestep of the windows must be an integer >= 0, got 'x'"),
        ({"speculate": {0: 0}}, ValueError, r"window must be an integer in \[1, 1024\], got 0"),
        ({"speculate": 8, "variance_type": "learned_range"}, ValueError, "speculate needs a variance that is fixed"),
    ],
)
def test_bad_windows(options, error, says):
    with pytest.raises(error, match=says):
        Sampler(lambda x, t: x, (1, 1, 4, 4), **options)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        ({"generator": torch.Generator()}, "speculate draws its noise from seeds"),
        ({"output": "x0"}, "speculate gives the samples alone"),
        ({"output": "trajectory"}, "speculate gives the samples alone"),
        ({"callback": lambda *_: None}, "speculate gives the samples alone"),
        ({"known": torch.zeros(1, 1, 4, 4), "mask": torch.zeros(1, 1, 4, 4)}, "a known image"),
    ],
)
def test_calls_that_do_not_go_with_it(call, says):
    for windows in (8, 1):  # also where it is the sequential sampler: what True has measured is not to decide
        sampler = Sampler(lambda x, t: 0.3 * x, (1, 1, 4, 4), speculate=windows, num_train_timesteps=20)
        with pytest.raises(ValueError, match=says):
            sampler(**call, **QUIET)


@pytest.mark.parametrize("fields", [{"sampler": "ddim", "eta": 0.0}, {"temperature": 0.0}], ids=str)
@pytest.mark.parametrize("speculate", [True, 8])
def test_walks_without_noise_are_taken_one_step_at_a_time(fields, speculate):
    model = Counting(lambda x, t: 0.3 * x)
    sampler = Sampler(model, (2, 1, 4, 4), speculate=speculate, num_train_timesteps=20, **fields)
    found = sampler(seeds=0, output="result", **QUIET)
    assert (found.speculation.calls, found.speculation.volume, found.speculation.windows) == (20, 1.0, {0: 1})
    assert set(model.rows) == {2}


def test_nan_is_reported_with_its_sample():
    def model(x, t):
        bad = (t == 20).view(-1, 1, 1, 1) & (torch.arange(len(x)) >= len(x) // 2).view(-1, 1, 1, 1)
        return torch.where(bad, torch.nan, 0.3 * x)

    sampler = Sampler(model, (2, 1, 4, 4), speculate=8, num_train_timesteps=50)
    with pytest.raises(FloatingPointError, match=r"NaN or infinity in steps \d+ to \d+ of 50 .* for sample 1 of"):
        sampler(seeds=0, **QUIET)


def test_windows():
    windows = WindowPlan.of({0: 2, 100: 8, 500: 32})
    assert windows.rows(np.array([999, 500, 499, 100, 99, 0])).tolist() == [32, 32, 8, 8, 2, 2]
    assert WindowPlan.of(json.loads(json.dumps({"0": 2, "100": 8, "500": 32}))) == windows
    assert WindowPlan.of(windows.to_dict()) == windows
    assert not windows.sequential
    assert WindowPlan.of(1).sequential


# Graphs, with a stand-in for the recording


@pytest.fixture
def recording(monkeypatch):
    monkeypatch.setattr("ddpm_fast.engine.base.can_capture", lambda device: True)
    monkeypatch.setattr(speculation, "StepGraph", Replayed)
    Replayed.made = Replayed.replays = 0


def drawn(**options):
    config = SamplerConfig(num_train_timesteps=50)
    options = {"speculate": {0: 2, 20: 4, 35: 8}, **options, **QUIET}
    return sample(networks()["epsilon"], (3, 1, 8, 8), seeds=5, config=config, output="result", **options)


def test_replayed_rounds_are_those_launched_one_by_one(recording):
    """Several rounds between two looks, graphs of three widths, and no round past the end."""
    eager, graph = drawn(execution="eager"), drawn(execution="graph")
    assert torch.equal(graph.sample, eager.sample)
    np.testing.assert_array_equal(graph.speculation.acceptance, eager.speculation.acceptance)
    assert Replayed.made == 3
    assert Replayed.replays == graph.speculation.calls
    assert graph.speculation.calls == eager.speculation.calls


@pytest.mark.parametrize(("windows", "same"), [(4, True), ({0: 2, 25: 8}, False)], ids=str)
def test_a_graph_takes_wider_calls_where_windows_differ(recording, monkeypatch, windows, same):
    """So a network whose rounding depends on the batch size gives the same images for one window alone."""
    advance, widths = SpeculativeLoop._advance, {"eager": [], "graph": []}
    for execution, seen in widths.items():
        monkeypatch.setattr(
            SpeculativeLoop, "_advance", lambda self, width, seen=seen: (seen.append(width), advance(self, width))
        )
        drawn(execution=execution, speculate=windows)
    assert (widths["graph"] == widths["eager"]) == same
    assert len(widths["graph"]) == len(widths["eager"])


@pytest.mark.parametrize("error", [CaptureError("operation not permitted"), torch.OutOfMemoryError("out of memory")])
def test_rounds_that_cannot_be_recorded_run_eagerly_and_say_so(recording, monkeypatch, caplog, error):
    def refused(body, device, pool):
        body()
        raise error

    monkeypatch.setattr(speculation, "StepGraph", refused)
    found = drawn()
    assert torch.equal(found.sample, drawn(execution="eager").sample)
    assert "running eagerly" in caplog.text
    with pytest.raises(RuntimeError, match="the rounds cannot be recorded in a CUDA graph"):
        drawn(execution="graph")


def test_graphs_need_a_gpu():
    with pytest.raises(ValueError, match="execution='graph' needs a CUDA device"):
        drawn(execution="graph")
