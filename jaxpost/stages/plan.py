"""The plan of a stage that trains: everything that can go wrong before anything is compiled.

A stage's settings name functions, files, a model and sizes. `plan_stage` reads, resolves and checks all of them; what it
gives is ready to run, and no weights have been read yet.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from jaxpost import optim, sources
from jaxpost.config.resolve import resolve
from jaxpost.config.unread import shares
from jaxpost.data.row_types import RowType
from jaxpost.declare import declared
from jaxpost.errors import UserError
from jaxpost.models import adapted, loading
from jaxpost.recipe import plain
from jaxpost.reporting.profile import SKIPPED
from jaxpost.stages import annotations, datasets, rollouts, tasks
from jaxpost.stages.run import check, check_room, described


class Plan(NamedTuple):
    """A stage, checked and ready: nothing of it is compiled yet, and no weights are read."""

    name: str
    settings: Any
    spec: loading.ModelSpec
    objective: Callable
    sets: list[datasets.Set]  # what is learned from; none for rollouts, nor while an earlier stage is still to make it
    source: sources.Source | None  # of batches; None while an earlier stage is still to make its data
    steps: int
    held_out: list  # this process's batches for evaluation
    data: str  # a digest of what is learned from; "" where sets are none
    problems: dict | None  # what accuracy.graded takes, for a task
    trainable: str  # pattern of the paths that train
    trained: int  # how many parameters that is
    own: dict = {}  # the columns of its batches that no annotation makes, as shapes
    annotations: tuple = ()  # what makes the others (annotations.py)
    stored: dict = {}  # of each data set, by its digest, the columns that are on disk


def plan_stage(name: str, s, mesh, trial: Sequence[dict] | None = None) -> Plan:
    """Reads, resolves and checks everything that a stage's settings name. trial: rows such as the data will have, maybe none,
    where an earlier stage is still to make it.
    """
    spec, objective, trainable, trained = learned(described(s, mesh), s, mesh)
    check(spec)
    if s.reward and not s.task and s.source == "data":
        raise UserError(
            "config.reward: source='data' without a config.task makes no completions that it could judge. To learn from "
            "completions of a file of prompts take configs/grpo.py; else leave it out."
        )
    task = tasks.task(s) if s.task else None
    rewards = None if task is None else tasks.rewards(task, s.task["name"], plain(s.reward))
    problems = None if task is None else tasks.problems(task, rewards, spec, s)
    _check_source(s, task, mesh)
    source, sets, held_out, steps = None, [], [], s.steps
    if trial:
        datasets.check(trial, spec, s, objective)
    elif trial is None and "data" in shares(s.source):
        sets = datasets.read(task, spec, s, objective)
    if s.source == "data" and trial is None:
        source, held_out = datasets.batches(sets, s, mesh)
        steps = s.steps or len(source)
    elif trial is None:
        source = rollouts.source(name, task, rewards, spec, s, objective, mesh)
        source = _mixed(source, sets, s, objective, mesh) if sets else source
    if task is not None:
        check_room(spec, s.rollouts)
    if s.profile and steps and steps < (needed := s.profile + SKIPPED):
        raise UserError(f"config.profile: tracing {s.profile} steps takes {needed}, and there are {steps}; ask for fewer.")
    optim.make(s.optimizer, steps or 1000)
    own = own_columns(s, objective, spec)
    numbers = sets[0].encoded.row_columns if sets else ()
    own |= {key: jax.ShapeDtypeStruct(own["tokens"].shape, np.float32) for key in numbers}
    data = datasets.digest(sets) if sets else ""
    return Plan(name, s, spec, objective, sets, source, steps, held_out, data, problems, trainable, trained, own)


def _check_source(s, task, mesh) -> None:
    """Raises UserError for a source that is none, that lacks a task or a number of steps, or whose shares are no whole rows."""
    for kind in shares(s.source):
        if kind not in ("data", "rollouts"):
            raise UserError(f"config.source: {kind!r} is neither 'data' nor 'rollouts'.")
        if kind == "rollouts" and task is None:
            raise UserError("config.task: rollouts need a task, for prompts and a reward.")
        if kind == "rollouts" and not s.steps:
            raise UserError("config.steps: rollouts have no epochs that could be told now; say how many steps to take.")
    if len(shares(s.source)) > 1:
        _rows(s, mesh)


def _rows(s, mesh) -> dict[str, int]:
    """{source: its rows of a batch} of several."""
    return sources.counts(shares(s.source), s.batch_size, s.microbatches * mesh.shape["data"] * mesh.shape["fsdp"])


def _mixed(drawn: sources.Source, sets: list[datasets.Set], s, objective: Callable, mesh) -> sources.Mixed:
    """The source of batches that hold both rollouts and data. Raises UserError for settings that only one of them alone has."""
    for key in ("held_out", "eval_data", "annotations"):
        if s[key]:
            raise UserError(
                f"config.{key}: {s[key]!r}; rows of files beside rollouts have none. Leave it out: the task's test problems "
                "evaluate."
            )
    data, _ = datasets.batches(sets, ConfigDict({**plain(s), "batch_size": _rows(s, mesh)["data"]}), mesh)
    if "demonstrations" not in declared(objective, "masks"):
        raise UserError(
            "config.source: rows of data beside rollouts are learned where the column `demonstrations` is, and this objective "
            "does not declare it among its masks; take policy_gradient.variant with added_terms={'sft': 1.0}."
        )
    each = {"rollouts": drawn, "data": sources.Demonstrations(data)}
    return sources.mixed({key: (each[key], share) for key, share in shares(s.source).items()}, s.batch_size)


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
        trainable = "|".join([adapted.added(spec.adapter), *(f"^{path}$" for path in spec.leaves if path not in others)])
    if others:
        trainable = f"^(?!({'|'.join(others)})$)(?=.*({trainable}))"
    train, _ = optim.partition(loading.abstract(spec.transformer, mesh, spec.adapter, spec.leaves), trainable)
    optim.check(s.optimizer, train)
    _check_row_type(s, datasets.row_type(objective))
    named, most = shares(s.source), loading.max_positions(spec)
    # Where several documents are one example, each is held to the model's positions where it is encoded.
    if "data" in named and datasets.row_type(objective).fills_window and s.window > most:
        raise UserError(f"config.window: {s.window} tokens, but the model takes {most}; give that at most.")
    longest = max(s.rollouts.prompt_window + s.rollouts.new if "rollouts" in named else 0, s.window if "data" in named else 0)
    _check_attend(s, getattr(getattr(spec.transformer, "arch", None), "attend", "causal"))
    kinds = getattr(getattr(spec.transformer, "arch", None), "kinds", ())
    short = min((k.rope.original for k in kinds if k.rope.kind == "longrope"), default=longest)
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


def _check_attend(s, attend: str) -> None:
    """Raises UserError for settings that cannot be had where tokens see what is behind them."""
    if attend != "causal" and s.shared_prefix:
        raise UserError(
            f"config.shared_prefix: with attend={attend!r} the prompt's tokens see its last one, which each answer has for "
            "itself; leave it out."
        )
    if attend == "whole" and (s.task or "rollouts" in shares(s.source)):
        raise UserError("config.task: the model sees whole documents (attend), so it samples no answers; leave the task out.")
    if attend == "prefix" and s.rollouts.given:
        raise UserError(
            "config.rollouts.given: with attend='prefix' a completion's given tokens would count as the prompt; leave it out."
        )


def _check_row_type(s, row_type: RowType) -> None:
    """Raises UserError for settings that have no meaning for what the objective learns from."""
    named = shares(s.source)
    if "rollouts" in named and not row_type.completions:
        raise UserError(f"config.source: the objective learns from {row_type.name} of a data set, and rollouts are none.")
    if len(named) > 1 and row_type.completions != 1:
        raise UserError(f"config.source: rollouts and data share no batch for {row_type.name}, which this objective has.")
    if s.shared_prefix and not row_type.shareable and "rollouts" not in named:
        raise UserError("config.shared_prefix: only a prompt with two answers has a prefix to share; leave it out.")


def columns(s, objective: Callable, spec: loading.ModelSpec | None = None) -> dict[str, jax.ShapeDtypeStruct]:
    """The columns of a stage's batches as shapes: those of its source, and those that annotations add (annotations.shapes).

    spec: the stage's model, else what its settings describe. Raises UserError where a column's width is not known.
    """
    spec = spec or loading.describe(plain(s.model), "", s.dtype, adapter=plain(s.adapter), text=False)
    own = own_columns(s, objective, spec)
    return own | annotations.shapes(s, objective, own, spec)


def scalars(step: int, steps: int) -> dict[str, np.generic]:
    """The columns that say how far a stage is, once `step` of its `steps` are taken: what anneals reads them."""
    return {"step": np.int32(step), "progress": np.float32(step / steps)}


def own_columns(s, objective: Callable, spec: loading.ModelSpec) -> dict[str, jax.ShapeDtypeStruct]:
    """The columns of the batches of a stage with this model that no annotation makes, as shapes."""
    progress = {name: jax.ShapeDtypeStruct((), x.dtype) for name, x in scalars(0, 1).items()}
    each, named = [], shares(s.source)
    if "rollouts" in named:
        each.append(rollouts.rows(s, objective).columns())
    if "data" in named:
        each.append(datasets.columns(s, objective, round(s.batch_size * named["data"])))
    own = progress | (sources.joined(each) if len(each) > 1 else each[0])
    return own | {name: jax.ShapeDtypeStruct(own["tokens"].shape, np.float32) for name in loading.columns(spec)}
