"""Packing: many examples in one row, by a plan made before the first step.

A streaming packer fills a row with the next examples and leaves the rest empty or splits an example. Here the lengths of all
examples are known (and cached), so the plan uses best-fit decreasing: the longest examples first, each into the fullest row
with room for it. Rows are about 98% full and no example is split. The plan is a list of rows, so the n-th row can be built on
its own, and the data's state is one integer. If the order of the examples must be kept (a curriculum), rows are filled in that
order, and are a little less full.

Two columns separate the documents of a row: `segments` counts them from 1 (attention stays within one), `positions` restarts at
0 in each. Padding is zero in every column. `mask` alone says which tokens are learned, never a padding id. A document's first
token is never in the mask: the token before it belongs to another document.
"""

import bisect
from collections.abc import Sequence

import numpy as np

Row = dict[str, np.ndarray]


def plan(lengths: Sequence[int], window: int, seed: int) -> list[np.ndarray]:
    """Rows as arrays of example indices, the same for the same seed: every example once, no row longer than the window.

    Lengths and the window are in tokens. Examples of equal length are taken in an order drawn from `seed`.
    Raises ValueError if a length is not in 1..window (see the row types' `fit`).
    """
    lengths = np.asarray(lengths, np.int64)
    if len(lengths) and not (lengths.min() >= 1 and lengths.max() <= window):
        raise ValueError(f"lengths must lie in 1..{window}, and are {lengths.min()}..{lengths.max()}")
    shuffled = np.random.default_rng(seed).permutation(len(lengths))
    order = shuffled[np.argsort(-lengths[shuffled], kind="stable")]
    bins: list[list[int]] = []
    # There are at most `window` distinct amounts of room, so this sorted list stays short.
    rooms: list[int] = []
    bins_with: dict[int, list[int]] = {}
    for index in order.tolist():
        length = int(lengths[index])
        place = bisect.bisect_left(rooms, length)
        if place == len(rooms):
            room, chosen = window, len(bins)
            bins.append([])
        else:
            room = rooms[place]
            chosen = bins_with[room].pop()
            if not bins_with[room]:
                del rooms[place], bins_with[room]
        bins[chosen].append(index)
        if left := room - length:
            if left not in bins_with:
                bisect.insort(rooms, left)
            bins_with.setdefault(left, []).append(chosen)
    return [np.array(members, np.int64) for members in bins]


def consecutive(lengths: Sequence[int], window: int) -> list[np.ndarray]:
    """Rows as in `plan`, with examples in their own order: each row takes as many of the next ones as fit."""
    ends = np.cumsum(lengths, dtype=np.int64)
    rows, start = [], 0
    while start < len(ends):
        stop = int(np.searchsorted(ends, window + (ends[start - 1] if start else 0), side="right"))
        if stop == start:
            raise ValueError(f"lengths must lie in 1..{window}, and one is {lengths[start]}")
        rows.append(np.arange(start, start := stop))
    return rows


def pack(examples: Sequence[Row], window: int) -> Row:
    """One row of S = window tokens from examples ({tokens, mask}: [n]): tokens, segments, positions [S] int32, mask [S] bool.

    Examples of several documents have their own segments, counted from 1, and positions. Other columns [n, ...] must be the
    same for all examples, and the row has them too. Raises ValueError if the examples together are longer than the window.
    """
    total = sum(len(example["tokens"]) for example in examples)
    if total > window:
        raise ValueError(f"{len(examples)} examples of {total} tokens do not fit a window of {window}")
    row = empty(window, examples[0] if examples else {})
    start = documents = 0
    for example in examples:
        size = len(example["tokens"])
        columns = {"segments": np.ones(size, np.int32), "positions": np.arange(size, dtype=np.int32)} | example
        for name, column in row.items():
            column[start : start + size] = columns[name] + documents if name == "segments" else columns[name]
        row["mask"][start] = False
        start += size
        documents += int(columns["segments"].max())
    return row


def empty(window: int, like: Row | None = None) -> Row:
    """The padding row: all zeros. It has the columns of `pack`, each [S], and the other columns of the example `like`."""
    dtypes = {"tokens": np.int32, "mask": np.bool_, "segments": np.int32, "positions": np.int32}
    row = {name: np.zeros(window, dtype) for name, dtype in dtypes.items()}
    others = {name: column for name, column in (like or {}).items() if name not in dtypes}
    return row | {name: np.zeros((window, *column.shape[1:]), column.dtype) for name, column in others.items()}
