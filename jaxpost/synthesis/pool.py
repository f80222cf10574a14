"""What a synthesis has so far: its records, and the rows that were kept of the completions that they led to."""

import json
from collections.abc import Sequence
from collections.abc import Set as AbstractSet

import numpy as np


class Pool:
    """What a prompt or a filter may look at besides its own record or row.

    records: all records, dicts; rows: the rows that were kept so far, in order; key: uint32 [2], another for each prompt, for
    `np.random.default_rng`. A prompt sees the rows of earlier rounds alone; a filter sees all that were kept before its row.
    """

    def __init__(self, records: Sequence[dict], rows: Sequence[dict] = ()):
        self.records, self.rows, self.key = list(records), list(rows), np.zeros(2, np.uint32)
        self._values: dict[str, set[str]] = {}

    def add(self, row: dict) -> None:
        """Keeps a row."""
        self.rows.append(row)
        for field, values in self._values.items():
            values.add(text(row.get(field)))

    def values(self, field: str) -> AbstractSet[str]:
        """The values that the kept rows have under a field, each as `text` writes it."""
        if field not in self._values:
            self._values[field] = {text(row.get(field)) for row in self.rows}
        return self._values[field]


def text(value) -> str:
    """A value of a row as text that is the same for equal values."""
    return json.dumps(value, sort_keys=True, ensure_ascii=False)
