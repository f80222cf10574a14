"""Reads data into records: the only file that knows file formats and the libraries behind `tfds:` and `hf:`.

A record is a row and its place. The place stays with the row, so that later errors (an unknown column, an empty turn, an
example too long for the window) can say where to look: "alpaca.json, row 17". Rows are counted from 1; in JSON lines and text
the count is the line number that an editor shows. For a folder or a pattern the place names the file within it.

    x.jsonl  x.json  x.txt             and each with .gz after it
    x.parquet  x.arrayrecord           an ArrayRecord's records are JSON objects
    a folder  dir/part-*.jsonl         every file of these kinds directly in it, in the order of their names
    tfds:NAME[/CONFIG][:VERSION]/SPLIT from TensorFlow Datasets, without TensorFlow; text arrives as bytes and is decoded
    hf:OWNER/NAME[/CONFIG][:SPLIT]     from the Hugging Face hub, where `datasets` is installed; the split is train if not given

A text file has one document a line, as in other libraries; blank lines are skipped. Documents with line breaks belong in JSON
lines, under `text`.

`formats` interprets rows; this file does not. Paths go through `etils.epath`, so gs:// paths are read like local ones. Records
are a list in memory: text is small compared with the model.
"""

import gzip
import importlib
import json
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from jaxpost.data import parquet
from jaxpost.errors import UserError
from jaxpost.storage import cloud, host, network


class Record(NamedTuple):
    """A row as in its file, and its place there, with which every message about it begins."""

    row: dict[str, Any]
    place: str


class _File(NamedTuple):
    shown: str
    whole: str
    read: Callable[[str], Iterator[Record | UserError]]  # takes the file's name for places


def read(path: str | Sequence[str], bad: list[str] | None = None) -> list[Record]:
    """All rows of a file, folder, pattern, `tfds:` or `hf:` name (see above), or of a list of them, in order.

    bad: a list for the messages of rows that cannot be read (broken JSON, no object), which are then left out; without it they
    raise UserError, with file and place. So does whatever is missing or empty.
    """
    paths = [path] if isinstance(path, str) else list(path)
    files = [file for one in paths for file in _files(one)]
    names = [file.shown for file in files]
    records, failed = [], []
    for file in files:
        name = file.shown if names.count(file.shown) == 1 else file.whole
        before = len(records) + len(failed)
        for record in file.read(name):
            if isinstance(record, Record):
                records.append(record)
            elif bad is None:
                raise record
            else:
                failed.append(str(record))
        if len(records) + len(failed) == before:
            raise UserError(f"{name if len(files) > 1 else path}: no rows in it; give a file with at least one example")
    if not records:
        reason = f"none of its {len(failed)} rows can be read, the first because: {failed[0]}" if failed else "it names no file"
        raise UserError(f"{path}: no rows in it; {reason}")
    if bad is not None:
        bad.extend(failed)
    return records


def _files(path: str) -> list[_File]:
    """The files of a path, in order. Raises UserError if there are none."""
    if path.startswith(("tfds:", "hf:")):
        reader = _tfds if path.startswith("tfds:") else _hf
        return [_File(path, path, lambda name: reader(path, name))]
    file = cloud.path(path)
    if file.is_dir():
        return _several(file, "*", f"{path}: a folder without data in it")
    if not file.exists() and any(letter in path for letter in "*?["):
        if "**" in path:
            raise UserError(f"{path}: ** goes into every folder below, slow in a bucket; write */ for each level instead")
        fixed = next(i for i, part in enumerate(file.parts) if any(letter in part for letter in "*?["))
        folder = epath.Path(*file.parts[:fixed]) if fixed else epath.Path(".")
        return _several(folder, "/".join(file.parts[fixed:]), f"{path}: no data matches it")
    if not _kind(file):
        raise UserError(f"{path}: not readable; give a {_KNOWN}")
    if not file.exists():
        raise UserError(f"{path}: no such file; check the path (it is taken relative to the current directory)")
    return [_file(file, file.name)]


def _several(folder: epath.Path, pattern: str, nothing: str) -> list[_File]:
    files = sorted((f for f in folder.glob(pattern) if _kind(f) and not f.is_dir()), key=str)
    if not files:
        raise UserError(f"{nothing}; name a {_KNOWN}")
    return [_file(file, str(file.relative_to(folder))) for file in files]


def _file(file: epath.Path, shown: str) -> _File:
    host.check_regular(file)
    return _File(shown, str(file), lambda name: _kind(file)(file, name))


def _kind(file: epath.Path) -> Callable[[epath.Path, str], Iterator[Record | UserError]] | None:
    """The reader for files with this name, or None."""
    name = file.name.lower()
    zipped = name.endswith(".gz")
    suffix = Path(name.removesuffix(".gz")).suffix
    return None if zipped and suffix not in (".jsonl", ".json", ".txt") else _KINDS.get(suffix)


def _text_of(file: epath.Path, name: str) -> str:
    room = host.memory() // 4  # the text, its lines and the rows each need about as much
    if file.stat().length > room:
        raise UserError(f"{name}: larger than {room:,} bytes, a quarter of the memory; cut it into files and train on some")
    if not file.name.lower().endswith(".gz"):
        content = file.read_bytes()
    else:
        try:
            with file.open("rb") as stream, gzip.open(stream) as unpacked:
                content = unpacked.read(room + 1)
            if len(content) > room:
                raise UserError(
                    f"{name}: unpacks to more than {room:,} bytes, a quarter of the memory, from {file.stat().length:,}; it "
                    "may be a bomb; if it is not, cut it into several files and train on some"
                )
        except (OSError, EOFError, zlib.error) as error:
            raise UserError(f"{name}: broken gzip ({error}); fetch or compress it again") from error
    try:
        # Some editors and spreadsheets write a byte-order mark, which JSON does not allow.
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{name}: not UTF-8 at byte {error.start}; save the file as UTF-8") from error


def _numbered(text: str, name: str) -> Iterator[tuple[str, str]]:
    """(line, place) of every line that is not blank."""
    # Not str.splitlines: it also splits at U+2028 and the like, which JSON allows inside a string.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield line, f"{name}, line {number}"


def _lines(file: epath.Path, name: str) -> Iterator[Record | UserError]:
    for line, place in _numbered(_text_of(file, name), name):
        yield _object(line, place, "each line must be one object")


def _documents(file: epath.Path, name: str) -> Iterator[Record | UserError]:
    for line, place in _numbered(_text_of(file, name), name):
        yield Record({"text": line.strip()}, place)


def _object(text: str | bytes, place: str, rule: str) -> Record | UserError:
    try:
        return _record(json.loads(text), place)
    except json.JSONDecodeError as error:
        return UserError(f"{place}, column {error.colno}: broken JSON ({error.msg}); {rule}")
    except (ValueError, RecursionError) as error:
        return UserError(f"{place}: broken JSON ({error}); {rule}")


def _list(file: epath.Path, name: str) -> Iterator[Record | UserError]:
    text = _text_of(file, name)
    try:
        rows = json.loads(text) if text.strip() else []
    except json.JSONDecodeError as error:
        where = f"{name}, line {error.lineno}, column {error.colno}"
        one_a_line = error.msg == "Extra data"
        remedy = "if each line is an object of its own, name the file .jsonl" if one_a_line else "mend the file there"
        raise UserError(f"{where}: broken JSON ({error.msg}); {remedy}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{name}: broken JSON ({error}); mend the file") from error
    if not isinstance(rows, list):
        raise UserError(f"{name}: the top level is a {type(rows).__name__}, not a list; write the rows as [{{...}}, {{...}}]")
    yield from _rows(rows, name)


def _rows(rows, name: str) -> Iterator[Record | UserError]:
    for number, row in enumerate(rows, start=1):
        yield _record(row, f"{name}, row {number}")


def _padded_rows(rows, name: str) -> Iterator[Record | UserError]:
    """As _rows, for Arrow tables, where all structures of a column have the same keys, with nulls for missing ones."""
    for number, row in enumerate(rows, start=1):
        yield _record({column: _without_nulls(value) for column, value in row.items()}, f"{name}, row {number}")


def _without_nulls(value: Any) -> Any:
    """The value without null keys at any depth; None for a structure with no other keys."""
    if isinstance(value, (list, tuple)):
        return [_without_nulls(item) for item in value]
    if not isinstance(value, dict) or not value:
        return value
    kept = {key: _without_nulls(item) for key, item in value.items()}
    return {key: item for key, item in kept.items() if item is not None} or None


def _record(row: Any, place: str) -> Record | UserError:
    if not isinstance(row, dict):
        return UserError(f"{place}: a {type(row).__name__}, not an object; each row must map column names to values")
    return Record(_plain(row), place)


def _plain(value: Any) -> Any:
    """A value of a binary format in JSON's types; bytes that are no UTF-8 stay bytes."""
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            return value
    if isinstance(value, (np.ndarray, np.generic)):
        return _plain(value.tolist())
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def _parquet(file: epath.Path, name: str) -> Iterator[Record | UserError]:
    library = _library("pyarrow.parquet", "pyarrow", f"{name}: Parquet")
    yield from _padded_rows(parquet.rows(library, file, name), name)


def _array_record(file: epath.Path, name: str) -> Iterator[Record | UserError]:
    library = _library("array_record.python.array_record_module", "array_record", f"{name}: ArrayRecord")
    with cloud.local_copy(file) as local:
        reader = library.ArrayRecordReader(str(local))
        if not reader.ok():
            raise UserError(f"{name}: not readable as ArrayRecord; fetch or write it again")
        contents = reader.read_all() if reader.num_records() else []
        reader.close()
    for number, content in enumerate(contents, start=1):
        yield _object_of(content, f"{name}, row {number}")


def _object_of(content: bytes, place: str) -> Record | UserError:
    rule = "each record must be one JSON object in UTF-8 (prepared TFDS data sets are read by tfds:NAME/SPLIT)"
    try:
        return _object(content.decode(), place, rule)
    except UnicodeDecodeError:
        return UserError(f"{place}: not UTF-8; {rule}")


def _tfds(path: str, name: str) -> Iterator[Record | UserError]:
    library = _library("tensorflow_datasets", "tensorflow-datasets", path)
    dataset, _, split = path.removeprefix("tfds:").rpartition("/")
    if not (dataset and split):
        raise UserError(f"{path}: a TFDS name and split are written tfds:NAME/SPLIT, such as tfds:gsm8k/train")
    # Most builders of the library are not registered before their modules are imported.
    base = dataset.partition("/")[0].partition(":")[0]
    folder = Path(library.__file__).parent
    if base.isidentifier() and base not in library.list_builders(with_community_datasets=False):
        for place in sorted({*folder.glob(f"*/{base}"), *folder.glob(f"*/{base}.py")}):
            importlib.import_module(f"{library.__name__}.{place.parent.name}.{base}")
    try:
        with network.tfds():
            rows = library.data_source(dataset, split=split, builder_kwargs={"file_format": "array_record"})
    except network.Unreachable as error:
        raise UserError(
            f"{path}: not prepared on this machine, and {error}. On a machine with a network, fetch {error.url} (or the file "
            "of the split beside it) and name it here in place of tfds:, or have TFDS prepare it there and copy its folder "
            f"{base} into {library.core.constants.DATA_DIR}."
        ) from None
    except Exception as error:  # of many kinds: an unknown name or split, a download, a format without random access
        first = (str(error).strip().splitlines() or [""])[0]
        raise UserError(f"{path}: TFDS cannot give it ({type(error).__name__}: {first}); check name and network") from error
    yield from _rows(rows, name)


def _hf(path: str, name: str) -> Iterator[Record | UserError]:
    library = _library("datasets", "datasets", path)
    dataset, _, split = path.removeprefix("hf:").partition(":")
    owner_name, config = "/".join(dataset.split("/")[:2]), "/".join(dataset.split("/")[2:])
    reason = ""
    try:
        with network.hub() as reason:
            rows = library.load_dataset(owner_name, config or None, split=split or "train")
    except Exception as error:  # of many kinds: an unknown name, config or split, a download
        if reason:
            raise UserError(
                f"{path}: {reason}, and the cache of `datasets` does not hold it. On a machine with a network: hf download "
                f"{owner_name} --repo-type=dataset --local-dir=FOLDER; then name its files here in place of hf:."
            ) from None
        first = (str(error).strip().splitlines() or [""])[0]
        raise UserError(f"{path}: not to be had ({type(error).__name__}: {first}); check name, split and network") from error
    yield from _padded_rows(rows, name)


def _library(module: str, package: str, what: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(f"{what} is read by {package}, which is not here ({error}); pip install {package}") from error


_KINDS = {
    ".jsonl": _lines,
    ".json": _list,
    ".txt": _documents,
    ".parquet": _parquet,
    ".arrayrecord": _array_record,
    ".array_record": _array_record,
}
_KNOWN = ".jsonl (one object a line), .json (a list of them) or .txt (a document a line), maybe .gz; a .parquet or .arrayrecord"
