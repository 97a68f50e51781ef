"""Tests of training under autocast: every precision learns, and in float16 an overflow costs a step, not the run."""

import dataclasses
import math

import pytest
import torch
from safetensors.torch import load_file

from ddpm_fast import cli
from ddpm_fast.models.checkpoint import load_checkpoint
from ddpm_fast.training import TrainingConfig
from ddpm_fast.training.trainer import MIXED_PRECISIONS
from tests.training.test_trainer import CONFIG, assert_same_run, interrupt_at, metrics, trainer

FP16 = dataclasses.replace(CONFIG, mixed_precision="fp16")


@pytest.mark.parametrize("precision", MIXED_PRECISIONS)
def test_the_loss_falls_and_the_network_runs_in_its_precision(tmp_path, precision):
    config = TrainingConfig(
        steps=60, batch_size=8, learning_rate=1e-2, warmup=10, save_every=12, mixed_precision=precision
    )
    run = trainer(tmp_path, config)
    seen = set()
    run.model.leave[-1].register_forward_hook(lambda module, given, output: seen.add(output.dtype))
    run.run(progress=False)
    assert seen == {MIXED_PRECISIONS[precision]}
    assert all(value.dtype == torch.float32 for value in load_file(tmp_path / "state.safetensors").values())
    losses = [row["loss"] for row in metrics(tmp_path)]
    assert losses[-1] < 0.6 * losses[0]


def test_precisions_agree(tmp_path):
    """Compare the first steps of one run in each precision."""
    losses = {}
    for precision in MIXED_PRECISIONS:
        trainer(tmp_path / precision, dataclasses.replace(CONFIG, mixed_precision=precision)).run(progress=False)
        losses[precision] = metrics(tmp_path / precision)[-1]["loss"]
    assert losses["fp16"] == pytest.approx(losses["no"], rel=2e-3)
    assert losses["bf16"] == pytest.approx(losses["no"], rel=2e-2)


def overflow_at(run, steps):
    """Make the gradient of these steps infinite."""
    place = run.model.enter.weight
    place.register_hook(lambda gradient: gradient * math.inf if run.step in steps else gradient)


def test_a_step_that_overflows_is_left_out_and_the_scale_halved(tmp_path):
    run = trainer(tmp_path, FP16)
    overflow_at(run, {5, 7})
    seen = []
    original = run._train_step

    def watched():
        before = [parameter.detach().clone() for parameter in run.model.parameters()]
        scale = run.scaler.get_scale()
        loss = original()
        same = all(torch.equal(a, b) for a, b in zip(before, run.model.parameters(), strict=True))
        seen.append((same, run.scaler.get_scale() / scale))
        return loss

    run._train_step = watched
    run.run(progress=False)
    assert [step for step, (same, _) in enumerate(seen) if same] == [5, 7]
    assert [factor for _, factor in seen] == [0.5 if step in (5, 7) else 1 for step in range(CONFIG.steps)]
    assert all(bool(parameter.isfinite().all()) for parameter in run.model.parameters())


def test_overflow_without_end_stops_the_run(tmp_path):
    run = trainer(tmp_path, dataclasses.replace(FP16, steps=40, save_every=4))
    overflow_at(run, range(6, 40))
    with pytest.raises(FloatingPointError, match=r"the gradient became (inf|nan) at step 22; .* keeps the last save"):
        run.run(progress=False)  # the scale 2 ** 16 is halved sixteen times
    load_checkpoint(tmp_path)
    for name, value in load_file(tmp_path / "state.safetensors").items():
        assert bool(value.isfinite().all()), name


def test_resuming_restores_the_scale(tmp_path):
    whole = trainer(tmp_path / "whole", FP16)
    overflow_at(whole, {2, 6})
    whole.run(progress=False)
    part = trainer(tmp_path / "part", FP16, data=interrupt_at(5))
    overflow_at(part, {2, 6})
    with pytest.raises(KeyboardInterrupt):
        part.run(progress=False)
    resumed = trainer(tmp_path / "part", FP16)
    assert (resumed.step, resumed.scaler.get_scale()) == (4, 2.0**15)
    overflow_at(resumed, {2, 6})
    resumed.run(progress=False)
    assert resumed.scaler.state_dict() == whole.scaler.state_dict()
    assert_same_run(tmp_path / "part", tmp_path / "whole")


def test_the_command_takes_it(tmp_path, capsys):
    options = ["--steps", "1", "--batch", "1", "--samples", "0", "--quiet", "--mixed-precision"]
    assert cli.main(["train", "--out", str(tmp_path / "run"), *options, "fp16"]) == 0
    assert load_checkpoint(tmp_path / "run").about["training"]["mixed_precision"] == "fp16"
    assert cli.main(["train", "--out", str(tmp_path / "run"), *options, "no"]) == 2
    assert "training.mixed_precision is 'fp16' there and 'no' here" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"mixed_precision must be one of \['no', 'bf16', 'fp16'\], got 'fp8'"):
        dataclasses.replace(CONFIG, mixed_precision="fp8")
