"""Labelled answers: a prompt with an answer and its label, 1 where it is good and 0 where it is not."""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from jaxpost.data import examples, formats, messages
from jaxpost.data.examples import Example, Row, Settings
from jaxpost.data.readers import Record
from jaxpost.errors import UserError


def columns(reads: frozenset[str]) -> Mapping[str, str]:
    """The label, the same at each token of the document."""
    return {"labels": "float32"}


def encode(record: Record, settings: Settings) -> Example:
    """The answer of a record; its value is the label."""
    return of(formats.labelled(record, settings.columns), settings)


def of(rated: formats.Rated, settings: Settings) -> Example:
    """The example of a judged answer; its value is the label."""
    document = examples.answered(rated.prompt, rated.completion, settings, rated.place, rated.tools)
    return examples.of([document], [float(rated.label)])


def lay_out(example: Example, settings: Settings) -> Row:
    """The columns of the document."""
    row = examples.lay_out(example, settings)
    return row | {"labels": np.full(len(row["tokens"]), example.values[0])}


def rows_of(texts: Sequence[str], rewards: np.ndarray) -> Iterator[dict]:
    """Every completion with its reward for the label. Raises UserError for a reward that is neither 0 nor 1."""
    for text, reward in zip(texts, rewards, strict=True):
        if reward not in (0.0, 1.0):
            raise UserError(f"config.reward: {reward} of {text[:60]!r} is no label; the objective needs a reward of 0 or 1.")
        yield {"completion": messages.assistant(text), "label": bool(reward)}
