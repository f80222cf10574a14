"""Packing: many examples in one row, by a plan made before the first step.

A streaming packer fills a row with whatever comes next and leaves the rest empty or cuts an example in two. Here the lengths
of all examples are known (and cached), so the plan is made at once by best-fit decreasing: the longest examples first, each
into the fullest row that still has room for it. That fills rows to about 0.98 and never splits an example, and since the plan
is a list of rows, the n-th row can be built at random access, which is what makes the data's state one integer. Where the
order of the examples is to be kept (a curriculum), rows are filled in that order, and are a little less full.

A packed row keeps its documents apart by two columns: `segments` counts them from 1 (attention stays within one), `positions`
starts over at 0 in each. Padding is zero in every column; what is learned is said by `mask` alone, never by a padding id. A
document's first token is never in the mask: the token before it belongs to somebody else.
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
    # There are never more distinct amounts of room than the window has tokens, so this sorted list stays short.
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
    """Rows as `plan` gives them, of examples in their own order: each row takes the next ones, as many as fit."""
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

    Examples that consist of several documents bring their own segments, counted from 1, and positions; whatever other columns
    [n, ...] they have, each has, and the row has them too.
    Raises ValueError if the examples together are longer than the window.
    """
    total = sum(len(example["tokens"]) for example in examples)
    if total > window:
        raise ValueError(f"{len(examples)} examples of {total} tokens do not fit a window of {window}")
    row = empty(window, examples[0] if examples else {})
    start = seen = 0
    for example in examples:
        size = len(example["tokens"])
        own = {"segments": np.ones(size, np.int32), "positions": np.arange(size, dtype=np.int32)} | example
        for name, column in row.items():
            column[start : start + size] = own[name] + seen if name == "segments" else own[name]
        row["mask"][start] = False
        start += size
        seen += int(own["segments"].max())
    return row


def empty(window: int, like: Row | None = None) -> Row:
    """The padding row: all zeros, no segment, nothing to learn. The columns of `pack`, each [S], and those of an example."""
    own = {"tokens": np.int32, "mask": np.bool_, "segments": np.int32, "positions": np.int32}
    row = {name: np.zeros(window, dtype) for name, dtype in own.items()}
    others = {name: column for name, column in (like or {}).items() if name not in own}
    return row | {name: np.zeros((window, *column.shape[1:]), column.dtype) for name, column in others.items()}
