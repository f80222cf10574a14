"""The host's disk and memory, with error messages that name the path and the remedy.

`disk_errors` surrounds everything that a command writes. It turns a full disk, a read-only file system, a missing right or a
file in a folder's place into a UserError, whichever library meets it; Orbax writes arrays in C++, which reports the same faults
as text.
"""

import contextlib
import errno
import json
import os
import stat
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from etils import epath

from jaxpost.errors import UserError

_REMEDIES = {
    errno.ENOSPC: "the disk is full; free some space",
    errno.EDQUOT: "the quota of this disk is used up; free some space",
    errno.EFBIG: "a file there may not become this large; raise the limit (ulimit -f)",
    errno.EROFS: "the file system is read-only; give a folder on another",
    errno.EACCES: "this user may not read or write there; change its rights, or give another folder",
    errno.EPERM: "this user may not read or write there; change its rights, or give another folder",
    errno.ENOTDIR: "a file stands where a folder is needed; move it away, or give another folder",
    errno.EEXIST: "a file stands where a folder is needed; move it away, or give another folder",
    errno.EISDIR: "a folder stands where a file is needed; move it away, or give another folder",
}
# Some libraries raise Python's exception types without an errno.
_CODES = {
    IsADirectoryError: errno.EISDIR,
    NotADirectoryError: errno.ENOTDIR,
    FileExistsError: errno.EEXIST,
    PermissionError: errno.EACCES,
}
# What numpy and zipfile raise for bytes that are no archive; a flipped bit may mean an unknown compression or a password.
DAMAGED = (OSError, ValueError, TypeError, LookupError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error)
CONTINUES = "What was saved before is whole: the same command continues from there."


@contextlib.contextmanager
def disk_errors(where, remark: str = "") -> Iterator[None]:
    """Turns a disk's errors inside the block into a UserError that ends with the remark. where: the place to name if the error
    names no path.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if (fault := _fault(error)) is None:
            raise
        code, path = fault
        raise UserError(f"{path or where}: {_REMEDIES[code]}. {remark}".rstrip()) from error


def _fault(error: BaseException | None) -> tuple[int, str | None] | None:
    """(errno, the path or None) of the first disk error among an error and its causes; None if there is none."""
    while error is not None:
        if isinstance(error, OSError) and (code := error.errno or _CODES.get(type(error))) in _REMEDIES:
            return code, error.filename2 or error.filename
        codes = [code for code in _REMEDIES if f"os_error_code='{code}'" in str(error)]  # as TensorStore writes it
        if codes and not isinstance(error, OSError):
            return codes[0], None
        error = error.__cause__
    return None


def check_writable(folder) -> None:
    """Raises UserError where a folder cannot be written to, or cannot be made. Writes nothing; a bucket is not asked."""
    if "://" in str(folder):
        return
    path = Path(folder).absolute()
    nearest = next(p for p in (path, *path.parents) if os.path.lexists(p))
    with disk_errors(folder):
        if not nearest.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, "", str(nearest))
        if not os.access(nearest, os.W_OK | os.X_OK):
            read_only = os.statvfs(nearest).f_flag & os.ST_RDONLY
            raise OSError(errno.EROFS if read_only else errno.EACCES, "", str(nearest))


def check_regular(path) -> None:
    """Raises UserError for a path that is a pipe, a socket or a device: opening a pipe waits for a writer, maybe for ever."""
    if "://" in str(path) or not os.path.exists(path):
        return
    mode = os.stat(path).st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise UserError(f"{path}: a pipe, a socket or a device, not a file; write its content to a file, and name that.")


def read_object(path: epath.Path) -> dict:
    """The object that a JSON file holds. Raises UserError for anything else."""
    check_regular(path)
    try:
        content = json.loads(path.read_text())
    except json.JSONDecodeError as e:
        raise UserError(f"{path}: not valid JSON, line {e.lineno} column {e.colno}: {e.msg}.") from None
    except UnicodeDecodeError as e:
        raise UserError(f"{path}: not a text file (byte {e.start}).") from None
    except RecursionError:
        raise UserError(f"{path}: its JSON is nested too deep. Download or write it again.") from None
    except ValueError as e:  # a number of thousands of digits
        raise UserError(f"{path}: not valid JSON ({e}).") from None
    except (IsADirectoryError, FileNotFoundError):
        raise UserError(f"{path}: no such file.") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds a JSON {type(content).__name__}, not an object.")
    return content


def read_arrays(path: epath.Path) -> dict[str, np.ndarray] | None:
    """The arrays of an .npz file, whose own checksums are verified; None where the file is missing or damaged."""
    try:
        with path.open("rb") as content, np.load(content) as stored:
            return dict(stored)
    except DAMAGED:
        return None


def memory() -> int:
    """Bytes of memory that the process may use: the machine's, or a container's limit."""
    size = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for limit in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):
            size = min(size, int(Path(limit).read_text()))
    return size
