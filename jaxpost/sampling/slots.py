"""Decoding on the device: a bank of prompts, a queue of completions, slots that work it off, and segments of so many turns.

    prepare    the weights as decoding reads them, once an update
    prefill    each prompt once, however many completions it gets: its keys and values, and the logits after it
    begin      a queue's empty slots
    segment    turns: every slot's next token. A slot whose completion has ended takes the next one of its queue at once, so
               that a long completion holds up nobody; its prompt is copied out of the bank

A completion may begin with tokens that are given (a hint): they are decoded like others, one a turn, so that the prompt's keys
and values are still shared, and only the draw is put aside.

The noise of a draw is a function of (seed, step, number of the completion, place in it), and shapes come from the settings
alone. So a completion can be made again from those and the weights: at one compiled shape bit for bit, whichever slot it is in
and whatever else is, since no operation reads across rows. Its first token always comes of the bank's logits and all others of
a turn's, so neither does it matter when it began.

Slots, queue and bank are split over devices as rows are, and no device's slots reach into another's bank.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxpost import sharding
from jaxpost.models import prefix
from jaxpost.models.heads import logits
from jaxpost.models.protocol import Sampled
from jaxpost.sampling import processors
from jaxpost.types import Params


class Bank(NamedTuple):
    """Prompts after prefill: the model's cache (see `cache_axes` of it), of P tokens, the logits [U,V] of the first token,
    lengths [U]; where processors read them, the prompts [U,P]; the columns by which prompts choose among weights, [U] each.
    """

    cache: tuple
    scores: jax.Array
    lengths: jax.Array
    prompts: jax.Array | None = None
    columns: dict[str, jax.Array] = {}


class Queue(NamedTuple):
    """What is to be completed, [J] each: the prompt's place in its device's bank, the completion's number for its noise; and
    [W], how many of each device's J / W places are in use. Where completions begin with tokens that are given: these [J,N],
    zeros after, and how many of them there are [J].
    """

    prompts: jax.Array
    numbers: jax.Array
    counts: jax.Array
    given: jax.Array | None = None
    given_lengths: jax.Array | None = None


class State(NamedTuple):
    """Decoding under way. Of the n slots: the model's cache, of T tokens, the last token drawn, the place of the
    completion in its device's queue (-1 for none), how many tokens it has. [W]: how far each queue is. Of the J completions, as
    far as they are: tokens, logps [J,N], lengths [J], stopped [J], done [J].
    """

    cache: tuple
    token: jax.Array
    job: jax.Array
    count: jax.Array
    taken: jax.Array
    tokens: jax.Array
    logps: jax.Array
    lengths: jax.Array
    stopped: jax.Array
    done: jax.Array


def draw(scores: jax.Array, uniform: jax.Array, sampled: jax.Array) -> tuple[jax.Array, jax.Array]:
    """One token a row from logits [B,V] by inverting the cumulative distribution at uniform [B] in [0,1), or the likeliest
    where it is not to be `sampled`.

    Returns (token [B], its log-probability [B]). One random number a row where the Gumbel trick needs V.
    """
    logps = jax.nn.log_softmax(scores, axis=-1)
    probs = jnp.exp(logps)
    mass = jnp.cumsum(probs, axis=-1)
    # A parallel cumulative sum rounds each place by itself, so it may rise a little where the probability is zero: such a
    # place is left out by name. The mode stands in where rounding leaves none.
    reached = (mass > uniform[:, None] * mass[:, -1:]) & (probs > 0)
    mode = _first(scores == jnp.max(scores, axis=-1, keepdims=True))
    token = jnp.where(sampled & jnp.any(reached, axis=-1), _first(reached), mode)
    return token, jnp.take_along_axis(logps, token[:, None], axis=-1)[:, 0]


def _first(hit: jax.Array) -> jax.Array:
    """The first place [B] of each row [B,V] that is set, the last if none is. XLA:CPU takes a minimum faster than an argmax."""
    last = hit.shape[-1] - 1
    return jnp.min(jnp.where(hit, jnp.arange(last + 1, dtype=jnp.int32), last), axis=-1)


def _uniform(key: jax.Array, numbers: jax.Array, places: jax.Array) -> jax.Array:
    """A number in [0,1) for each row, independent of which other rows are there."""

    def one(number, place):
        return jax.random.uniform(jax.random.fold_in(jax.random.fold_in(key, number), place))

    return jax.vmap(one)(numbers, places)


@functools.partial(jax.jit, static_argnames=("model",))
def prepare(model: Sampled, params: Params) -> Params:
    """The weights as decoding reads them; of a prefix its keys and values."""
    return model.prepared(prefix.computed(model, params))


@functools.partial(jax.jit, static_argnames=("model", "room"))
def prefill(model: Sampled, params: Params, prompts: jax.Array, lengths: jax.Array, columns: dict, *, room: int) -> Bank:
    """The bank of prompts [U,P] int32, right-padded, of true lengths [U] >= 1; columns: {name: [U]} (models/routes.py); room:
    tokens that prompt and completion take, a prefix included. The cache begins with the prefix.
    """
    u, p = prompts.shape
    places = jnp.broadcast_to(jnp.arange(p), (u, p))
    batch = {"tokens": prompts, "positions": places, "lengths": lengths, "room": jnp.int32(room)}
    batch |= {name: x[:, None] for name, x in columns.items()}
    out = model.forward(params, batch, prefix.make_cache(model, params, batch))
    return Bank(out.cache, logits(out.hidden[jnp.arange(u), lengths - 1], out.head), lengths, columns=columns)


@functools.partial(jax.jit, static_argnames=("model", "slots", "room", "new"))
def begin(model: Sampled, done: jax.Array, *, slots: int, room: int, new: int) -> State:
    """Empty slots, and [J] completions of at most `new` tokens, of which those in `done` are not to be made."""
    jobs, none = done.shape[0], jnp.zeros((done.shape[0], new), jnp.float32)
    idle = jnp.zeros(slots, jnp.int32)
    return State(
        model.make_cache(slots, room), idle, idle - 1, idle, jnp.zeros(sharding.batch_ways(), jnp.int32),
        none.astype(jnp.int32), none, jnp.zeros(jobs, jnp.int32), jnp.zeros(jobs, bool), done,
    )  # fmt: skip


@functools.partial(jax.jit, static_argnames=("model", "turns"), donate_argnames=("state",))
def segment(
    model: Sampled,
    params: Params,
    bank: Bank,
    queue: Queue,
    state: State,
    noise: jax.Array,
    stop: jax.Array,
    amounts: dict,
    halted: jax.Array,
    *,
    turns: int,
    chain: tuple[processors.Processor, ...] = (),
) -> tuple[State, dict]:
    """`turns` more tokens for every slot, refilled as they end; (the state, what of the completions is there so far).

    noise [2]: (seed, step); stop [n]: the token ids that end a completion; amounts: `processors.controls`; halted [J]: those
    that the host has ended; chain: processors that come first. It is over sooner where nothing is left to do.
    """
    key = jax.random.fold_in(jax.random.PRNGKey(noise[0]), noise[1])
    record = functools.partial(_record, bank=bank, queue=queue, key=key, stop=stop, amounts=amounts, chain=chain)
    refill = functools.partial(_refill, bank=bank, queue=queue, axes=model.cache_axes(), record=record)
    begins, *numbers = (_rows(x, queue.prompts) for x in (bank.lengths, *bank.columns.values()))  # [J] each
    rotations = model.rotations(state.cache)

    def turn(carry):
        t, s = carry
        at = _rows(begins, s.job) + s.count - 1
        chosen = {name: _rows(x, s.job)[:, None] for name, x in zip(bank.columns, numbers, strict=True)}
        inputs = {"tokens": s.token[:, None], "positions": at[:, None], "rotations": rotations, **chosen}
        out = model.forward(params, inputs, s.cache)
        return t + 1, record(s._replace(cache=out.cache), logits(out.hidden[:, 0], out.head), s.job >= 0)

    def stretch(carry):
        """Turns until a slot can be refilled. The refill is outside of their loop, which passes caches on as they are."""
        t, s = carry
        with _counted(1):
            s = jax.lax.while_loop(lambda s: _wanting(s, queue), refill, s)
        with _counted(state.tokens.shape[1]):
            return jax.lax.while_loop(lambda c: going(c) & ~_wanting(c[1], queue), turn, (t, s))

    def going(carry):
        t, s = carry
        return (t < turns) & (jnp.any(s.job >= 0) | _wanting(s, queue))

    with _counted(1):
        _, state = jax.lax.while_loop(going, stretch, (0, _freed(state, halted)))
    snapshot = {k: getattr(state, k) for k in ("tokens", "logps", "lengths", "stopped", "done")}
    # Every process looks at all of them.
    return state, jax.tree.map(lambda x: sharding.shard(x, "SG"[: x.ndim]), snapshot)


def _counted(times: int):
    """The scope by whose name `jaxpost.fit` knows how often a loop turns: to complete slots once, refilled once."""
    return jax.named_scope(f"at_most_{times}_times")


def _pinned(s: State) -> State:
    """What is of slots or of completions lies with its device; the partitioner would as soon copy it everywhere."""

    def pin(x):
        return sharding.shard(x, "BS"[: x.ndim])

    return State(s.cache, *(pin(x) for x in s[1:]))


def _by_shard(fn: Callable, *arrays: jax.Array) -> jax.Array:
    """fn over each device's own part of the leading axes."""
    ways = sharding.batch_ways()
    out = jax.vmap(fn)(*(x.reshape(ways, x.shape[0] // ways, *x.shape[1:]) for x in arrays))
    return out.reshape(-1, *out.shape[2:])


def _rows(x: jax.Array, which: jax.Array) -> jax.Array:
    """The rows of x that are asked for, which each device counts from its own part's first; any for those below 0."""
    return _by_shard(lambda x, i: x[jnp.maximum(i, 0)], x, which)


def _freed(s: State, halted: jax.Array) -> State:
    """Without the completions that the host has ended."""
    gone = (s.job >= 0) & _rows(halted, s.job)
    return _pinned(s._replace(job=jnp.where(gone, -1, s.job), done=s.done | halted))


def _idle(s: State) -> jax.Array:
    """[W,n/W]: which of each device's slots complete nothing."""
    return (s.job < 0).reshape(s.taken.shape[0], -1)


def _wanting(s: State, queue: Queue) -> jax.Array:
    """Whether any device has both an idle slot and something left to complete."""
    return jnp.any(jnp.any(_idle(s), axis=1) & (s.taken < queue.counts))


def _refill(s: State, bank: Bank, queue: Queue, axes: Any, record: Callable) -> State:
    """Idle slots take the next of their queue: its prompt out of the bank, its first token drawn."""
    idle = _idle(s)
    turn = s.taken[:, None] + jnp.cumsum(idle, axis=1) - 1
    fresh = idle & (turn < queue.counts[:, None])
    taken = s.taken + jnp.sum(fresh, axis=1)
    job, fresh = jnp.where(fresh, turn, s.job.reshape(idle.shape)).reshape(-1), fresh.reshape(-1)
    prompt = _rows(queue.prompts, job)

    def copied(held, banked, axes):
        if "T" not in axes:  # a row's state, the prompt's as a whole
            which = fresh.reshape(-1, *[1] * (held.ndim - 1))
            return sharding.shard(jnp.where(which, _rows(banked, prompt), held), axes)
        time = axes.index("T")
        window = jax.lax.slice_in_dim(held, 0, banked.shape[time], axis=time)
        rows = jnp.where(fresh[:, None, None, None], _rows(banked, prompt), window)
        return sharding.shard(jax.lax.dynamic_update_slice_in_dim(held, rows, 0, time), axes)

    cache = jax.tree.map(copied, s.cache, bank.cache, axes)
    s = s._replace(cache=cache, job=job, taken=taken, count=jnp.where(fresh, 0, s.count))
    return record(s, _rows(bank.scores, prompt), fresh)


def _forced(s: State, queue: Queue, scores: jax.Array, token: jax.Array, logp: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The slots' tokens and their log-probabilities, [n] each: where a completion's next one is given, that one and the model's
    own log-probability of it, whatever restricts what is drawn. scores [n,V]: the model's logits at the temperature.
    """
    rows, place = _rows(queue.given, s.job), jnp.minimum(s.count, queue.given.shape[1] - 1)
    theirs = jnp.take_along_axis(rows, place[:, None], axis=1)
    model_logp = jnp.take_along_axis(jax.nn.log_softmax(scores, axis=-1), theirs, axis=-1)[:, 0]
    forced = s.count < _rows(queue.given_lengths, s.job)
    return jnp.where(forced, theirs[:, 0], token), jnp.where(forced, model_logp, logp)


def _context(s: State, bank: Bank, queue: Queue, numbers: jax.Array) -> dict[str, jax.Array]:
    """What processors know of the slots' completions; see processors.py."""
    prompt = _rows(queue.prompts, s.job)
    prompts = {"prompts": _rows(bank.prompts, prompt), "prompt_lengths": _rows(bank.lengths, prompt)}
    return {"tokens": _rows(s.tokens, s.job), "counts": s.count, "numbers": numbers, **prompts}


def _record(s: State, scores: jax.Array, who: jax.Array, *, bank, queue, key, stop, amounts, chain) -> State:
    """Draws and writes down the next token of the slots `who` [n] from the model's logits [n,V]."""
    numbers, processed = _rows(queue.numbers, s.job), scores
    context = _context(s, bank, queue, numbers) if chain else {}
    for processor in chain:
        processed = processor(processed, context)
    sampled = amounts["temperature"] > 0
    temperature = jnp.where(sampled, amounts["temperature"], 1.0)
    token, logp = draw(processors.restricted(processed / temperature, amounts), _uniform(key, numbers, s.count), sampled)
    if queue.given is not None:
        token, logp = _forced(s, queue, scores / temperature, token, logp)
    count = s.count + who
    stopped = who & jnp.isin(token, stop)
    ended = stopped | (who & (count == s.tokens.shape[1]))
    job = jnp.where(who, s.job, s.done.shape[0])  # out of range, and so written nowhere

    def at_place(into, values):
        return _by_shard(lambda x, j, c, v: x.at[j, c].set(v, mode="drop"), into, job, s.count, values)

    def of_job(into, values):
        return _by_shard(lambda x, j, v: x.at[j].set(v, mode="drop"), into, job, values)

    return _pinned(
        s._replace(
            token=jnp.where(who, token, s.token),
            job=jnp.where(ended, -1, s.job),
            count=count,
            tokens=at_place(s.tokens, token),
            logps=at_place(s.logps, logp),
            lengths=of_job(s.lengths, count),
            stopped=of_job(s.stopped, stopped),
            done=of_job(s.done, ended),
        )
    )
