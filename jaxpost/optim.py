"""Optimizers and learning-rate schedules, by optax; which leaves train, which decay, which have a rate of their own, by path.

Rules by the number of dimensions do not work here, since layers are stacked and every bias is a matrix. So these choices are
regular expressions over paths such as layers/attention/q/kernel.

Functions of one's own may change gradients before they are clipped (`config.optimizer.gradients`) and updates before they are
added (`config.optimizer.updates`): (updates, params, step, *, keywords) -> updates, over trees of the trainable leaves, where
`step` counts the updates before; or, for one that keeps something, a function of keywords alone that gives an optax
transformation, whose state is part of checkpoints.
"""

import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxpost.config.resolve import entries, nearest, resolve
from jaxpost.errors import UserError
from jaxpost.sharding import path_name

_OF_GROUPS = ("lr", "weight_decay")  # what a group of leaves may have of its own


def _first(lr: float, warmup: int) -> float:
    """The rate of update 0, above 0 so that its batch is not wasted; `warmup` updates later the rate is lr."""
    return lr / (warmup + 1)


def cosine(lr: float, steps: int, warmup: int, end: float) -> Callable:
    """Linear warm-up to lr, then half a cosine down to end * lr when the steps are over (one update after the last)."""
    return optax.warmup_cosine_decay_schedule(_first(lr, warmup), lr, warmup, max(steps, warmup + 1), end * lr)


def linear(lr: float, steps: int, warmup: int, end: float) -> Callable:
    """Linear warm-up to lr, then a straight line to end * lr when the steps are over (one update after the last)."""
    down = optax.linear_schedule(lr, end * lr, max(steps - warmup, 1))
    return optax.join_schedules([optax.linear_schedule(_first(lr, warmup), lr, warmup), down], [warmup]) if warmup else down


def constant(lr: float, steps: int, warmup: int, end: float) -> Callable:
    """Linear warm-up to lr, then lr; `end` is not used."""
    flat = optax.constant_schedule(lr)
    return optax.join_schedules([optax.linear_schedule(_first(lr, warmup), lr, warmup), flat], [warmup]) if warmup else flat


def wsd(lr: float, steps: int, warmup: int, end: float) -> Callable:
    """Warm-up, stable, decay: lr until the last fifth of the steps, then a straight line to end * lr."""
    decay = max(steps // 5, 1)
    down = optax.linear_schedule(lr, end * lr, decay)
    return optax.join_schedules([constant(lr, steps, warmup, end), down], [max(steps - decay, warmup)])


SCHEDULES = {"cosine": cosine, "linear": linear, "constant": constant, "wsd": wsd}


def schedule(settings: Mapping, steps: int) -> Callable:
    """step -> learning rate, from the keys lr, schedule, warmup (steps, or a share of them if below 1) and end.

    Raises UserError for an unknown schedule, and for a warm-up that leaves no step at the full rate.
    """
    name, warmup = settings["schedule"], settings["warmup"]
    if name not in SCHEDULES:
        raise UserError(f"config.optimizer.schedule: unknown {name!r}.{nearest(name, SCHEDULES)}")
    warmup = int(warmup * steps) if 0 < warmup < 1 else int(warmup)
    if warmup < 0 or (warmup and warmup >= steps):
        raise UserError(
            f"config.optimizer.warmup: {warmup} of {steps} steps would warm up, so none has the full rate; give fewer than "
            f"{steps}, a share of them below 1, or 0 for none."
        )
    return SCHEDULES[name](settings["lr"], steps, warmup, settings["end"])


def make(settings: Mapping, steps: int) -> optax.GradientTransformation:
    """AdamW on the trainable leaves: clip by global norm, then Adam with decoupled decay on the paths that `decay` matches.

    settings: lr, schedule, warmup, end, b1, b2, eps, weight_decay, decay (pattern), clip (global norm; 0 is off); groups, a
    list of dicts of `paths` (pattern) and what those leaves have of their own, lr or weight_decay; gradients and updates, see
    above.
    """
    if groups := _groups(settings):
        each = {"": _adamw(settings, steps)} | {g["paths"]: _adamw({**settings, **g}, steps) for g in groups}
        adamw = optax.partition(each, lambda params: _labels(groups, params))
    else:
        adamw = _adamw(settings, steps)
    clip = [optax.clip_by_global_norm(settings["clip"])] * bool(settings["clip"])
    parts = [*_hooks(settings, "gradients"), *clip, adamw, *_hooks(settings, "updates")]
    return optax.chain(*parts) if len(parts) > 1 else adamw


def _adamw(settings: Mapping, steps: int) -> optax.GradientTransformation:
    decay = _pattern(settings["decay"], "config.optimizer.decay")

    def decays(params):
        return jax.tree_util.tree_map_with_path(lambda path, _: bool(decay.search(path_name(path))), params)

    return optax.adamw(
        schedule(settings, steps),
        b1=settings["b1"],
        b2=settings["b2"],
        eps=settings["eps"],
        weight_decay=settings["weight_decay"],
        mask=decays,
    )


def _groups(settings: Mapping) -> list[dict]:
    """The entries of `config.optimizer.groups`, each checked by itself."""
    place, groups = "config.optimizer.groups", []
    for entry in entries(settings["groups"], place):
        if not isinstance(entry, Mapping) or not isinstance(entry.get("paths"), str) or len(entry) < 2:
            raise UserError(f"{place}: {entry!r}; a group is a dict of `paths`, a pattern, and of lr or weight_decay.")
        for key, value in entry.items():
            if key not in ("paths", *_OF_GROUPS):
                raise UserError(f"{place}: a group has no {key!r}.{nearest(key, _OF_GROUPS)}")
            if key != "paths" and (
                isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < float("inf")
            ):
                raise UserError(f"{place}: {key} is {value!r}; give a number that is not negative.")
        _pattern(entry["paths"], place)
        groups.append(dict(entry))
    return groups


def _labels(groups: list[dict], params) -> Any:
    """Of each leaf the pattern of its group, "" where it has none."""

    def label(path, _):
        return next((g["paths"] for g in groups if re.search(g["paths"], path_name(path))), "")

    return jax.tree_util.tree_map_with_path(label, params)


def check(settings: Mapping, train) -> None:
    """Raises UserError for settings that are wrong for the trainable leaves (shapes suffice): a group without a leaf, two with
    the same one, and a function of one's own that gives other shapes than it takes.
    """
    paths, owners = [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(train)], {}
    for pattern in (group["paths"] for group in _groups(settings)):
        matched = [path for path in paths if re.search(pattern, path)]
        if not matched:
            raise UserError(
                f"config.optimizer.groups: {pattern!r} matches none of the leaves that train; there are, for example, "
                f"{', '.join(paths[:3])}."
            )
        if twice := [path for path in matched if path in owners]:
            raise UserError(
                f"config.optimizer.groups: {owners[twice[0]]!r} and {pattern!r} both match {twice[0]}; a leaf has one group."
            )
        owners |= dict.fromkeys(matched, pattern)
    for own in (*_hooks(settings, "gradients"), *_hooks(settings, "updates")):
        jax.eval_shape(lambda params, own=own: own.update(params, own.init(params), params), train)


def _hooks(settings: Mapping, key: str) -> list[optax.GradientTransformation]:
    place = f"config.optimizer.{key}"
    return [_hook(resolve(entry, "updates"), place) for entry in entries(settings[key], place)]


def _hook(function: Callable, place: str) -> optax.GradientTransformation:
    """A function with its keywords, or what it gives, as an optax transformation."""
    name = getattr(getattr(function, "func", function), "__name__", function)
    takes = inspect.signature(function).parameters.values()
    count = sum(p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in takes)
    if not count and isinstance(own := function(), optax.GradientTransformation):
        return own
    if count != 3:
        raise UserError(f"{place}: {name} is neither a function of (updates, params, step) nor one that gives optax's own.")

    def update(updates, step, params=None):
        new = function(updates, params, step)
        shapes, before = ([(x.shape, x.dtype) for x in jax.tree.leaves(tree)] for tree in (new, updates))
        if jax.tree.structure(new) != jax.tree.structure(updates) or shapes != before:
            raise UserError(f"{place}: {name} gave another tree, or other shapes, than it was given.")
        return new, step + 1

    return optax.GradientTransformation(lambda params: jnp.zeros((), jnp.int32), update)


def partition(params, pattern: str):
    """(train, frozen): trees like params, each with None where the other has the leaf. train has the leaves that match."""
    matches = _pattern(pattern, "config.trainable").search
    paths = [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    if not any(map(matches, paths)):
        raise UserError(f"config.trainable: {pattern!r} matches no parameter; there are, for example, {', '.join(paths[:3])}.")
    chosen = jax.tree_util.tree_map_with_path(lambda path, _: bool(matches(path_name(path))), params)
    for path, x in jax.tree_util.tree_leaves_with_path(params):
        if matches(path_name(path)) and not jnp.issubdtype(x.dtype, jnp.floating):
            raise UserError(f"config.trainable: {pattern!r} matches {path_name(path)}, whose {x.dtype} has no gradient.")
    train = jax.tree.map(lambda x, c: x if c else None, params, chosen)
    frozen = jax.tree.map(lambda x, c: None if c else x, params, chosen)
    return train, frozen


def _pattern(text: str, key: str) -> re.Pattern:
    try:
        return re.compile(text)
    except re.error as e:
        raise UserError(f"{key}: {text!r} is no regular expression: {e}.") from None
