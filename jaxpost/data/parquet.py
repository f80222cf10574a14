"""Reads Parquet files within a memory limit: a few kilobytes may unpack to any size.

Two things make a small file large in memory. Compression: the file's metadata states the unpacked size before anything is read.
Dictionaries, which store a repeated value once: texts are read as dictionaries, within the stated size, and their expanded size
is counted before they are expanded.
"""

from collections.abc import Iterator
from typing import Any

from etils import epath

from jaxpost.errors import UserError
from jaxpost.storage import host

_TEXT = ("NONE", "STRING", "JSON", "ENUM", "BSON")  # logical types of the columns that are read as dictionaries


def rows(parquet: Any, file: epath.Path, name: str) -> Iterator[dict[str, Any]]:
    """The rows of a file. parquet: the module pyarrow.parquet; name: the file's name in messages.

    Raises UserError if it is no Parquet, or would take more than a quarter of the memory.
    """
    room = host.memory() // 4
    values: dict[str, list | None] = {}
    try:
        with file.open("rb") as stream:
            metadata = parquet.ParquetFile(stream).metadata
            if _unpacked_size(metadata) > room:
                raise _too_large(file, name, room)
            columns = [metadata.schema.column(i) for i in range(metadata.num_columns)]
            texts = [c.path for c in columns if c.physical_type == "BYTE_ARRAY" and c.logical_type.type in _TEXT]
            opened, taken = parquet.ParquetFile(stream, read_dictionary=texts), 0
            for group in range(metadata.num_row_groups):
                table = opened.read_row_group(group)
                taken += sum(_expanded_size(chunk) for column in table.columns for chunk in column.chunks)
                if taken > room:
                    raise _too_large(file, name, room)
                for name_, column in zip(table.column_names, table.columns, strict=True):
                    values[name_] = _extended(values.get(name_, []), column)
    except UserError:
        raise
    except (OSError, ValueError) as error:  # pyarrow's errors are subclasses
        raise UserError(f"{name}: not readable as Parquet ({error}); fetch or write it again") from error
    values = {column: whole for column, whole in values.items() if whole is not None}
    yield from (dict(zip(values, row, strict=True)) for row in zip(*values.values(), strict=True))


def _unpacked_size(metadata: Any) -> int:
    """The unpacked bytes by a file's metadata: of its pages, or of its values at 8 bytes or their fixed length, if more."""
    groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
    widths = [max(8, metadata.schema.column(i).length) for i in range(metadata.num_columns)]
    values = sum(group.column(i).num_values * width for group in groups for i, width in enumerate(widths))
    return max(values, sum(group.total_byte_size for group in groups))


def _expanded_size(array: Any) -> int:
    """The bytes of an Arrow array with its dictionaries expanded."""
    from pyarrow import compute, types

    kind = array.type
    if types.is_dictionary(kind):
        lengths = compute.binary_length(array.dictionary)
        return array.indices.nbytes + (compute.sum(compute.take(lengths, array.indices)).as_py() or 0)
    if types.is_struct(kind):
        return sum(map(_expanded_size, array.flatten()))
    if types.is_map(kind):
        return _expanded_size(array.keys) + _expanded_size(array.items)
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        return _expanded_size(array.flatten())
    return array.nbytes


def _extended(before: list | None, column: Any) -> list | None:
    """`before` with the values of an Arrow column appended; None if Python cannot represent one (a date in the year 12000)."""
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
