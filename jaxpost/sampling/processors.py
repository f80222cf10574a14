"""What stands between a model's logits and the draw: functions (logits [R,V], context) -> logits [R,V].

A processor is named in `rollouts.processors` and runs first, on the model's logits. Its context is a dict of arrays: `tokens`
[R,N], the completion so far, zeros after; `counts` [R], how many tokens that is; `numbers` [R], the completions'; `prompts`
[R,P], zeros after; `prompt_lengths` [R]. What it wants never drawn it sets to -inf; what is -inf already stays so. Then come
the temperature and the three usual restrictions, whose amounts are arrays, so that changing one compiles nothing. Each row is
by itself: its logits and context alone may matter.

Keywords that are arrays are arguments of the compiled program, and all others are constants in it. A processor that checks
its keywords, or reads tables, has an attribute `prepare`, a function (about, *, keywords) -> the processor's keywords, called
once: a recipe then gives the keywords of `prepare`. One that cannot go on after every completion has an attribute `admits`, a
function (tokens [R,N], counts [R], *, arrays) -> [R] bool, which says whether it can after these tokens.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxpost.config.naming import digest_of
from jaxpost.config.resolve import bind, entries, find, resolve, within
from jaxpost.errors import UserError
from jaxpost.tokenizer import check_ids


class About(NamedTuple):
    """What `prepare` may know: the tokenizer, the ids that end a completion, the vocabulary's size, and the most tokens that a
    completion may have, its end included.
    """

    tokenizer: Any
    stop: tuple[int, ...]
    vocab: int
    new: int


class _Constants(dict):
    """A processor's keywords that are no arrays, which decide the program that is compiled."""

    def __hash__(self):
        return hash(repr(self))

    def __eq__(self, other):
        return repr(self) == repr(other) and dict.__eq__(self, other)


@jax.tree_util.register_pytree_node_class
class Processor:
    """A processor with its keywords, as a tree whose leaves are its arrays."""

    def __init__(self, function: Callable, keywords: Mapping[str, Any]):
        def has_array(value):
            return any(isinstance(x, jax.Array | np.ndarray) for x in jax.tree.leaves(value))

        self.function, self.arrays = function, {k: v for k, v in keywords.items() if has_array(v)}
        self.constants = _Constants({k: v for k, v in sorted(keywords.items()) if k not in self.arrays})

    def __call__(self, logits: jax.Array, context: Mapping[str, jax.Array]) -> jax.Array:
        return self.function(logits, context, **self.constants, **self.arrays)

    def tree_flatten(self):
        return (self.arrays,), (self.function, self.constants)

    @classmethod
    def tree_unflatten(cls, kept, children):
        new = object.__new__(cls)
        (new.function, new.constants), (new.arrays,) = kept, children
        return new


def chain(value: Any, about: About, place: str) -> tuple[Processor, ...]:
    """The processors that a setting names, with their tables: a list of entries, one entry, names with commas, or JSON; from
    Python functions too.

    place: the setting, for errors. Raises UserError for what names no processors, for an unknown name or keyword, and for what
    a `prepare` refuses.
    """
    return tuple(_processor(entry, about) for entry in entries(value, place))


def identity(chain: Sequence[Processor]) -> dict[str, str]:
    """What an artefact records of processors: a digest of their sources, keywords and tables; nothing for none."""
    return {"processors": digest_of([[p.function, p.constants, p.arrays] for p in chain])} if chain else {}


def _processor(entry: Any, about: About) -> Processor:
    entry = {"name": entry} if callable(entry) else within(entry, "processors")
    name, options = entry.get("name"), {k: v for k, v in entry.items() if k != "name"}
    function = find(name, "processors") if isinstance(name, str) else name
    if prepare := getattr(function, "prepare", None):
        return Processor(function, bind(prepare, options, f"processors: {name}")(about))
    if callable(name):
        return bound(bind(name, options, f"processors: {getattr(name, '__name__', name)}") if options else name)
    return bound(resolve(entry, "processors"))


def bound(processor: Callable) -> Processor:
    """A function, or a partial of one with keywords, as a Processor; a Processor is returned unchanged."""
    if isinstance(processor, Processor):
        return processor
    return Processor(getattr(processor, "func", processor), getattr(processor, "keywords", {}))


def check_given(given: Sequence[np.ndarray], processors: Sequence[Processor]) -> None:
    """Raises UserError where a completion begins with tokens after which a processor cannot go on."""
    longest = max(map(len, given), default=0)
    if not longest:
        return
    tokens, counts = np.zeros((len(given), longest), np.int32), np.array([len(ids) for ids in given], np.int32)
    for row, ids in zip(tokens, given, strict=True):
        row[: len(ids)] = ids
    for processor in processors:
        admits = getattr(processor.function, "admits", None)
        if admits and not (admitted := np.asarray(admits(tokens, counts, **processor.arrays))).all():
            first = int(np.argmin(admitted))
            raise UserError(
                f"given: the {int(counts[first])} tokens that completion {first} begins with are not what "
                f"{processor.function.__name__} allows; give others, or none."
            )


def without(ids: Sequence[int]) -> tuple[Processor, ...]:
    """The processors that ids which are never drawn need: none for none."""
    return (Processor(banned, {"tokens": tuple(ids)}),) if ids else ()


def banned(logits: jax.Array, context: Mapping[str, jax.Array], *, tokens: Sequence[int] = ()) -> jax.Array:
    """Logits [R,V] with -inf for these ids, which are never drawn; without ids nothing changes."""
    return logits.at[:, _ids(tokens)].set(-jnp.inf)


def at_least(logits: jax.Array, context: Mapping[str, jax.Array], *, count: int = 0, ends: Sequence[int] = ()) -> jax.Array:
    """Logits [R,V] with -inf for the ids `ends` in completions of fewer than `count` tokens, so that none ends before it has
    that many besides the end; a count of 0 changes nothing. ends: ids, such as the tokenizer's end token.
    """
    ids = _ids(ends)
    return logits.at[:, ids].set(jnp.where((context["counts"] < count)[:, None], -jnp.inf, logits[:, ids]))


def _ids(tokens: Sequence[int]) -> jax.Array:
    return jnp.asarray(tuple(tokens), jnp.int32)


def _banned(about: About, *, tokens: Sequence[int]) -> dict[str, tuple[int, ...]]:
    """Raises UserError for ids that the model does not have, and for none."""
    return {"tokens": _checked("banned: tokens", tokens, about)}


def _at_least(about: About, *, count: int, ends: Sequence[int]) -> dict[str, Any]:
    """Raises UserError for ids that the model does not have, for none, and for a count that a completion has no room for."""
    if not 0 <= count < about.new:
        raise UserError(f"processors: at_least: count={count}, and a completion has {about.new} tokens at most; give fewer.")
    return {"count": count, "ends": _checked("at_least: ends", ends, about)}


def _checked(place: str, ids: Sequence[int], about: About) -> tuple[int, ...]:
    if not len(ids):
        raise UserError(f"processors: {place}: has no ids; give one at least, or leave the processor out.")
    check_ids(np.array(ids), about.vocab, about.tokenizer, f"processors: {place}")
    return tuple(int(i) for i in ids)


banned.prepare, at_least.prepare = _banned, _at_least


def controls(temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0) -> dict[str, jax.Array]:
    """The amounts as scalars: temperature 0 is greedy; top_k 0, top_p 1 and min_p 0 restrict nothing."""
    amounts = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    return {k: jnp.asarray(v, jnp.int32 if k == "top_k" else jnp.float32) for k, v in amounts.items()}


def restricted(logits: jax.Array, amounts: Mapping[str, jax.Array]) -> jax.Array:
    """logits [R,V], at the temperature that they are drawn at, with -inf for what may not be drawn.

    One after the other: the top_k likeliest; of those the likeliest that together have top_p of the probability, the one that
    reaches it included; of those the ones with min_p of the likeliest's probability or more. Equals are kept or left out
    together.
    """
    restricts = (amounts["top_k"] > 0) | (amounts["top_p"] < 1) | (amounts["min_p"] > 0)
    return jax.lax.cond(restricts, _restricted, lambda logits, _: logits, logits, dict(amounts))


def _restricted(logits: jax.Array, amounts: dict) -> jax.Array:
    ordered = jnp.sort(logits, axis=-1, descending=True)
    k = jnp.where(amounts["top_k"] > 0, amounts["top_k"], logits.shape[-1])
    probs = jax.nn.softmax(jnp.where(jnp.arange(logits.shape[-1]) < k, ordered, -jnp.inf), axis=-1)
    before = jnp.cumsum(probs, axis=-1) - probs
    # The sum before a token may round to 1, which is no reason to leave it out; and the likeliest stays whatever is asked for.
    most = jnp.where(amounts["top_p"] < 1, amounts["top_p"], jnp.inf)
    keep = (before < most) & (probs > 0) & (probs >= amounts["min_p"] * probs[:, :1])
    keep = keep.at[:, 0].set(True)
    least = jnp.min(jnp.where(keep, ordered, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits >= least, logits, -jnp.inf)
