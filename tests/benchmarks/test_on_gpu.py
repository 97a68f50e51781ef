"""benchmarks.on_gpu without a GPU: stages run dry, and a stage that fails or is too slow does not stop the next."""

import json
import sys

import pytest

from benchmarks import on_gpu
from benchmarks.on_gpu import STAGES, Stage, commands


def test_a_dry_run_goes_through_every_stage(tmp_path, capsys):
    assert on_gpu.main(["--dry", "--out", str(tmp_path), "--commit", "abc1234"]) == 0, capsys.readouterr().out
    ends = [line.split(",")[0] for line in capsys.readouterr().out.splitlines()]
    ran = [name for name in STAGES if not name.startswith("walks") or name == "walks-cifar-1-bfloat16"]
    assert ends == [*(f"{name}: ok" for name in ran), "done"]
    for name in ("cpu__walks-dry", "cpu__step"):
        assert json.loads((tmp_path / f"{name}.json").read_text())["rows"]
    log = (tmp_path / "on_gpu.log").read_text()
    assert all(f"== {name}: -m " in log for name in ran)


def test_a_dry_run_takes_the_options_of_the_real_one(tmp_path):
    for stage in STAGES.values():
        for real, dry in zip(stage.commands, stage.dry, strict=True):
            module = real.split()[1]
            assert module == dry.split()[1]
            if module != "pytest":
                named = {word for word in real.split() if word.startswith("--")}
                assert named <= {word for word in dry.split() if word.startswith("--")} | {"--device"}, real
    for line in commands(STAGES["tests"], False, 100, tmp_path, None):
        assert line[:3] == [sys.executable, "-m", "pytest"]


def test_the_stages_of_a_run_take_six_minutes():
    for run in (1, 2):
        assert sum(stage.seconds for stage in STAGES.values() if stage.run == run) <= 360


@pytest.fixture
def stages(monkeypatch):
    lines = {
        "good": "print('well')",
        "bad": "print('ill'); raise SystemExit(3)",
        "slow": "import time; print('begun', flush=True); time.sleep(60)",
        "last": "",
    }
    monkeypatch.setattr(on_gpu, "STAGES", {name: Stage(1, 2, (), ()) for name in lines})
    names = iter(lines)
    monkeypatch.setattr(on_gpu, "commands", lambda *_: [[sys.executable, "-c", lines[next(names)]]])
    monkeypatch.setattr(on_gpu, "LEAST", 0)


def test_a_stage_that_fails_does_not_stop_the_next(stages, tmp_path, capsys):
    assert on_gpu.main(["--out", str(tmp_path)]) == 1
    ends = [line.split(", ")[0] for line in capsys.readouterr().out.splitlines()]
    assert ends == ["good: ok", "ill", "bad: FAILED with 3", "begun", "slow: ran OUT OF TIME", "last: ok", "done"]
    log = (tmp_path / "on_gpu.log").read_text()
    assert [line for line in log.splitlines() if not line.startswith("==")] == ["well", "ill", "begun"]


def test_commands_of_a_stage_run_at_once(tmp_path):
    code = "import time; time.sleep(1.5)"
    ended = on_gpu.execute("pair", [[sys.executable, "-c", code]] * 2, 10, tmp_path)
    assert ended.startswith("pair: ok, ")
    assert float(ended.split(", ")[1].split()[0]) < 3


def test_what_does_not_fit_is_named(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(on_gpu, "STAGES", {name: Stage(1, 60, (), ()) for name in ("first", "second")})
    monkeypatch.setattr(on_gpu, "commands", lambda *_: [[sys.executable, "-c", ""]])
    assert on_gpu.main(["--out", str(tmp_path), "--budget", "1"]) == 0
    assert capsys.readouterr().out.splitlines() == ["no stage fits"]
    assert on_gpu.main(["--out", str(tmp_path), "--after", "first"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "done"
