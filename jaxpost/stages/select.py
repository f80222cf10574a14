"""A stage that selects: rows of earlier ones or of files, or a task's demonstrations, by a transform (data/transforms/).

    chosen={"do": "select", "data": "@drawn", "with": {"name": "select.top", "column": "score", "keep": 0.5}}

A transform gives indices, weights or rows. What it chooses is written as files of rows, which a later stage names with an @.
"""

import hashlib
import json
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxpost import sharding
from jaxpost.config import links
from jaxpost.config.naming import digest_of
from jaxpost.config.resolve import resolve
from jaxpost.data import mixture
from jaxpost.data.transforms import apply
from jaxpost.errors import UserError
from jaxpost.recipe import plain
from jaxpost.stages import annotations, columns, datasets, tasks
from jaxpost.stages.run import Output, Run
from jaxpost.storage.artefacts import Artefact


class Selection(NamedTuple):
    """A stage that selects, checked; rows: those of files, None while an earlier stage is still to make some."""

    name: str
    settings: Any
    function: Callable
    rows: list[dict] | None
    trial: tuple[dict, ...]


def planned(name: str, s, run: Run) -> Selection:
    """Reads the rows and resolves the transform. Raises UserError for either."""
    if not s.data and not s.task:
        raise UserError(f"config.{name}.data: give files or an earlier stage's rows, as @NAME, to select from, or a task.")
    if not isinstance(s.annotations, str):
        raise UserError(f"config.{name}.annotations: name stages that annotate, as '@NAME', or folders of columns.")
    function = resolve(plain(s["with"]), "transforms")
    apply.check(function)
    pending = run.pending(s.data)
    rows = None if pending else _rows(s, run)
    trial = [row for output in pending for row in output.trial] if pending else rows[:8]
    return Selection(name, s, function, rows, tuple(trial))


def output(plan: Selection) -> Output:
    """What later stages are told before there are rows."""
    return Output(pending=True, trial=plan.trial)


def make(plan: Selection, run: Run) -> Output:
    """Applies the transform, unless that was done before."""
    s = plan.settings
    rows = _rows(s, run) if plan.rows is None else plan.rows
    digest = mixture.digest_of_rows(rows)
    values = _columns(s, run, rows, digest)
    about = {"rows": digest, "with": digest_of(plan.function), "seed": s.seed}
    about |= {"columns": {name: hashlib.sha256(np.ascontiguousarray(x)).hexdigest() for name, x in values.items()}}
    about |= {"files": files} if (files := apply.digests_of_files(plan.function)) else {}
    artefact = Artefact(run.root, "rows", about)
    _, done = artefact.resume()
    if not done and jax.process_index() == 0:
        selected = apply.apply(plan.function, rows, values, apply.key_of(s.seed))
        if not selected:
            raise UserError(f"config.{plan.name}.with: it selects none of {len(rows):,} rows; change its settings.")
        artefact.write(".jsonl", "".join(_line(row) + "\n" for row in selected).encode(), rows=len(selected), of=len(rows))
    sharding.agree(0.0)  # nobody reads before all is written
    return Output(rows=str(artefact.folder / "part-*.jsonl"))


def _columns(s, run: Run, rows: list[dict], digest: str) -> dict[str, np.ndarray]:
    """The columns that config.annotations names, a value (or several) a row. Raises UserError where they are of other rows.

    digest: of the rows.
    """
    columns_of_rows: dict[str, np.ndarray] = {}
    for folder in columns.folders(run.filled(s).annotations):
        each = annotations.per_example(folder)
        if twice := columns_of_rows.keys() & each.keys():
            raise UserError(f"config.annotations: {min(twice)} is there twice, in {folder} again; annotate the rows once.")
        columns_of_rows |= each
    for name, values in columns_of_rows.items():
        if len(values) != len(rows):
            raise UserError(
                f"config.annotations: {name} has values of {len(values):,} examples, and there are {len(rows):,} rows. "
                "Annotate all: too_long='truncate', held_out=0, bad_rows='stop'."
            )
    for name in links.references(s.annotations):
        if run.outputs[name].of != digest:
            raise UserError(
                f"config.annotations: the columns of @{name} are of other rows than these, or of these in another order. "
                "Annotate and select the same data, in the same order."
            )
    return columns_of_rows


def _rows(s, run: Run) -> list[dict]:
    s = run.without_pending(s)
    parts = datasets.sources(None if s.data else tasks.opened(plain(s.task)), s)
    if any(part.weight is not None for part in parts):
        raise UserError("config.data: a selection takes every row once; leave the weights out.")
    return [dict(record.row) for part in parts for record in part.records]


def _line(row: dict) -> str:
    try:
        return json.dumps(row, ensure_ascii=False)
    except TypeError as error:
        raise UserError(f"config.data: a row has a value that JSON cannot hold ({error}); leave that column out.") from error
