"""Optimizers and learning-rate schedules, by optax; which leaves train and which decay, by path.

Rules by the number of dimensions do not work here, since layers are stacked and every bias is a matrix. So both choices are
regular expressions over paths such as layers/attention/q/kernel.
"""

import re
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import optax

from jaxpost.config.resolve import nearest
from jaxpost.errors import UserError
from jaxpost.sharding import path_name


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

    settings: lr, schedule, warmup, end, b1, b2, eps, weight_decay, decay (pattern), clip (global norm; 0 is off).
    """

    decay = _pattern(settings["decay"], "config.optimizer.decay")

    def decays(params):
        return jax.tree_util.tree_map_with_path(lambda path, _: bool(decay.search(path_name(path))), params)

    adamw = optax.adamw(
        schedule(settings, steps),
        b1=settings["b1"],
        b2=settings["b2"],
        eps=settings["eps"],
        weight_decay=settings["weight_decay"],
        mask=decays,
    )
    return optax.chain(optax.clip_by_global_norm(settings["clip"]), adamw) if settings["clip"] else adamw


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
