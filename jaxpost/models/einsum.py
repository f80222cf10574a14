"""Every product of activations with a weight goes through here, so that a weight need not be an array.

The leaf decides: an array is multiplied; a node (an adapter around a weight, or a quantised weight: jaxpost/adapters) has
`project(x)`, the product with x, `merged()`, the array that it stands for, and `parts`, how its arrays lie on a mesh
(sharding.py). Models know nothing else of adapters.
"""

import re
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from jaxpost import sharding


def project(x: jax.Array, kernel: Any, bias: jax.Array | None = None) -> jax.Array:
    """x [..., I] @ kernel [I, O] (+ bias [O]) -> [..., O], in x's dtype (matrix units accumulate in float32).

    The leading axes are flattened first: XLA:CPU's fast matrix product needs two dimensions (this made a step 20% faster), and
    on other platforms the reshape is free.
    """
    flat = x.reshape(-1, x.shape[-1])
    out = kernel.project(flat) if hasattr(kernel, "project") else jnp.dot(flat, kernel.astype(x.dtype))
    out = out.reshape(*x.shape[:-1], out.shape[-1])
    return out if bias is None else out + bias.astype(x.dtype)


def dense(kernel: Any) -> jax.Array:
    """The array [..., I, O] that a leaf of the tree stands for, with its leading axes (the layers)."""
    return kernel.merged() if hasattr(kernel, "merged") else kernel


class Transposed(flax.struct.PyTreeNode):
    """A kernel [I, O] as its transpose [O, I], with which XLA:CPU multiplies a few rows a third faster."""

    parts = {"transposed": "OI"}
    transposed: jax.Array

    def project(self, x: jax.Array) -> jax.Array:
        """x [T, I] -> [T, O], in x's dtype."""
        return jax.lax.dot_general(self.transposed.astype(x.dtype), x, (((1,), (1,)), ((), ()))).T


def transposed(params: Any) -> Any:
    """Unstacked parameters with the kernels of plain projections transposed, on a platform where that is faster."""
    if sharding.platform() != "cpu":
        return params

    def turn(path, x):
        name = "/".join(str(getattr(k, "key", k)) for k in path)
        return Transposed(x.T) if x.ndim == 2 and re.search(r"(attention|mlp)/(q|k|v|o|gate|up|down)/kernel$", name) else x

    return {**params, "layers": tuple(jax.tree_util.tree_map_with_path(turn, layer) for layer in params["layers"])}
