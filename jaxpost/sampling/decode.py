"""Sampling with a key/value cache: prefill the prompts, then one token a row and turn until every row has stopped.

The noise of a draw is a function of (seed, step, row, place in the completion), so a rollout can be made again from those
numbers and the weights alone. Log-probabilities are those of the distribution sampled from. The stop token is part of the
completion.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxpost import sharding
from jaxpost.errors import UserError
from jaxpost.models.heads import logits
from jaxpost.models.transformer import Transformer, unstack
from jaxpost.types import Params


class Completions(NamedTuple):
    """tokens [B,P+new] int32: each prompt and its completion side by side, zeros after; lengths [B]: the completions' alone;
    logps [B,P+new] float32 at the completions' tokens, zero elsewhere; stopped [B] bool: whether a stop token ended it."""

    tokens: jax.Array
    lengths: jax.Array
    logps: jax.Array
    stopped: jax.Array


def draw(scores: jax.Array, uniform: jax.Array, temperature: jax.Array) -> tuple[jax.Array, jax.Array]:
    """One token a row from logits [B,V] by inverting the cumulative distribution at uniform [B] in [0,1); temperature 0 is
    greedy.

    Returns (token [B], its log-probability [B]): at the temperature, or at temperature 1 for a greedy choice. One random number
    a row where the Gumbel trick needs V.
    """
    logps = jax.nn.log_softmax(scores / jnp.where(temperature > 0, temperature, 1.0), axis=-1)
    probs = jnp.exp(logps)
    mass = jnp.cumsum(probs, axis=-1)
    # A parallel cumulative sum rounds each place by itself, so it may rise a little where the probability is zero: such a
    # place is left out by name. The mode stands in where rounding leaves none.
    reached = (mass > uniform[:, None] * mass[:, -1:]) & (probs > 0)
    mode = jnp.argmax(scores, axis=-1)
    token = jnp.where((temperature > 0) & jnp.any(reached, axis=-1), jnp.argmax(reached, axis=-1), mode)
    return token.astype(jnp.int32), jnp.take_along_axis(logps, token[:, None], axis=-1)[:, 0]


def _uniform(key: jax.Array, rows: jax.Array, place: jax.Array) -> jax.Array:
    """A number in [0,1) for each row, independent of which other rows are there."""
    one = lambda row: jax.random.uniform(jax.random.fold_in(jax.random.fold_in(key, row), place))  # noqa: E731
    return jax.vmap(one)(rows)


@functools.partial(jax.jit, static_argnames=("model", "new"))
def sample(
    model: Transformer,
    params: Params,
    prompts: jax.Array,
    lengths: jax.Array,
    rows: jax.Array,
    noise: jax.Array,
    temperature: jax.Array,
    stop: jax.Array,
    *,
    new: int,
) -> Completions:
    """Completes prompts [B,P] int32, right-padded, of true lengths [B] >= 1, by at most `new` tokens.

    rows [B]: the number that tells each row's noise from the others'; noise [2]: (seed, step); temperature: scalar, 0 is
    greedy; stop [n]: the token ids that end a completion.
    """
    params = sharding.gather(unstack(params, model.arch.layers))
    key = jax.random.fold_in(jax.random.PRNGKey(noise[0]), noise[1])
    b, p = prompts.shape
    each = jnp.arange(b)
    places = jnp.broadcast_to(jnp.arange(p), (b, p))
    out = model.forward(params, {"tokens": prompts, "positions": places}, model.make_cache(b, p + new))
    scores = logits(out.hidden[each, lengths - 1], out.head)

    def turn(carry):
        t, scores, cache, tokens, logps, done, count = carry
        token, logp = draw(scores, _uniform(key, rows, t), temperature)
        here = lengths + t
        tokens = tokens.at[each, here].set(jnp.where(done, tokens[each, here], token))
        logps = logps.at[each, here].set(jnp.where(done, 0.0, logp))
        count = count + ~done
        done = done | jnp.isin(token, stop)
        out = model.forward(params, {"tokens": token[:, None], "positions": here[:, None]}, cache)
        return t + 1, logits(out.hidden[:, 0], out.head), out.cache, tokens, logps, done, count

    def going(carry):
        return (carry[0] < new) & ~jnp.all(carry[5])

    prompts = jnp.where(places < lengths[:, None], prompts, 0)
    tokens = sharding.shard(jnp.pad(prompts, ((0, 0), (0, new))), "BS")
    start = (0, scores, out.cache, tokens, jnp.zeros(tokens.shape, jnp.float32), jnp.zeros(b, bool), jnp.zeros(b, jnp.int32))
    _, _, _, tokens, logps, done, count = jax.lax.while_loop(going, turn, start)
    # Pinned, since each process reads back its own rows: the partitioner would as soon give every process all of them.
    return Completions(*(sharding.shard(x, "BS"[: x.ndim]) for x in (tokens, count, logps, done)))


def complete(
    model: Transformer,
    params: Params,
    prompts: Sequence[np.ndarray],
    *,
    mesh,
    prompt_window: int,
    new: int,
    stop: Sequence[int],
    temperature: float = 1.0,
    seed: int = 0,
    step: int = 0,
    rows: tuple[int, int] | None = None,
    number: int = 0,
) -> Completions:
    """`sample` from host to host: a list of token arrays in, numpy Completions of the same rows out.

    All processes call it together. rows: (first row, rows of the whole batch) where `prompts` are this process's share of it;
    left out, every process gives the whole batch and gets it back. number: the first row's, for its noise. Raises
    UserError for a prompt that is empty or longer than the window.
    """
    asked = len(prompts)
    first, total = rows or (0, asked)
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    if rows is None:
        prompts, total = [*prompts, *[prompts[0]] * (-len(prompts) % ways)], total + -total % ways
        start, end = sharding.local_rows(mesh, total)
        prompts, first = prompts[start:end], start
    columns = {
        "prompts": np.zeros((len(prompts), prompt_window), np.int32),
        "lengths": np.array([len(p) for p in prompts], np.int32),
        "rows": number + np.arange(first, first + len(prompts), dtype=np.int32),
    }
    for i, prompt in enumerate(prompts):
        if not 0 < len(prompt) <= prompt_window:
            raise UserError(
                f"a prompt has {len(prompt)} tokens; the prompt window takes 1 to {prompt_window}. Set prompt_window."
            )
        columns["prompts"][i, : len(prompt)] = prompt
    scalars = {
        "noise": np.array([seed, step], np.int32),
        "temperature": np.float32(temperature),
        "stop": np.array(stop, np.int32),
    }
    with sharding.use(mesh):
        found = sample(model, params, **sharding.distribute(columns, mesh, total), **scalars, new=new)
    if rows is None:
        return Completions(*(sharding.everywhere(x)[:asked] for x in found))
    return Completions(*(sharding.local(x, mesh) for x in found))


def answers(found: Completions, prompts: Sequence[np.ndarray], tokenizer) -> list[str]:
    """The completions of these prompts as text, to the letter, without the stop token that ended them: it is trained on, but is
    no part of the answer.
    """
    texts = []
    for prompt, row, length, stopped in zip(prompts, found.tokens, found.lengths, found.stopped, strict=False):
        ids = row[len(prompt) : len(prompt) + int(length) - int(stopped)]
        texts.append(tokenizer.decode(ids, clean_up_tokenization_spaces=False))
    return texts
