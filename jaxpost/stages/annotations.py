"""Columns that models make of a stage's batches: one mechanism for data sets and for rollouts.

An annotator (annotators/, or a user's function) is (forward, params, batch) -> {column: [B,S,...]}. An `Annotation` is one with
the weights that it takes:

    start       those that the stage starts from: a reference (without a fresh soft prompt: `loading.reference`)
    current     those of the step; of rollouts those that sampled: a critic's values
    FOLDER      a model's folder, a workdir, a name on the hub, or "@stage": a teacher, a reward model

For a data set, columns of weights that stay the same are computed once and stored (columns.py), and columns of the current
weights are computed for each batch by `Live`. For rollouts all are computed for each batch, when it is sampled. `planned`
decides, before anything is compiled, what makes each column that a stage's objective reads. The first of these that has it:

    the batches themselves, or a folder of columns named in config.annotations
    config.annotations as a dict: {"any name": {"name": annotator, **keywords, "weights": "start"}}
    the objective's declaration: Column("BS", "float32", by="ref_logps", weights="start") (declare.py)

A dict in config.annotations also adds columns that the objective does not read.
"""

import functools
import hashlib
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxpost import optim, sharding, sources
from jaxpost.config.resolve import known, resolve
from jaxpost.config.unread import shares
from jaxpost.declare import Column, declared
from jaxpost.errors import UserError
from jaxpost.models import loading
from jaxpost.recipe import plain
from jaxpost.stages import columns, datasets, rollouts
from jaxpost.step import combine, make_evaluation
from jaxpost.storage import artefacts, fingerprint
from jaxpost.types import Batch, TrainState

OWN = ("start", "current")  # weights of the stage itself; all others are another model's
RETURNS = "returns"  # a column of rollouts that their advantages bring along
SCORED = "scored_logps"  # what their correction reads, and its annotator
Models = Callable[[str], loading.ModelSpec]


class Annotation(NamedTuple):
    """What makes columns of a stage: their shapes by name, the annotator's entry, and whose weights it takes (start,
    current, or a model's name).
    """

    columns: dict[str, jax.ShapeDtypeStruct]
    entry: dict
    weights: str

    def program(self, forward: Callable) -> Callable:
        """(params, batch) -> columns."""
        return functools.partial(resolve(self.entry, "annotators"), forward)


def models(s) -> Models:
    """name -> ModelSpec, of the models that annotations' weights name. Raises UserError for one that is no model."""

    def described(name: str) -> loading.ModelSpec:
        if name.startswith("@"):
            raise UserError(f"config.annotations: weights={name!r} names no earlier stage of this recipe.")
        return loading.describe(name, "", s.dtype, text=False)

    return described


# ----------------------------------------------------------------------------------------------------------- Planning


def planned(plan, mesh, weights_of: Models | None = None, pending: Mapping[str, Any] | None = None):
    """The plan with the stored columns that config.annotations names in its batches, and `annotations` that make the others.

    plan: a stages.plan.Plan; weights_of: name -> ModelSpec, for names such as "@stage" (`models` if None); pending: {name:
    [B,S,...]} of columns that an earlier stage is still to make, as far as they are known, else None. Raises UserError
    for stored columns of other data, or of another model than the objective declares; for a column that the objective reads and
    nothing makes; and for an annotator or a model that does not go with the stage.
    """
    s, names, used = plan.settings, set(), []
    weights_of = weights_of or models(s)
    if pending is not None:
        one_token = {name: jax.ShapeDtypeStruct((1, *x.shape[2:]), x.dtype) for name, x in pending.items()}
        plan, names = plan._replace(stored={"": one_token}), set(pending)
    elif plan.sets and isinstance(s.annotations, str) and s.annotations:
        plan, used = _with_stored(plan, weights_of)
        names = set.intersection(*(set(of) for of in plan.stored.values()))
    chosen, lacking = choose(s, plan.objective, plan.own, names, plan.spec, weights_of)
    if plan.source is None:  # an earlier stage is still to make the data, whose rows may have the number
        wanted = declared(plan.objective, "columns")
        lacking = [name for name in lacking if wanted[name][:2] != ("BS", "float32")]
    if lacking and pending is None:
        why = _LACKING["rollouts" if "rollouts" in shares(s.source) else "data"]
        by = f', or declare it as Column(..., by="{lacking[0]}")' if f"scores.{lacking[0]}" in known("annotators") else ""
        raise UserError(f"config.objective: it reads the column {lacking[0]}, which {why}{by}.")
    for name in dict.fromkeys(one.weights for one in chosen if one.weights not in OWN):
        spec = weights_of(name)
        loading.check(spec)
        if (words := plan.spec.tokenizer.vocab_size) > (rows := spec.transformer.vocab):
            raise UserError(f"config.annotations: {name} has a vocabulary of {rows}, the tokenizer {words}: they are no pair.")
        used += [] if name.startswith("@") else [fingerprint.digest(spec.folder)]
    if plan.sets and used:  # a run is never continued with another model's columns of the same data
        plan = plan._replace(data=hashlib.sha256(" ".join([plan.data, *used]).encode()).hexdigest()[:16])
    plan = plan._replace(annotations=tuple(chosen))
    return _joined(plan, plan.stored, mesh) if names and pending is None else plan


_LACKING = {
    "rollouts": "rollouts do not have",
    "data": "its batches do not have; write a number of that name in every row, or have jaxpost.annotate make it of the "
    "data, and name the folder in config.annotations",
}


def made_by(entry: Any, plan) -> Mapping[str, jax.ShapeDtypeStruct]:
    """The columns that an annotator makes of a planned stage's batches, as shapes; none where it reads a leaf (a reward model's
    head) of weights that are still to be trained.
    """
    try:
        return _traced(entry, "start", plan.own, plan.spec, models(plan.settings)).columns
    except (KeyError, UserError):
        return {}


def choose(s, objective: Callable, own: Mapping, stored: Collection, spec, weights_of: Models) -> tuple[list, list[str]]:
    """(the Annotations of a stage, the columns that its objective reads and nothing makes).

    own: the batches' columns as shapes; stored: the names of those in folders; spec: the stage's ModelSpec. Annotators are
    traced, not compiled. Raises UserError for an entry of config.annotations that is no annotation or whose column is there
    already, and for a column that the objective's annotator does not make.
    """
    chosen, lacking, taken = [], [], {*own, *stored}
    entries = {} if isinstance(s.annotations, str) else plain(s.annotations)
    for name, entry in entries.items():
        entry = {"name": entry} if isinstance(entry, str) else dict(entry)
        weights = entry.pop("weights", "start")
        if not isinstance(weights, str) or not weights:
            raise UserError(f"config.annotations.{name}.weights: {weights!r}; give start, current, or the name of a model.")
        one = _traced(entry, weights, own, spec, weights_of)
        if twice := taken & one.columns.keys():
            raise UserError(f"config.annotations.{name}: the column {min(twice)} is there already; leave one of the two out.")
        taken |= one.columns.keys()
        chosen.append(one)
    wanted = declared(objective, "columns")
    drawn = "rollouts" in shares(s.source)
    if drawn and rollouts.rows(s, objective).corrected:
        wanted = {**wanted, SCORED: Column("BS", "float32", by=SCORED, weights="current")}
    for name, column in wanted.items():
        if name in taken or (drawn and name == RETURNS):
            continue
        if not column.by:
            lacking.append(name)
            continue
        one = _traced(column.by, column.weights, own, spec, weights_of)
        if name not in one.columns:
            raise UserError(
                f"config.objective: its column {name} is by {one.entry['name']}, which makes {', '.join(one.columns)}."
            )
        taken |= one.columns.keys()
        chosen.append(one)
    return chosen, lacking


def shapes(s, objective: Callable, own: Mapping, spec=None, weights_of: Models | None = None) -> dict:
    """The columns that annotations and folders add to batches with the columns `own`, as shapes of the whole batch.

    The arguments are those of `choose`. The size of an axis beyond B and S follows from the annotator and its model, or from
    the folder of the column. Raises UserError where neither is known.
    """
    weights_of = weights_of or models(s)
    stored = {}
    for folder in columns.folders(s.annotations) if isinstance(s.annotations, str) else ():
        stored |= columns.shapes(folder)
    chosen, _ = choose(s, objective, own, stored, spec, weights_of)
    added = {name: x for one in chosen for name, x in one.columns.items() if name != SCORED}
    rows, length = own["tokens"].shape
    for name, column in declared(objective, "columns").items():
        if name in own or name in added:
            continue
        if column.axes[2:] and name not in stored:
            raise UserError(f"config.annotations: name the folder of the column {name}, which alone says how wide it is.")
        shape = [{"B": rows, "S": length}[letter] for letter in column.axes[:2]]
        shape += stored[name]["shape"] if column.axes[2:] else []
        added[name] = jax.ShapeDtypeStruct(tuple(shape), np.dtype(column.dtype))
    return added


def of_batches(plan) -> dict[str, jax.ShapeDtypeStruct]:
    """The columns of a planned stage's data, with those that are stored and those that its annotations make, as shapes."""
    stored = next(iter(plan.stored.values()), {})
    shape = plan.own["tokens"].shape
    held = {name: jax.ShapeDtypeStruct((*shape, *x.shape[1:]), x.dtype) for name, x in stored.items()}
    wanted = declared(plan.objective, "columns") if plan.source is None else {}  # rows that are still to be made may have them
    expected = {name: jax.ShapeDtypeStruct(shape, np.float32) for name, x in wanted.items() if x[:2] == ("BS", "float32")}
    return expected | plan.own | held | {name: x for one in plan.annotations for name, x in one.columns.items()}


def _traced(by: Any, weights: str, own: Mapping, spec, weights_of: Models) -> Annotation:
    """The Annotation of an annotator and weights, with the columns that it makes of batches with the columns `own`."""
    one = Annotation({}, columns.entry(by), weights)
    spec = spec if weights in OWN else weights_of(weights)
    alone = sharding.make_mesh(1, 1, 1, devices=jax.devices()[:1])
    params = loading.abstract(spec.transformer, alone, spec.adapter, spec.leaves)
    params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    returned = jax.eval_shape(one.program(spec.transformer.forward), params, dict(own))
    columns.check(returned, own["mask"].shape)
    return one._replace(columns=returned)


def _with_stored(plan, weights_of: Models) -> tuple[Any, list[str]]:
    """(the plan with what the folders of config.annotations have of its data, as `stored`, and the names of those folders)."""
    values, used = {one.encoded.digest: {} for one in plan.sets}, []
    wanted = declared(plan.objective, "columns")
    for folder in columns.folders(plan.settings.annotations):
        of = values.get(artefacts.read_meta(folder)["about"].get("data"))
        if of is None:
            continue
        held, meta = columns.by_token(folder)
        for name in held.keys() & wanted.keys():
            model = wanted[name].weights
            if model not in OWN and meta["about"]["weights"]["files"] != fingerprint.digest(weights_of(model).folder):
                raise UserError(
                    f"config.objective: {model} is not the model that wrote {name} in {folder}, or has changed since; name "
                    "that one, or leave the folder out of config.annotations, and the column is made."
                )
        if twice := of.keys() & held.keys():
            raise UserError(f"config.annotations: {', '.join(twice)} is there twice, in {folder} again; name one folder.")
        of |= held
        used.append(folder.name)
    if not all(values.values()):
        raise UserError(
            f"config.annotations: {plan.settings.annotations} has no columns for this data, or not for all of it (held-out "
            "rows too), with this tokenizer, template and window; run jaxpost.annotate with the same settings."
        )
    return plan._replace(stored=values), used


def _joined(plan, values: dict, mesh):
    """The plan with these columns, {digest of a data set: {name: [T, ...]}}, in its batches."""
    stream, held_out = datasets.batches(plan.sets, plan.settings, mesh, values)
    return plan._replace(source=stream, held_out=held_out, stored=values)


# ------------------------------------------------------------------------------------------------------------ Running


def attached(plan, origin: loading.ModelSpec, state: TrainState, out, mesh, *, fresh: bool, weights_of: Models | None = None):
    """The plan whose source gives the columns of its annotations; those of a data set are stored, if they are not yet.

    origin: the model that the stage starts from; fresh: whether `state` still has its weights; out: the folder for columns.
    """
    weights_of = weights_of or models(plan.settings)

    def start():
        return combine(state.train, state.frozen) if fresh else loading.weights(origin, mesh, plan.settings.seed)

    asking = [source for source in sources.parts(plan.source) if hasattr(source, "annotators")]
    live = [a for a in plan.annotations if a.weights == "current" or asking]
    annotators = programs(live, plan, state, start, mesh, origin=origin, fresh=fresh, weights_of=weights_of)
    for source in asking:
        source.annotators = annotators
    if asking:
        return plan
    plan = stored([a for a in plan.annotations if a not in live], plan, origin, start, out, mesh, weights_of)
    return plan._replace(source=Live(plan, annotators, mesh)) if annotators else plan


def programs(
    annotations: Sequence[Annotation],
    plan,
    state: TrainState,
    start: Callable,
    mesh,
    *,
    origin: loading.ModelSpec,
    fresh: bool,
    weights_of: Models,
) -> list[Callable]:
    """[(state, batch) -> columns] of annotations, for batches that are made as the stage goes on.

    start: gives the first weights of `origin`, the model that the stage starts from; fresh: whether `state` has them. Of these
    what trains is kept, copied where the state has them, since the step takes its memory; the rest is in every state. Another
    model's weights are loaded once.
    """
    annotators, forward, to_reference = [], plan.spec.transformer.forward, loading.to_reference(origin)
    weights = {"current": lambda state: combine(state.train, state.frozen)}
    for one in annotations:
        spec = None if one.weights in OWN else weights_of(one.weights)
        if one.weights == "start" and "start" not in weights:
            first, _ = optim.partition(start(), plan.trainable)
            first = jax.tree.map(jnp.copy, first) if fresh else first
            weights["start"] = lambda state, first=first: to_reference(combine(first, state.frozen))
        elif one.weights not in weights:
            other = loading.weights(spec, mesh, plan.settings.seed)
            weights[one.weights] = lambda state, other=other: other
        program = jax.jit(one.program(spec.transformer.forward if spec else forward))
        annotators.append(lambda state, batch, program=program, of=weights[one.weights]: program(of(state), batch))
    return annotators


def stored(annotations: Sequence[Annotation], plan, origin: loading.ModelSpec, start: Callable, out, mesh, weights_of: Models):
    """The plan with annotations' columns of its data sets in its batches; those that are not in `out` yet are written there.

    The arguments are those of `attached` and `programs`.
    """
    values = {one.encoded.digest: dict(plan.stored.get(one.encoded.digest, {})) for one in plan.sets}
    for one in annotations:
        spec, weights = loading.reference(origin), lambda: loading.to_reference(origin)(start())
        if one.weights != "start":
            spec = weights_of(one.weights)
            weights = functools.partial(loading.weights, spec, mesh, plan.settings.seed)
        if jax.process_index() == 0:
            whose = "the model as the stage starts" if one.weights == "start" else one.weights
            print(f"{plan.name}: {', '.join(one.columns)} of {whose}, made once", file=sys.stderr)
        for of, folder in zip(plan.sets, columns.make(one.entry, plan, spec, weights, out, mesh), strict=True):
            values[of.encoded.digest] |= columns.by_token(folder)[0]
    return _joined(plan, values, mesh) if annotations else plan


class Live:
    """A stage's data as a Source whose batches have, besides, the columns that annotators compute with the state.

    annotators: [(state, batch) -> columns], each called with a microbatch's rows at a time. All else is the data's.
    """

    def __init__(self, plan, annotators: Sequence[Callable], mesh):
        self.source, self.annotators, self.mesh = plan.source, annotators, mesh
        self.parts, self.batch_size = plan.settings.microbatches, plan.settings.batch_size
        self.columns = of_batches(plan)

    def __call__(self, state: TrainState) -> dict[str, np.ndarray]:
        """The next batch: this process's rows."""
        batch = self.source(state)
        size, rows = self.batch_size // self.parts, len(batch["tokens"]) // self.parts
        local = slice(*sharding.local_rows(self.mesh, size))
        parts = []
        for first in range(0, rows * self.parts, rows):
            own = {k: x[first : first + rows] if np.ndim(x) else x for k, x in batch.items()}
            with sharding.use(self.mesh):
                own = sharding.distribute(own, self.mesh, size)
                added = functools.reduce(dict.__or__, [annotator(state, own) for annotator in self.annotators])
            parts.append({k: sharding.everywhere(x)[local] for k, x in added.items()})
        return batch | {k: np.concatenate([part[k] for part in parts]) for k in parts[0]}

    def __getattr__(self, name: str) -> Any:
        return getattr(self.source, name)

    @property
    def position(self) -> Any:
        """The data's position."""
        return self.source.position

    @position.setter
    def position(self, value: Any) -> None:
        self.source.position = value


def evaluation(plan) -> Callable:
    """The stage's `step.make_evaluation`, (params, batch, key) -> metrics, for held-out batches: columns of the current weights
    are computed first.
    """
    forward = plan.spec.transformer.forward
    evaluate = make_evaluation(forward, plan.objective, microbatches=plan.settings.microbatches)
    annotators = [one.program(forward) for one in plan.annotations if one.weights == "current"]

    def annotated(params, batch: Batch, key):
        added = [annotator(params, batch) for annotator in annotators]
        return evaluate(params, functools.reduce(dict.__or__, added, batch), key)

    return annotated


def per_example(folder) -> dict[str, np.ndarray]:
    """The columns of documents in one of `columns.make`'s folders, in the order of the data set's N examples: {name: [N, ...]};
    where examples are up to K > 1 documents (of a pair the chosen, then the rejected) {name: [N, K, ...]}, nan past an
    example's last.

    Raises UserError for columns with a value for each token, and for damaged ones.
    """
    arrays, _ = columns.whole(folder)
    if arrays.pop(columns.LENGTHS, None) is None:
        raise UserError(
            f"{folder}: {', '.join(arrays)} has a value for each token; take an annotator with one for each document, as "
            "perplexity, reward and embedding have."
        )
    counts = arrays.pop(columns.DOCUMENTS)
    if (counts == 1).all():
        return arrays
    there = np.arange(counts.max()) < counts[:, None]
    each = {name: np.full((*there.shape, *x.shape[1:]), np.nan, np.result_type(x, np.float32)) for name, x in arrays.items()}
    for name, x in each.items():
        x[there] = arrays[name]
    return each
