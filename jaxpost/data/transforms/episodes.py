"""In-context episodes: (rows, columns, key, *, k, ...) -> rows, each with demonstrations before its own prompt.

A demonstration is another row, with its answer: of the data, or of the files that `pool` names. It is drawn at random, or is
among those that are most like the row, by words (BM25) or by vectors; the most similar one then stands last. It is never the
row itself, nor one with the same prompt. With `same` it has the row's value under a key, such as its task.

A conversation gets further turns in front, after its system turn, whose answers are not learned (weight 0) unless `learn` says
so. A prompt and a completion that are texts get theirs joined with `between`; only the completion is learned.
"""

import importlib
import itertools
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxpost.data import formats, readers
from jaxpost.data.readers import Record
from jaxpost.data.transforms import words
from jaxpost.errors import UserError


class _Example(NamedTuple):
    """A row as an example of formats, and the text of its prompt."""

    row: dict
    example: formats.Conversation | formats.Completion
    prompt: str


def random(
    rows: Sequence[dict],
    columns: Mapping,
    key,
    *,
    k: int,
    pool: str | Sequence[str] = "",
    same: str = "",
    learn: bool = False,
    between: str = "\n\n",
) -> list[dict]:
    """k demonstrations drawn without replacement, or all that there are."""
    own, others = _examples(rows, pool)
    rng = np.random.default_rng(key)
    return _episodes(own, others, lambda i, candidates: rng.permutation(candidates), k, same, learn, between)


def bm25(
    rows: Sequence[dict],
    columns: Mapping,
    key,
    *,
    k: int,
    pool: str | Sequence[str] = "",
    same: str = "",
    learn: bool = False,
    between: str = "\n\n",
) -> list[dict]:
    """The k whose prompts have the highest BM25 (Lucene's, k1 1.5, b 0.75) for the words of the row's prompt, by bm25s."""
    own, others = _examples(rows, pool)
    index = _bm25s().BM25(k1=1.5, b=0.75, method="lucene")
    corpus = [words.split(other.prompt) for other in others]
    if any(corpus):
        index.index(corpus, show_progress=False)

    def rank(i: int, candidates: np.ndarray) -> np.ndarray:
        asked = [word for word in words.split(own[i].prompt) if any(corpus) and word in index.vocab_dict]
        return candidates[_best(index.get_scores(asked)[candidates])] if asked else candidates

    return _episodes(own, others, rank, k, same, learn, between)


def nearest(
    rows: Sequence[dict],
    columns: Mapping,
    key,
    *,
    k: int,
    column: str,
    same: str = "",
    learn: bool = False,
    between: str = "\n\n",
) -> list[dict]:
    """The k rows whose vectors have the highest cosine with the row's. column: [N,D], as the annotator `embedding` makes it."""
    own, others = _examples(rows, "")
    vectors = np.asarray(columns[column], np.float64)
    if vectors.ndim != 2:
        raise UserError(
            f"episodes.nearest: {column} is {list(vectors.shape)}; it takes vectors [N,D], as embedding makes them."
        )
    vectors = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)

    def rank(i: int, candidates: np.ndarray) -> np.ndarray:
        return candidates[_best(vectors[candidates] @ vectors[i])]

    return _episodes(own, others, rank, k, same, learn, between)


def _check(*, k: int) -> None:
    if not isinstance(k, int) or isinstance(k, bool) or k < 1:
        raise UserError(f"episodes: k={k!r}; give how many demonstrations a row gets.")


random.files = bm25.files = ("pool",)
random.check = bm25.check = nearest.check = _check


def _best(scores: np.ndarray) -> np.ndarray:
    """The places by descending score, equal ones as they stand."""
    return np.argsort(-scores, kind="stable")


def _episodes(
    own: Sequence[_Example], others: Sequence[_Example], rank: Callable, k: int, same: str, learn: bool, between: str
) -> list[dict]:
    """Each row with the first k others that may stand before it. rank: (row's place, candidates' places) -> these in order."""
    _check(k=k)
    groups: dict[str, list[int]] = {}
    for i, other in enumerate(others):
        groups.setdefault(_group(other, same), []).append(i)
    places = {group: np.array(members) for group, members in groups.items()}
    episodes, short = [], 0
    for i, one in enumerate(own):
        ranking = rank(i, places.get(_group(one, same), np.zeros(0, np.int64)))
        others_first = (others[j] for j in ranking if others[j].prompt != one.prompt)
        shown = list(itertools.islice(others_first, k))
        short += len(shown) < k
        episodes.append(_joined(one, shown[::-1], learn, between))
    if short and jax.process_index() == 0:
        print(
            f"episodes: {short:,} of {len(own):,} rows have fewer than {k} demonstrations, for want of others", file=sys.stderr
        )
    return episodes


def _group(one: _Example, same: str) -> str:
    """What the rows of an episode have in common: their kind, and the value of a key."""
    if same and same not in one.row:
        raise UserError(f"episodes: a row has nothing under {same!r}, which same names; it has {', '.join(one.row)}.")
    return repr((type(one.example).__name__, one.row[same] if same else None))


def _joined(one: _Example, shown: Sequence[_Example], learn: bool, between: str) -> dict:
    """The row with its demonstrations; keys that make no example stay."""
    kept = {name: value for name, value in one.row.items() if name not in formats.COLUMNS}
    if isinstance(one.example, formats.Completion):
        if learn:
            raise UserError("episodes: learn=True is for conversations; of prompts and completions only these are learned.")
        before = [f"{other.example.prompt}{other.example.completion}" for other in shown]
        return {**kept, "prompt": between.join([*before, one.example.prompt]), "completion": one.example.completion}
    system = one.example.messages[:1] if one.example.messages[0]["role"] == "system" else []
    turns = [turn for other in shown for turn in _turns(other.example, learn)]
    own = [_weighed(turn, i in one.example.untrained) for i, turn in enumerate(one.example.messages)]
    return {**kept, "messages": [*own[: len(system)], *turns, *own[len(system) :]]}


def _turns(example: formats.Conversation, learn: bool) -> list[dict]:
    """A demonstration's turns without its system turn."""
    turns = [
        _weighed(turn, turn["role"] == "assistant" and (not learn or i in example.untrained))
        for i, turn in enumerate(example.messages)
    ]
    return turns[1:] if turns[0]["role"] == "system" else turns


def _weighed(turn: Mapping, untrained: bool) -> dict:
    return {**turn, "weight": 0} if untrained else dict(turn)


def _examples(rows: Sequence[dict], pool: str | Sequence[str]) -> tuple[list[_Example], list[_Example]]:
    """(the rows, those that are shown) as examples. Raises UserError for rows that are no prompt with an answer."""
    own = [_example(Record(row, f"row {i}")) for i, row in enumerate(rows, start=1)]
    return own, [_example(record) for record in readers.read(pool if isinstance(pool, str) else list(pool))] if pool else own


def _example(record: Record) -> _Example:
    example: Any = formats.demonstration(record)
    if isinstance(example, formats.Completion):
        return _Example(record.row, example, example.prompt)
    if not isinstance(example, formats.Conversation) or example.tools:
        raise UserError(
            f"{record.place}: an episode is made of prompts with answers (messages, or prompt and completion), without tools."
        )
    last = max(i for i, turn in enumerate(example.messages) if turn["role"] == "assistant")
    return _Example(record.row, example, "\n".join(t["content"] for t in example.messages[:last] if t["role"] != "system"))


def _bm25s() -> Any:
    try:
        return importlib.import_module("bm25s")
    except ImportError as error:
        raise UserError(f"episodes.bm25 needs bm25s, which is not here ({error}); pip install 'jaxpost[retrieval]'.") from error
