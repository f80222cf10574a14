"""Log-probabilities without a [B,S,V] array: the head applied in chunks, forward and backward.

A loss over tokens needs a few numbers from each token's logits, never the logits themselves. `over_head` computes such numbers
chunk by chunk and recomputes the logits in the backward pass. Rows are reordered so that positions in the mask come first, and
the loop ends after the last of them: other positions cost nothing.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxpost import sharding
from jaxpost.declare import Column
from jaxpost.errors import UserError
from jaxpost.models.heads import logits, vocab
from jaxpost.types import Batch, Head, Output

# Logits held at a time, in elements a batch shard (16 MiB in float32), or a quarter of the head's size if that is more. Every
# chunk reads the head and adds to its gradient: a wide model's chunks must be long to amortise that.
CHUNK = 2**22

# The column of an objective with a frozen reference: log-probabilities under the stage's first weights.
REFERENCE = {"ref_logps": Column("BS", "float32", by="ref_logps")}


def over_head(fn: Callable, hidden: jax.Array, head: Head, columns: dict, mask: jax.Array, constants: tuple = ()) -> dict:
    """fn(logits [R,V] float32, {column: [R,...]}, *constants) -> {name: [R,...]}, for the positions of `hidden` [B,S,D] that
    `mask` [B,S] keeps.

    Returns {name: [B,S,...] float32}, zero elsewhere. Differentiable in hidden and head; columns ([B,S,...], or scalars) and
    constants (a teacher's Head, which every chunk takes whole) have no gradient. fn must be a module-level function.
    """
    rows = {k: v if jnp.ndim(v) > 2 else jnp.broadcast_to(v, mask.shape) for k, v in columns.items()}
    return _over_head(fn, hidden, head, rows, mask, constants)


def _width(batch: int, length: int, head: Head) -> int:
    """Positions of each row that go into one chunk."""
    size = sum(leaf.size for leaf in jax.tree.leaves(head))
    positions = max(CHUNK, size // 4) * sharding.batch_ways() // (batch * vocab(head))
    return max(1, min(length, positions))


def _layout(mask: jax.Array, head: Head):
    """(order [B,S], chunk width, chunks that hold anything): kept positions first, in their order."""
    b, s = mask.shape
    width = _width(b, s, head)
    order = jnp.argsort(~mask, axis=1, stable=True)
    trips = (jnp.max(jnp.sum(mask, axis=1)) + width - 1) // width
    return order, width, trips


def _counted(mask: jax.Array, width: int):
    """The scope of a loop over chunks; its name tells `jaxpost.fit` the largest number of trips."""
    return jax.named_scope(f"at_most_{-(-mask.shape[1] // width)}_times")


def _take(x: jax.Array, order: jax.Array, width: int) -> jax.Array:
    """x [B,S,...] in this order, padded to whole chunks with copies of its last place.

    Results of the padding are dropped and have no gradient, but must be finite: zeros would give a temperature of zero.
    """
    x = jnp.take_along_axis(x, order.reshape(*order.shape, *[1] * (x.ndim - 2)), axis=1)
    return jnp.pad(x, [(0, 0), (0, -x.shape[1] % width)] + [(0, 0)] * (x.ndim - 2), mode="edge")


def _kept(x: jax.Array, mask: jax.Array) -> jax.Array:
    """x [B,S,...] in the mask, zero elsewhere."""
    return jnp.where(mask.reshape(*mask.shape, *[1] * (x.ndim - 2)), x, 0)


def _put_back(x: jax.Array, order: jax.Array) -> jax.Array:
    """The inverse of _take."""
    inverse = jnp.argsort(order, axis=1)
    return jnp.take_along_axis(x[:, : order.shape[1]], inverse.reshape(*order.shape, *[1] * (x.ndim - 2)), axis=1)


def _apply(fn, hidden, head, columns, constants):
    """fn over [B,C] positions at once, flattened to the [R] it is written for."""
    rows = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), columns)
    flat = fn(logits(hidden.reshape(-1, hidden.shape[-1]), head), rows, *constants)
    return {k: v.reshape(*hidden.shape[:-1], *v.shape[1:]).astype(jnp.float32) for k, v in flat.items()}


def _slice(tree, i, width):
    return jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, i * width, width, axis=1), tree)


def _update(tree, part, i, width):
    return jax.tree.map(lambda x, y: jax.lax.dynamic_update_slice_in_dim(x, y, i * width, axis=1), tree, part)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _over_head(fn, hidden, head, columns, mask, constants):
    return _forward(fn, hidden, head, columns, mask, constants)[0]


def _forward(fn, hidden, head, columns, mask, constants):
    order, width, trips = _layout(mask, head)
    inputs = jax.tree.map(lambda x: _take(x, order, width), (hidden, columns))
    shapes = jax.eval_shape(lambda h, c: _apply(fn, h, head, c, constants), *inputs)
    out = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

    def body(i, out):
        hidden, columns = (_slice(x, i, width) for x in inputs)
        return _update(out, _apply(fn, hidden, head, columns, constants), i, width)

    with _counted(mask, width):
        out = jax.lax.fori_loop(0, trips, body, out)
    return {k: _kept(_put_back(v, order), mask) for k, v in out.items()}, (hidden, head, columns, mask, constants)


def _backward(fn, saved, cotangents):
    hidden, head, columns, mask, constants = saved
    order, width, trips = _layout(mask, head)
    cotangents = {k: _kept(g, mask) for k, g in cotangents.items()}
    inputs = jax.tree.map(lambda x: _take(x, order, width), (hidden, columns, cotangents))
    real = jnp.arange(inputs[0].shape[1]) < mask.shape[1]
    inputs = (*inputs[:2], {k: _kept(g, jnp.broadcast_to(real, g.shape[:2])) for k, g in inputs[2].items()})
    # One head gradient a batch shard, summed after the loop: summed inside it, every chunk would cost an all-reduce of [V,D].
    ways = sharding.batch_ways() if hidden.shape[0] % sharding.batch_ways() == 0 else 1
    split = lambda tree: jax.tree.map(lambda x: x.reshape(ways, x.shape[0] // ways, *x.shape[1:]), tree)  # noqa: E731
    letters = jax.tree.map(lambda w: "VD" if w.ndim == 2 else "." * w.ndim, head)

    def pinned(x, axes):
        return sharding.shard(x, f"B{axes}")

    zeros = jax.tree.map(lambda w, axes: pinned(jnp.zeros((ways, *w.shape), jnp.float32), axes), head, letters)

    def gradient(head, h, c, g):
        return jax.vjp(lambda head, h: _apply(fn, h, head, c, constants), head, h)[1](g)

    def body(i, carry):
        d_head, d_hidden = carry
        h, c, g = (split(_slice(x, i, width)) for x in inputs)
        part, d_h = jax.vmap(gradient, in_axes=(None, 0, 0, 0))(head, h, c, g)
        d_head = jax.tree.map(lambda a, b, axes: pinned(a + b.astype(jnp.float32), axes), d_head, part, letters)
        return d_head, _update(d_hidden, d_h.reshape(-1, *d_h.shape[2:]), i, width)

    with _counted(mask, width):
        d_head, d_hidden = jax.lax.fori_loop(0, trips, body, (zeros, jnp.zeros_like(inputs[0])))
    d_head = jax.tree.map(lambda g, w, axes: sharding.summed(g.astype(w.dtype), axes), d_head, head, letters)
    return _kept(_put_back(d_hidden, order), mask), d_head, None, None, None


_over_head.defvjp(_forward, _backward)


def _score(logits: jax.Array, columns: dict) -> dict:
    """A token's log-probability, and without gradient the entropy and whether the token is the mode."""
    logits = logits / columns["temperature"][:, None]
    norm = jax.nn.logsumexp(logits, axis=-1)
    # A masked sum, not a gather: it fuses with its neighbours and partitions over a split vocabulary.
    hit = jnp.arange(logits.shape[-1]) == columns["tokens"][:, None]
    constant = jax.lax.stop_gradient(logits)
    entropy = jax.lax.stop_gradient(norm) - jnp.sum(jax.nn.softmax(constant, axis=-1) * constant, axis=-1)
    correct = jnp.argmax(constant, axis=-1) == columns["tokens"]
    return {"logps": jnp.sum(jnp.where(hit, logits, 0.0), axis=-1) - norm, "entropy": entropy, "correct": correct}


def token_scores(output: Output, batch: Batch, mask: jax.Array | None = None) -> dict[str, jax.Array]:
    """logps, entropy and correct, each [B,S] float32 and each about the token at its own place; zero where the mask is.

    mask [B,S]: batch["mask"] by default. Logits are divided by batch["temperature"] where there is one, so that a policy is
    scored as it was sampled. Only logps has a gradient.
    """
    return at_tokens(_score, output, columns=drawn(batch), mask=batch["mask"] if mask is None else mask)


def scores_in_place(output: Output, batch: Batch, mask: jax.Array) -> dict[str, jax.Array]:
    """As token_scores, of a model whose hidden state says which token is at its own place, as masked language models do."""
    return over_head(_score, output.hidden, output.head, drawn(batch), mask)


def drawn(batch: Batch) -> dict[str, jax.Array]:
    """The columns for scoring tokens: the ids, and the temperature at which they were drawn."""
    return {"tokens": batch["tokens"], "temperature": batch.get("temperature", jnp.float32(1.0))}


def at_tokens(fn: Callable, output: Output, *, columns: dict, mask: jax.Array, constants: tuple = ()) -> dict[str, jax.Array]:
    """As `over_head`, where columns, mask and results are each about the token at its own place. Raises UserError for a model
    that sees whole documents.
    """
    if output.whole:
        raise UserError(
            "the model sees whole documents, the next token included (an encoder, or config.attend='whole'), so it gives that "
            "token no probability; take an objective of hidden tokens (masked.mlm) or of documents, or config.attend='causal'."
        )

    # The hidden state before a token predicts it: columns are shifted onto the predictors, and the results back.
    def before(x):
        return jnp.roll(x, -1, axis=1) if jnp.ndim(x) else x

    keep = before(mask).at[:, -1].set(False)
    results = over_head(fn, output.hidden, output.head, {k: before(v) for k, v in columns.items()}, keep, constants)
    return {k: jnp.roll(v, 1, axis=1) for k, v in results.items()}
