"""Encoders with a head for masked tokens, BERT and ModernBERT: every token sees its whole document.

The layers are those of transformer.py but for LayerNorm, and for where it stands. The hidden state at a place says what token
belongs to that place, not to the next one. An encoder samples nothing, so it has no cache. Its hidden states are the last
layer's: the dense layer in front of the unembedding belongs to the head, and is computed only where logits are asked for.

Titles: "BERT: Pre-training of Deep Bidirectional Transformers for Language Understanding"; "Smarter, Better, Faster, Longer: A
Modern Bidirectional Encoder for Fast, Memory Efficient, and Long Context Finetuning and Inference".
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from jaxpost import sharding
from jaxpost.errors import UserError
from jaxpost.models import heads, routes
from jaxpost.models.attention import attend, document_lengths, over_rows, rotary
from jaxpost.models.block import ACTIVATIONS, MLP, Attention, Dense
from jaxpost.models.einsum import project
from jaxpost.models.encoder_families import EncoderArchitecture
from jaxpost.models.families import Architecture
from jaxpost.models.sites import UNTOUCHED, Sites
from jaxpost.models.transformer import REMAT, OfArchitecture, Transformer, scanned
from jaxpost.types import Batch, Head, Output, Params


def normed(x: jax.Array, scale: jax.Array, bias: jax.Array | None, eps: float) -> jax.Array:
    """LayerNorm of x [..., D]: (x - mean) / sqrt(variance + eps) * scale + bias, in float32; of x's dtype."""
    y = x.astype(jnp.float32)
    y = y - jnp.mean(y, axis=-1, keepdims=True)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps) * scale
    return (y if bias is None else y + bias).astype(x.dtype)


class LayerNorm(nn.Module):
    """`normed` with parameters scale and, where the architecture has it, bias."""

    arch: EncoderArchitecture

    @nn.compact
    def __call__(self, x):
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],)) if self.arch.norm_bias else None
        return normed(x, scale, bias, self.arch.eps)


class Plain(nn.Module):
    """Feed-forward without a gate: down(act(up(x)))."""

    arch: EncoderArchitecture

    @nn.compact
    def __call__(self, x, site=UNTOUCHED):
        a = self.arch
        hidden = ACTIVATIONS[a.activation](Dense(a.mlp_width, a.mlp_bias, a.init_std, name="up")(x))
        return Dense(a.width, a.mlp_bias, a.init_std, name="down")(site("mlp_act", sharding.shard(hidden, "BSF")))


class Block(nn.Module):
    """x + attention, then x + feed-forward, each with a norm before it ("pre") or behind the sum ("sum").

    first: whether the layer is the first, whose attention has no norm before it. Returns x.
    """

    arch: EncoderArchitecture

    @nn.compact
    def __call__(self, x, first, positions, turn, sees, attend, site=UNTOUCHED):
        a = self.arch
        x, pre = site("resid_pre", x), a.norms == "pre"
        norm1, norm2 = LayerNorm(a, name="norm1"), LayerNorm(a, name="norm2")

        def added(x, y, norm):
            return sharding.shard(x + y if pre else norm(x + y), "BSD")

        y = jnp.where(first, x, norm1(x)) if pre else x
        y, _ = Attention(a, name="attention")(y, positions, turn, sees, attend, None, site)
        x = site("resid_mid", added(x, site("attn_out", y), norm1))
        y = (MLP if a.gated else Plain)(a, name="mlp")(site("mlp_input", norm2(x) if pre else x), site)
        return site("resid_post", added(x, site("mlp_out", y), norm2))


class MaskedHead(flax.struct.PyTreeNode):
    """logits = norm(act(hidden @ kernel + dense_bias)) @ weight.T + bias; weight [V,D], kernel [D,D]; biases may be None."""

    weight: jax.Array
    bias: jax.Array | None
    kernel: Any
    dense_bias: jax.Array | None
    scale: jax.Array
    norm_bias: jax.Array | None
    activation: str = flax.struct.field(pytree_node=False)
    eps: float = flax.struct.field(pytree_node=False)

    @property
    def vocab(self) -> int:
        """V."""
        return self.weight.shape[0]

    def logits(self, hidden: jax.Array) -> jax.Array:
        """hidden [R,D] -> [R,V] float32."""
        x = ACTIVATIONS[self.activation](project(hidden, self.kernel, self.dense_bias))
        out = heads.logits(normed(x, self.scale, self.norm_bias, self.eps), Head(self.weight))
        return out if self.bias is None else out + self.bias


class NoHead(flax.struct.PyTreeNode):
    """In place of a head where the files have none."""

    vocab: int = flax.struct.field(pytree_node=False)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Raises UserError."""
        raise UserError("model: it has no head for tokens (architectures: a bare encoder); use its hidden states.")


@dataclasses.dataclass(frozen=True)
class Encoder(OfArchitecture):
    """init and forward for an EncoderArchitecture."""

    def init(self, key: jax.Array) -> Params:
        """Fresh float32 parameters: normal with the architecture's standard deviation, biases 0, norms that change nothing."""
        a = self.arch
        keys = jax.random.split(key, 5)
        x, zeros = jnp.zeros((1, 1, a.width)), jnp.zeros((1, 1), jnp.int32)

        def layer(k):
            turn = rotary(a.kinds[0].rope, a.head_width, zeros, 1)
            return Block(a).init(k, x, False, zeros, turn, zeros[:, :, None] == 0, attend)["params"]

        def drawn(k, rows):
            return {"weight": a.init_std * jax.random.normal(k, (rows, a.width))}

        def norm(*lead):
            scale = {"scale": jnp.ones((*lead, a.width))}
            return scale | ({"bias": jnp.zeros((*lead, a.width))} if a.norm_bias else {})

        dense = {"kernel": a.init_std * jax.random.normal(keys[4], (a.width, a.width))}
        dense |= {"bias": jnp.zeros(a.width)} if a.head_bias else {}
        head = ({"bias": jnp.zeros(a.vocab)} if a.decoder_bias else {}) | ({} if a.tied else drawn(keys[3], a.vocab))
        params = {
            "embed": drawn(keys[0], a.vocab),
            "embed_norm": norm(),
            "layers": jax.vmap(layer)(jax.random.split(keys[1], a.layers)),
        }
        if a.head:
            params |= {"transform": {"dense": dense, "norm": norm()}, **({"head": head} if head else {})}
        if a.positions:
            params["positions"], params["types"] = drawn(keys[2], a.max_positions), drawn(keys[3], a.types)
        if a.norms == "pre":
            del params["layers"]["norm1"]  # which the first layer lacks
            params |= {"norm": norm()} | ({"attention_norm": norm(a.layers - 1)} if a.layers > 1 else {})
        return params

    def forward(self, params: Params, batch: Batch, cache: Any = None, *, tap: Sequence[str] = (), patch: Any = None) -> Output:
        """Hidden states of tokens, positions and segments [B,S]; documents attend separately. Optional: `token_types` [B,S]
        int32, 0 where the batch lacks it, of a family that has them. tap, patch: sites.py. Raises UserError for a cache.
        """
        if cache is not None:
            raise UserError(f"model: {self.arch.family} is an encoder and cannot be sampled.")
        a, sites = self.arch, Sites(tap, patch, self.arch.layers, batch)
        x = sites.outside("embed", self._embedded(params, batch))
        masks, attention = over_rows("xla" if sites.layer(0).wants("pattern") else self.kernel, a, batch, self.dtype)
        positions, lengths = batch["positions"], document_lengths(batch["segments"], batch["positions"])
        turns = [rotary(kind.rope, a.head_width, positions, lengths) for kind in a.kinds]

        def block(x, layer, table, _, index):
            layer, site = routes.of_rows(sharding.gather(layer, self.dtype), batch), sites.layer(index)
            first = layer.pop("first")
            x = Block(a).apply({"params": layer}, x, first, positions, *table, attention, site)
            return x, None, None, site.taken

        if REMAT[self.remat] is not None:
            block = jax.checkpoint(block, policy=REMAT[self.remat])
        layers = {**params["layers"], "first": jnp.arange(a.layers) == 0}
        if a.norms == "pre":
            # The first layer gets a row that `first` switches off, so that all layers have one shape.
            like = {"scale": jnp.ones((1, a.width)), "bias": jnp.zeros((1, a.width))}
            own = params.get("attention_norm", {name: like[name][:0] for name in params["norm"]})
            layers["norm1"] = {name: jnp.concatenate([like[name], x]) for name, x in own.items()}
        x, _, taken = scanned(a, block, x, (layers,), list(zip(turns, masks, strict=True)), sites)
        if a.norms == "pre":
            x = LayerNorm(a).apply({"params": params["norm"]}, x)
        return Output(sites.outside("final", x), self._head(params), taps=sites.taps(taken), whole=True)

    def _embedded(self, params: Params, batch: Batch) -> jax.Array:
        x = sharding.lookup(params["embed"]["weight"], batch["tokens"], self.dtype)
        if self.arch.positions:
            types = batch.get("token_types", jnp.zeros_like(batch["tokens"]))
            x = x + params["types"]["weight"][types].astype(self.dtype)
            x = x + params["positions"]["weight"][batch["positions"]].astype(self.dtype)
        return LayerNorm(self.arch).apply({"params": params["embed_norm"]}, x)

    def _head(self, params: Params) -> MaskedHead | NoHead:
        a, head = self.arch, params.get("head", {})
        if not a.head:
            return NoHead(a.vocab)
        name = "embed" if a.tied else "head"
        weight = sharding.gather({name: {"weight": params[name]["weight"]}}, self.dtype)[name]["weight"]
        dense, norm = params["transform"]["dense"], params["transform"]["norm"]
        return MaskedHead(
            weight,
            head.get("bias"),
            dense["kernel"],
            dense.get("bias"),
            norm["scale"],
            norm.get("bias"),
            a.head_activation,
            a.eps,
        )


def model(arch: Architecture, dtype: Any = jnp.float32, remat: str = "none", kernel: str = "xla") -> Transformer | Encoder:
    """The model of an architecture."""
    return (Encoder if isinstance(arch, EncoderArchitecture) else Transformer)(arch, dtype, remat, kernel)
