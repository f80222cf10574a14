"""Beam search: the completions of highest score that a search of some width finds.

    score = sum of the completion's log-probabilities / (its number of tokens, the end token included) ** length_penalty

as `transformers` defines it: above 0 long completions are preferred, below 0 short ones. The log-probabilities are the model's
own. Processors see them in place of logits and may forbid tokens; what is left is not normalised again, so that a constraint
changes which completions may be, and no completion's score.

At each turn the `beams` likeliest continuations of a prompt's beams go on. A continuation by an end token counts as complete
if it is among the `beams` likeliest of all. The search of a prompt is over when none of its beams could still lead to a
score above the worst of its `beams` complete ones (`early_stopping="never"` of `transformers`), or at `new` tokens.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxpost import sharding
from jaxpost.errors import UserError
from jaxpost.models import prefix, routes
from jaxpost.models.heads import logits
from jaxpost.models.protocol import Sampled
from jaxpost.sampling.decode import check_prompts, placed, put, ready
from jaxpost.sampling.slots import Bank, prefill
from jaxpost.types import Params


class Completed(NamedTuple):
    """Completions of each of U prompts, the best first: tokens [U,W,N] int32, zeros after the end; lengths [U,W]; logps [U,W]
    float32, the sum; scores [U,W] float32, -inf where there are fewer; stopped [U,W] bool: whether an end token ended it, not
    the limit.
    """

    tokens: Any
    lengths: Any
    logps: Any
    scores: Any
    stopped: Any


class _Search(NamedTuple):
    """A search under way: the cache of U x W rows, their last tokens [U,W], all their tokens [U,W,N], their log-probabilities
    [U,W], how many tokens they have, and what is complete.
    """

    cache: tuple
    token: jax.Array
    tokens: jax.Array
    logps: jax.Array
    count: jax.Array
    completed: Completed


def search(
    model: Sampled,
    params: Params,
    prompts: Sequence[np.ndarray],
    *,
    mesh,
    prompt_window: int,
    new: int,
    stop: Sequence[int],
    beams: int,
    length_penalty: float = 1.0,
    chain: Sequence[Callable] = (),
    columns: Mapping[str, Sequence[int]] | None = None,
) -> Completed:
    """The `beams` best completions of every prompt, as numpy arrays. All processes call it together, with the same prompts.

    params: the model's, or what `decode.ready` made of them. new: the most tokens of a completion, its end included; stop: the
    ids that end one; chain: processors, whose rows are beams; columns: as in `decode.stream`. Raises UserError for a prompt
    that is empty or longer than the window, and for no beams.
    """
    if beams < 1:
        raise UserError(f"beams: {beams}; a search has 1 at least.")
    check_prompts(prompts, prompt_window)
    chosen = routes.of_prompts(columns or {}, routes.columns(params), len(prompts))
    count = len(prompts) + -len(prompts) % (mesh.shape["data"] * mesh.shape["fsdp"])
    chosen = {name: np.pad(x, (0, count - len(prompts))) for name, x in chosen.items()}
    tokens, lengths = np.zeros((count, prompt_window), np.int32), np.ones(count, np.int32)
    for i, prompt in enumerate(prompts):
        tokens[i, : len(prompt)], lengths[i] = prompt, len(prompt)
    params, chain = ready(model, params, mesh), placed(chain, mesh)
    tokens, lengths, chosen = put(tokens, mesh), put(lengths, mesh), {name: put(x, mesh) for name, x in chosen.items()}
    with sharding.use(mesh):
        room = prefix.length(params) + prompt_window + new
        bank = prefill(model, params, tokens, lengths, chosen, room=room)
        bank = bank._replace(prompts=tokens) if chain else bank
        completed = _searched(
            model, params, bank, np.array(stop, np.int32), np.float32(length_penalty), chain, beams=beams, new=new,
            room=room,
        )  # fmt: skip
    return jax.tree.map(lambda x: x[: len(prompts)], jax.device_get(completed))


@functools.partial(jax.jit, static_argnames=("model", "beams", "new", "room"))
def _searched(model, params, bank: Bank, stop, penalty, chain, *, beams: int, new: int, room: int) -> Completed:
    """What is complete for the prompts of a bank; stop [n], penalty []."""
    prompts = len(bank.lengths)
    lengths = jnp.repeat(bank.lengths, beams)
    about = {"prompts": jnp.repeat(bank.prompts, beams, axis=0), "prompt_lengths": lengths} if chain else {}
    axes, columns = model.cache_axes(), {name: jnp.repeat(x, beams)[:, None] for name, x in bank.columns.items()}
    choose = functools.partial(_chosen, stop=stop, penalty=penalty, chain=chain, about=about, axes=axes)

    def copied(held, banked, axes):
        rows = jnp.repeat(banked, beams, axis=0)
        rows = jax.lax.dynamic_update_slice_in_dim(held, rows, 0, axes.index("T")) if "T" in axes else rows
        return sharding.shard(rows, axes)

    cache = jax.tree.map(copied, model.make_cache(prompts * beams, room), bank.cache, axes)
    rotations = model.rotations(cache)

    def turn(s: _Search):
        places = (lengths + s.count - 1)[:, None]
        inputs = {"tokens": s.token.reshape(-1, 1), "positions": places, "rotations": rotations, **columns}
        out = model.forward(params, inputs, s.cache)
        return choose(s._replace(cache=out.cache), logits(out.hidden[:, 0], out.head))

    def going(s: _Search):
        length = jnp.where(penalty > 0, new, s.count + 1).astype(jnp.float32)
        reachable = jnp.max(s.logps, axis=1) / length**penalty
        return (s.count < new) & jnp.any(reachable > jnp.min(s.completed.scores, axis=1))

    none = jnp.zeros((prompts, beams), jnp.int32)
    tokens, worst = jnp.zeros((prompts, beams, new), jnp.int32), jnp.full((prompts, beams), -jnp.inf)
    # All beams of a prompt begin equal, so one alone may go on.
    first = _Search(
        cache, none, tokens, worst.at[:, 0].set(0.0), jnp.int32(0), Completed(tokens, none, worst, worst, none.astype(bool))
    )
    completed = jax.lax.while_loop(going, turn, choose(first, jnp.repeat(bank.scores, beams, axis=0))).completed
    # Every process looks at all of them.
    return jax.tree.map(lambda x: sharding.shard(x, "SGS"[: x.ndim]), completed)


def _chosen(s: _Search, scores: jax.Array, *, stop, penalty, chain, about: dict, axes) -> _Search:
    """The search with one more token for each beam, from the model's logits [U x W,V]."""
    prompts, beams, new = s.tokens.shape
    logps, vocab = jax.nn.log_softmax(scores, axis=-1), scores.shape[-1]
    rows = jnp.arange(prompts * beams, dtype=jnp.int32)
    context = {"tokens": s.tokens.reshape(-1, new), "counts": jnp.full_like(rows, s.count), "numbers": rows, **about}
    for processor in chain:
        logps = processor(logps, context)
    # Of so many at least `beams` do not end.
    most = min(beams * (1 + len(stop)), beams * vocab)
    logps, which = jax.lax.top_k((s.logps.reshape(-1, 1) + logps).reshape(prompts, -1), most)
    parents, token = which // vocab, (which % vocab).astype(jnp.int32)
    tokens = _of_prompts(s.tokens, parents).at[:, :, s.count].set(token)
    count, ends = s.count + 1, jnp.isin(token, stop)
    goes_on = ~ends & (jnp.cumsum(~ends, axis=1) <= beams)
    complete = (ends & (jnp.arange(most) < beams)) | (goes_on & (count == new))
    scores = jnp.where(complete, logps / count.astype(jnp.float32) ** penalty, -jnp.inf)
    completed = _merged(s.completed, Completed(tokens, jnp.full_like(token, count), logps, scores, ends))
    logps, places = jax.lax.top_k(jnp.where(goes_on, logps, -jnp.inf), beams)
    token, tokens, parents = (_of_prompts(x, places) for x in (token, tokens, parents))

    def followed(x, axes):
        rows = _of_prompts(x.reshape(prompts, beams, *x.shape[1:]), parents)
        return sharding.shard(rows.reshape(x.shape), axes)

    return _Search(jax.tree.map(followed, s.cache, axes), *_pinned((token, tokens, logps)), count, _pinned(completed))


def _merged(old: Completed, new: Completed) -> Completed:
    """The best of both, as many as the old has."""
    both = Completed(*(jnp.concatenate(pair, axis=1) for pair in zip(old, new, strict=True)))
    scores, places = jax.lax.top_k(both.scores, old.scores.shape[1])
    return Completed(*(_of_prompts(x, places) for x in both))._replace(scores=scores)


def _of_prompts(x: jax.Array, which: jax.Array) -> jax.Array:
    """Of each prompt's rows x [U,W,...] those that are asked for [U,K]."""
    return jax.vmap(lambda rows, i: rows[i])(x, which)


def _pinned(tree: Any) -> Any:
    """What is of prompts lies with their devices."""
    return jax.tree.map(lambda x: sharding.shard(x, "BGS"[: x.ndim]), tree)
