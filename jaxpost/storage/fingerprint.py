"""Whether a folder's weights have changed: a digest that reads little of a checkpoint of any size.

It is SHA-256 over the files that weights are read from, in the order of their names. Of each file it covers the name, the size,
and the content: all of it up to 8 MiB, else the first MiB (where safetensors keeps names, shapes and offsets) and 64 pieces of
64 KiB spread evenly to the end. For a hundred GB in files of five GB, 100 MB are read.

Another model, another training run, a truncated or a re-sharded copy always differ, in all of their tensors or in sizes. A
change that keeps a file's size and every sampled piece passes unseen: a single tensor edited by hand. config.json is not
covered: a workdir keeps its own.
"""

import hashlib
from collections.abc import Iterable

import numpy as np
from etils import epath

from jaxpost.models import hf

WHOLE, HEAD, PIECE, PIECES = 2**23, 2**20, 2**16, 64


def digest(folder) -> str:
    """The digest of the weights in a folder of safetensors, or in one of our checkpoints' folders (its weights and running
    mean). Raises UserError for a folder without either."""
    folder = epath.Path(folder)
    parts = [folder / item for item in ("params", "ema") if (folder / item).exists()]
    return of_files([f for part in parts for f in _below(part)] or hf.files(folder), folder)


def of_files(files: Iterable, folder) -> str:
    """The digest of files in a folder."""
    folder, sha = epath.Path(folder), hashlib.sha256()
    for name, file in sorted((str(f.relative_to(folder)), f) for f in files):
        size = file.stat().length
        sha.update(f"{name}\0{size}\0".encode())
        with file.open("rb") as f:
            if size <= WHOLE:
                sha.update(f.read())
                continue
            sha.update(f.read(HEAD))
            for start in np.linspace(HEAD, size - PIECE, PIECES).astype(np.int64):
                f.seek(int(start))
                sha.update(f.read(PIECE))
    return f"sha256:{sha.hexdigest()}"


def _below(folder) -> list:
    """Every file under a folder."""
    paths = []
    for path in folder.iterdir():
        paths += _below(path) if path.is_dir() else [path]
    return paths
