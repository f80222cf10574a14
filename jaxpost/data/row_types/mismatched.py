"""Labelled answers, each beside the answer to another row's prompt, whose label is -1.

The other answer is never learned, but says how far the policy has drifted from its reference on what nobody asked for (KTO's
baseline).
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from jaxpost.data import examples, formats
from jaxpost.data.examples import Example, Row, Settings
from jaxpost.data.formats import Rated
from jaxpost.data.readers import Record
from jaxpost.data.row_types import labelled
from jaxpost.errors import UserError

shareable = True
columns, rows_of = labelled.columns, labelled.rows_of


def encoder(records: Sequence[Record], settings: Settings) -> Callable[[Record], Example]:
    """record -> its answer and another row's; the value is its own label. Raises UserError where no other prompt is there."""
    others = _others(records, settings.columns)

    def encode(record: Record) -> Example:
        rated = formats.labelled(record, settings.columns)
        document = examples.answered(rated.prompt, rated.completion, settings, rated.place, rated.tools)
        if (other := others.get(id(record))) is None:
            raise UserError(f"{rated.place}: there is no other prompt whose answer could be its mismatch; give more rows")
        place = f"{rated.place}, with the answer of {other.place}"
        beside = examples.answered(rated.prompt, other.completion, settings, place, rated.tools)
        return examples.of([document, beside], [float(rated.label)])

    return encode


def _others(records: Sequence[Record], columns: Mapping[str, str]) -> dict[int, Rated]:
    """For each sound record, by identity, the last one before it (going round) that has another prompt."""
    sound = []
    for record in records:
        try:
            sound.append((id(record), formats.labelled(record, columns)))
        except UserError:  # raised again where the record itself is encoded
            continue
    others: dict[int, Rated] = {}
    last = None
    # Twice round: what stands before the first is at the end.
    for (_, before), (key, rated) in zip([*sound[-1:], *sound, *sound], [*sound, *sound], strict=False):
        other = before if before.prompt != rated.prompt else last
        if other is not None and other.prompt != rated.prompt:
            others[key] = other
        last = others.get(key)
    return others


def lay_out(example: Example, settings: Settings) -> Row:
    """The columns of both documents."""
    row = examples.lay_out(example, settings)
    return row | {"labels": np.where(row["segments"] == 1, example.values[0], np.float32(-1))}
