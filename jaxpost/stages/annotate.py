"""A stage that annotates: columns of a data set, made by a model that does not train.

    scored={"do": "annotate", "model": "@sft", "data": "mine.jsonl", "with": "perplexity"}

The data is read, tokenised and packed as by a stage that trains on it, whose `annotations="@scored"` brings the columns into
its batches. The objective says which row type it has.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

from jaxpost.config.resolve import resolve
from jaxpost.data import mixture
from jaxpost.errors import UserError
from jaxpost.models import loading
from jaxpost.recipe import plain
from jaxpost.stages import annotations, columns, train
from jaxpost.stages.plan import Plan
from jaxpost.stages.run import Output, Run


class Annotation(NamedTuple):
    """The data sets of a stage that annotates, as those of one that trains, and the annotator's entry."""

    name: str
    settings: Any
    data: Plan
    entry: Mapping | str


def planned(name: str, s, run: Run) -> Annotation:
    """Reads and checks the data and the annotator. Raises UserError for either."""
    if not s["with"]:
        raise UserError(f"config.{name}.with: name the annotator, as 'perplexity'.")
    entry = columns.entry(plain(s["with"]))
    resolve(entry, "annotators")  # an unknown name or keyword is refused now
    return Annotation(name, s, train.without_annotations(name, s, run), entry)


def output(plan: Annotation) -> Output:
    """What later stages are told before there are columns."""
    return Output(pending=True, shapes=annotations.made_by(plan.entry, plan.data))


def make(plan: Annotation, run: Run) -> Output:
    """Makes the columns that are not there yet."""
    data = train.without_annotations(plan.name, plan.settings, run) if plan.data.source is None else plan.data
    folders = columns_of(plan._replace(data=data), run, run.root / "columns")
    rows = [record.row for one in data.sets for record in one.records]
    spent = {"scored": sum(int(one.encoded.lengths.sum()) for one in data.sets)}
    return Output(columns=",".join(folders), of=mixture.digest_of_rows(rows), spent=spent)


def columns_of(plan: Annotation, run: Run, out) -> list[str]:
    """The folders under `out` of the columns, one a data set; those that are not there yet are made."""
    s, data = plan.settings, plan.data
    spec = run.starting(data.spec, s)
    # All that the folder has, whatever the stage's objective makes of it: a reward model's head too.
    spec = dataclasses.replace(loading.reference(spec), leaves=loading.carried(spec.folder, "leaves"))
    weights = functools.partial(loading.weights, spec, run.mesh, s.seed)
    return [str(folder) for folder in columns.make(plan.entry, data, spec, weights, out, run.mesh)]
