"""Negatives for lists (row_types/lists.py), found among the passages of all rows: (rows, columns, key, *, ...) -> rows.

    near={"do": "annotate", "with": {"name": "embedding", "pooling": "last"}, "objective": "contrastive.info_nce"},
    hard={"do": "select", "annotations": "@near", "with": "mine.negatives"},

An annotator embeds the texts of every row, and the transform compares them.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from jaxpost.data.nearest import nearest
from jaxpost.data.row_types import lists
from jaxpost.errors import UserError


def negatives(
    rows: Sequence[dict],
    columns: Mapping,
    key,
    *,
    count: int = 4,
    first: int = 1,
    last: int = 100,
    margin: float = 0.0,
    column: str = "embedding",
) -> list[dict]:
    """The rows, each with the `count` passages nearest to its query that do not answer it, in place of its negatives.

    Passages are ranked by their cosine with the query. Left out are the positives of every row with the same query (by id, or
    text), and passages whose cosine is not below that of the query's nearest positive by more than `margin`: near the positive,
    or above it, many are unlabelled answers. Of the others the ranks from `first` to `last` may be taken. A row may get fewer
    than `count`. Scores of a teacher are left out of the rows. column: the embeddings [N,K,D] of the rows' documents, the query
    first. Raises UserError for a column of another shape, and for ranks that are none.
    """
    _check(first=first, last=last, count=count)
    parsed = [lists.parsed(row, f"row {i + 1}") for i, row in enumerate(rows)]
    vectors = np.asarray(columns[column], np.float32)
    if vectors.ndim != 3 or vectors.shape[1] < 1 + max(len(one.passages) for one in parsed):
        raise UserError(
            f"mine.negatives: {column} is {list(vectors.shape)}; it takes a vector for each text of a list, [N,K,D]."
        )
    vectors = vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)
    places: dict[int, tuple[int, int]] = {}  # of each passage, by its id, where it comes first: row and number
    answers: dict[int, set[int]] = {}  # ids of what answers each query
    for i, one in enumerate(parsed):
        answers.setdefault(one.query_id, set()).update(one.ids[: len(one.positives)])
        for number, name in enumerate(one.ids):
            places.setdefault(name, (i, number))
    ids = list(places)
    passages = np.stack([vectors[i, number + 1] for i, number in places.values()])
    most = min(len(ids), last + max(map(len, answers.values())))
    scores, numbers = nearest(vectors[:, 0], passages, most)
    mined = []
    for i, one in enumerate(parsed):
        own = vectors[i, 1 : 1 + len(one.positives)] @ vectors[i, 0]
        below = [(ids[j], score) for score, j in zip(scores[i], numbers[i], strict=True) if ids[j] not in answers[one.query_id]]
        chosen = [name for name, score in below[first - 1 : last] if score < own.max() - margin][:count]
        mined.append(_with_negatives(rows[i], [places[name] for name in chosen], rows, parsed))
    return mined


def _check(*, first: int, last: int, count: int) -> None:
    if not 1 <= first <= last or count < 1:
        raise UserError(f"mine.negatives: first={first}, last={last}, count={count}; ranks and counts begin at 1.")


negatives.check = _check


def _with_negatives(row: dict, places: Sequence[tuple[int, int]], rows: Sequence[dict], parsed: Sequence[lists.List]) -> dict:
    """The row with the passages at these places for negatives, and their ids where they have any."""
    kept = {k: v for k, v in row.items() if k not in ("negatives", "negative_ids", "scores")}
    kept["negatives"] = [parsed[i].passages[number] for i, number in places]
    ids = [_given_id(rows[i], number, len(parsed[i].positives)) for i, number in places]
    return kept | ({"negative_ids": ids} if any(name is not None for name in ids) else {})


def _given_id(row: dict, number: int, positives: int):
    name, at = ("positive_ids", number) if number < positives else ("negative_ids", number - positives)
    ids = row.get(name)
    return ids[at] if isinstance(ids, list) else ids
