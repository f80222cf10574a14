"""The table of completions: prompts, completions, rewards and advantages.

A row is a dict with any of these keys:

    stage, step     in the files of a workdir
    prompt, completion, answer    texts
    reward          the total from which the advantage is computed
    rewards/NAME    each reward, where there are several; None or nan where it did not apply
    advantage       how much better the completion is than the others of its prompt
    others          further keys, in this place

`columns` gives this order wherever rows are read: `shown` draws them for a terminal, `parquet` keeps all of them in a file
(`writers.write_parquet`), and `report.py` has them on its page.

A model may write anything, terminal commands too, so only printable characters reach the terminal.
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
    names = dict.fromkeys(name for row in rows for name in row)
    each = [name for name in names if name.startswith("rewards/")]
    order = [name for name in (*_FIRST, *each, "advantage") if name in names]
    return order + [name for name in names if name not in order]


def shown(rows: Sequence[Mapping], width: int = 120, *, lines: int = 4, colour: bool = False) -> str:
    """The rows as an aligned table for a terminal `width` characters wide; "" for no rows.

    Numbers get the width that they need and texts share the rest; a cell has `lines` lines at most. A prompt that equals the
    one above is left blank. colour: completions with a positive advantage are green, with a negative one red. A table of many
    numbers may be wider than `width`.
    """
    rows = [{name: plain(value) for name, value in row.items()} for row in rows]
    names = columns(rows)
    printed = [{name: _printable(row.get(name)) for name in names} for row in rows]
    for row, above in reversed(list(zip(printed[1:], printed, strict=False))):
        if row.get("prompt") == above.get("prompt"):
            row["prompt"] = ""
    # A heading is the last part of the column's name: `rewards/` would take room from the texts.
    heads = {name: name.rpartition("/")[2] for name in names}
    wide = {name: max([_width(heads[name]), *(_width(row[name]) for row in printed)]) for name in names}
    texts = [name for name in names if any(isinstance(row.get(name), str) for row in rows)]
    room = width - sum(wide[name] for name in names if name not in texts) - len(_GAP) * (len(names) - 1)
    wide |= _shared({name: wide[name] for name in texts}, room)
    marked = (_FAINT, _PLAIN) if colour else ("", "")
    drawn = [marked[0] + _line({name: heads[name] for name in names}, wide, texts) + marked[1]] if rows else []
    for row, entry in zip(rows, printed, strict=True):
        cells = {name: _folded(entry[name], wide[name], lines) for name in names}
        sign = row.get("advantage") if colour else None
        tint = (_GOOD if sign > 0 else _BAD) if isinstance(sign, numbers.Real) and sign else ""
        for i in range(max(len(cell) for cell in cells.values())):
            line = _line({name: cell[i] if i < len(cell) else "" for name, cell in cells.items()}, wide, texts)
            drawn.append(f"{tint}{line}{_PLAIN}" if tint else line)
    return "\n".join(drawn)


def plain(value: Any) -> Any:
    """A cell as text to read: messages become their texts, each after its role; anything else is unchanged."""
    turns = isinstance(value, list) and value and all(isinstance(turn, Mapping) and "role" in turn for turn in value)
    return "\n".join(f"{turn['role']}: {turn.get('content') or ''}" for turn in value) if turns else value


def _printable(value: Any) -> str:
    """A cell as one line of printable characters."""
    if value is None or (isinstance(value, numbers.Real) and math.isnan(value)):
        return "-"
    if isinstance(value, numbers.Real) and not isinstance(value, (bool, numbers.Integral)):
        return f"{value:.3g}"
    text = str(value).replace("\n", "⏎ ").replace("\t", " ")
    return "".join(letter if letter.isprintable() else "·" for letter in text)


def _width(text: str) -> int:
    """The width of a text on a terminal: two for a wide character, none for a combining one."""
    return sum(0 if unicodedata.combining(letter) else 1 + (unicodedata.east_asian_width(letter) in "WF") for letter in text)


def _shared(widths: Mapping[str, int], room: int) -> dict[str, int]:
    """`room` divided among columns: equally, but none gets more than its width or less than 12."""
    shares, left = {}, room
    for place, (name, width) in enumerate(sorted(widths.items(), key=lambda item: item[1])):
        shares[name] = min(width, max(12, left // (len(widths) - place)))
        left -= shares[name]
    return shares


def _folded(text: str, width: int, lines: int) -> list[str]:
    """The text in at most `lines` lines of `width`, broken at spaces where possible; … marks a cut."""
    parts, rest = [], text.strip()
    while rest and len(parts) < lines:
        end = _fits(rest, width)
        if end < len(rest) and (space := rest.rfind(" ", 0, end + 1)) > 0:
            end = space
        parts.append(rest[:end])
        rest = rest[end:].lstrip()
    if rest:
        parts[-1] = parts[-1][: _fits(parts[-1], width - 1)] + "…"
    return parts or [""]


def _fits(text: str, width: int) -> int:
    """The number of characters that fit; one at least."""
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

    A column's type is int64, float64, bool or string, by its values; mixed and other values become JSON. Missing values, None
    and nan are null. Raises UserError where pyarrow is not installed.
    """
    try:
        arrow, files = (importlib.import_module(name) for name in ("pyarrow", "pyarrow.parquet"))
    except ImportError as error:
        raise UserError(
            f"completions: Parquet is written by pyarrow, which is not here ({error}); pip install pyarrow"
        ) from error
    arrays = {name: _column([_native(row.get(name)) for row in rows], arrow) for name in columns(rows)}
    content = io.BytesIO()
    files.write_table(arrow.table(arrays), content)
    return content.getvalue()


def _native(value: Any) -> Any:
    """A value as a Python object, with None for nan."""
    value = value.tolist() if hasattr(value, "tolist") else value
    return None if isinstance(value, float) and math.isnan(value) else value


def _column(values: list, arrow):
    # JSON may hold lone surrogates (\ud800), which UTF-8 cannot encode.
    values = [value.encode(errors="replace").decode() if isinstance(value, str) else value for value in values]
    kinds = {type(value) for value in values if value is not None}
    if any(isinstance(value, int) and not -(2**63) <= value < 2**63 for value in values):
        kinds.add(object)  # beyond int64, so JSON
    for allowed, kind in (({bool}, "bool_"), ({int}, "int64"), ({int, float}, "float64"), ({str}, "string")):
        if kinds <= allowed:
            # A column of None is float64: a reward that never applied.
            return arrow.array(values, getattr(arrow, kind if kinds else "float64")())
    return arrow.array([None if value is None else json.dumps(value, default=str) for value in values], arrow.string())
