"""The plan of a stage: everything that can go wrong before anything is compiled.

A stage's settings name functions, files, a model and sizes. `plan_stage` reads, resolves and checks all of them; what it
gives is ready to run, and no weights have been read yet.
"""

import math
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxpost import optim, sharding
from jaxpost.data import chat, mixture, source, templates
from jaxpost.data.readers import Record
from jaxpost.errors import UserError
from jaxpost.models import loading
from jaxpost.resolve import bind, module, resolve
from jaxpost.rollouts.source import Rollouts


class Plan(NamedTuple):
    """A stage, checked and ready: nothing of it is compiled yet, and no weights are read."""

    name: str
    settings: Any
    found: loading.Description
    objective: Callable
    source: Any  # state -> batch, with a position
    steps: int
    held_out: list  # this process's batches for evaluation
    data: str  # a digest of what is learned from; "" for rollouts
    problems: dict | None  # what evaluate.accuracy takes, for a task
    example: dict | None  # one encoded example, to be shown
    trainable: str  # pattern of the paths that train
    trained: int  # how many parameters that is


def plan_stage(name: str, s, mesh) -> Plan:
    """Reads, resolves and checks everything that a stage's settings name."""
    found = loading.describe(_plain(s.model), s.tokenizer, s.dtype, s.remat, _plain(s.adapter))
    loading.check(found)
    objective = resolve(_plain(s.objective), "objectives")
    trainable = optim.ADDED if found.adapter and s.trainable == ".*" else s.trainable
    train, _ = optim.partition(loading.abstract(found.transformer, mesh, found.adapter), trainable)
    trained = sum(x.size for x in jax.tree.leaves(train))
    if s.window > (most := found.transformer.arch.max_positions):
        raise UserError(f"config.window: {s.window} tokens, but the model takes {most}; give that at most.")
    if s.batch_size % (rows := s.microbatches * mesh.shape["data"] * mesh.shape["fsdp"]):
        raise UserError(
            f"config.batch_size: {s.batch_size} rows do not divide over microbatches x data x fsdp = {rows}; use a multiple."
        )
    if found.tokenizer is None:
        raise UserError(
            "config.tokenizer: the model comes without one; name a folder that has one, or a function that makes one."
        )
    if s.reward and not s.task:
        raise UserError("config.reward: there is no config.task whose completions it could judge.")
    task = _task(s) if s.task else None
    reward = None if task is None else _reward(task, s)
    problems = None if task is None else _problems(task, reward, found, s)
    if s.source == "rollouts":
        batches, held_out, example, data, steps = _rollouts(task, reward, found, s, mesh), [], None, "", s.steps
        if not steps:
            raise UserError("config.steps: rollouts have no epochs; say how many steps to take.")
    elif s.source == "data":
        batches, held_out, example, data = _data(task, found, s, mesh)
        steps = s.steps or len(batches)
    else:
        raise UserError(f"config.source: {s.source!r} is neither 'data' nor 'rollouts'.")
    longest, most = s.rollouts.prompt_window + s.rollouts.new, found.transformer.arch.max_positions
    if task is not None and longest > most:
        raise UserError(f"config.rollouts: prompt_window + new = {longest} tokens, but the model takes {most}.")
    optim.make(s.optimizer, steps)
    return Plan(name, s, found, objective, batches, steps, held_out, data, problems, example, trainable, trained)


def _plain(value):
    return value.to_dict() if hasattr(value, "to_dict") else value


def _task(s):
    """The module that the task's settings name, with all that this stage will ask of it."""
    found = module(s.task.get("name", ""), "tasks")
    needed = (
        ["record", "test_records"]
        + ([] if s.reward else ["reward"])
        + (["conversation"] if s.source == "data" and not s.data else [])
    )
    if missing := [name for name in needed if not callable(getattr(found, name, None))]:
        raise UserError(f"config.task: {s.task['name']} has no function {missing[0]}; CONTRIBUTING.md lists what a task has.")
    return found


def _task_options(s) -> dict:
    return {k: v for k, v in _plain(s.task).items() if k not in ("name", "examples")}


def _reward(task, s) -> Callable:
    """The judge of completions: config.reward, or the task's own; a UserError where it gives no finite number."""
    own, place = resolve(_plain(s.reward), "rewards") if s.reward else task.reward, s.reward or f"task {s.task['name']}"

    def judged(record, completion) -> float:
        value = own(record, completion)
        if not isinstance(value, (bool, int, float, np.number, np.bool_)) or not math.isfinite(value):
            raise UserError(
                f"reward of {place}: gave {value!r} for the completion {completion[:60]!r}; it must be a finite number."
            )
        return float(value)

    return judged


def _problems(task, reward, found, s) -> dict:
    options = {"prompt_window": s.rollouts.prompt_window, "new": s.rollouts.new, "template": template(found, s)}
    records = task.test_records(s.eval_per_cell)
    _check_prompts(((r, f"test problem {i}") for i, r in enumerate(records)), found, s)
    return {"records": records, "reward": reward, "tokenizer": found.tokenizer, "rows": s.eval_rows, "options": options}


def _check_prompts(problems, found, s) -> None:
    """problems: (record, where it is from). Raises UserError for one without a prompt, or with one longer than the window."""
    jinja = template(found, s)
    for record, place in problems:
        if not isinstance(record.get("prompt"), str):
            raise UserError(f"task {s.task['name']}, {place}: has no text under `prompt`; its keys are {', '.join(record)}.")
        turn = [{"role": "user", "content": record["prompt"]}]
        ids = chat.encode_prompt(turn, found.tokenizer, jinja)
        _check_ids(int(ids.max()), found, f"task {s.task['name']}, {place}")
        length = len(ids)
        if length > s.rollouts.prompt_window:
            raise UserError(
                f"task {s.task['name']}, {place}: its prompt has {length} tokens; config.rollouts.prompt_window takes "
                f"{s.rollouts.prompt_window}. Make that longer, or leave such problems out."
            )


def template(found, s) -> str:
    """The Jinja of the chat template that a stage's settings choose, with its options."""
    return templates.jinja(found.tokenizer, s.template or None, mixture.pairs(_plain(s.template_options), "template_options"))


def _sources(task, s) -> list[mixture.Part]:
    """What the settings' data names, or else the task's demonstrations."""
    if s.bad_rows not in source.BAD_ROWS:
        raise UserError(f"config.bad_rows: {s.bad_rows!r} is neither {' nor '.join(map(repr, source.BAD_ROWS))}.")
    if s.data:
        return mixture.read(_plain(s.data), "data", s.bad_rows == "skip")
    if task is None:
        raise UserError("config.data: give a file (README.md lists the kinds), or a config.task with demonstrations.")
    make = bind(task.conversation, {"seed": s.seed, **_task_options(s)}, f"task {s.task['name']}")
    name = f"task {s.task['name']}"
    records = [Record(make(i), f"{name}, example {i}") for i in range(s.task.get("examples", 10000))]
    return [mixture.Part(name, None, records, [])]


def _check_ids(highest: int, found, place: str) -> None:
    """A tokenizer may have added tokens that its model has no row for; text must not use them."""
    if highest >= (vocab := found.transformer.arch.vocab):
        text = found.tokenizer.convert_ids_to_tokens(highest)
        raise UserError(
            f"{place}: has the token {text!r} (id {highest}), and the model has a vocabulary of {vocab}; take it out."
        )


def _data(task, found, s, mesh):
    """(batches, held-out batches, one example, digest) of a stage that learns from demonstrations."""
    parts = _sources(task, s)
    # On the command line every share is a float, a number of examples too.
    wanted = 0 if s.eval_data else int(s.held_out) if s.held_out >= 1 else float(s.held_out)
    _, others = source.split(sum(len(part.records) for part in parts), wanted, s.seed)
    kept, rest = mixture.divide(parts, others)
    if s.eval_data:
        kept = mixture.read(_plain(s.eval_data), "eval_data", s.bad_rows == "skip")
        if kept[0].weight is not None:
            raise UserError("config.eval_data: evaluation takes every row once; leave the weights out.")
    options = {"window": s.window, "too_long": s.too_long, "bad_rows": s.bad_rows}
    options["columns"] = mixture.pairs(_plain(s.columns), "columns")

    def rows(part, what):
        try:
            encoded = source.encode_all(part.records, found.tokenizer, template(found, s), s.train_on, **options)
        except UserError as error:
            if not str(error).startswith("none of"):
                raise
            none = "" if what == "data" or s.eval_data else "; config.held_out=0 keeps none out"
            raise UserError(f"{what} {part.name}: {error}{none}") from error
        packed = source.rows(encoded.examples, encoded.lengths, s.window, packing=s.packing, seed=s.seed)
        if jax.process_index() == 0:
            mixture.tell(f"{what} {part.name}", part, encoded, len(packed), s.window)
        _check_ids(encoded.highest, found, f"{what} {part.name}")
        return encoded, packed

    local = sharding.local_rows(mesh, s.batch_size)
    encoded, packed = zip(*(rows(part, "data") for part in rest), strict=True)
    weights = [part.weight for part in rest]
    mixed = len(rest) > 1
    train = mixture.mix(packed, weights, s.seed) if mixed else packed[0]
    if mixed and jax.process_index() == 0:
        print(f"data: an epoch of the mixture has {len(train)} rows", file=sys.stderr)
    batches = source.Batches(
        train, s.batch_size, seed=s.seed, shuffle=not mixed, epochs=None if s.steps else s.epochs, local=local
    )
    held_out = []
    for part in kept:
        once = source.Batches(rows(part, "eval data")[1], s.batch_size, seed=s.seed, shuffle=False, epochs=1, local=local)
        held_out += [once() for _ in range(len(once))]
    digest = encoded[0].digest if not mixed else mixture.digest([e.digest for e in encoded], weights)
    return batches, held_out, encoded[0].examples[0], digest


def _rollouts(task, reward, found, s, mesh) -> Rollouts:
    if task is None:
        raise UserError("config.task: rollouts need a task, for prompts and a reward.")
    jinja = template(found, s)
    _check_prompts(((task.record(i, seed=s.seed), f"problem {i}") for i in range(256)), found, s)

    def prompt(i):
        record = task.record(i, seed=s.seed)
        return record, chat.encode_prompt([{"role": "user", "content": record["prompt"]}], found.tokenizer, jinja)

    options = {
        "prompt_window": s.rollouts.prompt_window,
        "new": s.rollouts.new,
        "temperature": s.rollouts.temperature,
        "stop": chat.stop_ids(found.tokenizer, jinja),
    }
    return Rollouts(
        found.transformer,
        found.tokenizer,
        prompt,
        reward,
        mesh,
        batch_size=s.batch_size,
        group=s.rollouts.group,
        seed=s.seed,
        options=options,
    )
