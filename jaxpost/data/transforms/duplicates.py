"""Rows that say the same as an earlier one: (rows, columns, key, *, ...) -> indices [K] int of those that do not.

`select.unique` drops equal values of a field; here equality is up to case and spaces, or up to a few words.
"""

import hashlib
from collections.abc import Mapping, Sequence

import numpy as np

from jaxpost.data.transforms import words
from jaxpost.errors import UserError

_PRIME = np.uint64((1 << 31) - 1)  # products of two numbers below it fit 64 bits


def exact(rows: Sequence[dict], columns: Mapping, key, *, fields: Sequence[str] = ()) -> np.ndarray:
    """The first row of each text, whatever its case and spaces. fields: as `words.text` has them."""
    first: dict[tuple, int] = {}
    for i, row in enumerate(rows):
        first.setdefault(tuple(words.text(row, fields).lower().split()), i)
    return np.array([*first.values()], np.int64)


def near(
    rows: Sequence[dict],
    columns: Mapping,
    key,
    *,
    fields: Sequence[str] = (),
    threshold: float = 0.8,
    n: int = 3,
    permutations: int = 128,
) -> np.ndarray:
    """The rows without those whose n-grams of words and signs have a Jaccard similarity of at least `threshold` with an earlier
    row's that is kept.

    Candidates are found by MinHash ("On the resemblance and containment of documents") with `permutations` hash functions in
    bands; each is then compared exactly, so no row is dropped by chance, and one at the threshold is missed with a probability
    of at most 1 in 1,000. Texts of fewer than n words are one gram. Raises UserError for a threshold outside (0, 1], and for
    too few permutations.
    """
    _check(threshold=threshold, n=n, permutations=permutations)
    grams = [words.grams(words.split(words.text(row, fields), signs=True), n) for row in rows]
    signatures, size = _signatures(grams, key, permutations), _band(threshold, permutations)
    kept: list[int] = []
    buckets: dict[tuple, list[int]] = {}
    for i, own in enumerate(grams):
        bands = [(b, signatures[i, b : b + size].tobytes()) for b in range(0, permutations - size + 1, size)]
        candidates = {j for band in bands for j in buckets.get(band, ())}
        if any(_jaccard(own, grams[j]) >= threshold for j in candidates):
            continue
        kept.append(i)
        for band in bands:
            buckets.setdefault(band, []).append(i)
    return np.array(kept, np.int64)


def _check(*, threshold: float, n: int, permutations: int) -> None:
    if not 0 < threshold <= 1 or n < 1 or permutations < 1:
        raise UserError(
            f"duplicates.near: threshold={threshold}, n={n}, permutations={permutations}; give a threshold above 0 and up to "
            "1, and numbers of at least 1."
        )
    _band(threshold, permutations)


near.check = _check


def _jaccard(one: set, other: set) -> float:
    return len(one & other) / len(one | other) if one or other else 1.0


def _signatures(grams: Sequence[set], key, permutations: int) -> np.ndarray:
    """[N, permutations] uint64: the least hash of each row's grams by each of the functions a x + b modulo a prime."""
    rng = np.random.default_rng(key)
    a = rng.integers(1, int(_PRIME), permutations, dtype=np.uint64)
    b = rng.integers(0, int(_PRIME), permutations, dtype=np.uint64)
    signatures = np.full((len(grams), permutations), _PRIME)
    for i, own in enumerate(grams):
        if own:
            digests = b"".join(hashlib.blake2b(" ".join(gram).encode(), digest_size=8).digest() for gram in own)
            hashes = np.frombuffer(digests, np.uint64) % _PRIME
            signatures[i] = ((hashes[:, None] * a + b) % _PRIME).min(0)
    return signatures


def _band(threshold: float, permutations: int) -> int:
    """The most hashes in a band with which a pair at the threshold shares a band but for 1 in 1,000."""
    sizes = [r for r in range(1, permutations + 1) if (1 - threshold**r) ** (permutations // r) <= 1e-3]
    if not sizes:
        raise UserError(f"duplicates.near: {permutations} permutations miss rows at threshold={threshold}; give more.")
    return max(sizes)
