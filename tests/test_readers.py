"""From anything that holds rows to records with their place: files of every kind, folders, patterns, lists, TFDS, the hub.

Whatever is wrong is said with file, place and remedy, and no row is lost on the way without a word.
"""

import gzip
import json
import os
import sys
import types

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from jaxpost.data import formats, readers
from jaxpost.data.readers import Record
from jaxpost.errors import UserError
from jaxpost.storage import network

ROWS = [{"text": "é"}, {"text": "b"}]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)


def write(folder, name, content):
    file = folder / name
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(file)


def array_record(folder, name, contents):
    from array_record.python.array_record_module import ArrayRecordWriter

    writer = ArrayRecordWriter(str(folder / name), "group_size:1")
    for content in contents:
        writer.write(content)
    writer.close()
    return str(folder / name)


def parquet(folder, name, rows):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / name)
    return str(folder / name)


def test_read_keeps_the_place_of_every_row(tmp_path):
    lines = write(tmp_path, "x.jsonl", '\ufeff{"text": "a\u2028b"}\r\n\n{"text": "c"}\n')
    assert readers.read(lines) == [Record({"text": "a\u2028b"}, "x.jsonl, line 1"), Record({"text": "c"}, "x.jsonl, line 3")]
    rows = write(tmp_path, "x.json", '[{"text": "a"}, {"text": "b"}]')
    assert readers.read(rows) == [Record({"text": "a"}, "x.json, row 1"), Record({"text": "b"}, "x.json, row 2")]
    text = write(tmp_path, "x.txt", "a\n\n  b c \r\n")
    assert readers.read(text) == [Record({"text": "a"}, "x.txt, line 1"), Record({"text": "b c"}, "x.txt, line 3")]


def test_every_kind_of_file_gives_the_same_rows(tmp_path):
    files = [
        write(tmp_path, "a.jsonl", LINES),
        write(tmp_path, "a.json", json.dumps(ROWS)),
        write(tmp_path, "a.txt", "é\nb\n"),
        write(tmp_path, "a.jsonl.gz", gzip.compress(LINES.encode())),
        write(tmp_path, "A.JSON.GZ", gzip.compress(json.dumps(ROWS).encode())),
        write(tmp_path, "a.txt.gz", gzip.compress("é\nb".encode())),
        parquet(tmp_path, "a.parquet", ROWS),
        array_record(tmp_path, "a.arrayrecord", [json.dumps(row).encode() for row in ROWS]),
        array_record(tmp_path, "a.array_record", [json.dumps(row).encode() for row in ROWS]),
    ]
    for file in files:
        assert [record.row for record in readers.read(file)] == ROWS, file
    assert [r.place for r in readers.read(files[6])] == ["a.parquet, row 1", "a.parquet, row 2"]
    assert readers.read(files[7])[1].place == "a.arrayrecord, row 2"


def test_parquet_gives_nested_columns_and_decodes_bytes(tmp_path):
    rows = [
        {"messages": [{"role": "user", "content": "q"}], "raw": "é".encode(), "n": 1},
        {"messages": None, "raw": None, "n": 2},
    ]
    decoded = [rows[0] | {"raw": "é"}, rows[1]]
    assert [record.row for record in readers.read(parquet(tmp_path, "a.parquet", rows))] == decoded


def test_columns_that_nothing_reads_may_be_binary_or_odd(tmp_path):
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    far = pyarrow.array([10**7], pyarrow.date32())  # no date of Python's
    table = pyarrow.table({"messages": [turns], "image": [b"\xff\xd8"], "boxes": [[{"png": b"\x89"}]], "date": far})
    pyarrow.parquet.write_table(table, tmp_path / "odd.parquet")
    (record,) = readers.read(str(tmp_path / "odd.parquet"))
    assert formats.recognise(record).messages == turns
    for row in ({"text": b"\xff"}, {"messages": [turns[0], turns[1] | {"content": b"\xff"}]}):
        (record,) = readers.read(parquet(tmp_path, "b.parquet", [row]))
        with pytest.raises(UserError, match=r"b.parquet, row 1.* is bytes that are no UTF-8; only text can be learned"):
            formats.recognise(record)


def test_nulls_that_parquet_adds_reach_no_call_and_no_definition(tmp_path):
    properties = [{"city": {"type": "string"}}, {"day": {"type": "string", "enum": ["now"]}}]
    tools = [{"name": f"f{i}", "parameters": {"type": "object", "properties": p}} for i, p in enumerate(properties)]
    calls = [{"function": {"name": f"f{i}", "arguments": a}} for i, a in enumerate([{"city": "Oslo"}, {"day": "now"}, {}])]
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "", "tool_calls": calls}]
    (record,) = readers.read(parquet(tmp_path, "calls.parquet", [{"messages": turns, "tools": tools}]))
    example = formats.recognise(record)
    assert [tool["function"] for tool in example.tools] == tools
    assert [call["function"]["arguments"] for call in example.messages[1]["tool_calls"]] == [
        {"city": "Oslo"},
        {"day": "now"},
        {},
    ]
    written = {"messages": [turns[0], turns[1] | {"tool_calls": [{"name": "f", "arguments": {"x": None}}]}]}
    file = write(tmp_path, "own.jsonl", json.dumps(written))
    (call,) = formats.recognise(readers.read(file)[0]).messages[1]["tool_calls"]
    assert call["function"]["arguments"] == {"x": None}, "a null that the row itself writes stays"


def test_folders_patterns_and_lists_are_read_in_order(tmp_path):
    for name in ("b.jsonl", "a.jsonl", "deep/c.jsonl"):
        write(tmp_path, name, json.dumps({"text": name}))
    write(tmp_path, "readme.md", "no data")
    (tmp_path / "z.json").mkdir()

    def places(path):
        return [record.place for record in readers.read(path)]

    assert places(str(tmp_path)) == places(f"{tmp_path}/*.jsonl") == ["a.jsonl, line 1", "b.jsonl, line 1"]
    assert places(f"{tmp_path}/*/[ac].jsonl") == ["deep/c.jsonl, line 1"]
    assert places([f"{tmp_path}/b.jsonl", f"{tmp_path}/deep"]) == ["b.jsonl, line 1", "c.jsonl, line 1"]
    write(tmp_path, "deep/a.jsonl", json.dumps({"text": "x"}))
    both = [f"{tmp_path}/a.jsonl", f"{tmp_path}/deep/a.jsonl"]
    assert places(both) == [f"{path}, line 1" for path in both], "two files of one name are told apart by their paths"
    bracket = write(tmp_path, "x[1].jsonl", LINES)
    assert len(places(bracket)) == 2, "a file that exists is no pattern"


@pytest.mark.parametrize(
    ("name", "text", "parts"),
    [
        ("a.csv", "x", ["a.csv: not readable", "give a .jsonl"]),
        ("a.parquet.gz", "x", ["a.parquet.gz: not readable"]),
        ("a.jsonl", "\n \n", ["a.jsonl: no rows", "at least one"]),
        ("a.json", " ", ["a.json: no rows"]),
        ("a.json", "[]", ["a.json: no rows"]),
        ("a.txt", "\n", ["a.txt: no rows"]),
        ("a.json", '[{"a": 1},\n {"a" 2}]', ["a.json, line 2, column 7", "mend"]),
        ("a.json", '{"a": 1}\n{"a": 2}', ["a.json, line 2, column 1", "name the file .jsonl"]),
        ("a.json", '{"a": 1}', ["a.json: the top level is a dict", "write the rows as"]),
        ("a.json", '[{"a": 1}, 3]', ["a.json, row 2: a int, not an object"]),
        ("a.json", "[" * 100_000, ["a.json: broken JSON", "mend"]),
        ("a.jsonl", '{"a": 1}\n{"a": }', ["a.jsonl, line 2, column 7", "each line"]),
        ("a.jsonl", '{"a": ' + "[" * 100_000, ["a.jsonl, line 1: broken JSON", "each line"]),
        ("a.jsonl", '{"a": ' + "9" * 5000 + "}", ["a.jsonl, line 1: broken JSON", "each line"]),
        ("a.jsonl", '{"a": 1}\n[1]', ["a.jsonl, line 2: a list, not an object"]),
        ("a.jsonl", b'{"a": "\xff"}', ["a.jsonl: not UTF-8 at byte 7", "save"]),
        ("a.jsonl.gz", "plain", ["a.jsonl.gz: broken gzip", "compress it again"]),
        ("a.jsonl.gz", gzip.compress(b"{}" * 100, mtime=0)[:-9], ["a.jsonl.gz: broken gzip"]),
        ("a.parquet", "x" * 50, ["a.parquet: not readable as Parquet", "again"]),
        ("a.arrayrecord", "x" * 50, ["a.arrayrecord: not readable as ArrayRecord", "again"]),
    ],
)
def test_read_says_what_is_wrong_and_where(tmp_path, name, text, parts):
    with pytest.raises(UserError) as error:
        readers.read(write(tmp_path, name, text))
    assert all(part in str(error.value) for part in parts), str(error.value)


def test_read_refuses_what_is_not_there(tmp_path):
    write(tmp_path, "empty/readme.md", "no data")
    cases = [
        (f"{tmp_path}/gone.json", "gone.json: no such file; check the path"),
        (f"{tmp_path}/empty", "empty: a folder without data in it; name a .jsonl"),
        (f"{tmp_path}/x*.jsonl", r"x\*.jsonl: no data matches it; name a .jsonl"),
        (f"{tmp_path}/**/a.jsonl", r"a.jsonl: \*\* goes into every folder below, .*write \*/ for each"),
        ([], "no rows in it; it names no file"),
        ([write(tmp_path, "a.jsonl", LINES), write(tmp_path, "b.jsonl", "")], "b.jsonl: no rows in it"),
        ("tfds:train", "tfds:train: .* written tfds:NAME/SPLIT"),
    ]
    for path, message in cases:
        with pytest.raises(UserError, match=message):
            readers.read(path)


def test_array_records_of_another_kind_are_refused(tmp_path):
    file = array_record(tmp_path, "a.arrayrecord", [b'{"text": "a"}', b"\x0a\xff"])
    with pytest.raises(UserError, match="a.arrayrecord, row 2: not UTF-8; each record must be one JSON object .*tfds:NAME"):
        readers.read(file)


def test_bad_rows_are_left_out_and_told_where_that_is_asked(tmp_path):
    file = write(tmp_path, "a.jsonl", '{"text": "a"}\n{"text"\n7\n{"text": "b"}\n')
    bad = []
    assert [record.place for record in readers.read(file, bad)] == ["a.jsonl, line 1", "a.jsonl, line 4"]
    assert [message[:15] for message in bad] == ["a.jsonl, line 2", "a.jsonl, line 3"]
    worse = write(tmp_path, "b.jsonl", "1\n2\n")
    assert len(readers.read([file, worse], [])) == 2
    with pytest.raises(
        UserError, match="no rows in it; none of its 2 rows can be read, the first because: b.jsonl, line 1: a int"
    ):
        readers.read(worse, [])


class NoTensorFlow:
    """An importer that has no TensorFlow to give, whatever is installed."""

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "tensorflow":
            raise ModuleNotFoundError(f"{name} was asked for")


def test_tfds_by_name_and_split_without_tensorflow(tmp_path, monkeypatch):
    import tensorflow_datasets as tfds

    class Pairs(tfds.core.GeneratorBasedBuilder):
        """Three questions, defined here: nothing is downloaded."""

        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            columns = {"question": tfds.features.Text(), "answer": tfds.features.Text(), "n": np.int64}
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(columns))

        def _split_generators(self, _):
            return {"train": self._generate_examples(3), "test": self._generate_examples(1)}

        def _generate_examples(self, count):
            yield from ((i, {"question": f"é{i}", "answer": str(i), "n": i}) for i in range(count))

    monkeypatch.setattr(tfds.core.constants, "DATA_DIR", str(tmp_path))
    monkeypatch.setattr(sys, "meta_path", [NoTensorFlow(), *sys.meta_path])
    found = readers.read("tfds:pairs/train")
    assert sorted(record.row["n"] for record in found) == [0, 1, 2]
    assert all(r.row == {"question": f"é{r.row['n']}", "answer": str(r.row["n"]), "n": r.row["n"]} for r in found)
    assert found[1].place == "tfds:pairs/train, row 2"
    assert len(readers.read("tfds:pairs/train[:2]")) == 2 and len(readers.read("tfds:pairs:1.0.0/test")) == 1
    assert any(tmp_path.rglob("*pairs*")), "prepared in the test's own folder"
    with pytest.raises(UserError, match=r"tfds:pairs/dev: TFDS cannot give it \(ValueError: Unknown split 'dev'"):
        readers.read("tfds:pairs/dev")
    with pytest.raises(UserError, match="tfds:nonesuch/train: TFDS cannot give it .*check name and network"):
        readers.read("tfds:nonesuch/train")


def test_the_hub_by_name_where_datasets_is_installed(monkeypatch):
    asked = []

    def load_dataset(*given, **options):
        asked.append((*given, options))
        if given[0] == "o/broken":
            raise OSError("no network\nmore")
        return [{"text": "a", "raw": b"b"}]

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    monkeypatch.setattr(network, "fault", lambda url: "")
    assert readers.read("hf:o/n/main:test[:3]") == [Record({"text": "a", "raw": "b"}, "hf:o/n/main:test[:3], row 1")]
    readers.read(["hf:o/n", "hf:n"])
    assert asked == [
        ("o/n", "main", {"split": "test[:3]"}),
        ("o/n", None, {"split": "train"}),
        ("n", None, {"split": "train"}),
    ]
    with pytest.raises(UserError, match=r"hf:o/broken: not to be had \(OSError: no network\); check name"):
        readers.read("hf:o/broken")
    monkeypatch.setattr(network, "fault", lambda url: "the hub cannot be reached (refused)")
    with pytest.raises(
        UserError, match=r"hf:o/broken: the hub cannot be reached \(refused\), .*hf download o/broken --repo-type"
    ):
        readers.read("hf:o/broken")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"hf:o/n is read by datasets, which is not here .*pip install datasets"):
        readers.read("hf:o/n")


def test_what_would_fill_the_memory_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(readers.host, "memory", lambda: 4_000_000)
    (tmp_path / "bomb.jsonl.gz").write_bytes(gzip.compress(b" " * 10_000_000))
    (tmp_path / "large.txt").write_text("a" * 1_000_001)
    (tmp_path / "right.txt.gz").write_bytes(gzip.compress(b"a" * 1_000_000))
    with pytest.raises(UserError, match="bomb.jsonl.gz: unpacks to more than 1,000,000 bytes, a quarter of the memory"):
        readers.read(str(tmp_path / "bomb.jsonl.gz"))
    with pytest.raises(UserError, match="large.txt: larger than 1,000,000 bytes, a quarter of the memory; cut it"):
        readers.read(str(tmp_path / "large.txt"))
    assert len(readers.read(str(tmp_path / "right.txt.gz"))[0].row["text"]) == 1_000_000


BOMBS = {
    # A value that stands in the file once: 3 MB and 300 times as much; as a column, in a list, in a structure.
    "dictionary": [{"text": "x" * 10_000}] * 300,
    "list": [{"text": ["x" * 10_000] * 300}],
    "structure": [{"messages": [{"role": "user", "content": "x" * 10_000}] * 300}],
    "pages": [{"text": "x" * 3_000_000}],
    "lengths": [{"bits": [True] * 200_000}],
    "nulls": [{"bits": None}] * 130_000,
}


@pytest.mark.parametrize("kind", BOMBS)
def test_a_small_parquet_file_that_stands_for_much_is_refused(tmp_path, monkeypatch, kind):
    path, schema = tmp_path / "bomb.parquet", None
    if kind == "nulls":
        schema = pyarrow.schema([("bits", pyarrow.bool_())])
    table = pyarrow.Table.from_pylist(BOMBS[kind], schema)
    pyarrow.parquet.write_table(table, path, compression="zstd")
    assert path.stat().st_size < 40_000
    monkeypatch.setattr(readers.host, "memory", lambda: 4_000_000)
    with pytest.raises(UserError, match="bomb.parquet: unpacks to more than 1,000,000 bytes, a quarter of the memory, from"):
        readers.read(str(path))


def test_parquet_of_many_kinds_and_groups_is_read_whole(tmp_path):
    kinds = {
        "plain": (pyarrow.string(), [f"é{i}" for i in range(9)]),
        "large": (pyarrow.large_list(pyarrow.large_string()), [["a", None], [], None] * 3),
        "bytes": (pyarrow.binary(), [b"\xff", b"a", None] * 3),
        "map": (pyarrow.map_(pyarrow.string(), pyarrow.int32()), [[("k", 1)], [], None] * 3),
        "dictionary": (pyarrow.dictionary(pyarrow.int8(), pyarrow.string()), ["a", "b", None] * 3),
        "a.b": (pyarrow.struct([("c", pyarrow.list_(pyarrow.string(), 1))]), [{"c": ["x"]}] * 9),
        "number": (pyarrow.float32(), [0.5, None, -1.0] * 3),
    }
    table = pyarrow.table({name: pyarrow.array(values, kind) for name, (kind, values) in kinds.items()})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=4)
    plain = [readers._plain(row) for row in table.to_pylist()]
    assert [record.row for record in readers.read(str(tmp_path / "a.parquet"))] == [
        {column: readers._without_nulls(value) for column, value in row.items()} for row in plain
    ]


@pytest.mark.parametrize("name", ["data.jsonl", "data.json.gz", "data.parquet"])
@pytest.mark.parametrize("given", ["file", "folder", "pattern"])
def test_a_pipe_is_no_file(tmp_path, name, given):
    os.mkfifo(tmp_path / name)
    path = {"file": tmp_path / name, "folder": tmp_path, "pattern": tmp_path / "d*"}[given]
    with pytest.raises(UserError, match=f"{name}: a pipe, a socket or a device, not a file; write its content to a file"):
        readers.read(str(path))
