"""Attention behind one seam: rotary positions, which pairs may see each other, and the product itself.

The product is written in plain XLA operations; it is the oracle that any faster kernel must equal.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from jaxpost.models.families import Rope


def frequencies(rope: Rope, head_width: int, length: int = 0) -> np.ndarray:
    """The rotary angle per position of each pair of channels, [R/2] float32, for the R channels of a head that rotate.

    llama3: wavelengths shorter than original / high_factor stay, those longer than original / low_factor are divided by
    `factor`, and the ones between are blended linearly in original / wavelength. yarn ("YaRN: Efficient Context Window
    Extension of Large Language Models"): a linear ramp over the channels, between those that turn beta_fast and beta_slow times
    within the original length. longrope ("LongRoPE: Extending LLM Context Window Beyond 2 Million Tokens"): a divisor for each
    channel, the long ones where a document's `length` is beyond the original.

    They are constants, made on the host: a power's last bits, multiplied by a position in the thousands, are a visible angle on
    devices that approximate it.
    """
    width = int(head_width * rope.share)
    if rope.kind == "none":
        return np.zeros(head_width // 2, np.float32)
    power = np.float32(rope.theta) ** (np.arange(0, width, 2, dtype=np.float32) / width)
    freq = (1.0 / power).astype(np.float32)
    if rope.kind == "linear":
        return freq / np.float32(rope.factor)
    if rope.kind == "longrope":
        divisors = np.asarray(rope.long if length > rope.original else rope.short, np.float32)
        return (1.0 / (divisors * power)).astype(np.float32)
    if rope.kind == "llama3":
        turns = rope.original / (2 * math.pi / freq)
        blend = np.clip((turns - rope.low_factor) / (rope.high_factor - rope.low_factor), 0.0, 1.0)
        return (blend * freq + (1 - blend) * freq / rope.factor).astype(np.float32)
    if rope.kind == "yarn":
        ends = [_channel(rope, width, turns) for turns in (rope.beta_fast, rope.beta_slow)]
        low, high = (math.floor(ends[0]), math.ceil(ends[1])) if rope.truncate else ends
        low, high = max(low, 0), min(high, width - 1)
        ramp = np.clip((np.arange(width // 2, dtype=np.float32) - low) / max(high - low, 0.001), 0.0, 1.0)
        return (freq / rope.factor * ramp + freq * (1 - ramp)).astype(np.float32)
    return freq


def _channel(rope: Rope, width: int, turns: float) -> float:
    """The pair of channels that turns so many times within the original length."""
    return width * math.log(rope.original / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))


def rotary(rope: Rope, head_width: int, positions: jax.Array, lengths: jax.Array | int) -> tuple[jax.Array, jax.Array]:
    """(cosine, sine), each [B,S,1,R/2] float32, of the positions [B,S] in documents of so many tokens (a number, or [B,S])."""
    places = positions[:, :, None, None].astype(jnp.float32)
    angle = places * frequencies(rope, head_width)
    if rope.kind == "longrope":
        long = jnp.broadcast_to(lengths, positions.shape)[:, :, None, None] > rope.original
        angle = jnp.where(long, places * frequencies(rope, head_width, rope.original + 1), angle)
    return jnp.cos(angle) * rope.scale, jnp.sin(angle) * rope.scale


def rotate(x: jax.Array, turn: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotary embedding of x [B,S,N,H]; of the R channels that rotate, i is paired with i + R/2, as in Hugging Face files."""
    cos, sin = turn
    width = 2 * cos.shape[-1]
    a, b = jnp.split(x[..., :width].astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)
    return turned if width == x.shape[-1] else jnp.concatenate([turned, x[..., width:]], axis=-1)


def document_lengths(segments: jax.Array, positions: jax.Array) -> jax.Array:
    """[B,S] document numbers and positions -> [B,S]: how many tokens the document of each has."""
    count = segments.shape[1] + 1
    last = jax.vmap(lambda p, s: jax.ops.segment_max(p, s, num_segments=count)[s])(positions, segments)
    return last + 1


def document_mask(segments: jax.Array, window: int | None = None) -> jax.Array:
    """[B,S] document numbers -> [B,S,S] bool: a token sees itself and what stands before it in its own document.

    window: how many of those it sees, itself included; None is all.
    """
    order = jnp.arange(segments.shape[1])
    back = order[:, None] - order[None, :]
    near = (back >= 0) if window is None else (back >= 0) & (back < window)
    return (segments[:, :, None] == segments[:, None, :]) & near & (segments > 0)[:, :, None]


def cache_mask(positions: jax.Array, length: int, window: int | None = None) -> jax.Array:
    """[B,S] positions -> [B,S,T] bool: a token sees the cache's slots up to its own position (slot = position), or the last
    `window` of them.
    """
    back = positions[:, :, None] - jnp.arange(length)[None, None, :]
    return (back >= 0) if window is None else (back >= 0) & (back < window)


def attend(
    q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array, scale: float | None = None, cap: float | None = None
) -> jax.Array:
    """Softmax attention, grouped: q [B,S,N,H], k and v [B,K,T,H], mask [B,S,T] -> [B,S,N,H]. Scores and softmax in float32.

    scale: of the scores, 1 / sqrt(H) if None; cap: scores are cap * tanh(score / cap). A token that may see nothing (padding)
    gets the mean of v, which is finite and read by nobody.
    """
    b, s, n, h = q.shape
    groups = n // k.shape[1]
    q = q.reshape(b, s, k.shape[1], groups, h)
    scores = jnp.einsum("bskgh,bkth->bkgst", q, k, preferred_element_type=jnp.float32)
    scores = scores / math.sqrt(h) if scale is None else scores * scale
    if cap is not None:
        scores = cap * jnp.tanh(scores / cap)
    scores = jnp.where(mask[:, None, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return jnp.einsum("bkgst,bkth->bskgh", weights, v).reshape(b, s, n, h)
