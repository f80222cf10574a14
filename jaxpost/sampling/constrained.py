"""Constraints: completions that are one of many texts (`trie`), or that occur in a corpus (`substring`).

    rollouts={"processors": [{"name": "constrained.trie", "texts": "titles.txt"}]}

Both are processors (processors.py) that read tables. A row's place in its table is found again from its tokens at every turn,
so that nothing is carried along: a completion that is given its first tokens, a slot that is refilled and a beam that moves
to another row need nothing more. The tables are padded to powers of two, so that others of about their size share a program.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxpost import tokenizer
from jaxpost.errors import UserError, first_line
from jaxpost.sampling.processors import About

Texts = str | Sequence[str | Sequence[int]]  # a file with a text a line, or texts or sequences of ids

# ----------------------------------------------------------------------------------------------------------------- Trie


class Trie(NamedTuple):
    """The beginnings of sequences as nodes, 0 being the empty one. Node n has the edges starts[n] to starts[n + 1], in the
    order of their tokens; edge e leads to node e + 1.

    starts [nodes + 1], tokens [edges] int32; whole [nodes] bool: whether a sequence ends there; stop [n] int32: the ids that
    end a completion. halvings [L]: of a search among the edges of any node that L tokens lead to. first [ids] bool: whether an
    id begins a sequence; widest [F]: as many numbers from 0 as the most edges of a node but the first, which has far more.
    """

    starts: jax.Array
    tokens: jax.Array
    whole: jax.Array
    stop: jax.Array
    halvings: jax.Array
    first: jax.Array
    widest: jax.Array


def trie(logits: jax.Array, context: Mapping[str, jax.Array], *, table: Trie | None = None) -> jax.Array:
    """Logits [R,V] with -inf for what would lead away from the sequences of a trie: a completion is one of them, then an end
    token. Without a table nothing changes.

    "Autoregressive Entity Retrieval". A completion that the trie does not have may only end; `admits` says so beforehand.
    """
    if table is None:
        return logits
    table = jax.tree.map(jnp.asarray, table)
    node = _walked(table, context["tokens"], context["counts"])
    start, end = _edges(table, node)
    inside = table.widest < jnp.where(node > 0, end - start, 0)[:, None]
    vocab, rows = logits.shape[1], jnp.arange(len(logits))[:, None]
    ids = jnp.where(inside, table.tokens[jnp.where(inside, start[:, None] + table.widest, 0)], vocab)
    following = jnp.zeros(logits.shape, bool).at[rows, ids].set(True, mode="drop")
    first = jnp.pad(table.first, (0, max(vocab - len(table.first), 0)))[:vocab]
    allowed = jnp.where(node[:, None] == 0, first, following)
    ends = (node < 0) | table.whole[jnp.maximum(node, 0)]
    allowed = allowed.at[rows, table.stop].max(ends[:, None])
    return jnp.where(allowed, logits, -jnp.inf)


def _edges(table: Trie, node: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(first, one past the last) of the edges of nodes [R]; any for those below 0."""
    return table.starts[jnp.maximum(node, 0)], table.starts[jnp.maximum(node, 0) + 1]


def _walked(table: Trie, tokens: jax.Array, counts: jax.Array) -> jax.Array:
    """The nodes [R] that the first `counts` tokens of rows [R,N] lead to, -1 where there is none."""

    def halve(_, carry):
        low, high, token = carry
        middle = (low + high) // 2
        below = table.tokens[middle] < token
        return jnp.where(below & (low < high), middle + 1, low), jnp.where(below, high, middle), token

    def step(place, node):
        token = tokens[:, place]
        start, end = _edges(table, node)
        edge, _, _ = jax.lax.fori_loop(0, table.halvings[jnp.minimum(place, deepest)], halve, (start, end, token))
        child = jnp.where((node >= 0) & (edge < end) & (table.tokens[edge] == token), edge + 1, -1)
        return jnp.where(place < counts, child, node)

    deepest = len(table.halvings) - 1
    return jax.lax.fori_loop(0, jnp.max(counts), step, jnp.zeros(len(tokens), jnp.int32))


def table_of(sequences: Sequence[Sequence[int]], stop: Sequence[int]) -> Trie:
    """The trie of sequences of ids, as numpy arrays; stop: the ids that end a completion."""
    longest = max(map(len, sequences))
    rows = np.full((len(sequences), longest), -1, np.int32)
    for row, ids in zip(rows, sequences, strict=True):
        row[: len(ids)] = ids
    rows = np.unique(rows, axis=0)
    parents, tokens, ends, halvings = [], [], [], []
    node, count = np.zeros(len(rows), np.int64), 1
    for place in range(longest):
        ends.append(node[rows[:, place] < 0])
        node, rows = node[rows[:, place] >= 0], rows[rows[:, place] >= 0]
        edges = np.stack([node, rows[:, place]], axis=1)
        fresh = np.append(True, (edges[1:] != edges[:-1]).any(axis=1))
        parents.append(edges[fresh, 0])
        tokens.append(edges[fresh, 1])
        halvings.append(int(np.bincount(parents[-1] - parents[-1].min()).max()).bit_length())
        node = count + np.cumsum(fresh) - 1
        count += int(fresh.sum())
    parents, tokens = np.concatenate(parents), np.concatenate(tokens)
    starts = np.searchsorted(parents, np.arange(count + 1))
    whole = np.isin(np.arange(count), np.concatenate([*ends, node]))
    number, first = np.bincount(parents), np.zeros(_power(int(tokens.max()) + 1), bool)
    first[tokens[parents == 0]] = True
    return Trie(
        starts=_padded(starts, len(tokens)),
        tokens=_padded(tokens, 0),
        whole=_padded(whole, False),
        stop=np.array(stop, np.int32),
        halvings=_padded(np.array(halvings), 0),
        first=first,
        widest=np.arange(_power(int(number[1:].max(initial=8))), dtype=np.int32),
    )


def _trie_table(about: About, *, texts: Texts) -> dict[str, Trie]:
    """texts: a file with a text a line, or a list of texts or of sequences of ids. Raises UserError for one that is empty, that
    holds a token that ends completions, or that `new` leaves no room for.
    """
    sequences = _encoded(texts, about, "constrained.trie")
    for ids, text in sequences:
        if len(ids) >= about.new:
            raise UserError(
                f"processors: constrained.trie: {str(text)[:60]!r} takes {len(ids) + 1} tokens with its end, and a completion "
                f"may have {about.new}; give more (new), or leave it out."
            )
    return {"table": table_of([ids for ids, _ in sequences], about.stop)}


@jax.jit
def _is_beginning(tokens: jax.Array, counts: jax.Array, *, table: Trie) -> jax.Array:
    ended = _ended(table.stop, tokens, counts)
    node = _walked(table, tokens, counts - ended)
    return (node >= 0) & (~ended | table.whole[node])


trie.prepare, trie.admits = _trie_table, _is_beginning


# ------------------------------------------------------------------------------------------------------------- FM-index


class Index(NamedTuple):
    """An FM-index ("Opportunistic data structures with applications") of a corpus that is read backwards, so that a search goes
    on to the right. Its Burrows-Wheeler transform, of N symbols below 2**L, is a wavelet matrix ("The wavelet matrix: An
    efficient wavelet tree for large alphabets"): at level l the bits of the symbols, from the highest on.

    words [L,N/32] uint32: the bits, 32 in a word; ones [L,N/32] int32: how many ones there are before each word; zeros [L]: how
    many zeros a level has; shift [2**L]: what takes a symbol's place after the last level to its place among sorted suffixes;
    size []: N; stop [n] int32: the ids that end a completion. Symbol 0 lies between documents, and token t is t + 1.
    """

    words: jax.Array
    ones: jax.Array
    zeros: jax.Array
    shift: jax.Array
    size: jax.Array
    stop: jax.Array


def substring(logits: jax.Array, context: Mapping[str, jax.Array], *, index: Index | None = None) -> jax.Array:
    """Logits [R,V] with -inf for every token after which the completion would occur nowhere in a corpus. It may end after any
    token but not before the first. Without an index nothing changes.

    "Autoregressive Search Engines: Generating Substrings as Document Identifiers". Documents are apart: no completion reaches
    from one into the next.
    """
    if index is None:
        return logits
    index = jax.tree.map(jnp.asarray, index)
    low, high = _searched(index, context["tokens"], context["counts"])
    low, high = low[:, None], high[:, None]
    for level in range(len(index.zeros)):  # each node of a level, a range of places, splits in two
        before, after = _ones(index, level, low), _ones(index, level, high)
        one = index.zeros[level]
        low = jnp.stack([low - before, one + before], axis=-1).reshape(len(low), -1)
        high = jnp.stack([high - after, one + after], axis=-1).reshape(len(high), -1)
    # Ids that the index has no symbol for are in no document.
    occurs = jnp.pad((high > low)[:, 1:], ((0, 0), (0, max(logits.shape[1] - low.shape[1] + 1, 0))))
    allowed = occurs[:, : logits.shape[1]].at[:, index.stop].set((context["counts"] > 0)[:, None])
    return jnp.where(allowed, logits, -jnp.inf)


def _ones(index: Index, level: int | jax.Array, place: jax.Array) -> jax.Array:
    """The number of ones at a level before a place [...]."""
    word, rest = place >> 5, (place & 31).astype(jnp.uint32)
    bits = index.words[level, word] & ((jnp.uint32(1) << rest) - 1)
    return index.ones[level, word] + jax.lax.population_count(bits).astype(jnp.int32)


def _searched(index: Index, tokens: jax.Array, counts: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(first, one past the last) [R] of the sorted suffixes that begin with the first `counts` tokens of rows [R,N], backwards;
    as many as they occur.
    """
    levels = len(index.zeros)

    def ranked(symbol, place):
        def descend(level, place):
            ones = _ones(index, level, place)
            return jnp.where((symbol >> (levels - 1 - level)) & 1 > 0, index.zeros[level] + ones, place - ones)

        return jax.lax.fori_loop(0, levels, descend, place) + index.shift[symbol]

    def step(place, bounds):
        symbol = jnp.minimum(tokens[:, place] + 1, len(index.shift) - 1)
        inside = place < counts
        return tuple(jnp.where(inside, ranked(symbol, bound), bound) for bound in bounds)

    whole = jnp.zeros(len(tokens), jnp.int32), jnp.full(len(tokens), index.size, jnp.int32)
    return jax.lax.fori_loop(0, jnp.max(counts), step, whole)


def index_of(documents: Sequence[Sequence[int]], stop: Sequence[int]) -> Index:
    """The FM-index of documents of ids, as numpy arrays; stop: the ids that end a completion.

    Raises UserError where pydivsufsort is not installed, and for a corpus of 2**31 tokens or more.
    """
    try:
        from pydivsufsort import divsufsort
    except ModuleNotFoundError as error:
        raise UserError("constrained.substring needs pydivsufsort; pip install 'jaxpost[constraints]'.") from error
    backwards = [np.append(np.asarray(ids, np.int64)[::-1] + 1, 0) for ids in documents]
    text = np.concatenate(backwards).astype(np.uint32)
    if len(text) >= 2**31:
        raise UserError(f"constrained.substring: a corpus of {len(text):,} tokens; an index takes fewer than {2**31:,}.")
    symbols = text[np.asarray(divsufsort(text), np.int64) - 1].astype(np.int64)  # the one before each suffix
    levels, size = int(text.max() + 1).bit_length(), len(text)  # the last symbol stays free, for ids beyond those of the corpus
    words = np.zeros((levels, _power(size // 32 + 1)), np.uint32)
    ones, zeros, sorted_by_bits = np.zeros(words.shape, np.int32), np.zeros(levels, np.int32), symbols
    for level in range(levels):
        bits = (sorted_by_bits >> (levels - 1 - level)) & 1
        packed = np.packbits(np.pad(bits, (0, 32 * words.shape[1] - size)).astype(np.uint8), bitorder="little")
        words[level] = packed.view("<u4")
        counts = np.cumsum(np.add.reduceat(bits, np.arange(0, size, 32)))
        ones[level, 1:] = np.append(counts, np.full(words.shape[1], counts[-1]))[: words.shape[1] - 1]
        zeros[level] = size - bits.sum()
        sorted_by_bits = np.concatenate([sorted_by_bits[bits == 0], sorted_by_bits[bits == 1]])
    number = np.bincount(symbols, minlength=2**levels)
    first, place = np.zeros(2**levels, np.int64), np.flatnonzero(np.diff(sorted_by_bits, prepend=-1))
    first[sorted_by_bits[place]] = place
    shift = np.where(number > 0, np.cumsum(number) - number - first, 0)
    return Index(words, ones, zeros, shift.astype(np.int32), np.int32(size), np.array(stop, np.int32))


def _corpus_index(about: About, *, texts: Texts) -> dict[str, Index]:
    """texts: a file with a document a line, or a list of texts or of sequences of ids. Raises UserError as `index_of` does."""
    return {"index": index_of([ids for ids, _ in _encoded(texts, about, "constrained.substring")], about.stop)}


@jax.jit
def _occurs(tokens: jax.Array, counts: jax.Array, *, index: Index) -> jax.Array:
    ended = _ended(index.stop, tokens, counts)
    low, high = _searched(index, tokens, counts - ended)
    return (high > low) & (~ended | (counts > 1))


substring.prepare, substring.admits = _corpus_index, _occurs


# ---------------------------------------------------------------------------------------------------------- What both read


def _encoded(texts: Texts, about: About, place: str) -> list[tuple[list[int], Any]]:
    """(ids, the text) of each text. Raises UserError for no texts, and for one that cannot be a completion."""
    if not about.stop:
        raise UserError(f"processors: {place}: nothing ends a completion; name the ids that do (stop).")
    lines = _lines(texts, place) if isinstance(texts, str) else list(texts)
    encoded = []
    for number, text in enumerate(lines, start=1):
        which = f"processors: {place}: text {number}"
        if isinstance(text, str) and about.tokenizer is None:
            raise UserError(f"{which} is no list of ids, and the model has no tokenizer.")
        ids = tokenizer.encode(about.tokenizer, text) if isinstance(text, str) else [int(i) for i in text]
        tokenizer.check_ids(np.array(ids, int), about.vocab, about.tokenizer, which)
        if not ids or (ending := set(ids) & set(about.stop)):
            why = f"has the token {min(ending)}, which ends a completion" if ids else "is empty"
            raise UserError(f"{which} {why}; leave it out.")
        encoded.append((ids, text))
    if not encoded:
        raise UserError(f"processors: {place}: has no texts; give one at least.")
    return encoded


def _ended(stop: jax.Array, tokens: jax.Array, counts: jax.Array) -> jax.Array:
    """[R] bool: whether the last of the first `counts` tokens of rows [R,N] is an end token."""
    last = jnp.take_along_axis(tokens, jnp.maximum(counts - 1, 0)[:, None], axis=1)[:, 0]
    return (counts > 0) & jnp.isin(last, stop)


def _lines(name: str, place: str) -> list[str]:
    if not Path(name).is_file():
        raise UserError(f"processors: {place}: no file {name}; give one with a text a line, or a list of texts.")
    try:
        return [line for line in Path(name).read_text(encoding="utf-8").splitlines() if line]
    except (OSError, ValueError) as error:
        raise UserError(f"processors: {place}: {name} cannot be read as UTF-8 ({first_line(error)}).") from error


def _power(count: int) -> int:
    """The least power of two that is not below a count."""
    return 1 << max(count - 1, 0).bit_length()


def _padded(x: np.ndarray, value: Any) -> np.ndarray:
    """x [n], with as many of a value behind it as make its length a power of two."""
    x = x if x.dtype == bool else x.astype(np.int32)
    return np.append(x, np.full(_power(len(x)) - len(x), value, x.dtype))
