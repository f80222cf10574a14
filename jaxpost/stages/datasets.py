"""A stage's data sets: what its settings name, encoded in the shape that its objective learns from, and packed into batches.

An objective declares its row type and what columns it reads besides those of every batch (declare.py), so a recipe names the
objective alone.

Columns that are no part of the data, but were made of it by a frozen model (columns.py), come along with their tokens wherever
a plan puts them.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import grain
import jax
import numpy as np

from jaxpost import sharding
from jaxpost.data import mixture, pairs, source, templates
from jaxpost.data.readers import Record
from jaxpost.declare import declared
from jaxpost.errors import UserError
from jaxpost.recipe import plain
from jaxpost.resolve import bind, module
from jaxpost.tokenizer import check_ids

EXAMPLES = 10000  # of a task, where its settings do not say


class Set(NamedTuple):
    """One source of a stage, encoded: its name, its weight in the mixture (None for the only one), whether it is held out."""

    name: str
    weight: float | None
    encoded: source.Encoded
    held_out: bool


def shape(objective: Callable) -> str:
    """What the objective learns from: one of source.SHAPES. Raises UserError for rows that are none of them."""
    rows = declared(objective, "rows")
    if rows not in source.SHAPES:
        raise UserError(f"config.objective: its `rows` are {rows!r}; it must be one of {', '.join(source.SHAPES)}.")
    return rows


def template(spec, s) -> str:
    """The Jinja of the chat template that a stage's settings choose, with its options."""
    return templates.jinja(spec.tokenizer, s.template or None, mixture.pairs(plain(s.template_options), "template_options"))


def read(task, spec, s, objective: Callable) -> list[Set]:
    """The data sets of a stage, those that are held out last. task: a module, or None; spec: loading.ModelSpec."""
    parts = _sources(task, s)
    # On the command line every share is a float, a number of examples too.
    wanted = 0 if s.eval_data else int(s.held_out) if s.held_out == int(s.held_out) > 0 else float(s.held_out)
    options = _options(spec, s, objective)
    _, others = source.split(sum(len(part.records) for part in parts), wanted, s.split_seed)
    kept, rest = mixture.divide(parts, others)
    if s.eval_data:
        kept = mixture.read(plain(s.eval_data), "eval_data", s.bad_rows == "skip")
        if kept[0].weight is not None:
            raise UserError("config.eval_data: evaluation takes every row once; leave the weights out.")

    def encoded(part: mixture.Part, held_out: bool) -> Set:
        what = f"{'eval data' if held_out else 'data'} {part.name}"
        try:
            made = source.encode_all(part.records, spec.tokenizer, template(spec, s), s.train_on, **options)
        except source.NothingToLearn as error:
            none = "; config.held_out=0 keeps none out" if held_out and not s.eval_data else ""
            raise UserError(f"{what}: {error}{none}") from error
        if jax.process_index() == 0:
            rows = len(source.bins(made.lengths, s.window, packing=s.packing, seed=s.seed))
            named = None if held_out else [*options["columns"].values()]
            mixture.tell(what, part, made, rows, s.window, options["longest"], named)
        check_ids(made.highest, spec.transformer.arch.vocab, spec.tokenizer, what)
        return Set(part.name, part.weight, made, held_out)

    return [encoded(part, False) for part in rest] + [encoded(part, True) for part in kept]


def _options(spec, s, objective: Callable) -> dict:
    """What `source.encode_all` is told of a stage's data."""
    options = {"window": s.window, "too_long": s.too_long, "bad_rows": s.bad_rows, "shape": shape(objective)}
    options["columns"] = mixture.pairs(plain(s.columns), "columns")
    options |= {"shared": s.shared_prefix, "longest": spec.transformer.arch.max_positions}
    return options | {"margins": "margins" in declared(objective, "columns")}


def check(rows: Sequence[dict], spec, s, objective: Callable) -> None:
    """Raises UserError where a stage's settings could not learn from rows such as these."""
    records = [Record(row, f"a sample of config.task, {i}") for i, row in enumerate(rows)]
    source.encode_all(records, spec.tokenizer, template(spec, s), s.train_on, **_options(spec, s, objective))


def _sources(task, s) -> list[mixture.Part]:
    """What the settings' data names, or else the task's demonstrations."""
    if s.bad_rows not in source.BAD_ROWS:
        raise UserError(f"config.bad_rows: {s.bad_rows!r} is neither {' nor '.join(map(repr, source.BAD_ROWS))}.")
    if s.data:
        return mixture.read(plain(s.data), "data", s.bad_rows == "skip")
    if task is None:
        raise UserError("config.data: give a file (docs/data.md lists the kinds), or a config.task with demonstrations.")
    made = hasattr(module(s.task["name"], "tasks"), "make")  # a task that was made of the keys has them already
    options = {} if made else {k: v for k, v in plain(s.task).items() if k not in ("name", "examples")}
    make = bind(task.conversation, {"seed": s.split_seed, **options}, f"task {s.task['name']}")
    name = f"task {s.task['name']}"
    records = [Record(make(i), f"{name}, example {i}") for i in range(s.task.get("examples", EXAMPLES))]
    return [mixture.Part(name, None, records, [])]


def batches(sets: Sequence[Set], s, mesh, made: Mapping[str, Mapping[str, Any]] | None = None) -> tuple[source.Batches, list]:
    """(batches, held-out batches) of a stage's data sets, this process's rows of each.

    made: for each data set, by its digest, further columns {name: [T, ...]}, a value for each token that is learned in the
    order of the examples; they are zero at the other tokens.
    """
    local = sharding.local_rows(mesh, s.batch_size)
    packed = [rows(one, s, (made or {}).get(one.encoded.digest, {})) for one in sets]
    train = [p for p, one in zip(packed, sets, strict=True) if not one.held_out]
    weights = [one.weight for one in sets if not one.held_out]
    mixed = mixture.mix(train, weights, s.seed) if len(train) > 1 else train[0]
    if len(train) > 1 and made is None and jax.process_index() == 0:
        print(f"data: an epoch of the mixture has {len(mixed)} rows", file=sys.stderr)
    epochs = None if s.steps else s.epochs
    stream = source.Batches(mixed, s.batch_size, seed=s.seed, shuffle=len(train) == 1, epochs=epochs, local=local)
    held_out = []
    for p in (p for p, one in zip(packed, sets, strict=True) if one.held_out):
        once = source.Batches(p, s.batch_size, seed=s.seed, shuffle=False, epochs=1, local=local)
        held_out += [once() for _ in range(len(once))]
    return stream, held_out


def rows(one: Set, s, made: Mapping[str, Any]) -> grain.MapDataset:
    """The packed rows of a data set; made: its further columns, as `batches` takes them."""
    examples, learned = one.encoded.examples, one.encoded.learned
    if made:
        ends = np.cumsum(learned)
        examples = grain.MapDataset.range(len(learned)).map(
            lambda i: _joined(one.encoded.examples[i], made, ends[i] - learned[i], ends[i])
        )
    return source.rows(examples, one.encoded.lengths, s.window, packing=s.packing, seed=s.seed)


def _joined(example: dict, made: Mapping[str, Any], start: int, stop: int) -> dict:
    found = dict(example)
    for name, values in made.items():
        found[name] = np.zeros((len(example["tokens"]), *values.shape[1:]), values.dtype)
        found[name][example["mask"]] = values[start:stop]
    return found


def digest(sets: Sequence[Set]) -> str:
    """One digest of all that is trained on."""
    trained = [one for one in sets if not one.held_out]
    own = [one.encoded.digest for one in trained]
    return own[0] if len(own) == 1 else mixture.digest(own, [one.weight for one in trained])


def shown(sets: Sequence[Set]) -> list[dict]:
    """One example's documents, {tokens, mask} each: the first with a tool call, or else the first."""
    encoded = next((one.encoded for one in sets if one.encoded.with_call is not None), sets[0].encoded)
    return pairs.documents(encoded.examples[encoded.with_call or 0])
