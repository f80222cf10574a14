"""One layer: attention and feed-forward, with norms around them, as linen modules. `transformer.py` stacks them."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxpost import sharding
from jaxpost.models.attention import cache_axes, rotate, written
from jaxpost.models.einsum import project
from jaxpost.models.families import Architecture
from jaxpost.models.moe import MoE
from jaxpost.models.sites import UNTOUCHED

ACTIVATIONS = {
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_new": jax.nn.gelu,
    "gelu_pytorch_tanh": jax.nn.gelu,
    "relu": jax.nn.relu,
}


class Dense(nn.Module):
    """x [..., I] -> [..., O]."""

    features: int
    bias: bool
    std: float

    @nn.compact
    def __call__(self, x):
        # Read directly: linen would compare the kernel's shape with that of an adapter's first array.
        if (kernel := self.get_variable("params", "kernel")) is None:
            kernel = self.param("kernel", nn.initializers.normal(self.std), (x.shape[-1], self.features))
        bias = self.param("bias", nn.initializers.zeros, (self.features,)) if self.bias else None
        return project(x, kernel, bias)


class RMSNorm(nn.Module):
    """x / rms(x) * (offset + scale), the statistic in float32."""

    eps: float
    offset: float = 0.0

    @nn.compact
    def __call__(self, x):
        scale = self.param("scale", nn.initializers.constant(1.0 - self.offset), (x.shape[-1],))
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.eps)
        if self.offset:
            return (y * (self.offset + scale.astype(jnp.float32))).astype(x.dtype)
        return scale.astype(x.dtype) * y.astype(x.dtype)


class Attention(nn.Module):
    """Grouped self-attention over the row, or over a cache that the row is first written to."""

    arch: Architecture

    @nn.compact
    def __call__(self, x, positions, turn, sees, attend, cache, site=UNTOUCHED, before=None):
        a = self.arch
        b, s, _ = x.shape
        x = site("attn_input", x)

        def heads(name, n):
            y = Dense(n * a.head_width, a.qkv_bias, a.init_std, name=name)(x)
            if a.qk_norm == "all" and name != "v":
                y = RMSNorm(a.eps, a.norm_offset, name=f"{name}_norm")(y)
            if a.qkv_clip is not None:
                y = jnp.clip(y, -a.qkv_clip, a.qkv_clip)
            y = sharding.shard(y.reshape(b, s, n, a.head_width), "BSNH")
            if a.qk_norm == "head" and name != "v":
                y = RMSNorm(a.eps, a.norm_offset, name=f"{name}_norm")(y)
            return y

        q = site("q", rotate(heads("q", a.heads), turn))
        k, v = site("k", rotate(heads("k", a.kv_heads), turn)), site("v", heads("v", a.kv_heads))
        axes, dtype = {"k": "BTKH", "v": "BTKH"}, x.dtype
        if cache is not None:
            axes = cache_axes()
            # XLA:CPU has no 16-bit product in a cache's order, and would widen the numbers in any case.
            dtype = jnp.float32 if sharding.platform() == "cpu" else x.dtype
            cache = {name: written(cache[name], new, positions, axes[name]) for name, new in (("k", k), ("v", v))}
            k, v = cache["k"], cache["v"]
        elif before is not None:
            k, v = before.ahead_of(k, v)
        k, v = (jnp.einsum(f"{axes[name]}->BKTH", y.astype(dtype)) for name, y in (("k", k), ("v", v)))
        around = {"site": site} if site.wants("pattern") else {}
        y = site("head_out", attend(q.astype(dtype), k, v, sees, **around).astype(x.dtype)).reshape(b, s, -1)
        return Dense(a.width, a.o_bias, a.init_std, name="o")(y), cache


class MLP(nn.Module):
    """Gated feed-forward: down(act(gate(x)) * up(x))."""

    arch: Architecture

    @nn.compact
    def __call__(self, x, site=UNTOUCHED):
        a = self.arch
        gate = Dense(a.mlp_width, a.mlp_bias, a.init_std, name="gate")(x)
        up = Dense(a.mlp_width, a.mlp_bias, a.init_std, name="up")(x)
        hidden = site("mlp_act", sharding.shard(ACTIVATIONS[a.activation](gate) * up, "BSF"))
        return Dense(a.width, a.mlp_bias, a.init_std, name="down")(hidden)


class Block(nn.Module):
    """x + attention, then x + feed-forward, each with a norm before it, after it, or both.

    site: sees every activation that has a name (sites.py). before: the layer's keys and values before every document
    (prefix.py), if there are any and no cache has them. Returns x, the cache it wrote (or None), and the router's output (or
    None).
    """

    arch: Architecture

    @nn.compact
    def __call__(self, x, positions, turn, sees, attend, cache=None, site=UNTOUCHED, before=None):
        a, router = self.arch, None
        x = site("resid_pre", x)

        def norm(name, when, y):
            return RMSNorm(a.eps, a.norm_offset, name=name)(y) if a.norms in (when, "both") else y

        y = norm("norm1", "pre", x)
        y, cache = Attention(a, name="attention")(y, positions, turn, sees, attend, cache, site, before)
        x = site("resid_mid", sharding.shard(x + site("attn_out", norm("norm1_post", "post", y)), "BSD"))
        y = site("mlp_input", norm("norm2", "pre", x))
        if a.experts:
            y, router = MoE(a, ACTIVATIONS[a.activation], name="mlp")(y)
        else:
            y = MLP(a, name="mlp")(y, site)
        y = site("mlp_out", norm("norm2_post", "post", y))
        return site("resid_post", sharding.shard(x + y, "BSD")), cache, router
