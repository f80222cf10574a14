"""Leaves beside a model's own, as objectives declare them: {path: (axis letters, first value)} (declare.py)."""

import zlib
from collections.abc import Mapping

import numpy as np


def shape(letters: str, sizes: Mapping[str, int]) -> tuple[int, ...]:
    """The sizes of axes: of letters among `sizes` and digits, or of letters and numbers with spaces between."""
    return tuple(sizes[c] if c in sizes else int(c) for c in (letters.split() if " " in letters else letters))


def first(path: str, shape: tuple[int, ...], value: float | Mapping, seed: int) -> np.ndarray:
    """The first values of a leaf: a number, or drawn as {"normal": standard deviation} by the path and the seed."""
    if not isinstance(value, Mapping):
        return np.full(shape, value, np.float32)
    drawn = np.random.default_rng((seed, zlib.crc32(path.encode()))).normal(size=shape)
    return (value["normal"] * drawn).astype(np.float32)
