"""A model as its tensors {name: array}, as Hugging Face's files have them, wherever its weights are.

`opened` reads nothing until a tensor is sliced. `of_tree` and `to_tree` turn a tree into such a dict and back.
"""

import dataclasses
import functools
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
from etils import epath
from flax.traverse_util import flatten_dict, unflatten_dict

from jaxpost.errors import UserError
from jaxpost.models import hf, loading, safetensors_io
from jaxpost.models.families import Architecture, tensor_names
from jaxpost.models.layout import Part, Place, in_files, places
from jaxpost.storage import artefacts, checkpoint, cloud
from jaxpost.types import Params


@dataclasses.dataclass(frozen=True)
class Lazy:
    """A tensor that is read when it is sliced along its first axis: x[first:last]. remote: whether from another machine."""

    shape: tuple[int, ...]
    dtype: Any
    read: Callable[[slice], np.ndarray]
    remote: bool = False

    def __getitem__(self, rows: slice) -> np.ndarray:
        return self.read(rows)


def of_tree(params: Params, arch: Architecture) -> dict[str, np.ndarray]:
    """The tensors of a tree of parameters in memory; a leaf that the architecture does not have goes by its path."""
    flat, own = flatten_dict(params, sep="/"), tensor_names(arch)
    return dict(in_files(params, places(arch, {path: np.shape(x) for path, x in flat.items() if path not in own})))


def to_tree(
    tensors: Iterable[tuple[str, np.ndarray]],
    where: Mapping[str, Place],
    kept: Callable[[str, np.ndarray], Any] = lambda path, array: array,
) -> Params:
    """The tree of float32 parameters that (name, array) pairs make. where: of `places`.

    kept: (path, array with its leading axes) -> the leaf, called as soon as a parameter is complete.
    """
    every = [part for place in where.values() for part in place.parts]
    missing = Counter(part.path for part in every)
    counts = {part.path: tuple(x + 1 for x in part.place) for part in every}  # the last place of a parameter comes last
    waiting, flat = {}, {}
    for name, array in tensors:
        for path, place, transposed, first, last in where[name].parts:
            piece = array[first:last].T if transposed else array[first:last]
            if path not in waiting:
                waiting[path] = np.empty((*counts[path], *piece.shape), np.float32)
            waiting[path][place] = piece
            missing[path] -= 1
            if not missing[path]:
                flat[path] = kept(path, waiting.pop(path))
    return unflatten_dict(flat, sep="/")


def opened(spec: loading.ModelSpec) -> dict[str, Lazy]:
    """The tensors of a model's folder of safetensors or of a checkpoint, with the leaves beside the model's own by their paths.

    Of a checkpoint the last two parameters that were read stay in memory, with all their layers. Raises UserError for files
    that do not fit the model, for quantised ones, and for an adapter.
    """
    if spec.adapter:
        raise UserError(f"{spec.folder}: has an adapter; merge it into its weights first: python -m jaxpost.export.")
    return _opened(spec.folder, spec.transformer.arch)


@functools.lru_cache(maxsize=64)
def in_folder(where: str) -> dict[str, Lazy]:
    """The tensors of every safetensors file in a folder, whatever they are. Raises UserError where there is none, and for an
    artefact that is damaged or unfinished.
    """
    folder = cloud.path(where)
    if (folder / "meta.json").exists():
        artefacts.check(folder)
    files = sorted(folder.glob("*.safetensors")) if folder.is_dir() else []
    if not files:
        raise UserError(f"{where}: no folder with a safetensors file.")
    remote = cloud.is_remote(folder)
    slices = {name: x for file in files for name, x in safetensors_io.tensors(file).items()}
    return {name: Lazy(tuple(x.get_shape()), hf.dtype_of(folder, name, x), x.__getitem__, remote) for name, x in slices.items()}


def _opened(folder: epath.Path, arch: Architecture) -> dict[str, Lazy]:
    if (folder / "params").exists():
        return _of_checkpoint(folder, arch)
    slices, out = hf.check(folder, arch), {}
    for name, (shape, _) in places(arch).items():
        if (actual := tuple(slices[name].get_shape())) != shape:
            raise UserError(f"{folder}: {name} has shape {actual}, the config says {shape}.")
        out[name] = Lazy(shape, hf.dtype_of(folder, name, slices[name]), slices[name].__getitem__, cloud.is_remote(folder))
    return out


def _of_checkpoint(folder: epath.Path, arch: Architecture) -> dict[str, Lazy]:
    """The tensors of a checkpoint of ours; frozen ones that are elsewhere are read from there."""
    held, own, base = checkpoint.shapes(folder), tensor_names(arch), checkpoint.read_meta(folder).get("base")
    where = places(arch, {path: shape for path, shape in held.items() if path not in own})
    below = _opened(loading.base_of(folder, base), arch) if base else {}
    most = max(len(place.parts) for place in where.values())
    # Two tensors at a time may be read, and those of one parameter follow each other.
    load, lock = functools.lru_cache(maxsize=2 * most)(functools.partial(checkpoint.load_leaf, folder)), threading.Lock()

    def leaf(path: str) -> np.ndarray:
        with lock:  # several threads slice one parameter
            return load(path)

    out = {}
    for name, (shape, parts) in where.items():
        mine = [part.path in held for part in parts]
        if any(mine) and not all(mine):
            raise UserError(
                f"{folder}: holds a part of {name}, the rest is frozen elsewhere; python -m jaxpost.export joins them."
            )
        out[name] = Lazy(shape, np.float32, functools.partial(_joined, leaf, parts)) if all(mine) else below[name]
    return out


def _joined(leaf: Callable[[str], np.ndarray], parts: tuple[Part, ...], rows: slice) -> np.ndarray:
    """Rows of the tensor that parts of a tree's leaves make, in the files' order of elements."""
    start, stop, _ = rows.indices(parts[-1].last)
    pieces = []
    for path, place, transposed, first, last in parts:
        if max(start, first) < min(stop, last):
            array = leaf(path)[place].T if transposed else leaf(path)[place]
            pieces.append(array[max(start - first, 0) : stop - first])
    return np.ascontiguousarray(np.concatenate(pieces))
