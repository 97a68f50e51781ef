"""benchmarks/step where there is no GPU: its problems, its checks, its statistics, its budget and what it writes."""

import importlib.util
import json
import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from benchmarks import tables
from benchmarks.common import results
from benchmarks.common import timers as timing
from benchmarks.step import arms as step_arms
from benchmarks.step import goals as step_goals
from benchmarks.step import launch as step_launch
from benchmarks.step import run as step_benchmark
from benchmarks.step.arms import ARMS, CASES, FLOAT32, MAIN, NEXT, Case, WrongResultError, check, make_problem

CPU = torch.device("cpu")
SHAPE = (3, 2, 4, 4)


def bench(arms, timer=None, free=1 << 30):
    return step_benchmark.Bench(CPU, "torch", timer or timing.WallTimer(), 100.0, lambda: free, arms)


def jobs_of(arms, case=MAIN, shapes=(SHAPE,)):
    return [step_benchmark.Job(arm, case, shape) for shape in shapes for arm in arms]


class Off(step_arms.Eager):
    """Wrong by a hundredth in the last element of the last sample."""

    def run(self):
        result = super().run()
        result.view(-1)[-1] += 0.01
        return result


class Unwritten(step_arms.Eager):
    """Leaves an element of a sample that is not among those compared one by one."""

    def run(self):
        result = super().run()
        result[1, 0, 0, 0] = math.nan
        return result


class NotNormal(step_arms.Compiled):
    """Noise with half the deviation, which no comparison with a step without noise can see."""

    def __init__(self, problem, backend):
        step_arms.Eager.__init__(self, problem, backend)
        self.function = lambda x, output, *columns: step_arms.formula(x, output, *columns[:4], 0.5 * columns[4])


class WrongNext(step_arms.Ours):
    def into(self, x_new):
        result = super().into(x_new)
        self.problem.options["model_input"][0] += 1
        return result


class InPlaceIsAnother(step_arms.Ours):
    def run(self):
        return self.into(torch.empty_like(self.problem.x)).add_(1)


def test_the_main_step_moves_ten_bytes_an_element():
    assert MAIN.bytes_per_element() == 10
    assert {case.name: case.bytes_per_element() for case in CASES} == {
        "bfloat16 output": 10, "float32 output": 12, "next input": 12, "noise tensor": 14, "guided": 12,
        "learned_range": 12, "DDIM": 10,
    }  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_traffic_is_that_of_the_tensors_of_the_problem(case):
    p = make_problem(case, SHAPE, CPU)
    tensors = [p.x, p.x, p.output, p.options["z"], p.options["model_input"]]
    assert p.traffic == sum(t.numel() * t.itemsize for t in tensors if t is not None)


def test_guided_and_learned_reads_one_variance():
    case = Case("both", torch.float32, guided=True, options={"variance_type": "learned_range"})
    assert case.bytes_per_element() == 8 + 3 * 4


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_our_step_is_right(case):
    assert check(step_arms.Ours(make_problem(case, SHAPE, CPU), "torch")) < 1e-5


def test_our_step_is_right_on_triton(kernel_device):
    assert check(step_arms.Ours(make_problem(MAIN, SHAPE, kernel_device), "triton")) < step_arms.TOLERANCE


@pytest.mark.parametrize("arm", ["torch eager", "torch.compile"])
@pytest.mark.parametrize("case", [MAIN, FLOAT32], ids=lambda case: case.name)
def test_rivals_are_right(arm, case):
    assert check(ARMS[arm](make_problem(case, (3, 3, 16, 16), CPU), "torch")) < 1e-5


@pytest.mark.parametrize("case", [MAIN, FLOAT32], ids=lambda case: case.name)
def test_diffusers_is_right(case):
    pytest.importorskip("diffusers")
    arm = step_arms.Diffusers(make_problem(case, SHAPE, CPU), "torch")
    assert check(arm) < arm.tolerance


@pytest.mark.parametrize(
    ("arm", "case", "message"),
    [
        (Off, MAIN, r"wrong result, max difference 0\.01"),
        (Unwritten, MAIN, "max difference nan"),
        (NotNormal, MAIN, "noise of mean"),
        (WrongNext, NEXT, "the next input is not the state"),
        (InPlaceIsAnother, MAIN, "in place"),
    ],
)
def test_a_wrong_arm_is_refused(arm, case, message):
    with pytest.raises(WrongResultError, match=message):
        check(arm(make_problem(case, (40, 3, 8, 8), CPU), "torch"))


def test_a_wrong_table_is_refused():
    p = make_problem(MAIN, SHAPE, CPU)
    p.columns["c_x"] = p.columns["c_x"] * 1.01
    with pytest.raises(WrongResultError, match="max difference"):
        check(step_arms.Eager(p, "torch"))


def test_a_wrong_arm_gets_no_time_and_the_exit_code_says_so(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(step_benchmark, "SMOKE_SIZES", (SHAPE,))
    code = step_benchmark.main(
        ["--device", "cpu", "--smoke", "--out", str(tmp_path)], {"torch eager": Off, "again": step_arms.Eager}
    )
    assert code == 1
    rows = json.loads((tmp_path / "cpu__step.json").read_text())["rows"]
    wrong = [row for row in rows if row["arm"] == "torch eager"]
    assert len(wrong) == len(rows) - len(wrong) == 2
    for row in wrong:
        assert row["error"].startswith("wrong result, max difference")
        assert not {"median_us", "GB_per_s", "share_of_copy"} & row.keys()
    assert all(row["median_us"] > 0 for row in rows if row["arm"] == "again")
    assert "ERROR: wrong result" in capsys.readouterr().out


def test_an_arm_that_breaks_does_not_stop_the_others():
    def broken(problem, backend):
        raise RuntimeError("no such thing")

    rows, _ = step_benchmark.run(jobs_of(["broken", "fine"]), bench({"broken": broken, "fine": step_arms.Eager}), 60)
    assert rows[0]["error"] == "RuntimeError: no such thing"
    assert rows[1]["median_us"] > 0


def test_what_does_not_fit_into_the_time_is_listed():
    now = iter(range(0, 1000, 10))
    jobs = jobs_of(["torch eager"], shapes=[(n, 2, 4, 4) for n in range(1, 7)])
    rows, left_out = step_benchmark.run(jobs, bench({"torch eager": step_arms.Eager}), 35, clock=lambda: next(now))
    assert [row["shape"][0] for row in rows] == [1, 2, 3]
    assert [(entry["shape"][0], entry["reason"]) for entry in left_out] == [(4, "time"), (5, "time"), (6, "time")]


def test_what_does_not_fit_into_memory_is_listed():
    arms = {"torch eager": step_arms.Eager}
    large = (50, 3, 64, 64)
    rows, left_out = step_benchmark.run(jobs_of(arms, shapes=[SHAPE, large]), bench(arms, free=10_000_000), 60)
    assert [row["shape"] for row in rows] == [list(SHAPE)]
    assert left_out[0]["shape"] == list(large)
    assert left_out[0]["reason"].startswith("memory: needs 0.0 GB")


def test_running_out_of_memory_is_no_failure():
    def hungry(problem, backend):
        raise torch.OutOfMemoryError("CUDA out of memory")

    rows, left_out = step_benchmark.run(jobs_of(["hungry"]), bench({"hungry": hungry}), 60)
    assert rows == []
    assert left_out[0]["reason"] == "memory: ran out of it"


def test_a_missing_diffusers_is_reported(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    jobs = jobs_of(["torch eager", "diffusers"])
    arms = {"torch eager": step_arms.Eager, "diffusers": step_arms.Diffusers}
    rows, left_out = step_benchmark.run(jobs, bench(arms), 60)
    assert [row["arm"] for row in rows] == ["torch eager"]
    assert left_out == [{"arm": "diffusers", "reason": "not installed"}]


def test_the_plan_has_every_row_once_and_the_goals_first():
    jobs = step_benchmark.planned(step_benchmark.SIZES)
    assert len({(job.arm, job.case.name, job.shape) for job in jobs}) == len(jobs)
    assert {(job.case.name, job.shape) for job in jobs if job.arm == "ddpm_fast"} == {
        (case.name, shape) for case in CASES for shape in step_benchmark.SIZES
    }
    assert {(job.arm, job.case.name) for job in jobs[:6]} == {("ddpm_fast", MAIN.name), ("diffusers", MAIN.name)}
    assert all(job.state_bytes >= 256e6 for job in jobs[:6])
    assert max(job.state_bytes for job in jobs) > 2e9
    assert {job.arm for job in jobs} == set(ARMS)


def test_percentiles_are_numpys():
    times = np.random.default_rng(0).exponential(size=37)
    found = timing.summary(times)
    assert (found.p20_us, found.median_us, found.p80_us) == tuple(np.percentile(times, [20, 50, 80]))
    assert found.repetitions == 37
    assert vars(timing.summary([4.0, 1.0, 2.0, 3.0, 5.0])) == {
        "median_us": 3.0, "p20_us": pytest.approx(1.8), "p80_us": pytest.approx(4.2), "repetitions": 5
    }  # fmt: skip


def test_repetitions_fill_the_time_within_bounds():
    assert timing.repetitions_in(0.25, 0.005) == 50
    assert timing.repetitions_in(0.25, 10) == timing.FEWEST
    assert timing.repetitions_in(0.25, 0) == timing.MOST


def test_rates_and_ratios_follow_from_the_times():
    class Fixed(timing.WallTimer):
        def cold(self, launch, seconds=0):
            return timing.Timing(2.0, 1.0, 4.0, 10)

    shape = (40, 3, 1024, 1024)  # 1.26 GB of traffic, of which nothing is made
    job = step_benchmark.Job("fake", MAIN, shape)
    made = SimpleNamespace(traffic=job.describe()["traffic_bytes"])
    arm = SimpleNamespace(problem=made, run=None, tolerance=1.0, evidence=lambda: iter(()))
    one = bench({"fake": lambda problem, backend: arm}, Fixed())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step_benchmark, "make_problem", lambda *_: made)
        row = one.measure(job)
    assert row["traffic_bytes"] == 10 * math.prod(shape)
    assert row["GB_per_s"] == pytest.approx(10 * math.prod(shape) / 2e-6 / 1e9)
    assert row["share_of_copy"] == pytest.approx(row["GB_per_s"] / 100)
    theirs = row | {"arm": "diffusers", "median_us": 15.0}
    elsewhere = row | {"shape": [1, 1]}
    ratios = [r["ratio_to_diffusers"] for r in step_benchmark.with_ratios([row, theirs, elsewhere])]
    assert ratios == [7.5, 1.0, None]


def test_no_share_of_the_copy_is_claimed_for_little_traffic():
    row = bench({"torch eager": step_arms.Eager}).measure(jobs_of(["torch eager"])[0])
    assert row["share_of_copy"] is None


def test_the_gpu_timer_flushes_outside_of_the_timed_interval(monkeypatch):
    log = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            log.append("event")

        def elapsed_time(self, end):
            return 0.005

    properties = SimpleNamespace(L2_cache_size=50 << 20)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    timer = timing.CudaTimer(CPU)
    assert timer.cold_bytes == timer._flush.numel() * 4 == 200 << 20
    timer._flush = SimpleNamespace(zero_=lambda: log.append("flush"))
    monkeypatch.setattr(torch, "sum", lambda *_, **__: log.append("read"))
    found = timer.cold(lambda: log.append("launch"), seconds=1e-9)
    assert found == timing.Timing(5.0, 5.0, 5.0, timing.FEWEST)
    warm, timed = log[: timing.WARMUPS], log[timing.WARMUPS :]
    assert warm == ["launch"] * timing.WARMUPS
    assert timed == ["flush", "read", "event", "launch", "event"] * (timing.WARMUPS + timing.FEWEST)


def test_copies_that_do_not_fit_are_listed():
    found = timing.copy_bandwidth(timing.WallTimer(), [4096, 1 << 20], CPU, lambda: 10_000)
    assert [row["buffer_bytes"] for row in found["rows"]] == [4096]
    assert found["GB_per_s"] == pytest.approx(2 * 4096 / found["rows"][0]["median_us"] * 1e-3)
    assert found["left_out"] == [{"buffer_bytes": 1 << 20, "reason": "memory"}]


def test_host_times_leave_the_synchronize_out():
    calls = []
    found = timing.host_times(timing.WallTimer(), {"a": lambda: calls.append("a")}, launches=7, rounds=4)
    assert len(calls) == 7 * 5
    assert found["a"]["repetitions"] == 4
    assert 0 < found["a"]["median_us"] <= found["a"]["whole_us"]


def test_the_empty_kernel_takes_what_the_step_kernel_takes(kernel_device):
    from ddpm_fast.kernels import step_triton
    from ddpm_fast.kernels.step import implementation

    p = make_problem(NEXT, SHAPE, kernel_device)
    before = p.x.clone()

    def call():
        implementation("triton")(p.x, p.output, p.coefficients, p.ids, p.base, 0, **p.options, x_new=p.x)

    kernel = step_triton.step_kernel
    grid, arguments, options = step_launch.recorded_launch(step_triton, "step_kernel", call)
    assert step_triton.step_kernel is kernel
    with step_launch.empty_kernel(kernel) as empty:
        assert list(empty.arg_names) == list(kernel.arg_names)
        empty[grid](*arguments, **options)
    assert torch.equal(p.x, before)
    with pytest.raises(step_launch.NoLaunchError, match="step_kernel"):
        step_launch.recorded_launch(step_triton, "step_kernel", lambda: None)


def test_launch_cost_on_a_cpu_has_no_empty_kernel():
    found = step_launch.launch_cost(CPU, "torch", timing.WallTimer(), SHAPE, launches=1)
    assert found["host"].keys() == {"implementation", "step"}
    assert found["empty"] == "no Triton kernel here"


def row_of(arm="ddpm_fast", case=MAIN, state=300_000_000, us=100.0, **more):
    traffic = case.bytes_per_element() * state // 4
    row = {"arm": arm, "case": case.name, "shape": [state // 12, 3, 1, 1], "state_bytes": state}
    times = {"median_us": us, "p20_us": 0.9 * us, "p80_us": 1.1 * us, "GB_per_s": 1e-3 * traffic / us}
    return row | {"traffic_bytes": traffic, "share_of_copy": None, "ratio_to_diffusers": None} | times | more


def test_goals_are_judged_by_the_worst_large_state():
    rows = [
        row_of(share_of_copy=0.95, ratio_to_diffusers=6.9),
        row_of(share_of_copy=0.93, ratio_to_diffusers=9.0),
        row_of(state=100_000_000, share_of_copy=0.5, ratio_to_diffusers=2.0),  # too small a state to count
        row_of(case=FLOAT32, share_of_copy=0.919, ratio_to_diffusers=7.0),
        row_of(arm="torch.compile", share_of_copy=0.1),
    ]
    launch = {"host": {"implementation": {"over_empty": 0.2}, "step": {"over_empty": 0.21}}}
    found = {goal["goal"]: goal for goal in step_goals.goals(rows, launch)}
    judged = {name: (goal["value"], goal["met"]) for name, goal in found.items() if goal["met"] is not None}
    assert judged == {
        "share of copy bandwidth, bfloat16 output": (0.93, True),
        "share of copy bandwidth, float32 output": (0.919, False),
        "times as fast as diffusers, bfloat16 output": (6.9, False),
        "times as fast as diffusers, float32 output": (7.0, True),
        "host time over an empty kernel's, implementation": (0.2, True),
        "host time over an empty kernel's, step": (0.21, False),
    }
    assert found["share of copy bandwidth, DDIM"]["value"] is None
    assert all(goal["met"] is None for goal in step_goals.goals([], {"error": "no"}))


def test_goals_are_printed(capsys):
    launch = {"host": {"step": {"over_empty": 0.5}}}
    found = step_goals.goals([row_of(share_of_copy=0.95)], launch)
    step_benchmark.report({"goals": found, "rows": [], "left_out": [], "seconds": 1})
    out = capsys.readouterr().out
    assert "bfloat16 output, at least 0.92, worst of 1: 0.95: met" in out
    assert "step, at most 0.2, worst of 1: 0.5: MISSED" in out
    assert "DDIM, at least 0.92: not measured" in out


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """The files of a whole smoke run: the exit code and the folder."""
    folder = tmp_path_factory.mktemp("smoke") / "made"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step_benchmark, "SMOKE_SIZES", ((2, 3, 8, 8),))
        code = step_benchmark.main(["--device", "cpu", "--smoke", "--out", str(folder), "--budget", "60"])
    return code, folder


def test_a_smoke_run_measures_every_arm(smoke):
    code, folder = smoke
    assert code == 0
    result = json.loads((folder / "cpu__step.json").read_text())
    assert result["smoke"] is True
    absent = {entry["arm"] for entry in result["left_out"]}
    assert {row["arm"] for row in result["rows"]} | absent == set(ARMS)
    assert {row["case"] for row in result["rows"]} == {case.name for case in CASES}
    for row in result["rows"]:
        assert 0 < row["p20_us"] <= row["median_us"] <= row["p80_us"]
        assert row["max_difference"] <= row["tolerance"]
    assert result["copy"]["GB_per_s"] > 0
    assert all(goal["met"] is None for goal in result["goals"])
    assert {"gpu", "driver", "cuda", "torch", "triton", "commit", "uncommitted_changes"} <= result["environment"].keys()
    assert {path.name for path in folder.iterdir()} <= {"cpu__step.json", "step-cpu.png"}


def test_a_smoke_run_writes_nowhere_by_itself(tmp_path, monkeypatch):
    monkeypatch.setattr(step_benchmark, "SMOKE_SIZES", (SHAPE,))
    monkeypatch.setattr(step_benchmark, "write", lambda *_: pytest.fail("wrote"))
    assert step_benchmark.main(["--device", "cpu", "--smoke"], {"torch eager": step_arms.Eager}) == 0


@pytest.mark.parametrize("arguments", [["--device", "cpu"], ["--device", "cuda"]])
def test_there_is_nothing_to_measure_without_a_gpu(arguments, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stopped:
        step_benchmark.main(arguments)
    assert stopped.value.code == 2
    assert "--smoke" in capsys.readouterr().err


def full_result(**environment):
    rows = [row_of(share_of_copy=0.95), row_of("diffusers", us=800.0), row_of(state=30_000, us=4.0)]
    rows += [row_of("torch.compile", error="wrong result, max difference 1"), row_of(case=CASES[-1])]
    rows[2]["in_graph"] = {"GB_per_s": 30.0, "cold": True}
    rows[3] = {key: value for key, value in rows[3].items() if not key.endswith("_us")}
    return {
        "environment": {
            "date": "2026-01-02", "gpu": "NVIDIA H200", "driver": "580.1", "torch": "2.11.0", "triton": "3.6.0",
            "processor": "x", "commit": "abc1234", **environment,
        },
        "rows": step_benchmark.with_ratios(rows),
        "copy": {"GB_per_s": 4300.0},
        "smoke": False,
    }  # fmt: skip


def test_the_table_is_of_the_newest_result(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    assert tables.step() == "Not yet measured on a GPU."
    (tmp_path / "cpu__step.json").write_text(json.dumps(full_result(date="2027-01-01") | {"smoke": True}))
    assert tables.step() == "Not yet measured on a GPU."
    (tmp_path / "a__step.json").write_text(json.dumps(full_result()))
    (tmp_path / "b__step.json").write_text(json.dumps(full_result(date="2025-12-31", gpu="an older one")))
    lines = tables.step().splitlines()
    assert lines[0].startswith("NVIDIA H200, driver 580.1")
    assert "an older one" not in tables.step()
    small, large = lines[4:]
    assert small.startswith("| 2500x3x1x1 | 0.07 MB | 4.0 | 19 | - | - | - | - | - |")
    assert large == "| 25000000x3x1x1 | 750.00 MB | 100.0 | 7,500 | 95.0% | wrong | - | 800.0 | 8.0 |"


def test_the_plot_is_drawn_from_a_result_file(tmp_path):
    pytest.importorskip("matplotlib")
    from PIL import Image

    path = tmp_path / "nvidia-h200__step.json"
    path.write_text(json.dumps(full_result()))
    assert step_benchmark.main(["--plot", str(path), "--out", str(tmp_path)]) == 0
    with Image.open(tmp_path / "step-nvidia-h200.png") as image:
        assert image.width > 1000
    assert sorted(p.name for p in tmp_path.iterdir()) == ["nvidia-h200__step.json", "step-nvidia-h200.png"]


def test_without_matplotlib_there_is_no_plot_and_the_run_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    step_benchmark.draw(tmp_path / "x__step.json", tmp_path)
    assert "matplotlib is not installed" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_the_result_is_named_after_the_gpu(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(step_benchmark, "draw", lambda *_: None)
    path = step_benchmark.write({"rows": [], "device": "cuda"}, tmp_path, None)
    assert path.name == "nvidia-h100-80gb-hbm3__step.json"


def test_the_environment_without_git(monkeypatch):
    monkeypatch.setattr(results, "_git", lambda *_: None)
    unknown = results.environment()
    assert unknown["commit"] is None
    assert unknown["uncommitted_changes"] is None
    told = results.environment("abc1234-dirty")
    assert (told["commit"], told["uncommitted_changes"]) == ("abc1234", True)
    assert results.environment("abc1234")["uncommitted_changes"] is False


def test_a_problem_has_a_twin_with_buffers_of_its_own():
    p = make_problem(replace(NEXT, noise="tensor"), SHAPE, CPU)
    twin = p.twin()
    step_arms.Ours(twin, "torch").run()
    assert not torch.equal(twin.x, p.x)
    assert twin.options["z"].data_ptr() != p.options["z"].data_ptr()
    assert twin.options["model_input"].data_ptr() != p.options["model_input"].data_ptr()


@pytest.mark.gpu
def test_a_smoke_run_on_a_gpu(tmp_path):
    assert step_benchmark.main(["--smoke", "--out", str(tmp_path), "--budget", "120"]) == 0
    (path,) = tmp_path.glob("*__step.json")
    result = json.loads(path.read_text())
    assert "over_empty" in result["launch"]["host"]["implementation"]
    assert any(row.get("in_graph") for row in result["rows"])
