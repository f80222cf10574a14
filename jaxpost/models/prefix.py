"""Keys and values before every document: what soft prompts and learned prefixes come to.

`params["prefix"]` is a node (adapters/prompts.py) with `length`, the number m of places that it takes, and
`keys_values(model, params)`. Every document sees them as it would see m tokens in front of it: its own tokens stand at the
places m, m + 1, ..., and a sliding window counts the places of the prefix too. Batches do not change: a document's columns,
its `positions` included, are those of its own tokens. There may be E prefixes, of which a document sees the one that a column
names (routes.py).

While training, each layer attends to [E m + S] keys. The sampler computes the keys and values once an update, and copies those
that a prompt sees into the first m slots of its cache.
"""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from jaxpost import sharding
from jaxpost.models import routes
from jaxpost.models.attention import cache_axes, written
from jaxpost.types import Batch, Params


class KeysValues(flax.struct.PyTreeNode):
    """Keys and values as attention takes them, the keys rotated: [L,E,m,K,H] each, or [E,m,K,H] of one layer.

    column: that by which a document chooses among the E, "" where E is 1.
    """

    k: jax.Array
    v: jax.Array
    column: str = flax.struct.field(pytree_node=False, default="")

    @property
    def count(self) -> int:
        """E."""
        return self.k.shape[-4]

    @property
    def length(self) -> int:
        """The number of places, m."""
        return self.k.shape[-3]

    def keys_values(self, model: Any, params: Params) -> "KeysValues":
        """Itself."""
        return self

    def ahead_of(self, k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
        """One layer's keys and values [E,m,K,H] ahead of those of rows [B,S,K,H]: [B,E*m+S,K,H] each."""

        def joined(own, rows):
            own = own.reshape(-1, *own.shape[2:])
            own = jnp.broadcast_to(own.astype(rows.dtype), (rows.shape[0], *own.shape))
            return sharding.shard(jnp.concatenate([sharding.shard(own, "BTKH"), rows], axis=1), "BTKH")

        return joined(self.k, k), joined(self.v, v)

    def seen(self, batch: Batch) -> jax.Array | None:
        """[B,S,E*m] bool: which of these keys each token sees; None for all."""
        if not self.column:
            return None
        own = routes.numbers(batch, self.column)[..., None] == jnp.arange(self.count)
        return jnp.repeat(own & (batch["segments"] > 0)[..., None], self.length, axis=2)


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
    """The keys and values of `params["prefix"]`, [L,E,m,K,H]; None without one."""
    return params["prefix"].keys_values(model, params) if "prefix" in params else None


def computed(model: Any, params: Params) -> Params:
    """Parameters whose prefix is its keys and values, so that no later forward computes them."""
    return {**params, "prefix": keys_values(model, params)} if "prefix" in params else params


def shifted(batch: Batch, params: Params) -> Batch:
    """The batch with the places of its tokens behind the prefix, and the ends of its prompts."""
    m = length(params)
    return {**batch, **{k: batch[k] + m for k in ("positions", "lengths") if k in batch}} if m else batch


def make_cache(model: Any, params: Params, batch: Batch) -> tuple:
    """A cache for the documents of a batch, a row each, with their prefix (see `computed`) in its first slots."""
    batch_size, size = batch["tokens"].shape
    cache = model.make_cache(batch_size, size + (m := length(params)))
    if not m:
        return cache
    before = params["prefix"]
    places = jnp.broadcast_to(jnp.arange(m), (batch_size, m))
    which = routes.numbers(batch, before.column)[:, 0] if before.column else jnp.zeros(batch_size, jnp.int32)

    def filled(slots, own, axes):
        return written(slots, own[which], places, axes)

    layers = zip(cache, before.k, before.v, strict=True)
    axes = cache_axes()
    return tuple({"k": filled(held["k"], k, axes["k"]), "v": filled(held["v"], v, axes["v"])} for held, k, v in layers)
