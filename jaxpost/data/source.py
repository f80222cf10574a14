"""The data as a Source: records in, batches out, the state one integer.

Everything here is random access (Grain's MapDataset), so that nothing has to be replayed: row j is the examples that the
packing plan put there, place k of epoch e is a row by a permutation drawn from (seed, e), and batch n is the rows n*B to
(n+1)*B of that endless or finite sequence. All of that is a function of n alone. So the state of the data is n, the same for
any number of processes: each takes its own slice of the rows of batch n, and where there were two processes yesterday there may
be four today.
"""

from collections.abc import Collection, Sequence
from types import ModuleType
from typing import Any

import grain
import jax
import numpy as np

from jaxpost.data import pack, row_types
from jaxpost.errors import UserError
from jaxpost.sources import Silent


def split(count: int, held_out: int | float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(train, held-out) indices into `count` examples: disjoint, sorted, drawn from seed; together they are all of them.

    `held_out` is a number of examples (int) or a fraction of them (float, at least one example unless it is 0).
    Raises UserError if it leaves nothing to train on.
    """
    if held_out > 1 and held_out != int(held_out):
        raise UserError(f"held_out={held_out}: more than 1 is a number of examples, so give a whole one, or a share below 1.0")
    held_out_count = max(round(held_out * count), int(held_out > 0)) if isinstance(held_out, float) else held_out
    if not 0 <= held_out_count < count:
        remedy = f"give a number of examples from 0 to {count - 1}, or a fraction below 1.0"
        remedy = remedy if count > 1 else "give 0, or name eval_data"
        raise UserError(f"held_out={held_out} of {count} examples leaves none to train on; {remedy}")
    order = np.random.default_rng(seed).permutation(count)
    return np.sort(order[held_out_count:]), np.sort(order[:held_out_count])


def rows(examples: Sequence[pack.Row] | grain.MapDataset, lengths: Sequence[int], window: int, **options) -> grain.MapDataset:
    """Rows of S = window tokens (the columns of `pack.pack`, each [S]), of the examples that `bins` puts in each."""
    placed = grain.MapDataset.source(bins(lengths, window, **options))
    return placed.map(lambda members: pack.pack([examples[int(i)] for i in members], window))


def bins(
    lengths: Sequence[int],
    window: int,
    *,
    packing: bool = True,
    seed: int,
    in_order: bool = False,
    documents: Sequence[int] | None = None,
    most: int | None = None,
) -> list[np.ndarray]:
    """The examples of each row, by number: packed by a plan, or in their order where that is to be kept; or one a row.

    most: the most documents of a row, of which each example has so many: `documents` [N].
    """
    if not packing:
        return list(np.arange(len(lengths))[:, None])
    planned = pack.consecutive(lengths, window) if in_order else pack.plan(lengths, window, seed)
    if most is None:
        return planned
    return [row[part] for row in planned for part in pack.consecutive(np.asarray(documents)[row], most)]


def columns(
    batch_size: int,
    window: int,
    row_type: str | ModuleType = row_types.DEFAULT,
    shared: bool = False,
    reads: Collection[str] = (),
    row_columns: Sequence[str] = (),
) -> dict[str, jax.ShapeDtypeStruct]:
    """The columns of a whole batch as shapes: those of a row, [B,S] each; see `encoding.encode_all` for the arguments."""
    row = pack.empty(window, row_types.load(row_type).further(shared, frozenset(reads), row_columns))
    return {k: jax.ShapeDtypeStruct((batch_size, *x.shape), x.dtype) for k, x in row.items()}


class Batches(Silent):
    """Batch n of the data, for n = 0, 1, ...: a source (jaxpost/sources.py), called without regard to the train state.

    Each epoch is a permutation of all rows drawn from (seed, epoch), and batches of B = batch_size rows run on over the end of
    an epoch. Rows past the very last are all zeros, so every batch has one shape. `local=(start, stop)` are the rows of every
    batch that this process wants. `position` is the number of batches handed out; setting it goes there at once.
    """

    def __init__(
        self,
        rows: grain.MapDataset,
        batch_size: int,
        *,
        seed: int,
        shuffle: bool = True,
        epochs: int | None = None,
        local: tuple[int, int] | None = None,
    ):
        """`epochs=None` never ends. Raises UserError for sizes that make no batch."""
        start, stop = (0, batch_size) if local is None else local
        if not len(rows):
            raise UserError("no rows to make batches of; give at least one example")
        if not 0 <= start < stop <= batch_size:
            raise UserError(f"batch_size={batch_size} has no rows {start} to {stop}; make it 1 or more for each process")
        if epochs is not None and epochs < 1:
            raise UserError(f"epochs={epochs} is not a number of passes; give 1 or more, or None to go on without end")
        if shuffle:
            # Grain seeds epoch e with seed + e: unhashed, the second epoch of seed 0 would be the first of seed 1.
            rows = rows.shuffle(int(np.random.SeedSequence(seed).generate_state(1)[0]))
        self.like = lambda: (batch_size, rows[0])
        self.epoch = len(rows)  # rows of one pass
        batches = _LocalBatches(rows.repeat(epochs), batch_size, start, stop)
        self._length = None if epochs is None else len(batches)
        self._iterator = iter(batches.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)))

    def __call__(self, state: Any = None) -> pack.Row:
        """The next batch: the columns of the rows, each [stop - start, S]. Raises StopIteration past the last."""
        return next(self._iterator)

    def __len__(self) -> int:
        """The number of batches in all; TypeError if they never end."""
        if self._length is None:
            raise TypeError("batches without end have no length; give epochs a number")
        return self._length

    @property
    def position(self) -> int:
        """The number of batches handed out so far: the whole state of the data, whatever the number of processes."""
        return self._iterator.get_state()["next_index"]

    @position.setter
    def position(self, value: int) -> None:
        if value < 0 or (self._length is not None and value > self._length):
            has = "no end" if self._length is None else f"{self._length} batches"
            raise UserError(f"cannot go on after batch {value} of data with {has}; resume with the data of the run")
        self._iterator.set_state({"next_index": int(value)})


class _LocalBatches(grain.MapDataset):
    """Element n is rows start..stop of the n-th B rows of the parent, stacked; places past the parent's end are zeros."""

    def __init__(self, parent: grain.MapDataset, batch_size: int, start: int, stop: int):
        super().__init__(parent)
        self._batch_size, self._start, self._stop = batch_size, start, stop

    def __len__(self) -> int:
        return -(-len(self.parents[0]) // self._batch_size)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return self.slice(index)
        (parent,) = self.parents
        first = index * self._batch_size
        places = range(first + self._start, first + self._stop)
        rows = [parent[place] for place in places if place < len(parent)]
        # A process whose rows are all past the end still needs a row's shapes.
        like = rows[0] if rows else parent[0]
        missing = [{name: np.zeros_like(column) for name, column in like.items()}] * (len(places) - len(rows))
        return {name: np.stack([row[name] for row in rows + missing]) for name in like}
