"""From records to examples: all of a data set, tokenised at once and kept.

An example is what lies in a row together: a document, or several with a prompt in common (`examples`). What it is, the row type
says that the objective learns from (`row_types`).

Packing needs the length of every example, so every example is tokenised at the start. The tokens (five bytes each, far less
than the records they came from) stay in memory, and on disk under a key of everything that they depend on, this package's
encoding code included, so a second run starts at once.
"""

import hashlib
import json
import math
import uuid
from collections.abc import Collection, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import grain
import numpy as np
from absl import logging
from etils import epath

from jaxpost.data import chat, examples, formats, messages, pack, parts, rendered, row_types, templates
from jaxpost.data.examples import Settings
from jaxpost.data.readers import Record
from jaxpost.data.row_types import RowType
from jaxpost.errors import UserError
from jaxpost.storage import cloud
from jaxpost.storage.host import read_arrays

TOO_LONG = ("error", "truncate", "split", "drop")
BAD_ROWS = ("stop", "skip")


class NothingToLearn(UserError):
    """There were records, and none of them was of use."""


class Encoded(NamedTuple):
    """Examples ready to be packed: `examples[i]` is {tokens, mask}: [lengths[i]], and the further columns of the row type and
    of `row_columns`; lengths [N] int32, and how many of their tokens are learned, learned [N].

    `report` counts what was kept (count), dropped, truncated and split for their length and skipped as bad, and the tokens
    and trained_tokens of what was kept. `reason` says what was wrong with the first that was skipped; "" if none was.
    Of those dropped, `report` has under equal how many had answers that were equal once cut. `digest` is one of all tokens,
    masks and numbers in their order, `highest` the largest token id, `widest` the tokens of the longest example before it was
    made to fit, `with_call` the number of the first example with a tool call, or None, `lost` how many tokens to be learned
    were cut off.
    """

    examples: grain.MapDataset
    lengths: np.ndarray
    learned: np.ndarray
    report: dict[str, int]
    digest: str
    reason: str
    highest: int
    widest: int = 0
    with_call: int | None = None
    lost: int = 0
    row_columns: tuple[str, ...] = ()


def encode_all(
    records: Sequence[Record],
    tokenizer: Any,
    template: str | None = None,
    train_on: str = "assistant",
    *,
    window: int,
    too_long: str = "error",
    columns: Mapping[str, str] | None = None,
    bad_rows: str = "stop",
    row_type: str | ModuleType = row_types.DEFAULT,
    shared: bool = False,
    longest: int | None = None,
    reads: Collection[str] = (),
    row_columns: Sequence[str] = (),
) -> Encoded:
    """The records as examples of at most `window` tokens.

    See `chat.encode` for template and train_on, the row type's `fit` for too_long, `formats.recognise` for columns. A row that
    breaks the rules stops everything, or with bad_rows="skip" is left out and counted; one too long is what too_long says,
    either way. shared: whether a prompt is there once for all its answers, whose documents have `longest` tokens at most;
    reads: the columns that the objective reads; row_columns: keys of the rows whose numbers become columns [n] float32, the
    same at each token of an example. The tokens come from the cache folder (the environment's JAXPOST_CACHE, else
    ~/.cache/jaxpost) if they are there.
    Raises UserError, with the record's place, for whatever cannot be encoded, and NothingToLearn where no example is left.
    """
    choices = (("too_long", too_long, TOO_LONG), ("bad_rows", bad_rows, BAD_ROWS), ("train_on", train_on, chat.TRAIN_ON))
    for key, value, allowed in choices:
        if value not in allowed:
            raise UserError(f"{key}={value!r} is not known; choose one of {', '.join(allowed)}")
    row_type, jinja, longest = row_types.load(row_type), templates.jinja(tokenizer, template), min(window, longest or window)
    reads = frozenset(reads)
    settings = Settings(tokenizer, jinja, train_on, window, longest, too_long, dict(columns or {}), shared, reads)
    row_type.check(settings)
    # The first call settles the tokenizer's truncation state here, in one thread; later ones may come from several at a time.
    tokenizer("")
    key_settings = settings._replace(tokenizer=None, reads=sorted(row_type.columns(reads)))
    choices = (key_settings, bad_rows, row_type.name, row_type.digest, list(row_columns))
    file = cloud.cache_folder() / f"{_key(records, tokenizer, choices)}.npz"
    stored = _load(file)
    if stored is None:
        stored = _encoded(records, row_type, settings, bad_rows, row_columns)
        _save(file, stored)
    return _opened(stored, row_type, settings, tuple(row_columns), len(records))


def _opened(stored: dict, row_type: RowType, settings: Settings, row_columns: tuple[str, ...], count: int) -> Encoded:
    """What was cached of so many records, as examples."""
    skipped, reason = _useful(stored, count, settings)
    cut, is_split = int(stored["cut"]), settings.too_long == "split"
    report = {"count": len(stored["sizes"]), "dropped": int(stored["dropped"]), "truncated": 0 if is_split else cut}
    report |= {"split": cut if is_split else 0, "skipped": skipped}
    report |= {"equal": int(stored["equal"])} if stored["equal"] else {}
    report |= {"tokens": len(stored["tokens"]), "trained_tokens": int(stored["mask"].sum())}
    read, numbers = examples.reader(stored), stored["numbers"]

    def example(i: int) -> pack.Row:
        row = row_type.lay_out(read(i), settings)
        for name, number in zip(row_columns, numbers[i], strict=True):
            row[name] = np.full(len(row["tokens"]), number)
        return row

    _check_columns(example(0), row_type, settings, row_columns)
    lengths = examples.lengths(stored, settings.shared)
    starts = np.cumsum(stored["sizes"], dtype=np.int64) - stored["sizes"]
    learned = np.add.reduceat(stored["mask"], starts, dtype=np.int64)
    laid_out = grain.MapDataset.range(len(lengths)).map(example)
    with_call = int(stored["with_call"]) if stored["with_call"] >= 0 else None
    highest, widest, lost = int(stored["tokens"].max()), int(stored["widest"]), int(stored["lost"])
    digest = _digest(stored, row_type, settings.shared, row_columns)
    return Encoded(laid_out, lengths, learned, report, digest, reason, highest, widest, with_call, lost, row_columns)


def _check_columns(row: pack.Row, row_type: RowType, settings: Settings, row_columns: Sequence[str]) -> None:
    """Raises UserError where a row type lays out other columns than it says."""
    declared = pack.empty(len(row["tokens"]), row_type.further(settings.shared, settings.reads, row_columns))
    for name in sorted(row.keys() | declared.keys() - {"segments", "positions"}):
        kinds = [f"{x[name].dtype} {list(x[name].shape)}" if name in x else "none" for x in (row, declared)]
        if kinds[0] != kinds[1]:
            raise UserError(
                f"config.objective: its rows={row_type.name!r} lay out a column {name} of {kinds[0]}, and their columns() of "
                f"{kinds[1]}; make the two agree."
            )


def _digest(stored: dict, row_type: RowType, shared: bool, row_columns: Sequence[str]) -> str:
    parts = [stored[name].tobytes() for name in ("tokens", "mask", "sizes")]
    if len(stored["values"]) or row_type.digest:
        parts += [stored["parts"].tobytes(), stored["values"].tobytes(), f"{row_type.name} {shared}".encode()]
    if row_type.digest:
        parts += [stored["counts"].tobytes(), stored["widths"].tobytes(), row_type.digest.encode()]
    if row_columns:
        parts += [stored["numbers"].tobytes(), " ".join(row_columns).encode()]
    return hashlib.sha256(b"".join(parts)).hexdigest()[:16]


def _useful(stored: dict, count: int, settings: Settings) -> tuple[int, str]:
    """(how many records were skipped, why the first was). Raises NothingToLearn if nothing is left."""
    skipped, reason = int(stored["skipped"]), str(stored["reason"])
    if skipped == count and skipped:
        raise NothingToLearn(f"none of the {skipped} examples can be learned from; the first because: {reason}")
    if not len(stored["sizes"]):
        needed = int(stored["needed"])
        alone = f"the model takes documents of {settings.longest}, and all are longer"
        lacks = f"the shortest needs {needed}" if needed > settings.window else alone
        if equal := int(stored["equal"]):
            lacks = f"{equal} are pairs whose answers are equal once cut"
        raise NothingToLearn(
            f"none of the {count - skipped} examples has something to learn within a window of {settings.window} tokens"
            f" (too_long={settings.too_long!r}); {lacks}"
        )
    return skipped, reason


def _encoded(
    records: Sequence[Record], row_type: RowType, settings: Settings, bad_rows: str, row_columns: Sequence[str]
) -> dict:
    """What is cached: the arrays of the examples that are kept, and the counts of the others."""
    kept, numbers, cut, lost, dropped, equal, widest, with_call, needed, reasons = [], [], 0, 0, 0, 0, 0, -1, [], []
    encode = row_type.encoder(records, settings)
    for record in records:
        try:
            whole, row_values = encode(record), [_number(record, name) for name in row_columns]
        except templates.Unusable:
            raise
        except UserError as error:
            if bad_rows == "stop":
                raise UserError(f'{error} (or leave such rows out, and have them counted: bad_rows="skip")') from error
            reasons.append(str(error))
            continue
        fitted = row_type.fit(whole, settings, record.place)
        needed.append(examples.needed(whole, settings.too_long, settings.shared))
        widest = max(widest, examples.needed(whole, "drop", settings.shared))
        if with_call < 0 and fitted and messages.has_calls(record.row):
            with_call = len(kept)
        kept += fitted
        numbers += [row_values] * len(fitted)
        dropped += not fitted
        equal += not fitted and settings.too_long == "truncate" and examples.equal_once_cut(whole, settings)
        cut += bool(fitted) and fitted[0] is not whole
        lost += examples.learned(whole) - sum(map(examples.learned, fitted)) if fitted else 0
    counts = {"cut": cut, "lost": lost, "dropped": dropped, "needed": min(needed, default=0), "skipped": len(reasons)}
    counts |= {"equal": equal, "widest": widest, "with_call": with_call, "reason": reasons[0] if reasons else ""}
    counts["numbers"] = np.array(numbers, np.float32).reshape(len(kept), len(row_columns))
    return examples.stored(kept) | {k: np.array(v) for k, v in counts.items()}


def _number(record: Record, name: str) -> float:
    """The number that a row has under a key. Raises UserError where it has none."""
    value = record.row.get(name)
    if not isinstance(value, (int, float)) or not math.isfinite(value):
        fault = f"{name} is {value!r}, no finite number" if value is not None else f"there is no number under {name}"
        raise UserError(
            f"{record.place}: {fault}, which the objective or config.row_columns reads from every row; write one, or leave the "
            "column out"
        )
    return float(value)


def _key(records: Sequence[Record], tokenizer: Any, choices: Sequence) -> str:
    """A digest of all that the tokens depend on: the rows, the tokenizer, the choices, and the code between them."""
    # tokenizer.py encodes as well, but what of it matters here is the tokenizer itself.
    digest = hashlib.sha256()
    modules = (chat, examples, formats, messages, parts, rendered, templates)
    for file in (*(Path(module.__file__) for module in modules), *sorted(row_types.FOLDER.glob("*.py"))):
        digest.update(file.read_bytes())
    names = (metadata.version("transformers"), tokenizer.special_tokens_map, tokenizer.chat_template, *choices)
    digest.update(json.dumps(names, sort_keys=True, default=str).encode())
    digest.update(tokenizer.backend_tokenizer.to_str().encode())
    for record in records:
        digest.update(json.dumps(record.row, sort_keys=True, default=repr).encode() + b"\n")
    return digest.hexdigest()


def _load(file: epath.Path) -> dict[str, np.ndarray] | None:
    stored = read_arrays(file) or {}
    counts = {"cut", "lost", "dropped", "equal", "widest", "with_call", "needed", "skipped", "reason"}
    whole = stored.keys() >= {"tokens", "mask", "sizes", "counts", "parts", "values", "widths", "numbers"} | counts
    return stored if whole and len(stored["tokens"]) == stored["sizes"].sum(dtype=np.int64) else None


def _save(file: epath.Path, stored: dict[str, np.ndarray]) -> None:
    # Several processes may write it at the same time: each writes its own, and the last to rename wins with equal bytes.
    temporary = file.with_name(f"{file.name}.{uuid.uuid4().hex}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as stream:
            np.savez(stream, **stored)
        temporary.replace(file)
    except OSError as error:
        logging.warning("tokens are not cached, so the next start tokenises everything again: %s", error)
