"""benchmarks.on_gpu without a GPU: stages run dry, and a stage that fails or is too slow does not stop the next."""

import json
import os
import sys
import time
from pathlib import Path

import pytest

from benchmarks import on_gpu
from benchmarks.common.results import ROOT
from benchmarks.on_gpu import BUDGET, STAGES, Stage, commands, planned
from benchmarks.walks.parts import PARTS, TRIALS


def test_a_dry_run_goes_through_every_stage(tmp_path, capsys):
    """Every stage but the tests leaves its result, as it does on a GPU."""
    out = tmp_path / "a folder"
    code = on_gpu.main(["--dry", "--out", str(out), "--commit", "abc1234"])
    printed = capsys.readouterr().out
    assert code == 0, printed
    assert [line.split(",")[0] for line in printed.splitlines()[-8:]] == [*(f"{name}: ok" for name in STAGES), "done"]
    for name in ("layers", "walks-dry", "step", "speculation", "replay"):
        assert json.loads((out / f"cpu__{name}.json").read_text())["rows"], name
    log = (out / "on_gpu.log").read_text()
    assert all(f"== {name}: -m " in log for name, stage in STAGES.items() if stage.dry)


def test_a_dry_run_takes_the_commands_of_a_real_one(tmp_path):
    """What differs is the size: a device, a part, --smoke."""
    for stage in (stage for stage in STAGES.values() if stage.dry):
        for real, dry in zip(*(commands(stage, dry, 100, tmp_path, "abc") for dry in (False, True)), strict=True):
            assert real[:3] == dry[:3]
            assert real[1] == "-m"
            if real[2] != "pytest":
                options = [[word for word in line if word.startswith("--")] for line in (real, dry)]
                assert set(options[0]) <= set(options[1])
                assert real[real.index("--budget") + 1] == "90" if "--budget" in real else real[2].endswith("replay")
    named = [word for stage in STAGES.values() for line in stage.commands for word in line.split() if word in PARTS]
    assert named == ["cifar-1-bfloat16", "cifar-256-bfloat16", "cifar-1-float32", "256-1-bfloat16", "dit-1-bfloat16"]
    assert not set(named) & set(TRIALS)


def test_two_calls_of_six_minutes_are_enough():
    first = planned(list(STAGES), BUDGET)
    second = planned(list(STAGES)[len(first) :], BUDGET)
    assert [*first, *second] == list(STAGES)
    assert first[0] == "tests"
    assert BUDGET == 360


@pytest.mark.parametrize(("xdist", "cores", "few", "many"), [(True, 16, ["4"], ["10"]), (True, 1, ["1"], ["1"]),
                                                             (False, 16, [], [])])  # fmt: skip
def test_tests_run_in_many_processes_where_they_can(xdist, cores, few, many, tmp_path, monkeypatch):
    monkeypatch.setattr(on_gpu.importlib.util, "find_spec", lambda name: object() if xdist else None)
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    gpu, kernels = commands(STAGES["tests"], False, 100, tmp_path, "abc")
    for line, workers in ((gpu, few), (kernels, many)):
        assert [line[place + 1] for place, word in enumerate(line) if word == "-n"] == workers
    assert gpu[gpu.index("-m", 2) + 1] == "gpu"
    assert "not gpu and not slow" in kernels
    assert "abc" not in gpu
    for place, word in enumerate(kernels):
        if word == "--ignore":
            assert (ROOT / kernels[place + 1]).exists()


def test_what_is_missing_is_said(monkeypatch, capsys):
    monkeypatch.setattr(on_gpu.importlib.util, "find_spec", lambda name: None if name == "diffusers" else object())
    on_gpu.report_what_is_missing()
    assert capsys.readouterr().out == f"diffusers is not installed: {on_gpu.USES['diffusers']}\n"


@pytest.fixture
def stages(monkeypatch):
    lines = {
        "good": "print('well')",
        "bad": "print('ill'); raise SystemExit(3)",
        "slow": "import time; print('begun', flush=True); time.sleep(60)",
        "last": "",
    }
    monkeypatch.setattr(on_gpu, "STAGES", {name: Stage(1, (f'-c "{line}"',), ()) for name, line in lines.items()})


@pytest.mark.usefixtures("stages")
def test_a_stage_that_fails_does_not_stop_the_next(tmp_path, capsys):
    assert on_gpu.main(["--out", str(tmp_path), "--budget", "4"]) == 1
    ends = [line.split(", ")[0] for line in capsys.readouterr().out.splitlines()][1:]
    assert ends == ["good: ok", "ill", "bad: FAILED with 3", "begun", "slow: ran OUT OF TIME", "last: ok", "done"]
    log = (tmp_path / "on_gpu.log").read_text()
    assert [line for line in log.splitlines() if not line.startswith("==")] == ["well", "ill", "begun"]


@pytest.mark.usefixtures("stages")
def test_a_second_call_goes_on_behind_a_stage(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(on_gpu, "LEAST", 1)
    assert on_gpu.main(["--out", str(tmp_path), "--budget", "1.01"]) == 0
    assert capsys.readouterr().out.splitlines()[::2] == ["planned: good 1 s", "go on with --after good"]
    assert on_gpu.main(["--out", str(tmp_path), "--after", "slow"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "done"
    assert on_gpu.main(["--out", str(tmp_path), "--budget", "0.1"]) == 0
    assert capsys.readouterr().out.splitlines() == ["planned: nothing", "no stage fits"]


def test_a_stage_gets_what_the_stages_before_it_left(tmp_path, monkeypatch, capsys):
    """The seconds that are planned for later stages are kept for them."""
    given = {}
    monkeypatch.setattr(on_gpu, "STAGES", {name: Stage(100, (name,), ()) for name in ("first", "second", "third")})
    monkeypatch.setattr(on_gpu, "execute", lambda name, lines, seconds, *rest: given.setdefault(name, f"{seconds:.0f}"))
    on_gpu.main(["--out", str(tmp_path), "--budget", "360"])
    assert given == {"first": "160", "second": "260", "third": "360"}


def test_commands_of_a_stage_run_at_once(tmp_path):
    code = "import time; time.sleep(1.5)"
    ended = on_gpu.execute("pair", [[sys.executable, "-c", code]] * 2, 10, tmp_path)
    assert ended.startswith("pair: ok, ")
    assert float(ended.split(", ")[1].split()[0]) < 3


def test_a_command_that_is_killed_leaves_no_process_behind(tmp_path):
    pid = tmp_path / "pid"
    code = "import subprocess, sys, time; p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']); "
    code += f"open({str(pid)!r}, 'w').write(str(p.pid)); time.sleep(60)"
    assert "OUT OF TIME" in on_gpu.execute("slow", [[sys.executable, "-c", code]], 2, tmp_path)
    status = Path(f"/proc/{pid.read_text()}/status")
    until = time.monotonic() + 5
    while alive(status) and time.monotonic() < until:
        time.sleep(0.05)
    assert not alive(status)


def alive(status):
    """Return whether a process runs: it may have ended without anybody having asked how."""
    try:
        return "State:\tZ" not in status.read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
