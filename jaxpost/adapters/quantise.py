"""Frozen weights in eight and in four bits, as leaves of the tree.

Both keep a kernel [..., I, O] as integers and float32 scales. They only occur under an adapter (`base="int8"` or `base="nf4"`
of adapters/lora.py), since an integer has no gradient. Activations and adapters keep the computation's dtype.

    int8   a scale for each output channel:        1 byte a weight, |error| <= absmax of the channel / 254
    nf4    a scale for each 64 inputs of an output: 0.5625 bytes a weight, |error| <= 0.152 * absmax of the block

NF4 is of "QLoRA: Efficient Finetuning of Quantized LLMs": sixteen levels at quantiles of the normal distribution, one of them
exactly 0. What differs: the scales stay float32 (no second quantisation), and a block runs along the inputs of one output, as
the blocks of a Hugging Face tensor [O, I] do.

The barriers tie the integers to the activations. Without them the compiler would expand all kernels once, before the sampler's
loop over tokens, and keep them as floats while it runs.
"""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from jaxpost.config.resolve import nearest
from jaxpost.errors import UserError
from jaxpost.models.einsum import project

BLOCK = 64
LEVELS = np.array(
    [
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
        -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
        0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ],
    np.float32,
)  # fmt: skip


class Int8(flax.struct.PyTreeNode):
    """A kernel as values [..., I, O] int8 and scales [..., 1, O] float32."""

    values: jax.Array
    scales: jax.Array

    def project(self, x: jax.Array) -> jax.Array:
        """x [T, I] -> [T, O], in x's dtype. The integers are exact in bfloat16 too, so no weight is expanded to float32."""
        x, values = jax.lax.optimization_barrier((x, self.values))
        out = jnp.dot(x, values.astype(x.dtype), preferred_element_type=jnp.float32)
        return (out * self.scales[0]).astype(x.dtype)

    def merged(self) -> jax.Array:
        """The float32 kernel that it stands for."""
        return self.values.astype(jnp.float32) * self.scales


class Nf4(flax.struct.PyTreeNode):
    """A kernel as codes [..., P/2, O] uint8 and scales [..., P/BLOCK, O] float32; P is I rounded up to a multiple of BLOCK.

    A byte holds the levels of two neighbouring inputs, the first in its low half.
    """

    codes: jax.Array
    scales: jax.Array
    inputs: int = flax.struct.field(pytree_node=False)

    def project(self, x: jax.Array) -> jax.Array:
        """x [T, I] -> [T, O], in x's dtype. The kernel is expanded for the product only."""
        x, codes = jax.lax.optimization_barrier((x, self.codes))
        return project(x, self.replace(codes=codes).merged())

    def merged(self) -> jax.Array:
        """The float32 kernel that it stands for."""
        *lead, half, outputs = self.codes.shape
        pairs = jnp.stack([self.codes & 15, self.codes >> 4], axis=-2)
        levels = jnp.take(jnp.asarray(LEVELS), pairs.reshape(*lead, 2 * half // BLOCK, BLOCK, outputs), axis=0)
        return (levels * self.scales[..., :, None, :]).reshape(*lead, 2 * half, outputs)[..., : self.inputs, :]


def int8(kernel: jax.Array) -> Int8:
    """A kernel [..., I, O], each output channel rounded to 255 even levels up to its largest value."""
    scales = jnp.max(jnp.abs(kernel), axis=-2, keepdims=True).astype(jnp.float32) / 127
    values = jnp.round(kernel / jnp.where(scales > 0, scales, 1.0))
    return Int8(jnp.clip(values, -127, 127).astype(jnp.int8), scales)


def nf4(kernel: jax.Array) -> Nf4:
    """A kernel [..., I, O], each block of 64 inputs rounded to the sixteen levels times its largest value."""
    *lead, inputs, outputs = kernel.shape
    padded = jnp.pad(kernel, [*[(0, 0)] * len(lead), (0, -inputs % BLOCK), (0, 0)]).astype(jnp.float32)
    blocks = padded.reshape(*lead, -1, BLOCK, outputs)
    scales = jnp.max(jnp.abs(blocks), axis=-2)
    unit = blocks / jnp.where(scales > 0, scales, 1.0)[..., None, :]
    codes = jnp.searchsorted(jnp.asarray((LEVELS[1:] + LEVELS[:-1]) / 2), unit).astype(jnp.uint8)
    codes = codes.reshape(*lead, -1, 2, outputs)
    return Nf4(codes[..., 0, :] | (codes[..., 1, :] << 4), scales, inputs)


KINDS = {"": lambda kernel: kernel, "int8": int8, "nf4": nf4}


def quantised(kernel: jax.Array, kind: str) -> Any:
    """The kernel in its stored form; "" leaves it as it is. Raises UserError for an unknown kind."""
    if kind not in KINDS:
        raise UserError(f"config.adapter.base: unknown {kind!r}.{nearest(str(kind), [k for k in KINDS if k])}")
    return KINDS[kind](kernel)
