"""How a transform is called, and what its result means.

A transform is a function (rows, columns, key, *, ...) -> indices [K] int | weights [N] float | rows. rows: the data's rows,
dicts; columns: {name: array [N] or [N,...]}, annotations and the numbers that all rows have under a key; key: uint32 [2], which
`np.random.default_rng` and `jax.random` both take. It is deterministic given these. One that reads files besides carries
`mine.files = ("against",)`: the keywords that name them, so that its result is made again when they change. One whose keywords
may be wrong carries `mine.check = function(*, keywords)`, which raises for them before there are rows.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxpost.config.resolve import nearest, resolve, within
from jaxpost.data import mixture, readers
from jaxpost.data.readers import Record
from jaxpost.errors import UserError

WEIGHT = "weight"


class Columns(dict):
    """A transform's columns. Reading one that is not there raises UserError with the first row that lacks the number."""

    def __init__(self, rows: Sequence[dict], given: Mapping[str, Any] | None = None, places: Sequence[str] | None = None):
        """given: columns [N,...] that are no keys of the rows; places: the rows' files and lines, where they are known."""
        keys = [key for key in (rows[0] if rows else {}) if _lacking(rows, key) is None]
        super().__init__({key: np.array([row[key] for row in rows], np.float64) for key in keys})
        self.update({name: np.asarray(column) for name, column in (given or {}).items()})
        self._rows, self._places = rows, places

    def __missing__(self, name: str):
        row = _lacking(self._rows, name) or 0
        place = self._places[row] if self._places else f"row {row + 1}"
        raise UserError(
            f"{place}: there is no number under {name!r}, which a transform reads from every row; write one, or name another "
            f"column.{nearest(name, self)}"
        )


def _lacking(rows: Sequence[dict], key: str) -> int | None:
    """The place of the first row that has no finite number under a key, or None."""
    values = (row.get(key) for row in rows)
    return next((i for i, x in enumerate(values) if not isinstance(x, (int, float)) or not np.isfinite(x)), None)


def apply(function: Callable, rows: Sequence[dict], columns: Mapping, key: np.ndarray) -> list[dict]:
    """The rows that a transform makes: those that it picks, or all with its weights under "weight", or its own.

    function: a transform whose keywords are bound; columns: {name: [N,...]} besides the rows' own numbers; key: uint32 [2].
    Raises UserError for a function that fails, and for a result that is none of the three.
    """
    every = Columns(rows, columns)
    try:
        result = function(rows, every, key)
    except UserError:
        raise
    except Exception as error:  # of somebody's function
        raise UserError(f"the transform failed with {type(error).__name__}: {error}") from error
    if isinstance(result, list) and all(isinstance(row, dict) for row in result):
        return result
    numbers = np.asarray(result)
    if numbers.dtype.kind == "f" and numbers.shape == (len(rows),) and np.isfinite(numbers).all():
        return [{**row, WEIGHT: float(weight)} for row, weight in zip(rows, numbers, strict=True)]
    return [rows[i] for i in _checked(numbers, len(rows))]


def in_order(entry: Mapping | str, records: Sequence[Record], *, seed: int) -> list[Record]:
    """The records in the order of a transform's entry, a bare name being one of order.py.

    Raises UserError for a transform that does not give each of them once.
    """
    rows = [record.row for record in records]
    columns = Columns(rows, places=[record.place for record in records])
    transform = resolve(within(entry, "order"), "transforms")
    check(transform)
    order = _checked(np.asarray(transform(rows, columns, key_of(seed))), len(rows))
    if len(order) != len(rows) or len(np.unique(order)) < len(rows):
        raise UserError(
            f"config.order: it gives {len(np.unique(order)):,} of {len(rows):,} rows, and an order has each row "
            "once; have a stage that does select take a part of them."
        )
    return [records[i] for i in order]


def check(function: Callable) -> None:
    """Raises UserError for keywords of a transform that cannot be, whatever the rows are, and for files that cannot be read."""
    own = getattr(function, "func", function)
    if checked := getattr(own, "check", None):
        bound = {k: p.default for k, p in inspect.signature(own).parameters.items()} | getattr(function, "keywords", {})
        checked(**{name: bound[name] for name in inspect.signature(checked).parameters})
    digests_of_files(function)


def digests_of_files(function: Callable) -> dict[str, str]:
    """{keyword: a digest of the rows} of the files that a transform reads. Raises UserError for files that cannot be read."""
    names = getattr(getattr(function, "func", function), "files", ())
    paths = {name: getattr(function, "keywords", {}).get(name) for name in names}
    return {
        name: mixture.digest_of_rows(record.row for record in readers.read(path if isinstance(path, str) else list(path)))
        for name, path in paths.items()
        if path
    }


def key_of(seed: int) -> np.ndarray:
    """The key of a stage's seed, uint32 [2]."""
    return np.random.SeedSequence(seed).generate_state(2)


def _checked(numbers: np.ndarray, count: int) -> np.ndarray:
    if numbers.dtype.kind not in "iu" or numbers.ndim != 1 or ((numbers < 0) | (numbers >= count)).any():
        raise UserError(
            f"a transform returns indices [K] int below {count}, finite weights [{count}] float, or a list of rows (where an "
            f"order is asked for, indices alone); this one gave {numbers.dtype} {list(numbers.shape)}."
        )
    return numbers
