"""From tokens to documents: numbers of a row's documents, [B,N] each, N = 2 ceil(S/2) + 1, in the order of `segments`.

Document 0 is the padding. A document's completion is its tokens in the mask; a document without any does not count. A number of
a whole document is a column too, with the same value at each of its tokens. Rows are never mixed, so the results split over
microbatches and devices as the rows do.
"""

import jax
import jax.numpy as jnp

from jaxpost.types import Batch


def _reduced(reduce, values: jax.Array, segments: jax.Array) -> jax.Array:
    count = 2 * ((segments.shape[1] + 1) // 2) + 1
    return jax.vmap(lambda v, s: reduce(v, s, num_segments=count))(values, segments)


def sums(values: jax.Array, batch: Batch) -> jax.Array:
    """values [B,S] added up over each document's completion -> [B,N]."""
    return _reduced(jax.ops.segment_sum, jnp.where(batch["mask"], values, 0.0), batch["segments"])


def lengths(batch: Batch) -> jax.Array:
    """[B,N] float32: the tokens of each document's completion."""
    return sums(jnp.ones(batch["mask"].shape, jnp.float32), batch)


def counts(column: jax.Array, batch: Batch) -> jax.Array:
    """[B,N] float32: the number of tokens of each document at which a column [B,S] bool is set, learned or not."""
    return _reduced(jax.ops.segment_sum, column.astype(jnp.float32), batch["segments"])


def digests(batch: Batch) -> jax.Array:
    """[B,N] uint32: a number of each document's learned tokens and their places, the same wherever the document lies."""
    tokens, places = batch["tokens"].astype(jnp.uint32), batch["positions"].astype(jnp.uint32)
    x = tokens * jnp.uint32(0x9E3779B1) + places * jnp.uint32(0x85EBCA77)
    x = (x ^ (x >> 15)) * jnp.uint32(0x2C1B3C6D)
    return _reduced(jax.ops.segment_sum, jnp.where(batch["mask"], x ^ (x >> 12), 0), batch["segments"])


def constants(column: jax.Array, batch: Batch) -> jax.Array:
    """A column [B,S] that is constant over each document's completion -> [B,N], exactly; 0 where there is none."""
    largest = _reduced(jax.ops.segment_max, jnp.where(batch["mask"], column, -jnp.inf), batch["segments"])
    return jnp.where(jnp.isfinite(largest), largest, 0.0)


def last(values: jax.Array, batch: Batch) -> jax.Array:
    """values [B,S] at the last token of each document's completion -> [B,N]; 0 where there is none."""
    places = jnp.where(batch["mask"], jnp.arange(values.shape[1]), -1)
    place = _reduced(jax.ops.segment_max, places, batch["segments"])
    return jnp.where(place >= 0, jnp.take_along_axis(values, jnp.maximum(place, 0), axis=1), 0.0)


def over_tokens(numbers: jax.Array, batch: Batch) -> jax.Array:
    """The documents' numbers [B,N] -> [B,S], at each of their tokens."""
    return jnp.take_along_axis(numbers, batch["segments"], axis=1)


def sides(numbers: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The documents' numbers [B,N] -> (the chosen's, the rejected's), each [B,P].

    A pair is two consecutive documents of a row, the chosen (1, 3, ...) before the rejected (2, 4, ...).
    """
    return numbers[:, 1::2], numbers[:, 2::2]


def of_pairs(numbers: jax.Array) -> jax.Array:
    """The pairs' numbers [B,P] -> [B,N], at both documents of each pair; 0 for the padding."""
    return jnp.pad(jnp.repeat(numbers, 2, axis=1), ((0, 0), (1, 0)))
