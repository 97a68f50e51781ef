"""What is installed is what is here: wheel, sdist and editable install, built and imported without a network."""

import dataclasses
import importlib.metadata
import inspect
import json
import os
import shutil
import subprocess
import sys
import tarfile
import types
import venv
import zipfile
from pathlib import Path

import pytest

import ddpm_fast.sample
from ddpm_fast.config import SamplerConfig
from ddpm_fast.sample import Sampler, SampleResult, sample

ROOT = Path(__file__).parent.parent
PACKAGE = ("ddpm_fast", "kernels", "setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in")
# Not find_spec: after looking for pip's, setuptools no longer stands in for distutils, which torch.compile relies on.
TOOLS = pytest.mark.skipif(
    not {"pip", "setuptools"} <= {found.metadata["Name"].lower() for found in importlib.metadata.distributions()},
    reason="pip or setuptools missing",
)

IMPORT = """
import json, types
from pathlib import Path
import ddpm_fast.sample, ddpm_fast.kernels
from ddpm_fast.sample import sample, Sampler
from ddpm_fast.kernels import to_uint8
from ddpm_fast.models import checkpoint
assert isinstance(ddpm_fast.sample, types.ModuleType)
files = [ddpm_fast.__file__, ddpm_fast.kernels.__file__, to_uint8.__code__.co_filename]
weights = checkpoint.EMBEDDED["moons"]
print(json.dumps([files, str(weights), Path(weights).is_dir()]))
"""


def run(*arguments, cwd, path="", bin=None, program="python"):
    """Output of this Python, or of a program in the folder `bin`; it finds packages on `path` besides its own."""
    command = [sys.executable if bin is None else bin / program, *map(str, arguments)]
    env = {**os.environ, "PIP_NO_INDEX": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1", "PYTHONPATH": str(path)}
    process = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=120)
    assert process.returncode == 0, process.stdout + process.stderr
    return process.stdout


def import_from(path, cwd):
    """Import the package, found on `path` alone, in another process: the files it comes from, and the weights."""
    files, weights, there = json.loads(run("-c", IMPORT, cwd=cwd, path=path))
    return [Path(file) for file in files], Path(weights), there


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A copy of the sources: building leaves folders behind."""
    copy = tmp_path_factory.mktemp("tree")
    for name in PACKAGE:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
        elif (ROOT / name).exists():
            shutil.copy(ROOT / name, copy)
    return copy


@pytest.fixture(scope="module")
def wheel(tree, tmp_path_factory):
    out = tmp_path_factory.mktemp("wheel")
    run("-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", out, tree, cwd=out)
    (path,) = out.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def sdist(tree, tmp_path_factory):
    out = tmp_path_factory.mktemp("sdist")
    run("setup.py", "-q", "sdist", "-d", out, cwd=tree)
    (path,) = out.glob("*.tar.gz")
    return path


def sources(folder):
    """Paths of all sources and data files in a folder, relative to it; the link to the kernels is not followed."""
    found = [path.relative_to(folder) for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
    return {str(path) for path in found if "__pycache__" not in path.parts and path.parts[0] != "kernels"}


def expected_files():
    """Every file of an installed ddpm_fast."""
    kernels = {f"kernels/{path.name}" for path in (ROOT / "kernels").glob("*.py")}
    return {f"ddpm_fast/{name}" for name in sources(ROOT / "ddpm_fast") | kernels}


@TOOLS
def test_wheel_contents(wheel):
    with zipfile.ZipFile(wheel) as file:
        names = [info.filename for info in file.infolist() if not info.is_dir()]
        kernel = file.read("ddpm_fast/kernels/step.py")
        info = {Path(name).name: file.read(name).decode() for name in names if ".dist-info/" in name}
    assert len(names) == len(set(names))
    assert {name for name in names if ".dist-info/" not in name} == expected_files()
    assert "ddpm_fast/py.typed" in names
    assert "ddpm_fast/kernels/step_triton.py" in names
    assert kernel == (ROOT / "kernels" / "step.py").read_bytes()
    assert info["top_level.txt"].split() == ["ddpm_fast"]
    assert "ddpm-fast = ddpm_fast.cli:main" in info["entry_points.txt"]
    assert f"Version: {ddpm_fast.__version__}\n" in info["METADATA"]
    assert ("LICENSE" in info) == (ROOT / "LICENSE").exists()
    assert wheel.name == f"ddpm_fast-{ddpm_fast.__version__}-py3-none-any.whl"


@TOOLS
def test_sdist_contents(sdist):
    with tarfile.open(sdist) as file:
        members = [member for member in file.getmembers() if not member.isdir()]
    assert all(member.isfile() for member in members)  # no link: where it leads would be installed twice, or not at all
    names = {member.name.partition("/")[2] for member in members}
    assert len(names) == len(members)
    wanted = {name.replace("ddpm_fast/kernels/", "kernels/") for name in expected_files()}
    assert wanted <= names
    assert {"setup.py", "pyproject.toml", "README.md"} <= names
    assert ("LICENSE" in names) == (ROOT / "LICENSE").exists()
    assert not any(name.startswith("ddpm_fast/kernels") for name in names)


@TOOLS
@pytest.mark.parametrize("kind", ["wheel", "sdist"])
def test_install_and_import(kind, tmp_path, request):
    archive = request.getfixturevalue(kind)
    target = tmp_path / "target"
    options = ["-q", "--no-deps", "--no-build-isolation", "--target", target]
    run("-m", "pip", "install", *options, archive, cwd=tmp_path)
    assert {f"ddpm_fast/{name}" for name in sources_installed(target / "ddpm_fast")} == expected_files()
    assert not (target / "kernels").exists()
    files, weights, there = import_from(target, tmp_path)
    assert [file.relative_to(target).parts[0] for file in files] == 3 * ["ddpm_fast"]
    assert weights.is_relative_to(target)
    assert there == (ROOT / "ddpm_fast" / "weights" / "moons32").is_dir()


def sources_installed(folder):
    """Files of an installed package, byte code left out."""
    found = [path.relative_to(folder) for path in folder.rglob("*") if path.is_file()]
    return {str(path) for path in found if "__pycache__" not in path.parts}


@TOOLS
def test_editable_install(tree, tmp_path):
    """In a fresh environment, which borrows everything but ddpm_fast from this one."""
    tree = shutil.copytree(tree, tmp_path / "tree", symlinks=True)
    venv.create(tmp_path / "env", symlinks=True)
    (site,) = (tmp_path / "env" / "lib").glob("python*/site-packages")
    for folder in map(Path, sys.path):
        if folder.name in ("site-packages", "dist-packages"):
            for path in folder.iterdir():
                if "ddpm_fast" not in path.name and not (site / path.name).exists():
                    (site / path.name).symlink_to(path)
    binaries = tmp_path / "env" / "bin"
    run("-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "-e", tree, cwd=tmp_path, bin=binaries)
    with open(tree / "ddpm_fast" / "models" / "checkpoint.py", "a") as file:
        file.write("EMBEDDED = {'moons': 'edited'}\n")  # what is edited is what runs
    files, weights, _ = json.loads(run("-c", IMPORT, cwd=tmp_path, bin=binaries))
    assert Path(files[0]) == tree / "ddpm_fast" / "__init__.py"
    assert [Path(file).resolve().parent for file in files[1:]] == 2 * [tree / "kernels"]
    assert weights == "edited"
    assert run("--version", cwd=tmp_path, bin=binaries, program="ddpm-fast") == (f"ddpm-fast {ddpm_fast.__version__}\n")


def test_this_environment_imports_from_anywhere(tmp_path):
    """However ddpm_fast came into the environment that runs these tests."""
    try:
        importlib.metadata.version("ddpm_fast")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("ddpm_fast is not installed here, only found")
    files, weights, there = import_from("", tmp_path)
    assert all(file.is_file() for file in files)
    assert there == weights.is_dir()


def test_sample_is_a_module_and_a_function():
    assert isinstance(ddpm_fast.sample, types.ModuleType)
    assert inspect.isfunction(sample)
    assert (Sampler, SampleResult) == (ddpm_fast.Sampler, ddpm_fast.SampleResult)


@pytest.mark.parametrize("function", [sample, Sampler], ids=["sample", "Sampler"])
def test_the_signature_lists_every_option(function):
    parameters = inspect.signature(function).parameters
    for field in dataclasses.fields(SamplerConfig):
        assert parameters[field.name].default == field.default
        assert parameters[field.name].kind is inspect.Parameter.KEYWORD_ONLY
    assert not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
