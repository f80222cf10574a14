"""Rows that stand for all of them, by vectors: (rows, columns, key, *, ...) -> indices [K] int, in the order of the data.

column: vectors of the rows [N,D], as the annotator `embedding` makes them; `keep` as `select.count` has it.
"""

import warnings
from collections.abc import Mapping, Sequence

import numpy as np
from scipy.cluster import vq

from jaxpost.data.transforms.select import check_count, count
from jaxpost.errors import UserError


def k_centre(
    rows: Sequence[dict], columns: Mapping, key, *, column: str, keep: int | float, normalise: bool = True
) -> np.ndarray:
    """Each next row is the farthest from those that are chosen, the first one drawn by the key.

    The greedy algorithm of "Active Learning for Convolutional Neural Networks: A Core-Set Approach": its largest distance from
    a row to the nearest chosen one is at most twice the least that is possible. normalise: whether vectors are divided by
    their lengths first, so that distances go by angles.
    """
    vectors = _vectors(columns, column, normalise)
    chosen = [int(np.random.default_rng(key).integers(len(vectors)))]
    nearest = _distances(vectors, vectors[chosen[0]])
    nearest[chosen[0]] = -1.0  # equal rows are at distance 0, and are still to be told from those that are chosen
    for _ in range(count(keep, len(vectors)) - 1):
        chosen.append(int(np.argmax(nearest)))
        nearest = np.minimum(nearest, _distances(vectors, vectors[chosen[-1]]))
        nearest[chosen] = -1.0
    return np.sort(np.array(chosen))


def clusters(
    rows: Sequence[dict],
    columns: Mapping,
    key,
    *,
    column: str,
    keep: int | float,
    clusters: int,
    normalise: bool = True,
    hard: bool = False,
) -> np.ndarray:
    """k-means, then rows of each cluster in turn, those nearest to its centre first (with `hard` the farthest), until `keep`.

    So each cluster gives as many, as far as it has them. Raises UserError for more clusters than rows.
    """
    vectors = _vectors(columns, column, normalise)
    if not 1 <= clusters <= len(vectors):
        raise UserError(f"coreset.clusters: clusters={clusters} of {len(vectors)} rows; give 1 to {len(vectors)}.")
    # Centres of empty clusters stay where they are: they give no row.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        centres, labels = vq.kmeans2(vectors, _seeds(vectors, clusters, key), iter=50, minit="matrix")
    distances = ((vectors - centres[labels]) ** 2).sum(1)
    order = np.argsort(-distances if hard else distances, kind="stable")
    place = np.empty(len(vectors), np.int64)  # of each row within its cluster
    for label in range(clusters):
        own = order[labels[order] == label]
        place[own] = np.arange(len(own))
    return np.sort(np.lexsort((np.arange(len(vectors)), labels, place))[: count(keep, len(vectors))])


def _seeds(vectors: np.ndarray, clusters: int, key) -> np.ndarray:
    """The first centres, by k-means++: each next one drawn by its squared distance from those that are there."""
    rng = np.random.default_rng(key)
    chosen = [int(rng.integers(len(vectors)))]
    nearest = _distances(vectors, vectors[chosen[0]])
    for _ in range(clusters - 1):
        total = nearest.sum()
        rest = np.setdiff1d(np.arange(len(vectors)), chosen)
        chosen.append(int(rng.choice(len(vectors), p=nearest / total) if total > 0 else rng.choice(rest)))
        nearest = np.minimum(nearest, _distances(vectors, vectors[chosen[-1]]))
    return vectors[chosen]


def _distances(vectors: np.ndarray, one: np.ndarray) -> np.ndarray:
    return ((vectors - one) ** 2).sum(1)


def _vectors(columns: Mapping, column: str, normalise: bool) -> np.ndarray:
    """[N,D] float64. Raises UserError for a column that has no vectors."""
    vectors = np.asarray(columns[column], np.float64)
    if vectors.ndim != 2 or not np.isfinite(vectors).all():
        raise UserError(f"coreset: {column} is {list(vectors.shape)}; it takes finite vectors [N,D], as embedding makes them.")
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12) if normalise else vectors


def _check(*, keep: int | float, clusters: int) -> None:
    check_count(keep=keep)
    if clusters < 1:
        raise UserError(f"coreset.clusters: clusters={clusters}; give 1 at least.")


k_centre.check, clusters.check = check_count, _check
