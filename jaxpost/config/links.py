"""From a stage to the earlier ones whose artefacts it takes: `@NAME` in its settings, checked before anything runs.

A stage's settings have one key more than a recipe, `start`: the stage whose weights it starts from, "" for its own model.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from jaxpost.config.resolve import nearest
from jaxpost.errors import UserError

# What each kind of stage makes.
MAKES = {
    "train": "weights",
    "merge": "weights",
    "generate": "rows",
    "select": "rows",
    "annotate": "columns",
    "evaluate": "figures",
}
# The settings that may name an earlier stage, and what it must make.
_INPUTS = {"model": "weights", "of": "weights", "data": "rows", "eval_data": "rows", "annotations": "columns"}


def linked(settings: dict, own_model: bool, before: Mapping[str, Mapping], place: str) -> dict:
    """A stage's settings with `start`, and with `model` replaced by the model that the weights came from.

    own_model: whether the stage names a model itself; before: {name: settings} of the stages before it. Raises UserError for a
    name that is no earlier stage, and for a stage that makes something else.
    """
    if settings["do"] not in MAKES:
        raise UserError(f"{place}.do: {settings['do']!r}.{nearest(settings['do'], MAKES)}")
    for key, kind in _INPUTS.items():
        for name in references(settings[key]):
            _check(name, kind, before, f"{place}.{key}")
    for key, counted in (("time_of", ("train", "generate")), ("tokens_of", ("train",))):
        for name in names(settings[key]):
            _check(name, None, before, f"{place}.{key}")
            if (does := before[name]["do"]) not in counted:
                kinds = " or ".join(counted)
                raise UserError(f"{place}.{key}: the stage {name!r} has do={does!r}; name stages with do={kinds}.")
    model, last = settings["model"], [name for name, s in before.items() if MAKES[s["do"]] == "weights"][-1:]
    start = next(references(model), "") if own_model else "".join(last)
    origin = settings["of"][0] if settings["do"] == "merge" and settings["of"] else f"@{start}" if start else model
    start = next(references(origin), "")
    settings = {**settings, "start": start, "model": before[start]["model"] if start else origin}
    # What the model of a stage sees stays with its weights.
    return settings if not start else settings | {"attend": settings["attend"] or before[start]["attend"]}


def inputs(settings: Mapping) -> set[str]:
    """The earlier stages whose outputs a stage with these settings takes, budgets and annotations' models among them."""
    texts = {key: settings[key] for key in ("data", "eval_data", "annotations", "of", "evals", "objective")}
    named = set(re.findall(r'"@(\w+)', json.dumps(texts, default=str)))
    for key in _INPUTS:
        named |= set(references(settings[key]))
    return named | {settings["start"], *names(settings["time_of"]), *names(settings["tokens_of"])} - {""}


def names(text: str) -> list[str]:
    """The stages that a comma-separated text names."""
    return [part.strip() for part in text.split(",") if part.strip()]


def references(value: Any) -> Iterator[str]:
    """The stages that a setting names: in a text with commas, in a list or in the keys of a dict."""
    if isinstance(value, str):
        entries: Any = value.split(",")
    elif isinstance(value, Mapping):
        entries = value
    else:
        entries = value if isinstance(value, (list, tuple)) else ()
    for entry in entries:
        if name := _reference(entry[0] if isinstance(entry, (list, tuple)) and entry else entry):
            yield name


def _reference(entry: Any) -> str:
    """The stage that an entry names, as "@NAME" or "@NAME=WEIGHT"; "" for a file."""
    text = entry.strip() if isinstance(entry, str) else ""
    return text[1:].partition("=")[0].strip() if text.startswith("@") else ""


def filled(value: Any, files: Callable[[str], str]) -> Any:
    """A setting with each @NAME replaced by files(NAME); a text that has one becomes a list."""
    if not any(references(value)):
        return value
    if isinstance(value, str):
        entries: Any = [_weighed(part.strip()) for part in value.split(",") if part.strip()]
    else:
        entries = list(value.items()) if isinstance(value, Mapping) else list(value)
    pairs = [(entry, None) if isinstance(entry, str) else tuple(entry) for entry in entries]
    paths = [(files(name) if (name := _reference(path)) else path, weight) for path, weight in pairs]
    return [path if weight is None else (path, weight) for path, weight in paths]


def _weighed(part: str) -> Any:
    path, equals, weight = part.rpartition("=")
    try:
        return (path, float(weight)) if equals else part
    except ValueError:
        return part


def _check(name: str, kind: str | None, before: Mapping[str, Mapping], place: str) -> None:
    if name not in before:
        raise UserError(f"{place}: no stage {name!r} comes before.{nearest(name, before) if before else ''}")
    if kind and MAKES[before[name]["do"]] != kind:
        raise UserError(
            f"{place}: the stage {name!r} makes {MAKES[before[name]['do']]} (do={before[name]['do']!r}), and {kind} are needed."
        )
