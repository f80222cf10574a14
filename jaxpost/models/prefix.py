"""Keys and values before every document: what soft prompts and learned prefixes come to.

`params["prefix"]` is a node (adapters/prompts.py) with `length`, the number m of places that it takes, and
`keys_values(model, params)`. Every document sees them as it would see m tokens in front of it: its own tokens stand at the
places m, m + 1, ..., and a sliding window counts the places of the prefix too. Batches do not change: a document's columns,
its `positions` included, are those of its own tokens.

While training, each layer attends to [m + S] keys. The sampler computes the keys and values once an update, and copies them
into the first m slots of its cache.
"""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from jaxpost import sharding
from jaxpost.models.attention import cache_axes, written
from jaxpost.types import Batch, Params


class KeysValues(flax.struct.PyTreeNode):
    """Keys and values as attention takes them, the keys rotated: [L,m,K,H] each, or [m,K,H] of one layer."""

    k: jax.Array
    v: jax.Array

    @property
    def length(self) -> int:
        """The number of places, m."""
        return self.k.shape[-3]

    def keys_values(self, model: Any, params: Params) -> "KeysValues":
        """Itself."""
        return self

    def ahead_of(self, k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
        """One layer's keys and values [m,K,H] ahead of those of rows [B,S,K,H]: [B,m+S,K,H] each."""

        def joined(own, rows):
            own = jnp.broadcast_to(own.astype(rows.dtype), (rows.shape[0], *own.shape))
            return sharding.shard(jnp.concatenate([sharding.shard(own, "BTKH"), rows], axis=1), "BTKH")

        return joined(self.k, k), joined(self.v, v)


def length(params: Params | None) -> int:
    """The number of places before each document that `params["prefix"]` takes; 0 without one."""
    return params["prefix"].length if params and "prefix" in params else 0


def max_positions(model: Any, params: Params | None) -> int:
    """The most tokens that a document may have: the model's positions without those of the prefix. A prefix is computed once
    for documents of any length, so with one longrope's second table is out of reach.
    """
    if not (taken := length(params)):
        return model.max_positions
    arch = getattr(model, "model", model).arch  # a patched model has its own inside
    short = [kind.rope.original for kind in arch.kinds if kind.rope.kind == "longrope"]
    return min([model.max_positions, *short]) - taken


def keys_values(model: Any, params: Params) -> KeysValues | None:
    """The keys and values of `params["prefix"]`, [L,m,K,H]; None without one."""
    return params["prefix"].keys_values(model, params) if "prefix" in params else None


def computed(model: Any, params: Params) -> Params:
    """Parameters whose prefix is its keys and values, so that no later forward computes them."""
    return {**params, "prefix": keys_values(model, params)} if "prefix" in params else params


def shifted(batch: Batch, params: Params) -> Batch:
    """The batch with the places of its tokens behind the prefix, and the ends of its prompts."""
    m = length(params)
    return {**batch, **{k: batch[k] + m for k in ("positions", "lengths") if k in batch}} if m else batch


def make_cache(model: Any, params: Params, batch_size: int, size: int) -> tuple:
    """A cache for documents of `size` tokens each, with the prefix (see `computed`) in its first slots."""
    cache = model.make_cache(batch_size, size + (m := length(params)))
    if not m:
        return cache
    before = params["prefix"]
    places = jnp.broadcast_to(jnp.arange(m), (batch_size, m))

    def filled(slots, own, axes):
        return written(slots, jnp.broadcast_to(own, (batch_size, *own.shape)), places, axes)

    layers = zip(cache, before.k, before.v, strict=True)
    axes = cache_axes()
    return tuple({"k": filled(held["k"], k, axes["k"]), "v": filled(held["v"], v, axes["v"])} for held, k, v in layers)
