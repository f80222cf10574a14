"""Attention behind one seam: rotary positions, which pairs may see each other, and the product itself.

The product is written in plain XLA operations; it is the oracle that any faster kernel must equal.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from jaxpost.models.families import Rope


def frequencies(rope: Rope, head_width: int) -> np.ndarray:
    """The rotary angle per position of each pair of channels, [H/2] float32, llama3's stretching of long wavelengths included.

    llama3 scaling: wavelengths shorter than original / high_factor stay, those longer than original / low_factor are divided by
    `factor`, and the ones between are blended linearly in original / wavelength.

    They are constants, made on the host: a power's last bits, multiplied by a position in the thousands, are a visible angle on
    devices that approximate it.
    """
    freq = (1.0 / np.float32(rope.theta) ** (np.arange(0, head_width, 2, dtype=np.float32) / head_width)).astype(np.float32)
    if rope.kind == "default":
        return freq
    if rope.kind == "linear":
        return freq / np.float32(rope.factor)
    turns = rope.original / (2 * math.pi / freq)
    blend = np.clip((turns - rope.low_factor) / (rope.high_factor - rope.low_factor), 0.0, 1.0)
    return (blend * freq + (1 - blend) * freq / rope.factor).astype(np.float32)


def rotate(x: jax.Array, positions: jax.Array, freq: jax.Array) -> jax.Array:
    """Rotary embedding of x [B,S,N,H] at positions [B,S]; channel i is paired with i + H/2, as in Hugging Face checkpoints."""
    angle = positions[:, :, None, None].astype(jnp.float32) * freq
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


def document_mask(segments: jax.Array) -> jax.Array:
    """[B,S] document numbers -> [B,S,S] bool: a token sees itself and what stands before it in its own document."""
    order = jnp.arange(segments.shape[1])
    return (segments[:, :, None] == segments[:, None, :]) & (order[:, None] >= order[None, :]) & (segments > 0)[:, :, None]


def cache_mask(positions: jax.Array, length: int) -> jax.Array:
    """[B,S] positions -> [B,S,T] bool: a token sees the cache's slots up to its own position (slot = position)."""
    return jnp.arange(length)[None, None, :] <= positions[:, :, None]


def attend(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> jax.Array:
    """Softmax attention, grouped: q [B,S,N,H], k and v [B,K,T,H], mask [B,S,T] -> [B,S,N,H]. Scores and softmax in float32.

    A token that may see nothing (padding) gets the mean of v, which is finite and read by nobody.
    """
    b, s, n, h = q.shape
    groups = n // k.shape[1]
    q = q.reshape(b, s, k.shape[1], groups, h)
    scores = jnp.einsum("bskgh,bkth->bkgst", q, k, preferred_element_type=jnp.float32) / math.sqrt(h)
    scores = jnp.where(mask[:, None, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return jnp.einsum("bkgst,bkth->bskgh", weights, v).reshape(b, s, n, h)
