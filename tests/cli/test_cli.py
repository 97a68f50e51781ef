"""Tests of the command line: its files, its output, its errors."""

import importlib.metadata
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import ddpm_fast
from ddpm_fast import cli, images
from ddpm_fast.cli import commands
from ddpm_fast.cli.info import path_taken
from ddpm_fast.config import SamplerConfig
from ddpm_fast.edit import interpolate
from ddpm_fast.kernels import to_uint8
from ddpm_fast.likelihood import bits_per_dimension
from ddpm_fast.models.checkpoint import load_checkpoint, save_checkpoint
from ddpm_fast.models.unet import UNet
from ddpm_fast.sample import Sampler
from tests.support.unets import random_unet

ROOT = Path(__file__).parents[2]
DIFFUSION = SamplerConfig(num_train_timesteps=20)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Return a checkpoint of a small random network."""
    network = random_unet()
    folder = tmp_path_factory.mktemp("models") / "tiny"
    save_checkpoint(folder, network, DIFFUSION)
    return folder


@pytest.fixture
def calls(monkeypatch):
    """Return a list that collects the inputs of every network call."""
    seen = []
    forward = UNet.forward

    def watch(self, x, t):
        seen.append((x, t))
        return forward(self, x, t)

    monkeypatch.setattr(UNet, "forward", watch)
    return seen


def sample(model, out, *arguments):
    return cli.main(["sample", "--quiet", "--device", "cpu", "--model", str(model), "--out", str(out), *arguments])


def draw(model, tmp_path, *arguments):
    """Return the bytes [N, H, W, C] and the metadata that the command line writes."""
    out = tmp_path / "drawn.npz"
    assert sample(model, out, *arguments) == 0
    with np.load(out) as arrays:
        return arrays["arr_0"], images.read_metadata(out)


def redraw(model, about):
    """Draw the same samples from the metadata alone, in one batch."""
    checkpoint = load_checkpoint(model)
    sampler = Sampler(
        checkpoint.model,
        (len(about["seeds"]), *checkpoint.shape),
        config=SamplerConfig(**about["config"]),
        dtype=getattr(torch, about["dtype"]),
        device="cpu",
    )
    return to_uint8(sampler(seeds=about["seeds"], progress=False)).numpy()


def assert_close(a, b):
    """Assert that bytes are equal up to one, since floats may round differently."""
    assert a.shape == b.shape
    assert abs(a.astype(int) - b.astype(int)).max() <= 1


def one_line(capsys):
    """Return the line on stderr; assert that there is one line, no traceback, and nothing on stdout."""
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("ddpm-fast: ")
    assert err.endswith("\n")
    assert err.count("\n") == 1
    assert "Traceback" not in err
    return err


def test_png(model, tmp_path):
    assert sample(model, tmp_path / "a.png", "--seeds", "0-4") == 0
    about = images.read_metadata(tmp_path / "a.png")
    assert about["seeds"] == [0, 1, 2, 3, 4]
    with Image.open(tmp_path / "a.png") as picture:
        assert_close(np.asarray(picture)[..., None], images.grid(redraw(model, about)))
    assert os.listdir(tmp_path) == ["a.png"]


def test_npz(model, tmp_path):
    x, about = draw(model, tmp_path, "--seeds", "3,9-11")
    assert (x.shape, x.dtype) == ((4, 8, 8, 1), np.uint8)
    assert len(np.unique(x.reshape(4, -1), axis=0)) == 4
    assert about == {
        "version": ddpm_fast.__version__,
        "model": "tiny",
        "dtype": "float32",
        "config": DIFFUSION.to_dict(),
        "seeds": [3, 9, 10, 11],
    }
    assert_close(x, redraw(model, about))


def test_folder(model, tmp_path):
    assert sample(model, tmp_path / "b" / "out", "--seeds", "7,123") == 0
    assert sorted(os.listdir(tmp_path / "b" / "out")) == ["000007.png", "000123.png"]
    for path in (tmp_path / "b" / "out").iterdir():
        about = images.read_metadata(path)
        assert about["seeds"] == [int(path.stem)]
        with Image.open(path) as picture:
            assert_close(np.asarray(picture)[None, ..., None], redraw(model, about))


def test_images_do_not_depend_on_the_batch(model, tmp_path, calls):
    whole, about = draw(model, tmp_path, "--seeds", "10-16", "--batch", "7")
    assert {len(x) for x, _ in calls} == {7}
    calls.clear()
    parts, about_parts = draw(model, tmp_path, "--seeds", "10-16", "--batch", "3")
    assert [len(x) for x, _ in calls] == 40 * [3] + 20 * [1]
    assert about_parts == about
    assert_close(parts, whole)
    for i, seed in enumerate(range(10, 17)):
        assert_close(draw(model, tmp_path, "--seeds", str(seed))[0], whole[i : i + 1])
    backwards = ",".join(str(seed) for seed in range(16, 9, -1))
    assert_close(draw(model, tmp_path, "--seeds", backwards)[0], whole[::-1])


@pytest.mark.parametrize(
    ("arguments", "config", "steps"),
    [
        pytest.param("", {}, 20, id="default"),
        pytest.param("--steps 4", {"num_inference_steps": 4}, 4, id="steps"),
        pytest.param("--sampler ddim --steps 5", {"sampler": "ddim", "num_inference_steps": 5}, 5, id="ddim"),
        pytest.param("--sampler ddim --eta 0.7", {"sampler": "ddim", "eta": 0.7}, 20, id="eta"),
        pytest.param("--temperature 0.3", {"temperature": 0.3}, 20, id="temperature"),
        pytest.param("--temperature 0", {"temperature": 0}, 20, id="no-noise"),
    ],
)
def test_the_options_of_sampling(model, tmp_path, calls, arguments, config, steps):
    x, about = draw(model, tmp_path, "--seeds", "0-1", *arguments.split())
    assert len(calls) == steps
    assert about["config"] == {**DIFFUSION.to_dict(), **config}
    assert_close(x, redraw(model, about))
    plain, _ = draw(model, tmp_path, "--seeds", "0-1")
    assert np.array_equal(x, plain) == (not config)


def run(command, model, *arguments):
    return cli.main([command, "--device", "cpu", "--model", str(model), *map(str, arguments)])


@pytest.fixture
def pictures(model, tmp_path):
    """Return a folder of two pictures."""
    folder = tmp_path / "pictures"
    assert sample(model, folder, "--seeds", "0,1") == 0
    return folder


def test_interpolate(model, pictures, tmp_path):
    ends = [pictures / "000000.png", pictures / "000001.png"]
    out = tmp_path / "fused.npz"
    assert run("interpolate", model, *ends, "--level", 9, "--seeds", "0-4", "--batch", 2, "--out", out, "--quiet") == 0
    with np.load(out) as arrays:
        fused = arrays["arr_0"]
    about = images.read_metadata(out)
    assert about["interpolate"] == {
        "pictures": ["000000.png", "000001.png"], "level": 9, "lam": 0.5, "mixing": "linear", "shared_noise": False,
    }  # fmt: skip
    assert about["config"]["timesteps"] == list(range(9, -1, -1))
    checkpoint = load_checkpoint(model)
    a, b = (torch.from_numpy(np.array(Image.open(end))[None, None]).float() / 127.5 - 1 for end in ends)
    shape = (5, *checkpoint.shape)
    options = {"seeds": range(5), "config": checkpoint.diffusion, "progress": False}
    x = interpolate(checkpoint.model, a.expand(shape), b.expand(shape), 9, 0.5, **options)
    assert_close(fused, to_uint8(x).numpy())


def test_how_interpolate_mixes(model, pictures, tmp_path):
    ends = [pictures / "000000.png", pictures / "000001.png"]
    out = tmp_path / "fused.npz"
    options = ["--level", 9, "--seeds", "0-1", "--lam", 0.3, "--mixing", "spherical", "--shared-noise", "--quiet"]
    assert run("interpolate", model, *ends, *options, "--out", out) == 0
    checkpoint = load_checkpoint(model)
    x, _ = commands._read([str(pictures)], checkpoint.shape)
    expected = interpolate(
        checkpoint.model, x[:1].expand(2, -1, -1, -1), x[1:].expand(2, -1, -1, -1), 9, 0.3,
        mixing="spherical", shared_noise=True, seeds=range(2), config=checkpoint.diffusion, progress=False,
    )  # fmt: skip
    with np.load(out) as arrays:
        assert_close(arrays["arr_0"], to_uint8(expected).numpy())


def test_likelihood(model, pictures, tmp_path, capsys):
    assert run("likelihood", model, pictures, "--out", tmp_path / "bits.json", "--quiet") == 0
    said = capsys.readouterr().out
    report = json.loads((tmp_path / "bits.json").read_text())
    assert [row["picture"] for row in report["pictures"]] == ["000000.png", "000001.png"]
    for row in report["pictures"]:
        assert len(row["terms"]) == len(report["timesteps"]) == 20
        assert row["total"] == pytest.approx(row["prior"] + sum(row["terms"]))
    mean = np.mean([row["total"] for row in report["pictures"]])
    assert f"2 pictures: at most {mean:.4f} bits per dimension" in said
    checkpoint = load_checkpoint(model)
    x_0, _ = commands._read([str(pictures)], checkpoint.shape)
    exact = bits_per_dimension(checkpoint.model, x_0, config=checkpoint.diffusion, seeds=[0, 1], progress=False)
    np.testing.assert_allclose([row["total"] for row in report["pictures"]], exact.total, rtol=1e-6)


def test_the_dtype_of_the_likelihood(model, pictures, tmp_path):
    out = tmp_path / "bits.json"
    assert run("likelihood", model, pictures, "--out", out, "--quiet", "--dtype", "bfloat16") == 0
    checkpoint = load_checkpoint(model)
    x_0, _ = commands._read([str(pictures)], checkpoint.shape)
    options = {"config": checkpoint.diffusion, "seeds": [0, 1], "progress": False}
    half, full = (bits_per_dimension(checkpoint.model, x_0, dtype=dtype, **options) for dtype in (torch.bfloat16, None))
    totals = [row["total"] for row in json.loads(out.read_text())["pictures"]]
    np.testing.assert_allclose(totals, half.total, rtol=1e-6)
    assert not np.allclose(totals, full.total, rtol=1e-6)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "is not there"),
        (lambda path: path.write_bytes(b"no picture"), "cannot be read as a picture"),
        (lambda path: Image.new("L", (9, 8)).save(path), "is 8 x 9 x 1, the model takes 8 x 8 x 1"),
        (lambda path: path.mkdir(), "holds no picture"),
    ],
    ids=["missing", "unreadable", "size", "empty folder"],
)
def test_pictures_that_cannot_be_taken_are_named(model, tmp_path, calls, capsys, make, message):
    path = tmp_path / "picture.png"
    make(path)
    assert run("likelihood", model, path) == 2
    said = one_line(capsys)
    assert "picture.png" in said
    assert message in said
    assert calls == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--level", "20"], "t must be an integer in"),
        (["--level", "3", "--lam", "2"], "lam must be"),
        (["--level", "3", "--out", "a.gif"], "the output must be"),
    ],
    ids=" ".join,
)
def test_bad_fusions(model, pictures, calls, capsys, arguments, message):
    calls.clear()
    ends = [pictures / "000000.png", pictures / "000001.png"]
    assert run("interpolate", model, *ends, "--quiet", *arguments) == 2
    assert message in one_line(capsys)
    assert calls == []


def test_an_npz_of_pictures(model, tmp_path, capsys):
    np.savez(tmp_path / "a.npz", arr_0=np.zeros((3, 8, 8, 1), np.uint8))
    np.savez(tmp_path / "b.npz", arr_0=np.zeros((3, 8, 8, 1)))
    (tmp_path / "c.npz").write_bytes(b"PK broken")
    assert run("likelihood", model, tmp_path / "a.npz", "--quiet") == 0
    assert "3 pictures" in capsys.readouterr().out
    for name, message in (("b.npz", "must hold uint8"), ("c.npz", "cannot be read")):
        assert run("likelihood", model, tmp_path / name) == 2
        assert message in one_line(capsys)


def test_how_the_network_runs(model, tmp_path, monkeypatch):
    """Check that only the first batch size is compiled, and that the samples stay the same."""
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda called, dynamic: compiled.append(called) or called)
    plain, _ = draw(model, tmp_path, "--seeds", "0-4", "--steps", "5")
    options = ["--memory-format", "channels_last", "--compile", "--batch", "2"]
    x, _ = draw(model, tmp_path, "--seeds", "0-4", "--steps", "5", *options)
    assert_close(x, plain)
    assert len(compiled) == 1


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_dtype(model, tmp_path, calls, dtype):
    x, about = draw(model, tmp_path, "--seeds", "0-2", "--steps", "5", "--dtype", dtype)
    assert {str(x.dtype) for x, _ in calls} == {f"torch.{dtype}"}
    assert about["dtype"] == dtype
    exact, _ = draw(model, tmp_path, "--seeds", "0-2", "--steps", "5")
    assert abs(x.astype(int) - exact.astype(int)).mean() < 4
    assert_close(x, redraw(model, about))


def test_without_seeds_sixteen_fresh_ones_that_are_said(model, tmp_path, capsys):
    seeds = []
    for name in ("a.png", "b.png"):
        arguments = ["sample", "--model", str(model), "--device", "cpu", "--steps", "2", "--out", str(tmp_path / name)]
        assert cli.main(arguments) == 0
        seeds.append(images.read_metadata(tmp_path / name)["seeds"])
        out = capsys.readouterr().out
        assert f"{tmp_path / name}: 16 samples, seeds {seeds[-1][0]} … {seeds[-1][15]}, 2 steps each" in out
        assert f"path: {path_taken(torch.device('cpu'))}" in out
    assert seeds[0] == list(range(seeds[0][0], seeds[0][0] + 16))
    assert seeds[0] != seeds[1]


def test_the_embedded_model_is_the_default(tmp_path):
    out = tmp_path / "a.npz"
    assert cli.main(["sample", "--quiet", "--device", "cpu", "--seeds", "4", "--steps", "2", "--out", str(out)]) == 0
    assert images.read_metadata(out)["model"] == "embedded moons32"
    with np.load(out) as arrays:
        assert arrays["arr_0"].shape == (1, 32, 32, 1)


def edit_config(**changes):
    def change(folder):
        config = json.loads((folder / "config.json").read_text())
        for section, fields in changes.items():
            config[section] = {**config[section], **fields} if isinstance(fields, dict) else fields
        (folder / "config.json").write_text(json.dumps(config))

    return change


BROKEN = {
    "no-folder": (shutil.rmtree, "no checkpoint folder at"),
    "no-weights": (lambda folder: (folder / "model.safetensors").unlink(), "model.safetensors is missing"),
    "truncated": (lambda folder: os.truncate(folder / "model.safetensors", 9000), "model.safetensors is truncated"),
    "no-json": (lambda folder: (folder / "config.json").write_text("{"), "config.json is not valid JSON"),
    "other-format": (edit_config(format="x"), "is not a ddpm_fast checkpoint"),
    "no-section": (edit_config(network=None), "config.json lacks the section 'network'"),
    "unknown-field": (edit_config(network={"width": 8}), "unknown network field 'width'; did you mean 'widths'"),
    "bad-value": (edit_config(diffusion={"beta_start": -1}), "config.json: beta_start must be a finite number in"),
    "other-network": (edit_config(network={"embedding": 32}), "model.safetensors does not fit its config.json"),
}


@pytest.mark.parametrize(("break_it", "says"), BROKEN.values(), ids=BROKEN)
def test_a_broken_checkpoint(model, tmp_path, capsys, break_it, says):
    shutil.copytree(model, tmp_path / "model")
    break_it(tmp_path / "model")
    assert sample(tmp_path / "model", tmp_path / "a.png", "--seeds", "0") == 2
    assert says in one_line(capsys)
    assert not (tmp_path / "a.png").exists()


@pytest.mark.parametrize("field", ["groups", "heads"])
def test_a_checkpoint_with_a_zero(model, tmp_path, capsys, field):
    shutil.copytree(model, tmp_path / "model")
    edit_config(network={field: 0})(tmp_path / "model")
    assert sample(tmp_path / "model", tmp_path / "a.png", "--seeds", "0") == 2
    assert field in one_line(capsys)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        pytest.param("--steps 21", "num_inference_steps=21 is more than the schedule has", id="steps"),
        pytest.param("--steps 0", "num_inference_steps must be an integer >= 1, got 0", id="no-steps"),
        pytest.param("--eta 0.5", "eta belongs to sampler='ddim', got eta=0.5 with sampler='ddpm'", id="eta-ddpm"),
        pytest.param("--sampler ddim --eta 1.5", "eta must be a finite number in [0, 1], got 1.5", id="eta"),
        pytest.param("--temperature -1", "temperature must be a finite number in", id="temperature"),
        pytest.param("--temperature nan", "temperature must be a finite number in", id="temperature-nan"),
        pytest.param("--seeds x", "seeds look like 7, 0-15 or 1,4,9-12, got 'x'", id="seeds-text"),
        pytest.param("--seeds 1,,2", "seeds look like", id="seeds-gap"),
        pytest.param("--seeds 3-", "seeds look like", id="seeds-open"),
        pytest.param("--seeds=-3", "seeds look like", id="seeds-negative"),
        pytest.param("--seeds 5-3", "the seeds '5-3' run backwards", id="seeds-backwards"),
        pytest.param("--seeds 0-10000000", "are more than ten million", id="seeds-many"),
        pytest.param("--seeds 18446744073709551616", "seeds must lie in [0, 2^64)", id="seeds-65-bits"),
        pytest.param("--batch 1 --seeds 0,18446744073709551616", "seeds must lie in", id="second-seed-65-bits"),
        pytest.param("--batch 0", "--batch must be at least 1, got 0", id="batch"),
        pytest.param("--device cuda:99", "device 'cuda:99' is not there", id="no-gpu"),
        pytest.param("--device tpu", "device 'tpu' is not a device", id="device"),
        pytest.param("--out a.jpg", "must be a .png grid, an .npz or a folder (no suffix), got 'a.jpg'", id="suffix"),
        pytest.param("--out none/a.png", "the folder none does not exist", id="no-folder"),
        pytest.param("--out /proc/a.npz", "cannot write into /proc", id="unwritable"),
        pytest.param("--out /proc/self", "cannot write into /proc/self", id="unwritable-folder"),
        pytest.param("--out file", "file is a file, not a folder", id="is-a-file"),
        pytest.param("--out folder.png", "folder.png is a folder, not a file", id="is-a-folder"),
    ],
)
def test_bad_input_is_found_before_the_network_is_called(model, tmp_path, monkeypatch, capsys, calls, arguments, says):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("old")
    (tmp_path / "folder.png").mkdir()
    assert sample(model, "a.png", "--seeds", "0", *arguments.split()) == 2
    assert says in one_line(capsys)
    assert calls == []
    assert sorted(os.listdir(tmp_path)) == ["file", "folder.png"]
    assert (tmp_path / "file").read_text() == "old"


def test_an_infinite_temperature(model, tmp_path, capsys):
    assert sample(model, tmp_path / "a.png", "--seeds", "0", "--temperature", "inf") == 2
    assert "temperature" in one_line(capsys)


def test_a_folder_has_as_many_pictures_as_it_says(model, tmp_path, capsys):
    code = sample(model, tmp_path / "out", "--seeds", "1,1", "--steps", "2")
    assert code == 2 or len(os.listdir(tmp_path / "out")) == 2


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["paint"],
        ["sample", "--sampler", "euler"],
        ["sample", "--dtype", "int8"],
        ["sample", "--memory-format", "nhwc"],
        ["train"],
        ["sample", "--nonsense"],
    ],
    ids=" ".join,
)
def test_bad_arguments_exit_with_two(capsys, arguments):
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 2
    assert "usage: ddpm-fast" in capsys.readouterr().err


def test_a_model_that_returns_nan(model, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(UNet, "forward", lambda self, x, t: x * torch.nan)
    assert sample(model, tmp_path / "a.png", "--seeds", "0") == 1
    assert "the model returned NaN or infinity at step 0 of 20" in one_line(capsys)
    assert not (tmp_path / "a.png").exists()


@pytest.mark.parametrize("error", [MemoryError("no memory for 3 GiB"), RuntimeError("two\nlines")], ids=repr)
def test_a_failure_on_the_way(model, tmp_path, monkeypatch, capsys, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(Sampler, "__call__", fail)
    assert sample(model, tmp_path / "a.png", "--seeds", "0") == 1
    assert " ".join(str(error).split()) in one_line(capsys)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("where", ["sampling", "writing"])
@pytest.mark.parametrize("name", ["a.png", "a.npz"])
def test_interrupted(model, tmp_path, monkeypatch, capsys, name, where):
    (tmp_path / name).write_text("old")

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    if where == "sampling":
        monkeypatch.setattr(Sampler, "__call__", interrupt)
    else:
        monkeypatch.setattr(np, "savez", interrupt)
        monkeypatch.setattr(Image.Image, "save", interrupt)
    assert sample(model, tmp_path / name, "--seeds", "0", "--steps", "2") == 130
    assert "interrupted" in one_line(capsys)
    assert os.listdir(tmp_path) == [name]
    assert (tmp_path / name).read_text() == "old"


@pytest.mark.parametrize(
    ("arguments", "mentions"),
    [
        pytest.param([], ["sample", "train", "info", "COMMAND --help"], id="top"),
        pytest.param(
            ["sample"],
            [
                "ddpm-fast sample --seeds 0-15 --out samples.png",
                "--out moons.npz",
                "--out folder",
                "--sampler ddim --steps 50",
                "depends on seed k alone",
                "default: 64",
            ],
            id="sample",
        ),
        pytest.param(
            ["train"],
            ["ddpm-fast train --out runs/moons", "--model runs/moons", "resume", "default: 10000"],
            id="train",
        ),
        pytest.param(["info"], ["versions, devices, and the path"], id="info"),
    ],
)
def test_help_teaches(capsys, arguments, mentions):
    with pytest.raises(SystemExit) as stop:
        cli.main([*arguments, "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert [words for words in mentions if words not in text] == []


def test_version(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"ddpm-fast {ddpm_fast.__version__}\n"


def test_info(capsys):
    assert cli.main(["info"]) == 0
    rows = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert rows["ddpm_fast"] == ddpm_fast.__version__
    assert rows["torch"] == importlib.metadata.version("torch")  # torch.__version__ may say more
    assert rows["path"] == path_taken()
    assert rows["device"].split()[0] == "cpu" or torch.cuda.is_available()


def environment():
    """Return the environment of a process that imports this tree from any folder, with one thread."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}


def module(tmp_path, *arguments):
    return subprocess.run(
        [sys.executable, "-m", "ddpm_fast", *arguments],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=200,
    )


def test_python_m(model, tmp_path):
    arguments = f"sample --model {model} --seeds 2-4 --steps 3 --device cpu --out a.npz".split()
    process = module(tmp_path, *arguments)
    assert process.returncode == 0, process.stderr
    assert "a.npz: 3 samples, seeds 2 … 4, 3 steps each" in process.stdout
    about = images.read_metadata(tmp_path / "a.npz")
    with np.load(tmp_path / "a.npz") as arrays:
        assert_close(arrays["arr_0"], redraw(model, about))


def test_python_m_says_what_is_wrong_in_one_line(tmp_path):
    process = module(tmp_path, "sample", "--model", "nowhere")
    assert process.returncode == 2
    assert process.stdout == ""
    assert process.stderr == "ddpm-fast: no checkpoint folder at nowhere\n"


SAYS_WHEN_IT_SAMPLES = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores SIGINT
from ddpm_fast import cli
from ddpm_fast.models.unet import UNet
forward = UNet.forward
def say(self, x, t):
    print("sampling", flush=True)
    return forward(self, x, t)
UNet.forward = say
sys.exit(cli.main(sys.argv[1:]))
"""


def test_ctrl_c(model, tmp_path):
    (tmp_path / "a.npz").write_text("old")
    arguments = f"sample --quiet --model {model} --device cpu --seeds 0-99999 --batch 1 --out a.npz".split()
    process = subprocess.Popen(
        [sys.executable, "-c", SAYS_WHEN_IT_SAMPLES, *arguments],
        cwd=tmp_path,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert [process.stdout.readline() for _ in range(30)] == 30 * ["sampling\n"]
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=200)
    finally:
        process.kill()
    assert process.returncode == 130
    assert err.startswith("ddpm-fast: interrupted")
    assert err.count("\n") == 1
    assert os.listdir(tmp_path) == ["a.npz"]
    assert (tmp_path / "a.npz").read_text() == "old"
