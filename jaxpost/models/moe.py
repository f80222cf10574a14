"""Mixtures of experts: each token goes through the few feed-forward blocks that a router chooses for it.

No token is ever dropped: a token's slots are sorted by expert and each expert multiplies its own run of rows, however long
(`jax.lax.ragged_dot`). On a mesh every batch shard sorts its own tokens, so nothing of the routing crosses devices.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxpost import sharding
from jaxpost.models.families import Architecture


def route(logits: jax.Array, chosen: int, normalised: bool) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Router logits [..., E] -> (probabilities [..., E] float32, experts chosen [..., C] int32, their weights [..., C])."""
    probs = jax.nn.softmax(logits.astype(jnp.float32), axis=-1)
    weights, experts = jax.lax.top_k(probs, chosen)
    if normalised:
        weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
    return probs, experts, weights


def mix(
    x: jax.Array, experts: jax.Array, weights: jax.Array, gate: jax.Array, up: jax.Array, down: jax.Array, act
) -> jax.Array:
    """sum_c weights_c * down_e(act(gate_e x) * up_e x), e = experts_c: x [B,S,D], experts and weights [B,S,C], gate and up
    [E,D,F], down [E,F,D] -> [B,S,D], in x's dtype.
    """
    b, s, d = x.shape
    count, chosen = gate.shape[0], experts.shape[-1]
    order = jnp.argsort(experts.reshape(-1), stable=True)
    sizes = jnp.bincount(experts.reshape(-1), length=count).astype(jnp.int32)
    rows = jnp.take(x.reshape(-1, d), order // chosen, axis=0)

    def multiply(a, kernel):
        return jax.lax.ragged_dot(a, kernel.astype(a.dtype), sizes, preferred_element_type=jnp.float32).astype(a.dtype)

    out = multiply(act(multiply(rows, gate)) * multiply(rows, up), down)
    out = out * jnp.take(weights.reshape(-1), order)[:, None].astype(x.dtype)
    # Back to the tokens' order before adding: a scatter-add has no fixed order.
    return jnp.take(out, jnp.argsort(order), axis=0).reshape(b, s, chosen, d).sum(axis=2)


class Kernels(nn.Module):
    """The experts' weights, [E, I, O]."""

    shape: tuple[int, ...]
    std: float

    @nn.compact
    def __call__(self):
        return self.param("kernel", nn.initializers.normal(self.std), self.shape)


class Experts(nn.Module):
    """gate, up and down of all experts."""

    arch: Architecture

    @nn.compact
    def __call__(self):
        a = self.arch
        wide, narrow = (a.experts, a.width, a.mlp_width), (a.experts, a.mlp_width, a.width)
        return [Kernels(s, a.init_std, name=n)() for n, s in (("gate", wide), ("up", wide), ("down", narrow))]


class MoE(nn.Module):
    """x [B,S,D] -> ([B,S,D], {probs, picks: [B,S,E]}): the experts' output for each token, and the router's."""

    arch: Architecture
    act: callable

    @nn.compact
    def __call__(self, x):
        a = self.arch
        router = Kernels((a.width, a.experts), a.init_std, name="router")()
        logits = jnp.einsum("bsd,de->bse", x, router.astype(x.dtype), preferred_element_type=jnp.float32)
        probs, experts, weights = route(logits, a.chosen, a.normalised)
        kernels = Experts(a, name="experts")()

        def local(x, experts, weights, gate, up, down):
            return mix(x, experts, weights, gate, up, down, self.act)

        out = sharding.by_rows(local, (x, experts, weights), kernels, ("EDF", "EDF", "EFD"))
        picks = jax.nn.one_hot(experts, a.experts, dtype=jnp.float32).sum(axis=2)
        return out, {"probs": probs, "picks": picks}
