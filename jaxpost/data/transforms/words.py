"""The words of a row, for transforms and filters that compare texts."""

import re
from collections.abc import Mapping, Sequence
from typing import Any


def text(row: Mapping, fields: Sequence[str] = ()) -> str:
    """The text of a row: what stands under `fields`, or all its strings, those in lists and dicts too, in the order of keys."""
    return "\n".join(_strings([row.get(field) for field in fields] if fields else list(row.values())))


def _strings(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    if isinstance(value, Mapping):
        # The role of a turn is no text of it.
        value = [item for key, item in value.items() if key not in ("role", "from")]
    return [text for item in value for text in _strings(item)] if isinstance(value, (list, tuple)) else []


def split(content: str, signs: bool = False) -> list[str]:
    """The words of a text in lower case; with `signs` each sign between them is a word too, without them they are left out. A
    script without spaces has long words.
    """
    return re.findall(r"\w+|[^\w\s]" if signs else r"\w+", content.lower())


def grams(words: Sequence[str], n: int) -> set[tuple[str, ...]]:
    """The n-grams of words; all of fewer than n words are one gram, and none are none."""
    return {tuple(words[i : i + n]) for i in range(max(1, len(words) - n + 1))} if words else set()
