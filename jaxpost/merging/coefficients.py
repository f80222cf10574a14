"""What a merge's setting is for one tensor: the same for all, by the tensor's name, or by the depth of its layer.

    0.5                                          all tensors
    {"self_attn": 0.3, "mlp": 0.7, "": 0.5}      the first pattern that is found in the tensor's name; "" is in every name
    [0.0, 0.5, 1.0]                              from the first layer to the last, linear between the numbers
    {"mlp": [0.2, 0.8], "": 0.5}                 both

A list gives what belongs to no layer (embeddings, final norm, head) its first number. Patterns are regular expressions; pairs
such as (("mlp", 0.7), ("", 0.5)) mean the same as a dict. Where each model has a setting of its own, a list has one entry for
each model, and each entry may be any of these.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from jaxpost.config.resolve import nearest
from jaxpost.errors import UserError

Each = Any  # a setting of each model: any of these where a merge is called, a list of numbers where a tensor is computed
_LAYER = re.compile(r"(?:^|\.)layers?\.(\d+)\.")


def layer_of(name: str) -> int | None:
    """The layer that a tensor belongs to, by its name in Hugging Face's files; None for one outside of the layers."""
    layer = _LAYER.search(name)
    return None if layer is None else int(layer[1])


def depth_of(name: str, layers: int) -> float:
    """How deep a tensor's layer is: 0 in the first, 1 in the last or only one; 0 outside of the layers."""
    layer = layer_of(name)
    if layer is None:
        return 0.0
    return layer / (layers - 1) if layers > 1 else 1.0


def at(setting: Any, name: str, depth: float, place: str) -> Any:
    """The value of a setting for the tensor `name` at a depth. Raises UserError, beginning with place, where there is none."""
    if (entries := _by_name(setting)) is not None:
        for pattern, value in entries:
            if _has(pattern, name, place):
                return at(value, name, depth, place)
        raise UserError(f'{place}: none of its patterns is in {name}; add "" for all other tensors.')
    if not _is_list(setting):
        return setting
    if not setting or not all(isinstance(x, (int, float)) for x in setting):
        raise UserError(f"{place}: {setting!r}; a list over the layers has numbers only, one at least.")
    scaled = depth * (len(setting) - 1)
    first = int(scaled)
    share = scaled - first
    return (1 - share) * setting[first] + share * setting[min(first + 1, len(setting) - 1)]


def each_at(setting: Any, count: int, name: str, depth: float, place: str) -> list:
    """`at` of each of `count` models: a list has one entry a model, anything else is for all of them."""
    if not _is_list(setting) or _by_name(setting) is not None:
        return [at(setting, name, depth, place)] * count
    if len(setting) != count:
        raise UserError(f"{place}: {setting!r} has {len(setting)} entries; give {count}, one a model, or one value for all.")
    return [at(entry, name, depth, place) for entry in setting]


def check_patterns(setting: Any, names: Iterable[str], place: str) -> None:
    """Raises UserError, beginning with place, for a pattern in a setting that is in none of the tensors' names."""
    for pattern, value in _by_name(setting) or ():
        if not any(_has(pattern, name, place) for name in names):
            words = {word for name in names for word in name.split(".") if not word.isdigit()}
            close = nearest(re.sub(r"\W+", " ", pattern).strip(), words)
            raise UserError(f"{place}: {pattern!r} is in no tensor's name.{close}")
        check_patterns(value, names, place)
    if _by_name(setting) is None and _is_list(setting):
        for entry in setting:
            check_patterns(entry, names, place)


def _has(pattern: str, name: str, place: str) -> bool:
    try:
        return re.search(pattern, name) is not None
    except re.error as error:
        raise UserError(f"{place}: {pattern!r} is no regular expression ({error}).") from None


def _is_list(setting: Any) -> bool:
    return isinstance(setting, Sequence) and not isinstance(setting, str)


def _by_name(setting: Any) -> list[tuple[str, Any]] | None:
    """(pattern, value) pairs of a setting that goes by names; None for any other."""
    if isinstance(setting, Mapping):
        return list(setting.items())
    pairs = _is_list(setting) and all(_is_list(x) and len(x) == 2 and isinstance(x[0], str) for x in setting)
    return [(pattern, value) for pattern, value in setting] if pairs and setting else None
