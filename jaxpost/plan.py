"""The plan of a stage: everything that can go wrong before anything is compiled.

A stage's settings name functions, files, a model and sizes. `plan_stage` reads, resolves and checks all of them; what it
gives is ready to run, and no weights have been read yet.
"""

import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from jaxpost import optim, sharding
from jaxpost.data import chat, readers, source
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


def plan_stage(name: str, s, mesh) -> Plan:
    """Reads, resolves and checks everything that a stage's settings name."""
    found = loading.describe(_plain(s.model), s.tokenizer, s.dtype, s.remat)
    loading.check(found)
    objective = resolve(_plain(s.objective), "objectives")
    optim.partition(jax.eval_shape(lambda: found.transformer.init(jax.random.PRNGKey(0))), s.trainable)
    if s.window > found.transformer.arch.max_positions:
        raise UserError(f"config.window: {s.window} tokens, but the model takes {found.transformer.arch.max_positions}.")
    if s.batch_size % (rows := s.microbatches * mesh.shape["data"] * mesh.shape["fsdp"]):
        raise UserError(
            f"config.batch_size: {s.batch_size} rows do not divide over microbatches x data x fsdp = {rows}; use a multiple."
        )
    if found.tokenizer is None:
        raise UserError(
            "config.tokenizer: the model comes without one; name a folder that has one, or a function that makes one."
        )
    task = _task(s) if s.task else None
    problems = None if task is None else _problems(task, found, s)
    if s.source == "rollouts":
        batches, held_out, example, data, steps = _rollouts(task, found, s, mesh), [], None, "", s.steps
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
    return Plan(name, s, found, objective, batches, steps, held_out, data, problems, example)


def _plain(value):
    return value.to_dict() if hasattr(value, "to_dict") else value


def _task(s):
    """The module that the task's settings name, with all that this stage will ask of it."""
    found = module(s.task.get("name", ""), "tasks")
    needed = ["record", "reward", "test_records"] + (["conversation"] if s.source == "data" and not s.data else [])
    if missing := [name for name in needed if not callable(getattr(found, name, None))]:
        raise UserError(f"config.task: {s.task['name']} has no function {missing[0]}; CONTRIBUTING.md lists what a task has.")
    return found


def _task_options(s) -> dict:
    return {k: v for k, v in _plain(s.task).items() if k not in ("name", "examples")}


def _problems(task, found, s) -> dict:
    options = {"prompt_window": s.rollouts.prompt_window, "new": s.rollouts.new, "template": s.template or None}
    records = task.test_records(s.eval_per_cell)
    _check_prompts(((r, f"test problem {i}") for i, r in enumerate(records)), found, s)
    return {"records": records, "reward": task.reward, "tokenizer": found.tokenizer, "rows": s.eval_rows, "options": options}


def _check_prompts(problems, found, s) -> None:
    """problems: (record, where it is from). Raises UserError for one without a prompt, or with one longer than the window."""
    for record, place in problems:
        if not isinstance(record.get("prompt"), str):
            raise UserError(f"task {s.task['name']}, {place}: has no text under `prompt`; its keys are {', '.join(record)}.")
        turn = [{"role": "user", "content": record["prompt"]}]
        length = len(chat.encode_prompt(turn, found.tokenizer, s.template or None))
        if length > s.rollouts.prompt_window:
            raise UserError(
                f"task {s.task['name']}, {place}: its prompt has {length} tokens; config.rollouts.prompt_window takes "
                f"{s.rollouts.prompt_window}. Make that longer, or leave such problems out."
            )


def _data(task, found, s, mesh):
    """(batches, held-out batches, one example, digest) of a stage that learns from demonstrations."""
    if s.data:
        records = readers.read(s.data)
    elif task is not None:
        make = bind(task.conversation, {"seed": s.seed, **_task_options(s)}, f"task {s.task['name']}")
        records = [readers.Record(make(i), f"task {s.task['name']}, example {i}") for i in range(s.task.get("examples", 10000))]
    else:
        raise UserError("config.data: give a .jsonl or .json file, or a config.task with demonstrations of its own.")
    # On the command line every share is a float, a number of examples too.
    wanted = 0 if s.eval_data else int(s.held_out) if s.held_out >= 1 else float(s.held_out)
    rest, others = source.split(len(records), wanted, s.seed)
    kept = readers.read(s.eval_data) if s.eval_data else [records[i] for i in others]

    def rows(records):
        encoded = source.encode_all(
            records, found.tokenizer, s.template or None, s.train_on, window=s.window, too_long=s.too_long
        )
        return encoded, source.rows(encoded.examples, encoded.lengths, s.window, packing=s.packing, seed=s.seed)

    local = sharding.local_rows(mesh, s.batch_size)
    encoded, train = rows([records[i] for i in rest])
    if jax.process_index() == 0:
        print(f"data: {encoded.report}, {len(train)} rows of {s.window}", file=sys.stderr)
    batches = source.Batches(train, s.batch_size, seed=s.seed, epochs=None if s.steps else s.epochs, local=local)
    held_out = []
    if kept:
        once = source.Batches(rows(kept)[1], s.batch_size, seed=s.seed, shuffle=False, epochs=1, local=local)
        held_out = [once() for _ in range(len(once))]
    return batches, held_out, encoded.examples[0], encoded.digest


def _rollouts(task, found, s, mesh) -> Rollouts:
    if task is None:
        raise UserError("config.task: rollouts need a task, for prompts and a reward.")
    template = s.template or None
    _check_prompts(((task.record(i, seed=s.seed), f"problem {i}") for i in range(256)), found, s)

    def prompt(i):
        record = task.record(i, seed=s.seed)
        return record, chat.encode_prompt([{"role": "user", "content": record["prompt"]}], found.tokenizer, template)

    options = {
        "prompt_window": s.rollouts.prompt_window,
        "new": s.rollouts.new,
        "temperature": s.rollouts.temperature,
        "stop": chat.stop_ids(found.tokenizer, template),
    }
    return Rollouts(
        found.transformer,
        found.tokenizer,
        prompt,
        task.reward,
        mesh,
        batch_size=s.batch_size,
        group=s.rollouts.group,
        seed=s.seed,
        options=options,
    )
