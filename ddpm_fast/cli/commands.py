"""The commands of `ddpm-fast`."""

import argparse
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

import ddpm_fast
from ddpm_fast import images
from ddpm_fast.adapters.load import load_model, parse_arguments
from ddpm_fast.cli.info import describe, path_taken
from ddpm_fast.config import SamplerConfig
from ddpm_fast.data import digits, moons
from ddpm_fast.data.pictures import Pictures
from ddpm_fast.edit import check_mixture, from_level, mixture
from ddpm_fast.engine import choices
from ddpm_fast.engine.device import checked_device, default_device
from ddpm_fast.engine.report import Speculation
from ddpm_fast.files import check_writable, write_json
from ddpm_fast.kernels import to_uint8
from ddpm_fast.likelihood import bits_per_dimension
from ddpm_fast.models.checkpoint import EMBEDDED, Checkpoint
from ddpm_fast.models.unet import UNetConfig
from ddpm_fast.sample import Sampler
from ddpm_fast.seeding import parse_seeds, resolve_seeds
from ddpm_fast.training import Trainer, TrainingConfig
from ddpm_fast.training.trainer import Data
from ddpm_fast.validate import whole

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
NO_CLASS = "none"

Conditioning = dict[str, torch.Tensor]
Drawn = tuple[Sequence[int], images.Bytes, Speculation | None]


def sample(arguments: argparse.Namespace) -> None:
    """Draw samples."""
    seeds = _seeds(arguments)
    checkpoint, config, device = _open(arguments)
    kind = images.check_output(arguments.out, checkpoint.shape, seeds)
    _write(arguments, kind, seeds, config, device, _draw(checkpoint, config, seeds, device, arguments), {})


def interpolate(arguments: argparse.Namespace) -> None:
    """Fuse two pictures."""
    seeds = _seeds(arguments)
    checkpoint, config, device = _open(arguments)
    kind = images.check_output(arguments.out, checkpoint.shape, seeds)
    config = from_level(config, arguments.level)
    ends, names = _read(arguments.pictures, checkpoint.shape)
    if len(ends) != 2:
        raise ValueError(f"two pictures are fused, got {len(ends)}")
    mixing = {"lam": arguments.lam, "mixing": arguments.mixing, "shared_noise": arguments.shared_noise}
    about = {"interpolate": {"pictures": names, "level": arguments.level, **mixing}}
    ends = ends.to(device)
    a, b = ends[:1], ends[1:]
    check_mixture(a, b, arguments.lam, arguments.mixing)

    def start(part: Sequence[int]) -> torch.Tensor:
        size = (len(part), *checkpoint.shape)
        return mixture(a.expand(size), b.expand(size), config=config, seeds=part, **mixing)

    _write(arguments, kind, seeds, config, device, _draw(checkpoint, config, seeds, device, arguments, start), about)


def likelihood(arguments: argparse.Namespace) -> None:
    """Compute bits per dimension of pictures."""
    checkpoint, config, device = _open(arguments)
    if arguments.out is not None:
        if not arguments.out.endswith(".json"):
            raise ValueError(f"--out must be a .json file, got {arguments.out!r}")
        check_writable(arguments.out)
    pictures, names = _read(arguments.pictures, checkpoint.shape)
    seeds = range(len(names)) if arguments.seeds is None else parse_seeds(arguments.seeds)
    bound = bits_per_dimension(
        checkpoint.model, pictures, config=config, seeds=seeds, batch_size=arguments.batch, device=device,
        model_kwargs=_conditioning(checkpoint, arguments.label, seeds), dtype=DTYPES[arguments.dtype],
        progress=False if arguments.quiet else "likelihood",
    )  # fmt: skip
    if arguments.out is not None:
        rows = [
            {"picture": name, "seed": seed, "total": total, "prior": prior, "terms": terms}
            for name, seed, total, prior, terms in zip(
                names, bound.seeds, bound.total.tolist(), bound.prior.tolist(), bound.terms.tolist(), strict=True
            )
        ]
        timesteps = bound.timesteps.tolist()
        write_json(arguments.out, {**_about(arguments, config), "timesteps": timesteps, "pictures": rows})
    decoder = bound.terms[:, -1].mean()
    steps = bound.terms[:, :-1].sum(1).mean()
    print(
        f"{len(names)} pictures: at most {bound.total.mean():.4f} bits per dimension (prior {bound.prior.mean():.4f}, "
        f"steps {steps:.4f}, decoder {decoder:.4f}); lowest {bound.total.min():.4f}, highest {bound.total.max():.4f}"
    )


def train(arguments: argparse.Namespace) -> None:
    """Train a network, or resume its training."""
    config = TrainingConfig(
        steps=arguments.steps,
        batch_size=arguments.batch,
        learning_rate=arguments.lr,
        seed=arguments.seed,
        save_every=arguments.save_every,
        mixed_precision=arguments.mixed_precision,
        loss=arguments.loss,
        min_snr_gamma=arguments.min_snr,
        label_dropout=arguments.label_dropout,
    )
    device = checked_device(arguments.device)
    learned = arguments.loss == "hybrid"
    diffusion = SamplerConfig(
        beta_schedule=arguments.schedule,
        prediction_type=arguments.predict,
        variance_type="learned_range" if learned else "fixed_small",
    )
    data, network = _data(arguments, learned)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:  # set by torchrun
        if device.type == "cuda":
            device = checked_device(f"cuda:{os.environ['LOCAL_RANK']}")
            torch.cuda.set_device(device)
        torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    trainer = Trainer(
        arguments.out,
        config,
        network=network,
        diffusion=diffusion,
        data=data,
        device=device,
        samples=arguments.samples,
    )
    arguments.quiet = arguments.quiet or trainer.rank > 0
    if trainer.step and not arguments.quiet:
        print(f"resuming {arguments.out} at step {trainer.step} of {config.steps}")
    trainer.run(progress=not arguments.quiet)
    if trainer.world > 1:
        torch.distributed.barrier()  # the other processes may still need this one
        torch.distributed.destroy_process_group()
    if not arguments.quiet:
        print(f"{arguments.out}{os.sep}: a checkpoint; ddpm-fast sample --model {arguments.out} draws from it")


def info(arguments: argparse.Namespace) -> None:
    """Print versions, devices and the path of execution; with --forget, forget the choices on disk."""
    if arguments.forget:
        print(f"{choices.forget()} choices forgotten")
        return
    for name, value in describe():
        print(f"{name:<14}{value}")


def _data(arguments: argparse.Namespace, learned_variance: bool) -> tuple[Data, UNetConfig]:
    """Return the training data, and the sizes of a network for the data."""
    name, exists = arguments.data, Path(arguments.data).exists()
    if name == "moons" and not exists:
        if arguments.flip:
            raise ValueError("--flip is for pictures: a mirrored moon is another moon of the data")
        return moons.batch, UNetConfig.for_images(1, moons.SIZE, arguments.widths, learned_variance=learned_variance)
    if name == "digits" and not exists:
        if arguments.flip:
            raise ValueError("--flip is for pictures: a mirrored digit is none")
        data = digits.training()
    else:
        data = Pictures.read(name, arguments.flip, square=True)
    channels, side, _ = data.shape
    classes = None if data.classes is None else len(data.classes)
    network = UNetConfig.for_images(
        channels, side, arguments.widths, learned_variance=learned_variance, num_classes=classes
    )
    return data, network


def _seeds(arguments: argparse.Namespace) -> Sequence[int]:
    """Return the seeds that the arguments name, or 16 fresh ones."""
    if arguments.batch < 1:
        raise ValueError(f"--batch must be at least 1, got {arguments.batch}")
    seeds = resolve_seeds(None, 16) if arguments.seeds is None else parse_seeds(arguments.seeds)
    resolve_seeds(seeds, len(seeds))
    return seeds


def _open(arguments: argparse.Namespace) -> tuple[Checkpoint, SamplerConfig, torch.device]:
    """Return the model, the sampler's configuration and the device that the arguments name."""
    device = checked_device(arguments.device) if arguments.device else default_device()
    given = None if arguments.model_args is None else parse_arguments(arguments.model_args)
    checkpoint = load_model(arguments.model, given, device)
    _check_classes(checkpoint, arguments.label, getattr(arguments, "guidance", None))
    return checkpoint, SamplerConfig.from_options(_options(arguments), checkpoint.diffusion), device


def _read(paths: Sequence[str], shape: tuple[int, ...]) -> tuple[torch.Tensor, list[str]]:
    """Read pictures as float32 [N, C, H, W] on [-1, 1], and their names."""
    pictures, names = images.read(paths, shape)
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1, names


def _about(arguments: argparse.Namespace, config: SamplerConfig) -> dict[str, object]:
    """Return the metadata of an output file."""
    path = Path(arguments.model)
    embedded = EMBEDDED.get(arguments.model) if not path.exists() else None
    guidance = getattr(arguments, "guidance", None)
    return {
        "version": ddpm_fast.__version__,
        "model": f"embedded {embedded.name}" if embedded else path.resolve().name,
        **({} if arguments.label is None else {"label": arguments.label}),
        **({} if guidance is None else {"guidance": guidance}),
        "dtype": arguments.dtype,
        "config": config.to_dict(),
    }


def _write(
    arguments: argparse.Namespace,
    kind: str,
    seeds: Sequence[int],
    config: SamplerConfig,
    device: torch.device,
    batches: Iterator[Drawn],
    extra: Mapping[str, object],
) -> None:
    """Write the samples and print a summary."""
    start = time.perf_counter()
    about = {**_about(arguments, config), **extra}
    finished: list[images.Bytes] = []
    calls = 0
    for batch, pictures, speculation in batches:
        if speculation is not None:
            about["speculate"] = speculation.windows
            calls += speculation.calls
        if kind == "folder":
            if not Path(arguments.out).is_dir():
                raise FileNotFoundError(f"the folder {arguments.out} is gone")
            images.save(arguments.out, pictures, batch, about)  # an interruption keeps the finished files
        else:
            finished.append(pictures)
    if kind != "folder":
        images.save(arguments.out, np.concatenate(finished), seeds, about)
    if not arguments.quiet:
        steps = len(config.inference_timesteps())
        seconds = time.perf_counter() - start
        span = f"seed {seeds[0]}" if len(seeds) == 1 else f"seeds {seeds[0]} … {seeds[-1]}"
        network_calls = f" in {calls} network calls in all" if calls else ""
        print(f"{arguments.out}: {len(seeds)} samples, {span}, {steps} steps each{network_calls}, {seconds:.1f} s")
        print(f"path: {path_taken(device)}")


def _check_classes(checkpoint: Checkpoint, label: str | None, guidance: float | None) -> None:
    """Raise ValueError unless the model accepts the class labels and the guidance."""
    classes = checkpoint.classes
    if classes is None:
        for name, given in (("--label", label), ("--guidance", guidance)):
            if given is not None:
                raise ValueError(f"the model knows no classes, got {name} {given}")
        return
    if guidance is not None:
        if classes.none is None:
            raise ValueError("--guidance needs a model that was also taught without classes")
        if label in (None, NO_CLASS):
            raise ValueError("--guidance leads to a class: say which with --label")
    if label is None and classes.none is None:
        raise ValueError(f"the model draws one of {classes.count} classes: say which, --label 0 … {classes.count - 1}")
    _conditioning(checkpoint, label, [0])


def _conditioning(checkpoint: Checkpoint, label: str | None, seeds: Sequence[int]) -> Conditioning:
    """Return the class labels for samples of these seeds.

    Of several labels, seed k gets number k modulo their count.
    """
    classes = checkpoint.classes
    if classes is None:
        return {}
    if label in (None, NO_CLASS):
        if classes.none is None:
            raise ValueError(f"the model was not taught without classes, got --label {label}")
        return {classes.keyword: torch.full((len(seeds),), classes.none, dtype=torch.int64, device="cpu")}
    try:
        labels = parse_seeds(label)
    except ValueError:
        raise ValueError(f"--label is a class, several such as 0-9 or 1,4,7, or {NO_CLASS}, got {label!r}") from None
    for number in labels:
        whole("--label", number, 0, classes.count - 1)
    return {
        classes.keyword: torch.tensor([labels[seed % len(labels)] for seed in seeds], dtype=torch.int64, device="cpu")
    }


def _options(arguments: argparse.Namespace) -> dict[str, object]:
    """Return the fields of `SamplerConfig` that the arguments set."""
    names = {"steps": "num_inference_steps", "sampler": "sampler", "eta": "eta", "temperature": "temperature"}
    given = {names[name]: getattr(arguments, name, None) for name in names}
    return {name: value for name, value in given.items() if value is not None}


def _draw(
    checkpoint: Checkpoint,
    config: SamplerConfig,
    seeds: Sequence[int],
    device: torch.device,
    arguments: argparse.Namespace,
    start: Callable[[Sequence[int]], torch.Tensor] | None = None,
) -> Iterator[Drawn]:
    """Yield the samples batch by batch: seeds, uint8 [n, H, W, C], and the speculation. `start` gives x_T."""
    sampler: Sampler[torch.Tensor] | None = None
    speculate = arguments.speculate
    for number, (batch, title) in enumerate(_batches(seeds, arguments.batch), 1):
        conditioning = _conditioning(checkpoint, arguments.label, batch)
        unconditional = _conditioning(checkpoint, NO_CLASS, batch) if arguments.guidance is not None else None
        if sampler is None or sampler.shape[0] != len(batch):
            sampler = Sampler(
                checkpoint.model,
                (len(batch), *checkpoint.shape),
                model_kwargs=conditioning,
                guidance_scale=arguments.guidance,
                uncond_kwargs=unconditional,
                config=config,
                device=device,
                dtype=DTYPES[arguments.dtype],
                memory_format=arguments.memory_format,
                compile=arguments.compile and number == 1,  # a smaller last batch would compile again
                speculate=speculate,
            )
            speculate = sampler.windows or False  # the images depend on the windows, so all batches share them
        x_T = None if start is None else start(batch)
        bar = False if arguments.quiet else title
        result = sampler(
            seeds=batch, x_T=x_T, model_kwargs=conditioning, uncond_kwargs=unconditional, output="result", progress=bar
        )  # fmt: skip
        yield batch, to_uint8(result.sample).cpu().numpy(), result.speculation


def _batches(seeds: Sequence[int], size: int) -> Iterator[tuple[Sequence[int], str]]:
    """Yield the seeds in batches, each with the title of its progress bar."""
    batches = [seeds[start : start + size] for start in range(0, len(seeds), size)]
    for number, batch in enumerate(batches, 1):
        yield batch, f"batch {number} of {len(batches)}" if len(batches) > 1 else "sampling"
