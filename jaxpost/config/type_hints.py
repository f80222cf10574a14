"""Whether a keyword's value is of the type that a function's signature says: a mistake is named where the recipe is read.

Known hints are int, float, bool, str, lists, dicts, functions and what `|` makes of these. A value suits any other hint.
"""

import inspect
import numbers
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxpost.errors import UserError

# Of each known hint what a value is called, and several.
_NAMES: dict[Any, tuple[str, str]] = {
    bool: ("true or false", "true or false"),
    int: ("a whole number", "whole numbers"),
    float: ("a number", "numbers"),
    str: ("a text", "texts"),
    dict: ("a dict", "dicts"),
    Mapping: ("a dict", "dicts"),
    Callable: ("a function", "functions"),
    types.NoneType: ("nothing", "nothing"),
}
_LISTS = (list, tuple, Sequence)


def check(function: Callable, options: Mapping[str, Any], place: str) -> None:
    """Raises UserError, with place, for an option of a function that is not what its signature says. None is taken for any, as
    what is absent.
    """
    parameters = inspect.signature(function).parameters
    for name, value in options.items():
        hint = parameters[name].annotation
        if value is not None and not suits(value, hint):
            raise UserError(f"{place}: {name}={repr(value)[:80]}; it takes {named(hint)}.")


def suits(value: Any, hint: Any) -> bool:
    """Whether a value is of a hint; an array suits a number and a list."""
    kind, inner = typing.get_origin(hint) or hint, typing.get_args(hint)
    if kind in (typing.Union, types.UnionType):
        return any(suits(value, one) for one in inner)
    if kind in (bool, int, float) and hasattr(value, "__array__"):
        return True
    if kind in (int, float):
        return isinstance(value, numbers.Integral if kind is int else numbers.Real) and not isinstance(value, bool)
    if kind in _LISTS:
        items = value if isinstance(value, (list, tuple)) else ()
        return (isinstance(value, (list, tuple)) or hasattr(value, "__array__")) and _each_suits(items, kind, inner)
    if kind in (dict, Mapping):  # a recipe has pairs in place of a dict whose keys have dots
        pairs = isinstance(value, (list, tuple)) and all(isinstance(x, (list, tuple)) and len(x) == 2 for x in value)
        return pairs or isinstance(value, Mapping)
    if kind is Callable:
        return callable(value)
    return isinstance(value, kind) if kind in _NAMES else True


def _each_suits(items: Any, kind: Any, inner: tuple) -> bool:
    if kind is tuple and inner and inner[-1] is not ...:
        return len(items) == len(inner) and all(map(suits, items, inner))
    return all(suits(item, inner[0]) for item in items) if inner else True


def named(hint: Any, several: bool = False) -> str:
    """A hint in words, as "a list of whole numbers"."""
    kind, inner = typing.get_origin(hint) or hint, typing.get_args(hint)
    if kind in (typing.Union, types.UnionType):
        return " or ".join(dict.fromkeys(named(one, several) for one in inner if one is not types.NoneType))
    if kind in _LISTS:
        return f"{'lists' if several else 'a list'}{f' of {named(inner[0], True)}' if inner else ''}"
    return _NAMES[kind][several] if kind in _NAMES else getattr(kind, "__name__", str(kind))
