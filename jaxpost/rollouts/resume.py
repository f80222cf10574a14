"""What of rollouts is put aside in files: batches that a checkpoint cannot make again, and completions that a kill would lose.

    held-00000040.npz    beside the checkpoint of step 40: the batch in use, its figures and samples, and those that wait
    partial.npz          completions that had ended when the run was killed, and of which batch they are

Plain arrays by path, written whole or not at all.
"""

import io
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from jaxpost import sharding
from jaxpost.errors import UserError
from jaxpost.reporting import writers
from jaxpost.sampling.decode import Finished, together
from jaxpost.storage.host import DAMAGED, read_arrays

PARTIAL = "partial.npz"


def held(step: int) -> str:
    """The name of a checkpoint's file."""
    return f"held-{step:08d}.npz"


def sweep(folder, steps: Sequence[int]) -> None:
    """Removes the files of checkpoints that are gone: not among `steps`, and older than the last of these."""
    for path in epath.Path(folder).glob("held-*.npz"):
        if (number := int(path.name[5:13])) not in steps and number < max(steps, default=0):
            path.unlink()


def clear(folder) -> None:
    """Deletes a previous run's files; their settings are unknown."""
    for path in epath.Path(folder).glob("*.npz"):
        path.unlink()


def write(path: epath.Path, batch: Mapping, waiting: Sequence[Mapping], about: Mapping) -> None:
    """A batch's columns, what waits (dicts of arrays, numbers and NamedTuples of such), and anything else that is JSON."""
    arrays = {**_flat("batch", batch), **_flat("waiting", {str(i): one for i, one in enumerate(waiting)})}
    _store(path, {**arrays, "about": np.array(json.dumps(about))})


def read(path: epath.Path) -> tuple[dict, list[dict], dict]:
    """What `write` wrote: the columns, what waited as dicts, numbers being arrays without dimensions, and the rest.

    Raises UserError where the file is gone or damaged: no other has what it held.
    """
    stored = read_arrays(path)
    if stored is None or "about" not in stored:
        raise UserError(
            f"{path}: gone or damaged, and the checkpoint beside it cannot continue without it. Bring it back, or delete that "
            "checkpoint's folder to continue from the one before."
        )
    about = json.loads(str(stored.pop("about")))
    tree: dict = {"batch": {}, "waiting": {}}
    for name, value in stored.items():
        *inner, last = name.split("\t")
        place = tree
        for part in inner:
            place = place.setdefault(part, {})
        place[last] = value
    return tree["batch"], [tree["waiting"][str(i)] for i in range(len(tree["waiting"]))], about


def _flat(path: str, value: Any) -> dict[str, np.ndarray]:
    if hasattr(value, "_asdict"):
        value = value._asdict()
    if not isinstance(value, Mapping):
        return {} if value is None else {path: np.asarray(value)}
    return {k: x for name, inner in value.items() for k, x in _flat(f"{path}\t{name}", inner).items()}


def _store(path: epath.Path, arrays: Mapping[str, np.ndarray]) -> None:
    content = io.BytesIO()
    np.savez(content, **arrays)
    path.parent.mkdir(parents=True, exist_ok=True)
    writers.replace(path, content.getvalue())


def write_partial(folder, key: tuple[int, ...], ended: Mapping[int, Finished], new: int) -> None:
    """Completions of the batch that `key` tells from all others, by their place in it."""
    places = sorted(ended)
    completions = together([ended[i] for i in places], new)
    arrays = {"key": np.array(key), "places": np.array(places), **_flat("completions", completions)}
    _store(epath.Path(folder) / PARTIAL, arrays)


def read_partial(folder, key: tuple[int, ...]) -> dict[int, Finished]:
    """The completions of this very batch that are there; none for another, nor of a damaged file: they are made again."""
    try:
        stored = read_arrays(epath.Path(folder) / PARTIAL) or {}
        ended = _ended(stored) if tuple(stored.get("key", ())) == tuple(key) else None
    except DAMAGED:  # an archive without our arrays
        ended = None
    # A process that does not see the file has all of it made again.
    readable = sharding.everywhere(np.array([ended is not None], np.int32)).all()
    return ended if readable else {}


def _ended(stored: Mapping[str, np.ndarray]) -> dict[int, Finished]:
    columns = {name.partition("\t")[2]: x for name, x in stored.items() if "\t" in name}
    ended = {}
    for row, place in enumerate(stored["places"]):
        length = int(columns["lengths"][row])
        arrays = {name: columns[name][row, :length] for name in ("tokens", "logps")}
        rest = {"stopped": bool(columns["stopped"][row]), "text_length": int(columns["text_lengths"][row])}
        rest["given"] = int(columns["given"][row].sum())
        ended[int(place)] = Finished(int(place), **arrays, **rest)
    return ended
