"""Every product of activations with a weight goes through here, so that a weight may be something else than an array.

The leaf decides: an array is multiplied; a node (an adapter around a weight, a quantised weight: jaxpost/adapters) has
`project(x)`, which does what the product would, and `merged()`, which is the array that it stands for. No model knows of more.
"""

from typing import Any

import jax
import jax.numpy as jnp


def project(x: jax.Array, kernel: Any, bias: jax.Array | None = None) -> jax.Array:
    """x [..., I] @ kernel [I, O] (+ bias [O]) -> [..., O], in x's dtype (matrix units add up in float32, whatever that is).

    The leading axes are flattened first: XLA:CPU's fast matrix product wants two dimensions (a step was 20% faster for it), and
    on other platforms the reshape is free.
    """
    flat = x.reshape(-1, x.shape[-1])
    out = kernel.project(flat) if hasattr(kernel, "project") else jnp.dot(flat, kernel.astype(x.dtype))
    out = out.reshape(*x.shape[:-1], out.shape[-1])
    return out if bias is None else out + bias.astype(x.dtype)


def dense(kernel: Any) -> jax.Array:
    """The array [..., I, O] that a leaf of the tree stands for, leading axes (the layers) included."""
    return kernel.merged() if hasattr(kernel, "merged") else kernel
