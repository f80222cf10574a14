"""A model's adapters, as config and checkpoints name them: an entry, or a list of entries that are applied in order.

What an adapter does to the tree is a function of adapters/ or of the user's; what else there is to know of it, it declares
(`jaxpost.declare.adapter`). Here its entries become weights, one at a time where they are read.
"""

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from flax.traverse_util import flatten_dict, unflatten_dict

from jaxpost.config.resolve import entries, resolve, trust
from jaxpost.declare import declared
from jaxpost.errors import UserError
from jaxpost.types import Params

Adapter = str | Mapping | Sequence | None  # as a config has it


def listed(adapter: Adapter) -> list[dict]:
    """The entries of an adapter, each a dict with a name; none for no adapter."""
    return [{"name": one} if isinstance(one, str) else dict(one) for one in entries(adapter or (), "config.adapter")]


def trusted(adapter: Adapter) -> None:
    """Records the functions that the user names: from here on files may name them too."""
    trust(listed(adapter))


def check_text(adapter: Adapter) -> None:
    """Raises UserError for an adapter that begins as a text, of a model without a tokenizer."""
    if any(entry.get("text") for entry in listed(adapter)):
        raise UserError("config.adapter.text: the model comes without a tokenizer, so there are no tokens to begin with.")


def check(spec: Any) -> None:
    """Raises UserError for a prompt or prefix around a model that has no place for one: an encoder, a decoder whose tokens see
    what is behind them, or what a function makes; and for a text that the tokenizer has no tokens for.
    """
    if any(path.startswith("prefix/") for adds in declares(spec.adapter, "adds") for path in adds):
        arch = getattr(spec.transformer, "arch", None)
        if getattr(arch, "attend", "whole") == "whole" or not hasattr(spec.transformer, "keys_values"):
            raise UserError("config.adapter: a prompt stands before each document of a decoder; take lora for this model.")
    for entry in listed(spec.adapter):
        _completed(resolve(entry, "adapters"), spec)


def as_one(adapters: Sequence[dict]) -> dict | list[dict]:
    """Entries as config and checkpoints have them: {} for none, a dict for one, a list for several."""
    return list(adapters) if len(adapters) > 1 else dict(*adapters)


def recorded(adapter: Adapter) -> dict | list[dict]:
    """An adapter as a checkpoint records it: the functions' full names and all their options, defaults included.

    An adapter that is read from files gives an entry that does not need them, by what it declares as `recorded`.
    """
    return as_one([_recorded(entry) for entry in listed(adapter)])


def _recorded(entry: dict) -> dict:
    bound = resolve(entry, "adapters")
    if (record := declared(bound, "recorded")) is not None:
        return _recorded(record())
    name, keywords = entry["name"], inspect.signature(bound.func).parameters.values()
    completed = declared(bound, "completed")
    defaults = {p.name: p.default for p in keywords if p.kind is p.KEYWORD_ONLY and p.name not in completed}
    return {"name": f"{name}.{name}" if name.isidentifier() else name, **defaults, **bound.keywords}


def chosen(adapter: Adapter, inside: dict | list[dict]) -> dict | list[dict]:
    """The adapter of a model: the one inside the checkpoint, else the recipe's. Raises UserError for two that differ."""
    if adapter and inside and recorded(adapter) != inside:
        raise UserError(
            f"config.adapter: the model has one inside, {inside}. Leave the setting out to train that one on, or merge it "
            "first: python -m jaxpost.export --checkpoint=WORKDIR --out=FOLDER."
        )
    return inside or as_one(listed(adapter))


def declares(adapter: Adapter, name: str) -> list[Any]:
    """What each of an adapter's functions declares under a name; one that is read from files, what its kind declares."""
    return [declared(resolve(_recorded(entry), "adapters"), name) for entry in listed(adapter)]


def added(adapter: Adapter) -> str:
    """The pattern of the paths that an adapter adds to the tree; it matches nothing where there is none.

    Raises UserError for a function that does not declare them.
    """
    names = []
    for entry, adds in zip(listed(adapter), declares(adapter, "adds"), strict=True):
        if not adds:
            raise UserError(
                f"config.adapter: {entry['name']} does not say which leaves it adds; put @adapter(adds=(...)) above the "
                "function (from jaxpost.declare import adapter)."
            )
        names += adds
    return f"(^|/)({'|'.join(map(re.escape, names))})$" if names else "(?!)"


def applied(adapter: Adapter, params: Params, key: jax.Array) -> Params:
    """The tree with all adapters, for its shapes: keywords that the model decides are left at their defaults."""
    for entry in listed(adapter):
        params = resolve(entry, "adapters")(params, key)
    return params


def _completed(bound: Callable, spec: Any) -> dict[str, Any]:
    """The keywords of an adapter that the model decides."""
    return {name: value(spec, bound.keywords) for name, value in declared(bound, "completed").items()}


def makers(spec: Any, shapes: Callable[[Adapter], Params]) -> dict[str, tuple[Callable, Any]]:
    """{path: (the adapter that changes or adds the weight there, its shapes)} of a model's spec (loading.ModelSpec).

    shapes: adapter -> the shapes of the model's tree with it.
    """
    by_path, before, adapters = {}, flatten_dict(shapes(()), sep="/"), listed(spec.adapter)
    for count, entry in enumerate(adapters, start=1):
        bound = resolve(entry, "adapters")
        if completed := _completed(bound, spec):
            bound = resolve({**entry, **completed}, "adapters")
        after = flatten_dict(shapes(adapters[:count]), sep="/")
        by_path |= {path: (bound, x) for path, x in after.items() if type(x) is not type(before.get(path))}
        before = after
    return by_path


def around(by_path: Mapping[str, tuple[Callable, Any]], key: jax.Array) -> Callable[[str, Any], Any]:
    """(path, weight) -> the weight with its adapter around it; one at a time, so only one is in memory twice."""

    def leaf(path, weight):
        if path not in by_path:
            return weight
        make, shapes = by_path[path]

        def one(weight):
            return flatten_dict(make(unflatten_dict({path: weight}, sep="/"), key), sep="/")[path]

        return jax.jit(one, out_shardings=jax.tree.map(lambda x: x.sharding, shapes))(weight)

    return leaf


def beside(by_path: Mapping[str, tuple[Callable, Any]], params: Params, key: jax.Array) -> Params:
    """The parameters with the weights that adapters add beside the model's own."""
    flat = flatten_dict(params, sep="/")
    for path, (make, shapes) in by_path.items():
        if path not in flat:
            places = jax.tree.map(lambda x: x.sharding, shapes)

            def one(params, make=make, path=path):
                return flatten_dict(make(params, key), sep="/")[path]

            flat[path] = jax.jit(one, out_shardings=places)(params)
    return unflatten_dict(flat, sep="/")


def neutral(adapter: Adapter) -> dict | list[dict]:
    """Those adapters that at their start change nothing that the model computes."""
    return as_one([entry for entry in listed(adapter) if declared(resolve(entry, "adapters"), "neutral")])


def without(whole: Params, left: Params, params: Params) -> Params:
    """The parameters without some of their adapters; whole, left: the model's shapes with all of them, and with the others."""
    whole, left, flat = (flatten_dict(tree, sep="/") for tree in (whole, left, params))
    kept = {path: x for path, x in flat.items() if path in left or path not in whole}
    gone = [path for path, x in left.items() if type(x) is not type(whole[path])]
    return unflatten_dict(kept | {path: flat[path].base for path in gone}, sep="/")
