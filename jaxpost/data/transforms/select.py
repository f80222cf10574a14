"""Which rows to keep: (rows, columns, key, *, ...) -> indices [K] int, in the order of the data."""

from collections.abc import Mapping, Sequence

import numpy as np

from jaxpost.errors import UserError


def top(rows: Sequence[dict], columns: Mapping, key, *, column: str, keep: int | float, highest: bool = True) -> np.ndarray:
    """The rows with the highest numbers in a column, or the lowest; of equal ones the first. keep: as `count` has it."""
    numbers = np.asarray(columns[column])
    order = np.argsort(-numbers if highest else numbers, kind="stable")
    return np.sort(order[: count(keep, len(rows))])


def threshold(
    rows: Sequence[dict], columns: Mapping, key, *, column: str, least: float = -np.inf, most: float = np.inf
) -> np.ndarray:
    """The rows whose number in a column lies in [least, most]. Raises UserError for a column of several numbers a row."""
    numbers = _numbers(columns, column, "select.threshold")
    return np.flatnonzero((numbers >= least) & (numbers <= most))


def quantiles(rows: Sequence[dict], columns: Mapping, key, *, column: str, low: float = 0.0, high: float = 1.0) -> np.ndarray:
    """The rows whose rank in a column, from 0 for the lowest to 1, lies in [low, high): with 0.25 and 0.75 those of middling
    difficulty. Equal numbers rank as they stand. Raises UserError for bounds that leave nothing.
    """
    numbers = _numbers(columns, column, "select.quantiles")
    _check_bounds(low=low, high=high)
    start, stop = round(low * len(rows)), round(high * len(rows))
    return np.sort(np.argsort(numbers, kind="stable")[start:stop])


def uncertain(rows: Sequence[dict], columns: Mapping, key, *, column: str, keep: int | float) -> np.ndarray:
    """The rows whose share of successes p is the least certain, by its variance p (1 - p): those nearest to a half, of equal
    ones the first. keep: as `count` has it. Raises UserError for numbers outside [0, 1].
    """
    shares = _numbers(columns, column, "select.uncertain")
    if ((shares < 0) | (shares > 1)).any():
        raise UserError(f"transform select.uncertain: {column} has {shares.min():g} to {shares.max():g}; it takes shares.")
    order = np.argsort(-shares * (1 - shares), kind="stable")
    return np.sort(order[: count(keep, len(rows))])


def random(rows: Sequence[dict], columns: Mapping, key, *, keep: int | float) -> np.ndarray:
    """Rows drawn without replacement: what any selection is compared with. keep: as `count` has it."""
    return np.sort(np.random.default_rng(key).permutation(len(rows))[: count(keep, len(rows))])


def unique(rows: Sequence[dict], columns: Mapping, key, *, field: str) -> np.ndarray:
    """The first row of each value of a field, such as its prompt. Raises UserError for a field that no row has."""
    if not any(field in row for row in rows):
        raise UserError(f"transform select.unique: no row has {field!r}; name a field of the rows.")
    first: dict[str, int] = {}
    for i, row in enumerate(rows):
        first.setdefault(repr(row.get(field)), i)
    return np.array([*first.values()], np.int64)


def count(keep: int | float, whole: int) -> int:
    """How many of `whole` rows to keep: a share of them up to 1.0 (float), or a number (int). Raises UserError for others."""
    check_count(keep=keep)
    if isinstance(keep, float) and keep <= 1:
        return max(1, round(keep * whole))
    if keep > whole:
        raise UserError(f"transform: keep={keep} of {whole} rows; {_COUNT}.")
    return int(keep)


_COUNT = "give a number of rows, or a share of them as 0.5"


def check_count(*, keep: int | float) -> None:
    """Raises UserError for a number that is neither a count nor a share of rows, however many there are."""
    if not (keep > 0 and (keep <= 1 or keep == int(keep))):
        raise UserError(f"transform: keep={keep}; {_COUNT}.")


def _check_bounds(*, low: float, high: float) -> None:
    if not 0 <= low < high <= 1:
        raise UserError(f"transform select.quantiles: low={low}, high={high}; give 0 <= low < high <= 1.")


top.check = uncertain.check = random.check = check_count
quantiles.check = _check_bounds


def _numbers(columns: Mapping, column: str, name: str) -> np.ndarray:
    """[N]. Raises UserError for a column of several numbers a row."""
    numbers = np.asarray(columns[column])
    if numbers.ndim != 1:
        raise UserError(f"transform {name}: {column} has {list(numbers.shape[1:])} numbers a row; it takes one.")
    return numbers
