"""ARCHITECTURE.md against the code: every file has its place on the page, and imports point the way that it says."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
# Rooms from the ground up; a file imports rooms of its own level or of levels before.
LEVELS = (
    ("kernels",),
    ("validate", "files", "seeding", "schedules", "timesteps", "images"),
    ("config", "table", "times"),
    ("engine", "models", "data"),
    ("speculation", "likelihood"),
    ("options",),
    ("sample", "adapters"),
    ("edit", "training"),
    ("cli",),
)
LEVEL = {room: level for level, rooms in enumerate(LEVELS) for room in rooms}


def sources(*folders):
    for folder in folders:
        for path in sorted((ROOT / folder).rglob("*.py")):
            if "ddpm_fast/kernels" not in path.as_posix() and path.name not in ("__init__.py", "__main__.py"):
                yield path


@pytest.mark.parametrize("folder", ["ddpm_fast", "kernels"])
def test_every_file_is_on_the_page(folder):
    tree = PAGE.split("```")[1]
    names = [path.name for path in sources(folder)]
    missing = [
        name for name in names
        if name not in tree and not (name.endswith("_triton.py") and name.replace("_triton", "") in tree)
    ]  # fmt: skip
    assert missing == []


def test_every_room_is_on_the_page():
    tree = PAGE.split("```")[1]
    for folder in ("ddpm_fast", "benchmarks"):
        for path in (ROOT / folder).iterdir():
            if path.is_dir() and list(path.glob("*.py")) and path.name != "kernels":
                assert f"{path.name}/" in tree


def test_files_on_the_page_exist():
    tree = PAGE.split("```")[1]
    names = {path.name for path in sources("ddpm_fast", "kernels", "benchmarks", "research")}
    assert [name for name in re.findall(r"(?<![*\w])(\w+\.py)", tree) if name not in names] == []


def imported_rooms(path):
    """The rooms of the package that a file imports when it is imported."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in tree.body:  # not those inside of functions, which wait until they are needed
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("ddpm_fast"):
            parts = node.module.split(".")
            yield from [parts[1]] if len(parts) > 1 else [name.name for name in node.names]


def test_imports_point_one_way():
    checked = 0
    for path in sources("ddpm_fast", "kernels"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        room = "kernels" if parts[0] == "kernels" else parts[1]
        if room == "reference":
            assert list(imported_rooms(path)) == []
            continue
        for other in imported_rooms(path):
            if other in LEVEL:
                checked += 1
                assert LEVEL[other] <= LEVEL[room], f"{path} imports {other}"
    assert checked > 100


def test_the_page_says_the_levels_in_their_order():
    arrows = PAGE.split("<!-- arrows -->")[1].split("<!-- end -->")[0]
    levels = [[LEVEL[room] for room in part.strip().split(", ")] for part in arrows.split("←")]
    flat = [level for part in levels for level in sorted(part)]
    assert flat == sorted(flat)
    assert len(levels) >= 6


def test_kernels_import_torch_alone():
    for path in sources("kernels"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        names = [node.module or "" for node in tree.body if isinstance(node, ast.ImportFrom)]
        names += [alias.name for node in tree.body if isinstance(node, ast.Import) for alias in node.names]
        assert all(name.startswith("ddpm_fast.kernels") for name in names if name.startswith("ddpm_fast"))
        assert "triton" not in {name.partition(".")[0] for name in names} or path.name.endswith("_triton.py")
