"""From tokens to documents: numbers of a row's documents, [B,N] each, N = 2 ceil(S/2) + 1, in the order of `segments`.

Document 0 is the padding. A document's completion is its tokens in the mask; a document without any does not count. A number of
a whole document is a column too, with the same value at each of its tokens. Rows are never mixed, so the results split over
microbatches and devices as the rows do.
"""

import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from jaxpost.errors import UserError
from jaxpost.types import Batch

POOLINGS = ("last", "mean", "latent")


def _reduced(reduce, values: jax.Array, segments: jax.Array, count: int | None = None) -> jax.Array:
    count = count or 2 * ((segments.shape[1] + 1) // 2) + 1
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
    return _at_last(values, batch["mask"], batch["segments"])


def _at_last(values: jax.Array, tokens: jax.Array, segments: jax.Array, count: int | None = None) -> jax.Array:
    """values [B,S,...] at the last of each document's `tokens` [B,S] bool -> [B,N,...]; 0 where there is none."""
    places = jnp.where(tokens, jnp.arange(values.shape[1]), -1)
    place = _reduced(jax.ops.segment_max, places, segments, count)
    place = place.reshape(*place.shape, *[1] * (values.ndim - 2))
    nothing = 0.0 if jnp.issubdtype(values.dtype, jnp.floating) else 0
    return jnp.where(place >= 0, jnp.take_along_axis(values, jnp.maximum(place, 0), axis=1), nothing)


def whole(column: jax.Array, batch: Batch, count: int | None = None) -> jax.Array:
    """A column [B,S] that is constant over each document, learned or not -> [B,N] of its dtype; 0 where there is none.

    count: N, where rows have fewer documents than tokens would allow.
    """
    return _at_last(column, batch["segments"] > 0, batch["segments"], count)


def latents(count: int) -> dict:
    """The parameters of pooling="latent", with so many latents, as `declare.objective` takes them."""
    if not isinstance(count, int) or isinstance(count, bool) or count < 1:
        raise UserError(f"config.objective.latents: {count!r}; it is a whole number of at least 1.")
    drawn = {"normal": 0.02}
    return {"latent/vectors": (f"{count} D", {"normal": 1.0}), "latent/up": ("DD", drawn), "latent/down": ("DD", drawn)}


def _attended(hidden: jax.Array, latent: Mapping[str, jax.Array]) -> jax.Array:
    """What each token [...,D] makes of the latents L [R,D]:  gelu(softmax(h L^T / sqrt(D)) L W1) W2."""
    vectors = latent["vectors"]
    weights = jax.nn.softmax(hidden @ vectors.T / math.sqrt(hidden.shape[-1]), axis=-1)
    return jax.nn.gelu(weights @ vectors @ latent["up"], approximate=False) @ latent["down"]


def pooled(
    hidden: jax.Array,
    batch: Batch,
    *,
    pooling: str,
    latent: Mapping[str, jax.Array] | None = None,
    tokens: jax.Array | None = None,
    count: int | None = None,
):
    """hidden [B,S,D] -> a vector of each document [B,N,D] float32; 0 where there is none.

    pooling: "last" takes the hidden state of the document's last token, which has read all others; "mean" averages over its
    tokens; "latent" lets each token attend to learned vectors first, the parameters `latent` (`latents`), and averages what
    comes of that ("NV-Embed: Improved Techniques for Training LLMs as Generalist Embedding Models", here with one head). tokens
    [B,S] bool: the tokens that count, those of the mask for example; None is all of them. count: N, as in `whole`. Raises
    UserError for another pooling, and for one whose parameters are not there.
    """
    segments = batch["segments"]
    tokens = segments > 0 if tokens is None else tokens
    hidden = hidden.astype(jnp.float32)
    if pooling == "last":
        return _at_last(hidden, tokens, segments, count)
    if pooling not in POOLINGS:
        raise UserError(f"pooling={pooling!r}: give one of {', '.join(POOLINGS)}.")
    if pooling == "latent":
        if latent is None:
            raise UserError("pooling='latent': the model has no latents; it is one trained so by an objective of contrastive.")
        hidden = _attended(hidden, latent)
    total = _reduced(jax.ops.segment_sum, jnp.where(tokens[..., None], hidden, 0.0), segments, count)
    size = _reduced(jax.ops.segment_sum, tokens.astype(jnp.float32), segments, count)
    return total / jnp.maximum(size, 1.0)[..., None]


def unit(vectors: jax.Array) -> jax.Array:
    """Vectors [...,D] divided by their length; zeros stay zeros, and have no gradient."""
    squares = jnp.sum(vectors**2, axis=-1, keepdims=True)
    return jnp.where(squares == 0, 0.0, vectors * jax.lax.rsqrt(jnp.where(squares == 0, 1.0, squares)))


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
