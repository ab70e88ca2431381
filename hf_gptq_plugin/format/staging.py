"""What is written beside its place and moved in when it is whole."""

from __future__ import annotations

import fcntl
import glob
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def staged(folder: Path, name: str, *, is_folder: bool) -> Iterator[Path]:
    """A new, empty file or folder in `folder` for what will be called `name`; removed at the end if it is still there.

    What processes that were killed have left of `name` is removed first. The others are known by their locks, which
    the system gives up with the process that holds them.
    """
    prefix, suffix = f".{name}.hf-gptq-", ".part"
    for left in folder.glob(f"{glob.escape(prefix)}{'[a-z0-9_]' * 8}{suffix}"):  # as tempfile names them
        _remove_if_left(left)
    if is_folder:
        path = Path(tempfile.mkdtemp(suffix, prefix, folder))
        handle = os.open(path, os.O_RDONLY)
    else:
        handle, made = tempfile.mkstemp(suffix, prefix, folder)
        path = Path(made)
    try:
        with suppress(OSError):  # a file system without locks: then nobody else gets one, and nothing is swept
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield path
    finally:
        _remove(path)
        os.close(handle)


def _remove_if_left(path: Path) -> None:
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    except OSError:  # gone, or somebody else's
        return
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        _remove(path)
    except OSError:
        pass
    finally:
        os.close(handle)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
