"""Lists: a query, the passages that answer it, and passages that do not. Embedding models learn from them.

    {"query": "the capital of France", "positives": ["Paris is ..."], "negatives": ["Lyon is ...", "Bonn was ..."]}

Each text is a document of its own: a string, which gets the end-of-sequence token, or a list of messages, which the chat
template renders. The query comes first, then the positives, then the negatives. What else a row may have:

    instruction                                in front of the query: a string as it is, the system turn of messages
    query_id, positive_ids, negative_ids       text or numbers. Passages with the same id are the same passage, and queries with
                                               the same id the same query; without ids, those with the same text are
    scores                                     a teacher's number for each positive, then for each negative

All tokens of a text count, so the mask has all but a document's first, which no mask has.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxpost.data import chat, examples, formats
from jaxpost.data.examples import Example, Row, Settings
from jaxpost.data.readers import Record
from jaxpost.errors import UserError

QUERY, POSITIVE, NEGATIVE = 1, 2, 3
keys = ("query", "positives", "negatives", "instruction", "query_id", "positive_ids", "negative_ids", "scores")


def most(window: int) -> int:
    """The most documents of a row: one in 16 tokens, or 16. An objective keeps a vector for each that there might be."""
    return max(16, window // 16)


def check(settings: Settings) -> None:
    """Raises UserError for settings that mean nothing for texts that are embedded."""
    if settings.train_on != "assistant":
        raise UserError(f"config.train_on: {settings.train_on!r} of lists, whose tokens all count; leave it out")
    if settings.too_long == "split":
        raise UserError('too_long="split": a piece of a passage is no answer to the query; choose error, truncate or drop')


def columns(reads: frozenset[str]) -> Mapping[str, str]:
    """Constant over a document: its role, a digest of its id, and where it is read the teacher's score, 0 for a query."""
    return {"roles": "int32", "ids": "int32"} | ({"scores": "float32"} if "scores" in reads else {})


class List(NamedTuple):
    """A row: its texts, and 32-bit digests of the ids of the query and of each passage, the positives first."""

    instruction: str
    query: str | list | dict
    positives: list
    negatives: list
    query_id: int
    ids: list[int]

    @property
    def passages(self) -> list:
        """The positives, then the negatives."""
        return [*self.positives, *self.negatives]


def parsed(row: Mapping[str, Any], place: str) -> List:
    """A row as a List. Raises UserError with the place for a row that is none."""
    instruction = row.get("instruction") or ""
    if not isinstance(instruction, str):
        raise UserError(f"{place}: instruction is {instruction!r}; write it as text, or leave it out")
    positives, negatives = _passages(row, "positives", place), _passages(row, "negatives", place)
    if row.get("query") is None or not positives:
        lacking = "query" if row.get("query") is None else "positives"
        raise UserError(
            f"{place}: the objective learns from lists, and there is no {lacking}; write a query, positives and perhaps "
            "negatives, or name them, as in config.columns='query=anchor,positives=positive'"
        )
    ids = _ids(row, "positive_ids", positives, place) + _ids(row, "negative_ids", negatives, place)
    query_id = row.get("query_id")
    query_id = _digest("text", [instruction, row["query"]]) if query_id is None else _digest("id", query_id)
    return List(instruction, row["query"], positives, negatives, query_id, ids)


def encode(record: Record, settings: Settings) -> Example:
    """The list of a record; its values are role, two halves of the id's digest and perhaps the score, for each document.

    Raises UserError with the record's place for a row that is no list.
    """
    row, place = formats.renamed(record, settings.columns, keys), record.place
    one = parsed(row, place)
    roles = [QUERY, *[POSITIVE] * len(one.positives), *[NEGATIVE] * len(one.negatives)]
    names = {QUERY: "query", POSITIVE: "a positive", NEGATIVE: "a negative"}
    documents = []
    for role, text in zip(roles, [one.query, *one.passages], strict=True):
        options = {"instruction": one.instruction if role == QUERY else "", "place": f"{place}, {names[role]}"}
        tokens = chat.encode_text(text, settings.tokenizer, settings.template, **options)
        documents.append({"tokens": tokens, "mask": np.arange(len(tokens)) > 0, "start": 0})
    ids = np.array([one.query_id, *one.ids], np.int64)
    values = [roles, ids >> 16, ids & 0xFFFF]  # halves, since values are float32
    if "scores" in settings.reads:
        values.append([0.0, *_scores(row, len(one.passages), place)])
    return examples.of(documents, np.array(values, np.float32).T.ravel())


def fit(example: Example, settings: Settings, place: str) -> list[Example]:
    """As `examples.fit`, but a text that is cut keeps its last token, which ends all texts alike.

    Raises UserError for a list of more documents than a row has room for, unless those are dropped.
    """
    if (count := len(example.answers)) > (room := most(settings.window)):
        if settings.too_long == "drop":
            return []
        raise UserError(
            f"{place}: a list of {count} texts, and a window of {settings.window} tokens holds {room} at most; make the window "
            f'{16 * count}, take negatives out, or say too_long="drop"'
        )
    fitted = examples.fit(example, settings, place)
    if not fitted or fitted[0] is example:
        return fitted
    pairs = zip(fitted[0].answers, example.answers, strict=True)
    return [example._replace(answers=tuple(np.append(cut[:-1], text[-1:]) for cut, text in pairs), masks=fitted[0].masks)]


def lay_out(example: Example, settings: Settings) -> Row:
    """The columns of all documents."""
    row = examples.lay_out(example, settings)
    values = np.asarray(example.values, np.float32).reshape(len(example.answers), -1)[row["segments"] - 1]
    halves = values[:, 1:3].astype(np.uint32)
    row |= {"roles": values[:, 0].astype(np.int32), "ids": (halves[:, 0] << 16 | halves[:, 1]).view(np.int32)}
    return row | ({"scores": values[:, 3]} if "scores" in settings.reads else {})


def _passages(row: Mapping[str, Any], name: str, place: str) -> list[str | list]:
    """The texts under a key: a list of them, or one alone, which may be a list of messages itself."""
    value = row.get(name)
    if value is None or value == []:
        return []
    if isinstance(value, (str, dict)) or (isinstance(value, list) and all(isinstance(x, dict) for x in value)):
        return [value]
    if not isinstance(value, list) or not all(isinstance(x, (str, list, dict)) for x in value):
        raise UserError(f"{place}: {name} is {value!r}; write a list of texts, or of lists of messages")
    return value


def _ids(row: Mapping[str, Any], name: str, texts: Sequence[Any], place: str) -> list[int]:
    names = row.get(name)
    names = [names] if isinstance(names, (str, int)) else names
    if names is not None and (not isinstance(names, list) or len(names) != len(texts)):
        raise UserError(f"{place}: {name} is {names!r}; write a list of {len(texts)} ids, one for each passage")
    names = [None] * len(texts) if names is None else names
    return [_digest("text", text) if one is None else _digest("id", one) for one, text in zip(names, texts, strict=True)]


def _digest(kind: str, value: Any) -> int:
    """32 bits: of ten thousand passages in a batch, one pair in a hundred batches is taken for the same passage by chance."""
    content = json.dumps([kind, value if kind == "text" else str(value)], sort_keys=True, ensure_ascii=False)
    return int.from_bytes(hashlib.blake2b(content.encode(), digest_size=4).digest(), "big")


def _scores(row: Mapping[str, Any], count: int, place: str) -> list[float]:
    scores = row.get("scores")
    if not isinstance(scores, list) or len(scores) != count or not all(formats.is_number(x) for x in scores):
        raise UserError(
            f"{place}: scores is {scores!r}, and the objective reads a number for each of the {count} passages, those of the "
            "positives first; write them"
        )
    return scores
