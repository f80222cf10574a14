"""Heads as functions of data: the unembedding that an Output's head describes, and a scalar head.

The head decides, as a weight's leaf does in einsum.py: a `Head` multiplies; any other node has `logits(hidden [R,D]) -> [R,V]
float32` and `vocab`, and what scores, samples and distils asks no more of it. Its arrays are [V,D], or small.
"""

from typing import Any

import jax
import jax.numpy as jnp

from jaxpost.types import Head


def logits(hidden: jax.Array, head: Any) -> jax.Array:
    """hidden [..., D] -> logits [..., V] in float32. Callers keep the leading axes small: it is the largest array of a step."""
    flat = hidden.reshape(-1, hidden.shape[-1])
    out = _linear(flat, head) if isinstance(head, Head) else head.logits(flat)
    return out.reshape(*hidden.shape[:-1], -1)


def vocab(head: Any) -> int:
    """V, the number of logits that a head gives."""
    return head.weight.shape[0] if isinstance(head, Head) else head.vocab


def _linear(hidden: jax.Array, head: Head) -> jax.Array:
    out = _product(hidden, head.weight)
    return out if head.soft_cap is None else head.soft_cap * jnp.tanh(out / head.soft_cap)


def scalar(hidden: jax.Array, kernel: jax.Array) -> jax.Array:
    """hidden [..., D], kernel [D,1] -> [...] float32: one number of each hidden state, such as a reward."""
    return jnp.dot(hidden, kernel.astype(hidden.dtype), preferred_element_type=jnp.float32)[..., 0]


@jax.custom_vjp
def _product(x: jax.Array, w: jax.Array) -> jax.Array:
    """x [T,D], w [V,D] -> [T,V] float32, multiplied in x's dtype.

    The gradient's products are in x's dtype too: by default the incoming float32 gradient would be multiplied as float32, many
    times slower on a matrix unit.
    """
    return _dot(x, w.astype(x.dtype), 1, 1)


def _dot(a, b, i, j):
    return jax.lax.dot_general(a, b, (((i,), (j,)), ((), ())), preferred_element_type=jnp.float32)


def _product_backward(saved, g):
    x, w = saved
    g = g.astype(x.dtype)
    return _dot(g, w.astype(x.dtype), 1, 0).astype(x.dtype), _dot(g, x, 0, 0).astype(w.dtype)


_product.defvjp(lambda x, w: (_product(x, w), (x, w)), _product_backward)
