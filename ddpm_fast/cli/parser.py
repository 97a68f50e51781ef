"""The command line: `ddpm-fast sample | interpolate | likelihood | train | info`, also as `python -m ddpm_fast`."""

import argparse
import io
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence

import ddpm_fast
from ddpm_fast.cli import commands as run
from ddpm_fast.config import PREDICTION_TYPES, SAMPLERS
from ddpm_fast.edit import MIXINGS
from ddpm_fast.engine.execution import MEMORY_FORMATS
from ddpm_fast.schedules import BETA_SCHEDULES
from ddpm_fast.speculation.windows import WindowPlan
from ddpm_fast.training import TrainingConfig
from ddpm_fast.training.losses import LOSSES
from ddpm_fast.training.trainer import MIXED_PRECISIONS

BAD_INPUT, FAILED, INTERRUPTED = 2, 1, 130

SAMPLE_HELP = """\
Draw samples and write them as a picture grid, a folder of pictures or an array.

  ddpm-fast sample --seeds 0-15 --out samples.png       a grid; the moon model that ships with the package
  ddpm-fast sample --seeds 0-49999 --out moons.npz      uint8 [N, H, W, C] in arr_0, as FID scripts read it
  ddpm-fast sample --seeds 7 --out folder               folder/000007.png
  ddpm-fast sample --sampler ddim --steps 50 …          fifty deterministic steps instead of a thousand
  ddpm-fast sample --speculate …                        all steps, of the same law, in fewer sequential network calls

--model takes a checkpoint folder of ddpm-fast, or models of other libraries:

  --model digits --label 0-9 --guidance 2               the other model that ships with the package, with classes
  --model folder                                        diffusers: a DDPMPipeline, a DDIMPipeline or a UNet2DModel
  --model model-7.pt --model-args args.json             lucidrains: {"unet": {"dim": 64, …}, "diffusion": {…}}
  --model 64x64.pt --model-args="$MODEL_FLAGS"          guided-diffusion, with a checkout of it on PYTHONPATH
  --model package.module:factory                        your own: a function that returns (model, (C, H, W))

Image k depends on seed k alone: any batch size, any order and any split over machines gives the same images."""

INTERPOLATE_HELP = """\
Fuse two pictures: noise both to a level, mix them, and sample from the mixture. Every seed is another draw between the
two: look at many.

  ddpm-fast sample --seeds 0-9 --out moons                      pictures of the model's size
  ddpm-fast interpolate moons/000000.png moons/000001.png --level 300 --seeds 0-63 --out fused.png

Low levels blend the pictures in grey, high levels forget them: docs/walk.md shows examples."""

LIKELIHOOD_HELP = """\
Compute the likelihood of pictures: the variational bound in bits per dimension (lower is likelier), from one draw of
noise a timestep, by default with seed k for picture k.

  ddpm-fast likelihood moons/000000.png                         one picture, 1000 network calls
  ddpm-fast likelihood moons.npz --steps 100 --out bits.json    many, and every term into a file"""

TRAIN_HELP = """\
Train a small U-Net from nothing, or resume where an interrupted training stopped.

  ddpm-fast train --out runs/moons                      moons: about an hour on two CPU cores
  ddpm-fast train --data digits --out runs/digits       scikit-learn's digits, with classes
  ddpm-fast train --data folder --flip --out runs/mine  pictures of one size, cut square; subfolders are classes
  ddpm-fast sample --model runs/moons --out moons.png   at any time: the folder always holds a whole checkpoint

  torchrun --nproc-per-node 2 -m ddpm_fast train …      two processes share every batch

Repeat the same command to resume. The result is the same as without the interruption."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code: 0 done, 1 failed, 2 bad input, 130 interrupted.

    SIGTERM and SIGHUP end in SystemExit with 128 and the number of the signal, after the same clean-up.

    What argparse refuses, and --help and --version, end in SystemExit with such a code.
    """
    try:
        _open_streams()
        _catch_signals()
        logging.basicConfig(format="ddpm-fast: %(message)s", level=logging.WARNING)
        arguments = _parser().parse_args(argv)
        arguments.run(arguments)
        sys.stdout.flush()
    except BrokenPipeError:  # nobody reads what is printed: the work is done
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        return _fail("interrupted; no half-written file was left", INTERRUPTED)
    except (ValueError, TypeError, OSError) as error:
        return _fail(error, BAD_INPUT)
    except (RuntimeError, FloatingPointError, MemoryError) as error:
        return _fail(error, FAILED)
    return 0


def _open_streams() -> None:
    """Let the process have all three standard streams, and its output every letter that its encoding has not."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:  # closed: the next file that is opened would take its place
            os.open(os.devnull, os.O_RDWR)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
        elif isinstance(stream := getattr(sys, name), io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def _catch_signals() -> None:
    """Let a request to end clean up as Ctrl-C does; what the caller ignores (nohup) stays ignored."""

    def end(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    if threading.current_thread() is threading.main_thread():
        for name in ("SIGTERM", "SIGHUP"):
            number = getattr(signal, name, None)
            if number is not None and signal.getsignal(number) is signal.SIG_DFL:
                signal.signal(number, end)


def _fail(error: object, code: int) -> int:
    """Print the error in one line on stderr and return the exit code."""
    text = " ".join(str(error).split()) or type(error).__name__
    print(f"ddpm-fast: {text}", file=sys.stderr)
    return code


def _parser() -> argparse.ArgumentParser:
    """Return the parser of the whole command line."""
    parser = argparse.ArgumentParser(
        prog="ddpm-fast", description="Exact DDPM samples, fast.", epilog="ddpm-fast COMMAND --help says more."
    )
    parser.add_argument("--version", action="version", version=f"ddpm-fast {ddpm_fast.__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    sample = _command(commands, "sample", "draw samples", SAMPLE_HELP, run.sample)
    sample.add_argument("--out", default="samples.png", help=".png, .npz or a folder (default: %(default)s)")
    _add_model(sample)
    _add_sampling(sample)

    fuse = _command(commands, "interpolate", "fuse two pictures", INTERPOLATE_HELP, run.interpolate)
    fuse.add_argument("pictures", nargs=2, metavar="PICTURE", help="of the model's size")
    fuse.add_argument("--out", default="fused.png", help=".png, .npz or a folder (default: %(default)s)")
    fuse.add_argument("--level", type=int, required=True, metavar="T", help="timestep of the noise level")
    fuse.add_argument("--lam", type=float, default=0.5, help="0 is the first, 1 the second (default: %(default)s)")
    fuse.add_argument("--mixing", choices=MIXINGS, default="linear", help="default: %(default)s")
    fuse.add_argument("--shared-noise", action="store_true", help="the same noise for both")
    _add_model(fuse)
    _add_sampling(fuse)

    bits = _command(commands, "likelihood", "bits per dimension of pictures", LIKELIHOOD_HELP, run.likelihood)
    bits.add_argument(
        "pictures", nargs="+", metavar="PICTURES", help="files, folders, or .npy, .npz with uint8 [N, H, W, C]"
    )
    bits.add_argument("--out", metavar="FILE", help=".json: every term of every picture")
    _add_model(bits)

    train = _command(commands, "train", "train a model", TRAIN_HELP, run.train)
    train.add_argument("--out", required=True, metavar="FOLDER", help="checkpoint, state for resuming, metrics.jsonl")
    defaults = TrainingConfig()
    train.add_argument("--steps", type=int, default=defaults.steps, help="default: %(default)s")
    train.add_argument("--batch", type=int, default=defaults.batch_size, help="default: %(default)s")
    train.add_argument("--lr", type=float, default=defaults.learning_rate, help="peak (default: %(default)s)")
    train.add_argument("--data", default="moons", metavar="PATH", help="moons, digits, or a folder, .npy or .npz")
    train.add_argument("--flip", action="store_true", help="mirror every other picture at random")
    train.add_argument("--loss", choices=LOSSES, default="mse", help="hybrid learns the variance, too (default: mse)")
    train.add_argument("--min-snr", type=float, metavar="GAMMA", help="weigh the squared error by min(SNR, GAMMA)")
    train.add_argument("--predict", choices=PREDICTION_TYPES, default="epsilon", help="default: %(default)s")
    train.add_argument("--schedule", choices=list(BETA_SCHEDULES), default="linear", help="default: %(default)s")
    train.add_argument("--widths", type=_widths, metavar="W,W,…", help="channels of each level (default: by the size)")
    train.add_argument(
        "--label-dropout", type=float, default=defaults.label_dropout, metavar="P",
        help="share of images shown without their class (default: %(default)s)",
    )  # fmt: skip
    train.add_argument("--mixed-precision", choices=list(MIXED_PRECISIONS), default="bf16", help="default: %(default)s")
    train.add_argument("--seed", type=int, default=defaults.seed, help="default: %(default)s")
    train.add_argument("--save-every", type=int, default=defaults.save_every, help="steps (default: %(default)s)")
    train.add_argument("--device", default="cpu", help="default: %(default)s")
    train.add_argument(
        "--samples", type=int, default=16, help="drawn at every save: samples.png (default: %(default)s)"
    )
    train.add_argument("--quiet", action="store_true", help="no progress bar")

    info = _command(commands, "info", "versions, devices, and the path of execution", None, run.info)
    info.add_argument("--forget", action="store_true", help="forget the choices that measurements made")
    return parser


def _widths(text: str) -> tuple[int, ...]:
    """Parse channel numbers such as "32,64"."""
    return tuple(int(width) for width in text.split(","))


def _windows(text: str) -> WindowPlan:
    """Parse windows such as "16" or "0:4,100:16"."""
    allowed = f"windows are 16, or 0:4,100:16 from timestep 0 on, got {text}"
    try:
        pairs = [part.partition(":") for part in text.split(",")]
        windows = {int(t): int(w) for t, _, w in pairs} if ":" in text else int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(allowed) from None
    try:
        return WindowPlan.of(windows)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{allowed}: {error}") from None


def _add_model(parser: argparse.ArgumentParser) -> None:
    """Add the options of the model, the seeds and the device."""
    parser.add_argument("--model", default="moons", metavar="MODEL", help="sample --help says (default: the moons)")
    parser.add_argument(
        "--model-args", metavar="ARGS", help="arguments that the model was made with: JSON, its file, or flags"
    )
    parser.add_argument(
        "--label", metavar="CLASS", help="if the model has classes: 3; 0-9, which the seeds take in turn; none"
    )
    parser.add_argument("--seeds", help="one sample a seed: 7, 0-15 or 1,4,9-12 (default: 16 fresh ones)")
    parser.add_argument("--steps", type=int, help="sampling steps (default: all that the model was trained on)")
    parser.add_argument("--batch", type=int, default=64, help="samples at a time (default: %(default)s)")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, … (default: a GPU if there is one)")
    parser.add_argument("--dtype", choices=run.DTYPES, default="float32", help="of the network (default: %(default)s)")
    parser.add_argument("--quiet", action="store_true", help="no progress bar, no summary")


def _add_sampling(parser: argparse.ArgumentParser) -> None:
    """Add the options of the sampler and its execution."""
    parser.add_argument("--sampler", choices=SAMPLERS, help="default: the checkpoint's, ddpm for the moons")
    parser.add_argument("--eta", type=float, help="noise of ddim, 0 … 1 (default: 0)")
    parser.add_argument(
        "--guidance", type=float, metavar="W", help="towards the class: 1 is the model's law, 2 is more"
    )
    parser.add_argument("--temperature", type=float, help="scales the noise of every step (default: 1)")
    parser.add_argument(
        "--speculate", type=_windows, nargs="?", const=True, default=False, metavar="WINDOWS",
        help="several steps a network call, of the same law: 16; 0:4,100:16, from timestep 100 on 16; without WINDOWS "
        "they are measured once, which takes as long as two samples",
    )  # fmt: skip
    parser.add_argument(
        "--memory-format", choices=MEMORY_FORMATS[1:], help="of the network; auto measures which is faster"
    )
    parser.add_argument("--compile", action="store_true", help="torch.compile the network: pays for many samples")


def _command(
    commands: "argparse._SubParsersAction[argparse.ArgumentParser]",
    name: str,
    summary: str,
    text: str | None,
    function: Callable[[argparse.Namespace], None],
) -> argparse.ArgumentParser:
    """Add a command and return its parser."""
    parser = commands.add_parser(
        name, help=summary, description=text or summary, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.set_defaults(run=function)
    return parser
