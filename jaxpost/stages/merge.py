"""A stage that merges: the weights of several models become one, by a function of merging/.

    merged={"do": "merge", "with": {"name": "ties", "density": 0.3}, "of": ("BASE", "@sft", "@dpo")}

The first model says what the merged one is: config, tokenizer, template. Where a method has a base, that is the first. The
models are read one tensor after another, and the result is a checkpoint like a trained one. `jaxpost.merge` does the same
between folders.
"""

import dataclasses
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from jaxpost import sharding
from jaxpost.config.naming import digest_of, named
from jaxpost.config.resolve import known, resolve
from jaxpost.errors import UserError
from jaxpost.merging import tensorwise
from jaxpost.models import layout, loading, tensors
from jaxpost.models.identity import identity
from jaxpost.recipe import plain
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
    """Resolves what is merged, and how. Raises UserError where one of the models is missing, is an adapted one, or differs from
    the first.
    """
    if not s.of:
        raise UserError(f"config.{name}.of: name the models to merge, as ('@sft', '@dpo').")
    if wrong := [model for model in s.of if not isinstance(model, str)]:
        raise UserError(
            f"config.{name}.of: {wrong[0]!r} is no name; merge folders, workdirs, names on the hub, '@NAME' or 'recipe:PATH'."
        )
    spec = described(s, run.mesh)
    function = resolve(entry(plain(s["with"])), "merging")
    earlier = {f"@{stage}": output.spec for stage, output in run.outputs.items()}
    models = [(model, earlier.get(model) or loading.describe(model)) for model in s.of]
    for _, model in models:
        loading.check(model)
    # The stage's settings describe the model that the first one was trained from, which may lack leaves that it has.
    spec = dataclasses.replace(spec, leaves=_own_leaves(models[0][1]))
    check(function, models, f"config.{name}.of", _shapes_of_leaves(spec, run.mesh))
    return Merge(name, s, spec, function)


def entry(what: Mapping | Callable | str) -> dict:
    """A merge's entry as a dict; a name without its file is completed, as "ties" is sparse.ties."""
    what = named({"with": what, "do": "merge"}, ("with",))["with"]
    what = {"name": what} if isinstance(what, str) else dict(what)
    whole = [full for full in known("merging") if full.endswith(f".{what.get('name')}")]
    return {**what, "name": whole[0]} if len(whole) == 1 else what


def check(
    function: Callable,
    models: Sequence[tuple[str, loading.ModelSpec]],
    place: str,
    leaves: Mapping[str, tuple[int, ...]] | None = None,
) -> None:
    """Raises UserError where the function does not suit (name, spec) models, or where they are not of one kind: where an
    adapter is around one, where its architecture or tokenizer differs from the first one's. A model without a tokenizer suits
    any. leaves: {path: shape} beside the model's own. Reads no weights.
    """
    (first_name, first), *_ = models
    for name, spec in models:
        if not hasattr(spec.transformer, "arch"):
            raise UserError(f"{place}: {name} is made by {spec.config['name']}; merge models of Hugging Face's architectures.")
        if spec.adapter:
            raise UserError(f"{place}: {name} has an adapter; merge it into its weights first (jaxpost.export).")
        if differing := _difference(first.transformer.arch, spec.transformer.arch):
            raise UserError(f"{place}: {differing} in {first_name} and {name}; merge models of one architecture.")
        if _own_leaves(first).keys() != _own_leaves(spec).keys():
            only = min(_own_leaves(first).keys() ^ _own_leaves(spec).keys())
            raise UserError(f"{place}: only one of {first_name} and {name} has {only}.")
        if spec is not first and first.tokenizer is not None and spec.tokenizer is not None:
            _check_tokenizers(first_name, first.tokenizer, name, spec.tokenizer, place)
    arch = first.transformer.arch
    shapes = {name: shape for name, (shape, _) in layout.places(arch, leaves).items()}
    tensorwise.check(function, shapes, len(models), arch.layers)


def _own_leaves(spec: loading.ModelSpec) -> dict:
    """The leaves beside the model's own that belong to it; a teacher's head is the teacher's."""
    return {path: leaf for path, leaf in spec.leaves.items() if path not in loading.others(spec)}


def _shapes_of_leaves(spec: loading.ModelSpec, mesh) -> dict[str, tuple[int, ...]]:
    whole = flatten_dict(loading.abstract(spec.transformer, mesh, None, spec.leaves), sep="/")
    return {path: whole[path].shape for path in spec.leaves}


def _difference(one, other) -> str:
    """The first constant in which two architectures differ, with both values; "" where they are alike."""
    one, other = _flat(one), _flat(other)
    differing = [name for name in one | other if one.get(name) != other.get(name)]
    differing = [name for name in differing if name not in ("init_std", "max_positions")]
    return f"{differing[0]} is {one.get(differing[0])} and {other.get(differing[0])}" if differing else ""


def _flat(value: Any, name: str = "") -> dict[str, Any]:
    """{path: constant} of an architecture, as {"kinds.0.rope.theta": 10000.0}."""
    if isinstance(value, tuple):
        items = list(value._asdict().items()) if hasattr(value, "_asdict") else list(enumerate(value))
    elif dataclasses.is_dataclass(value):
        items = list(vars(value).items())
    else:
        return {name: value}
    return {path: x for key, inner in items for path, x in _flat(inner, f"{name}.{key}".lstrip(".")).items()}


def _check_tokenizers(first_name: str, first: Any, name: str, other: Any, place: str) -> None:
    one, two = ({i: token for token, i in t.get_vocab().items()} for t in (first, other))
    for i in sorted(one.keys() | two.keys()):
        if one.get(i) != two.get(i):
            tokens = f"{one.get(i)!r} in {first_name}, {two.get(i)!r} in {name}"
            raise UserError(f"{place}: the tokenizers differ, first in token {i}: {tokens}; merge models of one tokenizer.")
    one, two = (json.loads(t.backend_tokenizer.to_str())["model"].get("merges") or [] for t in (first, other))
    if one != two:
        at = next((i for i, (a, b) in enumerate(zip(one, two, strict=False)) if a != b), min(len(one), len(two)))
        a, b = (merges[at] if at < len(merges) else None for merges in (one, two))
        raise UserError(f"{place}: the tokenizers differ, first in merge {at}: {a!r} in {first_name}, {b!r} in {name}.")


def output(plan: Merge) -> Output:
    """What later stages are told before there are weights."""
    return Output(pending=True, spec=plan.spec)


def make(plan: Merge, run: Run) -> Output:
    """Merges the weights, unless that was done before from the same ones."""
    s, folder = plan.settings, run.workdir / "checkpoints" / plan.name
    models = [run.models(s)(model) for model in s.of]
    origin = json.loads(json.dumps([identity(model, s.seed) for model in models] + [digest_of(plan.function)]))
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
        params = _merged(plan, models, run.mesh)
        zero, key = jnp.zeros((), jnp.int32), jax.random.PRNGKey(s.seed)
        state = TrainState(zero, params, jax.tree.map(lambda _: None, params), {"count": zero}, None, key, zero, zero)
        saved.save(state, {"done": True, "merged": origin, "leaves": dict(plan.spec.leaves), "seconds": 0.0})
    finally:
        saved.close()
    return Output(spec=plan.spec)


def _merged(plan: Merge, models: Sequence[loading.ModelSpec], mesh) -> Any:
    """The merged parameters in their place on the mesh, one after the other."""
    arch = plan.spec.transformer.arch
    where = layout.places(arch, _shapes_of_leaves(plan.spec, mesh))
    whole = flatten_dict(loading.abstract(plan.spec.transformer, mesh, None, plan.spec.leaves), sep="/")
    stream = tensorwise.stream(plan.function, [tensors.opened(model) for model in models], where, arch.layers)

    def kept(path: str, array: np.ndarray) -> jax.Array:
        return sharding.assembled(array.shape, whole[path].sharding, array.__getitem__)

    return tensors.to_tree(stream, where, kept)
