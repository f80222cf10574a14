"""Rows that hold what a model will be tested on: (rows, columns, key, *, ...) -> indices [K] int of those that do not."""

import sys
from collections.abc import Mapping, Sequence

import jax
import numpy as np

from jaxpost.data import readers
from jaxpost.data.transforms import words
from jaxpost.errors import UserError

SHOWN = 20  # contaminated rows that are printed


def ngrams(
    rows: Sequence[dict],
    columns: Mapping,
    key,
    *,
    against: str | Sequence[str],
    n: int = 13,
    share: float = 0.0,
    least: int | None = None,
    fields: Sequence[str] = (),
    of: Sequence[str] = (),
    mark: bool = False,
) -> np.ndarray | list[dict]:
    """The rows that share no n-gram of words with the rows of the files `against`; or all, with what each shares, by `mark`.

    A row is contaminated where more than `share` of its words lie in shared n-grams. n=13 and share=0 are those of "Language
    Models are Few-Shot Learners" (GPT-3); n=8 with a share is as in "The Llama 3 Herd of Models". A tested text of fewer than n
    words counts as a whole if it has at least `least`, by default 8 or n if that is less. Case and punctuation do not matter.
    fields: of the rows, as `words.text` has them; of: those of the files. What was found is printed: row, file and n-gram. With
    `mark` the rows get `contaminated` (the n-gram, "" for none), `contaminated_by` (its place) and `contaminated_share`. Raises
    UserError for files that cannot be read, or that have no text of `least` words, and for numbers that cannot be.
    """
    _check(n=n, share=share, least=least)
    least = min(8, n) if least is None else least
    tested = _tested(readers.read(against if isinstance(against, str) else list(against)), n, least, of)
    if not tested:
        raise UserError(f"decontaminate.ngrams: no row of {against} has a text of {least} words; name its fields (of).")
    matches = [_match(words.split(words.text(row, fields)), tested) for row in rows]
    contaminated = [i for i, (covered, _, _) in enumerate(matches) if covered > share]
    if jax.process_index() == 0:
        print(f"decontaminate: {len(contaminated):,} of {len(rows):,} rows hold what {against} has", file=sys.stderr)
        for i in contaminated[:SHOWN]:
            covered, gram, place = matches[i]
            print(f"  row {i + 1}: {covered:.0%} of its words, as {' '.join(gram)!r} of {place}", file=sys.stderr)
    if mark:
        names = ("contaminated_share", "contaminated", "contaminated_by")
        values = [(covered, " ".join(gram), place) for covered, gram, place in matches]
        return [{**row, **dict(zip(names, value, strict=True))} for row, value in zip(rows, values, strict=True)]
    return np.setdiff1d(np.arange(len(rows)), contaminated)


def _check(*, n: int, share: float, least: int | None) -> None:
    if n < 1 or not 0 <= share < 1 or not 1 <= (1 if least is None else least) <= n:
        raise UserError(f"decontaminate.ngrams: n={n}, share={share}, least={least}; give least up to n, and a share below 1.")


ngrams.files, ngrams.check = ("against",), _check


def _tested(records: Sequence[readers.Record], n: int, least: int, fields: Sequence[str]) -> dict[int, dict[tuple, str]]:
    """{length: {n-gram: the first place that has it}} of all tested texts; shorter texts are grams of their own length."""
    tested: dict[int, dict[tuple, str]] = {}
    for row, place in records:
        own = words.split(words.text(row, fields))
        if len(own) >= least:
            grams = tested.setdefault(min(n, len(own)), {})
            for gram in words.grams(own, n):
                grams.setdefault(gram, place)
    return tested


def _match(own: Sequence[str], tested: Mapping[int, Mapping[tuple, str]]) -> tuple[float, tuple, str]:
    """(the share of the words in tested grams, the first such gram, its place)."""
    covered, first = np.zeros(len(own), bool), ((), "")
    for length, grams in tested.items():
        for i in range(len(own) - length + 1):
            gram = tuple(own[i : i + length])
            if gram in grams:
                first = first if covered.any() else (gram, grams[gram])
                covered[i : i + length] = True
    return (float(covered.mean()) if len(own) else 0.0), *first
