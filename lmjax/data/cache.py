"""The cache directory, and files in it that are whole or absent, whoever else is at work.

Everything expensive is made once and kept under a name that contains a hash of what it was made
from, so a cached result is never stale. The recipe, for one file or one directory alike:

    with cache.lock(path):
        if not path.exists():
            with cache.atomic_directory(path) as temporary:
                ...  # write into `temporary`

A second process waits for the lock and then finds the result.
"""

import contextlib
import errno
import fcntl
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path


def cache_dir() -> Path:
    """`$LMJAX_CACHE`, or `~/.cache/lmjax`. It may be deleted whenever nothing is running."""
    return Path(os.environ.get("LMJAX_CACHE") or "~/.cache/lmjax").expanduser()


@contextlib.contextmanager
def atomic_directory(path: str | os.PathLike) -> Iterator[Path]:
    """Yields a new directory beside `path`, which becomes `path` if the block succeeds.

    If the block raises, the new directory is removed and `path` stays absent.

    Raises:
      FileExistsError: something is at `path` already (take `lock(path)` and look first).
      OSError: no space is left; the message says where.
    """
    path = Path(path)
    if path.exists():
        raise FileExistsError(f"{path} exists already: remove it or choose another directory")
    with _cleared_on_failure(path) as temporary:
        temporary.mkdir(parents=True)
        yield temporary
        os.rename(temporary, path)


def atomic_write(path: str | os.PathLike, content: bytes) -> None:
    """Writes a file that is either wholly there or, after a failure, as it was before.

    Raises:
      OSError: no space is left; the message says where.
    """
    path = Path(path)
    with _cleared_on_failure(path) as temporary:
        temporary.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)


@contextlib.contextmanager
def lock(path: str | os.PathLike) -> Iterator[None]:
    """Holds `path` against other processes on this machine; waits for whoever has it now.

    The lock is the kernel's (flock on `path` + ".lock"), so it ends with its process, even a killed
    one. The empty lock file stays: removing it would let a third process lock a new one. A file
    system without locks, as Lustre often is, is no reason to refuse.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{path}.lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK):
                raise
        yield


@contextlib.contextmanager
def _cleared_on_failure(path: Path) -> Iterator[Path]:
    """A temporary name beside `path`; removed if the block fails, full disks said plainly."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{uuid.uuid4().hex[:8]}.tmp")
    try:
        yield temporary
    except BaseException as error:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OSError(
                error.errno,
                f"no space is left in {path.parent} to write {path.name}: free some, or set "
                "LMJAX_CACHE to a directory with room",
            ) from error
        raise
