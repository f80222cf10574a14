"""Recipes: how they are made, opened and changed, and the stages of one. config/settings.py has every key with its default.

A recipe is a file with `get_config(arg) -> ConfigDict` that calls `make` with what it changes. Where a key holds a dict with a
`name`, the name is a function's and the other keys are its keyword arguments; nothing of a method is described here.

A recipe may run several stages: `stages` names them in order, and a key of each name holds what differs from the settings
around it. A stage makes one artefact of earlier ones, which it names with an @: weights (train, merge), rows (generate,
select), columns (annotate) or figures (evaluate). A stage whose settings name no `model` starts from the last weights before
it.
"""

import copy
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from ml_collections import ConfigDict

from jaxpost.config.links import linked
from jaxpost.config.naming import named
from jaxpost.config.resolve import find, nearest, value_of
from jaxpost.config.settings import DEFAULTS, FREE, WHOLE, check
from jaxpost.config.unread import GSM8K as GSM8K  # for recipes, which import nothing else
from jaxpost.config.unread import adapted, check_around, unread
from jaxpost.errors import UserError


def make(**changes) -> ConfigDict:
    """The defaults with `changes`; nested dicts are merged. Raises UserError for an unknown key, naming the nearest."""
    changes = named(changes, DEFAULTS)
    return ConfigDict(_merge(DEFAULTS, changes, _stage_names(changes), "config"))


def opened(config: ConfigDict | Mapping | str | None, **changes) -> ConfigDict:
    """A recipe as Python gives it: its path ("configs/sft.py", or "configs/sft.py:dft" with its argument), what `make` made, or
    None for the defaults; with `changes`, those of a stage under its name.

    Raises UserError for an unknown key, and for a change that would reach no stage because each has a setting of its own.
    """
    if isinstance(config, str):
        path, _, argument = located(config).partition(":")
        config = find(f"{path}:get_config", "configs")(*[argument] * bool(argument))
    given, changes = named(plain(config) or {}, DEFAULTS), named(changes, DEFAULTS)
    names = _stage_names({**given, **changes})
    changes |= {name: _onto(given.get(name, {}), changes[name]) for name in names if isinstance(changes.get(name), Mapping)}
    known = names + _idle({**given, **changes})
    whole = _merge(_merge(DEFAULTS, given, known, "config"), changes, known, "config")
    _check_reach(flat({k: v for k, v in changes.items() if k not in known}), whole, names)
    return ConfigDict(whole)


def hint(word: str, beside: Mapping) -> str:
    """What an unknown key was meant for: a setting of that name at another level, or the nearest of those beside it."""
    elsewhere = [path for path in flat(DEFAULTS) if path.rpartition(".")[2] == word]
    return f" Did you mean {' or '.join(map(repr, elsewhere))}?" if elsewhere else nearest(word, beside)


def located(path: str) -> str:
    """The path (with its `:argument`) of a recipe's file, or of the one of that name that came with jaxpost.

    Raises UserError where there is neither.
    """
    file, colon, argument = path.partition(":")
    own = Path(__file__).parent
    for place in (Path(file), own / file, own.parent / file):  # installed, recipes lie inside the package; in a clone beside it
        if place.is_file() and (place == Path(file) or file.startswith("configs/")):
            return f"{place}{colon}{argument}"
    have = sorted(p.name for folder in (own / "configs", own.parent / "configs") for p in folder.glob("[!_]*.py"))
    raise UserError(f"--config={file}: no such file. Give a recipe of your own, or one of configs/: {', '.join(have)}.")


def chosen(table: Mapping, argument: str):
    """What a recipe's table has for its argument, FILE.py:argument. Raises UserError where it has none, naming the nearest."""
    if argument not in table:
        raise UserError(f"--config=FILE.py:ARGUMENT: this recipe has no ARGUMENT {argument!r}.{nearest(argument, table)}")
    return table[argument]


def plain(value):
    """A setting as Python's own: a dict for a ConfigDict, anything else as it is."""
    return value.to_dict() if hasattr(value, "to_dict") else value


def has(config: Mapping, path: str) -> bool:
    """Whether a config has the key that a path such as sft.optimizer.lr names."""
    for part in path.split("."):
        if not isinstance(config, Mapping) or part not in config:
            return False
        config = config[part]
    return True


def put(config: ConfigDict, path: str, text: str) -> None:
    """Adds a keyword that the command line gives to a function."""
    *inner, key = path.split(".")
    for part in inner:
        if part not in config:
            raise UserError(f"--config.{path}: the recipe has no key {part!r} there.{nearest(part, config.keys())}")
        config = config[part]
    if not isinstance(config, ConfigDict):
        raise UserError(f"--config.{path}: the recipe has {config!r} there, and no keywords.")
    with config.unlocked(), config.ignore_type():
        config[key] = value_of(text)


def _onto(old: Mapping, new: Mapping) -> dict:
    """old updated by new, dicts into dicts unless they name a function."""
    inner = {k for k, v in new.items() if isinstance(v, Mapping) and isinstance(old.get(k), Mapping) and "name" not in v}
    return {**old, **{k: _onto(old[k], v) if k in inner else v for k, v in new.items()}}


def _stage_names(settings: Mapping) -> tuple[str, ...]:
    """The names of a recipe's stages, each of which is also the key of its own settings."""
    names = settings.get("stages", ())
    check("stages", (), names, "config")
    if len(set(names)) < len(names):
        raise UserError(f"config.stages: {names} names a stage twice.")
    if taken := set(names) & set(DEFAULTS):
        raise UserError(f"config.stages: {min(taken)!r} is a setting's name; call the stage something else.")
    return tuple(names)


def _idle(given: Mapping) -> tuple[str, ...]:
    """Stages that the command line took out of `stages`: their settings are still in the recipe."""
    others = {k: v for k, v in given.items() if k not in DEFAULTS and isinstance(v, Mapping)}
    return tuple(k for k, v in others.items() if v and v.keys() <= DEFAULTS.keys())


def stages(config: ConfigDict) -> list[tuple[str, ConfigDict]]:
    """(name, settings) of each stage in order, every key present. Raises UserError where the config does not add up."""
    given = plain(config)
    names = _stage_names(given)
    idle = _idle(given)
    whole = _merge(DEFAULTS, given, names + idle, "config")
    shared = {k: v for k, v in whole.items() if k not in names + idle}
    around, defaults = flat(shared), flat(DEFAULTS)
    if whole["result"] not in ("", *names):
        raise UserError(f"config.result: no stage {whole['result']!r}.{nearest(whole['result'], names)}")
    each = {name: _merge(shared, whole.get(name, {}), (), f"config.{name}") for name in (*names, *idle) if names}
    check_around(shared, each, defaults)
    _check_reach({k: v for k, v in around.items() if k not in defaults or v != defaults[k]}, given, names)
    done: dict[str, ConfigDict] = {}
    for name in names or ("train",):
        changes = given.get(name, {}) if names else {}
        settings = _merge(shared, changes, (), f"config.{name}" if names else "config")
        own = {**shared, **changes} if not names else changes
        place = f"config.{name}" if names else "config"
        settings = adapted(settings, [path for path in defaults if has(own, path)], defaults, place)
        done[name] = ConfigDict(linked(settings, "model" in own, done, place))
        with done[name].ignore_type():
            done[name].adapter = _adapter(name, settings["adapter"], done.get(done[name].start))
    return list(done.items())


def _check_reach(given: Mapping, whole: Mapping, names: tuple[str, ...]) -> None:
    """Raises UserError for a setting around the stages (given: flat) that reaches none of those that read it, because each has
    its own.
    """
    shared, defaults = _merge(DEFAULTS, {k: v for k, v in whole.items() if k in DEFAULTS}, (), "config"), flat(DEFAULTS)
    ignored = {name: dict(unread(_merge(shared, whole.get(name, {}), (), f"config.{name}"), defaults)) for name in names}
    for key, value in given.items():
        own = {name: _own(whole.get(name, {}), key) for name in names if key not in ignored[name]}
        if own and all(own.values()):
            places = ", ".join(f"config.{name}.{path}" for name, path in own.items())
            raise UserError(f"config.{key}: {value!r} reaches no stage, since each has its own; change {places}.")


def _own(stage: Mapping, path: str) -> str:
    """The path of what a stage has in place of the setting at a path around it, the same or all of a call; "" for nothing."""
    parts = path.split(".")
    for depth, part in enumerate(parts, start=1):
        if part not in stage:
            return ""
        stage = stage[part]
        if _replaces(part, stage):
            return ".".join(parts[:depth])
    return path


def _adapter(name: str, asked: Mapping | Sequence | str, before: ConfigDict | None) -> dict | tuple:
    """The adapter of a stage: its own, or that of the stage it starts from. Raises UserError for one over another."""
    asked = {"name": asked} if isinstance(asked, str) and asked else asked or {}
    inside = {} if before is None else plain(before.adapter)
    if asked and inside and asked != inside:
        raise UserError(f"config.{name}.adapter: the stage that it starts from has another; a weight takes one. Leave it out.")
    return asked or inside


def _merge(base: Mapping, changes: Mapping, extra: tuple, place: str, defaults: Mapping = DEFAULTS) -> dict:
    """base updated by changes, dicts into dicts. A dict with a `name` is a function's call: it is replaced, not merged."""
    merged = copy.deepcopy(dict(base))
    for key, value in changes.items():
        if key in extra:
            if not isinstance(value, Mapping):
                raise UserError(f"{place}.{key}: {value!r}; a stage is a dict of what differs from the settings around it.")
            _merge(DEFAULTS, value, (), f"{place}.{key}")
            merged[key] = {k: _stored(k, v, value.get("do")) for k, v in value.items()}
        elif key not in base:
            raise UserError(f"{place}: unknown key {key!r}.{_moved(key, value) or hint(key, base)}")
        elif isinstance(base[key], Mapping) and base[key] and not _replaces(key, value):
            inner = defaults.get(key, {})  # no dict where a function's keywords take the place of a text
            merged[key] = _merge(base[key], value, (), f"{place}.{key}", inner if isinstance(inner, Mapping) else {})
        else:
            if key in defaults:
                check(key, defaults[key], value, place)
            merged[key] = _stored(key, value, changes.get("do"))
    return merged


def _moved(key: str, value) -> str:
    """What took the place of a key of older recipes; "" for any other."""
    return f' It is now model="@{value}": a stage names the one whose weights it starts from.' if key == "start" else ""


def _replaces(key: str, value) -> bool:
    """Whether a value takes the place of the one before, not being a dict that is merged into it."""
    return not isinstance(value, Mapping) or "name" in value or key in WHOLE


def _stored(key: str, value, do: str | None):
    """The value as a ConfigDict takes it: no key with a dot, such as a file's name, and a merge's patterns as pairs, since a
    ConfigDict sorts its keys. do: the kind of stage, where it is given.
    """
    if key == "with":
        return _paired(value, every=do == "merge")
    if isinstance(value, Mapping):
        return tuple(value.items()) if key in ("data", "eval_data") else dict(value)
    return {"name": value} if key == "task" and value and isinstance(value, str) else value


def _paired(value, *, every: bool):
    """The value with pairs in place of each dict that has a key with a dot; every: and of each that has no `name`."""
    if isinstance(value, Mapping):
        items = {key: _paired(inner, every=every) for key, inner in value.items()}
        return tuple(items.items()) if any("." in key for key in items) or (every and "name" not in items) else items
    return tuple(_paired(inner, every=every) for inner in value) if isinstance(value, (list, tuple)) else value


def difference(old: Mapping, new: Mapping, free: Sequence[str] = FREE) -> list[str]:
    """Lines `key: old -> new` for what differs, the keys in `free` aside."""
    names = ("", *old.get("stages", ()), *new.get("stages", ()))
    free = tuple(f"{name}.{key}".lstrip(".") for name in names for key in free)
    old, new = (flat(json.loads(json.dumps(x))) for x in (old, new))
    keys = [k for k in sorted(old.keys() | new.keys()) if k not in free and not k.startswith(tuple(f"{key}." for key in free))]
    return [f"{k}: {old.get(k, '(absent)')!r} -> {new.get(k, '(absent)')!r}" for k in keys if old.get(k) != new.get(k)]


def flat(tree, prefix: str = "") -> dict:
    """A tree of dicts as {path: leaf}, with dots between."""
    if not isinstance(tree, Mapping):
        return {prefix: tree}
    return {k: v for key, value in tree.items() for k, v in flat(value, f"{prefix}.{key}" if prefix else key).items()}
