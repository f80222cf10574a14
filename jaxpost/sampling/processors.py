"""What stands between a model's logits and the draw: functions (logits [R,V], context) -> logits [R,V].

A processor of one's own is named in `rollouts.processors` and runs first, on the model's logits. Its context is a dict of
arrays: `tokens` [R,N], the completion so far, zeros after; `counts` [R], how many tokens that is; `numbers` [R], the
completions'. What it wants never drawn it sets to -inf. Then come the temperature and the three usual restrictions, whose
amounts are arrays, so that changing one compiles nothing. Each row is by itself: its logits and context alone may matter.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp


def controls(temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0) -> dict[str, jax.Array]:
    """The amounts as scalars: temperature 0 is greedy; top_k 0, top_p 1 and min_p 0 restrict nothing."""
    amounts = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    return {k: jnp.asarray(v, jnp.int32 if k == "top_k" else jnp.float32) for k, v in amounts.items()}


def restricted(logits: jax.Array, amounts: Mapping[str, jax.Array]) -> jax.Array:
    """logits [R,V], at the temperature that they are drawn at, with -inf for what may not be drawn.

    One after the other: the top_k likeliest; of those the likeliest that together have top_p of the probability, the one that
    reaches it included; of those the ones with min_p of the likeliest's probability or more. Equals share their fate.
    """
    restricts = (amounts["top_k"] > 0) | (amounts["top_p"] < 1) | (amounts["min_p"] > 0)
    return jax.lax.cond(restricts, _restricted, lambda logits, _: logits, logits, dict(amounts))


def _restricted(logits: jax.Array, amounts: dict) -> jax.Array:
    ordered = jnp.sort(logits, axis=-1, descending=True)
    k = jnp.where(amounts["top_k"] > 0, amounts["top_k"], logits.shape[-1])
    probs = jax.nn.softmax(jnp.where(jnp.arange(logits.shape[-1]) < k, ordered, -jnp.inf), axis=-1)
    before = jnp.cumsum(probs, axis=-1) - probs
    # The sum before a token may round to 1, which is no reason to leave it out; and the likeliest stays whatever is asked for.
    most = jnp.where(amounts["top_p"] < 1, amounts["top_p"], jnp.inf)
    keep = (before < most) & (probs > 0) & (probs >= amounts["min_p"] * probs[:, :1])
    keep = keep.at[:, 0].set(True)
    least = jnp.min(jnp.where(keep, ordered, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits >= least, logits, -jnp.inf)
