"""Files are written whole or not at all."""

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def whole_file(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary path beside `path`; it takes the place of `path` when the block ends without an error.

    An interruption, a full disk or an exception leaves whatever `path` held before.
    """
    target = Path(path)
    handle, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".part", dir=target.parent)
    os.close(handle)
    part = Path(name)
    try:
        yield part
        with open(part, "rb+") as file:
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        part.chmod(0o666 & ~umask)  # mkstemp makes private files
        os.replace(part, target)
    finally:
        part.unlink(missing_ok=True)


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Write `value` as indented JSON, whole or not at all."""
    with whole_file(path) as part:
        part.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def check_writable(path: str | os.PathLike, folder: bool = False) -> None:
    """Raise OSError now if `path` (or, with `folder`, files inside it) could not be written later."""
    target = Path(path)
    if folder:
        target.mkdir(parents=True, exist_ok=True)
        parent = target
    else:
        if target.is_dir():
            raise IsADirectoryError(f"{target} is a folder, not a file")
        parent = target.parent
        if not parent.is_dir():
            raise FileNotFoundError(f"the folder {parent} does not exist")
    try:
        handle, name = tempfile.mkstemp(prefix=".ddpm_fast.", dir=parent)
    except OSError as error:
        raise PermissionError(f"cannot write into {parent}: {error.strerror}") from error
    os.close(handle)
    os.unlink(name)
