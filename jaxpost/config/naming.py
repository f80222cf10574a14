"""From a function to its name: what a config records when a user hands over an object instead of naming one.

A config is plain data. It is copied, merged, written as JSON, and compared with the config of the run in a workdir. So it holds
a function's name, not the function:

    my_package.losses.mine      where importing that name gives the object: the same as naming it, from any command line
    mine#9f8e7d6c               for a function of a notebook, a lambda, an object: its name and a digest of its behaviour

`handed_over` looks up the second kind in this process. In the next process the user hands the object over again, and the digest
shows whether it is still the same: a run is never continued with another loss of the same name. The digest covers the source
(the bytecode where there is none, or where a lambda shares its line), default arguments, and the values in a closure. It does
not cover the functions that are called or the module's variables.
"""

import functools
import hashlib
import inspect
import sys
import types
from collections.abc import Container, Mapping
from types import CodeType, ModuleType
from typing import Any

import numpy as np

# The nouns whose functions a recipe may name, and their positional arguments. A task is a module of several functions. A merge
# takes further models after the first, and a model's function only keywords.
NOUNS = {
    "objective": ("forward", "params", "batch", "key"),
    "reward": ("record", "completion"),
    "adapter": ("params", "key"),
    "annotator": ("forward", "params", "batch"),
    "eval": ("model",),
    "filter": ("row",),
    "merge": ("params",),
    "model": (),
    "parser": ("completion", "record"),
    "processor": ("logits", "context"),
    "prompt": ("record",),
    "step": ("batch",),
    "task": None,
    "transform": ("rows", "columns", "key"),
}
# Where the plural is irregular (PLURALS) or the functions are not in jaxpost/PLURAL (FOLDERS): a folder, or one file of
# siblings.
PLURALS = {"merge": "merging"}
FOLDERS = {
    "models": "models.composed",
    "filters": "synthesis.filters",
    "parsers": "synthesis.parsers",
    "processors": "sampling",
    "prompts": "synthesis.prompts",
    "row_types": "data.row_types",
    "steps": "rollouts.steps",
    "transforms": "data.transforms",
}
# The settings that hold entries (a name, or a dict with `name` and keywords), or lists of entries, and the plural of what they
# name. Those in SEVERAL may hold a dict of entries under the user's own names.
ENTRIES = {
    **{noun: f"{noun}s" for noun in ("objective", "reward", "adapter", "task", "prompt", "parser")},
    "annotator": "annotators",
    "annotations": "annotators",
    "evals": "evals",
    "filters": "filters",
    "gradients": "updates",
    "order": "transforms",
    "processors": "processors",
    "steps": "steps",
    "updates": "updates",
}
WITH = {"annotate": "annotators", "select": "transforms", "merge": "merging"}  # stage -> what its setting `with` names
SEVERAL = ("reward", "evals", "annotations")
_HANDED_OVER: dict[str, Any] = {}


def name_of(thing: Any, noun: str) -> str:
    """The name that a config records for a function, module or object of a noun ("objectives"); `handed_over` then knows it."""
    whole = isinstance(thing, ModuleType)
    place = thing.__name__ if whole else getattr(thing, "__module__", None) or ""
    name = getattr(thing, "__name__", None) or getattr(getattr(thing, "func", thing), "__name__", type(thing).__name__)
    module = None if place == "__main__" else sys.modules.get(place)
    if module is thing or (module is not None and vars(module).get(name) is thing):
        return (place if whole else f"{place}.{name}").removeprefix(f"jaxpost.{FOLDERS.get(noun, noun)}.")
    name = f"{name.rpartition('.')[2].strip('<>')}#{digest_of(thing)}"
    _HANDED_OVER[name] = thing
    return name


def digest_of(thing: Any) -> str:
    """A digest of a function's or object's behaviour, the same in every process; the module's docstring gives its limits."""
    return hashlib.sha256(_described(thing, ()).encode()).hexdigest()[:8]


def handed_over(name: str) -> Any:
    """The object that was handed over under this name in this process, or None."""
    return _HANDED_OVER.get(name)


def named(settings: Mapping, keys: Container[str]) -> dict:
    """Settings with the objects in entries (ENTRIES) replaced by their names.

    keys: the names of all settings; a dict under any other key is a stage's settings.
    """
    out = dict(settings)
    for key, value in settings.items():
        if key in ENTRIES:
            out[key] = _entries(key, value)
        elif key == "with" and value and (callable(value) or (isinstance(value, Mapping) and callable(value.get("name")))):
            entry = value if isinstance(value, Mapping) else {"name": value}
            out[key] = {**entry, "name": name_of(entry["name"], WITH.get(settings.get("do"), ""))}
        elif isinstance(value, Mapping) and (key not in keys or key in ("rollouts", "optimizer")):
            out[key] = named(value, keys)
    return out


def _entries(key: str, value: Any) -> Any:
    """The value of a setting of ENTRIES with names for objects: one entry, or several in a dict or a list."""
    if isinstance(value, (str, int)):  # outside of rollouts `steps` is a number
        return {"name": value} if key == "task" and value else value
    if isinstance(value, (list, tuple)):
        return tuple(_entries(key, entry) for entry in value)
    if not isinstance(value, Mapping):
        return {"name": name_of(value, ENTRIES[key])}
    if key in SEVERAL and not isinstance(value.get("name"), str) and not callable(value.get("name")):
        return {name: _entry(key, entry) for name, entry in value.items()}
    return _entry(key, value)


def _entry(key: str, entry: Any) -> Any:
    """One entry; an eval's keywords may be entries themselves (its task, its reward)."""
    if not isinstance(entry, Mapping):
        return _entries(key, entry)
    name = entry.get("name", "")
    keywords = {k: v for k, v in entry.items() if k != "name"}
    keywords = named(keywords, ()) if key == "evals" else keywords
    return {**({"name": name if isinstance(name, str) else name_of(name, ENTRIES[key])} if "name" in entry else {}), **keywords}


def _described(thing: Any, within: tuple) -> str:
    """An object's behaviour or value as text that is the same in every process. within: the objects around it, which guard
    against cycles.
    """
    if any(thing is outer for outer in within):
        return "itself"
    text = functools.partial(_described, within=(*within, thing))
    if thing is None or isinstance(thing, (bool, int, float, complex, str, bytes, type(...))):
        return repr(thing)
    if isinstance(thing, (set, frozenset)):
        return f"{{{sorted(map(text, thing))}}}"
    if isinstance(thing, (list, tuple)):
        return f"{type(thing).__name__}{[text(x) for x in thing]}"
    if isinstance(thing, Mapping):
        return text([(k, v) for k, v in thing.items()])
    if isinstance(thing, ModuleType):
        return thing.__name__
    if isinstance(thing, inspect.Signature):
        return str(thing)
    if isinstance(thing, CodeType):
        return text([thing.co_code.hex(), thing.co_names, thing.co_varnames, thing.co_consts])
    if isinstance(thing, functools.partial):
        return text([thing.func, thing.args, thing.keywords])
    if inspect.ismethod(thing):
        return text([thing.__func__, thing.__self__])
    if hasattr(thing, "__wrapped__") and not inspect.isfunction(thing):  # as jax.jit gives
        return text([type(thing).__name__, thing.__wrapped__])
    if inspect.isfunction(thing):
        held = [_held(cell) for cell in thing.__closure__ or ()]
        return text([_source(thing), thing.__defaults__, thing.__kwdefaults__, held, vars(thing)])
    if hasattr(thing, "__array__") and not isinstance(thing, type):
        return text([np.asarray(thing).dtype.str, np.asarray(thing).shape, np.asarray(thing).tobytes()])
    kind = thing if isinstance(thing, type) else type(thing)
    if isinstance(thing, (staticmethod, classmethod)):
        return text(thing.__func__)
    if isinstance(thing, property):
        return text([thing.fget, thing.fset])
    if isinstance(thing, _COMPILED) or inspect.ismemberdescriptor(thing) or inspect.isgetsetdescriptor(thing):
        return thing.__name__
    # All attributes of a class, Python's generated methods too, except those that say where it is defined.
    parts = {k: v for c in kind.__mro__[:-1] for k, v in vars(c).items() if k not in _WHERE}
    slots = [getattr(thing, name, None) for c in kind.__mro__ for name in getattr(c, "__slots__", ())]
    return text([kind.__qualname__, parts, [] if thing is kind else [getattr(thing, "__dict__", {}), slots]])


_COMPILED = (
    types.BuiltinFunctionType,
    types.WrapperDescriptorType,
    types.MethodDescriptorType,
    types.ClassMethodDescriptorType,
)
_WHERE = ("__module__", "__dict__", "__weakref__", "__doc__", "__annotations__", "__firstlineno__", "__static_attributes__")


def _held(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # a name that is assigned only later
        return None


def _source(function: Any) -> str | CodeType:
    """The source; where there is none (exec), or where a lambda shares its line with others, the bytecode."""
    if function.__name__ != "<lambda>":
        try:
            return inspect.getsource(function)
        except (OSError, TypeError):
            pass
    return function.__code__
