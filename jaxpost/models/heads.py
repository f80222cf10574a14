"""The unembedding as a function of data: what an Output's Head means."""

import jax
import jax.numpy as jnp

from jaxpost.types import Head


def logits(hidden: jax.Array, head: Head) -> jax.Array:
    """hidden [..., D] -> logits [..., V] in float32. Callers keep the leading axes small: it is the largest array of a step."""
    flat = hidden.reshape(-1, hidden.shape[-1])
    out = jnp.einsum("bd,vd->bv", flat, head.weight.astype(hidden.dtype), preferred_element_type=jnp.float32)
    out = out.reshape(*hidden.shape[:-1], -1)
    if head.scale != 1.0:
        out = out * head.scale
    if head.soft_cap is not None:
        out = head.soft_cap * jnp.tanh(out / head.soft_cap)
    return out
