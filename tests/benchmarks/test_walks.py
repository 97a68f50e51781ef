"""benchmarks.walks: the gate rejects wrong steps, the statistics are right, and all pieces run."""

import json

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("denoising_diffusion_pytorch")

from benchmarks.walks import plot, run
from benchmarks.walks.arms import ALONE, ARMS, COMPILED, OURS, SHIPPED, Arm, Diffusers, WrongStepError, check, posterior
from benchmarks.walks.networks import KINDS, Problem, tensor_of
from benchmarks.walks.run import PARTS, Part

CPU = torch.device("cpu")
QUICK = tuple(arm for arm in PARTS["smoke"].arms if "compile" not in arm)


@pytest.fixture(scope="module")
def problem():
    return Problem(KINDS["tiny"], 2, "float32", 8, CPU)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("arm", [arm for arm in QUICK if arm not in (ALONE, "CUDA graph by hand")])
def test_arms_pass_the_gate(arm, precision):
    assert check(ARMS[arm](Problem(KINDS["tiny"], 2, precision, 8, CPU))) < 0.5


class Planted(Arm):
    """An arm that takes the textbook's step with a mistake."""

    mistake = None

    def step(self, x, row):
        problem, table = self.problem, self.table
        z = torch.randn(x.shape, generator=torch.Generator().manual_seed(row + 1))
        t = int(table.timestep[row])
        timestep = min(t + 1, 999) if self.mistake == "another timestep" else t
        output = tensor_of(problem.exact(x, torch.full((2,), timestep))).double()
        if self.mistake == "output off by 1 %":
            output = 1.01 * output
        used = row + 1 if self.mistake == "the next row" and row + 1 < len(table) else row
        noise = 0.9 * z if self.mistake == "less noise" else z
        clip = self.mistake != "no clipping"
        return posterior(table, used, x.double(), output, noise.double(), clip).float(), z


@pytest.mark.parametrize(
    "mistake", [None, "another timestep", "output off by 1 %", "the next row", "less noise", "no clipping"]
)
def test_the_gate_fails_a_planted_mistake(problem, mistake, monkeypatch):
    monkeypatch.setattr(Planted, "mistake", mistake)
    if mistake is None:
        assert check(Planted(problem)) < 0.1
    else:
        with pytest.raises(WrongStepError, match="is off by"):
            check(Planted(problem))


def test_the_gate_fails_our_own_mistakes(problem):
    arm = ARMS[OURS](problem)
    (bank,) = arm.sampler.loop.network.hoisted._banks
    bank.table.values.mul_(1.1)
    with pytest.raises(WrongStepError):
        check(arm)


def test_the_ratio_of_medians_and_its_interval():
    generator = np.random.default_rng(1)
    theirs, ours = 3 + 0.1 * generator.standard_normal(25), 2 + 0.1 * generator.standard_normal(25)
    found = run.bootstrap(theirs, ours)
    assert found["ratio"] == pytest.approx(np.median(theirs) / np.median(ours))
    assert found["low"] < 1.5 < found["high"]
    assert 0.02 < found["high"] - found["low"] < 0.15
    assert run.bootstrap(theirs, ours) == found
    assert run.bootstrap([2.0] * 5, [1.0] * 5) == {"ratio": 2.0, "low": 2.0, "high": 2.0}


class Instant(Arm):
    """An arm that samples in a made-up time."""

    def __init__(self, seconds):
        self.seconds = seconds


class FakeClock:
    """A clock that each arm advances."""

    def __init__(self):
        self.now, self.order = 0.0, []

    def perf_counter(self):
        return self.now

    def time(self, arm, seed):
        self.now += arm.seconds
        self.order.append((arm, seed))
        return arm.seconds, arm.seconds / 2


@pytest.mark.parametrize(("until", "slow", "quick"), [(0, 3, 3), (150, 6, 8), (10_000, 25, 25)])
def test_arms_take_turns_until_the_time_is_over(until, slow, quick, monkeypatch):
    clock = FakeClock()
    monkeypatch.setattr(run, "time", clock)
    arms = {"slow": Instant(20.0), "quick": Instant(1.0)}
    times = run.take_turns(arms, clock, until)
    assert len(times["slow"]) == slow
    assert len(times["quick"]) == quick
    assert clock.order[:6] == [(arms[name], seed) for seed in (0, 1, 2) for name in ("slow", "quick")]


def rows_with(shipped, compiled, alone):
    return {OURS: {f"over_{key}": {"ratio": value} for key, value in
                   (("shipped", shipped), ("best_compiled", compiled), ("alone", alone)) if value}}  # fmt: skip


def test_goals():
    part = Part("cifar", 1, "bfloat16", shipped_goal=6, compiled_goal=1.5)
    met = {goal["goal"]: goal["met"] for goal in run.goals(part, rows_with(7, 1.4, 1 / 1.01))}
    assert list(met.values()) == [True, True, False, True]
    assert [goal["met"] for goal in run.goals(part, {})] == [None] * 4
    assert run.goals(part, rows_with(0.9, 2, 1 / 1.05))[1]["met"] is False
    assert run.goals(part, rows_with(7, 2, 1 / 1.05))[3]["met"] is False


def test_every_part_can_be_built_here():
    """The names and kinds exist, and the most important parts stand first."""
    assert list(PARTS)[:3] == ["cifar-1-bfloat16", "cifar-256-bfloat16", "256-1-bfloat16"]
    for part in PARTS.values():
        assert part.kind in KINDS
        assert set(part.arms) <= set(ARMS)
        assert len(set(part.arms)) == len(part.arms)
        assert part.steps == 1000 or part.steps >= 50 or part in (PARTS["smoke"], PARTS["dry"])


def test_the_whole_script(tmp_path, monkeypatch, capsys):
    """Every piece runs except the compiled arms; one arm is broken, and one is wrong."""

    class Wrong(Diffusers):
        def step(self, x, row):
            x_new, z = super().step(x, row)
            return x_new + 0.01, z

    def broken(problem):
        raise RuntimeError("no such thing")

    monkeypatch.setitem(ARMS, "wrong", Wrong)
    monkeypatch.setitem(ARMS, "broken", broken)
    part = Part("tiny", 2, "float32", 8, (*QUICK, "wrong", "broken"), shipped_goal=0.01)
    monkeypatch.setitem(PARTS, "smoke", part)
    monkeypatch.setattr(run, "ROUNDS", 3)
    assert run.main(["--part", "smoke", "--device", "cpu", "--budget", "30", "--out", str(tmp_path)]) == 1
    result = json.loads((tmp_path / "cpu__walks-smoke.json").read_text())
    rows = {row["arm"]: row for row in result["rows"]}
    assert rows["wrong"]["error"].startswith("wrong result: the step at row 0 is off")
    assert rows["broken"]["error"] == "RuntimeError: no such thing"
    assert "ms_per_step" not in rows["wrong"]
    for arm in (SHIPPED, OURS, "denoising-diffusion-pytorch"):
        assert rows[arm]["walks"] >= 3
        assert rows[arm]["ms_per_step_p20"] <= rows[arm]["ms_per_step"] <= rows[arm]["ms_per_step_p80"]
        assert rows[arm]["host_us_per_step"] <= 1e3 * rows[arm]["ms_per_step_p80"]
    assert rows[OURS]["over_shipped"]["arm"] == SHIPPED
    assert rows[ALONE]["gate"] is None
    assert [each["arm"] for each in result["left_out"]] == ["CUDA graph by hand"]
    assert "goal: best of ours, times as fast as diffusers as shipped, at least 0.01" in capsys.readouterr().out


def test_results_are_written_as_they_come(tmp_path, monkeypatch):
    """A part that is cut off keeps the arms that were built and the turns that were taken."""
    monkeypatch.setitem(PARTS, "smoke", Part("tiny", 2, "float32", 8, (SHIPPED, OURS)))
    monkeypatch.setattr(run, "ROUNDS", 3)
    saved = []
    whole = run.run("smoke", torch.device("cpu"), 30, lambda result: saved.append(json.loads(json.dumps(result))))
    assert [len(result["rows"]) for result in saved] == [1, 2, 2, 2, 2]
    assert [sum("ms_per_step" in row for row in result["rows"]) for result in saved] == [0, 0, 2, 2, 2]
    assert [row.get("walks") for row in saved[2]["rows"]] == [1, 1]
    assert saved[-1]["rows"] == json.loads(json.dumps(whole["rows"]))


def test_arms_are_built_in_processes_of_their_own(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run, "COMPILES", OURS)
    assert run.main(["--build", "dry", "--device", "cpu", "--out", str(tmp_path)]) == 0
    (row,) = json.loads((tmp_path / "cpu__builds.json").read_text())["rows"]
    assert (row["part"], row["arm"]) == ("dry", OURS)
    assert row["cold_s"] > 0
    assert OURS in capsys.readouterr().out


def test_the_plot_shows_every_arm_that_has_a_time(tmp_path):
    pytest.importorskip("matplotlib")
    row = {"ms_per_step": 2.0, "ms_per_step_p20": 1.9, "ms_per_step_p80": 2.2}
    result = {
        "part": "cpu", "network": "a network", "batch": 1, "precision": "float32",
        "environment": {"gpu": None, "processor": "one", "threads": 2, "torch": "2"},
        "rows": [{"arm": OURS, **row}, {"arm": f"{COMPILED} default", **row}, {"arm": SHIPPED, "error": "broken"}],
    }  # fmt: skip
    (tmp_path / "cpu__walks.json").write_text(json.dumps(result))
    (results,) = plot.read_results(tmp_path).values()
    plot.plot(results * 3, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_the_parts_are_named(capsys):
    assert run.main(["--list"]) == 0
    assert capsys.readouterr().out.split() == list(PARTS)
    if not torch.cuda.is_available():
        with pytest.raises(SystemExit):
            run.main(["--part", "cifar-1-bfloat16"])


@pytest.mark.gpu
def test_every_arm_on_a_gpu(tmp_path):
    assert run.main(["--part", "smoke", "--device", "cuda", "--budget", "300", "--out", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("*__walks-smoke.json")
    result = json.loads(path.read_text())
    assert result["left_out"] == []
    assert {row["arm"] for row in result["rows"]} == set(PARTS["smoke"].arms)
