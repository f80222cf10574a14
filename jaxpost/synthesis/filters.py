"""Which rows are kept: (row, *, ...) -> True, False, or a text: the reason why not.

A filter may take a second argument with a default, `pool` (pool.Pool): the rows that were kept before this one. A reason names
a kind, not a case ("too short", not "3 words"), since rows are counted by it; the reason of False is the filter's name.
"""

import functools
from collections.abc import Mapping, Sequence

from jaxpost.data.transforms.words import split
from jaxpost.data.transforms.words import text as text_of
from jaxpost.synthesis import pool as pools
from jaxpost.synthesis.pool import Pool


def length(row: Mapping, *, field: str, least: int = 1, most: int | None = None) -> bool | str:
    """Texts of `least` to `most` words."""
    if (text := _text(row, field)) is None:
        return _lacking(field)
    words = len(text.split())
    return "too short" if words < least else "too long" if most is not None and words > most else True


def without(row: Mapping, *, field: str, words: Sequence[str]) -> bool | str:
    """Texts that have none of the words, whatever their case."""
    if (text := _text(row, field)) is None:
        return _lacking(field)
    present = set(_words(text))
    return "an unwanted word" if any(word.lower() in present for word in words) else True


def unique(row: Mapping, pool: Pool | None = None, *, field: str) -> bool | str:
    """Rows whose value under a field no kept row has."""
    if row.get(field) is None:
        return _lacking(field)
    return "a duplicate" if pools.text(row[field]) in pool.values(field) else True


def unlike(row: Mapping, pool: Pool | None = None, *, field: str, most: float = 0.7, records: bool = True) -> bool | str:
    """Texts whose ROUGE-L with each kept row, and unless `records` is false with each record, is below `most`.

    ROUGE-L is the F1 of the longest common subsequence of words, without stemming. The threshold is that of "Self-Instruct:
    Aligning Language Models with Self-Generated Instructions".
    """
    if (text := _text(row, field)) is None:
        return _lacking(field)
    words = _words(text)
    others = [_text(other, field) for other in (*pool.rows, *(pool.records if records else ()))]
    return "too similar" if any(other and rouge_l(words, _words(other), most) >= most for other in others) else True


def rouge_l(one: Sequence[str], other: Sequence[str], least: float = 0.0) -> float:
    """The F1 of the longest common subsequence of two lists of words; 0 where their lengths alone keep it below `least`."""
    whole = len(one) + len(other)
    if not one or not other or 2 * min(len(one), len(other)) / whole < least:
        return 0.0
    # The bits of `row` that are 0 mark where the longest common subsequence grows (a row of its table as one integer).
    places: dict[str, int] = {}
    for i, word in enumerate(one):
        places[word] = places.get(word, 0) | 1 << i
    full = (1 << len(one)) - 1
    row = full
    for word in other:
        matches = row & places.get(word, 0)
        row = ((row + matches) | (row - matches)) & full
    return 2 * (len(one) - row.bit_count()) / whole


_words = functools.lru_cache(maxsize=1 << 18)(split)  # every row is compared with all that come after it


def _text(row: Mapping, field: str) -> str | None:
    """The text of a field, of messages all that they say; None where there is none."""
    return text_of(row, [field]) if isinstance(row.get(field), (str, list)) else None


def _lacking(field: str) -> str:
    return f"nothing under {field}"
