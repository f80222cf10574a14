"""The settings of a run: every key of the loop on one page, with its default.

A recipe is a file with `get_config(arg) -> ConfigDict` that calls `make` with what it changes. Where a key holds a dict with a
`name`, the name is a function's and the other keys are its keyword arguments; nothing of a method is described here.

A recipe may run several stages, each starting from the last one's weights: `stages` names them in order, and a key of each name
holds what differs from the settings around it.
"""

import copy
import json
from collections.abc import Mapping

from ml_collections import ConfigDict

from jaxpost.errors import UserError
from jaxpost.resolve import nearest

DEFAULTS = {
    "seed": 0,
    "stages": (),  # names, in order; () is one stage called "train" with the settings as they stand
    "result": "",  # the stage whose weights generate and export take from the workdir; "" is the last
    "start": "",  # the stage whose weights to start from; "" is the one before (the model itself for the first)
    # The model: a folder with config.json and safetensors, or the fields of a config.json to start from scratch.
    "model": "",
    "tokenizer": "",  # a folder, or a function's name (tasks.arithmetic.tokenizer); "" is the model folder's own
    # Of the computation: float32 or bfloat16; parameters and optimizer are float32. Products of float32 are as exact as jax's
    # default is on the device (bfloat16 passes on a TPU, unless JAX_DEFAULT_MATMUL_PRECISION=highest).
    "dtype": "float32",
    "remat": "none",  # what a layer keeps for the backward pass: none (all of it), dots, full (its input alone)
    "trainable": ".*",  # pattern over parameter paths; the others are frozen and cost no optimizer memory
    "objective": {"name": "sft.nll"},
    # Where batches come from: "data" (files, or the task's demonstrations) or "rollouts" (completions of the current weights).
    "source": "data",
    "data": "",  # a .jsonl or .json file; "" is the task's demonstrations
    "eval_data": "",  # a file held out for evaluation; "" takes `held_out` from data
    "held_out": 0.0,  # how much of data to hold out: a share below 1, or a number of examples
    "template": "",  # chat template: a name, or Jinja; "" is the tokenizer's own
    "train_on": "assistant",  # assistant, last, completion, all
    "window": 512,  # tokens a row
    "packing": True,  # several documents a row, by a plan
    "too_long": "error",  # an example longer than the window: error, truncate, drop
    "task": {},  # dict(name="arithmetic", ...): problems, demonstrations and a reward from one module
    "rollouts": {"group": 8, "prompt_window": 64, "new": 64, "temperature": 1.0},
    # The length of the run: steps, or passes over the data where steps is 0.
    "batch_size": 8,  # rows, over all devices and microbatches
    "microbatches": 1,
    "steps": 0,
    "epochs": 1,
    "time_of": "",  # end when the named stage's training time is used up; steps is then only the schedule's length
    "optimizer": {
        "lr": 2e-5,
        "schedule": "cosine",  # cosine, linear, constant, wsd
        "warmup": 0.03,  # steps, or a share of them if below 1
        "end": 0.1,  # the last learning rate, as a share of lr
        "b1": 0.9,
        "b2": 0.999,
        "eps": 1e-8,
        "weight_decay": 0.0,
        "decay": "(kernel|weight)$",  # pattern of the paths that decay
        "clip": 1.0,  # of the gradient's global norm; 0 is off
    },
    "ema": 0.0,  # decay of a running mean of the weights; 0 keeps none
    "max_skipped": 10,  # updates left out in a row, for not being finite, after which the run stops
    "mesh": {"data": -1, "fsdp": 1, "tensor": 1},
    # When to write, evaluate and save (in steps; 0 is only at the end), and what to keep.
    "log_every": 10,
    "eval_every": 0,
    "save_every": 0,
    "keep": 2,
    "best": "eval/loss",  # the metric whose best checkpoint stays as well
    "highest": False,  # whether more of it is better
    "eval_rows": 64,  # evaluation rows generated at a time
    "eval_per_cell": 50,  # test problems of each of the task's cells
}

# What may differ between a workdir and the command that continues it, since it changes nothing that is learned.
FREE = ("result", "log_every", "eval_every", "save_every", "keep", "eval_rows", "eval_per_cell", "mesh", "max_skipped", "remat")

# Keys that count something and must be at least 1; other numbers must not be negative.
COUNTS = (
    "window",
    "batch_size",
    "microbatches",
    "epochs",
    "keep",
    "max_skipped",
    "eval_rows",
    "eval_per_cell",
    "prompt_window",
    "new",
)


def make(**changes) -> ConfigDict:
    """The defaults with `changes`; nested dicts are merged. Raises UserError for an unknown key, naming the nearest."""
    return ConfigDict(_merge(DEFAULTS, changes, _stage_names(changes), "config"))


def _stage_names(settings: Mapping) -> tuple[str, ...]:
    """The names of a recipe's stages, each of which is also the key of its own settings."""
    names = settings.get("stages", ())
    _check("stages", (), names, "config")
    if len(set(names)) < len(names):
        raise UserError(f"config.stages: {names} names a stage twice.")
    if taken := set(names) & set(DEFAULTS):
        raise UserError(f"config.stages: {min(taken)!r} is a setting's name; call the stage something else.")
    return tuple(names)


def stages(config: ConfigDict) -> list[tuple[str, ConfigDict]]:
    """(name, settings) of each stage in order, every key present. Raises UserError where the config does not add up."""
    plain = config.to_dict()
    names = _stage_names(plain)
    # A stage that the command line took out of `stages` still has its settings in the recipe.
    others = {k: v for k, v in plain.items() if k not in DEFAULTS and isinstance(v, Mapping)}
    idle = tuple(k for k, v in others.items() if v and v.keys() <= DEFAULTS.keys())
    whole = _merge(DEFAULTS, plain, names + idle, "config")
    shared = {k: v for k, v in whole.items() if k not in names + idle}
    if whole["result"] not in ("", *names):
        raise UserError(f"config.result: no stage {whole['result']!r}.{nearest(whole['result'], names)}")
    found = []
    for name in names or ("train",):
        changes = plain.get(name, {}) if names else {}
        settings = _merge(shared, changes, (), f"config.{name}" if names else "config")
        for key in ("start", "time_of"):
            if settings[key] and settings[key] not in [n for n, _ in found]:
                raise UserError(f"config.{name}.{key}: no stage {settings[key]!r} comes before {name!r}.")
        found.append((name, ConfigDict(settings)))
    return found


def _merge(base: Mapping, changes: Mapping, extra: tuple, place: str, defaults: Mapping = DEFAULTS) -> dict:
    """base updated by changes, dicts into dicts. A dict with a `name` is a function's call: it is replaced, not merged."""
    merged = copy.deepcopy(dict(base))
    for key, value in changes.items():
        if key in extra:
            if not isinstance(value, Mapping):
                raise UserError(f"{place}.{key}: {value!r}; a stage is a dict of what differs from the settings around it.")
            merged[key] = _merge(DEFAULTS, value, (), f"{place}.{key}") and dict(value)
        elif key not in base:
            raise UserError(f"{place}: unknown key {key!r}.{nearest(key, base)}")
        elif isinstance(base[key], Mapping) and isinstance(value, Mapping) and base[key] and "name" not in value:
            merged[key] = _merge(base[key], value, (), f"{place}.{key}", defaults.get(key, {}))
        else:
            if key in defaults:
                _check(key, defaults[key], value, place)
            merged[key] = dict(value) if isinstance(value, Mapping) else value
    return merged


_KINDS = {bool: (bool,), int: (int,), float: (float, int), str: (str,), tuple: (tuple, list), dict: (Mapping,)}


def _check(key: str, default, value, place: str) -> None:
    """Raises UserError for a value that is not of its default's kind, and for a number out of range."""
    kinds = (str, Mapping) if key in ("model", "objective") else _KINDS[type(default)]
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        wanted = " or ".join("dict" if k is Mapping else k.__name__ for k in kinds)
        raise UserError(f"{place}.{key}: {value!r} is no {wanted}.")
    signed = key in ("data", "fsdp", "tensor")  # a mesh axis of -1 takes what the others leave
    least = int(key in COUNTS)
    if isinstance(value, (int, float)) and not signed and not value >= least:
        raise UserError(f"{place}.{key}: {value!r}; it must be at least {least}.")
    if key in ("ema", "b1", "b2") and value >= 1:
        raise UserError(f"{place}.{key}: {value!r}; a decay is below 1.")
    if key == "temperature" and value == 0:
        raise UserError(f"{place}.{key}: a greedy policy has no gradient; give a temperature above 0.")


def difference(old: Mapping, new: Mapping) -> list[str]:
    """Lines `key: old -> new` for what differs in a way that matters; see FREE."""
    names = ("", *old.get("stages", ()), *new.get("stages", ()))
    free = tuple(f"{name}.{key}".lstrip(".") for name in names for key in FREE)
    old, new = (_flat(json.loads(json.dumps(x))) for x in (old, new))
    keys = [k for k in sorted(old.keys() | new.keys()) if k not in free and not k.startswith(tuple(f"{key}." for key in free))]
    return [f"{k}: {old.get(k, '(absent)')!r} -> {new.get(k, '(absent)')!r}" for k in keys if old.get(k) != new.get(k)]


def _flat(tree, prefix: str = "") -> dict:
    if not isinstance(tree, Mapping):
        return {prefix: tree}
    return {k: v for key, value in tree.items() for k, v in _flat(value, f"{prefix}.{key}" if prefix else key).items()}
