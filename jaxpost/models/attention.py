"""Attention: rotary positions, masks, and the product itself.

`attend` is the product in plain XLA operations and the reference for the faster kernels: `splash` on TPUs, which never holds a
[S,S] array, and `cudnn` on GPUs, which holds the mask and no scores. `over_rows` chooses between them by the model's setting
and by what a kernel can do. Decoding over a cache always uses `attend`.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from jaxpost import sharding
from jaxpost.models.families import Architecture, Rope
from jaxpost.types import Batch

KERNELS = {"tpu": "splash", "gpu": "cudnn"}  # the fast one of a platform; elsewhere there is only xla
RESIDUALS = "attention"  # the name under which a kernel's output may be kept for the backward pass


def frequencies(rope: Rope, head_width: int, length: int = 0) -> np.ndarray:
    """The rotary angle per position of each pair of channels, [R/2] float32, for the R channels of a head that rotate.

    llama3: wavelengths shorter than original / high_factor stay, those longer than original / low_factor are divided by
    `factor`, and the ones between are blended linearly in original / wavelength. yarn ("YaRN: Efficient Context Window
    Extension of Large Language Models"): a linear ramp over the channels, between those that turn beta_fast and beta_slow times
    within the original length. longrope ("LongRoPE: Extending LLM Context Window Beyond 2 Million Tokens"): a divisor for each
    channel, the long ones where a document's `length` is beyond the original.

    They are constants, computed on the host: on devices that approximate powers, the error times a position in the thousands is
    a visible angle.
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
    """The pair of channels that makes this many turns within the original length."""
    return width * math.log(rope.original / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))


def rotary(rope: Rope, head_width: int, positions: jax.Array, lengths: jax.Array | int) -> tuple[jax.Array, jax.Array]:
    """(cosine, sine), each [B,S,1,R/2] float32, of positions [B,S] in documents of `lengths` tokens (a number, or [B,S])."""
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
    """[B,S] document numbers and positions -> [B,S], the length of each token's document."""
    count = segments.shape[1] + 1
    last = jax.vmap(lambda p, s: jax.ops.segment_max(p, s, num_segments=count)[s])(positions, segments)
    return last + 1


def document_mask(batch: Batch, window: int | None = None, prefix: int = 0, seen: jax.Array | None = None) -> jax.Array:
    """Which tokens see which, [B,S,S] bool: a token sees itself and the tokens before it in its own document.

    window: how many tokens it sees, itself included; None is all. Where the batch has `branches`, number 0 is a prompt, higher
    numbers are branches behind it, and a token sees the prompt and its own branch. The next prompt begins where the number
    falls. Where it has `bidirectional` [B,S] bool, the tokens of a document that are set there see each other in both
    directions, up to `window` tokens on each side, as transformers has it. prefix: the number m of keys before every document,
    and seen [B,S,E*m] which of E prefixes' keys a token sees, None for all of one (models/prefix.py): then [B,S,E*m+S], where
    positions begin at m and the window counts the prefix's places too.
    """
    segments, positions = batch["segments"], batch["positions"]
    order = jnp.arange(segments.shape[1])
    sees = order[:, None] >= order[None, :]
    both = _pairs(batch["bidirectional"]) if "bidirectional" in batch else None
    sees = (sees if both is None else sees | both) & (segments > 0)[:, :, None]
    if "branches" in batch:
        branches = batch["branches"]
        prompts = jnp.cumsum(branches < jnp.pad(branches[:, :-1], ((0, 0), (1, 0))), axis=1)
        behind = (branches[:, None, :] == 0) | (branches[:, :, None] == branches[:, None, :])
        sees &= (prompts[:, :, None] == prompts[:, None, :]) & behind
    else:
        sees &= segments[:, :, None] == segments[:, None, :]
    places = positions
    if prefix:
        seen = jnp.broadcast_to((segments > 0)[:, :, None], (*segments.shape, prefix)) if seen is None else seen
        sees, keys = jnp.concatenate([seen, sees], axis=2), seen.shape[2]
        both = None if both is None else jnp.pad(both, ((0, 0), (0, 0), (keys, 0)))
        before = jnp.broadcast_to(jnp.arange(keys) % prefix, (len(segments), keys))
        places = jnp.concatenate([before, positions], axis=1)
    if window is None:
        return sees
    return sees & _near(positions[:, :, None] - places[:, None, :], window, both)


def _pairs(column: jax.Array) -> jax.Array:
    """[B,S] bool -> [B,S,S]: whether both tokens are set."""
    return column[:, :, None] & column[:, None, :]


def _near(back: jax.Array, window: int, both: jax.Array | None) -> jax.Array:
    """Whether a window reaches a token that lies `back` before; both: where it reaches to both sides."""
    return back < window if both is None else jnp.where(both, jnp.abs(back) <= window, back < window)


def attending(arch: Architecture, batch: Batch) -> Batch:
    """The batch with the column `bidirectional` that the architecture's `attend` asks for: "whole" sets every token, "prefix"
    the tokens before the first learned one of their document, and every token of a batch without `mask`. A column that the
    batch brings is kept, and "causal" adds none.
    """
    if arch.attend == "causal" or "bidirectional" in batch:
        return batch
    segments, positions = batch["segments"], batch["positions"]
    if arch.attend == "whole" or "mask" not in batch:
        return {**batch, "bidirectional": segments > 0}
    learned = batch["mask"] | batch["demonstrations"] if "demonstrations" in batch else batch["mask"]
    learned = jnp.where(learned, positions, jnp.iinfo(jnp.int32).max)
    first = jax.vmap(lambda p, s: jax.ops.segment_min(p, s, num_segments=segments.shape[1] + 1)[s])(learned, segments)
    return {**batch, "bidirectional": (segments > 0) & (positions < first)}


def cache_axes() -> dict[str, str]:
    """The order of the axes of a cache's keys "k" and values "v". On a TPU the heads of a token are together, a tile that is
    written at once; any other order would copy the whole cache back and forth. A CPU multiplies one query by keys twice as
    fast along T as along H.
    """
    orders = {"tpu": ("BTKH", "BTKH"), "cpu": ("BKHT", "BKTH")}
    return dict(zip("kv", orders.get(sharding.platform(), ("BKTH", "BKTH")), strict=True))


def cache_length(cache: tuple) -> int:
    """The number of tokens a row that a cache (see `Transformer.make_cache`) has room for."""
    return cache[0]["v"].shape[cache_axes()["v"].index("T")]


def written(cache: jax.Array, new: jax.Array, positions: jax.Array, axes: str) -> jax.Array:
    """A cache of keys or values in the order `axes`, with those of new tokens [B,S,K,H] written to the slots of their positions
    [B,S].

    A token's slot is its position, so rows of different lengths need no bookkeeping, and garbage that right padding writes is
    overwritten before any token sees it.
    """
    new = jnp.einsum(f"BTKH->{axes}", new.astype(cache.dtype))
    before = (slice(None),) * (axes.index("T") - 1)
    # Row by row: otherwise the partitioner does not see that rows split along two mesh axes stay where they are.
    return jax.vmap(lambda held, new, places: held.at[*before, places].set(new))(cache, new, positions)


def cache_mask(positions: jax.Array, length: int, window: int | None = None, prompts: jax.Array | None = None) -> jax.Array:
    """[B,S] positions -> [B,S,T] bool: a token sees the cache's slots up to its own position (slot = position), or the last
    `window` of them. prompts: [B], the lengths of prompts that the positions cover and that are seen in both directions.
    """
    back = positions[:, :, None] - jnp.arange(length)[None, None, :]
    sees, both = back >= 0, None
    if prompts is not None:
        ends = prompts[:, None, None]
        both = (positions[:, :, None] < ends) & (jnp.arange(length)[None, None, :] < ends)
        sees |= both
    return sees if window is None else sees & _near(back, window, both)


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: jax.Array,
    scale: float | None = None,
    cap: float | None = None,
    site: Callable | None = None,
) -> jax.Array:
    """Softmax attention, grouped: q [B,S,N,H], k and v [B,K,T,H], mask [B,S,T] -> [B,S,N,H]. Scores and softmax in float32.

    scale: of the scores, 1 / sqrt(H) if None; cap: scores are cap * tanh(score / cap); site: ("pattern", weights [B,N,S,T]) ->
    weights (sites.py). A token that sees nothing (padding) gets the mean of v, which is finite; nobody reads it.
    """
    b, s, n, h = q.shape
    heads = k.shape[1], n // k.shape[1]
    # A single query gets no axis: with one, XLA:CPU multiplies half as fast.
    inner, pairs, axes = ("bkgh", "bkgt", (b,)) if s == 1 else ("bskgh", "bkgst", (b, s))
    scores = jnp.einsum(f"{inner},bkth->{pairs}", q.reshape(*axes, *heads, h), k, preferred_element_type=jnp.float32)
    scores = scores / math.sqrt(h) if scale is None else scores * scale
    if cap is not None:
        scores = cap * jnp.tanh(scores / cap)
    scores = jnp.where(mask[:, None] if s == 1 else mask[:, None, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    if site is not None:
        weights = site("pattern", weights.reshape(b, n, s, -1)).reshape(weights.shape)
    return jnp.einsum(f"{pairs},bkth->{inner}", weights, v).reshape(b, s, n, h)


def splash(q, k, v, segments, *, window=None, scale=None, cap=None, interpret=False) -> jax.Array:
    """`attend` over documents by the TPU kernel that skips masked blocks: q [B,S,N,H], k and v [B,K,T,H], segments [B,S] ->
    [B,S,N,H]. S is a multiple of 128. interpret: run it as plain operations, on any device.

    Each device computes its own rows and heads. Padding sees padding; nobody reads it.
    """
    # Imported here: it takes a second, which other platforms should not pay.
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    groups = q.shape[2] // k.shape[1]
    if k.shape[1] % sharding.ways("tensor") and q.shape[2] % sharding.ways("tensor") == 0:
        k, v = (jnp.repeat(x, groups, axis=1) for x in (k, v))  # else a device would have queries without their keys
    scale = q.shape[-1] ** -0.5 if scale is None else scale

    def local(q, k, v, segments):
        length, heads = q.shape[1:3]
        mask = masks.CausalMask((length, length))
        if window is not None:
            mask = masks.LocalMask((length, length), (window - 1, 0), 0)
        block = next(b for b in (512, 256, 128) if length % b == 0)
        names = ("q", "kv", "kv_compute", "q_dkv", "kv_dkv", "kv_dkv_compute", "q_dq", "kv_dq")
        kernel = kernels.make_splash_mha(
            masks.MultiHeadMask([mask] * heads),
            block_sizes=kernels.BlockSizes(**{f"block_{name}": block for name in names}),
            attn_logits_soft_cap=cap,
            residual_checkpoint_name=RESIDUALS,
            head_shards=1,
            q_seq_shards=1,
            interpret=interpret,
        )
        scaled = (q * scale).astype(q.dtype).swapaxes(1, 2)
        return jax.vmap(kernel)(scaled, k, v, kernels.SegmentIds(segments, segments)).swapaxes(1, 2)

    return sharding.locally(local, (q, k, v, segments), ("BSNH", "BKTH", "BKTH", "BS"))


def cudnn(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array, scale: float | None = None) -> jax.Array:
    """`attend` by cuDNN's fused kernel: q [B,S,N,H], k and v [B,K,T,H], mask [B,S,T] -> [B,S,N,H], in bfloat16 or float16."""
    k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)
    return jax.nn.dot_product_attention(q, k, v, mask=mask[:, None], scale=scale, implementation="cudnn")


def over_rows(
    kernel: str, arch: Architecture, batch: Batch, dtype, prefix: int = 0, seen: jax.Array | None = None
) -> tuple[list, Callable]:
    """How the layers of a model attend over a batch's documents: (what each kind of layer sees, attend).

    attend(q, k, v, sees) -> [B,S,N,H] takes an element of the list, or one selected from their stack by a traced index. XLA
    replaces a kernel that cannot do the job: splash needs rows of a multiple of 128 tokens and supports neither branches nor
    tokens that see what follows them; cudnn needs 16-bit numbers and heads of a multiple of 8 and at most 128 channels, and
    does not support a soft cap. Neither supports a prefix, `document_mask`'s.
    """
    batch = attending(arch, batch)
    scale, cap, segments = arch.attention_scale, arch.attention_cap, batch["segments"]
    causal = not prefix and not batch.keys() & {"branches", "bidirectional"}
    if kernel == "splash" and segments.shape[1] % 128 == 0 and causal:
        ways = [functools.partial(splash, segments=segments, window=k.window, scale=scale, cap=cap) for k in arch.kinds]

        def by_kind(q, k, v, kind):
            return ways[0](q, k, v) if len(ways) == 1 else jax.lax.switch(kind, ways, q, k, v)

        return list(range(len(ways))), by_kind
    masks, width = [document_mask(batch, kind.window, prefix, seen) for kind in arch.kinds], arch.head_width
    fits = width % 8 == 0 and width <= 128 and cap is None and not prefix
    if kernel == "cudnn" and jnp.dtype(dtype).itemsize == 2 and fits:
        return masks, functools.partial(cudnn, scale=scale)
    return masks, functools.partial(attend, scale=scale, cap=cap)
