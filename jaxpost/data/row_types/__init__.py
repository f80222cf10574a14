"""Row types: what an example of a data set is. One file each, named by `@objective(rows="pairs")` or `rows="mine.py"`.

A row type is a module. What it leaves out is as `data/examples.py` has it, of a prompt with one answer or several:

    encode(record, settings) -> Example         what a row holds, whole; UserError with record.place where it cannot be
    encoder(records, settings) -> encode        in its place where an example depends on other rows: record -> Example
    fit(example, settings, place) -> [Example]  made to fit the window; [] drops it
    lay_out(example, settings) -> {name: [n]}   its columns: tokens, mask, segments, positions, and those of `columns`
    columns(reads) -> {name: dtype}             its further columns for an objective that reads the columns `reads`; of
                                                settings.reads, `encode` may look at these alone
    check(settings)                             UserError for settings that mean nothing to it
    rows_of(texts, rewards [n]) -> rows         the rows that a prompt's judged completions give, without the prompt
    shareable = False                           whether an example has a prompt to share (config.shared_prefix)
    completions = 0                             how many completions of a group a row of rollouts has: 1 each, 2 compared
    fills_window = False                        whether one document may be as long as the window
    most(window) -> int                         the most documents of a row of this many tokens; without it there is no limit
    keys = ()                                   keys of a row that it reads besides those of data/formats.py

`settings` are examples.Settings, `record` is (row, place). A whole row type, a list of answers each with a rank:

    from jaxpost.data import examples

    def encode(record, settings):
        prompt, answers = record.row["prompt"], record.row["answers"]
        documents = [examples.answered(prompt, answer, settings, record.place) for answer in answers]
        return examples.of(documents, values=record.row["ranks"])

    def lay_out(example, settings):
        row = examples.lay_out(example, settings)
        return row | {"ranks": example.values[row["segments"] - 1]}

    def columns(reads):
        return {"ranks": "float32"}
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import numpy as np

from jaxpost.config import resolve
from jaxpost.data import examples
from jaxpost.errors import UserError

FOLDER = Path(__file__).parent
DEFAULT = "demonstrations"


class RowType(NamedTuple):
    """A row type's functions and properties, as above; digest: of the code of one that is not jaxpost's own, else ""."""

    name: str
    encoder: Callable
    digest: str
    fit: Callable = examples.fit
    lay_out: Callable = examples.lay_out
    columns: Callable[[frozenset[str]], Mapping[str, str]] = lambda reads: {}
    check: Callable = examples.check
    rows_of: Callable | None = None
    shareable: bool = False
    completions: int = 0
    fills_window: bool = False
    most: Callable[[int], int] | None = None
    keys: tuple[str, ...] = ()

    def further(self, shared: bool, reads: frozenset[str], row_columns: Sequence[str] = ()) -> examples.Row:
        """The columns of an example besides those of every row, with no token in them."""
        dtypes = {**({"branches": "int32"} if shared else {}), **self.columns(reads), **dict.fromkeys(row_columns, "float32")}
        return {name: np.zeros(0, dtype) for name, dtype in dtypes.items()}


def load(name: str | ModuleType) -> RowType:
    """The row type of a name: a file of this folder, an importable module, a file.py; or of a module itself.

    Raises UserError for a name that is none of these, and for a module that encodes nothing.
    """
    module = resolve.module(name, "row_types") if isinstance(name, str) else name
    name = Path(name).name if isinstance(name, str) else module.__name__  # not where a file lies, which is part of no digest
    if not (hasattr(module, "encode") or hasattr(module, "encoder")):
        raise UserError(
            f"config.objective: its rows={name!r} has no function encode(record, settings); give it one, as "
            "jaxpost/data/row_types/__init__.py says."
        )
    encoder = getattr(module, "encoder", None) or _each(module.encode)
    fields = {field: getattr(module, field) for field in RowType._fields[3:] if hasattr(module, field)}
    file = Path(module.__file__)
    digest = "" if file.parent == FOLDER else hashlib.sha256(file.read_bytes()).hexdigest()
    return RowType(name, encoder, digest, **fields)


def _each(encode: Callable) -> Callable:
    return lambda records, settings: lambda record: encode(record, settings)
