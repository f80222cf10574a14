"""The decoder: one linen Block, stacked.

A Model is two functions: init(key) -> params, and forward(params, batch, cache) -> Output. Block is linen; its parameters are
stacked along a leading layer axis, and training scans Block.apply over them, so that compile time does not grow with depth. The
sampler, which reads every weight once a token, unstacks them first (see `unstack`) and the same forward then loops.
"""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxpost import sharding
from jaxpost.models.attention import attend, cache_mask, document_mask, frequencies, rotate
from jaxpost.models.einsum import project
from jaxpost.models.families import Architecture
from jaxpost.types import Batch, Head, Output, Params

ACTIVATIONS = {
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_new": jax.nn.gelu,
    "gelu_pytorch_tanh": jax.nn.gelu,
    "relu": jax.nn.relu,
}

# What a layer keeps for its backward pass: everything, the results of weight products, or its input alone.
REMAT = {
    "none": None,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}


class Dense(nn.Module):
    """x [..., I] -> [..., O]."""

    features: int
    bias: bool
    std: float

    @nn.compact
    def __call__(self, x):
        kernel = self.param("kernel", nn.initializers.normal(self.std), (x.shape[-1], self.features))
        bias = self.param("bias", nn.initializers.zeros, (self.features,)) if self.bias else None
        return project(x, kernel, bias)


class RMSNorm(nn.Module):
    """x / rms(x) * scale, the statistic in float32."""

    eps: float

    @nn.compact
    def __call__(self, x):
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.eps)
        return scale.astype(x.dtype) * y.astype(x.dtype)


class Attention(nn.Module):
    """Grouped self-attention over the row itself, or over a cache that it first writes to."""

    arch: Architecture

    @nn.compact
    def __call__(self, x, positions, mask, cache):
        a = self.arch
        b, s, _ = x.shape

        def heads(name, n):
            y = Dense(n * a.head_width, a.attention_bias, a.init_std, name=name)(x)
            return sharding.shard(y.reshape(b, s, n, a.head_width), "BSNH")

        freq = frequencies(a.rope, a.head_width)
        q = rotate(heads("q", a.heads), positions, freq)
        k = rotate(heads("k", a.kv_heads), positions, freq).swapaxes(1, 2)
        v = heads("v", a.kv_heads).swapaxes(1, 2)
        if cache is not None:
            # A token's slot is its position, so rows of different lengths need no bookkeeping and the garbage that right
            # padding writes is overwritten before anything may see it.
            rows = jnp.arange(b)[:, None]
            k = cache["k"].at[rows, :, positions].set(k.swapaxes(1, 2).astype(cache["k"].dtype))
            v = cache["v"].at[rows, :, positions].set(v.swapaxes(1, 2).astype(cache["v"].dtype))
            cache = {"k": k, "v": v}
        y = attend(q, k.astype(x.dtype), v.astype(x.dtype), mask).reshape(b, s, -1)
        return Dense(a.width, a.attention_bias, a.init_std, name="o")(y), cache


class MLP(nn.Module):
    """Gated feed-forward: down(act(gate(x)) * up(x))."""

    arch: Architecture

    @nn.compact
    def __call__(self, x):
        a = self.arch
        gate = Dense(a.mlp_width, a.mlp_bias, a.init_std, name="gate")(x)
        up = Dense(a.mlp_width, a.mlp_bias, a.init_std, name="up")(x)
        hidden = sharding.shard(ACTIVATIONS[a.activation](gate) * up, "BSF")
        return Dense(a.width, a.mlp_bias, a.init_std, name="down")(hidden)


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); returns the cache it wrote, or None."""

    arch: Architecture

    @nn.compact
    def __call__(self, x, positions, mask, cache=None):
        y, cache = Attention(self.arch, name="attention")(RMSNorm(self.arch.eps, name="norm1")(x), positions, mask, cache)
        x = sharding.shard(x + y, "BSD")
        x = x + MLP(self.arch, name="mlp")(RMSNorm(self.arch.eps, name="norm2")(x))
        return sharding.shard(x, "BSD"), cache


@dataclasses.dataclass(frozen=True)
class Transformer:
    """init and forward for an Architecture; dtype is the computation's, parameters keep their own (float32 masters)."""

    arch: Architecture
    dtype: Any = jnp.float32
    remat: str = "none"

    def init(self, key: jax.Array) -> Params:
        """Fresh float32 parameters: normal with the architecture's standard deviation, norms 1, biases 0."""
        a = self.arch
        embed_key, head_key, *layer_keys = jax.random.split(key, a.layers + 2)
        x = jnp.zeros((1, 1, a.width))
        zeros = jnp.zeros((1, 1), jnp.int32)

        def layer(k):
            return Block(a).init(k, x, zeros, zeros[:, :, None] == 0)["params"]

        params = {
            "embed": {"weight": a.init_std * jax.random.normal(embed_key, (a.vocab, a.width))},
            "layers": jax.vmap(layer)(jnp.stack(layer_keys)),
            "norm": {"scale": jnp.ones(a.width)},
        }
        if not a.tied:
            params["head"] = {"weight": a.init_std * jax.random.normal(head_key, (a.vocab, a.width))}
        return params

    def forward(self, params: Params, batch: Batch, cache: Any = None) -> Output:
        """Hidden states of a batch.

        Without a cache: tokens, positions and segments [B,S], documents attended to separately. With a cache (see
        `make_cache`): tokens and positions [B,S], each token written to the slot of its position and attending to the slots up
        to it.
        """
        # The second pin is for the gradient: were the lookup's scatter asked for the stored layout at once, the partitioner
        # would move the activations to it.
        embed = sharding.shard(sharding.gather({"embed": params["embed"]})["embed"]["weight"], "VD")
        x = sharding.shard(jnp.take(embed, batch["tokens"], axis=0).astype(self.dtype), "BSD")
        positions = batch["positions"]
        mask = document_mask(batch["segments"]) if cache is None else cache_mask(positions, cache[0]["k"].shape[2])

        def block(x, layer, cache):
            return Block(self.arch).apply({"params": sharding.gather(layer)}, x, positions, mask, cache)

        if REMAT[self.remat] is not None and cache is None:
            block = jax.checkpoint(block, policy=REMAT[self.remat])
        if cache is None and not isinstance(params["layers"], tuple):
            x, _ = jax.lax.scan(lambda x, layer: block(x, layer, None), x, params["layers"])
        else:
            written = []
            for i, layer in enumerate(unstack(params, self.arch.layers)["layers"]):
                x, new = block(x, layer, None if cache is None else cache[i])
                written.append(new)
            cache = None if cache is None else tuple(written)
        hidden = RMSNorm(self.arch.eps).apply({"params": params["norm"]}, x)
        weight = embed if self.arch.tied else sharding.gather({"head": params["head"]})["head"]["weight"]
        return Output(hidden, Head(weight), cache)

    def make_cache(self, batch_size: int, length: int) -> tuple:
        """An empty key/value cache: a {k, v} of [B,K,T,H] a layer."""
        shape = (batch_size, self.arch.kv_heads, length, self.arch.head_width)
        return tuple({n: sharding.shard(jnp.zeros(shape, self.dtype), "BKTH") for n in "kv"} for _ in range(self.arch.layers))


def unstack(params: Params, layers: int) -> Params:
    """Parameters with `layers` as a tuple of trees instead of one stacked tree; unstacked ones come back as they are."""
    if isinstance(params["layers"], tuple):
        return params
    return {**params, "layers": tuple(jax.tree.map(lambda x, i=i: x[i], params["layers"]) for i in range(layers))}
