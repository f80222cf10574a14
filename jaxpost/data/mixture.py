"""Several data sources in one stream: lists, which are concatenated, and mixtures, which are sampled by weight.

In `config.data` commas separate sources, and a weight follows its source after an equals sign:

    a.jsonl,b.jsonl                one data set of two files, each row once an epoch
    a.jsonl=3,b.jsonl=1            a mixture: three rows in four from a.jsonl
    {"a.jsonl": 3, "b.jsonl": 1}   the same in a recipe; there a list takes a path with a comma or an equals sign in it too

Weights are shares of rows, and a row has examples of one source. With packing rows are full, so they are shares of tokens;
without, they are shares of examples. The order is Grain's: as even as the weights allow, so that every batch has nearly the
proportions of the whole, and a row's source is a function of its index alone. Each source is shuffled again in every pass. So a
mixture has random access, and one integer resumes it.

An epoch of a mixture ends when every source has been read at least once. A source with a weight above its share of the rows
repeats before that.
"""

import hashlib
import json
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import grain
import numpy as np

from jaxpost.config.resolve import value_of
from jaxpost.data import formats, readers
from jaxpost.errors import UserError, printable

MUCH = 0.1  # warn from this share of examples dropped, or of tokens cut off, for their length


class Part(NamedTuple):
    """A source of a mixture, or the only one: its records, and the errors of rows that were left out."""

    name: str
    weight: float | None
    records: list[readers.Record]
    unread: list[str]


def read(data: Any, key: str, skip: bool) -> list[Part]:
    """The parts of `config.<key>`: one for each weighted source, or one for all sources without weights.

    data: a string, a list of strings and (path, weight) pairs, or a dict of weights, as above. With `skip`, rows that cannot be
    read are left out, and `unread` has the errors. Raises UserError for other data, for weights of 0 or less, and as
    `readers.read`.
    """
    entries = list(_entries(data, key))
    weights = [weight for _, weight in entries]
    if any(w is not None and not (math.isfinite(w) and w > 0) for w in weights):
        raise UserError(f"config.{key}: weights must be above 0, and are {weights}; leave a source out to weigh it nothing")
    weighted = [w is not None for w in weights]
    if any(weighted) and not all(weighted):
        raise UserError(
            f"config.{key}: {entries[weighted.index(False)][0]!r} has no weight, as others have; give all one or none"
        )
    if not entries:
        raise UserError(f"config.{key}: names no source; give a file, a folder, a pattern, tfds:NAME/SPLIT or hf:NAME")
    names = [name for name, _ in entries]
    together = [(", ".join(names), None, names[0] if len(names) == 1 else names)]
    parts = []
    for name, weight, paths in [(n, w, n) for n, w in entries] if all(weighted) else together:
        unread: list[str] = []
        parts.append(Part(name, weight, readers.read(paths, unread if skip else None), unread))
    return parts


def mix(rows: Sequence[grain.MapDataset], weights: Sequence[float], seed: int) -> grain.MapDataset:
    """The datasets' rows by weight (relative, above 0), shuffled by seed. Its length is one epoch; it can be repeated.

    rows: each with one row or more. Weights are exact to a hundredth of the smallest.
    """
    seeds = [int(np.random.SeedSequence([seed, k]).generate_state(1)[0]) for k in range(len(rows))]
    endless = [part.shuffle(s).repeat() for part, s in zip(rows, seeds, strict=True)]
    mixed = grain.MapDataset.mix(endless, list(weights))
    return _Epoch(mixed, _epoch([len(part) for part in rows], weights))


def divide(parts: Sequence[Part], chosen: np.ndarray) -> tuple[list[Part], list[Part]]:
    """(kept, rest): the parts' records whose index in their concatenation is in `chosen` (sorted), and the others.

    `kept` has no parts without records. Raises UserError for a part with no record left in `rest`.
    """
    kept, rest, start = [], [], 0
    taken = set(chosen.tolist())
    for part in parts:
        places = range(start, start := start + len(part.records))
        held = [part.records[i - places[0]] for i in places if i in taken]
        others = [part.records[i - places[0]] for i in places if i not in taken]
        if not others:
            raise UserError(f"config.held_out: leaves nothing of {part.name} to train on; hold out less, or name eval_data")
        kept += [part._replace(records=held, unread=[])] if held else []
        rest.append(part._replace(records=others))
    return kept, rest


def digest(digests: Sequence[str], weights: Sequence[float]) -> str:
    """One digest of a mixture's parts and their weights, in their order."""
    return hashlib.sha256(json.dumps([list(digests), list(weights)]).encode()).hexdigest()[:16]


def digest_of_rows(rows: Iterable[Mapping]) -> str:
    """One digest of rows in their order."""
    lines = "\n".join(json.dumps(row, sort_keys=True, default=str) for row in rows)
    return hashlib.sha256(lines.encode()).hexdigest()[:16]


def report(
    what: str, part: Part, encoded: Any, rows: int, window: int, longest: int, columns: Sequence[str] | None = None
) -> None:
    """Prints the counts of a part's records (encoded: encoding.Encoded), and the error of the first that was skipped.

    longest: the longest document that the model takes, in tokens. columns: those that the settings name; with None unread
    columns are not reported.
    """
    report = encoded.report | {"skipped": encoded.report["skipped"] + len(part.unread)}
    sizes = "{count:,} examples, {tokens:,} tokens ({trained_tokens:,} learned)".format(**report)
    lost = [f"{report[k]:,} {k}" for k in ("truncated", "dropped") if report[k]]
    limits = "config.window, config.too_long" + (f"; the model takes {longest:,} tokens" if longest < window else "")
    if report.get("equal"):
        lost[-1] += f", {report['equal']:,} of them pairs whose answers are equal once cut"
    lost[-1:] = [f"{last} (for their length: {limits})" for last in lost[-1:]]
    lost += [f"{report[k]:,} {k}" for k in ("split", "skipped") if report[k]]
    first = f"; the first skipped: {(part.unread or [encoded.reason])[0]}" if report["skipped"] else ""
    print(f"{what}: {sizes} in {rows:,} rows of {window}{''.join(f', {x}' for x in lost)}{first}", file=sys.stderr)
    if columns is not None and (unread := _unread(part.records[:1], columns)):
        print(f"{what}: columns that are not learned from: {unread}", file=sys.stderr)
    whole = report["count"] + report["dropped"]
    if report["dropped"] >= max(1, MUCH * whole) and encoded.widest > min(window, longest):
        is_cut = bool(report["truncated"] or report.get("equal"))
        lengths = encoded.widest, window, longest
        print(f"warning: {what}: {_too_long(report['dropped'], whole, *lengths, is_cut)}", file=sys.stderr)
    learnable = encoded.lost + report["trained_tokens"]
    if encoded.lost >= max(1, MUCH * learnable):
        fitting = _fitting(encoded.widest, longest)
        cut = f"{encoded.lost:,} of {learnable:,} tokens to be learned are cut off, being beyond a window of {window:,}"
        print(f"warning: {what}: {cut}; {fitting}, and --config.too_long=split makes pieces of plain text", file=sys.stderr)


def _unread(records: Sequence[readers.Record], columns: Sequence[str], most: int = 8) -> str:
    """The columns of the first row that no shape of `formats` has, so that a thought in one of them is not lost silently."""
    row = records[0].row if records else {}
    names = [str(name) for name, value in row.items() if value is not None and name not in {*formats.COLUMNS, *columns}]
    return ", ".join(printable(name) for name in names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _fitting(widest: int, longest: int) -> str:
    """The window that would hold the longest example, as text."""
    if widest > longest:
        return f"the longest needs a window of {widest:,}, and the model takes documents of {longest:,}"
    return f"--config.window={widest} holds the longest"


def _too_long(dropped: int, whole: int, widest: int, window: int, longest: int, is_cut: bool) -> str:
    """A warning about examples dropped for their length, with remedies. is_cut: whether other examples are truncated."""
    fitting = _fitting(widest, longest)
    ways = "" if is_cut else ", --config.too_long=truncate cuts examples, and split makes pieces of plain text"
    return f"{dropped:,} of {whole:,} examples are dropped, being too long for a window of {window:,}; {fitting}{ways}"


def pairs(value: str | Mapping[str, Any], key: str) -> dict[str, Any]:
    """The names and values of a setting that is a dict, or on the command line `name=value,name=value`.

    See `resolve.value_of` for values. Raises UserError for a bad pair.
    """
    if isinstance(value, Mapping):
        return dict(value)
    values = {}
    for pair in filter(None, (part.strip() for part in value.split(","))):
        name, equals, text = (part.strip() for part in pair.partition("="))
        if not (name and equals and text):
            raise UserError(f"config.{key}: {pair!r} is no pair; write name=value, with commas between pairs")
        values[name] = value_of(text)
    return values


def _entries(data: Any, key: str):
    """(path, weight or None) of every source."""
    if isinstance(data, str):
        for entry in filter(None, (part.strip() for part in data.split(","))):
            path, _, weight = entry.rpartition("=")
            yield (path, float(weight)) if path and _number(weight) else (entry, None)
        return
    for entry in data.items() if isinstance(data, Mapping) else data:
        path, weight = (entry, None) if isinstance(entry, str) else entry if _is_pair(entry) else (None, None)
        if path is None:
            raise UserError(f"config.{key}: {entry!r} is neither a path nor a path with its weight; write ('a.jsonl', 3)")
        yield path, None if weight is None else float(weight)


def _is_pair(entry: Any) -> bool:
    return (
        isinstance(entry, (list, tuple))
        and len(entry) == 2
        and isinstance(entry[0], str)
        and isinstance(entry[1], (int, float))
        and not isinstance(entry[1], bool)
    )


def _number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _epoch(lengths: Sequence[int], weights: Sequence[float]) -> int:
    """The number of rows of a mixture after which all parts have been read."""
    # Element n of this mixture is (the part of row n, the number of that part's rows before it).
    counts = [grain.MapDataset.range(sys.maxsize).map(lambda i, k=k: (k, i)) for k in range(len(lengths))]
    order = grain.MapDataset.mix(counts, list(weights))
    ends = []
    for k, (length, weight) in enumerate(zip(lengths, weights, strict=True)):
        share = sum(weights) / weight
        # Rows of a part are evenly spaced within a few places, so the search is short; rounded weights may drift.
        place = max(0, int((length - 1) * share * 0.98 - (len(lengths) + 2) * share))
        while order[place][0] != k or order[place][1] < length - 1:
            place += 1
        ends.append(place + 1)
    return max(ends)


class _Epoch(grain.MapDataset):
    """The first `length` elements of an endless dataset; repeated, it continues with the elements after them."""

    def __init__(self, parent: grain.MapDataset, length: int):
        super().__init__(parent)
        self._length = length

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index):
        return self.slice(index) if isinstance(index, slice) else self.parents[0][index]
