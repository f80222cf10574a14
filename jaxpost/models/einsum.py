"""Every product of activations with a weight goes through here, so that a weight may one day be something else than an array.

The leaf's type decides what is done: today an array. An adapter or a quantised weight becomes a pytree node with a branch
below, and no model changes.
"""

import jax
import jax.numpy as jnp


def project(x: jax.Array, kernel: jax.Array, bias: jax.Array | None = None) -> jax.Array:
    """x [..., I] @ kernel [I, O] (+ bias [O]) -> [..., O], in x's dtype, accumulated in float32.

    The leading axes are flattened first: XLA:CPU's fast matrix product wants two dimensions (a step was 20% faster for it), and
    on other platforms the reshape is free.
    """
    flat = x.reshape(-1, x.shape[-1])
    out = jnp.dot(flat, kernel.astype(x.dtype), preferred_element_type=jnp.float32).astype(x.dtype)
    out = out.reshape(*x.shape[:-1], kernel.shape[-1])
    return out if bias is None else out + bias.astype(x.dtype)
