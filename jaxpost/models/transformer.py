"""The decoder: one linen Block (block.py), stacked.

A model is two functions: init(key) -> params, and forward(params, batch, cache) -> Output. The parameters of Block are stacked
along a leading layer axis, and training scans Block.apply over them, so that compile time does not grow with depth. The sampler
reads every weight once a token, so it unstacks them first (see `unstack`), and the same forward then loops.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxpost import sharding
from jaxpost.errors import UserError
from jaxpost.models import prefix, routes
from jaxpost.models.attention import (
    RESIDUALS,
    attend,
    cache_axes,
    cache_length,
    cache_mask,
    document_lengths,
    over_rows,
    rotary,
)
from jaxpost.models.block import Block, RMSNorm
from jaxpost.models.einsum import transposed
from jaxpost.models.sites import Sites
from jaxpost.types import Batch, Head, Output, Params

# What a layer keeps for its backward pass: everything; the results of weight products and of the attention kernel; its input
# and the attention kernel's result; or only its input.
_POLICIES = jax.checkpoint_policies
REMAT = {
    "none": None,
    "dots": _POLICIES.save_from_both_policies(
        _POLICIES.dots_with_no_batch_dims_saveable, _POLICIES.save_only_these_names(RESIDUALS)
    ),
    "attention": _POLICIES.save_only_these_names(RESIDUALS),
    "full": _POLICIES.nothing_saveable,
}


@dataclasses.dataclass(frozen=True)
class OfArchitecture:
    """A model that an architecture describes. dtype: of the computation; parameters keep their own (float32 masters). kernel:
    of attention over whole rows, see `attention.over_rows`.
    """

    arch: Any
    dtype: Any = jnp.float32
    remat: str = "none"
    kernel: str = "xla"

    @property
    def vocab(self) -> int:
        """The size of the vocabulary."""
        return self.arch.vocab

    @property
    def width(self) -> int:
        """Channels of a hidden state."""
        return self.arch.width

    @property
    def max_positions(self) -> int:
        """The most tokens of a document."""
        return self.arch.max_positions


@dataclasses.dataclass(frozen=True)
class Transformer(OfArchitecture):
    """init and forward for an Architecture."""

    def init(self, key: jax.Array) -> Params:
        """Fresh float32 parameters: normal with the architecture's standard deviation, biases 0, norms that change nothing."""
        a = self.arch
        embed_key, head_key, *layer_keys = jax.random.split(key, a.layers + 2)
        x = jnp.zeros((1, 1, a.width))
        zeros = jnp.zeros((1, 1), jnp.int32)

        def layer(k):
            turn = rotary(a.kinds[0].rope, a.head_width, zeros, 1)
            return Block(a).init(k, x, zeros, turn, zeros[:, :, None] == 0, attend)["params"]

        params = {
            "embed": {"weight": a.init_std * jax.random.normal(embed_key, (a.vocab, a.width))},
            "layers": jax.vmap(layer)(jnp.stack(layer_keys)),
            "norm": {"scale": jnp.full(a.width, 1.0 - a.norm_offset)},
        }
        if not a.tied:
            params["head"] = {"weight": a.init_std * jax.random.normal(head_key, (a.vocab, a.width))}
        return params

    def forward(self, params: Params, batch: Batch, cache: Any = None, *, tap: Sequence[str] = (), patch: Any = None) -> Output:
        """Hidden states of a batch.

        Without a cache: tokens, positions and segments [B,S]; documents attend separately. With a cache (see `make_cache`):
        tokens and positions [B,S]; each token is written to the slot of its position and attends to the slots up to it.
        Optional without a cache: `bidirectional` [B,S] bool, the tokens of a document that see each other both ways.
        Optional with a cache: `room`, a scalar, the length that a document will have, if not the cache's; the cache's
        `rotations`. Optional: `embeds` [B,S,D], vectors that enter the first layer in place of the tokens' where `embedded`
        [B,S] bool is set; the columns by which rows choose among weights (routes.py), [B,S] or [B,1]. Where params have a
        `prefix` (prefix.py), every document sees it; a cache must hold it. tap: sites
        whose activations are returned as `taps`; patch: {site: value, or function} (sites.py).
        """
        sites = Sites(tap, patch, self.arch.layers, batch, dense=not self.arch.experts)
        x = sites.outside("embed", self._embedded(params, batch, whole=cache is not None))
        before = prefix.keys_values(self, params) if cache is None else None
        batch = prefix.shifted(batch, params)
        # What does not depend on the layer is computed once, outside of the scan: a table for each kind of layer.
        kernel = "xla" if sites.layer(0).wants("pattern") else self.kernel
        tables, attend = self._tables(batch, cache, kernel, before)
        positions = batch["positions"]

        def block(x, layer, before, table, cache, index):
            layer, site = routes.of_rows(sharding.gather(layer, self.dtype), batch), sites.layer(index)
            x, cache, router = Block(self.arch).apply({"params": layer}, x, positions, *table, attend, cache, site, before)
            return x, cache, _over_tokens(router, batch.get("segments")), site.taken

        if REMAT[self.remat] is not None and cache is None:
            block = jax.checkpoint(block, policy=REMAT[self.remat])
        if cache is None and not isinstance(params["layers"], tuple):
            x, router, taken = scanned(self.arch, block, x, (params["layers"], before), tables, sites)
        else:
            written, routers, taken = [], [], {name: [] for name in sites.tapped}
            for i, layer in enumerate(unstack(params, self.arch.layers)["layers"]):
                own = jax.tree.map(lambda y, i=i: y[i], before)
                held = None if cache is None else cache[i]
                x, new, router, values = block(x, layer, own, tables[self.arch.kind(i)], held, i)
                written.append(new)
                routers.append(router)
                for name in (name for name, tapped in sites.tapped.items() if i in tapped):
                    taken[name].append(values[name])
            cache = None if cache is None else tuple(written)
            router = jax.tree.map(lambda *r: jnp.stack(r), *routers) if cache is None and self.arch.experts else None
        hidden = RMSNorm(self.arch.eps, self.arch.norm_offset).apply({"params": params["norm"]}, x)
        hidden = sites.outside("final", hidden)
        name = "embed" if self.arch.tied else "head"
        weight = sharding.gather({name: params[name]}, self.dtype)[name]["weight"]
        router = jax.tree.map(lambda r: r.swapaxes(0, 1), router)
        head, whole = Head(weight, soft_cap=self.arch.logit_cap), self.arch.attend == "whole"
        return Output(hidden, head, cache, router, sites.taps(taken), whole)

    def _embedded(self, params: Params, batch: Batch, *, whole: bool) -> jax.Array:
        """What enters the first layer, [B,S,D]. whole: along fsdp, as the sampler's weights are, so that rows need not move."""
        x = (sharding.lookup_whole if whole else sharding.lookup)(params["embed"]["weight"], batch["tokens"], self.dtype)
        x = x * jnp.asarray(self.arch.embed_scale, x.dtype)
        if "embeds" in batch:
            x = jnp.where(batch["embedded"][:, :, None], batch["embeds"].astype(x.dtype), x)
        return x

    def _tables(self, batch: Batch, cache: Any, kernel: str, before: prefix.KeysValues | None = None) -> tuple[list, Callable]:
        """(for each kind of layer (cosine and sine, what it sees), the attention function that takes the latter)."""
        a, positions = self.arch, batch["positions"]
        if cache is None:
            ahead = () if before is None else (before.length, before.seen(batch))
            masks, attention = over_rows(kernel, a, batch, self.dtype, *ahead)
            lengths = document_lengths(batch["segments"], positions)
        else:
            # While decoding, a document's final length is unknown; the room that it has stands for it.
            held = cache_length(cache)
            lengths = batch.get("room", held)
            prompts = batch.get("lengths") if a.attend == "prefix" else None
            masks = [cache_mask(positions, held, kind.window, prompts) for kind in a.kinds]
            attention = functools.partial(attend, scale=a.attention_scale, cap=a.attention_cap)
        if "rotations" in batch:
            turns = [tuple(x[positions] for x in pair) for pair in batch["rotations"]]
        else:
            turns = [rotary(kind.rope, a.head_width, positions, lengths) for kind in a.kinds]
        return list(zip(turns, masks, strict=True)), attention

    def keys_values(self, params: Params, embeds: jax.Array, column: str = "") -> prefix.KeysValues:
        """The keys and values [L,E,m,K,H] of E documents of vectors [E,m,D] that enter the first layer; params: stacked.

        column: that by which documents choose among the E, which are computed by the weights of their number.
        """
        (count, length), empty = embeds.shape[:2], self.make_cache(*embeds.shape[:2])[0]
        batch = {"positions": (places := jnp.broadcast_to(jnp.arange(length), (count, length)))}
        batch |= {column: jnp.arange(count)[:, None]} if column else {}
        tables, attend = self._tables(batch, (empty,), self.kernel)

        def block(x, layer, before, table, cache, index):
            layer = routes.of_rows(sharding.gather(layer, self.dtype), batch)
            x, cache, _ = Block(self.arch).apply({"params": layer}, x, places, *table, attend, empty)
            return x, None, cache, {}

        nothing = Sites((), None, self.arch.layers, {})
        _, cache, _ = scanned(self.arch, block, embeds.astype(self.dtype), (params["layers"], None), tables, nothing)
        return prefix.KeysValues(*(jnp.einsum(f"L{cache_axes()[n]}->LBTKH", cache[n]) for n in "kv"), column)

    def rotations(self, cache: Any) -> list[tuple[jax.Array, jax.Array]]:
        """(cosine, sine), [T,1,R/2] each, of a cache's slots, for each kind of layer. A loop over tokens looks them up, since
        XLA:CPU would compute them again in every layer of every turn.
        """
        length = cache_length(cache)
        places = jnp.arange(length)[None]
        tables = [rotary(kind.rope, self.arch.head_width, places, length) for kind in self.arch.kinds]
        return [(cosine[0], sine[0]) for cosine, sine in tables]

    def make_cache(self, batch_size: int, length: int) -> tuple:
        """An empty key/value cache: a {k, v} a layer, whose axes `attention.cache_axes` names.

        Raises UserError for a model that sees whole documents.
        """
        if self.arch.attend == "whole":
            raise UserError("model: each of its tokens sees those behind it (attend='whole'), so it cannot be sampled.")
        sizes = {"B": batch_size, "K": self.arch.kv_heads, "T": length, "H": self.arch.head_width}

        def empty(axes):
            return sharding.shard(jnp.zeros([sizes[letter] for letter in axes], self.dtype), axes)

        return jax.tree.map(empty, self.cache_axes())

    def cache_axes(self) -> tuple:
        """The axis letters of a cache's arrays."""
        return tuple(cache_axes() for _ in range(self.arch.layers))

    def prepared(self, params: Params) -> Params:
        """The weights as decoding reads them: whole along fsdp, of the computation's numbers, a tree a layer."""
        return transposed(sharding.gather(unstack(params, self.arch.layers), self.dtype))

    def is_prepared(self, params: Params) -> bool:
        """Whether the weights are a tree a layer."""
        return isinstance(params["layers"], tuple)


def scanned(arch: Any, block: Callable, x: jax.Array, layers: tuple, tables: list, sites: Sites) -> tuple:
    """Runs block(x, *a layer's part of each of `layers`, table, None, index) -> (x, cache, result, taps) layer after layer as
    one loop. Each kind of layer has its own table.

    Returns the last hidden states, the results [L,...], and {site: [one for each tapped layer, ...]}.
    """
    several = len(tables) > 1
    stacked = jax.tree.map(lambda *t: jnp.stack(t), *tables) if several else None
    # A buffer for the tapped layers alone goes through the loop: its stacked results would hold every layer's.
    taken = {}
    if sites.tapped:
        first = jax.tree.map(lambda w: w[0], layers)
        shapes = jax.eval_shape(lambda: block(x, *first, tables[0], None, jnp.int32(0))[3])
        taken = {k: jnp.zeros((len(sites.tapped[k]), *v.shape), v.dtype) for k, v in shapes.items()}

    def turn(carry, layer):
        (x, taken), (*parts, kind, index) = carry, layer
        table = jax.tree.map(lambda t: t[kind], stacked) if several else tables[0]
        x, _, result, values = block(x, *parts, table, None, index)
        slots = sites.slots(index)
        return (x, {k: held.at[slots[k]].set(values[k], mode="drop") for k, held in taken.items()}), result

    kinds, indices = jnp.array(arch.pattern) if several else None, jnp.arange(arch.layers) if sites else None
    (x, taken), results = jax.lax.scan(turn, (x, taken), (*layers, kinds, indices))
    return x, results, taken


def _over_tokens(router: Any, segments: jax.Array | None) -> Any:
    """A router's output for each token [B,S,E], summed over the real ones to [B,E]; None where there is nothing to sum."""
    if router is None or segments is None:
        return None
    return {k: jnp.einsum("bse,bs->be", r, (segments > 0).astype(r.dtype)) for k, r in router.items()}


def unstack(params: Params, layers: int) -> Params:
    """Parameters with `layers` as a tuple of trees instead of one stacked tree; unstacked ones are returned unchanged."""
    if isinstance(params["layers"], tuple):
        return params
    return {**params, "layers": tuple(jax.tree.map(lambda x, i=i: x[i], params["layers"]) for i in range(layers))}
