"""Whether a checkpoint's files are still the bytes that were written.

`write` records the size, the CRC-32C and the last four bytes of every file of a checkpoint in `crc32c.json`, before the
checkpoint gets its name. `damage` compares. The last bytes are needed because Orbax ends its index files with their own
CRC-32C: the sum over such a file is always the same, so another step's index would pass for this one's. The checkpoint's meta
has MARK, so a missing record is damage too. A checkpoint without both was written by an older jaxpost and is accepted
unchecked.

On a disk both functions read every byte once, in threads; processors have an instruction for this sum, so reading takes the
time. A bucket stores the same sum of every object, so there each call is a listing (a request per thousand objects) and two
small objects; nothing is downloaded, and last bytes are not compared. The sum notices any flipped bit. It protects against
accidents only: whoever means to change a checkpoint can change its record too.
"""

import concurrent.futures
import functools
import hashlib
import json
import os
import sys
from collections.abc import Iterable
from typing import NamedTuple

import google_crc32c
from etils import epath

from jaxpost.storage import cloud

NAME, MARK = "crc32c.json", "digests"
# From version 1.9 on the library releases the GIL for pieces of a MiB or more.
_PIECE, _THREADS = 2**22, 4
# Orbax writes the time of the commit into the first after the digests, and the second last of all; its content is not read.
_STEP, _COMMIT = "_CHECKPOINT_METADATA", "commit_success.txt"


class File(NamedTuple):
    """A file as a listing shows it; stamp: changes with each write; crc32c: None where the listing lacks it."""

    size: int
    stamp: int
    crc32c: int | None = None


def write(folder: epath.Path) -> None:
    """Records the digests of a folder's files."""
    files = _files(folder)
    sums = _sums(folder, files, [name for name in files if name not in (NAME, _COMMIT)])
    written = {name: [0 if name == _STEP else files[name].size, *values] for name, values in sums.items()}
    (folder / NAME).write_text(json.dumps({"files": written, "self": _of(written)}))


def damage(folder: epath.Path) -> str | None:
    """The first file of a checkpoint's folder that has changed, and how; None where none has."""
    folder = epath.Path(folder)
    return _damage(folder, tuple(_files(folder).items()))


def checksum(file: epath.Path) -> int:
    """The CRC-32C of a file's bytes."""
    return _read(file)[0]


def _read(file: epath.Path) -> tuple[int, str]:
    """(the CRC-32C of a file's bytes, the last four of them in hex)."""
    crc, last = 0, b""
    with file.open("rb") as content:
        while piece := content.read(_PIECE):
            crc, last = google_crc32c.extend(crc, piece), (last + piece[-4:])[-4:]
    return crc, last.hex()


@functools.lru_cache(maxsize=256)
def _damage(folder: epath.Path, listed: tuple) -> str | None:
    """`damage`, cached by the names, sizes and stamps of the files."""
    files = dict(listed)
    if NAME not in files:
        return _unrecorded(folder)
    try:
        record = json.loads((folder / NAME).read_text())
        written = record["files"]
        if record["self"] != _of(written):
            raise ValueError
    except (ValueError, KeyError, TypeError, RecursionError):
        return f"{folder / NAME} was changed"
    for name, (size, *_) in written.items():
        if name not in files:
            return f"{folder / name} is missing"
        if name != _STEP and files[name].size != size:
            return f"{folder / name} has {files[name].size} bytes of {size}"
    now = _sums(folder, files, written)
    changed = next((name for name, (_, *recorded) in written.items() if _differ(recorded, now[name])), None)
    return changed and f"{folder / changed} was changed"


def _differ(written: list, now: tuple) -> bool:
    """Whether a file's (CRC, last bytes) differ; values that one of the two lacks are not compared."""
    return any(a != b for a, b in zip(written, now, strict=False) if None not in (a, b))


def _unrecorded(folder: epath.Path) -> str | None:
    """The damage of a checkpoint without a record; None for a whole one of an older jaxpost."""
    if missing := next((part for part in ("params", "optimizer", "meta") if not (folder / part).is_dir()), None):
        return f"{folder / missing} is missing"
    meta = folder / "meta" / "metadata"
    try:
        marked = MARK in json.loads(meta.read_text())
    except (OSError, ValueError, TypeError, RecursionError):
        return f"{meta} is missing or was changed"
    if marked:
        return f"{folder / NAME} is missing"
    print(f"{folder}: an older jaxpost wrote it, without digests of its files; it is taken unchecked.", file=sys.stderr)
    return None


def _files(folder: epath.Path) -> dict[str, File]:
    """{name relative to the folder: file} of all files under a folder, sorted, without broken links."""
    if cloud.is_remote(folder):
        return {name: File(*state) for name, state in sorted(cloud.objects(folder).items())}
    paths = [os.path.join(at, name) for at, _, names in os.walk(folder) for name in names]
    stats = {os.path.relpath(path, folder): os.stat(path) for path in paths if os.path.exists(path)}
    return {name: File(stat.st_size, stat.st_mtime_ns) for name, stat in sorted(stats.items())}


def _sums(folder: epath.Path, files: dict[str, File], names: Iterable[str]) -> dict[str, tuple]:
    """{name: (CRC-32C, the last bytes in hex)}. Files whose CRC the listing has are not read; their last bytes are None."""

    def sums(name: str) -> tuple[int, str | None]:
        if name == _STEP:
            return _without_time(folder / name), None
        return _read(folder / name) if (crc := files[name].crc32c) is None else (crc, None)

    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        return dict(zip(names, pool.map(sums, names), strict=True))


def _without_time(file: epath.Path) -> int:
    """The CRC-32C of a file without the commit time, which Orbax still changes."""
    try:
        content = json.loads(file.read_text())
        content.pop("commit_timestamp_nsecs", None)
    except (ValueError, AttributeError, RecursionError):
        return -1
    return google_crc32c.value(json.dumps(content, sort_keys=True).encode())


def _of(content) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
