"""Tests of files: each is whole or untouched, whatever happens during the writing."""

import json
import os
import signal
import stat
import subprocess
import sys

import pytest

from ddpm_fast.files import check_writable, whole_file, write_json

KILLED_WHILE_WRITING = """
import os, signal, sys
from ddpm_fast.files import whole_file
with whole_file(sys.argv[1]) as part, open(part, "w") as file:
    file.write("half of the new te")
    file.flush()
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_whole_file_writes(tmp_path):
    path = tmp_path / "a.txt"
    for text in ("first", "second"):
        with whole_file(path) as part:
            assert part.parent == tmp_path  # the last move is atomic only on the same file system
            part.write_text(text)
            assert path.exists() == (text == "second")
        assert path.read_text() == text
        assert os.listdir(tmp_path) == ["a.txt"]


def test_a_reader_keeps_the_file_that_it_opened(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with open(path) as reader:
        with whole_file(path) as part:
            part.write_text("new and longer")
        assert reader.read() == "old"


def test_whole_file_in_the_current_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with whole_file("a.txt") as part:
        part.write_text("new")
    assert (tmp_path / "a.txt").read_text() == "new"


@pytest.mark.parametrize("error", [ValueError, OSError, KeyboardInterrupt, SystemExit], ids=lambda e: e.__name__)
@pytest.mark.parametrize("old", [None, "old"], ids=["fresh", "over-old"])
def test_an_error_leaves_what_was_there(tmp_path, error, old):
    path = tmp_path / "a.txt"
    if old:
        path.write_text(old)

    def write_half():
        with whole_file(path) as part:
            part.write_text("half")
            raise error

    with pytest.raises(error):
        write_half()
    assert [p.read_text() for p in tmp_path.iterdir()] == ([old] if old else [])


def test_a_killed_process_leaves_the_old_file_whole(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    process = subprocess.run([sys.executable, "-c", KILLED_WHILE_WRITING, str(path)], timeout=200)
    assert process.returncode == -signal.SIGKILL
    assert path.read_text() == "old"
    with whole_file(path) as part:
        part.write_text("new")
    assert path.read_text() == "new"


@pytest.mark.parametrize("umask", [0o022, 0o002, 0o077], ids=oct)
def test_permissions_follow_the_umask(tmp_path, umask):
    before = os.umask(umask)
    try:
        write_json(tmp_path / "a.json", 1)
        assert os.umask(umask) == umask
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a.json").stat().st_mode) == 0o666 & ~umask


def test_write_json(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"β": [1, None, "x"]})
    assert json.loads(path.read_text(encoding="utf-8")) == {"β": [1, None, "x"]}
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert json.loads(path.read_text(encoding="utf-8")) == {"β": [1, None, "x"]}
    assert os.listdir(tmp_path) == ["a.json"]


def test_check_writable_leaves_nothing(tmp_path):
    check_writable(tmp_path / "a.txt")
    assert os.listdir(tmp_path) == []
    check_writable(tmp_path / "b" / "c", folder=True)
    assert [str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*")] == ["b", "b/c"]
    (tmp_path / "a.txt").write_text("old")
    check_writable(tmp_path / "a.txt")
    assert (tmp_path / "a.txt").read_text() == "old"


@pytest.mark.parametrize(
    ("path", "folder", "error", "says"),
    [
        pytest.param("none/a.txt", False, FileNotFoundError, "none does not exist", id="no-folder"),
        pytest.param("file/a.txt", False, OSError, "file", id="below-a-file"),
        pytest.param("folder", False, IsADirectoryError, "folder is a folder, not a file", id="is-a-folder"),
        pytest.param("file", True, OSError, "file", id="folder-is-a-file"),
        pytest.param("file/a", True, OSError, "file/a", id="folder-below-a-file"),
        pytest.param("/proc/a.txt", False, PermissionError, "cannot write into /proc", id="unwritable"),
        pytest.param("/proc/self", True, PermissionError, "cannot write into /proc/self", id="unwritable-folder"),
    ],
)
def test_check_writable_errors(tmp_path, path, folder, error, says):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("old")
    with pytest.raises(error, match=says):
        check_writable(tmp_path / path, folder=folder)
    assert (tmp_path / "file").read_text() == "old"


def test_a_name_that_can_be_checked_can_be_written(tmp_path):
    path = tmp_path / ("a" * 251 + ".npz")  # 255 bytes: the longest name that Linux has
    check_writable(path)
    with whole_file(path) as part:
        part.write_text("new")
    assert path.read_text() == "new"
