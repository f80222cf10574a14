"""Low-rank adapters: a frozen kernel of the tree is replaced by a node that adds two thin matrices to it.

    adapter={"name": "lora", "rank": 8, "alpha": 16.0}              in a recipe; also lora.rslora and lora.dora
    adapter={"name": "lora", "base": "nf4", "targets": "attention/(q|v)/kernel$"}

An adapter is a function (params, key, **keywords) -> params. It works on any part of the tree, on shapes alone and under jit.
Each leaf's result depends only on that leaf, its path and the key, so weights are adapted one at a time as they are read. Every
array of a node has the layers in front, as kernels do. `base` "int8" or "nf4" quantises the frozen kernel
(adapters/quantise.py). Initial values have `peft`'s distributions.
"""

import math
import re
import zlib
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from jaxpost.adapters.quantise import quantised
from jaxpost.errors import UserError
from jaxpost.models.einsum import dense, project
from jaxpost.sharding import path_name
from jaxpost.types import Params

# The projections of a layer; all of them are the default. A mixture's router and experts do not go through `project`.
TARGETS = "layers/(attention/(q|k|v|o)|mlp/(gate|up|down))/kernel$"


class Lora(flax.struct.PyTreeNode):
    """W + scale * A B: base a kernel [..., I, O] or a quantised one, a [..., I, r], b [..., r, O]."""

    base: Any
    a: jax.Array
    b: jax.Array
    scale: float = flax.struct.field(pytree_node=False)

    def project(self, x: jax.Array) -> jax.Array:
        """x [T, I] -> [T, O], in x's dtype. Where b is zero the result is the base's, bit for bit."""
        return project(x, self.base) + self.scale * project(project(x, self.a), self.b)

    def merged(self) -> jax.Array:
        """The kernel [..., I, O] that it stands for."""
        return dense(self.base) + self.scale * jnp.matmul(self.a, self.b, precision="highest")


class Dora(flax.struct.PyTreeNode):
    """magnitude * V / |V| with V = W + scale * A B, the norm taken over the inputs of each output; magnitude [..., O]."""

    base: Any
    a: jax.Array
    b: jax.Array
    magnitude: jax.Array
    scale: float = flax.struct.field(pytree_node=False)

    def project(self, x: jax.Array) -> jax.Array:
        """x [T, I] -> [T, O], in x's dtype."""
        out = project(x, self.base) + self.scale * project(project(x, self.a), self.b)
        return out * self._length().astype(x.dtype)

    def merged(self) -> jax.Array:
        """The kernel [..., I, O] that it stands for."""
        return self._direction() * self._length()[..., None, :]

    def _direction(self) -> jax.Array:
        return dense(self.base) + self.scale * jnp.matmul(self.a, self.b, precision="highest")

    def _length(self) -> jax.Array:
        """magnitude / |V|. The norm has no gradient: the paper drops it to save memory, at no cost in quality."""
        return self.magnitude / jax.lax.stop_gradient(jnp.linalg.norm(self._direction(), axis=-2))


def lora(
    params: Params, key: jax.Array, *, rank: int = 8, alpha: float = 16.0, targets: str = TARGETS, base: str = ""
) -> Params:
    """LoRA: W + (alpha / rank) A B ("LoRA: Low-Rank Adaptation of Large Language Models").

    A is uniform within 1/sqrt(I), B zero. targets: pattern over the paths of the kernels to adapt. Raises UserError where it
    matches none, or anything but a layer's projection.
    """
    scale = _positive("alpha", alpha) / _rank(rank)
    return _swap(params, targets, lambda path, w: Lora(quantised(w, base), *_factors(path, w, key, rank), scale))


def rslora(
    params: Params, key: jax.Array, *, rank: int = 8, alpha: float = 16.0, targets: str = TARGETS, base: str = ""
) -> Params:
    """rsLoRA: W + (alpha / sqrt(rank)) A B, whose updates keep their size as the rank grows ("A Rank Stabilization Scaling
    Factor for Fine-Tuning with LoRA"). It differs from `lora` in the scale alone.
    """
    scale = _positive("alpha", alpha) / math.sqrt(_rank(rank))
    return _swap(params, targets, lambda path, w: Lora(quantised(w, base), *_factors(path, w, key, rank), scale))


def dora(
    params: Params, key: jax.Array, *, rank: int = 8, alpha: float = 16.0, targets: str = TARGETS, base: str = ""
) -> Params:
    """DoRA: magnitude * V / |V|, V = W + (alpha / rank) A B, with a learned magnitude for each output, |W| at first
    ("DoRA: Weight-Decomposed Low-Rank Adaptation"). Each use builds the merged kernel, for the norm.
    """
    scale = _positive("alpha", alpha) / _rank(rank)

    def node(path, w):
        held = quantised(w, base)
        return Dora(held, *_factors(path, w, key, rank), jnp.linalg.norm(dense(held), axis=-2), scale)

    return _swap(params, targets, node)


def _swap(params: Params, targets: str, node: Callable[[str, Any], Any]) -> Params:
    """params with node(path, kernel) for each kernel that the pattern matches."""
    try:
        matches = re.compile(targets).search
    except re.error as e:
        raise UserError(f"config.adapter.targets: {targets!r} is no regular expression: {e}.") from None
    count = 0

    def leaf(path, x):
        nonlocal count
        name = path_name(path)
        if not matches(name):
            return x
        if not re.search(TARGETS, name):
            raise UserError(
                f"config.adapter.targets: {targets!r} matches {name}, which cannot be adapted; what can are "
                "layers/attention/{q,k,v,o}/kernel and, where the layers are no mixtures, layers/mlp/{gate,up,down}/kernel."
            )
        count += 1
        return node(name, x)

    swapped = jax.tree_util.tree_map_with_path(leaf, params)
    if not count:
        raise UserError(f"config.adapter.targets: {targets!r} matches no parameter; the default is {TARGETS!r}.")
    return swapped


def _factors(path: str, kernel: jax.Array, key: jax.Array, rank: int) -> tuple[jax.Array, jax.Array]:
    """(a, b) for a kernel [..., I, O]: a uniform within 1/sqrt(I), b zero; float32, as all trained weights."""
    *lead, inputs, outputs = kernel.shape
    key = jax.random.fold_in(key, zlib.crc32(path.encode()))
    bound = 1 / math.sqrt(inputs)
    a = jax.random.uniform(key, (*lead, inputs, rank), jnp.float32, -bound, bound)
    return a, jnp.zeros((*lead, rank, outputs), jnp.float32)


def _rank(rank: int) -> int:
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise UserError(f"config.adapter.rank: {rank!r}; it is a whole number of at least 1.")
    return rank


def _positive(name: str, value: float) -> float:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < math.inf:
        raise UserError(f"config.adapter.{name}: {value!r}; it is a number above 0.")
    return float(value)
