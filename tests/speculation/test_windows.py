"""Windows that choose themselves: the dynamic programme, what it is fed with, and what it decides."""

import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy import stats
from tqdm import tqdm

from ddpm_fast.config import SamplerConfig
from ddpm_fast.engine import choices, timer
from ddpm_fast.engine.call import Call
from ddpm_fast.engine.execution import Execution
from ddpm_fast.engine.noise import PhiloxNoise
from ddpm_fast.models.checkpoint import load_checkpoint
from ddpm_fast.sample import Sampler
from ddpm_fast.speculation import choose as measure
from ddpm_fast.speculation.loop import SpeculativeLoop
from ddpm_fast.speculation.windows import (
    WIDTHS,
    GuessErrors,
    WindowPlan,
    acceptance,
    best_windows,
    choose_windows,
    expected_cost,
)
from ddpm_fast.table import Clipping, build_table
from tests.support.fake_cuda import FakeCuda
from tests.support.unets import random_unet

STEPS = 7
COSTS = {1: 1.0, 2: 1.3, 4: 2.1}


@pytest.fixture
def accepted():
    """Probabilities that fall with the age of the guess."""
    rng = np.random.default_rng(3)
    return np.sort(rng.uniform(0.3, 1.0, (STEPS, WIDTHS[-1])), axis=1)[:, ::-1].copy()


def simulated(windows, accepted, costs, walks=40_000):
    """Mean cost of walks whose drafts are accepted at random."""
    rng = np.random.default_rng(0)
    total = 0.0
    for _ in range(walks):
        row = 0
        while row < STEPS:
            window = int(windows[row])
            total += costs[window]
            for k in range(min(window, STEPS - row)):
                row += 1
                if rng.random() > accepted[row - 1, k]:
                    break
    return total / walks


def test_the_expected_cost_is_the_mean_of_walks(accepted):
    windows = np.array([4, 2, 1, 4, 2, 4, 1], np.int32)
    expected = expected_cost(windows, accepted, COSTS)
    assert expected[0] == pytest.approx(simulated(windows, accepted, COSTS), rel=0.01)
    assert expected[STEPS] == 0


def test_the_best_windows_are_the_best_of_all(accepted):
    best = best_windows(accepted, COSTS)
    every = (np.array(windows) for windows in itertools.product(COSTS, repeat=STEPS))
    least = min(expected_cost(windows, accepted, COSTS)[0] for windows in every)
    assert expected_cost(best, accepted, COSTS)[0] == pytest.approx(least)


def test_acceptance_is_the_overlap_of_two_gaussians():
    lengths = np.array([0.0, 0.1, 1.0, 3.0, np.inf])
    expected = 2 * stats.norm.cdf(-lengths / 2)
    np.testing.assert_allclose(acceptance(lengths**2), expected, atol=1e-15)


@pytest.mark.parametrize("fields", [{}, {"sampler": "ddim", "eta": 0.5}])
def test_guess_errors_are_the_distances_of_the_estimates(fields):
    table = build_table(SamplerConfig(num_train_timesteps=100, **fields))
    origins = torch.randn(100, 2, 3, generator=torch.Generator().manual_seed(0))
    errors = GuessErrors(table, 64)
    for part in origins.split([1, 30, 69]):
        errors.add(part)
    for row, lag in ((1, 1), (50, 7), (98, 64), (70, 64)):
        if row - lag < 0:
            continue
        apart = (origins[row] - origins[row - lag]).double().numpy()
        distance = (table.c_x0[row] + table.c_out[row] / table.b[row]) * apart / table.sigma[row]
        assert errors.squares[row, lag - 1] == pytest.approx((distance**2).sum(), rel=1e-5)
    assert np.isinf(errors.squares[3, 3:]).all()
    assert (errors.squares[99, :50] == 0).all()  # the last step has no noise


def squares(value, steps=1000):
    return np.full((steps, WIDTHS[-1]), float(value))


def test_what_is_chosen():
    table = build_table(SamplerConfig())
    proportional = {width: float(width) for width in WIDTHS}
    flat = dict.fromkeys(WIDTHS, 1.0)
    assert choose_windows(table, squares(0.01), proportional).sequential  # a call costs what its samples cost
    assert choose_windows(table, squares(100), flat).to_dict()[0] <= 2  # nothing is accepted: nearly one a call
    always = choose_windows(table, squares(0), flat).rows(table.timestep)
    assert expected_cost(always, acceptance(squares(0)), flat)[0] == 4  # calls, as with 256 throughout
    halfway = squares(0.0)
    halfway[500:] = 100.0  # below t = 500 no guess holds
    found = choose_windows(table, halfway, {width: 1 + 0.05 * width for width in WIDTHS})
    rows = found.rows(table.timestep)
    assert rows[0] == 256
    assert rows[-1] <= 2


def test_slow_rounds_are_never_chosen():
    """What would not be three per cent faster is not speculated on."""
    table = build_table(SamplerConfig())
    costs = {1: 1.0, 2: 1.96, 4: 3.9, 8: 7.8}
    assert choose_windows(table, squares(0), costs).sequential
    assert not choose_windows(table, squares(0), {**costs, 8: 7.0}).sequential


class Slow(torch.nn.Module):
    """The noise in images of one shade: by its own clock a call costs the same for every batch size, or per row."""

    seconds = 0.0

    def __init__(self, per_row):
        super().__init__()
        self.per_row, self.shade = per_row, torch.nn.Parameter(torch.tensor(0.3))
        self.alpha_bar = torch.from_numpy(SamplerConfig(num_train_timesteps=120).alphas_cumprod()).float()

    def forward(self, x, t):
        Slow.seconds += len(x) if self.per_row else 1
        alpha_bar = self.alpha_bar[t].view(-1, 1, 1, 1)
        return (x - alpha_bar.sqrt() * self.shade) / (1 - alpha_bar).sqrt()


@pytest.fixture(autouse=True)
def clock(monkeypatch):
    """A busy machine must not decide what is chosen."""
    monkeypatch.setattr(timer, "time", SimpleNamespace(perf_counter=lambda: Slow.seconds))


@pytest.mark.parametrize("per_row", [False, True])
def test_true_measures_the_network(per_row, caplog):
    caplog.set_level("INFO", "ddpm_fast")
    sampler = Sampler(Slow(per_row), (1, 1, 4, 4), num_train_timesteps=120, speculate=True)
    assert sampler.windows.sequential == per_row
    assert f"windows {sampler.windows.to_dict()} for a batch of 1; rounds take" in caplog.text
    found = sampler(seeds=0, output="result", progress=False)
    assert found.speculation.windows == sampler.windows.to_dict()
    assert (found.speculation.calls == 120) == per_row


def test_what_was_measured_is_remembered(monkeypatch):
    network = Slow(False)
    options = {"num_train_timesteps": 120, "num_inference_steps": 60, "speculate": True}
    first = Sampler(network, (1, 1, 4, 4), **options).windows
    monkeypatch.setattr(measure, "_measured_plan", lambda *_: pytest.fail("measured again"))
    assert Sampler(network, (1, 1, 4, 4), **options).windows is first
    with pytest.raises(BaseException, match="measured again"):
        Sampler(network, (2, 1, 4, 4), **options)


def test_what_was_measured_is_remembered_on_disk(monkeypatch):
    options = {"num_train_timesteps": 120, "num_inference_steps": 40, "speculate": True}
    first = Sampler(Slow(False), (1, 1, 4, 4), **options).windows
    monkeypatch.setattr(measure, "_measured_plan", lambda *_: pytest.fail("measured again"))
    assert Sampler(Slow(False), (1, 1, 4, 4), **options).windows == first  # another object of the same network
    changed = Slow(False)
    changed.shade.data += 0.1  # other weights guess otherwise
    with pytest.raises(BaseException, match="measured again"):
        Sampler(changed, (1, 1, 4, 4), **options)
    choices.forget()
    with pytest.raises(BaseException, match="measured again"):
        Sampler(Slow(False), (1, 1, 4, 4), **options)


class Metered(Slow):
    """A network whose calls move the clock of choosing, too; the guesses are good for nothing in the second half."""

    def __init__(self, per_row, hard):
        super().__init__(per_row)
        self.hard = hard

    def forward(self, x, t):
        noise = torch.randn_like(x) * (t < 60).view(-1, 1, 1, 1) if self.hard else 0
        return super().forward(x, t) + noise


@pytest.mark.parametrize("steps", [120, 12])
@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("per_row", [False, True])
def test_choosing_takes_two_plain_runs_at_most(per_row, hard, steps, monkeypatch):
    """A plain run takes `steps` seconds of the network's own clock; the last call may overstep."""
    monkeypatch.setattr(measure, "time", SimpleNamespace(perf_counter=lambda: Slow.seconds))
    network = Metered(per_row, hard)
    began = Slow.seconds
    plan = measure._plan(
        True, Call.of(network, (1, 1, 4, 4)), table_of(steps), Clipping(1.0), False, Execution()
    )  # fmt: skip
    spent = Slow.seconds - began
    assert spent <= 2 * steps + (measure.PILOT if per_row else 8)
    assert isinstance(plan, WindowPlan)


def table_of(steps):
    return build_table(SamplerConfig(num_train_timesteps=120, num_inference_steps=steps))


def test_guess_errors_keep_what_they_were_given():
    """A loop overwrites its buffer of predictions in every round."""
    table, buffer = table_of(6), torch.zeros(2, 3)
    reused, kept = GuessErrors(table, 4), GuessErrors(table, 4)
    for _ in range(3):
        buffer.copy_(torch.randn(2, 3))
        reused.add(buffer)
        kept.add(buffer.clone())
    np.testing.assert_array_equal(reused.squares, kept.squares)
    assert np.isfinite(kept.squares[4, :4]).all()
    assert (kept.squares[4, :4] > 0).all()


def recorded(monkeypatch):
    """Let loops record graphs on the CPU; return the stand-in that counts them."""
    monkeypatch.setattr(PhiloxNoise, "in_kernel", property(lambda self: True, lambda self, value: None), raising=False)
    return FakeCuda().install(monkeypatch)


def test_the_pilot_replays_graphs_and_is_watched_after_every_round(monkeypatch):
    network, plan, table = random_unet().eval(), WindowPlan.of(4), table_of(30)
    call, squares = Call.of(network, (1, 1, 8, 8)), []
    for execution in ("eager", "auto"):
        cuda = recorded(monkeypatch) if execution == "auto" else None
        pilot = SpeculativeLoop(call, table, Clipping(1.0), plan, execution=Execution(execution, backend="torch"))
        squares.append(measure._guess_errors(pilot, 8, float("inf"), measure.make_bar(total=30, disable=True)))
    np.testing.assert_allclose(*squares, rtol=1e-5)
    assert cuda.made == 1
    assert cuda.replays >= 30 / 4


def test_every_width_is_recorded_once(monkeypatch, exports):
    cuda = recorded(monkeypatch)
    sampler = Sampler(
        random_unet().eval(), (2, 1, 8, 8), num_train_timesteps=120, speculate={0: 2, 30: 4, 60: 8}, optimize="hoist",
        backend="torch",
    )  # fmt: skip
    first = sampler(seeds=[0, 1], progress=False)
    made = cuda.made
    assert 0 < made <= 3  # one for each width that the run needed
    assert torch.equal(sampler(seeds=[0, 1], progress=False), first)
    assert (cuda.made, exports) == (made, [61])


def test_choosing_closes_its_bar_where_the_network_fails(monkeypatch):
    closed = []

    class Bar(tqdm):
        def close(self):
            closed.append(True)
            super().close()

    class Failing(Slow):
        def forward(self, x, t):
            raise KeyError("of the network")

    monkeypatch.setattr(measure, "make_bar", Bar)
    with pytest.raises(KeyError, match="of the network") as raised:  # the error keeps the bar alive
        Sampler(Failing(False), (1, 1, 4, 4), num_train_timesteps=120, speculate=True)
    assert closed
    assert raised


def test_one_trace_serves_every_width(exports):
    network = random_unet().eval()
    windows = {0: 2, 30: 4, 60: 8}
    sampler = Sampler(network, (2, 1, 8, 8), num_train_timesteps=120, speculate=windows, optimize="hoist")
    assert sampler.loop._widths == [2, 4, 8]
    assert all(sampler.loop.network(width).hoisted is not None for width in (2, 4, 8))
    assert exports == [61]
    plain = Sampler(network, (5, 1, 8, 8), num_train_timesteps=120, optimize="hoist")  # another sampler, guided or not
    assert plain.loop.network.hoisted is not None
    assert exports == [61]


def test_the_embedded_digits_are_worth_it():
    checkpoint = load_checkpoint("digits")
    told = {"class_labels": torch.tensor([3])}
    sampler = Sampler(checkpoint.model, (1, 1, 8, 8), config=checkpoint.diffusion, speculate=8, model_kwargs=told)
    found = sampler(seeds=0, output="result", progress=False)
    assert found.speculation.calls < 250
    assert found.speculation.volume < 1.8
    assert math.isfinite(found.sample.sum())
    assert WindowPlan.of(found.speculation.windows) == sampler.windows
