"""What an objective says of itself: `@objective(...)` says it, `declared` asks for it.

    @objective(rows="pairs", columns={"ref_logps": ("BS", "float32")})
    def mine(forward, params, batch, key, *, beta: float = 0.1): ...

A function without the decorator learns from demonstrations and reads what every batch has (types.py). A value may depend on
the objective's keywords; then a function of them stands in its place. An objective `of` another, by a keyword of that name,
inherits whatever it does not say itself.
"""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from jaxpost.errors import UserError
from jaxpost.resolve import fits, resolve

_DEFAULTS = {
    "rows": "demonstrations",
    "columns": {},
    "leaves": {},
    "masks": ("mask",),
    "prepare": None,
    "advantages": "leave_one_out",
    "current": {},
    "off_policy": False,
    "sequence_level": False,
    "metrics": None,
    "differentiates_entropy": False,
}
_FUNCTIONS = ("prepare", "metrics")  # their value is a function, which is bound to those of the keywords that it takes
_ATTRIBUTES = ("prepare", "columns", "data", "leaves")  # what older versions read from the function itself


def objective(
    *,
    rows: str | Callable | None = None,
    columns: Mapping | Callable | None = None,
    leaves: Mapping | Callable | None = None,
    masks: tuple[str, ...] | Callable | None = None,
    prepare: Callable | None = None,
    advantages: Mapping | str | Callable | None = None,
    current: Mapping | Callable | None = None,
    off_policy: bool | Callable | None = None,
    sequence_level: bool | Callable | None = None,
) -> Callable:
    """Declares an objective; what is left out is inherited, or as of a function without the decorator.

    rows: the row type that it learns from: demonstrations, pairs, labelled, mismatched, scored or steps.
    columns: {name: (axis letters, dtype)} of what it reads besides tokens, segments, positions and mask.
    leaves: {path: (axis letters, first value)} of what it adds to the parameters; a value that is a name is another model's.
    masks: the columns [B,S] that say where it learns; where all are 0 no gradient may flow.
    prepare: (forward, params, batch, key) -> columns of the whole batch, without a gradient, before it is split.

    Of rollouts alone: advantages, the config entry of those that a completion has unless the settings name others; current,
    {column: (forward, params, batch) -> columns} that the weights which sampled are asked for; off_policy, whether several
    steps a batch are made up for; sequence_level, whether a completion has one advantage and not one a token.
    """
    return _declaring(locals())


def part(
    *,
    columns: Mapping | Callable | None = None,
    leaves: Mapping | Callable | None = None,
    masks: tuple[str, ...] | None = None,
    prepare: Callable | None = None,
    metrics: Callable | None = None,
    current: Mapping | None = None,
    differentiates_entropy: bool | None = None,
    off_policy: bool | None = None,
    sequence_level: bool | None = None,
) -> Callable:
    """Declares a part of the policy-gradient estimator, whose objective inherits it: as `objective` does, and

    prepare, metrics: (seen, *, the part's keywords) -> columns or metrics; differentiates_entropy: whether it needs the
    entropy's gradient, which costs more.
    """
    return _declaring(locals())


def _declaring(fields: Mapping[str, Any]) -> Callable:
    fields = {name: value for name, value in fields.items() if value is not None}

    def declare(function: Callable) -> Callable:
        function.declaration = fields
        return function

    return declare


def declared(function: Callable, name: str) -> Any:
    """What an objective or a part declares under a name, for the settings that `resolve` has bound; else what it inherits.

    Raises UserError for an objective that says it by an attribute, as older versions had it.
    """
    own, keywords = getattr(function, "func", function), getattr(function, "keywords", {})
    fields = getattr(own, "declaration", {})
    if old := [attribute for attribute in _ATTRIBUTES if attribute in getattr(own, "__dict__", {})]:
        entries = ", ".join(f"{'rows' if attribute == 'data' else attribute}=..." for attribute in old)
        raise UserError(
            f"objective {own.__name__}: its attribute `{old[0]}` is not read any more; put @objective({entries}) above the "
            "function (from jaxpost.declare import objective)."
        )
    if name not in fields:
        inner = _inner(own, keywords)
        return _DEFAULTS[name] if inner is None else declared(inner, name)
    value = fields[name]
    if name in _FUNCTIONS:
        takes = inspect.signature(value).parameters
        open_ended = any(p.kind is p.VAR_KEYWORD for p in takes.values())
        return functools.partial(value, **{k: v for k, v in keywords.items() if open_ended or k in takes})
    return value(**keywords) if callable(value) else value


def _inner(own: Callable, keywords: Mapping) -> Callable | None:
    """The objective that an objective is `of`: the keyword's config entry, resolved; None where it has no such keyword."""
    takes = inspect.signature(own).parameters
    if "of" not in takes or takes["of"].kind is not inspect.Parameter.KEYWORD_ONLY or not fits(own, "objectives"):
        return None
    return resolve(keywords.get("of", takes["of"].default), "objectives")
