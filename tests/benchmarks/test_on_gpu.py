"""benchmarks.on_gpu without a GPU: every stage exists, and a stage that fails or is too slow does not stop the next."""

import sys
from pathlib import Path

import pytest

from benchmarks import on_gpu
from benchmarks.common import command_line
from benchmarks.common.results import ROOT


@pytest.fixture
def stages(monkeypatch):
    lines = {
        "good": "print('well')",
        "bad": "print('ill'); raise SystemExit(3)",
        "slow": "import time; time.sleep(60)",
        "last": "",
    }
    monkeypatch.setattr(on_gpu, "STAGES", list(lines))
    monkeypatch.setattr(on_gpu, "command", lambda stage, *_: [sys.executable, "-c", lines[stage]])
    monkeypatch.setattr(on_gpu, "LEAST", 0)


def test_the_script_of_every_stage_has_the_options(tmp_path):
    assert len(set(on_gpu.STAGES)) == len(on_gpu.STAGES)
    for stage in on_gpu.STAGES:
        python, flag, module, *arguments = on_gpu.command(stage, 100, tmp_path, "abc")
        assert (python, flag) == (sys.executable, "-m")
        if stage in on_gpu.TESTS:
            assert module == "pytest"
        else:
            path = ROOT / module.replace(".", "/")
            script = path / "run.py" if path.is_dir() else path.with_suffix(".py")
            text = script.read_text(encoding="utf-8")
            if "add_result_options(" in text:
                text += Path(command_line.__file__).read_text(encoding="utf-8")
            assert all(f'"{name}"' in text for name in arguments if name.startswith("--"))


def test_a_stage_that_fails_does_not_stop_the_next(stages, tmp_path, capsys):
    assert on_gpu.main(["--out", str(tmp_path), "--after", "good", "--budget", "5"]) == 1
    ends = [line.split(", ")[0] for line in capsys.readouterr().out.splitlines()]
    assert ends == ["ill", "bad: FAILED with 3", "slow: ran OUT OF TIME", "go on with --after slow"]


def test_the_output_of_all_stages_is_in_the_log(stages, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(on_gpu, "STAGES", ["good", "last"])
    assert on_gpu.main(["--out", str(tmp_path)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "done"
    assert (tmp_path / "on_gpu.log").read_text().splitlines() == ["== good", "well", "== last"]
