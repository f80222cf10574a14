"""In which order rows are learned from: (rows, columns, key, *, ...) -> indices [N] int, each row once.

Without one of these (`config.order`) batches are drawn at random.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from jaxpost.errors import UserError


def by(rows: Sequence[dict], columns: Mapping, key, *, column: str, descending: bool = False) -> np.ndarray:
    """Ascending numbers of a column, equal ones as they stand: a curriculum from easy to hard. With `descending` it goes from
    hard to easy.
    """
    numbers = np.asarray(columns[column])
    return np.argsort(-numbers if descending else numbers, kind="stable")


def given(rows: Sequence[dict], columns: Mapping, key) -> np.ndarray:
    """The rows as they stand in the files."""
    return np.arange(len(rows))


def round_robin(rows: Sequence[dict], columns: Mapping, key, *, field: str) -> np.ndarray:
    """A row of each value of a field in turn, the values in the order of their first rows; values that are used up drop out."""
    groups = _groups(rows, field, "order.round_robin")
    ranks = np.array([[turn, place, i] for place, group in enumerate(groups) for turn, i in enumerate(group)])
    return ranks[np.lexsort((ranks[:, 1], ranks[:, 0])), 2]


def stratified(rows: Sequence[dict], columns: Mapping, key, *, field: str) -> np.ndarray:
    """The rows of each value of a field spread evenly over the order: every stretch has nearly the shares of the whole."""
    groups = _groups(rows, field, "order.stratified")
    places = np.array([[(turn + 0.5) / len(group), i] for group in groups for turn, i in enumerate(group)])
    return places[np.argsort(places[:, 0], kind="stable"), 1].astype(np.int64)


def _groups(rows: Sequence[dict], field: str, name: str) -> list[list[int]]:
    """The rows of each value of a field, values in the order of their first rows. Raises UserError where a row lacks it."""
    groups: dict[str, list[int]] = {}
    for i, row in enumerate(rows):
        if row.get(field) is None:
            raise UserError(f"transform {name}: row {i + 1} has nothing under {field!r}; name a key that every row has.")
        groups.setdefault(repr(row[field]), []).append(i)
    return [*groups.values()]
