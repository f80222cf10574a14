"""Whether a folder's weights are still what they were: a digest that reads little of a checkpoint of any size.

SHA-256 over, of each file that holds weights (those that are read, where there are others) and in the order of their names:
its name, its size, and its content, whole up to 8 MiB, and beyond that the first MiB (where safetensors keeps names, shapes and
offsets) and 64 pieces of 64 KiB spread evenly to the end. A hundred GB in files of five are 100 MB read.

So another model, another training run, a truncated or re-sharded copy are told apart for certain, as all of their tensors or
their sizes differ. What can pass unseen is a change within a file that leaves its size and every sampled piece as they are: a
single tensor edited by hand. config.json is not covered: a workdir keeps its own.
"""

import hashlib

import numpy as np
from etils import epath

from jaxpost.models import hf

WHOLE, HEAD, PIECE, PIECES = 2**23, 2**20, 2**16, 64


def digest(folder) -> str:
    """The digest of the weights in a folder of safetensors, or in one of our checkpoints' folders (its weights and running
    mean). Raises UserError for a folder without either."""
    folder = epath.Path(folder)
    parts = [folder / item for item in ("params", "ema") if (folder / item).exists()]
    files = [f for part in parts for f in _below(part)] or hf.files(folder)
    held = hashlib.sha256()
    for name, file in sorted((str(f.relative_to(folder)), f) for f in files):
        size = file.stat().length
        held.update(f"{name}\0{size}\0".encode())
        with file.open("rb") as f:
            if size <= WHOLE:
                held.update(f.read())
                continue
            held.update(f.read(HEAD))
            for start in np.linspace(HEAD, size - PIECE, PIECES).astype(np.int64):
                f.seek(int(start))
                held.update(f.read(PIECE))
    return f"sha256:{held.hexdigest()}"


def _below(folder) -> list:
    """Every file under a folder."""
    found = []
    for path in folder.iterdir():
        found += _below(path) if path.is_dir() else [path]
    return found
