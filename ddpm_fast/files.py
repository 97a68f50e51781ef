"""Files that are written whole or not at all."""

import contextlib
import json
import os
import secrets
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeAlias

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

StrPath: TypeAlias = str | os.PathLike[str]

PART_PREFIX = ".ddpm_fast."


@contextlib.contextmanager
def whole_file(path: StrPath) -> Iterator[Path]:
    """Yield a temporary path beside `path`; the file moves to `path` when the block ends without an error.

    After an interruption, a full disk or an exception, `path` keeps its former contents. A file that is replaced keeps
    its permissions; a new one gets those that the process gives to new files.

    Raises:
        OSError: `path` is no regular file, its folder is gone, or the disk is full; the message names `path`.
    """
    target = Path(os.path.realpath(path))  # a symbolic link stays, and its target is replaced
    part = target.parent / f"{PART_PREFIX}{secrets.token_hex(8)}.part"
    try:
        mode = _mode_of(target)
        os.close(os.open(part, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))  # less the process's umask
        fresh = stat.S_IMODE(part.stat().st_mode)
        yield part
        with open(part, "rb+") as file:
            os.fsync(file.fileno())
        part.chmod(fresh if mode is None else mode)  # some writers replace the file by one of theirs
        os.replace(part, target)
        _sync_folder(target.parent)
    except OSError as error:
        if error.errno is None or error.filename not in (None, str(part)):
            raise
        raise OSError(error.errno, os.strerror(error.errno), str(target)) from error
    finally:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            part.unlink()


def _mode_of(target: Path) -> int | None:
    """Return the permissions of a file; None where there is none yet. Raise OSError for what is no regular file."""
    try:
        found = target.stat()
    except FileNotFoundError:
        return None
    if not stat.S_ISREG(found.st_mode):
        raise OSError(f"{target} is not a regular file, and is not replaced by one")
    return stat.S_IMODE(found.st_mode)


@contextlib.contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Hold a folder for one process; raise OSError where another one holds the folder. A process that ends lets go."""
    if fcntl is None:
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OSError(f"another process is writing into {folder}") from None
        yield
    finally:
        os.close(handle)


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


def parse_json(text: str | bytes) -> Any:
    """Return what a JSON text stands for; raise ValueError for a text that is none, or is nested without end."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def check_writable(path: StrPath, folder: bool = False) -> None:
    """Raise OSError now if `path` (or, with `folder`, files inside it) could not be written later."""
    target = Path(path)
    parent = target if folder else target.parent
    if target.is_dir() and not folder:
        raise IsADirectoryError(f"{target} is a folder, not a file")
    if not folder:
        _mode_of(target)
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
