"""The tensors of a safetensors file, read lazily and in part, and written one after another, wherever the file is.

On a disk the safetensors library maps the file into memory. From gs:// the header is read, and then the needed rows of each
tensor as one range of the object: nothing is downloaded to a disk first, and each host only reads what its own devices hold.
Columns are cut on the host, so a weight whose columns are split over devices is read once for each part.
"""

import json
import math
from collections.abc import Iterable, Mapping
from typing import Any

import ml_dtypes
import numpy as np
from etils import epath
from safetensors import SafetensorError, safe_open

from jaxpost.errors import UserError
from jaxpost.storage import cloud

DTYPES = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
_HEADER = 8  # bytes that hold the length of the JSON header after them


def tensors(file: epath.Path) -> dict[str, Any]:
    """Name -> lazy slice, with get_shape(), get_dtype() and indexing by slices. Raises UserError for a file that is cut off."""
    try:
        if cloud.is_remote(file):
            return _remote(file)
        opened = safe_open(file, framework="np")
    except (SafetensorError, ValueError, KeyError) as e:
        raise UserError(f"{file}: not a whole safetensors file ({e}). Copy or download it again.") from None
    return {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118 (not a dict)


def _remote(file: epath.Path) -> dict[str, "_Slice"]:
    size = file.stat().length
    length = int.from_bytes(_range(file, 0, _HEADER), "little") if size >= _HEADER else size
    start = _HEADER + length
    if start > size:
        raise ValueError("it ends within its header")
    header = json.loads(_range(file, _HEADER, start))
    entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
    if start + max((entry["data_offsets"][1] for entry in entries.values()), default=0) != size:
        raise ValueError("its size is not what its header says")
    return {name: _Slice(file, start, entry) for name, entry in entries.items()}


def _range(file: epath.Path, start: int, stop: int) -> bytes:
    with file.open("rb") as stream:
        stream.seek(start)
        return stream.read(stop - start)


class _Slice:
    """One tensor of a remote file. Indexing only takes slices of step 1."""

    def __init__(self, file: epath.Path, start: int, entry: Mapping):
        self.file, self.entry = file, entry
        self.start = start + entry["data_offsets"][0]

    def get_shape(self) -> list[int]:
        return self.entry["shape"]

    def get_dtype(self) -> str:
        return self.entry["dtype"]

    def __getitem__(self, index) -> np.ndarray:
        shape, kind = self.entry["shape"], np.dtype(DTYPES[self.entry["dtype"]])
        index = index if isinstance(index, tuple) else (index,)
        if not shape:
            return np.frombuffer(_range(self.file, self.start, self.start + kind.itemsize), kind).reshape(())
        first, last, _ = index[0].indices(shape[0])
        row = math.prod(shape[1:]) * kind.itemsize
        read = _range(self.file, self.start + first * row, self.start + last * row) if last > first else b""
        return np.frombuffer(read, kind).reshape(max(last - first, 0), *shape[1:])[:, *index[1:]]


def write(file: epath.Path, about: Mapping[str, tuple[Any, tuple[int, ...]]], arrays: Iterable[np.ndarray]) -> None:
    """Writes a file of the tensors {name: (dtype, shape)}, whose arrays come in that order, one in memory at a time."""
    names = {np.dtype(kind): name for name, kind in DTYPES.items()}
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, (dtype, shape) in about.items():
        start, end = end, end + math.prod(shape) * np.dtype(dtype).itemsize
        header[name] = {"dtype": names[np.dtype(dtype)], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _HEADER)
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(_HEADER, "little") + text)
        for array, (name, (dtype, shape)) in zip(arrays, about.items(), strict=True):
            assert (array.dtype, array.shape) == (np.dtype(dtype), tuple(shape)), name
            stream.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)


class Row:
    """Rows [first, last) of expert `entry` of a stacked tensor, as a tensor of its own."""

    def __init__(self, whole, entry: int, first: int, last: int):
        self.whole, self.entry, self.first, self.last = whole, entry, first, last

    def get_shape(self) -> list[int]:
        return [self.last - self.first, *self.whole.get_shape()[2:]]

    def get_dtype(self) -> str:
        return self.whole.get_dtype()

    def __getitem__(self, index) -> np.ndarray:
        index = index if isinstance(index, tuple) else (index,)
        start, stop, _ = index[0].indices(self.last - self.first)
        return self.whole[slice(self.entry, self.entry + 1), slice(self.first + start, self.first + stop), *index[1:]][0]
