"""From tokens to documents: the numbers of a row's documents, [B,N] each, N = 2 ceil(S/2) + 1, in the order of `segments`.

Document 0 is the padding. A document counts where the mask keeps a token of it, and its completion is those tokens. A number
that belongs to a document as a whole comes as a column too, the same at all of its tokens. Rows are never mixed, so what is
made here is split over microbatches and devices as the rows are.
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
    """[B,N] float32: at how many of each document's tokens a column [B,S] bool is set, whatever the mask keeps."""
    return _reduced(jax.ops.segment_sum, column.astype(jnp.float32), batch["segments"])


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
    """The documents' numbers [B,N] -> [B,S]: each token has its document's."""
    return jnp.take_along_axis(numbers, batch["segments"], axis=1)


def sides(numbers: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The documents' numbers [B,N] -> those of the chosen and of the rejected, each [B,P].

    A pair is two consecutive documents of a row, the chosen (1, 3, ...) before the rejected (2, 4, ...).
    """
    return numbers[:, 1::2], numbers[:, 2::2]


def of_pairs(numbers: jax.Array) -> jax.Array:
    """The pairs' numbers [B,P] -> [B,N]: both documents have their pair's; the padding has 0."""
    return jnp.pad(jnp.repeat(numbers, 2, axis=1), ((0, 0), (1, 0)))
