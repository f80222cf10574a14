"""From a function to its name: what a config records when a user hands over an object instead of naming one.

A config is plain data. It is copied, merged, written as JSON, and compared with that of the run that a workdir holds, so a
function cannot stand in it, but its name can:

    my_package.losses.mine      where that name imports to the very object: the same as naming it, from any command line
    mine#9f8e7d6c               for a function of a notebook, a lambda, an object: its name and a digest of what it does

`given` finds the second kind again in this process. In the next one the user hands the object over again, and the digest tells
whether it is still the same: a run is never continued with another loss that happens to have the same name. The digest covers
the source (the bytecode where there is none, or where a lambda shares its line), default arguments, and the values that a
closure holds. What a function calls, and what it reads from its module, it does not cover.
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

# What a recipe may name, by its key, and the arguments that its functions take by place; a task is a module, which has several.
# Those that come with jaxpost lie in the folder of the key's plural.
NOUNS = {
    "objective": ("forward", "params", "batch", "key"),
    "reward": ("record", "completion"),
    "adapter": ("params", "key"),
    "annotator": ("forward", "params", "batch"),
    "task": None,
    "transform": ("rows", "columns", "key"),
}
# Where a noun's folder is not the key's plural itself.
FOLDERS = {"row_types": "data.row_types", "transforms": "data.transforms"}
# The nouns that a config's keys name; `order` is one of the transforms.
_KEYS = {**{noun: f"{noun}s" for noun in NOUNS}, "order": "transforms"}
_GIVEN: dict[str, Any] = {}


def name_of(thing: Any, noun: str) -> str:
    """The name that a config records for a function, a module or an object of a noun ("objectives"); `given` knows it after."""
    whole = isinstance(thing, ModuleType)
    place = thing.__name__ if whole else getattr(thing, "__module__", None) or ""
    name = getattr(thing, "__name__", None) or getattr(getattr(thing, "func", thing), "__name__", type(thing).__name__)
    module = None if place == "__main__" else sys.modules.get(place)
    if module is thing or (module is not None and vars(module).get(name) is thing):
        return (place if whole else f"{place}.{name}").removeprefix(f"jaxpost.{FOLDERS.get(noun, noun)}.")
    name = f"{name.rpartition('.')[2].strip('<>')}#{digest_of(thing)}"
    _GIVEN[name] = thing
    return name


def digest_of(thing: Any) -> str:
    """A digest of what a function or an object does, the same in every process; see the module's docstring for its limits."""
    return hashlib.sha256(_told(thing, ()).encode()).hexdigest()[:8]


def given(name: str) -> Any:
    """The object that was handed over under this name in this process, or None."""
    return _GIVEN.get(name)


def named(settings: Mapping, known: Container[str]) -> dict:
    """Settings with a name for each object that stands where a config has one: objective, reward, task, and their `name`.

    known: the settings' keys; a dict under another is a stage's.
    """
    found = dict(settings)
    for key, value in settings.items():
        if key == "annotations" and isinstance(value, Mapping):
            found[key] = {k: named({"annotator": entry}, ())["annotator"] for k, entry in value.items()}
        elif key not in _KEYS:
            found[key] = named(value, known) if isinstance(value, Mapping) and key not in known else value
        elif key == "reward" and isinstance(value, Mapping) and value and "name" not in value:
            found[key] = {k: named({"reward": entry}, ())["reward"] for k, entry in value.items()}  # several
        elif isinstance(value, Mapping):
            called = value.get("name", "")
            found[key] = dict(value) if isinstance(called, str) else {**value, "name": name_of(called, _KEYS[key])}
        elif not isinstance(value, str):
            found[key] = {"name": name_of(value, _KEYS[key])}
        elif key == "task" and value:
            found[key] = {"name": value}
    return found


def _told(thing: Any, within: tuple) -> str:
    """What an object does or is, as text that is the same in every process; `within`: what it was met in, lest it go round."""
    if any(thing is outer for outer in within):
        return "itself"
    tell = functools.partial(_told, within=(*within, thing))
    if thing is None or isinstance(thing, (bool, int, float, complex, str, bytes, type(...))):
        return repr(thing)
    if isinstance(thing, (set, frozenset)):
        return f"{{{sorted(map(tell, thing))}}}"
    if isinstance(thing, (list, tuple)):
        return f"{type(thing).__name__}{[tell(x) for x in thing]}"
    if isinstance(thing, Mapping):
        return tell([(k, v) for k, v in thing.items()])
    if isinstance(thing, ModuleType):
        return thing.__name__
    if isinstance(thing, CodeType):
        return tell([thing.co_code.hex(), thing.co_names, thing.co_varnames, thing.co_consts])
    if isinstance(thing, functools.partial):
        return tell([thing.func, thing.args, thing.keywords])
    if inspect.ismethod(thing):
        return tell([thing.__func__, thing.__self__])
    if inspect.isfunction(thing):
        held = [_held(cell) for cell in thing.__closure__ or ()]
        return tell([_source(thing), thing.__defaults__, thing.__kwdefaults__, held, vars(thing)])
    if hasattr(thing, "__array__") and not isinstance(thing, type):
        return tell([np.asarray(thing).dtype.str, np.asarray(thing).shape, np.asarray(thing).tobytes()])
    kind = thing if isinstance(thing, type) else type(thing)
    if isinstance(thing, (staticmethod, classmethod)):
        return tell(thing.__func__)
    if isinstance(thing, property):
        return tell([thing.fget, thing.fset])
    if isinstance(thing, _COMPILED) or inspect.ismemberdescriptor(thing) or inspect.isgetsetdescriptor(thing):
        return thing.__name__
    # All that a class has, the methods that Python writes too, but for what says where it is.
    parts = {k: v for c in kind.__mro__[:-1] for k, v in vars(c).items() if k not in _WHERE}
    slots = [getattr(thing, name, None) for c in kind.__mro__ for name in getattr(c, "__slots__", ())]
    return tell([kind.__qualname__, parts, [] if thing is kind else [getattr(thing, "__dict__", {}), slots]])


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
    except ValueError:  # a name that is given a value only later
        return None


def _source(function: Any) -> str | CodeType:
    """The source; where there is none (exec), or where a lambda shares its line with others, the bytecode."""
    if function.__name__ != "<lambda>":
        try:
            return inspect.getsource(function)
        except (OSError, TypeError):
            pass
    return function.__code__
