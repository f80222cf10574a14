"""Exact search: for each query the passages of the highest inner product, a block of passages at a time."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxpost.errors import UserError


def nearest(queries, passages, k: int, *, block: int = 65536, at_once: int = 1024) -> tuple[np.ndarray, np.ndarray]:
    """(scores [Q,k] float32, numbers [Q,k] int32) of the k passages with the highest scores, the highest first; of equal scores
    the passage of the lower number first.

    queries [Q,D], passages [N,D]: float32. k: 1 to N. block: passages scored at a time, at_once: queries; they change nothing
    but memory. Raises UserError for another k.
    """
    queries, passages = np.asarray(queries, np.float32), np.asarray(passages, np.float32)
    if not 1 <= k <= len(passages):
        raise UserError(f"k={k} of {len(passages)} passages; give 1 to {len(passages)}.")
    results = []
    for first in range(0, len(queries), at_once):
        some = queries[first : first + at_once]
        some = np.pad(some, ((0, min(at_once, len(queries)) - len(some)), (0, 0)))
        scores, numbers = jnp.full((len(some), k), -jnp.inf), jnp.zeros((len(some), k), jnp.int32)
        for start in range(0, len(passages), block):
            part = passages[start : start + block]
            part = np.pad(part, ((0, min(block, len(passages)) - len(part)), (0, 0)))
            scores, numbers = _merged(some, part, start, len(passages), scores, numbers)
        results.append((np.asarray(scores), np.asarray(numbers)))
    scores, numbers = (np.concatenate(x)[: len(queries)] for x in zip(*results, strict=True))
    return scores, numbers


@jax.jit
def _merged(queries, passages, start, count, scores, numbers):
    """The highest scores so far and those of a block, together; a block's passages from number `count` on are padding."""
    own = jnp.arange(len(passages)) + start
    new = jnp.where(own < count, jnp.matmul(queries, passages.T, precision="highest"), -jnp.inf)
    # Of equal values top_k takes the first, and earlier passages stand first.
    scores, places = jax.lax.top_k(jnp.concatenate([scores, new], axis=1), scores.shape[1])
    every = jnp.concatenate([numbers, jnp.broadcast_to(own, new.shape)], axis=1)
    return scores, jnp.take_along_axis(every, places, axis=1)
