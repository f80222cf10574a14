"""The functions of a synthesis, called: messages of a record, rows of a completion, and whether a row is kept.

What a parser or a filter does with a model's text may fail, as anybody's code may. A failure gives no row and is counted; where
more than a share of the completions fail the synthesis stops, since its rows would be those of a mistake.
"""

import copy
import inspect
import json
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

from jaxpost.errors import UserError, first_line
from jaxpost.synthesis.pool import Pool

FEW = 20  # completions: a share of failures is of so many at least


class Functions(NamedTuple):
    """prompt: record -> messages; parser: (completion, record) -> rows, None for the answer as it stands; filters: {name: row
    -> bool or reason}. Their keywords are bound.
    """

    prompt: Callable
    parser: Callable | None
    filters: Mapping[str, Callable]


def reads_pool(function: Callable) -> bool:
    """Whether a prompt or a filter has a second argument, the pool."""
    takes = inspect.signature(function).parameters.values()
    return sum(p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in takes) > 1


def messages(prompt: Callable, record: Mapping, pool: Pool, place: str) -> list[dict]:
    """The messages that a prompt makes of a record. Raises UserError, with the place, where it fails or makes none."""
    own = copy.deepcopy(record)
    try:
        result = prompt(own, pool) if reads_pool(prompt) else prompt(own)
    except UserError as error:
        raise UserError(f"{place}: {error}") from error
    except Exception as error:  # of somebody's function
        raise UserError(f"{place}: the prompt failed with {type(error).__name__}: {first_line(error)}") from error
    turns = [{"role": "user", "content": result}] if isinstance(result, str) else result
    sound = isinstance(turns, list) and all(
        isinstance(t, dict) and all(isinstance(t.get(k), str) for k in ("role", "content")) for t in turns
    )
    if not sound or not turns or not turns[-1]["content"].strip() or turns[-1]["role"] == "assistant":
        raise UserError(
            f"{place}: the prompt gave {str(result)[:80]!r}; it gives a text, or a list of {{'role', 'content'}} whose last "
            "one is not the assistant's and not empty."
        )
    return turns


def parsed(parser: Callable | None, completion: str, record: Mapping, asked: list[dict]) -> list[dict] | str:
    """The rows of a completion, or why there is none. asked: the messages that it answers. Raises UserError for a parser that
    gives neither.

    Without a parser a completion is the answer to what was asked: one row of prompt and completion, both messages.
    """
    completion = completion.strip()
    if parser is None:
        answer = [{"role": "assistant", "content": completion}]
        return [{"prompt": asked, "completion": answer}] if completion else "empty"
    result = parser(completion, copy.deepcopy(record))
    rows = [result] if isinstance(result, dict) else result
    if isinstance(rows, str) and rows:
        return rows
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise UserError(f"config.parser: it gave {str(result)[:80]!r}; it gives rows (dicts), or a text: why there are none.")
    try:
        return [_stored(row) for row in rows] or "no rows"
    except TypeError as error:
        raise UserError(f"config.parser: it gave a row that JSON cannot hold ({error}).") from error


def _stored(row: dict) -> dict:
    """A row as a later run would read it from the file: tuples are lists, and half a surrogate pair is no letter."""
    return json.loads(json.dumps(row, ensure_ascii=False, allow_nan=False).encode("utf-8", "replace"))


def refused(filters: Mapping[str, Callable], row: dict, pool: Pool) -> str:
    """The reason for which a filter drops a row; "" where all keep it. Raises UserError for one that says neither."""
    for name, function in filters.items():
        verdict = function(row, pool) if reads_pool(function) else function(row)
        if isinstance(verdict, str) and verdict:
            return verdict
        if not isinstance(verdict, (bool, np.bool_)):
            raise UserError(
                f"config.filters: {name} gave {verdict!r}; a filter gives True, False, or a text: the reason why not."
            )
        if not verdict:
            return name
    return ""


def check_failures(failures: int, completions: int, limit: float, place: str, error: Exception) -> None:
    """Raises UserError where more of the completions than a share have failed. One failure is allowed unless the limit is 0."""
    if failures > max(limit * max(completions, FEW), float(limit > 0)):
        raise UserError(
            f"{place}: the parser or a filter failed with {type(error).__name__}: {first_line(error)}. So did {failures:,} of "
            f"{completions:,} completions, and config.rollouts.failures allows a share of {limit:g}. Mend it; what is there is "
            "kept."
        ) from error
