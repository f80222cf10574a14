"""The table of completions: what was asked, what was said, what each reward thought of it, and what it was worth.

A row is a dict, of which any may be missing:

    stage, step     when; of a work folder's files
    prompt, completion, answer    texts
    reward          the total that the advantage came from
    rewards/NAME    what each reward said, where there are several; None or nan where it did not apply
    advantage       how much better than its rivals'
    others          whatever else the row's maker knows, after these

`columns` puts them in this order wherever they are read: `shown` draws them for a terminal, `parquet` is the file that keeps
all of them for any tool that reads such files (`writers.write_parquet`), and `report.py` has them on its page.

A model may write anything, a terminal's own commands too, so nothing but what can be printed reaches the terminal.
"""

import importlib
import io
import json
import math
import numbers
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from jaxpost.errors import UserError

_FIRST = ("stage", "step", "prompt", "completion", "answer", "reward")
_GAP = "  "
_GOOD, _BAD, _FAINT, _PLAIN = "\033[32m", "\033[31m", "\033[2m", "\033[0m"


def columns(rows: Iterable[Mapping]) -> list[str]:
    """The names of the rows' columns, in the table's order."""
    found = dict.fromkeys(name for row in rows for name in row)
    each = [name for name in found if name.startswith("rewards/")]
    order = [name for name in (*_FIRST, *each, "advantage") if name in found]
    return order + [name for name in found if name not in order]


def shown(rows: Sequence[Mapping], width: int = 120, *, lines: int = 4, colour: bool = False) -> str:
    """The rows as an aligned table for a terminal `width` characters wide; "" for no rows.

    Numbers keep the room that they need and texts share the rest, a cell taking `lines` lines at most. A prompt that the row
    above has is not said again. colour: what was better than its rivals is green, what was worse red. A table of many numbers
    is wider than asked for rather than unreadable.
    """
    rows = [{name: plain(value) for name, value in row.items()} for row in rows]
    names = columns(rows)
    told = [{name: _told(row.get(name)) for name in names} for row in rows]
    for row, above in reversed(list(zip(told[1:], told, strict=False))):
        if row.get("prompt") == above.get("prompt"):
            row["prompt"] = ""
    # A column's heading is its last part, since `rewards/` before each of them would take the room of the texts.
    heads = {name: name.rpartition("/")[2] for name in names}
    wide = {name: max([_width(heads[name]), *(_width(row[name]) for row in told)]) for name in names}
    texts = [name for name in names if any(isinstance(row.get(name), str) for row in rows)]
    room = width - sum(wide[name] for name in names if name not in texts) - len(_GAP) * (len(names) - 1)
    wide |= _shared({name: wide[name] for name in texts}, room)
    marked = (_FAINT, _PLAIN) if colour else ("", "")
    drawn = [marked[0] + _line({name: heads[name] for name in names}, wide, texts) + marked[1]] if rows else []
    for row, own in zip(rows, told, strict=True):
        cells = {name: _folded(own[name], wide[name], lines) for name in names}
        sign = row.get("advantage") if colour else None
        tint = (_GOOD if sign > 0 else _BAD) if isinstance(sign, numbers.Real) and sign else ""
        for i in range(max(len(cell) for cell in cells.values())):
            line = _line({name: cell[i] if i < len(cell) else "" for name, cell in cells.items()}, wide, texts)
            drawn.append(f"{tint}{line}{_PLAIN}" if tint else line)
    return "\n".join(drawn)


def plain(value: Any) -> Any:
    """A cell as a reader wants it: of messages their text, each behind its role; anything else as it is."""
    turns = isinstance(value, list) and value and all(isinstance(turn, Mapping) and "role" in turn for turn in value)
    return "\n".join(f"{turn['role']}: {turn.get('content') or ''}" for turn in value) if turns else value


def _told(value: Any) -> str:
    """A cell as one line of what can be printed."""
    if value is None or (isinstance(value, numbers.Real) and math.isnan(value)):
        return "-"
    if isinstance(value, numbers.Real) and not isinstance(value, (bool, numbers.Integral)):
        return f"{value:.3g}"
    text = str(value).replace("\n", "⏎ ").replace("\t", " ")
    return "".join(letter if letter.isprintable() else "·" for letter in text)


def _width(text: str) -> int:
    """How many places a terminal gives a text: two for a wide letter, none for what is put on top of the one before."""
    return sum(0 if unicodedata.combining(letter) else 1 + (unicodedata.east_asian_width(letter) in "WF") for letter in text)


def _shared(wanted: Mapping[str, int], room: int) -> dict[str, int]:
    """`room` dealt out to columns: to none more than it wants, to each as much as the others otherwise, and 12 at least."""
    found, left = {}, room
    for place, (name, own) in enumerate(sorted(wanted.items(), key=lambda item: item[1])):
        found[name] = min(own, max(12, left // (len(wanted) - place)))
        left -= found[name]
    return found


def _folded(text: str, width: int, lines: int) -> list[str]:
    """The text in `lines` lines of `width` places at most, broken at spaces where there are any; with … where it goes on."""
    found, rest = [], text.strip()
    while rest and len(found) < lines:
        end = _fits(rest, width)
        if end < len(rest) and (space := rest.rfind(" ", 0, end + 1)) > 0:
            end = space
        found.append(rest[:end])
        rest = rest[end:].lstrip()
    if rest:
        found[-1] = found[-1][: _fits(found[-1], width - 1)] + "…"
    return found or [""]


def _fits(text: str, width: int) -> int:
    """How many of its characters fit; one at least."""
    taken = 0
    for place, letter in enumerate(text):
        taken += _width(letter)
        if taken > width:
            return max(place, 1)
    return len(text)


def _line(cells: Mapping[str, str], wide: Mapping[str, int], texts: Sequence[str]) -> str:
    padded = []
    for name, cell in cells.items():
        blank = " " * (wide[name] - _width(cell))
        padded.append(cell + blank if name in texts else blank + cell)
    return _GAP.join(padded).rstrip()


def parquet(rows: Sequence[Mapping]) -> bytes:
    """The rows as the content of a Parquet file.

    A column is of whole numbers, numbers, truth values or texts, as its values are; of several kinds, or of others, it is of
    JSON. What is missing, None or nan is null. Raises UserError where pyarrow is not installed.
    """
    try:
        arrow, files = (importlib.import_module(name) for name in ("pyarrow", "pyarrow.parquet"))
    except ImportError as error:
        raise UserError(
            f"completions: Parquet is written by pyarrow, which is not here ({error}); pip install pyarrow"
        ) from error
    made = {name: _column([_known(row.get(name)) for row in rows], arrow) for name in columns(rows)}
    content = io.BytesIO()
    files.write_table(arrow.table(made), content)
    return content.getvalue()


def _known(value: Any) -> Any:
    """A value as Python's own, None where there is none."""
    value = value.tolist() if hasattr(value, "tolist") else value
    return None if isinstance(value, float) and math.isnan(value) else value


def _column(values: list, arrow):
    # JSON may hold halves of characters (\ud800), which no UTF-8 has.
    values = [value.encode(errors="replace").decode() if isinstance(value, str) else value for value in values]
    kinds = {type(value) for value in values if value is not None}
    if any(isinstance(value, int) and not -(2**63) <= value < 2**63 for value in values):
        kinds.add(object)  # no number that a file has a kind for
    for allowed, kind in (({bool}, "bool_"), ({int}, "int64"), ({int, float}, "float64"), ({str}, "string")):
        if kinds <= allowed:
            # A column of nothing else is one of numbers: a reward that never applied.
            return arrow.array(values, getattr(arrow, kind if kinds else "float64")())
    return arrow.array([None if value is None else json.dumps(value, default=str) for value in values], arrow.string())
