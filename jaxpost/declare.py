"""Declarations: an objective declares what it reads, an annotator what it stores, an adapter what it adds. `declared` looks one
up.

    @objective(rows="pairs", columns={"ref_logps": Column("BS", "float32", by="ref_logps")})
    def mine(forward, params, batch, key, *, beta: float = 0.1): ...

An objective without the decorator learns from demonstrations and reads the columns of every batch (types.py). A value that
depends on the objective's keywords is a function of them. An objective with a keyword `of`, another objective, inherits what it
does not declare.
"""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from jaxpost.config.resolve import fits, resolve
from jaxpost.errors import UserError

_DEFAULTS = {
    "rows": "demonstrations",
    "columns": {},
    "leaves": {},
    "masks": ("mask",),
    "prepare": None,
    "gather": None,
    "advantages": "leave_one_out",
    "off_policy": False,
    "sequence_level": False,
    "metrics": None,
    "differentiates_entropy": False,
    "per": "token",
    "adds": (),
    "neutral": True,
    "merges": True,
    "files": None,
    "completed": {},
    "recorded": None,
    "reads": (),
    "one": "",
}
_FUNCTIONS = ("prepare", "gather", "metrics", "recorded")  # the value is a function, bound to the keywords that it takes
_ATTRIBUTES = ("prepare", "columns", "data", "leaves")  # older versions read these from the function itself


class Column(NamedTuple):
    """A column that an objective reads, and the annotator that makes it if neither batches nor settings give it.

    axes: letters of types.py ("BS", "BSD"). by: the annotator, as a name ("ref_logps"), a dict with its keywords, or a
    function; "" for a column of the data. weights: the annotator's parameters: "start" (the stage's first), "current" (those of
    the step; for rollouts those that sampled), a model's folder, its name on the hub, or "@stage".
    """

    axes: str
    dtype: str
    by: str | Mapping | Callable = ""
    weights: str = "start"


def objective(
    *,
    rows: str | Callable | None = None,
    columns: Mapping | Callable | None = None,
    leaves: Mapping | Callable | None = None,
    masks: tuple[str, ...] | Callable | None = None,
    prepare: Callable | None = None,
    gather: Callable | None = None,
    advantages: Mapping | str | Callable | None = None,
    off_policy: bool | Callable | None = None,
    sequence_level: bool | Callable | None = None,
) -> Callable:
    """Declares an objective. A field left out is inherited, or has the default of a function without the decorator.

    rows: the row type that it learns from: demonstrations, pairs, labelled, mismatched, scored, steps, lists or masked.
    columns: {name: Column, or (axis letters, dtype)} that it reads besides tokens, segments, positions and mask.
    leaves: {path: (axis letters, first value)} that it adds to the parameters. Axes may be numbers, in "8 D" with spaces. A
    first value that is a name is another model's head; {"normal": 0.02} draws with this standard deviation.
    masks: the columns [B,S] of the tokens that it learns from; where all are 0 no gradient may flow.
    prepare: (forward, params, batch, key) -> columns of the whole batch, without gradient, before it is split.
    gather: (forward, params, batch, key) -> small columns [b, ...] of a microbatch's rows, without gradient, which the batch of
    `prepare` has for all rows. So the model runs on a microbatch at a time.

    For rollouts alone: advantages, the config entry of the advantages unless the settings name others; off_policy, whether it
    corrects for several steps a batch; sequence_level, whether a completion has one advantage instead of one for each token.
    Raises UserError for a gather without a prepare.
    """
    if gather is not None and prepare is None:
        raise UserError("@objective(gather=...): declare prepare=... too, which makes columns of what gather returns.")
    return _declaring(locals())


def part(
    *,
    columns: Mapping | Callable | None = None,
    leaves: Mapping | Callable | None = None,
    masks: tuple[str, ...] | None = None,
    prepare: Callable | None = None,
    metrics: Callable | None = None,
    differentiates_entropy: bool | None = None,
    off_policy: bool | None = None,
    sequence_level: bool | None = None,
) -> Callable:
    """Declares a part of the policy-gradient estimator, with the fields of `objective`; its objective inherits them.

    prepare, metrics: (PolicyBatch, *, the part's keywords) -> columns or metrics. differentiates_entropy: whether it needs the
    entropy's gradient, which costs more.
    """
    return _declaring(locals())


def annotator(*, per: str = "token") -> Callable:
    """Declares an annotator. per: "token"; or "document" if its columns [B,S,...] are constant over each document, of which one
    value is then stored. Raises UserError for anything else.
    """
    if per not in ("token", "document"):
        raise UserError(f"@annotator(per={per!r}): give 'token' or 'document'.")
    return _declaring(locals())


class Files(NamedTuple):
    """How an adapter lies in a folder of `peft`'s: adapter_config.json and adapter_model.safetensors.

    kind: the config's `peft_type`. read: (config, {tensor name: lazy array}, place) -> the adapter's entry. filled: (params
    with the adapter, the tensors, place) -> params with the tensors' values. written: (params, architecture, entry) -> (fields
    of the config, {tensor name: array}). place: the folder, for errors. They raise UserError for what they do not support.
    """

    kind: str
    read: Callable
    filled: Callable
    written: Callable


def adapter(
    *,
    adds: tuple[str, ...] = (),
    neutral: bool = True,
    merges: bool = True,
    files: Files | None = None,
    completed: Mapping[str, Callable] | None = None,
    recorded: Callable | None = None,
    reads: tuple[str, ...] = (),
    one: str | None = None,
) -> Callable:
    """Declares an adapter.

    adds: the leaves that it adds, which are all that trains: parts of a node around a weight ("a", "b"), or paths beside the
    model's own ("prefix/vectors"). A node keeps the weight that it is around as `base`.
    neutral: whether the model computes the same before the adapter has learned. If not, the model without it is the reference
    of a stage that begins with a fresh one (annotations with weights "start").
    merges: whether what it learns can become part of the model's own weights: nodes have `merged()` (models/einsum.py).
    files: how `peft` keeps it, None for no way.
    completed: {keyword: (ModelSpec, the keywords) -> its value}, of keywords that the model decides and no recipe gives.
    recorded: for one that is read from files, (its keywords) -> the entry of the same adapter without them.
    reads: the keywords that name folders, one or a list: what their files hold decides what the model computes.
    one: of adapters that rows choose among (models/routes.py), the name of what each of them is. They have the keywords
    `experts`, how many there are, and `column`.
    """
    return _declaring(locals())


def _declaring(fields: Mapping[str, Any]) -> Callable:
    fields = {name: value for name, value in fields.items() if value is not None}

    def declare(function: Callable) -> Callable:
        function.declaration = fields
        return function

    return declare


def declared(function: Callable, name: str) -> Any:
    """The value that a function declares under a name, for its bound keywords; else the inherited one.

    For "columns" it is {name: Column}. Raises UserError for an objective that declares by attributes, as older ones did.
    """
    plain, keywords = getattr(function, "func", function), getattr(function, "keywords", {})
    fields = getattr(plain, "declaration", {})
    if old := [attribute for attribute in _ATTRIBUTES if attribute in getattr(plain, "__dict__", {})]:
        entries = ", ".join(f"{'rows' if attribute == 'data' else attribute}=..." for attribute in old)
        raise UserError(
            f"objective {plain.__name__}: its attribute `{old[0]}` is not read any more; put @objective({entries}) above the "
            "function (from jaxpost.declare import objective)."
        )
    if name not in fields:
        inner = _inner(plain, keywords)
        return _DEFAULTS[name] if inner is None else declared(inner, name)
    value = fields[name]
    if name in _FUNCTIONS:
        parameters = inspect.signature(value).parameters
        open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        return functools.partial(value, **{k: v for k, v in keywords.items() if open_ended or k in parameters})
    value = value(**keywords) if callable(value) else value
    return {column: Column(*x) for column, x in value.items()} if name == "columns" else value


def _inner(function: Callable, keywords: Mapping) -> Callable | None:
    """The objective under the keyword `of`; None without such a keyword."""
    of = inspect.signature(function).parameters.get("of")
    if of is None or of.kind is not of.KEYWORD_ONLY or not fits(function, "objectives"):
        return None
    return resolve(keywords.get("of", of.default), "objectives")
