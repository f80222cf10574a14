"""Rows of Parquet files, held to the memory: a few kilobytes there may stand for any number of bytes.

Two things make a file small that is large in memory. Compression, of which the file's own description tells the outcome before
anything is read; and dictionaries, which hold a value once and say where it stands. So texts are read as dictionaries, which
take no more than the file said, and what they will take written out is counted before it is.
"""

from collections.abc import Iterator
from typing import Any

from etils import epath

from jaxpost.errors import UserError
from jaxpost.storage import host

_TEXT = ("NONE", "STRING", "JSON", "ENUM", "BSON")  # logical types of the columns that are read as dictionaries


def rows(parquet: Any, file: epath.Path, name: str) -> Iterator[dict[str, Any]]:
    """The rows of a file. parquet: the module pyarrow.parquet; name: what messages call the file.

    Raises UserError where it is no Parquet, or would take more than a quarter of the memory.
    """
    room = host.memory() // 4
    values: dict[str, list | None] = {}
    try:
        with file.open("rb") as stream:
            described = parquet.ParquetFile(stream).metadata
            if _promised(described) > room:
                raise _too_large(file, name, room)
            columns = [described.schema.column(i) for i in range(described.num_columns)]
            texts = [c.path for c in columns if c.physical_type == "BYTE_ARRAY" and c.logical_type.type in _TEXT]
            opened, taken = parquet.ParquetFile(stream, read_dictionary=texts), 0
            for group in range(described.num_row_groups):
                table = opened.read_row_group(group)
                taken += sum(_written_out(chunk) for column in table.columns for chunk in column.chunks)
                if taken > room:
                    raise _too_large(file, name, room)
                for column, read in zip(table.column_names, table.columns, strict=True):
                    values[column] = _longer(values.get(column, []), read)
    except UserError:
        raise
    except (OSError, ValueError) as error:  # pyarrow's own are kinds of these
        raise UserError(f"{name}: not readable as Parquet ({error}); fetch or write it again") from error
    values = {column: whole for column, whole in values.items() if whole is not None}
    yield from (dict(zip(values, row, strict=True)) for row in zip(*values.values(), strict=True))


def _promised(described: Any) -> int:
    """The bytes that a file's description says it unpacks to: of its pages, or of its values at 8 or their own length each."""
    groups = [described.row_group(i) for i in range(described.num_row_groups)]
    widths = [max(8, described.schema.column(i).length) for i in range(described.num_columns)]
    values = sum(group.column(i).num_values * width for group in groups for i, width in enumerate(widths))
    return max(values, sum(group.total_byte_size for group in groups))


def _written_out(array: Any) -> int:
    """The bytes of an Arrow array in which every value stands where it is, not in a dictionary."""
    from pyarrow import compute, types

    kind = array.type
    if types.is_dictionary(kind):
        lengths = compute.binary_length(array.dictionary)
        return array.indices.nbytes + (compute.sum(compute.take(lengths, array.indices)).as_py() or 0)
    if types.is_struct(kind):
        return sum(map(_written_out, array.flatten()))
    if types.is_map(kind):
        return _written_out(array.keys) + _written_out(array.items)
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        return _written_out(array.flatten())
    return array.nbytes


def _longer(before: list | None, column: Any) -> list | None:
    """The values before with those of an Arrow column; None where Python has none for them (a date of the year 12000)."""
    try:
        if before is not None:
            before.extend(column.to_pylist())
        return before
    except (ArithmeticError, ValueError, TypeError, ImportError):
        return None


def _too_large(file: epath.Path, name: str, room: int) -> UserError:
    return UserError(
        f"{name}: unpacks to more than {room:,} bytes, a quarter of the memory, from {file.stat().length:,}; it may be a bomb; "
        "if it is not, cut it into several files and train on some"
    )
