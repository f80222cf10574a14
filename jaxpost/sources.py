"""Where batches come from: one protocol, and several sources in one batch.

A source is called with the train state and gives the next batch: this process's rows of it, as a dict of columns (types.py).
The loop asks no source which kind it is; `data.source.Batches`, `rollouts.source.Rollouts` and `Mixed` have all of this:

    source(state) -> batch
    position            where it is, as JSON: to read, and to set (0 is the beginning)
    keep(step, steps)   the position for the checkpoint of a step, beside those of `steps`; what it could not make again is in
                        files of its `folder` when it returns
    close()             ends its threads
    metrics             {name: float} of the latest batch
    spent               {"generated", "scored": tokens} that the latest batch took, besides those that are learned from
    rows, samples       all of the latest batch for the table of completions (reporting/table.py), and the first of it; []
                        for data
    columns             {name: ShapeDtypeStruct} of a whole batch
    evaluated(step, figures)    is told of each evaluation; what a source learns from it is part of its position
    folder              where it may keep files; set before the first call
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import jax
import numpy as np
from etils import epath

from jaxpost.errors import UserError


class Source(Protocol):
    """What the loop asks of a source; see the module's docstring."""

    position: Any
    metrics: dict[str, float]
    spent: Mapping[str, int]
    rows: list[dict]
    samples: list[dict]
    columns: dict[str, jax.ShapeDtypeStruct]
    folder: epath.Path | None

    def __call__(self, state: Any) -> dict[str, np.ndarray]: ...

    def keep(self, step: int, steps: Sequence[int]) -> Any: ...

    def close(self) -> None: ...

    def evaluated(self, step: int, figures: Mapping[str, float]) -> None: ...


class Silent:
    """A source that has nothing to say but its batches, and whose position is all that a checkpoint needs of it.

    like: () -> (the rows of a batch, one of them as arrays), of which `columns` are made when they are asked for.
    """

    like: Callable[[], tuple[int, Mapping[str, np.ndarray]]]
    metrics: dict[str, float] = {}
    spent: Mapping[str, int] = {}
    rows: list[dict] = []
    samples: list[dict] = []
    folder: epath.Path | None = None

    @property
    def columns(self) -> dict[str, jax.ShapeDtypeStruct]:
        """The columns of a whole batch as shapes."""
        count, row = self.like()
        return {k: jax.ShapeDtypeStruct((count, *x.shape), x.dtype) for k, x in row.items()}

    def keep(self, step: int, steps: Sequence[int]) -> Any:
        """The position."""
        return self.position

    def evaluated(self, step: int, figures: Mapping[str, float]) -> None:
        """Evaluations change nothing."""

    def close(self) -> None:
        """There is nothing to end."""


def parts(source: Source) -> list[Source]:
    """The sources that a source mixes, or the source itself."""
    return list(source.sources.values()) if isinstance(source, Mixed) else [source]


def counts(shares: Mapping[str, float], batch_size: int, divisor: int = 1) -> dict[str, int]:
    """{name: rows} of a batch, by shares that add up to 1. Raises UserError for one that is no multiple of `divisor` rows."""
    rows = {name: round(share * batch_size) for name, share in shares.items()}
    for name, count in rows.items():
        if abs(count - shares[name] * batch_size) > 1e-6 * batch_size or not count or count % divisor:
            raise UserError(
                f"config.source: {name} has {shares[name]:g} of config.batch_size={batch_size} rows, which is no multiple of "
                f"{divisor} (microbatches x data x fsdp); choose shares that are."
            )
    return rows


def mixed(sources: Mapping[str, tuple[Source, float]], batch_size: int) -> "Mixed":
    """Rows of several sources in one batch of so many rows: {name: (source, its share)}, each source giving batches of
    `counts(...)[name]` rows. Raises UserError for shares that give no whole numbers of rows, or other ones than the sources do.
    """
    rows = counts({name: share for name, (_, share) in sources.items()}, batch_size)
    for name, (source, _) in sources.items():
        if (count := len_of(source.columns)) != rows[name]:
            raise UserError(f"sources: {name} gives {count} rows a batch, and its share of {batch_size} is {rows[name]}.")
    return Mixed({name: source for name, (source, _) in sources.items()})


def len_of(columns: Mapping[str, Any]) -> int:
    """The rows of a batch, or of its columns as shapes."""
    return next(x.shape[0] for x in columns.values() if np.ndim(x) or getattr(x, "shape", ()))


class Mixed:
    """Several sources as one: the rows of each, in the order of their names, padded to the longest.

    A column that a source has not is zero in its rows; only `branches`, which every document needs where one has it, are its
    documents'. Scalar columns are those of whichever source has them.
    """

    def __init__(self, sources: Mapping[str, Source]):
        self.sources = dict(sources)
        self._width = max(source.columns["tokens"].shape[1] for source in self.sources.values())

    def __call__(self, state: Any) -> dict[str, np.ndarray]:
        """The next batch's local rows: of each source its own local rows."""
        batches = [source(state) for source in self.sources.values()]
        return _together(batches, self._width, np.zeros, np.concatenate)

    @property
    def columns(self) -> dict[str, jax.ShapeDtypeStruct]:
        """The columns of a whole batch as shapes."""
        return joined([source.columns for source in self.sources.values()])

    @property
    def position(self) -> dict[str, Any]:
        """{name: position} of the sources."""
        return {name: source.position for name, source in self.sources.items()}

    @position.setter
    def position(self, value: Mapping[str, Any] | int) -> None:
        for name, source in self.sources.items():
            source.position = value[name] if value else 0

    def keep(self, step: int, steps: Sequence[int]) -> dict[str, Any]:
        """{name: what the source keeps}."""
        return {name: source.keep(step, steps) for name, source in self.sources.items()}

    def close(self) -> None:
        """Closes all of them."""
        for source in self.sources.values():
            source.close()

    @property
    def metrics(self) -> dict[str, float]:
        """The figures of all."""
        return {name: value for source in self.sources.values() for name, value in source.metrics.items()}

    @property
    def spent(self) -> Counter:
        """The tokens of all."""
        return sum((Counter(source.spent) for source in self.sources.values()), Counter())

    @property
    def rows(self) -> list[dict]:
        """The table's rows of all."""
        return [row for source in self.sources.values() for row in source.rows]

    @property
    def samples(self) -> list[dict]:
        """The first of them."""
        return [row for source in self.sources.values() for row in source.samples]

    def evaluated(self, step: int, figures: Mapping[str, float]) -> None:
        """Tells all of them."""
        for source in self.sources.values():
            source.evaluated(step, figures)

    @property
    def folder(self) -> epath.Path | None:
        """Where the sources may keep files."""
        return next(iter(self.sources.values())).folder

    @folder.setter
    def folder(self, value: epath.Path | None) -> None:
        for source in self.sources.values():
            source.folder = value


def joined(columns: Sequence[Mapping[str, jax.ShapeDtypeStruct]]) -> dict[str, jax.ShapeDtypeStruct]:
    """The columns of a mixed batch, of those of its sources."""

    def shaped(shape, dtype):
        return jax.ShapeDtypeStruct(tuple(shape), dtype)

    def join(parts):
        return shaped((sum(x.shape[0] for x in parts), *parts[0].shape[1:]), parts[0].dtype)

    return _together(columns, max(part["tokens"].shape[1] for part in columns), shaped, join)


def _together(batches: Sequence[Mapping], width: int, blank, join) -> dict:
    """The columns of batches, arrays or shapes, one batch's rows after the other's. blank: (shape, dtype) -> zeros; join:
    columns of one width -> one.
    """
    like = {name: x for batch in reversed(batches) for name, x in batch.items()}
    whole = {name: x for name, x in like.items() if not x.shape}
    for name in (name for name, x in like.items() if x.shape):
        columns = []
        for batch in batches:
            rows = len_of(batch)
            column = batch.get(name, batch["segments"] if name == "branches" else None)
            if column is None:
                column = blank((rows, width, *like[name].shape[2:]), like[name].dtype)
            elif (short := width - column.shape[1]) > 0:
                column = _padded(column, short)
            columns.append(column)
        whole[name] = join(columns)
    return whole


def _padded(column: Any, short: int) -> Any:
    """A column with `short` more places a row, of zeros; array or shape."""
    if isinstance(column, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct((column.shape[0], column.shape[1] + short, *column.shape[2:]), column.dtype)
    return np.pad(column, ((0, 0), (0, short), *[(0, 0)] * (column.ndim - 2)))


class Demonstrations:
    """A source whose rows are imitated beside rollouts: what its mask learns is in the column `demonstrations` instead, so that
    it is neither sampled nor counted among completions.
    """

    def __init__(self, source: Source):
        self.source = source

    def __getattr__(self, name: str) -> Any:
        return getattr(self.source, name)

    def __setattr__(self, name: str, value: Any) -> None:
        target = self if name == "source" else self.source
        object.__setattr__(self, name, value) if target is self else setattr(target, name, value)

    def __call__(self, state: Any) -> dict[str, np.ndarray]:
        """The next batch's local rows."""
        batch = self.source(state)
        return {**batch, "mask": np.zeros_like(batch["mask"]), "demonstrations": batch["mask"]}

    @property
    def columns(self) -> dict[str, jax.ShapeDtypeStruct]:
        """The columns of a whole batch as shapes."""
        return {**self.source.columns, "demonstrations": self.source.columns["mask"]}
