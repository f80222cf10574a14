"""In which order rows are learned from: (rows, columns, key, *, ...) -> indices [N] int, each row once.

Without one of these (`config.order`) batches are drawn at random.
"""

from collections.abc import Mapping, Sequence

import numpy as np


def by(rows: Sequence[dict], columns: Mapping, key, *, column: str, descending: bool = False) -> np.ndarray:
    """Ascending numbers of a column, equal ones as they stand: a curriculum from easy to hard. With `descending` it goes from
    hard to easy.
    """
    numbers = np.asarray(columns[column])
    return np.argsort(-numbers if descending else numbers, kind="stable")


def as_given(rows: Sequence[dict], columns: Mapping, key) -> np.ndarray:
    """The rows as they stand."""
    return np.arange(len(rows))
