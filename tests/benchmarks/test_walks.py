"""benchmarks.walks: the gate rejects wrong steps, the statistics are right, and all pieces run."""

import contextlib
import json
import multiprocessing
import os
import signal
import threading
import time
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

pytest.importorskip("diffusers")
pytest.importorskip("denoising_diffusion_pytorch")

from benchmarks.walks import plot, run, worker
from benchmarks.walks.arms import ALONE, ARMS, COMPILED, OURS, SHIPPED, Arm, Diffusers, WrongStepError, check, posterior
from benchmarks.walks.networks import KINDS, Problem, cost, tensor_of
from benchmarks.walks.parts import PARTS, TRIALS, Part
from benchmarks.walks.worker import ArmError, Worker

CPU = torch.device("cpu")
OURS_AS_IT_IS = f"{OURS}, network as it is"
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
    arm.sampler.loop.execution = replace(arm.sampler.loop.execution, verify=False)  # which would see the mistake
    (bank,) = arm.sampler.loop.network.hoisted._banks
    bank.table.values.mul_(1.1)
    with pytest.raises(WrongStepError):
        check(arm)


def test_an_arm_that_is_not_what_its_name_says_is_an_error(problem, monkeypatch):
    def unable(*args, **options):
        raise RuntimeError("no compiler")

    monkeypatch.setattr(torch, "compile", lambda function, **options: unable)
    with pytest.raises(RuntimeError, match="the network is not compiled: no compiler"):
        ARMS[f"{OURS}, compiled"](problem)


def test_the_ratio_of_medians_and_its_interval():
    generator = np.random.default_rng(1)
    theirs, ours = 3 + 0.1 * generator.standard_normal(25), 2 + 0.1 * generator.standard_normal(25)
    found = run.bootstrap(theirs, ours)
    assert found["ratio"] == pytest.approx(np.median(theirs) / np.median(ours))
    assert found["low"] < 1.5 < found["high"]
    assert 0.02 < found["high"] - found["low"] < 0.15
    assert run.bootstrap(theirs, ours) == found
    assert run.bootstrap([2.0] * 5, [1.0] * 5) == {"ratio": 2.0, "low": 2.0, "high": 2.0}


class Instant:
    """An arm that runs in a made-up time, which its clock shows."""

    def __init__(self, clock, name, seconds, fails_at=None):
        self.clock, self.name, self.seconds, self.fails_at = clock, name, seconds, fails_at

    def time(self, seed):
        self.clock.now += self.seconds
        self.clock.order.append((self.name, seed))
        if seed == self.fails_at:
            raise ArmError("a launch failure")
        return self.seconds, self.seconds / 2


class FakeClock:
    """A clock that each arm advances."""

    def __init__(self):
        self.now, self.order = 0.0, []

    def perf_counter(self):
        return self.now


@pytest.mark.parametrize(("until", "slow", "quick"), [(0, 3, 3), (150, 6, 8), (10_000, 10, 10)])
def test_arms_take_turns_until_the_time_is_over(until, slow, quick, monkeypatch):
    clock = FakeClock()
    monkeypatch.setattr(run, "time", clock)
    times = run.take_turns({"slow": Instant(clock, "slow", 20.0), "quick": Instant(clock, "quick", 1.0)}, until)
    assert {name: len(each) for name, each in times.items()} == {"slow": slow, "quick": quick}
    assert clock.order[:6] == [(name, seed) for seed in (0, 1, 2) for name in ("slow", "quick")]


@pytest.mark.parametrize("fails_at", [0, 2])
def test_an_arm_that_fails_takes_no_more_turns(fails_at, monkeypatch):
    clock, failed = FakeClock(), []
    monkeypatch.setattr(run, "time", clock)
    arms = {"bad": Instant(clock, "bad", 1.0, fails_at), "good": Instant(clock, "good", 1.0)}
    times = run.take_turns(arms, 0, fail=lambda arm, error: failed.append((arm, error)))
    assert failed == [("bad", "a launch failure")]
    assert {name: len(each) for name, each in times.items()} == {"good": 3}
    assert [seed for name, seed in clock.order if name == "bad"] == list(range(fails_at + 1))


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
        assert part.steps == 1000 or part.steps >= 50 or part in [PARTS[name] for name in TRIALS]


class Thread(threading.Thread):
    """A thread in place of a process: what a test plants in this process is there, too."""

    exitcode = None
    killed = threading.Event()

    def __init__(self, target, args):
        pipe, *rest = args  # the other end is closed here once the process has a copy of its own
        super().__init__(target=target, args=(Connection(os.dup(pipe.fileno())), *rest), daemon=True)

    def kill(self):
        self.killed.set()


@pytest.fixture
def in_threads(monkeypatch):
    context = SimpleNamespace(Pipe=multiprocessing.Pipe, Process=Thread)
    monkeypatch.setattr(worker, "multiprocessing", SimpleNamespace(get_context=lambda kind: context))
    build, one_at_a_time = worker.build, threading.Lock()  # torch.export is not made for threads

    def build_in_turn(name, *rest):
        with contextlib.nullcontext() if name == "slow" else one_at_a_time:
            return build(name, *rest)

    monkeypatch.setattr(worker, "build", build_in_turn)


@pytest.mark.usefixtures("in_threads")
def test_the_whole_script(tmp_path, monkeypatch, capsys):
    """Every piece runs except the compiled arms; one arm is broken, one is wrong, and one fails while it runs."""

    class Wrong(Diffusers):
        def step(self, x, row):
            x_new, z = super().step(x, row)
            return x_new + 0.01, z

    class Failing(Diffusers):
        def sample(self, seed, steps=None):
            if seed == 2:
                raise RuntimeError("a launch failure")
            return super().sample(seed, steps)

    def broken(problem):
        raise RuntimeError("no such thing")

    for name, arm in (("wrong", Wrong), ("broken", broken), ("failing", Failing)):
        monkeypatch.setitem(ARMS, name, arm)
    arms = (*QUICK, "wrong", "broken", "failing")
    monkeypatch.setitem(PARTS, "smoke", Part("tiny", 2, "float32", 8, arms, shipped_goal=0.01))
    monkeypatch.setattr(run, "ROUNDS", 3)
    assert run.main(["--part", "smoke", "--device", "cpu", "--budget", "60", "--out", str(tmp_path)]) == 1
    result = json.loads((tmp_path / "cpu__walks-smoke.json").read_text())
    rows = {row["arm"]: row for row in result["rows"]}
    assert rows["wrong"]["error"].startswith("wrong result: the step at row 0 is off")
    assert rows["broken"]["error"] == "RuntimeError: no such thing"
    assert rows["failing"]["error"] == "RuntimeError: a launch failure"
    assert not any("ms_per_step" in rows[arm] for arm in ("wrong", "broken", "failing"))
    for arm in (SHIPPED, OURS, "denoising-diffusion-pytorch"):
        assert rows[arm]["walks"] >= 3
        assert rows[arm]["ms_per_step_p20"] <= rows[arm]["ms_per_step"] <= rows[arm]["ms_per_step_p80"]
        assert rows[arm]["host_us_per_step"] <= 1e3 * rows[arm]["ms_per_step_p80"]
        assert rows[arm]["cold_build_s"] > 0
        assert rows[arm]["warm_build_s"] > 0
    assert rows[OURS]["over_shipped"]["arm"] == SHIPPED
    assert rows[ALONE]["gate"] is None
    assert [each["arm"] for each in result["left_out"]] == ["CUDA graph by hand"]
    assert result["built_at_once"] == len(arms) - 1
    assert "goal: best of ours, times as fast as diffusers as shipped, at least 0.01" in capsys.readouterr().out


@pytest.mark.usefixtures("in_threads")
def test_results_are_written_as_they_come(monkeypatch):
    """Parts that are cut off keep the arms that were built and the turns that were taken."""
    monkeypatch.setattr(run, "ROUNDS", 3)
    saved = {"dry": [], "dry-1": []}

    def save(result):
        saved[result["part"]].append(json.loads(json.dumps(result["rows"])))

    results = run.run(["dry", "dry-1"], CPU, 60, save)
    for name, arms in (("dry", 2), ("dry-1", 1)):
        timed = [[row.get("walks", 0) for row in rows] for rows in saved[name]]
        assert timed[: arms + 3] == [
            *([0] * built for built in range(1, arms + 1)),
            *([turn] * arms for turn in (1, 2, 3)),
        ]
        warm = [sum("warm_build_s" in row for row in rows) for rows in saved[name]]
        assert warm[-arms:] == list(range(1, arms + 1))
    assert [saved[result["part"]][-1] for result in results] == [json.loads(json.dumps(r["rows"])) for r in results]


@pytest.mark.usefixtures("in_threads")
def test_arms_that_take_too_long_to_build_are_left_out(monkeypatch):
    """The others are measured all the same."""

    def slow(problem):
        Thread.killed.wait(60)

    monkeypatch.setitem(ARMS, "slow", slow)
    monkeypatch.setitem(PARTS, "smoke", Part("dot", 2, "float32", 8, ("slow", OURS_AS_IT_IS)))
    monkeypatch.setattr(run, "ROUNDS", 3)
    Thread.killed.clear()
    (result,) = run.run(["smoke"], CPU, 10)
    assert result["left_out"] == [{"arm": "slow", "reason": "time"}]
    assert [row["arm"] for row in result["rows"] if "ms_per_step" in row] == [OURS_AS_IT_IS]


def test_an_arm_has_a_process_of_its_own():
    """The end of that process is an error of the arm, not of the benchmark."""
    arm = Worker(PARTS["dry-1"], OURS_AS_IT_IS, CPU)
    try:
        worker.rows_as_they_come([arm], time.perf_counter() + 100, lambda built: None)
        assert arm.row["gate"] < 0.5
        assert arm._process.pid != os.getpid()
        whole, host = arm.time(1)
        assert 0 < host <= whole
        os.kill(arm._process.pid, signal.SIGKILL)
        arm._process.join()
        with pytest.raises(ArmError, match="ended"):
            arm.time(2)
    finally:
        arm.end()
        arm.join()


def test_compiled_code_is_kept_apart(monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/the/user's")
    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    monkeypatch.delenv("TORCHINDUCTOR_COMPILE_THREADS", raising=False)
    before = dict(os.environ)
    with run.empty_cache(5):
        folder = Path(os.environ["TORCHINDUCTOR_CACHE_DIR"])
        assert list(folder.iterdir()) == []
        assert os.environ["TORCHINDUCTOR_COMPILE_THREADS"] == "3"
    assert not folder.exists()
    assert dict(os.environ) == before


def test_parameters_and_operations_are_counted_without_running_the_network(problem):
    x, t = torch.zeros(problem.shape), torch.zeros(2, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        problem.exact(x, t)  # torch does not count a CPU's fused attention
    parameters = sum(parameter.numel() for parameter in problem.exact.parameters())
    assert cost(KINDS["tiny"], 2) == (parameters, counter.get_total_flops())


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
