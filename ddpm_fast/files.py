"""Files that are written whole or not at all."""

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TypeAlias

StrPath: TypeAlias = str | os.PathLike[str]

PART_PREFIX = ".ddpm_fast."


@contextlib.contextmanager
def whole_file(path: StrPath) -> Iterator[Path]:
    """Yield a temporary path beside `path`; the file moves to `path` when the block ends without an error.

    After an interruption, a full disk or an exception, `path` keeps its former contents.
    """
    target = Path(os.path.realpath(path))  # a symbolic link stays, and its target is replaced
    handle, name = tempfile.mkstemp(prefix=PART_PREFIX, suffix=".part", dir=target.parent)
    os.close(handle)
    part = Path(name)
    try:
        yield part
        with open(part, "rb+") as file:
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        part.chmod(0o666 & ~umask)  # mkstemp lets only the owner read the file
        os.replace(part, target)
        _sync_folder(target.parent)
    finally:
        part.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """Flush the folder's entries to disk, so that the new name is as durable as the contents."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove_parts(folder: StrPath) -> None:
    """Remove unfinished files of `whole_file` that killed processes left in a folder with no other writer."""
    for part in Path(folder).glob(f"{PART_PREFIX}*.part"):
        part.unlink(missing_ok=True)


def write_json(path: StrPath, value: object) -> None:
    """Write `value` as indented JSON, whole or not at all."""
    with whole_file(path) as part:
        part.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def check_writable(path: StrPath, folder: bool = False) -> None:
    """Raise OSError now if `path` (or, with `folder`, files inside it) could not be written later."""
    target = Path(path)
    parent = target if folder else target.parent
    if target.is_dir() and not folder:
        raise IsADirectoryError(f"{target} is a folder, not a file")
    if parent.exists() and not parent.is_dir():
        raise NotADirectoryError(f"{parent} is a file, not a folder")
    if not folder and not parent.exists():
        raise FileNotFoundError(f"the folder {parent} does not exist")
    try:
        parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=PART_PREFIX, suffix=".part", dir=parent)
    except OSError as error:
        raise PermissionError(f"cannot write into {parent}: {error.strerror}") from error
    os.close(handle)
    os.unlink(name)
    try:
        target.exists()
    except OSError as error:
        raise OSError(f"cannot write {target}: {error.strerror}") from error
