"""The settings of a run: every key of the loop on one page, with its default.

A recipe is a file with `get_config(arg) -> ConfigDict` that calls `make` with what it changes. Where a key holds a dict with a
`name`, the name is a function's and the other keys are its keyword arguments; nothing of a method is described here.

A recipe may run several stages: `stages` names them in order, and a key of each name holds what differs from the settings
around it. A stage makes one artefact of earlier ones, which it names with an @: weights (train, merge), rows (generate,
select), columns (annotate) or figures (evaluate). A stage whose settings name no `model` starts from the last weights before
it.
"""

import copy
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from ml_collections import ConfigDict

from jaxpost.errors import UserError
from jaxpost.links import linked
from jaxpost.naming import named
from jaxpost.resolve import find, nearest, value_of
from jaxpost.unread import GSM8K as GSM8K  # for recipes, which import nothing else
from jaxpost.unread import adapted, check_around

DEFAULTS = {
    "seed": 0,  # of fresh weights, of the data's order and of all sampling; evaluation has noise of its own, always the same
    "stages": (),  # names, in order; () is one stage called "train" with the settings as they stand
    "result": "",  # the stage whose weights generate and export take from the workdir; "" is the last
    "do": "train",  # what a stage does: train, generate, annotate, select, merge or evaluate (stages/)
    "with": "",  # the function that annotate, select and merge apply, by name or as a dict with one
    "of": (),  # merge: the models, each like `model`
    "rows": "demonstrations",  # generate: the row type of the rows that a prompt's completions give (stages/generate.py)
    # Where artefacts go, shared with other runs: what another run has made there is taken. "" is the workdir.
    "artefacts": "",
    # The model: a folder with config.json and safetensors, a workdir, a name on the hub, the fields of a config.json to start
    # from scratch, "@NAME" of an earlier stage, or "recipe:PATH[:ARG]", a recipe that is run on first use and kept.
    "model": "",
    "tokenizer": "",  # a folder, or a function's name (tasks.arithmetic.tokenizer); "" is the model folder's own
    # Of the computation: float32 or bfloat16; parameters and optimizer are float32. Products of float32 are as exact as jax's
    # default is on the device (bfloat16 passes on a TPU, unless JAX_DEFAULT_MATMUL_PRECISION=highest). With bfloat16 the
    # gradients of layers' matrices and of the head are rounded to it before they are added across devices.
    "dtype": "float32",
    # What a layer keeps for the backward pass: none (all of it), dots (what weights multiplied), attention (splash's output and
    # the layer's input; without splash the same as full), full (its input alone).
    "remat": "none",
    # Over whole rows: xla, splash (TPU), cudnn (GPU), auto (the platform's fast one). Where a kernel cannot, xla takes its
    # place: splash with a window that is no multiple of 128 or a shared prefix, cudnn with float32 (models/attention.py).
    "attention": "auto",
    # What goes around the model's weights, which are then frozen: dict(name="lora", rank=8, alpha=16.0), of adapters/. A stage
    # that starts from one with an adapter trains it on.
    "adapter": {},
    # Pattern over parameter paths; the others are frozen and cost no optimizer memory, nor room in checkpoints where a folder
    # holds them. With an adapter ".*" means what it adds.
    "trainable": ".*",
    "objective": {"name": "sft.nll"},
    # Where batches come from: "data" (files, or the task's demonstrations), "rollouts" (completions of the current weights), or
    # both in each batch, by shares of its rows: {"rollouts": 0.75, "data": 0.25} (sources.py).
    "source": "data",
    # Files, folders, patterns, tfds:NAME/SPLIT, hf:NAME (data/readers.py) or "@NAME" of an earlier stage, with commas between
    # several, and =WEIGHT after each for a mixture (data/mixture.py); "" is the task's demonstrations.
    "data": "",
    "eval_data": "",  # the same, held out for evaluation; "" takes `held_out` from data
    "columns": "",  # the data's own names for columns of a shape: "prompt=problem,completion=solution", or a dict
    "row_columns": "",  # keys of the rows, with commas, whose numbers become columns; those that the objective reads do anyway
    # In which order to learn from them, of data/transforms/order.py: dict(name="by", column="difficulty"); "" is shuffled.
    "order": "",
    "bad_rows": "stop",  # of a row that cannot be learned from, or a problem asked: stop the run, or skip it (counted and told)
    "held_out": 0.0,  # how much of data to hold out: a share below 1, or a number of examples
    "split_seed": 0,  # decides which these are, and a task's demonstrations: the same for each `seed`, so that seeds compare
    "template": "",  # chat template: plain, chatml, llama3, gemma, or Jinja; "" is the tokenizer's own
    "template_options": "",  # values for variables that it reads: "enable_thinking=false", or a dict
    "train_on": "assistant",  # assistant, last, completion, all
    "window": 512,  # tokens a row
    "packing": True,  # several documents a row, by a plan
    "shared_prefix": False,  # pairs: the prompt once, with both answers as branches behind it
    # Columns that models make: folders, or "@NAME" of an earlier stage, with commas between several; or annotators with the
    # weights that they take (start, current, or a model): {"harder": {"name": "perplexity", "weights": "FOLDER"}}
    # (annotations.py).
    "annotations": "",
    "too_long": "error",  # an example longer than the window: error, truncate, split (into pieces), drop; a prompt is never cut
    # dict(name="arithmetic", ...): problems, demonstrations and a reward from one module. Of its keys `examples` is how many
    # demonstrations or prompts of samples there are, `problems` how many problems are drawn, round and round (0: all).
    "task": {},
    # What judges completions in place of the task's own reward: a function (record, completion) -> float or None, by name or as
    # a dict with one; or several, {"format": {"name": "format.tags", "weight": 0.2}, "right": "task"}, "task" being the task's
    # own and "task.NAME" another of its functions. A weight of 0 makes a figure of it.
    "reward": "",
    "rollouts": {
        "group": 8,  # completions of a prompt
        "prompt_window": 64,  # tokens of a prompt at most
        "new": 64,  # and of a completion
        "temperature": 1.0,
        "top_k": 0,  # 0, 1 and 0 restrict nothing (sampling/processors.py); what they restrict needs a correction
        "top_p": 1.0,
        "min_p": 0.0,
        "processors": "",  # of sampling/processors.py: names with commas, or a list of names and dicts with keywords
        "stop": (),  # what ends a completion besides: texts, and in place of the tokenizer's own ids others, as (1, "END")
        "slots": 0,  # completions under way at a time; 0 is all of them
        "segment": 32,  # tokens between two looks of the host
        "minibatches": 1,  # training batches that a batch of rollouts makes
        "epochs": 1,  # how often each is learned from
        "lag": 0,  # by how many batches of rollouts learning is behind, so that rewards may take their time
        "advantages": "",  # of rollouts/advantages.py, by name or as a dict with one; "" is the objective's own
        "steps": "",  # functions of rollouts/steps.py or one's own, ("annotate", "mine.py:f"); "" is what the keys below ask
        "given": "",  # the first tokens of completions: a function of rollouts/given.py, by name or as a dict with one
        "resample": 0,  # how often at most to sample more prompts, in place of groups whose rewards (but for length) are equal
        "drop_level": False,  # do not learn from groups whose rewards are all equal, nor count them
        "overlong": 0,  # the last tokens of `new` over which a punishment for length grows to -1
        "truncated": 0.0,  # added to the reward of a completion that nothing but the limit ended, as with -0.5
        "mask_truncated": False,  # do not learn from such completions; the objective says whether they are counted
        "correction": "",  # for a sampler whose probabilities are not the trainer's: truncate (tokens), mask (completions)
        "correction_cap": 2.0,
        # Processes that rewards run in, each killed when one hangs; 0 is this process, where a loop in C cannot be stopped.
        "reward_workers": 4,
        "reward_memory": 8.0,  # GiB that each may allocate, on Linux; a reward that asks for more fails. 0 is no limit
        "reward_seconds": 10.0,  # after which a reward has failed, as it has when it raises or gives what is no number
        "failed": 0.0,  # what a failed reward counts as
        "failures": 0.1,  # the share of a batch's verdicts past which failures stop the run
    },
    # The length of the run: steps, or passes over the data where steps is 0.
    "batch_size": 8,  # rows, over all devices and microbatches
    "microbatches": 1,
    "steps": 0,
    "epochs": 1,
    # End when the training time of the named stages (with commas) is used up; steps is then only the schedule's length.
    "time_of": "",
    "tokens_of": "",  # the same for the tokens that they trained on (num_tokens); of both, what is used up first ends the stage
    "optimizer": {
        "lr": 2e-5,
        "schedule": "cosine",  # cosine, linear, constant, wsd
        "warmup": 0.03,  # steps, or a share of them if below 1
        "end": 0.1,  # the last learning rate, as a share of lr
        "b1": 0.9,
        "b2": 0.999,
        "eps": 1e-8,
        "weight_decay": 0.0,
        "decay": "(kernel(/[ab])?|weight)$",  # pattern of the paths that decay
        "clip": 1.0,  # of the gradient's global norm; 0 is off
    },
    "ema": 0.0,  # decay of a running mean of the weights; 0 keeps none
    "max_skipped": 10,  # updates left out in a row, for not being finite, after which the run stops
    "mesh": {"data": -1, "fsdp": 1, "tensor": 1},
    "topology": "",  # the machine that the recipe was made for, e.g. v5e:2x4: what jaxpost.fit compiles for
    # When to write, evaluate and save (in steps; 0 is only at the end), and what to keep.
    "log_every": 10,
    "term_norms": False,  # log the norm of each term's gradient as well (grad_norm/TERM), at a backward pass a term
    "eval_every": 0,
    "save_every": 0,
    "keep": 2,
    # Every so many steps of rollouts, all completions with their rewards and advantages go to completions/STAGE/STEP.parquet,
    # and some are shown on a terminal.
    "completions": 0,
    "profile": 0,  # steps of each stage to trace, once it is under way (profile.py)
    "best": "eval/loss",  # the metric whose best checkpoint stays as well
    "highest": False,  # whether more of it is better
    "eval_rows": 64,  # completions at a time, of evaluation and of generate
    "eval_per_cell": 50,  # test problems of each of the task's cells
    # Evals besides the stage's own held-out loss and test problems, run with them: {NAME: a function of evals/ by name, or a
    # dict with its keywords}, as {"gsm8k": {"name": "accuracy", "task": {"name": "gsm8k", "data": "F.jsonl"}}}. Figures are
    # eval/NAME/FIGURE. One that takes a `template` has the stage's; all else of an eval is its own keywords.
    "evals": {},
}

# What may differ between a workdir and the command that continues it, since it changes nothing that is learned.
FREE = (
    "attention",
    "result",
    "topology",
    "log_every",
    "eval_every",
    "save_every",
    "keep",
    "eval_rows",
    "eval_per_cell",
    "evals",
    "mesh",
    "max_skipped",
    "remat",
    "profile",
    "completions",
    "rollouts.reward_workers",
    "rollouts.reward_memory",
)

# Keys that count something and must be at least 1; other numbers must not be negative.
COUNTS = (
    *("window", "batch_size", "microbatches", "epochs", "keep", "max_skipped", "eval_rows", "eval_per_cell"),
    *("prompt_window", "new", "group", "segment", "minibatches"),
)


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
    _check("stages", (), names, "config")
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
    _check_reach({k: v for k, v in around.items() if k not in defaults or v != defaults[k]}, given, names)
    if whole["result"] not in ("", *names):
        raise UserError(f"config.result: no stage {whole['result']!r}.{nearest(whole['result'], names)}")
    each = {name: _merge(shared, whole.get(name, {}), (), f"config.{name}") for name in (*names, *idle) if names}
    check_around(shared, each, defaults)
    done: dict[str, ConfigDict] = {}
    for name in names or ("train",):
        changes = given.get(name, {}) if names else {}
        settings = _merge(shared, changes, (), f"config.{name}" if names else "config")
        own = {**shared, **changes} if not names else changes
        place = f"config.{name}" if names else "config"
        settings = adapted(settings, [path for path in defaults if has(own, path)], defaults, place)
        done[name] = ConfigDict(linked(settings, "model" in own, done, place))
        done[name].adapter = _adapter(name, settings["adapter"], done.get(done[name].start))
    return list(done.items())


def _check_reach(given: Mapping, whole: Mapping, names: tuple[str, ...]) -> None:
    """Raises UserError for a setting around the stages (given: flat) that reaches none of them, because each has its own."""
    for key, value in given.items() if names else ():
        own = [_own(whole.get(name, {}), key) for name in names]
        if all(own):
            told = ", ".join(f"config.{name}.{path}" for name, path in zip(names, own, strict=True))
            raise UserError(f"config.{key}: {value!r} reaches no stage, since each has its own; change {told}.")


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


def _adapter(name: str, asked: Mapping | str, before: ConfigDict | None) -> dict:
    """The adapter of a stage: its own, or that of the stage it starts from. Raises UserError for one over another."""
    asked = {"name": asked} if isinstance(asked, str) and asked else dict(asked or {})
    inside = {} if before is None else before.adapter.to_dict()
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
            merged[key] = {k: _stored(k, v) for k, v in value.items()}
        elif key not in base:
            raise UserError(f"{place}: unknown key {key!r}.{_moved(key, value) or hint(key, base)}")
        elif isinstance(base[key], Mapping) and base[key] and not _replaces(key, value):
            merged[key] = _merge(base[key], value, (), f"{place}.{key}", defaults.get(key, {}))
        else:
            if key in defaults:
                _check(key, defaults[key], value, place)
            merged[key] = _stored(key, value)
    return merged


def _moved(key: str, value) -> str:
    """What took the place of a key of older recipes; "" for any other."""
    return f' It is now model="@{value}": a stage names the one whose weights it starts from.' if key == "start" else ""


def _replaces(key: str, value) -> bool:
    """Whether a value takes the place of the one before, not being a dict that is merged into it."""
    return not isinstance(value, Mapping) or "name" in value or key in _WHOLE


def _stored(key: str, value):
    """The value as a ConfigDict takes it: no key with a dot, such as a file's name."""
    if isinstance(value, Mapping):
        return tuple(value.items()) if key in ("data", "eval_data") else dict(value)
    return {"name": value} if key == "task" and value and isinstance(value, str) else value


_WHOLE = ("columns", "template_options", "annotations", "source", "evals", "with")  # dicts of names: a change replaces them
_KINDS = {bool: (bool,), int: (int,), float: (float, int), str: (str,), tuple: (tuple, list), dict: (Mapping,)}


def _check(key: str, default, value, place: str) -> None:
    """Raises UserError for a value that is not of its default's kind, and for a number out of range."""
    whole = ("model", "objective", "reward", "adapter", "advantages", "given", "task", "order", *_WHOLE)
    kinds = (str, Mapping) if key in whole else _KINDS[type(default)]
    if key in ("data", "eval_data", "processors", "steps") and default == "":
        kinds = (str, tuple, list) if key == "steps" else (str, Mapping, tuple, list)
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        wanted = " or ".join("dict" if k is Mapping else k.__name__ for k in kinds)
        raise UserError(f"{place}.{key}: {value!r} is no {wanted}.")
    if key == "source" and value == "samples":
        raise UserError(
            f"{place}.source: 'samples' is now a stage of its own: drawn={{'do': 'generate', 'rows': 'pairs', ...}} before "
            "this one, in config.stages too, and data='@drawn' here."
        )
    signed = key in ("data", "fsdp", "tensor", "truncated", "failed")  # a mesh axis of -1 takes what the others leave
    least = int(key in COUNTS)
    if isinstance(value, (int, float)) and not signed and not value >= least:
        raise UserError(f"{place}.{key}: {value!r}; it must be at least {least}.")
    if isinstance(value, float) and math.isinf(value):
        raise UserError(f"{place}.{key}: {value!r}; it must be finite.")
    if key in ("seed", "split_seed") and value >= 2**32:  # jax would take the rest of a division by it, 0 for 2**32
        raise UserError(f"{place}.{key}: {value!r}; it must be below 2**32.")
    if key == "warmup" and value > 1 and value != int(value):
        raise UserError(f"{place}.{key}: {value!r}; give a whole number of steps, or a share of them below 1.")
    if key in ("ema", "b1", "b2") and value >= 1:
        raise UserError(f"{place}.{key}: {value!r}; a decay is below 1.")
    if key == "temperature" and value == 0:
        raise UserError(f"{place}.{key}: a greedy policy has no gradient; give a temperature above 0.")


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
