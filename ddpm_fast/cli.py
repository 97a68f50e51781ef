"""The command line: `ddpm-fast sample | interpolate | likelihood | train | info`, also as `python -m ddpm_fast`."""

import argparse
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

import ddpm_fast
from ddpm_fast import images
from ddpm_fast.adapters.checkpoints import load_model, parse_arguments
from ddpm_fast.config import PREDICTION_TYPES, SAMPLERS, SamplerConfig
from ddpm_fast.data import moons
from ddpm_fast.data.pictures import Pictures
from ddpm_fast.edit import MIXINGS, check_mixture, from_level, mixture
from ddpm_fast.engine import Sampler
from ddpm_fast.execution import MEMORY_FORMATS
from ddpm_fast.files import check_writable, write_json
from ddpm_fast.info import describe, path_taken
from ddpm_fast.kernels import to_uint8
from ddpm_fast.likelihood import bits_per_dimension
from ddpm_fast.losses import LOSSES
from ddpm_fast.models.checkpoint import EMBEDDED, Checkpoint
from ddpm_fast.models.unet import UNetConfig
from ddpm_fast.network import checked_device, default_device
from ddpm_fast.schedules import BETA_SCHEDULES
from ddpm_fast.seeding import parse_seeds, resolve_seeds
from ddpm_fast.training import Trainer, TrainingConfig
from ddpm_fast.validate import whole

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
BAD_INPUT, FAILED, INTERRUPTED = 2, 1, 130

SAMPLE_HELP = """\
Draw samples and write them as a picture grid, a folder of pictures or an array.

  ddpm-fast sample --seeds 0-15 --out samples.png       a grid; the moon model that ships with the package
  ddpm-fast sample --seeds 0-49999 --out moons.npz      uint8 [N, H, W, C] in arr_0, as FID scripts read it
  ddpm-fast sample --seeds 7 --out folder               folder/000007.png
  ddpm-fast sample --sampler ddim --steps 50 …          fifty deterministic steps instead of a thousand

--model takes a checkpoint folder of ddpm-fast, or models of other libraries:

  --model folder                                        diffusers: a DDPMPipeline, a DDIMPipeline or a UNet2DModel
  --model model-7.pt --model-args args.json             lucidrains: {"unet": {"dim": 64, …}, "diffusion": {…}}
  --model 64x64.pt --model-args="$MODEL_FLAGS"          guided-diffusion, with a checkout of it on PYTHONPATH
  --model package.module:factory                        your own: a function that returns (model, (C, H, W))

Image k depends on seed k alone: any batch size, any order and any split over machines gives the same images."""

INTERPOLATE_HELP = """\
Fuse two pictures: noise both to a level, mix them, and walk back. Every seed is another draw between the two: look at
many.

  ddpm-fast sample --seeds 0-9 --out moons                      pictures of the model's size
  ddpm-fast interpolate moons/000000.png moons/000001.png --level 300 --seeds 0-63 --out fused.png

Low levels blend greyly, high ones forget the pictures: docs/walk.md shows which do what."""

LIKELIHOOD_HELP = """\
How likely the model finds pictures: the variational bound in bits per dimension (lower is likelier), from one draw of
noise a timestep, by default seed k for picture k.

  ddpm-fast likelihood moons/000000.png                         one picture, 1000 network calls
  ddpm-fast likelihood moons.npz --steps 100 --out bits.json    many, and every term into a file"""

TRAIN_HELP = """\
Train a small U-Net from nothing, or resume where an interrupted training stopped.

  ddpm-fast train --out runs/moons                      moons: about an hour on two CPU cores
  ddpm-fast train --data folder --flip --out runs/mine  pictures of one size, a side divisible by 8
  ddpm-fast sample --model runs/moons --out moons.png   at any time: the folder always holds a whole checkpoint

  torchrun --nproc-per-node 2 -m ddpm_fast train …      two processes share every batch

Repeat the same command to resume: the result is the one of a training that was never interrupted."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code: 0 done, 1 failed, 2 bad input, 130 interrupted.

    What argparse refuses, and --help and --version, end in SystemExit with such a code.
    """
    logging.basicConfig(format="ddpm-fast: %(message)s", level=logging.WARNING)
    arguments = _parser().parse_args(argv)
    try:
        arguments.run(arguments)
    except KeyboardInterrupt:
        return _fail("interrupted; no half-written file was left", INTERRUPTED)
    except (ValueError, TypeError, OSError) as error:
        return _fail(error, BAD_INPUT)
    except (RuntimeError, FloatingPointError, MemoryError) as error:
        return _fail(error, FAILED)
    return 0


def _fail(error: object, code: int) -> int:
    text = " ".join(str(error).split()) or type(error).__name__
    print(f"ddpm-fast: {text}", file=sys.stderr)
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ddpm-fast", description="Exact DDPM samples, fast.", epilog="ddpm-fast COMMAND --help says more."
    )
    parser.add_argument("--version", action="version", version=f"ddpm-fast {ddpm_fast.__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    sample = _command(commands, "sample", "draw samples", SAMPLE_HELP, _sample)
    sample.add_argument("--out", default="samples.png", help=".png, .npz or a folder (default: %(default)s)")
    _add_model(sample)
    _add_walk(sample)

    fuse = _command(commands, "interpolate", "fuse two pictures", INTERPOLATE_HELP, _interpolate)
    fuse.add_argument("pictures", nargs=2, metavar="PICTURE", help="of the model's size")
    fuse.add_argument("--out", default="fused.png", help=".png, .npz or a folder (default: %(default)s)")
    fuse.add_argument("--level", type=int, required=True, metavar="T", help="timestep that both are noised to")
    fuse.add_argument("--lam", type=float, default=0.5, help="0 is the first, 1 the second (default: %(default)s)")
    fuse.add_argument("--mixing", choices=MIXINGS, default="linear", help="default: %(default)s")
    fuse.add_argument("--shared-noise", action="store_true", help="the same noise for both")
    _add_model(fuse)
    _add_walk(fuse)

    bits = _command(commands, "likelihood", "bits per dimension of pictures", LIKELIHOOD_HELP, _likelihood)
    bits.add_argument("pictures", nargs="+", metavar="PICTURES", help="files, folders, or .npz with uint8 [N, H, W, C]")
    bits.add_argument("--out", metavar="FILE", help=".json: every term of every picture")
    _add_model(bits)

    train = _command(commands, "train", "train a model", TRAIN_HELP, _train)
    train.add_argument("--out", required=True, metavar="FOLDER", help="checkpoint, state for resuming, metrics.jsonl")
    defaults = TrainingConfig()
    train.add_argument("--steps", type=int, default=defaults.steps, help="default: %(default)s")
    train.add_argument("--batch", type=int, default=defaults.batch_size, help="default: %(default)s")
    train.add_argument("--lr", type=float, default=defaults.learning_rate, help="peak (default: %(default)s)")
    train.add_argument("--data", metavar="PATH", help="pictures of one size: a folder, .npy or .npz (default: moons)")
    train.add_argument("--flip", action="store_true", help="mirror every other picture at random")
    train.add_argument("--loss", choices=LOSSES, default="mse", help="hybrid learns the variance, too (default: mse)")
    train.add_argument("--min-snr", type=float, metavar="GAMMA", help="weigh the squared error by min(SNR, GAMMA)")
    train.add_argument("--predict", choices=PREDICTION_TYPES, default="epsilon", help="default: %(default)s")
    train.add_argument("--schedule", choices=list(BETA_SCHEDULES), default="linear", help="default: %(default)s")
    train.add_argument("--seed", type=int, default=defaults.seed, help="default: %(default)s")
    train.add_argument("--save-every", type=int, default=defaults.save_every, help="steps (default: %(default)s)")
    train.add_argument("--device", default="cpu", help="default: %(default)s")
    train.add_argument(
        "--samples", type=int, default=16, help="drawn at every save: samples.png (default: %(default)s)"
    )
    train.add_argument("--quiet", action="store_true", help="no progress bar")

    _command(commands, "info", "versions, devices, and the path that a walk would take", None, _info)
    return parser


def _add_model(parser: argparse.ArgumentParser) -> None:
    """What model, on what."""
    parser.add_argument("--model", default=EMBEDDED, metavar="MODEL", help="sample --help says (default: the moons)")
    parser.add_argument("--model-args", metavar="ARGS", help="what the model was made with: JSON, its file, or flags")
    parser.add_argument("--label", type=int, metavar="CLASS", help="class of all samples, if the model has classes")
    parser.add_argument("--seeds", help="one sample a seed: 7, 0-15 or 1,4,9-12 (default: 16 fresh ones)")
    parser.add_argument("--steps", type=int, help="steps of the walk (default: all that the model was trained on)")
    parser.add_argument("--batch", type=int, default=64, help="samples at a time (default: %(default)s)")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, … (default: a GPU if there is one)")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of the network (default: %(default)s)")
    parser.add_argument("--quiet", action="store_true", help="no progress bar, no summary")


def _add_walk(parser: argparse.ArgumentParser) -> None:
    """Which walk, and how."""
    parser.add_argument("--sampler", choices=SAMPLERS, help="default: the checkpoint's, ddpm for the moons")
    parser.add_argument("--eta", type=float, help="noise of ddim, 0 … 1 (default: 0)")
    parser.add_argument("--temperature", type=float, help="scales the noise of every step (default: 1)")
    parser.add_argument("--memory-format", choices=MEMORY_FORMATS[1:], help="of the network; auto tries what is faster")
    parser.add_argument("--compile", action="store_true", help="torch.compile the network: pays for many samples")


def _command(commands: Any, name: str, summary: str, text: str | None, run: Any) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        name, help=summary, description=text or summary, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.set_defaults(run=run)
    return parser


def _sample(arguments: argparse.Namespace) -> None:
    seeds = _seeds(arguments)
    checkpoint, config, device = _opened(arguments)
    kind = images.check_output(arguments.out, checkpoint.shape, seeds)
    _write(arguments, kind, seeds, config, device, _draw(checkpoint, config, seeds, device, arguments), {})


def _interpolate(arguments: argparse.Namespace) -> None:
    seeds = _seeds(arguments)
    checkpoint, config, device = _opened(arguments)
    kind = images.check_output(arguments.out, checkpoint.shape, seeds)
    config = from_level(config, arguments.level)
    ends, names = _read(arguments.pictures, checkpoint.shape)
    if len(ends) != 2:
        raise ValueError(f"two pictures are fused, got {len(ends)}")
    how = {"lam": arguments.lam, "mixing": arguments.mixing, "shared_noise": arguments.shared_noise}
    about = {"interpolate": {"pictures": names, "level": arguments.level, **how}}

    a, b = ends.to(device).split(1)
    check_mixture(a, b, arguments.lam, arguments.mixing)

    def start(part: Sequence[int]) -> torch.Tensor:
        size = (len(part), *checkpoint.shape)
        return mixture(a.expand(size), b.expand(size), config=config, seeds=part, **how)

    _write(arguments, kind, seeds, config, device, _draw(checkpoint, config, seeds, device, arguments, start), about)


def _likelihood(arguments: argparse.Namespace) -> None:
    checkpoint, config, device = _opened(arguments)
    if arguments.out is not None:
        if not arguments.out.endswith(".json"):
            raise ValueError(f"--out must be a .json file, got {arguments.out!r}")
        check_writable(arguments.out)
    pictures, names = _read(arguments.pictures, checkpoint.shape)
    seeds = range(len(names)) if arguments.seeds is None else parse_seeds(arguments.seeds)
    found = bits_per_dimension(
        checkpoint.model, pictures, config=config, seeds=seeds, batch_size=arguments.batch, device=device,
        model_kwargs=_label(checkpoint, arguments, len(names)), dtype=DTYPES[arguments.dtype],
        progress=False if arguments.quiet else "likelihood",
    )  # fmt: skip
    if arguments.out is not None:
        rows = [
            {"picture": name, "seed": seed, "total": total, "prior": prior, "terms": terms}
            for name, seed, total, prior, terms in zip(
                names, found.seeds, found.total.tolist(), found.prior.tolist(), found.terms.tolist(), strict=True
            )
        ]
        timesteps = found.timesteps.tolist()
        write_json(arguments.out, {**_about(arguments, config), "timesteps": timesteps, "pictures": rows})
    decoder = found.terms[:, -1].mean()
    steps = found.terms[:, :-1].sum(1).mean()
    print(
        f"{len(names)} pictures: at most {found.total.mean():.4f} bits per dimension (prior {found.prior.mean():.4f}, "
        f"steps {steps:.4f}, decoder {decoder:.4f}); lowest {found.total.min():.4f}, highest {found.total.max():.4f}"
    )


def _seeds(arguments: argparse.Namespace) -> Sequence[int]:
    if arguments.batch < 1:
        raise ValueError(f"--batch must be at least 1, got {arguments.batch}")
    seeds = resolve_seeds(None, 16) if arguments.seeds is None else parse_seeds(arguments.seeds)
    resolve_seeds(seeds, len(seeds))
    return seeds


def _opened(arguments: argparse.Namespace) -> tuple[Checkpoint, SamplerConfig, torch.device]:
    """The model, the walk and the device that the arguments name."""
    device = checked_device(arguments.device) if arguments.device else default_device()
    given = None if arguments.model_args is None else parse_arguments(arguments.model_args)
    checkpoint = load_model(arguments.model, given, device)
    _check_label(checkpoint, arguments.label)
    return checkpoint, SamplerConfig.from_options(_options(arguments), checkpoint.diffusion), device


def _read(paths: Sequence[str], shape: tuple[int, ...]) -> tuple[torch.Tensor, list[str]]:
    """Pictures on [-1, 1]: float32 [N, C, H, W], and their names."""
    pictures, names = images.read(paths, shape)
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1, names


def _about(arguments: argparse.Namespace, config: SamplerConfig) -> dict[str, Any]:
    """What made a file."""
    return {
        "version": ddpm_fast.__version__,
        "model": "embedded moons32" if Path(arguments.model) == EMBEDDED else Path(arguments.model).resolve().name,
        **({} if arguments.label is None else {"label": arguments.label}),
        "dtype": arguments.dtype,
        "config": config.to_dict(),
    }


def _write(
    arguments: argparse.Namespace,
    kind: str,
    seeds: Sequence[int],
    config: SamplerConfig,
    device: torch.device,
    parts: Iterator[tuple[Sequence[int], images.Bytes]],
    more: dict[str, Any],
) -> None:
    """Write what is drawn, and say so."""
    began = time.perf_counter()
    about = {**_about(arguments, config), **more}
    done: list[images.Bytes] = []
    for part, pictures in parts:
        if kind == "folder":
            images.save(arguments.out, pictures, part, about)  # what is done stays, whatever happens to the rest
        else:
            done.append(pictures)
    if kind != "folder":
        images.save(arguments.out, np.concatenate(done), seeds, about)
    if not arguments.quiet:
        steps = len(config.inference_timesteps())
        seconds = time.perf_counter() - began
        span = f"seed {seeds[0]}" if len(seeds) == 1 else f"seeds {seeds[0]} … {seeds[-1]}"
        print(f"{arguments.out}: {len(seeds)} samples, {span}, {steps} steps each, {seconds:.1f} s")
        print(f"path: {path_taken(device)}")


def _check_label(checkpoint: Checkpoint, label: int | None) -> None:
    if checkpoint.label is None:
        if label is not None:
            raise ValueError(f"the model knows no classes, got --label {label}")
        return
    count = checkpoint.label[1]
    if label is None:
        raise ValueError(f"the model draws one of {count} classes: say which, --label 0 … {count - 1}")
    whole("--label", label, 0, count - 1)


def _options(arguments: argparse.Namespace) -> dict[str, Any]:
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
) -> Iterator[tuple[Sequence[int], images.Bytes]]:
    """The samples a batch at a time: their seeds, and uint8 [n, H, W, C]; `start` gives a batch its x_T."""
    sampler: Sampler | None = None
    for number, (part, title) in enumerate(_batches(seeds, arguments.batch), 1):
        if sampler is None or sampler.shape[0] != len(part):
            sampler = Sampler(
                checkpoint.model,
                (len(part), *checkpoint.shape),
                model_kwargs=_label(checkpoint, arguments, len(part)),
                config=config,
                device=device,
                dtype=DTYPES[arguments.dtype],
                memory_format=arguments.memory_format,
                compile=arguments.compile and number == 1,  # not once more for the rest of a last batch
            )
        x_T = None if start is None else start(part)
        x = sampler(seeds=part, x_T=x_T, progress=False if arguments.quiet else title)
        yield part, to_uint8(x).cpu().numpy()


def _batches(seeds: Sequence[int], size: int) -> Iterator[tuple[Sequence[int], str]]:
    """The seeds in batches, each with the title of its progress bar."""
    batches = [seeds[start : start + size] for start in range(0, len(seeds), size)]
    for number, part in enumerate(batches, 1):
        yield part, f"batch {number} of {len(batches)}" if len(batches) > 1 else "sampling"


def _label(checkpoint: Checkpoint, arguments: argparse.Namespace, count: int) -> dict[str, torch.Tensor]:
    return {} if checkpoint.label is None else {checkpoint.label[0]: torch.full((count,), arguments.label)}


def _train(arguments: argparse.Namespace) -> None:
    config = TrainingConfig(
        steps=arguments.steps,
        batch_size=arguments.batch,
        learning_rate=arguments.lr,
        seed=arguments.seed,
        save_every=arguments.save_every,
        loss=arguments.loss,
        min_snr_gamma=arguments.min_snr,
    )
    device = checked_device(arguments.device)
    learned = arguments.loss == "hybrid"
    diffusion = SamplerConfig(
        beta_schedule=arguments.schedule,
        prediction_type=arguments.predict,
        variance_type="learned_range" if learned else "fixed_small",
    )
    data: Any = moons.batch
    network = UNetConfig(learned_variance=learned)
    if arguments.data is not None:
        data = Pictures(arguments.data, arguments.flip)
        channels, height, width = data.shape
        if height != width:
            raise ValueError(f"{arguments.data}: pictures must be square, got {height} x {width}")
        network = UNetConfig(channels=channels, image_size=height, learned_variance=learned)
    elif arguments.flip:
        raise ValueError("--flip is for pictures of --data: a mirrored moon is another moon of the data")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:  # of torchrun
        if device.type == "cuda":
            device = checked_device(f"cuda:{os.environ['LOCAL_RANK']}")
            torch.cuda.set_device(device)
        torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    trainer = Trainer(
        arguments.out, config, network=network, diffusion=diffusion, data=data, device=device, samples=arguments.samples
    )
    arguments.quiet = arguments.quiet or trainer.rank > 0
    if trainer.step and not arguments.quiet:
        print(f"resuming {arguments.out} at step {trainer.step} of {config.steps}")
    trainer.run(progress=not arguments.quiet)
    if trainer.world > 1:
        torch.distributed.barrier()  # what the others wait for must not end before them
        torch.distributed.destroy_process_group()
    if not arguments.quiet:
        print(f"{arguments.out}{os.sep}: a checkpoint; ddpm-fast sample --model {arguments.out} draws from it")


def _info(arguments: argparse.Namespace) -> None:
    for what, answer in describe():
        print(f"{what:<14}{answer}")
