"""Training for any prediction and loss: Ho et al. 2020, algorithm 1, with an average of the weights (EMA)."""

import contextlib
import copy
import json
import logging
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from safetensors import safe_open
from torch import Tensor
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

from ddpm_fast import images
from ddpm_fast.config import SamplerConfig
from ddpm_fast.data import moons
from ddpm_fast.engine.progress import make_bar
from ddpm_fast.files import StrPath, alone_in, check_writable, parse_json, remove_parts, whole_file
from ddpm_fast.kernels import to_uint8
from ddpm_fast.likelihood import schedule_report
from ddpm_fast.models.checkpoint import (
    CONFIG_FILE,
    CheckpointError,
    check_weight,
    load_weights,
    read_config,
    read_safetensors,
    save_checkpoint,
    write_safetensors,
)
from ddpm_fast.models.unet import UNet, UNetConfig
from ddpm_fast.sample import sample
from ddpm_fast.seeding import keyed_generator
from ddpm_fast.training.losses import LOSSES, Loss
from ddpm_fast.validate import line_of, one_of, whole, within

logger = logging.getLogger("ddpm_fast")

NOISE_STREAM = 2
FAR_FROM_NOISE = 0.1  # largest sqrt(alpha_bar_T) without a warning; the schedules here reach at most 0.04
STATE_FILE = "state.safetensors"
METRICS_FILE = "metrics.jsonl"
SAMPLES_FILE = "samples.png"
MIXED_PRECISIONS = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

Batch: TypeAlias = Tensor | tuple[Tensor, Tensor]
Data: TypeAlias = Callable[[int, int, int], Batch]  # data(batch_size, seed, step)


@dataclass(frozen=True)
class TrainingConfig:
    """The options of training.

    Attributes:
        steps: Number of optimiser steps in all.
        batch_size: Number of images a step.
        learning_rate: Peak learning rate, reached after a linear warm-up. A cosine then falls to zero at `steps`.
        warmup: Number of warm-up steps.
        ema_decay: Decay of the average of the weights, which starts as a plain mean: min(decay, (1+i)/(10+i)).
        seed: Seed of weights, data, timesteps and noise.
        save_every: Number of steps between two saves. A save holds all that a resumption needs.
        mixed_precision: "bf16" or "fp16" runs the network under autocast, "no" runs it in float32. "fp16" scales the
            loss; a step whose gradient overflows is left out, and the scale halved.
        loss: "mse", "vlb" or "hybrid", as in `ddpm_fast.training.losses.Loss`.
        min_snr_gamma: Gamma of the SNR weight, as in `ddpm_fast.training.losses.Loss`.
        clip_gradient: Largest norm of the gradient of all parameters.
        label_dropout: Share of images whose class label becomes "no class", in [0, 1], so that a class-conditional
            network can be guided (Ho & Salimans 2022).
    """

    steps: int = 10_000
    batch_size: int = 64
    learning_rate: float = 1e-3
    warmup: int = 200
    ema_decay: float = 0.999
    seed: int = 0
    save_every: int = 250
    mixed_precision: str = "bf16"
    loss: str = "mse"
    min_snr_gamma: float | None = None
    clip_gradient: float = 1.0
    label_dropout: float = 0.1

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "save_every"):
            whole(name, getattr(self, name), 1)
        whole("warmup", self.warmup, 0)
        whole("seed", self.seed, 0, 2**32 - 1)
        within("learning_rate", self.learning_rate, 1e-12, 1.0)
        within("ema_decay", self.ema_decay, 0.0, 1.0)
        within("clip_gradient", self.clip_gradient, 0.0, 1e9, "(]")
        within("label_dropout", self.label_dropout, 0.0, 1.0)
        one_of("loss", self.loss, LOSSES)
        one_of("mixed_precision", self.mixed_precision, MIXED_PRECISIONS)

    def learning_rate_at(self, step: int) -> float:
        """Return the learning rate of optimiser step `step` (0-based)."""
        if step < self.warmup:
            return self.learning_rate * (step + 1) / self.warmup
        progress = (step - self.warmup) / max(self.steps - self.warmup, 1)
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))


class Trainer:
    """A trainer that fits a `UNet` to batches of data and keeps everything in `folder`.

    Step i draws its data, timesteps and noise from generators seeded by (seed, i) alone, so an interrupted and resumed
    run follows exactly the trajectory of an uninterrupted run. `folder` holds a checkpoint of the averaged weights,
    `state.safetensors` for resuming, and `metrics.jsonl`.

    If torch.distributed is initialised, each process takes its share of every batch (DistributedDataParallel), and the
    first process writes. The trajectory is then the same as with one process, up to the order of sums.

    Args:
        folder: Folder of the run. An existing run is resumed.
        config: Options of training. None takes the defaults.
        network: Sizes of the network. None takes the defaults.
        diffusion: Schedule, prediction type and variance. None takes the defaults.
        data: Called as data(batch_size, seed, step), such as `ddpm_fast.data.moons.batch`, or
            `ddpm_fast.data.pictures.Pictures`. For a network with classes, a batch is a pair: images and labels, int64
            [batch_size].
        device: Device of the training.
        samples: Number of samples that every save draws with the averaged weights (DDIM, 50 steps, seeds 0, 1, …) into
            `samples.png`, at most 1024.

    Raises:
        CheckpointError: `folder` holds a run with another configuration, or a broken run.
        ValueError: Loss, variance and network do not fit together, or a batch cannot be shared equally.
    """

    def __init__(
        self,
        folder: StrPath,
        config: TrainingConfig | None = None,
        network: UNetConfig | None = None,
        diffusion: SamplerConfig | None = None,
        data: Data = moons.batch,
        device: str | torch.device = "cpu",
        samples: int = 0,
    ) -> None:
        self.folder = Path(folder)
        self.config = config or TrainingConfig()
        self.network = network or UNetConfig()
        self.diffusion = diffusion or SamplerConfig()
        self.data = data
        self.samples = whole("samples", samples, 0, 1024)
        if samples and self.network.channels not in images.MODES:
            raise ValueError(f"a picture has {sorted(images.MODES)} channels, the network {self.network.channels}")
        self.device = torch.device(device)
        self.loss = Loss(self.diffusion, self.config.loss, self.config.min_snr_gamma, self.device)
        if self.network.learned_variance != self.loss.learned:
            raise ValueError(
                f"variance_type={self.diffusion.variance_type!r} {'needs' if self.loss.learned else 'goes without'} "
                f"learned_variance in the network, got {self.network.learned_variance}"
            )
        report = schedule_report(self.diffusion)
        if report["signal"] > FAR_FROM_NOISE:
            logger.warning(
                "the schedule ends at sqrt(alpha_bar_T) = %.2f: x_T is no pure noise, which sampling begins with",
                report["signal"],
            )
        distributed = dist.is_available() and dist.is_initialized()
        self.rank, self.world = (dist.get_rank(), dist.get_world_size()) if distributed else (0, 1)
        if self.config.batch_size % self.world:
            raise ValueError(f"batch_size must be a multiple of {self.world} processes, got {self.config.batch_size}")
        check_writable(self.folder, folder=True)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.config.seed)
            self.model = UNet(self.network).to(self.device)
        self.ema = copy.deepcopy(self.model).requires_grad_(False).eval()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=self.config.learning_rate)
        self.precision = MIXED_PRECISIONS[self.config.mixed_precision]
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.precision == torch.float16)
        self.alpha_bar = torch.from_numpy(self.diffusion.alphas_cumprod()).to(self.device)
        self._network = DistributedDataParallel(self.model) if self.world > 1 else self.model
        self.step = 0
        self._seen = self._written()
        if (self.folder / STATE_FILE).exists():
            self._resume()
        elif (self.folder / CONFIG_FILE).exists():
            self._refuse_another_run(read_config(self.folder), self.folder / CONFIG_FILE)

    def run(self, progress: bool = True) -> None:
        """Train to the configured number of steps. An interruption loses only the steps since the last save.

        Raises:
            OSError: Another process trains in the folder or has trained there since this trainer was made, or the
                folder is gone.
        """
        with contextlib.ExitStack() as held:
            if self.rank == 0:
                held.enter_context(alone_in(self.folder))
                if self._written() not in (None, self._seen):
                    raise OSError(f"another process has trained in {self.folder} just now: start again to resume there")
                remove_parts(self.folder)
                self._drop_metrics_after(self.step)
            self._run(progress)

    def _run(self, progress: bool) -> None:
        bar = make_bar(total=self.config.steps, initial=self.step, unit="step", disable=not progress or self.rank > 0)
        losses: list[float] = []
        start = time.perf_counter()
        try:
            while self.step < self.config.steps:
                losses.append(self._train_step())
                bar.update()
                if self.step % self.config.save_every == 0 or self.step == self.config.steps:
                    bar.set_postfix(loss=f"{sum(losses) / len(losses):.4f}")
                    if self.rank == 0:
                        self._log(sum(losses) / len(losses), (time.perf_counter() - start) / len(losses))
                        self.save()
                    losses, start = [], time.perf_counter()
        finally:
            bar.close()

    def save(self) -> None:
        """Write the checkpoint of the averaged weights and the state for resuming.

        Raises:
            FileNotFoundError: The folder is gone.
        """
        if not self.folder.is_dir():
            raise FileNotFoundError(f"the folder {self.folder} is gone, with the run in it")
        save_checkpoint(self.folder, self.ema, self.diffusion, about=self._about)
        tensors = {f"model.{name}": value for name, value in self.model.state_dict().items()}
        tensors |= {f"ema.{name}": value for name, value in self.ema.state_dict().items()}
        for index, moments in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{name}": value for name, value in moments.items()}
        scale = json.dumps(self.scaler.state_dict())
        metadata = {"step": str(self.step), "run": json.dumps(self._identity()), "scaler": scale}
        tensors = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
        write_safetensors(self.folder / STATE_FILE, tensors, metadata)
        self._seen = self._written()
        if self.samples:
            self._draw()

    def _written(self) -> tuple[int, int] | None:
        """Return what tells one state file from a later one; None where there is none."""
        try:
            found = (self.folder / STATE_FILE).stat()
        except FileNotFoundError:
            return None
        return found.st_ino, found.st_mtime_ns

    def _draw(self) -> None:
        """Draw samples with the averaged weights, of all classes in turn, and write `samples.png`."""
        seeds, steps = range(self.samples), min(50, self.diffusion.num_train_timesteps)
        shape = (len(seeds), self.network.channels, self.network.image_size, self.network.image_size)
        classes = self.network.num_classes
        labels = (
            None
            if classes is None
            else {"class_labels": torch.arange(self.samples, dtype=torch.int64, device="cpu") % classes}
        )
        x = sample(
            self.ema, shape, seeds=seeds, model_kwargs=labels, config=self.diffusion, sampler="ddim",
            num_inference_steps=steps, device=self.device, progress=False,
        )  # fmt: skip
        images.save(
            self.folder / SAMPLES_FILE, to_uint8(x).cpu().numpy(), seeds, {"step": self.step, "model": self.folder.name}
        )

    def _train_step(self) -> float:
        """Take one optimiser step and return its loss."""
        config = self.config
        for group in self.optimizer.param_groups:
            group["lr"] = config.learning_rate_at(self.step)
        x_0, labels = self._batch()
        generator = keyed_generator(NOISE_STREAM, config.seed, self.step)
        t = torch.randint(len(self.alpha_bar), (len(x_0),), generator=generator, dtype=torch.int64, device="cpu").to(
            self.device
        )
        noise = torch.randn(x_0.shape, generator=generator, dtype=torch.float32, device="cpu").to(self.device)
        conditioning, count = [], self.network.num_classes
        if labels is not None and count is not None:
            dropped = (
                torch.rand(len(x_0), generator=generator, dtype=torch.float32, device="cpu") < config.label_dropout
            )
            conditioning = [labels.masked_fill(dropped, count).to(self.device)]
        x_0, t, noise, *conditioning = (tensor[self.rank :: self.world] for tensor in (x_0, t, noise, *conditioning))
        alpha_bar = self.alpha_bar[t].view(-1, 1, 1, 1)
        x_t = alpha_bar.sqrt().float() * x_0 + (1 - alpha_bar).sqrt().float() * noise
        with torch.autocast(self.device.type, self.precision, enabled=self.precision != torch.float32):
            prediction = self._network(x_t, t, *conditioning)
        loss = self.loss(prediction, x_0, x_t, noise, t).mean()
        value = self._mean(loss)
        self._check_finite("loss", value)
        self.optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(self.scaler.scale(loss))
        self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), config.clip_gradient).item()
        if not self.scaler.is_enabled() or self.scaler.get_scale() <= 1:
            self._check_finite("gradient", norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.step += 1
        decay = min(config.ema_decay, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            torch._foreach_lerp_(list(self.ema.parameters()), list(self.model.parameters()), 1 - decay)
        return value

    def _batch(self) -> tuple[Tensor, Tensor | None]:
        """Return images on the device, and labels if the network takes labels."""
        batch = self.data(self.config.batch_size, self.config.seed, self.step)
        x_0, labels = batch if isinstance(batch, tuple) else (batch, None)
        count = self.network.num_classes
        if (labels is None) != (count is None):
            have, takes = "none" if labels is None else "labels", "none" if count is None else f"{count} classes"
            raise ValueError(f"data and network do not fit: the data have {have}, the network takes {takes}")
        if labels is None or count is None:
            return x_0.to(self.device), None
        if labels.shape != (len(x_0),) or labels.is_floating_point() or labels.is_complex():
            raise ValueError(f"labels must be integers [{len(x_0)}], got {labels.dtype} {list(labels.shape)}")
        labels = labels.long()  # in fewer bits the label "no class" could wrap to a class
        if not 0 <= labels.min() <= labels.max() < count:
            raise ValueError(f"labels must lie in 0 … {count - 1}, got {labels.min()} … {labels.max()}")
        return x_0.to(self.device), labels

    def _mean(self, loss: Tensor) -> float:
        """Return the mean loss of all processes, so that all continue or stop together."""
        total = loss.detach().clone()
        if self.world > 1:
            dist.all_reduce(total)
        return total.item() / self.world

    def _check_finite(self, quantity: str, value: float) -> None:
        """Raise FloatingPointError unless the value is finite."""
        if not math.isfinite(value):
            raise FloatingPointError(
                f"the {quantity} became {value} at step {self.step}; {self.folder} keeps the last save"
            )

    @property
    def _about(self) -> dict[str, Any]:
        """The training options and the identity of the data, for config.json."""
        return {"training": asdict(self.config), "data": self._data_about()}

    def _data_about(self) -> dict[str, Any]:
        """Return the identity of the data: its `about`, or the name of its module."""
        return getattr(self.data, "about", None) or {"name": self.data.__module__.rpartition(".")[2]}

    def _identity(self) -> dict[str, Any]:
        """Return everything that two runs in one folder must have in common."""
        return {"network": self.network.to_dict(), "diffusion": self.diffusion.to_dict(), **self._about}

    def _log(self, loss: float, seconds: float) -> None:
        """Append a row to `metrics.jsonl`."""
        row = {"step": self.step, "loss": loss, "learning_rate": self.config.learning_rate_at(self.step - 1)}
        with open(self.folder / METRICS_FILE, "a", encoding="utf-8") as file:
            file.write(json.dumps({**row, "seconds_per_step": round(seconds, 4)}) + "\n")

    def _drop_metrics_after(self, step: int) -> None:
        """Remove rows of `metrics.jsonl` that a killed run wrote after its last save."""
        path = self.folder / METRICS_FILE
        if path.exists():
            try:
                rows = path.read_text(encoding="utf-8").splitlines(keepends=True)
                kept = [row for row in rows if row.endswith("\n") and json.loads(row)["step"] <= step]
            except (ValueError, KeyError, TypeError) as error:
                raise CheckpointError(f"{path} has a row that is no record of a step: {error}") from error
            with whole_file(path) as part:
                part.write_text("".join(kept), encoding="utf-8")

    def _refuse_another_run(self, saved: dict[str, Any], path: Path) -> None:
        """Raise CheckpointError unless the saved run has this configuration."""
        expected = json.loads(json.dumps(self._identity()))
        if saved != expected:
            raise CheckpointError(f"{path} belongs to another run: {_first_difference(saved, expected)}")

    def _resume(self) -> None:
        """Load the state of the last save."""
        path = self.folder / STATE_FILE
        tensors = read_safetensors(path)
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
        if not metadata.keys() >= {"run", "step", "scaler"}:
            raise CheckpointError(f"{path} is not the state of a training run")
        try:
            run, scaler, step = (parse_json(metadata[name]) for name in ("run", "scaler", "step"))
        except ValueError as error:
            raise CheckpointError(f"{path} is damaged: {line_of(error)}") from error
        if not isinstance(run, dict) or not isinstance(scaler, dict):
            raise CheckpointError(f"{path} is damaged: it does not say which run it belongs to")
        self._refuse_another_run(run, path)
        if not isinstance(step, int) or not 0 < step <= self.config.steps:
            raise CheckpointError(f"{path} is damaged: its step must lie in 1 … {self.config.steps}, got {step!r:.40}")
        parts = self._checked_parts(path, tensors)
        for prefix, module in (("model.", self.model), ("ema.", self.ema)):
            load_weights(module, parts[prefix], f"{path} is damaged")
        state: dict[int, dict[str, Tensor]] = {}
        for name, value in parts["optimizer."].items():
            index, moment = name.split(".")
            state.setdefault(int(index), {})[moment] = value
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": state})
        if self.scaler.is_enabled():
            self.scaler.load_state_dict(scaler)
        self.step = step

    def _checked_parts(self, path: Path, tensors: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
        """Return the tensors of a state by their prefix; raise CheckpointError unless all are there, and no other."""
        own = self.model.state_dict()
        expected = {f"{prefix}{name}": value for prefix in ("model.", "ema.") for name, value in own.items()}
        for index, parameter in enumerate(self.model.parameters()):
            expected |= {f"optimizer.{index}.{name}": parameter for name in ("exp_avg", "exp_avg_sq")}
            expected[f"optimizer.{index}.step"] = torch.zeros((), dtype=torch.float32, device="cpu")
        for problem, names in (("lacks", expected.keys() - tensors.keys()), ("has", tensors.keys() - expected.keys())):
            if names:
                raise CheckpointError(f"{path} is damaged: it {problem} {', '.join(sorted(names)[:3])} ({len(names)})")
        parts: dict[str, dict[str, Tensor]] = {"model.": {}, "ema.": {}, "optimizer.": {}}
        for name, value in tensors.items():
            check_weight(f"{path} is damaged: {name}", value, expected[name])
            prefix, _, rest = name.partition(".")
            parts[f"{prefix}."][rest] = value
        return parts


def _first_difference(saved: dict[str, Any], expected: dict[str, Any], prefix: str = "") -> str:
    """Return a description of the first entry that differs."""
    for key in sorted(saved.keys() | expected.keys()):
        a, b = saved.get(key), expected.get(key)
        if isinstance(a, dict) and isinstance(b, dict) and a != b:
            return _first_difference(a, b, f"{prefix}{key}.")
        if a != b:
            return f"{prefix}{key} is {a!r} there and {b!r} here"
    return "no difference"
