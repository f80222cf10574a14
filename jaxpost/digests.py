"""Whether a checkpoint's files are still the bytes that were written.

`write` records the size of every file of a checkpoint and the CRC-32 of each of its pieces in `digests.json`, before the
checkpoint gets its name, so that one without it was written by an older jaxpost. `damage` compares. Both read every byte once,
in threads; in a bucket that is a download of the checkpoint at each save. A CRC-32 notices any flipped bit, and is twice as
fast as SHA-256. It is made against accidents: whoever means to change a checkpoint can change its digests too.
"""

import concurrent.futures
import functools
import hashlib
import json
import os
import zlib

from etils import epath

from jaxpost import cloud

NAME = "digests.json"
PIECE = 2**22  # bytes
# Orbax writes the time of the commit into the first when the digests are there, and the second last; no one reads its content.
_STEP, _COMMIT = "_CHECKPOINT_METADATA", "commit_success.txt"


def write(folder: epath.Path) -> None:
    """Records what the files of a folder hold now."""
    files = _measured(folder, [name for name in below(folder) if name not in (NAME, _COMMIT)])
    (folder / NAME).write_text(json.dumps({"files": files, "self": _of(files)}))


def damage(folder: epath.Path) -> str | None:
    """The first file of a checkpoint's folder that is not as it was written, and how it differs; None where all are."""
    folder = epath.Path(folder)
    return _damage(folder, tuple((name, *_state(folder / name)) for name in below(folder)))


def _state(file: epath.Path) -> tuple[int, float]:
    """(bytes, the time of the last change) of a file."""
    if not cloud.is_remote(file):
        stat = os.stat(file)
        return stat.st_size, stat.st_mtime_ns
    stat = file.stat()
    return stat.length, stat.mtime


@functools.lru_cache(maxsize=256)
def _damage(folder: epath.Path, files: tuple) -> str | None:
    """`damage`, found once for the same names, sizes and times of the files."""
    sizes = {name: size for name, size, _ in files}
    if NAME not in sizes:  # an older jaxpost's
        missing = next((part for part in ("params", "optimizer", "meta") if not (folder / part).is_dir()), None)
        return missing and f"{folder / missing} is missing"
    try:
        record = json.loads((folder / NAME).read_text())
        written = record["files"]
        if record["self"] != _of(written):
            raise ValueError
    except (ValueError, KeyError, TypeError):
        return f"{folder / NAME} was changed"
    for name, (size, _) in written.items():
        if name not in sizes:
            return f"{folder / name} is missing"
        if name != _STEP and sizes[name] != size:
            return f"{folder / name} has {sizes[name]} bytes of {size}"
    now = _measured(folder, list(written))
    changed = next((name for name in written if now[name] != written[name]), None)
    return changed and f"{folder / changed} was changed"


def below(folder: epath.Path, prefix: str = "") -> list[str]:
    """The names of all files under a folder, from it on, in order."""
    names = []
    for path in sorted(folder.iterdir()):
        names += below(path, f"{prefix}{path.name}/") if path.is_dir() else [f"{prefix}{path.name}"]
    return names


def _measured(folder: epath.Path, names: list[str]) -> dict[str, list]:
    """{name: [bytes, the CRC-32 of each piece]}."""
    sizes = {name: 0 if name == _STEP else (folder / name).stat().length for name in names}
    pieces = [(folder / name, start) for name in names for start in range(0, sizes[name] or 1, PIECE)]
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        sums = dict(zip(pieces, pool.map(lambda piece: _sum(*piece), pieces), strict=True))
    return {name: [size, [sums[folder / name, start] for start in range(0, size or 1, PIECE)]] for name, size in sizes.items()}


def _sum(file: epath.Path, start: int) -> int:
    """The CRC-32 of one piece of a file; of the file that Orbax still changes, of all but the time."""
    if file.name == _STEP:
        try:
            content = json.loads(file.read_text())
            content.pop("commit_timestamp_nsecs", None)
        except (ValueError, AttributeError):
            return -1
        return zlib.crc32(json.dumps(content, sort_keys=True).encode())
    with file.open("rb") as content:
        content.seek(start)
        return zlib.crc32(content.read(PIECE))


def _of(content) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
