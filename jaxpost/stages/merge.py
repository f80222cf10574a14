"""A stage that merges: the weights of several models, or one model's changed, by a function of merging/.

    merged={"do": "merge", "with": "arithmetic.soup", "of": ("@sft", "@dpo")}

The first model says what the merged one is: config, tokenizer, template. The result is a checkpoint like a trained one.
"""

import json
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxpost import sharding
from jaxpost.config.naming import digest_of
from jaxpost.config.resolve import resolve
from jaxpost.errors import UserError
from jaxpost.models import loading
from jaxpost.recipe import plain
from jaxpost.stages import columns
from jaxpost.stages.run import Output, Run, described
from jaxpost.storage import checkpoint
from jaxpost.types import TrainState


class Merge(NamedTuple):
    """A stage that merges, checked: the first model, and the function."""

    name: str
    settings: Any
    spec: loading.ModelSpec
    function: Callable


def planned(name: str, s, run: Run) -> Merge:
    """Resolves what is merged, and how. Raises UserError where one of the models is missing, or is an adapted one."""
    if not s.of:
        raise UserError(f"config.{name}.of: name the models to merge, as ('@sft', '@dpo').")
    spec, function, models = described(s, run.mesh), resolve(plain(s["with"]), "merging"), run.models(s)
    for entry in s.of:
        loading.check(models(entry))
        if models(entry).adapter:
            raise UserError(f"config.{name}.of: {entry} has an adapter; merge it into its weights first (jaxpost.export).")
    return Merge(name, s, spec, function)


def output(plan: Merge) -> Output:
    """What later stages are told before there are weights."""
    return Output(pending=True, spec=plan.spec)


def make(plan: Merge, run: Run) -> Output:
    """Merges the weights, unless that was done before from the same ones."""
    s, folder = plan.settings, run.workdir / "checkpoints" / plan.name
    models = [run.models(s)(entry) for entry in s.of]
    origin = json.loads(json.dumps([columns.identity(model, s.seed) for model in models] + [digest_of(plan.function)]))
    saved = checkpoint.Checkpoints(folder, keep=1)
    try:
        if saved.latest() is not None and saved.meta(saved.latest()).get("merged") == origin:
            if jax.process_index() == 0:
                print(f"{plan.name}: merged before.", file=sys.stderr)
            return Output(spec=plan.spec)
        if saved.latest() is not None:
            raise UserError(
                f"config.{plan.name}: the models that it merged, or how, have changed since, and {folder} has the weights of "
                "before. Merge in a stage of another name, or in another workdir."
            )
        params = _merged(plan, [loading.weights(model, run.mesh, s.seed) for model in models])
        whole = loading.abstract(plan.spec.transformer, run.mesh, None, plan.spec.leaves)
        if jax.tree.map(jnp.shape, params) != jax.tree.map(jnp.shape, whole):
            raise UserError(f"config.{plan.name}.with: it gives a tree of other shapes than {s.of[0]} has.")
        params = jax.device_put(params, sharding.stored(run.mesh, params))
        zero, key = jnp.zeros((), jnp.int32), jax.random.PRNGKey(s.seed)
        state = TrainState(zero, params, jax.tree.map(lambda _: None, params), {"count": zero}, None, key, zero, zero)
        saved.save(state, {"done": True, "merged": origin, "leaves": dict(plan.spec.leaves), "seconds": 0.0})
    finally:
        saved.close()
    return Output(spec=plan.spec)


def _merged(plan: Merge, models: list):
    try:
        return plan.function(*models)
    except (TypeError, ValueError) as error:
        raise UserError(f"config.{plan.name}.with: it failed with {type(error).__name__}: {error}") from error
