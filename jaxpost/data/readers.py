"""Reading a file into records: the one place that knows file formats.

A record is a row and its place. The place travels with the row to the very end, so that whatever later refuses the row
(an unknown column, an empty turn, an example too long for the window) can say where to look: "alpaca.json, row 17".
Rows are counted from 1, as people count; in JSON lines the count is the line's number, which is what an editor shows.

Nothing here looks into a row: that is `formats`. Paths go through `etils.epath`, so gs:// paths are read like local ones.
"""

import json
from typing import Any, NamedTuple

from etils import epath

from jaxpost.errors import UserError


class Record(NamedTuple):
    """A row as it stands in its file, and where it stands: `place` opens every message about it."""

    row: dict[str, Any]
    place: str


def read(path: str) -> list[Record]:
    """All rows of a .jsonl file (one object a line; blank lines are passed over) or a .json file (a list of objects).

    Raises UserError, naming file and place, if it is missing, empty, not UTF-8, not JSON, or has other rows than objects.
    """
    file = epath.Path(path)
    readers = {".jsonl": _lines, ".json": _list}
    if file.suffix not in readers:
        raise UserError(f"{path}: not readable; give a .jsonl (one object a line) or a .json (a list of them)")
    if not file.exists():
        raise UserError(f"{path}: no such file; check the path (it is taken relative to the current directory)")
    if file.is_dir():
        raise UserError(f"{path}: a folder, not a file; name one file in it")
    try:
        # A byte-order mark is what some editors and spreadsheets put first; JSON proper would refuse it.
        text = file.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 at byte {error.start}; save the file as UTF-8") from error
    records = readers[file.suffix](text, file.name)
    if not records:
        raise UserError(f"{path}: no rows in it; give a file with at least one example")
    return records


def _lines(text: str, name: str) -> list[Record]:
    # Not str.splitlines: it also splits at U+2028 and kin, which JSON allows inside a string.
    records = []
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            place = f"{name}, line {number}"
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                where = f"{place}, column {error.colno}"
                raise UserError(f"{where}: broken JSON ({error.msg}); each line must be one object") from error
            records.append(_record(row, place))
    return records


def _list(text: str, name: str) -> list[Record]:
    if not text.strip():
        return []
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        where = f"{name}, line {error.lineno}, column {error.colno}"
        one_a_line = error.msg == "Extra data"
        remedy = "if each line is an object of its own, name the file .jsonl" if one_a_line else "mend the file there"
        raise UserError(f"{where}: broken JSON ({error.msg}); {remedy}") from error
    if not isinstance(rows, list):
        raise UserError(f"{name}: the top level is a {type(rows).__name__}, not a list; write the rows as [{{...}}, {{...}}]")
    return [_record(row, f"{name}, row {number}") for number, row in enumerate(rows, start=1)]


def _record(row: Any, place: str) -> Record:
    if not isinstance(row, dict):
        raise UserError(f"{place}: a {type(row).__name__}, not an object; each row must map column names to values")
    return Record(row, place)
