"""A stage's data sets: what its settings name, encoded as the row type that its objective learns from, and packed into batches.

An objective declares its row type and the columns that it reads besides those of every batch (declare.py), so a recipe names
the objective alone. A column that nothing else makes is a number of every row, where the rows have it.

Columns that a model made of the data (columns.py) come along with their tokens wherever a plan puts them.
"""

import hashlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import grain
import jax
import numpy as np

from jaxpost import sharding
from jaxpost.config.resolve import bind, entry_of, module
from jaxpost.data import encoding, examples, mixture, row_types, source, templates
from jaxpost.data.readers import Record
from jaxpost.data.transforms import apply
from jaxpost.declare import declared
from jaxpost.errors import UserError
from jaxpost.models import loading, routes
from jaxpost.recipe import plain
from jaxpost.tokenizer import check_ids

EXAMPLES = 10000  # of a task, where its settings do not say


class Set(NamedTuple):
    """One source of a stage, encoded: its name, its weight in the mixture (None for the only one), whether it is held out, and
    in a stage that annotates the rows that it was encoded from.
    """

    name: str
    weight: float | None
    encoded: encoding.Encoded
    held_out: bool
    records: Sequence[Record] = ()


def row_type(objective: Callable) -> row_types.RowType:
    """What the objective learns from. Raises UserError for rows that are no row type."""
    return row_types.load(declared(objective, "rows"))


def columns(s, objective: Callable, rows: int) -> dict[str, jax.ShapeDtypeStruct]:
    """The columns of batches of so many rows as shapes, but for those that only a stage's data or an annotator brings."""
    kind, reads = declared(objective, "rows"), declared(objective, "columns")
    return source.columns(rows, s.window, kind, s.shared_prefix, reads, _named(s.row_columns))


def template(spec, s) -> str:
    """The Jinja of the chat template that a stage's settings choose, with its options."""
    return templates.jinja(spec.tokenizer, s.template or None, mixture.pairs(plain(s.template_options), "template_options"))


def read(task, spec, s, objective: Callable) -> list[Set]:
    """The data sets of a stage, those that are held out last. task: a module, or None; spec: loading.ModelSpec."""
    parts = sources(task, s)
    # On the command line every share is a float, a number of examples too.
    wanted = 0 if s.eval_data else int(s.held_out) if s.held_out == int(s.held_out) > 0 else float(s.held_out)
    _, others = source.split(sum(len(part.records) for part in parts), wanted, s.split_seed)
    kept, rest = mixture.divide(parts, others)
    if s.eval_data:
        kept = mixture.read(plain(s.eval_data), "eval_data", s.bad_rows == "skip")
        if kept[0].weight is not None:
            raise UserError("config.eval_data: evaluation takes every row once; leave the weights out.")
    if s.order:
        rest = [_ordered(rest, s)]
    options = _options(spec, s, objective, [record for part in rest for record in part.records])

    def data_set(part: mixture.Part, held_out: bool) -> Set:
        what = f"{'eval data' if held_out else 'data'} {part.name}"
        _check_routes(part.records, spec)
        try:
            encoded = encoding.encode_all(part.records, spec.tokenizer, template(spec, s), s.train_on, **options)
        except encoding.NothingToLearn as error:
            none = "; config.held_out=0 keeps none out" if held_out and not s.eval_data else ""
            raise UserError(f"{what}: {error}{none}") from error
        if s.order and not held_out:  # other rows than packing by length makes, of the same tokens
            encoded = encoded._replace(digest=hashlib.sha256(f"{encoded.digest} in order".encode()).hexdigest()[:16])
        one = Set(part.name, part.weight, encoded, held_out, part.records if s.do == "annotate" else ())
        if jax.process_index() == 0:
            # A row type of one's own reads whatever keys it likes, and a task's rows have what its reward reads.
            unknown = held_out or row_type(objective).digest or not s.data
            keys = row_type(objective).keys
            learned = None if unknown else [*options["columns"].values(), *options["row_columns"], *keys]
            mixture.report(what, part, encoded, len(bins(one, s)), s.window, options["longest"], learned)
        check_ids(encoded.highest, spec.transformer.vocab, spec.tokenizer, what)
        return one

    return [data_set(part, False) for part in rest] + [data_set(part, True) for part in kept]


def _ordered(parts: Sequence[mixture.Part], s) -> mixture.Part:
    """The only part with its records in the order that config.order names. Raises UserError for a mixture."""
    if len(parts) > 1 or parts[0].weight is not None:
        raise UserError(
            "config.order: the rows of a mixture are drawn by weight, so they have no one order; leave the weights out (files "
            "with commas between them are one data set), or learn from one after the other in stages."
        )
    entry = entry_of(plain(s.order), "config.order")
    return parts[0]._replace(records=apply.in_order(entry, parts[0].records, seed=s.seed))


def _options(spec, s, objective: Callable, records: Sequence[Record]) -> dict:
    """The options of `encoding.encode_all` for a stage's data."""
    rows, reads = declared(objective, "rows"), declared(objective, "columns")
    options = {"window": s.window, "too_long": s.too_long, "bad_rows": s.bad_rows, "row_type": rows, "reads": reads}
    options |= {"columns": mixture.pairs(plain(s.columns), "columns"), "shared": s.shared_prefix}
    return options | {"longest": loading.max_positions(spec), "row_columns": _row_columns(spec, s, objective, records)}


def _check_routes(records: Sequence[Record], spec) -> None:
    """Raises UserError for a row that does not say which of the model's adapters it takes, where rows choose."""
    if counts := loading.columns(spec):
        for record in records:
            routes.check(record.row, counts, record.place)


def _row_columns(spec, s, objective: Callable, records: Sequence[Record]) -> list[str]:
    """The keys of the rows whose numbers become columns: those of the settings, those by which rows choose among the model's
    adapters, and those that the objective declares as [B,S] float32, which neither the row type nor an annotator makes, and
    which a row has.
    """
    names, reads = _named(s.row_columns), declared(objective, "columns")
    names += [name for name in loading.columns(spec) if name not in names]
    own = source.columns(1, 1, declared(objective, "rows"), s.shared_prefix, reads)
    if taken := set(names) & (own.keys() | {"rows"}):
        raise UserError(
            f"config.row_columns: {min(taken)} is a column of every batch here; give the rows' key another name (a column of "
            "config.adapter too)."
        )
    for name, column in reads.items():
        is_number = tuple(column[:2]) == ("BS", "float32") and not getattr(column, "by", "")
        if is_number and name not in {*own, *names} and any(record.row.get(name) is not None for record in records):
            names.append(name)
    return names


def _named(names: str) -> list[str]:
    return list(dict.fromkeys(filter(None, (name.strip() for name in names.split(",")))))


def check(rows: Sequence[dict], spec, s, objective: Callable) -> None:
    """Raises UserError where a stage's settings could not learn from rows such as these."""
    records = [Record(row, f"a row of an earlier stage, {i}") for i, row in enumerate(rows)]
    _check_routes(records, spec)
    encoding.encode_all(records, spec.tokenizer, template(spec, s), s.train_on, **_options(spec, s, objective, records))


def sources(task, s) -> list[mixture.Part]:
    """What the settings' data names, or else the task's demonstrations."""
    if s.bad_rows not in encoding.BAD_ROWS:
        raise UserError(f"config.bad_rows: {s.bad_rows!r} is neither {' nor '.join(map(repr, encoding.BAD_ROWS))}.")
    if s.data:
        return mixture.read(plain(s.data), "data", s.bad_rows == "skip")
    if task is None:
        raise UserError("config.data: give a file (docs/data.md lists the kinds), or a config.task with demonstrations.")
    has_make = hasattr(module(s.task["name"], "tasks"), "make")  # such a task has taken the keys already
    options = {} if has_make else {k: v for k, v in plain(s.task).items() if k not in ("name", "examples", "problems")}
    make = bind(task.conversation, {"seed": s.split_seed, **options}, f"task {s.task['name']}")
    name = f"task {s.task['name']}"
    records = [Record(make(i), f"{name}, example {i}") for i in range(s.task.get("examples", EXAMPLES))]
    return [mixture.Part(name, None, records, [])]


def batches(
    sets: Sequence[Set], s, mesh, annotations: Mapping[str, Mapping[str, Any]] | None = None
) -> tuple[source.Batches, list]:
    """(batches, held-out batches) of a stage's data sets, this process's rows of each.

    annotations: for each data set, by its digest, further columns {name: [T, ...]}, a value for each token that is learned in
    the order of the examples; they are zero at the other tokens.
    """
    local = sharding.local_rows(mesh, s.batch_size)
    packed = [rows(one, s, (annotations or {}).get(one.encoded.digest, {})) for one in sets]
    train = [p for p, one in zip(packed, sets, strict=True) if not one.held_out]
    weights = [one.weight for one in sets if not one.held_out]
    mixed = mixture.mix(train, weights, s.seed) if len(train) > 1 else train[0]
    if len(train) > 1 and annotations is None and jax.process_index() == 0:
        print(f"data: an epoch of the mixture has {len(mixed)} rows", file=sys.stderr)
    epochs = None if s.steps else s.epochs
    shuffle = len(train) == 1 and not s.order
    stream = source.Batches(mixed, s.batch_size, seed=s.seed, shuffle=shuffle, epochs=epochs, local=local)
    held_out = []
    for p in (p for p, one in zip(packed, sets, strict=True) if one.held_out):
        once = source.Batches(p, s.batch_size, seed=s.seed, shuffle=False, epochs=1, local=local)
        held_out += [once() for _ in range(len(once))]
    return stream, held_out


def rows(one: Set, s, annotations: Mapping[str, Any]) -> grain.MapDataset:
    """The packed rows of a data set; annotations: its further columns, as `batches` takes them."""
    laid_out, learned = one.encoded.examples, one.encoded.learned
    if annotations:
        ends = np.cumsum(learned)
        laid_out = grain.MapDataset.range(len(learned)).map(
            lambda i: _joined(one.encoded.examples[i], annotations, ends[i] - learned[i], ends[i])
        )
    return source.rows(laid_out, one.encoded.lengths, s.window, **_packing(one, s))


def bins(one: Set, s) -> list[np.ndarray]:
    """The examples of each packed row of a data set, by number."""
    return source.bins(one.encoded.lengths, s.window, **_packing(one, s))


def _packing(one: Set, s) -> dict:
    limits = {"documents": one.encoded.documents, "most": one.encoded.most}
    return {"packing": s.packing, "seed": s.seed, "in_order": bool(s.order) and not one.held_out, **limits}


def _joined(example: dict, annotations: Mapping[str, Any], start: int, stop: int) -> dict:
    joined = dict(example)
    for name, values in annotations.items():
        joined[name] = np.zeros((len(example["tokens"]), *values.shape[1:]), values.dtype)
        joined[name][example["mask"]] = values[start:stop]
    return joined


def digest(sets: Sequence[Set]) -> str:
    """One digest of all that is trained on."""
    trained = [one for one in sets if not one.held_out]
    own = [one.encoded.digest for one in trained]
    return own[0] if len(own) == 1 else mixture.digest(own, [one.weight for one in trained])


def shown(sets: Sequence[Set]) -> list[dict]:
    """One example's documents, {tokens, mask} each: the first with a tool call, or else the first."""
    encoded = next((one.encoded for one in sets if one.encoded.with_call is not None), sets[0].encoded)
    return examples.documents(encoded.examples[encoded.with_call or 0])
