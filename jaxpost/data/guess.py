"""Guesses the setting config.columns for a data set with unknown columns, for the message that refuses it."""

import re
import shlex
from collections.abc import Mapping
from typing import Any

_PROMPTS = ("prompt", "problem", "question", "query", "instruction", "input", "user", "request", "ask", "source")
_ANSWERS = ("completion", "solution", "response", "answer", "output", "reply", "assistant", "target", "generation")


def suggested(row: Mapping[str, Any]) -> str:
    """A value of config.columns for a row of no known shape: a guess by its columns' values and names, or an example."""
    names = [name for name in row if isinstance(name, str) and re.fullmatch(r"[^,=]+", name)]
    turns = next((name for name in names if _holds_turns(row[name])), None)
    texts = [name for name in names if isinstance(row[name], str) and row[name].strip()]
    if turns is not None:
        pairs = {"messages": turns}
    elif len(texts) == 1:
        pairs = {"text": texts[0]}
    elif texts:
        answer = _like(_ANSWERS, texts) or next(name for name in reversed(texts) if name != _like(_PROMPTS, texts))
        rest = [name for name in texts if name != answer]
        pairs = {"prompt": _like(_PROMPTS, rest) or rest[0], "completion": answer}
    else:
        pairs = {"prompt": "problem", "completion": "solution"}
    return shlex.quote(",".join(f"{name}={column}" for name, column in pairs.items()))


def _holds_turns(value: Any) -> bool:
    first = value[0] if isinstance(value, list) and value else None
    return isinstance(first, dict) and not {"role", "from"}.isdisjoint(first)


def _like(words: tuple[str, ...], names: list[str]) -> str | None:
    """The first name that contains a word, in the order of the words."""
    return next((name for word in words for name in names if word in name.lower()), None)
