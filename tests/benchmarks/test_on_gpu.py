"""benchmarks/on_gpu.py without a GPU: its stages exist, and one that fails or takes too long does not stop the next."""

import sys

import pytest

from benchmarks import on_gpu
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


def test_every_stage_has_its_script_and_its_arguments(tmp_path):
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
            assert all(f'"{name}"' in text for name in arguments if name.startswith("--"))


def test_what_fails_does_not_stop_the_next(stages, tmp_path, capsys):
    assert on_gpu.main(["--out", str(tmp_path), "--after", "good", "--budget", "5"]) == 1
    said = capsys.readouterr().out.splitlines()
    ends = [line.split(", ")[0] for line in said]
    assert ends == ["ill", "bad: FAILED with 3", "slow: ran OUT OF TIME", "go on with --after slow"]


def test_what_stages_say_is_kept(stages, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(on_gpu, "STAGES", ["good", "last"])
    assert on_gpu.main(["--out", str(tmp_path)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "done"
    assert (tmp_path / "on_gpu.log").read_text().splitlines() == ["== good", "well", "== last"]
