"""The data as a Source: records in, batches out, the state one integer.

Everything here is random access (Grain's MapDataset), so that nothing has to be replayed: row j is the examples that the
packing plan put there, place k of epoch e is a row by a permutation drawn from (seed, e), and batch n is the rows n*B to
(n+1)*B of that endless or finite sequence. All of that is a function of n alone. So the state of the data is n, the same for
any number of processes: each takes its own slice of the rows of batch n, and where there were two processes yesterday there may
be four today.

An example is what lies in a row together: a document, or the documents of a pair (`pairs`). What it is, is said by the shape
that the objective learns from.

The plan needs the length of every example, so every example is tokenised at the start. The tokens (five bytes each, far less
than the records they came from) stay in memory, and on disk under a key of everything that they depend on, this package's
encoding code included, so a second run starts at once.
"""

import hashlib
import json
import uuid
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import grain
import jax
import numpy as np
from absl import logging
from etils import epath

from jaxpost import cloud
from jaxpost.data import chat, formats, messages, pack, pairs, rendered, steps, templates
from jaxpost.data.readers import Record
from jaxpost.errors import UserError
from jaxpost.host import read_arrays
from jaxpost.sources import Silent

TOO_LONG = ("error", "truncate", "split", "drop")
BAD_ROWS = ("stop", "skip")
SHAPES = ("demonstrations", *pairs.SHAPES)


class NothingToLearn(UserError):
    """There were records, and none of them was of use."""


class Encoded(NamedTuple):
    """Examples ready to be packed: `examples[i]` is {tokens, mask}: [lengths[i]], and of pairs and judged answers the further
    columns of `pairs.layout`; lengths [N] int32, and how many of their tokens are learned, learned [N].

    `report` counts what was kept (count), dropped, truncated and split for their length and skipped as bad, and the tokens
    and trained_tokens of what was kept. `reason` says what was wrong with the first that was skipped; "" if none was.
    Of those dropped, `report` has under equal how many are pairs that became equal once cut. `digest` is one of all tokens and
    masks in their order, `highest` the largest token id, `widest` the tokens of the longest example before it was made to fit,
    `with_call` the number of the first example with a tool call, or None, `lost` how many tokens to be learned were cut off.
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


class Choices(NamedTuple):
    """What becomes of a record, apart from the tokenizer: see `encode_all`."""

    template: str
    train_on: str
    window: int
    too_long: str
    columns: dict[str, str]
    bad_rows: str
    shape: str
    shared: bool
    longest: int
    margins: bool


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
    shape: str = "demonstrations",
    shared: bool = False,
    longest: int | None = None,
    margins: bool = False,
) -> Encoded:
    """The records as examples of at most `window` tokens.

    See `chat.encode` for template and train_on, `pack.fit` and `pairs.fit` for too_long, `formats.recognise` for columns. A row
    that breaks the rules stops everything, or with bad_rows="skip" is left out and counted; one too long is what too_long says,
    either way. shape: demonstrations, or one of `pairs.SHAPES`, with or without a shared prefix, whose documents have `longest`
    tokens at most; margins: whether pairs have one each, as a column. The tokens come from the cache folder (the environment's
    JAXPOST_CACHE, else ~/.cache/jaxpost) if they are there.
    Raises UserError, with the record's place, for whatever cannot be encoded, and NothingToLearn where no example is left.
    """
    choices = (("too_long", too_long, TOO_LONG), ("bad_rows", bad_rows, BAD_ROWS), ("train_on", train_on, chat.TRAIN_ON))
    for key, value, known in choices:
        if value not in known:
            raise UserError(f"{key}={value!r} is not known; choose one of {', '.join(known)}")
    if shape != "demonstrations" and too_long == "split":
        raise UserError('too_long="split": pieces of a judged answer cannot be judged; choose error, truncate or drop')
    # The first call settles the tokenizer's truncation state here, in one thread; later ones may come from several at a time.
    tokenizer("")

    jinja = templates.jinja(tokenizer, template)
    longest = min(window, longest or window)
    choices = Choices(jinja, train_on, window, too_long, dict(columns or {}), bad_rows, shape, shared, longest, margins)
    file = cloud.cache_folder() / f"{_key(records, tokenizer, choices)}.npz"
    stored = _load(file)
    if stored is None:
        stored = _encoded(records, tokenizer, choices)
        _save(file, stored)
    return _opened(stored, choices, len(records))


def _opened(stored: dict, c: Choices, count: int) -> Encoded:
    """What was cached of so many records, as examples."""
    skipped, reason = _useful(stored, count, c)
    cut = int(stored["cut"])
    report = {
        "count": len(stored["sizes"]),
        "dropped": int(stored["dropped"]),
        "truncated": cut if c.too_long != "split" else 0,
    }
    report |= {"split": cut if c.too_long == "split" else 0, "skipped": skipped}
    report |= {"equal": int(stored["equal"])} if stored["equal"] else {}
    report |= {"tokens": len(stored["tokens"]), "trained_tokens": int(stored["mask"].sum())}
    ends = np.cumsum(stored["sizes"], dtype=np.int64)
    starts = ends - stored["sizes"]

    def example(i: int) -> pack.Row:
        if c.shape == "demonstrations":
            return {name: stored[name][starts[i] : ends[i]] for name in ("tokens", "mask")}
        return pairs.layout(pairs.unit_at(stored, starts[i], i, c.shape), c.shape, c.shared, c.margins)

    lengths = stored["sizes"] if c.shape == "demonstrations" else pairs.lengths(stored, c.shape, c.shared)
    learned = np.add.reduceat(stored["mask"], starts, dtype=np.int64)
    examples = grain.MapDataset.range(len(lengths)).map(example)
    with_call = int(stored["with_call"]) if stored["with_call"] >= 0 else None
    highest, widest = int(stored["tokens"].max()), int(stored["widest"])
    lost = int(stored["lost"])
    return Encoded(examples, lengths, learned, report, _digest(stored, c), reason, highest, widest, with_call, lost)


def _digest(stored: dict, choices: Choices) -> str:
    parts = [stored[name].tobytes() for name in ("tokens", "mask", "sizes")]
    if choices.shape != "demonstrations":
        parts += [stored["parts"].tobytes(), stored["values"].tobytes(), f"{choices.shape} {choices.shared}".encode()]
    return hashlib.sha256(b"".join(parts)).hexdigest()[:16]


def _useful(stored: dict, count: int, c: Choices) -> tuple[int, str]:
    """(how many records were skipped, why the first was). Raises NothingToLearn if nothing is left."""
    skipped, reason = int(stored["skipped"]), str(stored["reason"])
    if skipped == count and skipped:
        raise NothingToLearn(f"none of the {skipped} examples can be learned from; the first because: {reason}")
    if not len(stored["sizes"]):
        needed = int(stored["needed"])
        alone = f"the model takes documents of {c.longest}, and all are longer"
        lacks = f"the shortest needs {needed}" if needed > c.window else alone
        if equal := int(stored["equal"]):
            lacks = f"{equal} are pairs whose answers are equal once cut"
        raise NothingToLearn(
            f"none of the {count - skipped} examples has something to learn within a window of {c.window} tokens"
            f" (too_long={c.too_long!r}); {lacks}"
        )
    return skipped, reason


def _encoded(records: Sequence[Record], tokenizer, c: Choices) -> dict[str, np.ndarray]:
    """What is cached: the tokens, masks and sizes of what is kept, and the counts of the others."""
    kept, cut, lost, dropped, equal, widest, with_call, needed, reasons = [], 0, 0, 0, 0, 0, -1, [], []
    encode, fit, need, size = _ways(records, tokenizer, c)
    for record in records:
        try:
            whole = encode(record)
        except templates.Unusable:
            raise
        except UserError as error:
            if c.bad_rows == "stop":
                raise UserError(f'{error} (or leave such rows out, and have them counted: bad_rows="skip")') from error
            reasons.append(str(error))
            continue
        fitted = fit(whole, record.place)
        needed.append(need(whole))
        widest = max(widest, size(whole))
        if with_call < 0 and fitted and messages.has_calls(record.row):
            with_call = len(kept)
        kept += fitted
        dropped += not fitted
        if not fitted and c.shape != "demonstrations" and c.too_long == "truncate":
            equal += pairs.equal_once_cut(whole, c.window, c.longest, c.shared)
        cut += bool(fitted) and fitted[0] is not whole
        lost += _learned(whole) - sum(map(_learned, fitted)) if fitted else 0
    counts = {"cut": cut, "lost": lost, "dropped": dropped, "needed": min(needed, default=0), "skipped": len(reasons)}
    counts |= {"equal": equal, "widest": widest, "with_call": with_call, "reason": reasons[0] if reasons else ""}
    return (pack.stored if c.shape == "demonstrations" else pairs.stored)(kept) | {k: np.array(v) for k, v in counts.items()}


def _learned(example: pack.Row | pairs.Unit) -> int:
    """How many tokens are learned of an example, or of all answers of a unit."""
    return sum(int(mask.sum()) for mask in (example.masks if isinstance(example, pairs.Unit) else [example["mask"]]))


def _ways(records: Sequence[Record], tokenizer, c: Choices) -> tuple[Callable, Callable, Callable, Callable]:
    """(record -> the whole of what it holds; the whole, place -> what of it fits, a list; the whole -> the least window with
    which it would be of use; the whole -> the window that holds all of it).
    """
    if c.shape == "demonstrations":
        return (
            lambda record: _whole(record, tokenizer, c.template, c.train_on, c.columns),
            lambda whole, place: pack.fit(whole, c.window, c.too_long, place),
            lambda whole: int(np.argmax(whole["mask"])) + 1 if c.too_long == "truncate" else len(whole["tokens"]),
            lambda whole: len(whole["tokens"]),
        )

    def fit(whole, place):
        found = pairs.fit(whole, c.window, c.longest, c.too_long, c.shared, place)
        return [] if found is None else [found]

    encode = pairs.encoder(c.shape, records, tokenizer, c.template, c.train_on, c.columns, c.margins)
    ways = (lambda whole: pairs.needed(whole, c.too_long, c.shared)), (lambda whole: pairs.needed(whole, "drop", c.shared))
    return encode, fit, *ways


def _whole(record: Record, tokenizer, template, train_on, columns) -> pack.Row:
    """The example that a record holds, whatever its length."""
    example = formats.demonstration(record, columns)
    whole = chat.encode(example, tokenizer, template, train_on)
    if not whole["mask"].any():
        remedy = f"check train_on={train_on!r} and the template"
        if isinstance(example, formats.Conversation) and example.untrained:
            remedy = "every answer of it is marked as not to be learned (as by weight 0), so remove the row or a mark"
        raise UserError(f"{record.place}: no token of it is trained on; {remedy}")
    return whole


def split(count: int, held_out: int | float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(train, held-out) indices into `count` examples: disjoint, sorted, drawn from seed; together they are all of them.

    `held_out` is a number of examples (int) or a fraction of them (float, at least one example unless it is 0).
    Raises UserError if it leaves nothing to train on.
    """
    if held_out > 1 and held_out != int(held_out):
        raise UserError(f"held_out={held_out}: more than 1 is a number of examples, so give a whole one, or a share below 1.0")
    wanted = max(round(held_out * count), int(held_out > 0)) if isinstance(held_out, float) else held_out
    if not 0 <= wanted < count:
        remedy = f"give a number of examples from 0 to {count - 1}, or a fraction below 1.0"
        remedy = remedy if count > 1 else "give 0, or name eval_data"
        raise UserError(f"held_out={held_out} of {count} examples leaves none to train on; {remedy}")
    order = np.random.default_rng(seed).permutation(count)
    return np.sort(order[wanted:]), np.sort(order[:wanted])


def rows(
    examples: Sequence[pack.Row] | grain.MapDataset, lengths: Sequence[int], window: int, *, packing: bool = True, seed: int
) -> grain.MapDataset:
    """Rows of S = window tokens (the columns of `pack.pack`, each [S]): packed by plan, or one example a row."""
    placed = grain.MapDataset.source(bins(lengths, window, packing=packing, seed=seed))
    return placed.map(lambda members: pack.pack([examples[int(i)] for i in members], window))


def bins(lengths: Sequence[int], window: int, *, packing: bool = True, seed: int) -> list[np.ndarray]:
    """The examples of each row of `rows`, by number."""
    return pack.plan(lengths, window, seed) if packing else list(np.arange(len(lengths))[:, None])


def columns(
    batch_size: int, window: int, shape: str = "demonstrations", shared: bool = False, margins: bool = False
) -> dict[str, jax.ShapeDtypeStruct]:
    """The columns of a whole batch as shapes: those of a row, [B,S] each."""
    like = {} if shape == "demonstrations" else pairs.layout(pairs.EXAMPLE, shape, shared, margins)
    row = pack.empty(window, like)
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
        found = [parent[place] for place in places if place < len(parent)]
        # A process whose rows are all past the end still needs a row's shapes.
        like = found[0] if found else parent[0]
        missing = [{name: np.zeros_like(column) for name, column in like.items()}] * (len(places) - len(found))
        return {name: np.stack([row[name] for row in found + missing]) for name in like}


def _key(records: Sequence[Record], tokenizer: Any, choices: Choices) -> str:
    """A digest of all that the tokens depend on: the rows, the tokenizer, the choices, and the code between them."""
    # tokenizer.py encodes as well, but what of it matters here is the tokenizer itself.
    digest = hashlib.sha256()
    for module in (chat, formats, messages, pack, pairs, rendered, steps, templates):
        digest.update(Path(module.__file__).read_bytes())
    names = (metadata.version("transformers"), tokenizer.special_tokens_map, tokenizer.chat_template, *choices)
    digest.update(json.dumps(names, sort_keys=True, default=str).encode())
    digest.update(tokenizer.backend_tokenizer.to_str().encode())
    for record in records:
        digest.update(json.dumps(record.row, sort_keys=True, default=repr).encode() + b"\n")
    return digest.hexdigest()


def _load(file: epath.Path) -> dict[str, np.ndarray] | None:
    stored = read_arrays(file) or {}
    counts = {"cut", "lost", "dropped", "equal", "widest", "with_call", "needed", "skipped", "reason"}
    whole = stored.keys() >= {"tokens", "mask", "sizes"} | counts
    return stored if whole and len(stored["tokens"]) == stored["sizes"].sum(dtype=np.int64) else None


def _save(file: epath.Path, stored: dict[str, np.ndarray]) -> None:
    # Several processes may write it at the same time: each writes its own, and the last to rename wins with equal bytes.
    own = file.with_name(f"{file.name}.{uuid.uuid4().hex}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with own.open("wb") as stream:
            np.savez(stream, **stored)
        own.replace(file)
    except OSError as error:
        logging.warning("tokens are not cached, so the next start tokenises everything again: %s", error)
