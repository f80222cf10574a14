"""The plan of a stage: everything that can go wrong before anything is compiled.

A stage's settings name functions, files, a model and sizes. `plan_stage` reads, resolves and checks all of them; what it
gives is ready to run, and no weights have been read yet.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from jaxpost import annotations, checkpoint, optim
from jaxpost.data import source
from jaxpost.declare import declared
from jaxpost.errors import UserError
from jaxpost.models import loading
from jaxpost.profile import SKIPPED
from jaxpost.recipe import plain
from jaxpost.resolve import resolve
from jaxpost.rollouts import source as rollouts
from jaxpost.rollouts.samples import ROWS
from jaxpost.stages import datasets, generate, tasks
from jaxpost.stages import rollouts as drawn


class Plan(NamedTuple):
    """A stage, checked and ready: nothing of it is compiled yet, and no weights are read."""

    name: str
    settings: Any
    spec: loading.ModelSpec
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
    own: dict = {}  # the columns of its source, as shapes
    annotations: tuple = ()  # what makes further columns (annotations.py)
    stored: dict = {}  # of each data set, by its digest, the columns that are on disk


def plan_stage(name: str, s, mesh) -> Plan:
    """Reads, resolves and checks everything that a stage's settings name."""
    device = mesh.devices.flat[0]
    options = {"attention": s.attention, "device": device}
    spec = loading.describe(plain(s.model), s.tokenizer, s.dtype, s.remat, plain(s.adapter), **options)
    spec, objective, trainable, trained = learned(spec, s, mesh)
    loading.check(spec)
    if spec.tokenizer is None:
        raise UserError(
            "config.tokenizer: the model comes without one; name a folder that has one, or a function that makes one."
        )
    if s.reward and not s.task and s.source == "data":
        raise UserError(
            "config.reward: source='data' without a config.task makes no completions that it could judge. To learn from "
            "completions of a file of prompts take configs/grpo.py; else leave it out."
        )
    task = tasks.task(s) if s.task else None
    rewards = None if task is None else tasks.rewards(task, s.task["name"], plain(s.reward))
    problems = None if task is None else tasks.problems(task, rewards, spec, s)
    if s.source in ("rollouts", "samples"):
        sets, held_out, example, data, steps = [], [], [], "", s.steps
        if task is None:
            raise UserError(f"config.task: {s.source} need a task, for prompts and a reward.")
        make = drawn.source if s.source == "rollouts" else generate.samples
        batches = make(name, task, rewards, spec, s, objective, mesh)
        if not steps:
            raise UserError(f"config.steps: {s.source} have no epochs that could be told now; say how many steps to take.")
    elif s.source == "data":
        sets = datasets.read(task, spec, s, objective)
        (batches, held_out), example, data = datasets.batches(sets, s, mesh), datasets.shown(sets), datasets.digest(sets)
        steps = s.steps or len(batches)
    else:
        raise UserError(f"config.source: {s.source!r} is neither 'data' nor 'rollouts' nor 'samples'.")
    most = spec.transformer.arch.max_positions
    if task is not None and (longest := s.rollouts.prompt_window + s.rollouts.new) > most:
        raise UserError(f"config.rollouts: prompt_window + new = {longest} tokens, but the model takes {most}.")
    if s.profile and steps < (needed := s.profile + SKIPPED):
        raise UserError(f"config.profile: tracing {s.profile} steps takes {needed}, and there are {steps}; ask for fewer.")
    optim.make(s.optimizer, steps)
    own = own_columns(s, objective)
    return Plan(name, s, spec, objective, sets, batches, steps, held_out, data, problems, example, trainable, trained, own)


def learned(spec: loading.ModelSpec, s, mesh) -> tuple[loading.ModelSpec, Callable, str, int]:
    """(the model with the leaves that the objective asks for, objective, pattern of the paths that train, how many parameters
    that is) of a stage, its sizes checked: what needs neither a tokenizer, nor data, nor weights.

    The leaves that an objective declares, {path: (letters, first value)}, train with an adapter too, but
    for those that are another model's (loading.abstract).
    """
    objective = resolve(plain(s.objective), "objectives")
    spec = dataclasses.replace(spec, leaves=declared(objective, "leaves"))
    trainable, others = s.trainable, loading.others(spec)
    if spec.adapter and trainable == ".*":
        trainable = "|".join([optim.ADDED, *(f"^{path}$" for path in spec.leaves if path not in others)])
    if others:
        trainable = f"^(?!({'|'.join(others)})$)(?=.*({trainable}))"
    train, _ = optim.partition(loading.abstract(spec.transformer, mesh, spec.adapter, spec.leaves), trainable)
    _check_shape(s, datasets.shape(objective))
    # Of pairs several documents are one example; each by itself is held to the model's positions where it is encoded.
    rolled, most = s.source == "rollouts", spec.transformer.arch.max_positions
    if not rolled and datasets.shape(objective) == "demonstrations" and s.window > most:
        raise UserError(f"config.window: {s.window} tokens, but the model takes {most}; give that at most.")
    longest = s.rollouts.prompt_window + s.rollouts.new if rolled else s.window
    short = min((k.rope.original for k in spec.transformer.arch.kinds if k.rope.kind == "longrope"), default=longest)
    if s.shared_prefix and longest > short:
        raise UserError(
            f"config.shared_prefix: beyond {short} tokens a document's length decides how this model's tokens turn "
            f"(longrope), and answers differ in length; leave it out, or make the documents {short} long at most."
        )
    if s.batch_size % (rows := s.microbatches * mesh.shape["data"] * mesh.shape["fsdp"]):
        raise UserError(
            f"config.batch_size: {s.batch_size} rows do not divide over microbatches x data x fsdp = {rows}; use a multiple."
        )
    return spec, objective, trainable, sum(x.size for x in jax.tree.leaves(train))


def _check_shape(s, shape: str) -> None:
    """Raises UserError for settings that have no meaning for what the objective learns from."""
    possible = {"rollouts": ("demonstrations", "pairs"), "samples": ROWS}
    if shape not in possible.get(s.source, (shape,)):
        raise UserError(f"config.source: the objective learns from {shape} of a data set, and {s.source} are none.")
    if s.shared_prefix and shape not in ("pairs", "mismatched") and s.source != "rollouts":
        raise UserError("config.shared_prefix: only a prompt with two answers has a prefix to share; leave it out.")


def columns(s, objective: Callable, spec: loading.ModelSpec | None = None) -> dict[str, jax.ShapeDtypeStruct]:
    """The columns of a stage's batches as shapes: those of its source, and those that annotations add (annotations.shapes).

    spec: the stage's model, else what its settings describe. Raises UserError where a column's width is not known.
    """
    own = own_columns(s, objective)
    spec = spec or loading.describe(plain(s.model), "", s.dtype, text=False)
    return own | annotations.shapes(s, objective, own, spec)


def own_columns(s, objective: Callable) -> dict[str, jax.ShapeDtypeStruct]:
    """The columns of a stage's source, as shapes."""
    if s.source == "rollouts":
        return rollouts.columns(s, datasets.shape(objective) == "pairs")
    margins = "margins" in declared(objective, "columns")
    return source.columns(s.batch_size, s.window, datasets.shape(objective), s.shared_prefix, margins)


def starting(spec: loading.ModelSpec, s, before: list[str], workdir) -> loading.ModelSpec:
    """The model that a stage starts from: the result of the one that its settings name or of the one before, or its own."""
    if origin := s.start or (before[-1] if before else ""):
        return dataclasses.replace(spec, folder=checkpoint.find_step(workdir / "checkpoints" / origin), hub="")
    return spec
