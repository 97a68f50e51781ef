"""Manners of a process: streams that are closed, signals, permissions, files of other kinds, one writer a folder."""

import os
import signal
import stat
import subprocess
import sys
import threading
import time

import pytest
import torch

from ddpm_fast.files import alone_in, check_writable, parse_json, whole_file, write_json
from ddpm_fast.sample import sample
from ddpm_fast.training import Trainer, TrainingConfig

COMMAND = f"{sys.executable} -m ddpm_fast sample --model digits --seeds 0-1 --steps 2 --sampler ddim --out"


def test_a_process_without_stderr(monkeypatch):
    monkeypatch.setattr(sys, "stderr", None)
    for progress in (None, True, "label"):
        assert sample(lambda x, t: 0.1 * x, (1, 1, 4), seeds=0, num_inference_steps=3, progress=progress).shape == (
            1,
            1,
            4,
        )


@pytest.mark.parametrize("shell", ["{} 2>&-", "{} >&-", "{} >&- 2>&-", "{} | head -c 0; exit ${{PIPESTATUS[0]}}"])
def test_closed_streams_end_in_a_picture_and_exit_code_0(shell, tmp_path):
    out = tmp_path / "a.png"
    done = subprocess.run(["bash", "-c", shell.format(f"{COMMAND} {out}")], capture_output=True, check=False)
    assert done.returncode == 0
    assert out.read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize("rest", [["sample", "--help"], ["info"]], ids=" ".join)
def test_a_stdout_that_has_few_letters(rest):
    done = subprocess.run(
        [sys.executable, "-m", "ddpm_fast", *rest], capture_output=True, check=False,
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
    )  # fmt: skip
    assert done.returncode == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_leaves_no_part(number, tmp_path):
    folder = tmp_path / "many"
    command = [sys.executable, "-m", "ddpm_fast", "sample", "--model", "digits", "--seeds", "0-9999", "--batch", "20"]
    command += ["--sampler", "ddim", "--steps", "1", "--quiet", "--out", str(folder)]
    with subprocess.Popen(command, stderr=subprocess.PIPE) as process:
        while not folder.exists() or not any(folder.glob("*.png")):
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(number)
        process.communicate()
    assert process.returncode == 128 + number
    assert list(folder.glob(".ddpm_fast*")) == []


@pytest.mark.parametrize("module", ["torch.version", "torch.nn.functional", "ddpm_fast.table", "ddpm_fast.edit"])
def test_an_interrupt_during_the_imports_shows_no_traceback(module, tmp_path):
    command = [sys.executable, "-X", "importtime", "-m", "ddpm_fast", "sample", "--seeds", "0-999"]
    command += ["--out", str(tmp_path / "a.png")]
    said = []
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        for line in process.stderr:
            said.append(line)
            if line.endswith(f" {module}\n"):
                break
        process.send_signal(signal.SIGINT)
        said += process.stderr
    assert process.returncode == -signal.SIGINT
    assert not any("Traceback" in line for line in said)
    assert list(tmp_path.iterdir()) == []


def test_the_package_is_imported_before_torch_is():
    code = (
        "import sys, ddpm_fast, ddpm_fast.cli; assert 'torch' not in sys.modules; "
        "ddpm_fast.sample.sample, ddpm_fast.edit.inpaint, ddpm_fast.Sampler; from ddpm_fast import *; accelerate; "
        "assert not any(hasattr(ddpm_fast, name) for name in ('nothing', '..config')); "
        "assert 'Sampler' in dir(ddpm_fast)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_umask_is_never_set(tmp_path):
    before = os.umask(0o077)
    try:
        seen = []
        stop = threading.Event()

        def look():
            while not stop.is_set():
                path = tmp_path / "by"
                path.unlink(missing_ok=True)
                os.close(os.open(path, os.O_CREAT | os.O_WRONLY, 0o666))
                seen.append(stat.S_IMODE(path.stat().st_mode))

        thread = threading.Thread(target=look)
        thread.start()
        for number in range(200):
            write_json(tmp_path / "a.json", number)
        stop.set()
        thread.join()
        assert set(seen) == {0o600}
        assert stat.S_IMODE((tmp_path / "a.json").stat().st_mode) == 0o600
    finally:
        os.umask(before)


def test_a_file_keeps_its_permissions(tmp_path):
    path = tmp_path / "private.json"
    path.write_text("{}")
    path.chmod(0o600)
    write_json(path, 1)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    path.chmod(0o664)
    write_json(path, 2)
    assert stat.S_IMODE(path.stat().st_mode) == 0o664
    made, replaced = tmp_path / "made.json", tmp_path / "replaced"
    write_json(made, 1)
    with whole_file(replaced) as part:  # as safetensors does
        part.unlink()
        part.touch(0o600)
    assert replaced.stat().st_mode == made.stat().st_mode


def test_only_regular_files_are_replaced(tmp_path):
    pipe = tmp_path / "pipe.json"
    os.mkfifo(pipe)
    for write in (lambda: write_json(pipe, 1), lambda: check_writable(pipe), lambda: write_json("/dev/null", 1)):
        with pytest.raises(OSError, match="is not a regular file"):
            write()
    assert stat.S_ISFIFO(pipe.stat().st_mode)


def test_what_goes_wrong_names_the_file(tmp_path):
    gone = tmp_path / "gone" / "a.json"
    with pytest.raises(FileNotFoundError, match=str(gone)):
        write_json(gone, 1)
    full = tmp_path / "full.json"
    with pytest.raises(OSError, match=rf"No space left on device: .*{full.name}"), whole_file(full) as part:
        raise OSError(28, "No space left on device", str(part))
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match="nested too deeply"):
        parse_json("[" * 100_000)


def test_one_writer_a_folder(tmp_path):
    with alone_in(tmp_path), pytest.raises(OSError, match="another process is writing into"), alone_in(tmp_path):
        pass
    with alone_in(tmp_path):
        pass


def tiny(folder, steps=2):
    from ddpm_fast.models.unet import UNetConfig

    network = UNetConfig(
        channels=1, image_size=8, widths=(8, 8), attention=(False, False), embedding=8, heads=2, groups=4
    )
    config = TrainingConfig(steps=steps, batch_size=2, save_every=2)
    return Trainer(folder, config, network, data=lambda count, seed, step: torch.zeros(count, 1, 8, 8))


def test_a_second_trainer_is_refused_and_a_vanished_folder_is_an_error(tmp_path):
    trainer = tiny(tmp_path / "run")
    with alone_in(tmp_path / "run"), pytest.raises(OSError, match="another process is writing into"):
        trainer.run(progress=False)
    trainer.run(progress=False)
    trainer.run(progress=False)  # nothing is left to do
    late = tiny(tmp_path / "run", steps=2)
    trainer.save()
    with pytest.raises(OSError, match="another process has trained in .*run just now"):
        late.run(progress=False)
    for file in (tmp_path / "run").iterdir():
        file.unlink()
    (tmp_path / "run").rmdir()
    with pytest.raises(FileNotFoundError, match="is gone"):
        trainer.save()
