"""Scored answers: a prompt with an answer and a number, which is its label."""

from collections.abc import Iterator, Sequence

import numpy as np

from jaxpost.data import formats, messages
from jaxpost.data.examples import Example, Settings
from jaxpost.data.readers import Record
from jaxpost.data.row_types import labelled

columns, lay_out = labelled.columns, labelled.lay_out


def encode(record: Record, settings: Settings) -> Example:
    """The answer of a record; its value is the score."""
    return labelled.of(formats.labelled(record, settings.columns, scored=True), settings)


def rows_of(texts: Sequence[str], rewards: np.ndarray) -> Iterator[dict]:
    """Every completion that says something, with its reward."""
    for text, reward in zip(texts, rewards, strict=True):
        if text:
            yield {"completion": messages.assistant(text), "score": float(reward)}
