"""From a name in a config to a function: the file path is the registry.

    dict(name="sft.nll")                      jaxpost/objectives/sft.py, function nll (the noun's folder is implied)
    dict(name="lora", rank=8)                 without a dot, the function that its file is named after: adapters/lora.py, lora
    dict(name="my_package.losses.mine", a=1)  any importable package.module.function
    dict(name="losses.py:mine", a=1)          a function in a file of one's own
    dict(name=mine, a=1)                      from Python, the function itself (`naming` gives the name that is recorded)

A name in a file, such as a checkpoint's, may only be one of jaxpost's own, or one that the user's own command, recipe or call
names too (`trust`), so that a file does not decide which code runs.

The other keys are the function's keyword arguments. An unknown name or keyword fails at once and names the nearest known one.
"""

import difflib
import functools
import importlib
import importlib.util
import inspect
import json
import sys
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from jaxpost.config import type_hints
from jaxpost.config.naming import FOLDERS, NOUNS, PLURALS, handed_over
from jaxpost.errors import UserError

# A noun's plural -> the positional arguments of its functions; functions with others are helpers.
ARGUMENTS = {PLURALS.get(noun, f"{noun}s"): arguments for noun, arguments in NOUNS.items() if arguments}
_TRUSTED: set[str] = set()
_CONTENT = "__content__"  # of a user's file, as it was when it ran


def nearest(word: str, names) -> str:
    """' Did you mean ...?' for the closest of the names, else a list of them."""
    names = sorted(names)
    close = difflib.get_close_matches(word, names, n=1, cutoff=0.6)
    return f" Did you mean {close[0]!r}?" if close else f" Known: {', '.join(names) or 'none'}."


def value_of(text: str) -> Any:
    """The value of a text on the command line: JSON (true, 3, "x"), True and False are parsed, all else stays text."""
    try:
        return json.loads(text.lower() if text in ("True", "False") else text)
    except ValueError:
        return text


def entry_of(value: Any, place: str) -> Any:
    """An entry: as it is, or on the command line JSON of a dict. Raises UserError, with place, for broken JSON."""
    return _json(value, place) if isinstance(value, str) and value.lstrip().startswith("{") else value


def within(entry: Mapping | str, file: str) -> dict:
    """An entry as a dict; a bare name is one of a file of its noun's folder: "by" within order is order.by."""
    entry = {"name": entry} if isinstance(entry, str) else dict(entry)
    return {**entry, "name": f"{file}.{entry['name']}"} if str(entry.get("name", "")).isidentifier() else entry


def entries(value: Any, place: str) -> list:
    """A list of entries, from a list, one entry, a comma-separated text or, on the command line, JSON. Raises UserError, with
    place, for what is none of these.
    """
    if isinstance(value, str):
        text = value.strip()
        value = _json(text, place) if text[:1] in ("[", "{") else [name.strip() for name in text.split(",") if name.strip()]
    several = list(value) if isinstance(value, (list, tuple)) else [value]
    if wrong := [entry for entry in several if not (isinstance(entry, (str, Mapping)) or callable(entry))]:
        raise UserError(
            f"{place}: {wrong[0]!r} is no entry; give a name, or a dict with a `name` and keywords, or a list of these."
        )
    return several


def _json(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise UserError(f"{place}: {text} is broken JSON ({error}); quote names, and all of it in single quotes.") from error


def resolve(spec: Mapping | str, noun: str) -> Callable:
    """The function that a config entry names, with the entry's other keys bound as keyword arguments.

    noun: the plural, as "objectives" or "transforms", which decides where a bare name is looked up. Raises UserError for an
    unknown name, an unknown keyword, or a missing required one.
    """
    options = dict(spec) if isinstance(spec, Mapping) else {"name": spec}
    name = options.pop("name", None)
    if not isinstance(name, str) or not name:
        raise UserError(f"config: an entry of kind {noun} needs a name, got {spec!r}.")
    function = find(name, noun)
    if not callable(function) or not fits(function, noun):
        arguments = ", ".join(ARGUMENTS.get(noun, ()))
        raise UserError(f"config: {name!r} is no function of ({arguments}), as {noun} are.{_meant(name, noun)}")
    return bind(function, options, f"{noun}: {name}")


def trust(functions: Any) -> None:
    """Records functions that the user names, by a name, an entry or a list. Files may name them then, in this process."""
    several = functions if isinstance(functions, (list, tuple)) else [functions]
    _TRUSTED.update(one.get("name", "") if isinstance(one, Mapping) else one for one in several)


def check_origin(entry: Any, noun: str, file) -> None:
    """Raises UserError where a file's entry names a function that is neither jaxpost's own nor trusted. Imports nothing."""
    name = entry.get("name") if isinstance(entry, Mapping) else entry
    if not isinstance(name, str):
        raise UserError(f"{file}: names no function of kind {noun}, but {name!r}.")
    # A function that was handed over from Python is never imported.
    if name in _TRUSTED or "#" in name or any(name in (short, f"{short}.{short}") for short in known(noun)):
        return
    raise UserError(
        f"{file}: names {name!r} of {noun}, which is not jaxpost's, and a file does not decide what is run. If it is yours, "
        f"name it too: --trust={name}, or from Python trust=[{name!r}]."
    )


def bind(function: Callable, options: Mapping, place: str) -> Callable:
    """The function with keyword-only options bound, each checked against the signature: its name, and its type."""
    keywords = {k: p for k, p in inspect.signature(function).parameters.items() if p.kind is p.KEYWORD_ONLY}
    for option in options:
        if option not in keywords:
            raise UserError(f"config: {place} takes no option {option!r}.{nearest(option, keywords)}")
    type_hints.check(function, options, f"config: {place}")
    if missing := [k for k, p in keywords.items() if p.default is p.empty and k not in options]:
        raise UserError(f"config: {place} needs {', '.join(missing)}.")
    return functools.partial(function, **options)


def find(name: str, noun: str) -> Callable:
    """The object of a name; the module's docstring lists the forms."""
    if "#" in name:
        return _handed_over(name)
    if ".py:" in name:
        path, _, attribute = name.rpartition(":")
        return _attribute(_file(path), attribute, name, noun)
    (file, _, attribute), place = name.rpartition("."), _place(noun)
    candidates = [f"{place}.{file}"] if file else [f"{place}.{name}", *[place] * _is_file(noun)]
    for candidate in candidates + [file] * bool(file):
        if (imported := _module(candidate)) is not None:
            return _attribute(imported, attribute, name, noun)
    raise UserError(
        f"config: unknown {noun} {name!r}.{_meant(name, noun)} Or give package.module.function, or file.py:function."
    )


def _meant(name: str, noun: str) -> str:
    """`nearest` among a noun's functions, with those first whose name without the file is the same."""
    names = known(noun)
    return nearest(name, [full for full in names if full.rpartition(".")[2] == name] or names)


def module(name: str, noun: str) -> ModuleType:
    """A whole module by name (a task is one): under jaxpost/<noun>, importable, path/file.py, or an object handed over."""
    if "#" in name:
        return _handed_over(name)
    if name.endswith(".py"):
        return _file(name)
    for candidate in (f"{_place(noun)}.{name}", name):
        if candidate and (imported := _module(candidate)) is not None:
            return imported
    names = [path.stem for path in _files(noun)]
    raise UserError(
        f"config: unknown module {name!r} for {noun}.{nearest(name, names)} Or give an importable module, or a file.py."
    )


def known(noun: str) -> list[str]:
    """Every function of the noun that comes with jaxpost, by the short name that a config uses, without helpers and without
    files that need a package that is not installed.
    """
    names = []
    for path in _files(noun):
        place, prefix = (_place(noun), "") if _is_file(noun) else (f"{_place(noun)}.{path.stem}", f"{path.stem}.")
        try:
            functions = vars(importlib.import_module(place)).items()
        except ModuleNotFoundError:
            continue
        public = [k for k, v in functions if inspect.isfunction(v) and v.__module__ == place and not k.startswith("_")]
        public = [k for k in public if _takes(dict(functions)[k], noun)]
        names += [k if prefix == f"{k}." else prefix + k for k in public]
    return names


def _takes(function: Callable, noun: str) -> bool:
    """Whether a function of jaxpost has the noun's arguments, by name too: a helper may take the same number of others."""
    names, arguments = tuple(inspect.signature(function).parameters), ARGUMENTS.get(noun, ())
    return fits(function, noun) and (names[: len(arguments)] == arguments or (noun == "rewards" and "completions" in names))


def _place(noun: str) -> str:
    """The package, or the one module, of a noun's functions."""
    return f"jaxpost.{FOLDERS.get(noun, noun)}"


def _files(noun: str) -> list[Path]:
    """The files of a noun's functions."""
    place = Path(__file__).parents[1].joinpath(*_place(noun).split(".")[1:])
    return [place.with_suffix(".py")] if _is_file(noun) else sorted(p for p in place.glob("*.py") if p.stem != "__init__")


def _is_file(noun: str) -> bool:
    return Path(__file__).parents[1].joinpath(*_place(noun).split(".")[1:]).with_suffix(".py").is_file()


def fits(function: Callable, noun: str) -> bool:
    """Whether a function takes the noun's arguments by position."""
    if noun not in ARGUMENTS or (noun == "rewards" and "completions" in inspect.signature(function).parameters):
        return True  # a reward may also have TRL's signature (rewards/trl.py)
    count, takes = len(ARGUMENTS[noun]), inspect.signature(function).parameters.values()
    placed = [p for p in takes if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    needed = sum(p.default is p.empty for p in placed)
    return needed <= count and (count <= len(placed) or any(p.kind is p.VAR_POSITIONAL for p in takes))


def _module(name: str) -> ModuleType | None:
    """The module, or None if there is none of that name; an error inside the module is raised. Raises UserError where a module
    of jaxpost needs a package that is not installed.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as e:
        if e.name and (name == e.name or name.startswith(e.name + ".")):
            return None
        if name.startswith("jaxpost.") and e.name and not e.name.startswith("jaxpost."):
            raise UserError(f"{name.removeprefix('jaxpost.')} needs {e.name}, which is not installed{_extra(e.name)}.") from e
        raise


def _extra(package: str) -> str:
    """How to install a package that belongs to an extra; "" for any other."""
    extra = {"lm_eval": "eval", "ir_measures": "retrieval", "mteb": "retrieval"}.get(package.partition(".")[0])
    return f"; pip install 'jaxpost[{extra}]'" if extra else ""


def _file(path: str) -> ModuleType:
    if not Path(path).is_file():
        raise UserError(f"config: no file {path}; a path is taken relative to the current directory.")
    whole = Path(path).resolve()
    name = f"{whole.stem}_{zlib.crc32(str(whole).encode()):08x}"  # unique, since two files may have the same name
    # An unchanged file is not run again: a tree with its classes as nodes would equal no tree made before.
    content, before = whole.read_bytes(), sys.modules.get(name)
    if getattr(before, _CONTENT, None) == content:
        return before
    spec = importlib.util.spec_from_file_location(name, whole)
    loaded = sys.modules[name] = importlib.util.module_from_spec(spec)  # dataclasses look their module up there
    sys.path.insert(0, str(whole.parent))  # so that it can import its neighbours, as a script can
    try:
        spec.loader.exec_module(loaded)
    finally:
        sys.path.remove(str(whole.parent))
    setattr(loaded, _CONTENT, content)
    return loaded


def _handed_over(name: str):
    if (thing := handed_over(name)) is None:
        raise UserError(
            f"config: {name!r} was handed over from Python, in another session; hand it over again to jaxpost.train."
        )
    return thing


def _attribute(holder: ModuleType, attribute: str, name: str, noun: str):
    if not hasattr(holder, attribute):
        names = [k for k, v in vars(holder).items() if inspect.isfunction(v) and not k.startswith("_") and fits(v, noun)]
        place = Path(holder.__file__ or "").name if ":" in name else holder.__name__  # a file's module has a name of our own
        raise UserError(f"config: {name!r}: {place} has no {attribute!r}.{nearest(attribute, names)}")
    return getattr(holder, attribute)
