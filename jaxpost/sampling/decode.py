"""Sampling with a key/value cache, as its callers meet it: `stream` completes prompts segment after segment.

While the device has a segment under way (jaxpost/sampling/slots.py), the host looks at the one before: it finds the stop
strings, hands what has ended to whoever asked, and tells the device of those that it need not go on with. Log-probabilities
are those of the distribution drawn from. The stop token is part of the completion.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxpost import sharding
from jaxpost.errors import UserError
from jaxpost.models import prefix, routes
from jaxpost.models.protocol import Sampled, check
from jaxpost.sampling import processors
from jaxpost.sampling.slots import Queue, begin, prefill, prepare, segment
from jaxpost.types import Params

SEGMENT = 32  # turns between two looks of the host, if nothing else is asked for


class Completions(NamedTuple):
    """tokens [B,N] int32: each completion alone, zeros after; lengths [B]; logps [B,N] float32, of the distribution drawn from;
    stopped [B] bool: whether a stop token or string ended it; text_lengths [B]: its length without the stop token; given [B,N]
    bool: the tokens that were given, not drawn, None where there are none. Their logps are the model's own, unrestricted.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    logps: np.ndarray
    stopped: np.ndarray
    text_lengths: np.ndarray
    given: np.ndarray | None = None


class Finished(NamedTuple):
    """One completion: its place in the batch, its row of Completions without the zeros, and how many of its first tokens were
    given.
    """

    index: int
    tokens: np.ndarray
    logps: np.ndarray
    stopped: bool
    text_length: int
    given: int = 0


def ready(model: Sampled, params: Params, mesh) -> Params:
    """What `prepare` makes of the weights, for several calls with the same ones. Idempotent."""
    check(model, "the sampler:", Sampled)
    if model.is_prepared(params):
        return params
    with sharding.use(mesh):
        return prepare(model, params)


def stream(
    model: Sampled,
    params: Params,
    prompts: Sequence[np.ndarray],
    *,
    mesh,
    prompt_window: int,
    new: int,
    stop: Sequence[int],
    group: int = 1,
    slots: int = 0,
    seed: int = 0,
    step: int = 0,
    number: int = 0,
    turns: int = SEGMENT,
    strings: Sequence[str] = (),
    tokenizer: Any = None,
    chain: tuple[Callable, ...] = (),
    have: frozenset[int] = frozenset(),
    given: Sequence[np.ndarray] = (),
    columns: Mapping[str, Sequence[int]] | None = None,
    **amounts: float,
) -> Iterator[list[Finished]]:
    """Completions as they end, `group` of each prompt: i is of prompt i // group. All processes call it alike, and get all.

    params: the model's, or what `ready` made of them. slots: how many are under way at a time, 0 for all; number: the first
    one's, for its noise; turns: of a segment; strings: texts that end a completion, which keeps them; have: completions to
    leave out; given: the ids that each begins with; columns: {name: a number of each prompt} (routes.py); amounts, chain: see
    `processors`. Raises UserError for impossible ids and numbers.
    """
    processors.check_given(given, chain := placed(chain, mesh))
    ways, turns = mesh.shape["data"] * mesh.shape["fsdp"], min(turns, new)
    laid_out, places = _laid_out(prompts, prompt_window, group, number, ways, have, new, given, columns or {}, params)
    jobs, left, halted, begun, snapshot = len(places), int((places >= 0).sum()), np.zeros(len(places), bool), 0, None
    slots, room = min(slots + -slots % ways, jobs) or jobs, prefix.length(params) + prompt_window + new
    sizes = {"slots": slots, "room": room, "new": new}
    settings = np.array([seed, step], np.int32), np.array(stop, np.int32), processors.controls(**amounts)
    if left:
        state, *held = _begun(model, ready(model, params, mesh), laid_out, halted, sizes, mesh, bool(chain))
    while left:
        before, more = snapshot, slots < jobs or begun < new
        if more:  # without a queue it is known which segment is the last
            with sharding.use(mesh):  # not while the caller works
                state, snapshot = segment(model, *held, state, *settings, put(halted, mesh), turns=turns, chain=chain)
            begun += turns
        # The device has the next segment while the host looks at the one before.
        if before is not None:
            ended = _ended(jax.device_get(before), places, halted, strings, tokenizer, given)
            left -= len(ended)
            yield ended


def placed(chain: Sequence[Callable], mesh) -> tuple[processors.Processor, ...]:
    """The processors with their arrays on every device, for several calls with the same ones. Idempotent."""
    bound = tuple(processors.bound(processor) for processor in chain)
    return jax.device_put(bound, sharding.replicated(mesh)) if jax.tree.leaves(bound) else bound


def _begun(model, params: Params, columns: dict, halted: np.ndarray, sizes: dict, mesh, processed: bool) -> tuple:
    """What decoding begins with: (state, weights, bank of prompts, queue). processed: whether processors read the prompts."""
    chosen = {k: put(x, mesh) for k, x in columns.pop("columns").items()}
    on_mesh = {k: put(x, mesh) for k, x in columns.items()}
    prompts, lengths = on_mesh.pop("tokens"), on_mesh.pop("lengths")
    with sharding.use(mesh):
        bank = prefill(model, params, prompts, lengths, chosen, room=sizes["room"])
        bank = bank._replace(prompts=prompts) if processed else bank
        return begin(model, put(halted, mesh), **sizes), params, bank, Queue(**on_mesh)


def put(x: np.ndarray, mesh) -> jax.Array:
    """An array that every process has whole, its rows with their devices."""
    return sharding.distribute({"x": x[slice(*sharding.local_rows(mesh, len(x)))]}, mesh, len(x))["x"]


def check_prompts(prompts: Sequence[np.ndarray], window: int) -> None:
    """Raises UserError for a prompt that is empty or longer than the window."""
    for prompt in prompts:
        if not 0 < len(prompt) <= window:
            raise UserError(f"a prompt has {len(prompt)} tokens; the prompt window takes 1 to {window}. Set prompt_window.")


def spread(prompts: int, group: int, ways: int) -> tuple[int, int]:
    """(prompts in a device's bank, completions in its queue), where `ways` devices share the completions of so many prompts."""
    share = -(-prompts * group // ways)
    last = prompts * group - 1
    return max(min(i + share - 1, last) // group - i // group + 1 for i in range(0, last + 1, share)), share


def _laid_out(
    prompts,
    window: int,
    group: int,
    number: int,
    ways: int,
    skipped: frozenset[int],
    new: int,
    given: Sequence[np.ndarray],
    columns: Mapping[str, Sequence[int]],
    params: Params,
) -> tuple[dict, np.ndarray]:
    """The prompts, their `columns` and the queue as columns, each device's part after the other's; [J]: the completion of each
    place of the queue, -1 for none. Devices get as many completions each; a prompt of which several have some is in the bank of
    each.
    """
    check_prompts(prompts, window)
    count, columns = len(prompts) * group, routes.of_prompts(columns, routes.columns(params), len(prompts))
    held, share = spread(len(prompts), group, ways)
    tokens, lengths = np.zeros((ways, held, window), np.int32), np.ones((ways, held), np.int32)
    chosen = {name: np.zeros((ways, held), np.int32) for name in columns}
    places, which, counts = np.full((ways, share), -1), np.zeros((ways, share)), np.zeros(ways)
    for way in range(ways):
        first = way * share // group
        for i, prompt in enumerate(prompts[first : first + held]):
            tokens[way, i, : len(prompt)], lengths[way, i] = prompt, len(prompt)
        for name, values in columns.items():
            own = values[first : first + held]
            chosen[name][way, : len(own)] = own
        due = np.array([i for i in range(way * share, min((way + 1) * share, count)) if i not in skipped], int)
        places[way, : len(due)], which[way, : len(due)], counts[way] = due, due // group - first, len(due)
    numbers = number + np.maximum(places, 0)
    queue = {k: x.reshape(-1).astype(np.int32) for k, x in (("prompts", which), ("numbers", numbers), ("counts", counts))}
    queue |= _given(given, places.reshape(-1), count, new)
    held_prompts = {"tokens": tokens.reshape(-1, window), "lengths": lengths.reshape(-1)}
    return {**held_prompts, "columns": {k: x.reshape(-1) for k, x in chosen.items()}, **queue}, places.reshape(-1)


def _given(given: Sequence[np.ndarray], places: np.ndarray, count: int, new: int) -> dict[str, np.ndarray]:
    """The queue's columns of the tokens that completions begin with, if there are any. places [J]: see `_laid_out`."""
    if not len(given):
        return {}
    if len(given) != count or max(map(len, given)) > new:
        longest = max(map(len, given))
        raise UserError(
            f"given: {len(given)} beginnings of at most {longest} tokens for {count} completions of {new}; give one for each "
            "completion, maybe empty, and none longer than a completion may be."
        )
    tokens, lengths = np.zeros((len(places), new), np.int32), np.zeros(len(places), np.int32)
    for j in np.flatnonzero(places >= 0):
        lengths[j] = len(ids := given[places[j]])
        tokens[j, : len(ids)] = ids
    return {"given": tokens, "given_lengths": lengths}


def _ended(snapshot: dict, places: np.ndarray, halted: np.ndarray, strings, tokenizer, given) -> list[Finished]:
    """What has ended since the host looked last; `halted` [J] is told of it, and of what a stop string ends."""
    ended = []
    for j in np.flatnonzero((places >= 0) & ~halted):
        length, stopped = int(snapshot["lengths"][j]), bool(snapshot["stopped"][j])
        text_length = length - stopped
        cut = _cut(snapshot["tokens"][j, :text_length], strings, tokenizer) if strings and text_length else None
        if not snapshot["done"][j] and cut is None:
            continue
        halted[j] = True
        if cut is not None:
            length, text_length, stopped = cut, cut, True
        tokens, logps = (snapshot[k][j, :length] for k in ("tokens", "logps"))
        begun = min(len(given[places[j]]), length) if len(given) else 0
        ended.append(Finished(int(places[j]), tokens, logps, stopped, text_length, begun))
    return ended


def _cut(tokens: np.ndarray, strings: Sequence[str], tokenizer) -> int | None:
    """How many of the tokens it takes for the text to have one of the strings in it; None if it has none."""

    def has(n):
        text = tokenizer.decode(tokens[:n], clean_up_tokenization_spaces=False)
        return any(string in text for string in strings)

    if not has(len(tokens)):
        return None
    return next(n for n in range(1, len(tokens) + 1) if has(n))


def complete(model: Sampled, params: Params, prompts: Sequence[np.ndarray], *, new: int, **options) -> Completions:
    """What `stream` gives, as a whole: the completions of all prompts, in their order, on every process."""
    ended = [one for some in stream(model, params, prompts, new=new, **options) for one in some]
    return together(sorted(ended, key=lambda one: one.index), new)


def in_chunks(
    model: Sampled,
    params: Params,
    prompts: Iterable[np.ndarray],
    *,
    mesh,
    rows: int,
    new: int,
    seed: int,
    number: int = 0,
    group: int = 1,
    chain: tuple[Callable, ...] = (),
    columns: Mapping[str, Sequence[int]] | None = None,
    **options,
) -> Iterator[tuple[slice, Completions]]:
    """(which prompts, their completions), `rows` prompts at a time, `group` completions of each.

    All chunks have one shape, so that one program serves them; what pads the last is not completed. A completion's noise is
    that of its number, the first one's being `number`, so `rows` changes no token. columns: numbers of all prompts; options:
    what `stream` takes besides.
    """
    params, left, first, chain = ready(model, params, mesh), iter(prompts), 0, placed(chain, mesh)
    while part := list(itertools.islice(left, rows)):
        padded = [*part, *[part[0]] * (rows - len(part))]
        work = {"number": number + first * group, "have": frozenset(range(len(part) * group, rows * group))}
        if columns:
            chosen = {name: values[first : first + len(part)] for name, values in columns.items()}
            work["columns"] = {name: [*own, *[own[0]] * (rows - len(part))] for name, own in chosen.items()}
        completions = complete(
            model, params, padded, mesh=mesh, new=new, seed=seed, group=group, chain=chain, **work, **options
        )
        yield slice(first, first + len(part)), completions
        first += len(part)


def together(ended: Sequence[Finished], new: int) -> Completions:
    """Completions one by one, maybe none, as arrays of `new` tokens each."""

    def padded(name, dtype):
        rows = np.zeros((len(ended), new), dtype)
        for row, one in zip(rows, ended, strict=True):
            row[: len(one.tokens)] = getattr(one, name)
        return rows

    return Completions(
        tokens=padded("tokens", np.int32),
        lengths=np.array([len(one.tokens) for one in ended], np.int32),
        logps=padded("logps", np.float32),
        stopped=np.array([one.stopped for one in ended], bool),
        text_lengths=np.array([one.text_length for one in ended], np.int32),
        given=np.arange(new) < np.array([one.given for one in ended], int).reshape(-1, 1),
    )


def answers(completions: Completions, tokenizer) -> list[str]:
    """The completions as text, to the letter, without the stop token that ended them: it is trained on, but is no part of the
    answer.
    """
    return [
        tokenizer.decode(row[:length], clean_up_tokenization_spaces=False)
        for row, length in zip(completions.tokens, completions.text_lengths, strict=True)
    ]
