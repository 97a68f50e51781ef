"""Tests of training: it learns, resumes after any interruption bit for bit, and reports wrong arguments."""

import copy
import dataclasses
import itertools
import json
import math
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ddpm_fast import cli, images
from ddpm_fast.cli import commands
from ddpm_fast.config import SamplerConfig
from ddpm_fast.data import moons
from ddpm_fast.kernels import to_uint8
from ddpm_fast.models.checkpoint import CheckpointError, load_checkpoint
from ddpm_fast.models.unet import UNetConfig
from ddpm_fast.sample import sample
from ddpm_fast.training import Trainer, TrainingConfig
from tests.support.unets import TINY

DIFFUSION = SamplerConfig(num_train_timesteps=50)
CONFIG = TrainingConfig(steps=11, batch_size=4, learning_rate=3e-3, warmup=3, save_every=4, seed=5)
SAVES = (4, 8, 11)


def small_moons(count, seed, step):
    """Return moons of 8 x 8 pixels."""
    return torch.nn.functional.avg_pool2d(moons.batch(count, seed, step), 4)


def trainer(folder, config=CONFIG, network=TINY, diffusion=DIFFUSION, data=small_moons):
    return Trainer(folder, config, network, diffusion, data)


def interrupt_at(step, error=KeyboardInterrupt):
    """Return `small_moons` with an interruption at the batch of `step`."""

    def data(count, seed, now):
        if now == step:
            raise error
        return small_moons(count, seed, now)

    return data


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    run = trainer(tmp_path_factory.mktemp("uninterrupted"))
    run.run(progress=False)
    return run.folder


def metrics(folder):
    """Return the rows of metrics.jsonl without the entries that differ from run to run."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name != "seconds_per_step"} for row in rows]


def assert_same_run(folder, other):
    """Assert that weights, averages, moments, checkpoint and metrics are equal bit for bit."""
    a, b = load_file(folder / "state.safetensors"), load_file(other / "state.safetensors")
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []
    assert metrics(folder) == metrics(other)
    for name in ("model.safetensors", "config.json"):
        assert (folder / name).read_bytes() == (other / name).read_bytes()


def test_the_loss_falls(tmp_path):
    config = TrainingConfig(steps=60, batch_size=8, learning_rate=1e-2, warmup=10, save_every=12)
    trainer(tmp_path, config).run(progress=False)
    losses = [row["loss"] for row in metrics(tmp_path)]
    assert losses[0] < 1.1  # a network that returns zero has the loss 1
    assert losses[-1] < 0.6 * losses[0]


def test_a_run_leaves_a_checkpoint_a_state_and_metrics(uninterrupted):
    names = ["config.json", "metrics.jsonl", "model.safetensors", "state.safetensors"]
    assert sorted(os.listdir(uninterrupted)) == names
    rows = [json.loads(line) for line in (uninterrupted / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(SAVES)
    assert all(row.keys() == {"step", "loss", "learning_rate", "seconds_per_step"} for row in rows)
    assert [row["learning_rate"] for row in rows] == [CONFIG.learning_rate_at(step - 1) for step in SAVES]
    checkpoint = load_checkpoint(uninterrupted)
    assert (checkpoint.diffusion, checkpoint.model.config) == (DIFFUSION, TINY)
    assert checkpoint.about["training"]["steps"] == 11
    assert checkpoint.about["data"] == {"name": "test_trainer"}
    state = load_file(uninterrupted / "state.safetensors")
    for name, value in checkpoint.model.state_dict().items():
        assert torch.equal(value, state[f"ema.{name}"].half().float()), name


def test_another_seed_is_another_run(tmp_path, uninterrupted):
    trainer(tmp_path, TrainingConfig(**{**vars(CONFIG), "seed": 6})).run(progress=False)
    assert metrics(tmp_path) != metrics(uninterrupted)


@pytest.mark.parametrize("steps", [(0,), (3,), (4,), (6,), (10,), (2, 5, 5, 9)], ids=str)
def test_an_interrupted_run_resumes_bit_for_bit(tmp_path, uninterrupted, steps):
    for step in steps:
        run = trainer(tmp_path, data=interrupt_at(step))
        with pytest.raises(KeyboardInterrupt):
            run.run(progress=False)
        assert run.step == step
    run = trainer(tmp_path)
    assert run.step == max([save for save in (0, *SAVES) if save <= steps[-1]])
    torch.manual_seed(99)  # the run must not depend on the global generator
    run.run(progress=False)
    assert_same_run(tmp_path, uninterrupted)


def test_interrupted_while_saving(tmp_path, uninterrupted, monkeypatch):
    for number in range(4):  # two saves, each of checkpoint and state
        calls = []

        def save(tensors, path, metadata=None, number=number, calls=calls):
            calls.append(path)
            if len(calls) > number:
                path.write_bytes(b"half")
                raise KeyboardInterrupt
            save_file(tensors, path, metadata)

        monkeypatch.setattr("ddpm_fast.models.checkpoint.save_file", save)
        with pytest.raises(KeyboardInterrupt):
            trainer(tmp_path).run(progress=False)
        assert not list(tmp_path.glob(".*"))
        if number:
            load_checkpoint(tmp_path)
    monkeypatch.undo()
    trainer(tmp_path).run(progress=False)
    assert_same_run(tmp_path, uninterrupted)


KILLED = """
import functools, os, signal, sys
import torch
sys.path.insert(0, {tests!r})
from tests.training import test_trainer as t
from ddpm_fast.models import checkpoint
torch.set_num_threads(1)

def kill():
    os.kill(os.getpid(), signal.SIGKILL)

def data(count, seed, step):
    return kill() if step == 7 else t.small_moons(count, seed, step)

calls, really = [], checkpoint.save_file

def save(tensors, path, metadata):
    calls.append(path)
    if len(calls) == 1:  # the checkpoint is written before the state
        return really(tensors, path, metadata)
    path.write_bytes(b"half")
    kill()

data.__module__ = t.small_moons.__module__
if {when!r} == "saving":
    checkpoint.save_file = save
t.trainer({folder!r}, data=data).run(progress=False)
"""


@pytest.mark.parametrize("when", ["training", "saving"])
def test_a_killed_process_resumes_bit_for_bit(tmp_path, uninterrupted, when):
    script = KILLED.format(tests=str(Path(__file__).parents[2]), folder=str(tmp_path), when=when)
    process = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=200)
    assert process.returncode == -signal.SIGKILL, process.stderr
    run = trainer(tmp_path)
    assert run.step == (4 if when == "training" else 0)
    load_checkpoint(tmp_path)
    run.run(progress=False)
    assert_same_run(tmp_path, uninterrupted)


def test_samples_are_drawn_on_the_way_and_change_nothing(tmp_path, uninterrupted):
    Trainer(tmp_path, CONFIG, TINY, DIFFUSION, small_moons, samples=5).run(progress=False)
    assert_same_run(tmp_path, uninterrupted)
    about = images.read_metadata(tmp_path / "samples.png")
    assert (about["step"], about["seeds"]) == (11, [0, 1, 2, 3, 4])
    checkpoint = load_checkpoint(tmp_path)
    shape = (5, *checkpoint.shape)
    x = sample(
        checkpoint.model, shape, seeds=0, progress=False,
        config=checkpoint.diffusion, sampler="ddim", num_inference_steps=50,
    )  # fmt: skip
    with Image.open(tmp_path / "samples.png") as picture:
        drawn = np.asarray(picture).astype(int)
    assert abs(drawn - images.grid(to_uint8(x).numpy())[..., 0]).max() <= 2  # the checkpoint's weights are rounded


def test_pictures_cannot_be_drawn_of_two_channels(tmp_path):
    with pytest.raises(ValueError, match=r"a picture has \[1, 3, 4\] channels, the network 2"):
        Trainer(tmp_path, CONFIG, dataclasses.replace(TINY, channels=2), DIFFUSION, small_moons, samples=5)


def test_a_full_disk_leaves_the_last_save(tmp_path, uninterrupted):
    """Fill the disk for real: the kernel refuses to let files grow."""
    with pytest.raises(KeyboardInterrupt):
        trainer(tmp_path, data=interrupt_at(5)).run(progress=False)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(OSError, match="too large|No space"):
            trainer(tmp_path).run(progress=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    after = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    for name in ("state.safetensors", "model.safetensors", "config.json"):
        assert after[name] == before[name]
    assert not list(tmp_path.glob(".*"))
    trainer(tmp_path).run(progress=False)
    assert_same_run(tmp_path, uninterrupted)


SPREAD = """
import os
import sys
import torch
from torch import distributed
sys.path.insert(0, {tests!r})
from tests.support.unets import TINY
from tests.training.test_trainer import CONFIG, DIFFUSION, interrupt_at, small_moons
from dataclasses import replace
from ddpm_fast.training import Trainer

distributed.init_process_group("gloo")
stop = int(sys.argv[2])
data = interrupt_at(stop) if stop else small_moons
run = Trainer(sys.argv[1], replace(CONFIG, mixed_precision="no"), TINY, DIFFUSION, data)
assert run.world == 2
try:
    run.run(progress=False)
except KeyboardInterrupt:
    pass
weights = torch.cat([parameter.detach().flatten() for parameter in run.ema.parameters()])
others = [torch.empty_like(weights) for _ in range(2)]
distributed.all_gather(others, weights)
assert torch.equal(*others)
distributed.barrier()
os._exit(0)  # gloo's threads can abort an interpreter that ends
"""


def test_two_processes_train_as_one(tmp_path):
    """Compare two gloo processes with one, up to the order of sums.

    An interrupted and resumed pair is equal to an uninterrupted pair bit for bit.
    """
    script = tmp_path / "spread.py"
    script.write_text(SPREAD.format(tests=str(Path(__file__).parents[2])))

    def torchrun(folder, stop=0):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [*command, script, folder, str(stop)], env=environment, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stdout + done.stderr

    trainer(tmp_path / "one", dataclasses.replace(CONFIG, mixed_precision="no")).run(progress=False)
    torchrun(tmp_path / "two")
    a, b = (load_file(tmp_path / name / "state.safetensors") for name in ("one", "two"))
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], atol=2e-4, rtol=1e-3)
    losses = [[row["loss"] for row in metrics(tmp_path / name)] for name in ("one", "two")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    torchrun(tmp_path / "again", stop=6)
    torchrun(tmp_path / "again")
    assert_same_run(tmp_path / "two", tmp_path / "again")


def test_a_finished_run_stays_as_it_is(tmp_path, uninterrupted):
    trainer(tmp_path).run(progress=False)
    run = trainer(tmp_path, data=interrupt_at(0, AssertionError))
    assert run.step == 11
    run.run(progress=False)
    assert_same_run(tmp_path, uninterrupted)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        pytest.param(
            {"config": TrainingConfig(**{**vars(CONFIG), "learning_rate": 1e-3})},
            r"training.learning_rate is 0.003 there and 0.001 here",
            id="learning_rate",
        ),
        pytest.param(
            {"config": TrainingConfig(**{**vars(CONFIG), "steps": 20})},
            r"training.steps is 11 there and 20 here",
            id="steps",
        ),
        pytest.param(
            {"network": UNetConfig(**{**vars(TINY), "widths": (8, 16)})},
            r"network.widths is \[8, 8\] there and \[8, 16\] here",
            id="network",
        ),
        pytest.param(
            {"diffusion": SamplerConfig(num_train_timesteps=40)},
            r"diffusion.num_train_timesteps is 50 there and 40 here",
            id="diffusion",
        ),
        pytest.param({"data": moons.batch}, "data.name is 'test_trainer' there and 'moons' here", id="data"),
    ],
)
def test_resuming_another_run_names_the_difference(uninterrupted, changes, says):
    before = {path.name: path.read_bytes() for path in uninterrupted.iterdir()}
    with pytest.raises(CheckpointError, match=f"belongs to another run: {says}"):
        trainer(uninterrupted, **changes)
    assert {path.name: path.read_bytes() for path in uninterrupted.iterdir()} == before


@pytest.mark.parametrize("size", [0, 5, 300, 100_000], ids="{}-bytes".format)
def test_a_truncated_state(tmp_path, size):
    with pytest.raises(KeyboardInterrupt):
        trainer(tmp_path, data=interrupt_at(5)).run(progress=False)
    os.truncate(tmp_path / "state.safetensors", size)
    with pytest.raises(CheckpointError, match="state.safetensors is truncated or not a safetensors file"):
        trainer(tmp_path)


def test_a_state_that_is_none(tmp_path):
    save_file({"x": torch.zeros(1)}, tmp_path / "state.safetensors")
    with pytest.raises(CheckpointError, match="state.safetensors"):
        trainer(tmp_path)


def test_a_half_written_row_of_metrics(tmp_path, uninterrupted):
    with pytest.raises(KeyboardInterrupt):
        trainer(tmp_path, data=interrupt_at(6)).run(progress=False)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 8, "lo')  # as a process killed during a write leaves it
    trainer(tmp_path).run(progress=False)
    assert_same_run(tmp_path, uninterrupted)


def test_nan_stops_the_run_and_keeps_the_last_save(tmp_path, uninterrupted):
    def data(count, seed, step):
        return small_moons(count, seed, step) * (math.nan if step == 6 else 1)

    with pytest.raises(FloatingPointError, match=f"the loss became nan at step 6; {tmp_path} keeps the last save"):
        trainer(tmp_path, data=data).run(progress=False)
    assert all(value.isfinite().all() for value in load_file(tmp_path / "state.safetensors").values())
    assert [row["step"] for row in metrics(tmp_path)] == [4]
    trainer(tmp_path).run(progress=False)
    assert_same_run(tmp_path, uninterrupted)


def test_an_infinite_gradient_is_never_saved(tmp_path):
    run = trainer(tmp_path)
    run.model.enter.weight.register_hook(lambda gradient: gradient * (math.inf if run.step == 3 else 1))
    with pytest.raises(FloatingPointError):
        run.run(progress=False)
    for path in tmp_path.glob("state.safetensors"):
        assert all(value.isfinite().all() for value in load_file(path).values())


def test_the_checkpoint_is_loadable_at_any_time(tmp_path):
    loaded = []

    def data(count, seed, step):
        if step >= SAVES[0]:
            loaded.append(load_checkpoint(tmp_path).model.state_dict()["enter.weight"])
        return small_moons(count, seed, step)

    trainer(tmp_path, data=data).run(progress=False)
    assert len(loaded) == 11 - SAVES[0]
    assert all(torch.equal(a, loaded[0]) for a in loaded[:4])  # steps 4 … 7
    assert not torch.equal(loaded[3], loaded[4])


def test_the_average_of_the_weights(tmp_path):
    """Check ema <- d ema + (1 - d) weights with d = min(decay, (1 + i) / (10 + i)) after step i."""
    weights, averages = [], []

    def data(count, seed, step):
        weights.append(copy.deepcopy(run.model.state_dict()))
        averages.append(copy.deepcopy(run.ema.state_dict()))
        return small_moons(count, seed, step)

    run = trainer(tmp_path, TrainingConfig(**{**vars(CONFIG), "ema_decay": 0.4}), data=data)
    run.run(progress=False)
    for i in range(1, len(weights)):
        d = min(0.4, (1 + i) / (10 + i))
        for name, value in averages[i].items():
            want = d * averages[i - 1][name].double() + (1 - d) * weights[i][name].double()
            torch.testing.assert_close(value.double(), want, atol=1e-7, rtol=1e-6)
    assert not torch.equal(weights[1]["enter.bias"], weights[-1]["enter.bias"])


def test_the_network_sees_q_of_x_t_and_learns_the_noise(tmp_path):
    """Check x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) noise.

    The loss of a network that returns 0 must be noise^2.
    """
    x0 = torch.full((64, 1, 8, 8), 0.5)
    config = TrainingConfig(steps=1, batch_size=64, save_every=1, mixed_precision="no")
    run = trainer(tmp_path, config, data=lambda count, seed, step: x0)
    seen = []
    run.model.register_forward_pre_hook(lambda module, inputs: seen.append(inputs))
    run.run(progress=False)
    ((x_t, t),) = seen
    assert t.min() >= 0
    assert 40 < t.max() < 50
    assert len(t.unique()) > 20
    alpha_bar = torch.from_numpy(DIFFUSION.alphas_cumprod())[t].view(-1, 1, 1, 1)
    noise = (x_t.double() - alpha_bar.sqrt() * x0.double()) / (1 - alpha_bar).sqrt()
    assert noise.mean().item() == pytest.approx(0, abs=5 / 64)
    assert noise.var().item() == pytest.approx(1, abs=0.1)
    assert metrics(tmp_path)[0]["loss"] == pytest.approx(noise.square().mean().item(), rel=1e-3)


def test_every_step_draws_its_own_timesteps_and_noise(tmp_path):
    run = trainer(tmp_path, data=lambda count, seed, step: torch.zeros(count, 1, 8, 8))
    seen = []
    run.model.register_forward_pre_hook(lambda module, inputs: seen.append(inputs))
    run.run(progress=False)
    assert len({tuple(t.tolist()) for _, t in seen}) == 11
    assert len({x_t.std().item() for x_t, _ in seen}) == 11


def test_the_optimizer_follows_the_learning_rate(tmp_path):
    used = []
    run = trainer(tmp_path)
    run.optimizer.register_step_pre_hook(lambda optimizer, *_: used.append(optimizer.param_groups[0]["lr"]))
    run.run(progress=False)
    assert used == [CONFIG.learning_rate_at(step) for step in range(11)]


def test_learning_rate_shape():
    config = TrainingConfig(steps=100, learning_rate=0.5, warmup=10)
    rates = [config.learning_rate_at(step) for step in range(101)]
    assert rates[:10] == pytest.approx([0.05 * (step + 1) for step in range(10)])
    assert max(rates) == rates[9] == rates[10] == 0.5
    assert all(a > b for a, b in itertools.pairwise(rates[10:]))
    assert rates[55] == pytest.approx(0.25)  # halfway down
    assert rates[100] == pytest.approx(0, abs=1e-9)
    assert TrainingConfig(warmup=0, learning_rate=0.5).learning_rate_at(0) == 0.5


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("steps", 0),
        ("steps", 1.5),
        ("batch_size", 0),
        ("save_every", 0),
        ("warmup", -1),
        ("seed", -1),
        ("seed", True),
        ("learning_rate", 0),
        ("learning_rate", math.nan),
        ("ema_decay", 1.1),
    ],
)
def test_config_errors(name, value):
    with pytest.raises(ValueError, match=f"{name} must be .* got {value}"):
        TrainingConfig(**{name: value})


def test_a_seed_that_torch_does_not_take(tmp_path):
    with pytest.raises(ValueError, match="seed"):
        trainer(tmp_path, TrainingConfig(seed=2**64))


def test_state_says_where_it_stopped(uninterrupted):
    with safe_open(uninterrupted / "state.safetensors", "pt") as file:
        assert file.metadata()["step"] == "11"
        assert json.loads(file.metadata()["run"])["training"]["seed"] == 5


def command(folder, *arguments):
    options = {"out": folder, "steps": 4, "batch": 2, "save-every": 2, "lr": 0.002, "seed": 3}
    return cli.main(["train", *(f"--{name}={value}" for name, value in options.items()), *arguments])


def test_command_trains_and_resumes(tmp_path, monkeypatch, capsys):
    def small(data):
        return lambda folder, config, **given: Trainer(folder, config, TINY, DIFFUSION, data)

    monkeypatch.setattr(commands, "Trainer", small(small_moons))
    assert command(tmp_path / "a", "--quiet") == 0
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr(commands, "Trainer", small(interrupt_at(3)))
    assert command(tmp_path / "b", "--quiet") == 130
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("ddpm-fast: interrupted")
    assert err.count("\n") == 1
    monkeypatch.setattr(commands, "Trainer", small(small_moons))
    assert command(tmp_path / "b") == 0
    out, err = capsys.readouterr()
    assert out.splitlines()[0] == f"resuming {tmp_path / 'b'} at step 2 of 4"
    assert f"ddpm-fast sample --model {tmp_path / 'b'}" in out
    assert "4/4" in err
    assert_same_run(tmp_path / "b", tmp_path / "a")
    assert load_checkpoint(tmp_path / "b").about["training"] == {
        **vars(TrainingConfig()),
        **{"steps": 4, "batch_size": 2, "save_every": 2, "learning_rate": 0.002, "seed": 3},
    }


def test_command_trains_the_moon_model(tmp_path):
    assert cli.main(["train", "--out", str(tmp_path), "--steps", "1", "--batch", "1", "--quiet"]) == 0
    checkpoint = load_checkpoint(tmp_path)
    assert checkpoint.shape == (1, 32, 32)
    assert (checkpoint.model.config, checkpoint.diffusion) == (UNetConfig(), SamplerConfig())
    assert checkpoint.about["data"] == {"name": "moons"}


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        pytest.param(["--steps", "0"], "steps must be an integer >= 1, got 0", id="steps"),
        pytest.param(["--lr", "nan"], "learning_rate must be a finite number", id="lr"),
        pytest.param(["--device", "cuda:99"], "device 'cuda:99' is not there", id="device"),
        pytest.param(["--out", "/proc/a"], "/proc/a", id="unwritable"),
        pytest.param(["--out", __file__], os.path.basename(__file__), id="out-is-a-file"),
    ],
)
def test_command_errors(tmp_path, capsys, arguments, says):
    assert command(tmp_path / "a", "--quiet", *arguments) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith("ddpm-fast: ")
    assert says in err


def test_command_on_another_run(uninterrupted, capsys):
    assert command(uninterrupted, "--quiet") == 2
    assert "belongs to another run" in capsys.readouterr().err


def test_command_says_when_the_loss_is_nan(tmp_path, monkeypatch, capsys):
    def data(*_):
        return torch.full((2, 1, 8, 8), math.nan)

    monkeypatch.setattr(
        commands, "Trainer", lambda folder, config, **given: Trainer(folder, config, TINY, DIFFUSION, data)
    )
    assert command(tmp_path, "--quiet") == 1
    assert capsys.readouterr().err.startswith("ddpm-fast: the loss became nan at step 0")
