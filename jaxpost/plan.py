"""The plan of a stage: everything that can go wrong before anything is compiled.

A stage's settings name functions, files, a model and sizes. `plan_stage` reads, resolves and checks all of them; what it
gives is ready to run, and no weights have been read yet.
"""

import dataclasses
import functools
import json
import math
import zlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxpost import checkpoint, cloud, datasets, optim
from jaxpost.data import chat, source
from jaxpost.errors import UserError
from jaxpost.models import loading
from jaxpost.profile import SKIPPED
from jaxpost.recipe import plain
from jaxpost.resolve import attribute, module, resolve
from jaxpost.rollouts import source as rollouts
from jaxpost.rollouts.samples import ROWS, Samples, rows
from jaxpost.rollouts.source import Rollouts
from jaxpost.tokenizer import check_ids


class Plan(NamedTuple):
    """A stage, checked and ready: nothing of it is compiled yet, and no weights are read."""

    name: str
    settings: Any
    found: loading.Description
    objective: Callable
    sets: list[datasets.Set]  # what is learned from; none for rollouts, nor for samples that are still to be drawn
    source: Any  # state -> batch, with a position; or the samples.Samples that its data will be
    steps: int
    held_out: list  # this process's batches for evaluation
    data: str  # a digest of what is learned from; "" where sets are none
    problems: dict | None  # what evaluate.graded takes, for a task
    example: list[dict]  # the documents of one example, to be shown
    trainable: str  # pattern of the paths that train
    trained: int  # how many parameters that is
    reads: tuple[str, ...] = ()  # the columns that its objective reads and that its batches do not have by themselves
    made: dict = {}  # of each data set, by its digest, the columns that frozen models made (columns.py)


def plan_stage(name: str, s, mesh) -> Plan:
    """Reads, resolves and checks everything that a stage's settings name."""
    device = mesh.devices.flat[0]
    options = {"attention": s.attention, "device": device}
    found = loading.describe(plain(s.model), s.tokenizer, s.dtype, s.remat, plain(s.adapter), **options)
    found, objective, trainable, trained = learned(found, s, mesh)
    loading.check(found)
    if found.tokenizer is None:
        raise UserError(
            "config.tokenizer: the model comes without one; name a folder that has one, or a function that makes one."
        )
    if s.reward and not s.task:
        raise UserError("config.reward: there is no config.task whose completions it could judge.")
    task = _task(s) if s.task else None
    reward = None if task is None else judge(task, s.task["name"], plain(s.reward))
    problems = None if task is None else _problems(task, reward, found, s)
    if s.source in ("rollouts", "samples"):
        sets, held_out, example, data, steps = [], [], [], "", s.steps
        drawn = _drawn(task, reward, found, s)
        batches = _rollouts(drawn, found, s, mesh) if s.source == "rollouts" else _samples(name, drawn, found, s, objective)
        if not steps:
            raise UserError(f"config.steps: {s.source} have no epochs that could be told now; say how many steps to take.")
    elif s.source == "data":
        sets = datasets.read(task, found, s, objective)
        (batches, held_out), example, data = datasets.batches(sets, s, mesh), datasets.shown(sets), datasets.digest(sets)
        steps = s.steps or len(batches)
    else:
        raise UserError(f"config.source: {s.source!r} is neither 'data' nor 'rollouts' nor 'samples'.")
    longest, most = s.rollouts.prompt_window + s.rollouts.new, found.transformer.arch.max_positions
    if task is not None and longest > most:
        raise UserError(f"config.rollouts: prompt_window + new = {longest} tokens, but the model takes {most}.")
    if s.profile and steps < (needed := s.profile + SKIPPED):
        raise UserError(f"config.profile: tracing {s.profile} steps takes {needed}, and there are {steps}; ask for fewer.")
    optim.make(s.optimizer, steps)
    reads = tuple(name for name in attribute(objective, "columns", {}) if name not in _own_columns(s, objective))
    return Plan(name, s, found, objective, sets, batches, steps, held_out, data, problems, example, trainable, trained, reads)


def learned(found: loading.Description, s, mesh) -> tuple[loading.Description, Callable, str, int]:
    """(the model with the leaves that the objective asks for, objective, pattern of the paths that train, how many parameters
    that is) of a stage, its sizes checked: what needs neither a tokenizer, nor data, nor weights.

    An objective asks for leaves by an attribute `leaves`: {path: (letters, first value)}; they train with an adapter too, but
    for those that are another model's (loading.abstract).
    """
    objective = resolve(plain(s.objective), "objectives")
    found = dataclasses.replace(found, leaves=attribute(objective, "leaves", {}))
    trainable, others = s.trainable, loading.others(found)
    if found.adapter and trainable == ".*":
        trainable = "|".join([optim.ADDED, *(f"^{path}$" for path in found.leaves if path not in others)])
    if others:
        trainable = f"^(?!({'|'.join(others)})$)(?=.*({trainable}))"
    train, _ = optim.partition(loading.abstract(found.transformer, mesh, found.adapter, found.leaves), trainable)
    _check_shape(s, datasets.shape(objective))
    # Of pairs several documents are one example; each by itself is held to the model's positions where it is encoded.
    alone = s.source == "rollouts" or datasets.shape(objective) == "demonstrations"
    if alone and s.window > (most := found.transformer.arch.max_positions):
        raise UserError(f"config.window: {s.window} tokens, but the model takes {most}; give that at most.")
    short = min((k.rope.original for k in found.transformer.arch.kinds if k.rope.kind == "longrope"), default=s.window)
    if s.shared_prefix and s.window > short:
        raise UserError(
            f"config.shared_prefix: beyond {short} tokens a document's length decides how this model's tokens turn "
            f"(longrope), and two answers differ in length; leave it out, or make the window {short} at most."
        )
    if s.batch_size % (rows := s.microbatches * mesh.shape["data"] * mesh.shape["fsdp"]):
        raise UserError(
            f"config.batch_size: {s.batch_size} rows do not divide over microbatches x data x fsdp = {rows}; use a multiple."
        )
    return found, objective, trainable, sum(x.size for x in jax.tree.leaves(train))


def _check_shape(s, shape: str) -> None:
    """Raises UserError for settings that have no meaning for what the objective learns from."""
    if (s.source == "rollouts" and shape != "demonstrations") or (s.source == "samples" and shape not in ROWS):
        raise UserError(f"config.source: the objective learns from {shape} of a data set, and {s.source} are none.")
    if s.shared_prefix and shape not in ("pairs", "mismatched"):
        raise UserError("config.shared_prefix: only a prompt with two answers has a prefix to share; leave it out.")


def columns(s, objective: Callable) -> dict[str, jax.ShapeDtypeStruct]:
    """The columns of a stage's batches as shapes: those of its source, and those that the objective says it reads besides.

    An objective says so by an attribute `columns`: {name: (letters, dtype)}, e.g. {"ref_logps": ("BS", "float32")}. What
    further letters stand for, the folder in config.annotations says. Raises UserError where it does not.
    """
    found, written = _own_columns(s, objective), {}
    rows, length = found["tokens"].shape
    for file in (
        file for folder in s.annotations.split(",") if folder for file in cloud.path(folder.strip()).glob("*/meta.json")
    ):
        written |= json.loads(file.read_text())["columns"]
    for name, (letters, dtype) in attribute(objective, "columns", {}).items():
        shape = [{"B": rows, "S": length}[letter] for letter in letters[:2]]
        if letters[2:] and name not in written:
            raise UserError(f"config.annotations: name the folder of the column {name}, which alone says how wide it is.")
        shape += written[name]["shape"] if letters[2:] else []
        found.setdefault(name, jax.ShapeDtypeStruct(tuple(shape), np.dtype(dtype)))
    return found


def _own_columns(s, objective: Callable) -> dict[str, jax.ShapeDtypeStruct]:
    """The columns of a stage's source, as shapes."""
    if s.source == "rollouts":
        return rollouts.columns(s.batch_size, s.rollouts.prompt_window + s.rollouts.new)
    margins = "margins" in attribute(objective, "columns", {})
    return source.columns(s.batch_size, s.window, datasets.shape(objective), s.shared_prefix, margins)


def starting(found: loading.Description, s, before: list[str], workdir) -> loading.Description:
    """The model that a stage starts from: the result of the one that its settings name or of the one before, or its own."""
    if origin := s.start or (before[-1] if before else ""):
        return dataclasses.replace(found, folder=checkpoint.find_step(workdir / "checkpoints" / origin), hub="")
    return found


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


def judge(task, name: str, reward: Mapping | str = "") -> Callable:
    """(record, completion) -> float of a task's own reward, or of the one that an entry names in its place.

    What it gives raises UserError for a value that is no finite number.
    """
    own, place = (resolve(reward, "rewards"), reward) if reward else (task.reward, f"task {name}")

    @functools.wraps(own)  # its signature says what its mean is called
    def judged(record, completion):
        value = own(record, completion)
        if not isinstance(value, (bool, int, float, np.number, np.bool_)) or not math.isfinite(value):
            raise UserError(
                f"reward of {place}: gave {value!r} for the completion {completion[:60]!r}; it must be a finite number."
            )
        return float(value)

    return judged


def _problems(task, reward, found, s) -> dict:
    options = {"prompt_window": s.rollouts.prompt_window, "new": s.rollouts.new, "template": datasets.template(found, s)}
    records = task.test_records(s.eval_per_cell)
    _check_prompts(((r, f"test problem {i}") for i, r in enumerate(records)), found, s)
    return {"records": records, "reward": reward, "tokenizer": found.tokenizer, "rows": s.eval_rows, "options": options}


def _check_prompts(problems, found, s) -> None:
    """problems: (record, where it is from). Raises UserError for one without a prompt, or with one longer than the window."""
    jinja = datasets.template(found, s)
    for record, place in problems:
        if not isinstance(record.get("prompt"), str):
            raise UserError(f"task {s.task['name']}, {place}: has no text under `prompt`; its keys are {', '.join(record)}.")
        ids = chat.encode_prompt(record["prompt"], found.tokenizer, jinja)
        check_ids(ids, found.transformer.arch.vocab, found.tokenizer, f"task {s.task['name']}, {place}")
        length = len(ids)
        if length > s.rollouts.prompt_window:
            raise UserError(
                f"task {s.task['name']}, {place}: its prompt has {length} tokens; config.rollouts.prompt_window takes "
                f"{s.rollouts.prompt_window}. Make that longer, or leave such problems out."
            )


def _drawn(task, reward, found, s) -> dict:
    """What rollouts and samples are both made of: prompts, a reward, and how to complete."""
    if task is None:
        raise UserError(f"config.task: {s.source} need a task, for prompts and a reward.")
    jinja = datasets.template(found, s)
    _check_prompts(((task.record(i, seed=s.seed), f"problem {i}") for i in range(256)), found, s)

    def prompt(i):
        record = task.record(i, seed=s.seed)
        return record, chat.encode_prompt(record["prompt"], found.tokenizer, jinja)

    options = {
        "prompt_window": s.rollouts.prompt_window,
        "new": s.rollouts.new,
        "temperature": s.rollouts.temperature,
        "stop": chat.stop_ids(found.tokenizer, jinja),
    }
    return {"prompt": prompt, "reward": reward, "group": s.rollouts.group, "seed": s.seed, "options": options}


def _rollouts(drawn: dict, found, s, mesh) -> Rollouts:
    prompt, reward = drawn.pop("prompt"), drawn.pop("reward")
    return Rollouts(found.transformer, found.tokenizer, prompt, reward, mesh, batch_size=s.batch_size, **drawn)


def _samples(name: str, drawn: dict, found, s, objective: Callable) -> Samples:
    """Raises UserError for settings with which what they will be could not be learned from, before anything is drawn."""
    for key in ("data", "annotations", "columns"):
        if s[key]:
            raise UserError(f"config.{key}: {s[key]!r}; samples are a data set of their own, which is still to be made.")
    if s.rollouts.group < 2:
        raise UserError(f"config.rollouts.group: {s.rollouts.group} leaves nothing to compare; take 2 at least.")
    shape, count = datasets.shape(objective), s.task.get("examples", datasets.EXAMPLES)
    trial = [row for i in range(8) for row in rows(shape, drawn["prompt"](i)[0]["prompt"], "12", (1, 0))]
    datasets.check(trial, found, s, objective)
    step = zlib.crc32(name.encode()) >> 1  # that each stage draws others
    return Samples(found.transformer, found.tokenizer, shape=shape, count=count, rows=s.eval_rows, step=step, **drawn)
