"""Which settings a stage reads: one that would be ignored is refused. For rollouts and generate, `data` names prompts."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from jaxpost.config.links import references
from jaxpost.config.resolve import entry_of
from jaxpost.errors import UserError

# The default task of recipes for reinforcement learning; `data` gives prompts in its place.
GSM8K = {"name": "gsm8k", "data": "tfds:gsm8k/train", "test": ""}  # "" tests on a tenth of data


def _of_rollouts(*names: str) -> tuple[str, ...]:
    return tuple(f"rollouts.{name}" for name in names)


# Groups of settings that some source does not read; all sources read the settings outside of them.
_FILES = (  # rows of files
    *("data", "eval_data", "columns", "row_columns", "order", "annotations", "train_on", "held_out", "split_seed"),
)
_PACKED = ("window", "packing")
_PASSES = ("epochs",)
_TESTED = ("eval_per_cell",)  # a task's test problems
_PROBLEMS = (  # a task's problems
    "eval_rows",
    *_of_rollouts("prompt_window", "new", "stop", "reward_workers", "reward_seconds", "reward_memory", "failed", "failures"),
)
_SAMPLING = _of_rollouts("group", "temperature", "top_k", "top_p", "min_p", "processors", "slots", "segment")
_ROLLOUTS = (  # completions that are sampled and learned from
    "completions",
    *_of_rollouts(
        "minibatches", "epochs", "lag", "steps", "given", "advantages", "resample", "drop_level", "overlong", "truncated"
    ),
    *_of_rollouts("mask_truncated", "correction", "correction_cap"),
)

# What each source does not read, and why.
_UNREAD: dict[str, tuple[tuple[tuple[str, ...], str], ...]] = {
    "data": ((_SAMPLING + _ROLLOUTS, "which draws no completions to learn from"),),
    "rollouts": (
        (_FILES, "whose batches are completions, not rows of files"),
        (_PACKED, "whose rows are as long as rollouts.prompt_window and rollouts.new make them"),
        (_PASSES, "which has no passes over data to count (rollouts.epochs is how often a batch is learned from)"),
    ),
}
# What stages that do not train read; their other settings are refused.
_MODEL = (
    *("model", "tokenizer", "adapter", "dtype", "remat", "attention", "attend", "mesh", "seed", "template", "template_options"),
    "artefacts",
)
_ROWS = ("data", "columns", "bad_rows")
_ENCODED = (
    *(*_ROWS, *_PACKED, "row_columns", "eval_data", "held_out", "split_seed", "train_on", "too_long", "shared_prefix"),
    "objective",
)
_BUDGET = tuple(f"budget.{what}" for what in ("rows", "completions", "tokens"))
# Kinds of do="generate" besides rows of a task's judged completions.
_SYNTHESIS, _ENDPOINT = "generate by prompt", "generate by endpoint"
_BY_PROMPT = ("data", "bad_rows", "task", "prompt", "parser", "filters", "budget", "round")
_REASONS = {
    _SYNTHESIS: "whose rows its prompt, parser and filters make",
    _ENDPOINT: "whose completions config.endpoint gives",
}
_READ = {
    "generate": (*_MODEL, "data", "rows", "task", "reward", "prompt", "endpoint", *_PROBLEMS, *_SAMPLING),
    _SYNTHESIS: (*_MODEL, *_BY_PROMPT, "eval_rows", *_of_rollouts("prompt_window", "new", "stop", "failures"), *_SAMPLING),
    _ENDPOINT: (
        *("artefacts", "seed", "endpoint", *_BY_PROMPT),
        *_of_rollouts("group", "new", "temperature", "top_p", "stop", "failures"),
    ),
    "annotate": (*_MODEL, *_ENCODED, "task", "with", "batch_size"),
    "select": ("artefacts", "seed", "data", "bad_rows", "task", "split_seed", "annotations", "with"),
    "merge": ("with", "of", "seed", "tokenizer", "dtype", "template", "template_options"),
    "evaluate": (*_MODEL, "evals"),
}
_OF_RECIPES = ("stages", "result")  # which are settings of no stage
# Settings that only stages that do not train read.
_OTHER_STAGES = ("with", "of", "rows", "prompt", "parser", "filters", "round", "endpoint", *_BUDGET)
_WITHOUT_TASK = (_TESTED + _PROBLEMS, "where no config.task has problems to ask")
_MIXED = ("rollouts", "data")


def shares(source: Mapping | str) -> dict[str, float]:
    """{name: share of a batch's rows} of the setting `source`: a name, or a dict of shares (JSON on the command line). Raises
    UserError for shares that do not add up to 1, and for sources that cannot be mixed.
    """
    source = source.to_dict() if hasattr(source, "to_dict") else source
    source = entry_of(source, "config.source")
    if isinstance(source, str):
        return {source: 1.0}
    amounts = {name: share for name, share in source.items() if isinstance(share, int | float)}
    if amounts.keys() != set(_MIXED) & source.keys() or len(source) < 2 or len(amounts) < len(source):
        raise UserError(f"config.source: {dict(source)}; shares are numbers, of {' and '.join(_MIXED)}.")
    if min(amounts.values()) <= 0 or abs(sum(amounts.values()) - 1) > 1e-6:
        raise UserError(f"config.source: {amounts}; shares are above 0 and add up to 1.")
    return amounts


def adapted(settings: dict, paths: Iterable[str], defaults: Mapping, place: str) -> dict:
    """A stage's settings, with the task `prompts` where `data` names prompts.

    paths: the settings that are the stage's own, maybe all; another stage may read those around several stages. defaults:
    {path: value}. place: as "config.sft". Raises UserError for a setting that the stage would not read.
    """
    changed = {path for path in paths if path in defaults and _differs(settings, path, defaults[path])}
    if (_kind(settings) == "generate" or shares(settings["source"]).keys() == {"rollouts"}) and "data" in changed:
        settings = _of_prompts(settings, place)
        changed -= {"data", "eval_data", "columns", "held_out"}
    for path, why in unread(settings, defaults):
        if path in changed:
            raise _ignored(f"{place}.{path}", _value_at(settings, path), f"{_called(settings)}, {why}", defaults[path])
    # Rows of earlier stages have the standard names; `columns` around the stages is for other files.
    of_stages = "columns" not in paths and any(references(settings["data"]))
    return settings | ({"columns": defaults["columns"]} if of_stages else {})


def _kind(settings: Mapping) -> str:
    """What a stage does, as _READ names it: its `do`, and how rows are generated."""
    if settings["do"] != "generate" or not (settings["prompt"] or settings["endpoint"]):
        return settings["do"]
    return _ENDPOINT if settings["endpoint"] else _SYNTHESIS


def _called(settings: Mapping) -> str:
    """A stage as a message names it: by its source, or by `do`."""
    return f"source={settings['source']!r}" if settings["do"] == "train" else f"do={settings['do']!r}"


def check_around(shared: Mapping, stages: Mapping[str, dict], defaults: Mapping) -> None:
    """Raises UserError for a setting around several stages that no stage reads. stages: {name: its settings}, including stages
    that a command leaves out, since the setting may be theirs.
    """
    passed = {name: dict(unread(settings, defaults)) for name, settings in stages.items()}
    for path, default in defaults.items() if stages else ():
        if path not in _OF_RECIPES and _differs(shared, path, default) and all(path in each for each in passed.values()):
            name, why = next((name, each[path]) for name, each in passed.items())
            reader = f"any of {', '.join(stages)} ({name} has {_called(stages[name])}, {why})"
            raise _ignored(f"config.{path}", _value_at(shared, path), reader, default)


def unread(settings: Mapping, defaults: Mapping) -> Iterator[tuple[str, str]]:
    """(path, reason) of each setting that a stage with these settings does not read, because of its `do` or its source."""
    if (read := _READ.get(kind := _kind(settings))) is not None:
        readable = {*read, "do"}
        others = (path for path in defaults if not readable & {path, path.partition(".")[0]})
        yield from ((path, _REASONS.get(kind, "which does not train")) for path in others)
        return
    names = shares(settings["source"])
    # A dict of annotators works on any batch; folders hold columns of rows in files.
    kept = ("annotations",) if isinstance(settings["annotations"], Mapping) else ()
    each = [{path: why for paths, why in _UNREAD.get(name, ()) for path in paths} for name in names]
    for path in (path for path in each[0] if path not in kept and all(path in other for other in each)):
        yield path, each[0][path]
    without_task = [] if settings["task"] or names.keys() != {"data"} else [_WITHOUT_TASK]
    for paths, why in (*without_task, (_OTHER_STAGES, "which trains")):
        yield from ((path, why) for path in paths)


def _ignored(path: str, value: Any, reader: str, default: Any) -> UserError:
    """The error for a setting that is not read; reader: what does not read it, and why."""
    return UserError(f"{path}: {value!r} is not read by {reader}; leave it out, or at its default {default!r}.")


def _differs(settings: Mapping, path: str, default: Any) -> bool:
    """Whether a setting differs from its default; JSON turns a tuple into a list."""
    value = _value_at(settings, path)
    return (tuple(value) if isinstance(value, list) else value) != default


def _value_at(tree: Mapping, path: str) -> Any:
    """The value at a path such as rollouts.new; of a function's keyword, where only its name is given, that name."""
    for part in path.split("."):
        tree = tree[part] if isinstance(tree, Mapping) else tree
    return tree


def _of_prompts(settings: dict, place: str) -> dict:
    data: Any = settings["data"]
    if settings["task"] not in ({}, GSM8K):
        raise UserError(
            f"{place}.data: {data!r}; the prompts of {_called(settings)} are those of {place}.task, "
            f"{settings['task'].get('name')}. Leave data out, or give task=dict(name='prompts', data=...)."
        )
    if not settings["reward"]:
        raise UserError(f"{place}.reward: a file of prompts has no reward of its own; name one, as mine.py:reward.")
    if not isinstance(data, str) or not isinstance(settings["eval_data"], str) or "=" in data.rpartition("/")[2]:
        raise UserError(f"{place}.data: {data!r}; prompts are files with commas between them, without weights.")
    task = {"name": "prompts", "data": data, "test": settings["eval_data"], "columns": settings["columns"]}
    task |= {"held_out": settings["held_out"]} if settings["held_out"] else {}
    return {**settings, "task": task, "data": "", "eval_data": "", "columns": ""}
