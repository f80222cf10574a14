"""From encoded examples to batches: how rows are packed, and that a batch is a function of its number alone.

The number is the whole state of the data, so it must give the same rows to any number of processes, and after any resumption.
"""

import io
import json
import os
from pathlib import Path

import numpy as np
import pytest
import transformers
from toy_tokenizers import characters, conversation, learned

from jaxpost.data import chat, encoding, mixture, pack, readers, source
from jaxpost.data.examples import Example, Settings
from jaxpost.data.readers import Record
from jaxpost.data.row_types import demonstrations
from jaxpost.errors import UserError
from jaxpost.stages import datasets

SHARED = Path(__file__).parent.parent.parent / "shared"
STORIES = SHARED / "models" / "stories260k"
ALPACA = SHARED / "data" / "llamafactory" / "alpaca_en_demo.json"


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXPOST_CACHE", str(tmp_path / "cache"))


# ---- pack


def sample_lengths(count, window, seed=0):
    return np.clip(np.random.default_rng(seed).lognormal(3.0, 1.0, count), 1, window).astype(np.int32)


def test_plan_is_best_fit_decreasing():
    bins = pack.plan([4, 3, 6, 7, 2], 10, seed=0)
    assert [sorted(members.tolist()) for members in bins] == [[1, 3], [0, 2], [4]]


def test_plan_holds_every_example_once_and_fills_the_rows():
    lengths = sample_lengths(20_000, 512)
    bins = pack.plan(lengths, 512, seed=1)
    assert np.array_equal(np.sort(np.concatenate(bins)), np.arange(20_000))
    assert max(lengths[members].sum() for members in bins) <= 512
    assert len(bins) == -(-lengths.sum() // 512)


def test_plan_is_a_function_of_the_seed():
    lengths = [5] * 40
    once, again, other = (np.concatenate(pack.plan(lengths, 10, seed)).tolist() for seed in (3, 3, 4))
    assert once == again and once != other


@pytest.mark.parametrize("lengths", [[0, 1], [5]])
def test_plan_refuses_lengths_that_make_no_row(lengths):
    with pytest.raises(ValueError, match=r"lengths must lie in 1\.\.4"):
        pack.plan(lengths, 4, seed=0)


def item(*tokens, mask=None):
    return {"tokens": np.array(tokens, np.int32), "mask": np.array(mask or [True] * len(tokens), np.bool_)}


def test_packed_row_keeps_documents_apart():
    row = pack.pack([item(7, 8, 9), item(5, 6, mask=[False, True])], 7)
    assert {name: column.tolist() for name, column in row.items()} == {
        "tokens": [7, 8, 9, 5, 6, 0, 0],
        "mask": [False, True, True, False, True, False, False],
        "segments": [1, 1, 1, 2, 2, 0, 0],
        "positions": [0, 1, 2, 0, 1, 0, 0],
    }
    assert [column.dtype for column in row.values()] == [np.int32, np.bool_, np.int32, np.int32]
    assert {name: column.tolist() for name, column in pack.empty(2).items()} == dict.fromkeys(row, [0, 0])
    with pytest.raises(ValueError, match="2 examples of 5 tokens do not fit a window of 4"):
        pack.pack([item(7, 8, 9), item(5, 6)], 4)


def fit(row, window, too_long):
    """What `demonstrations.fit` makes of a row, as rows."""
    settings = Settings(None, None, "assistant", window, window, too_long, {}, False, frozenset())
    example = Example(np.zeros(0, np.int32), (row["tokens"],), (row["mask"],))
    return [demonstrations.lay_out(piece, settings) for piece in demonstrations.fit(example, settings, "p")]


def test_fit_refuses_cuts_or_drops_what_is_too_long():
    long = item(1, 2, 3, 4, mask=[False, False, True, True])
    (same,) = fit(long, 4, "error")
    assert same["tokens"] is long["tokens"] and same["mask"] is long["mask"]
    with pytest.raises(UserError, match=r'p: the example has 4 tokens and the window 3; make the window 4 or lon.*"truncate"'):
        fit(long, 3, "error")
    (cut,) = fit(long, 3, "truncate")
    assert cut["tokens"].tolist() == [1, 2, 3] and cut["mask"].tolist() == [False, False, True]
    assert fit(long, 2, "truncate") == [], "an example cut down to its prompt trains nothing"
    assert fit(long, 3, "drop") == []
    tokens = np.arange(8)
    pieces = fit({"tokens": tokens, "mask": np.array([0, 1, 1, 0, 0, 0, 1, 1], bool)}, 3, "split")
    assert [p["tokens"].tolist() for p in pieces] == [[0, 1, 2], [6, 7]], "the piece 3, 4, 5 trains nothing"
    assert [p["mask"].tolist() for p in pieces] == [[False, True, True], [False, True]]


# ---- source


def text_records(*texts):
    return [Record({"text": text}, f"t.jsonl, line {i}") for i, text in enumerate(texts, start=1)]


def test_encode_all_reports_what_it_kept():
    records = [
        Record({"prompt": "ab", "completion": "c"}, "a"),
        Record({"prompt": "ab", "completion": "cdef"}, "b"),
        Record({"prompt": "abcdef", "completion": "g"}, "c"),
    ]
    cut = encoding.encode_all(records, characters(), window=6, too_long="truncate")
    assert cut.report == {"count": 2, "dropped": 1, "truncated": 1, "split": 0, "skipped": 0, "tokens": 11, "trained_tokens": 5}
    assert cut.lengths.tolist() == [5, 6]
    assert [learned(cut.examples[i], characters()) for i in range(2)] == ["<s>ab⟦c</s>⟧", "<s>ab⟦cde⟧"]
    dropped = encoding.encode_all(records, characters(), window=6, too_long="drop")
    assert dropped.report == {
        "count": 1,
        "dropped": 2,
        "truncated": 0,
        "split": 0,
        "skipped": 0,
        "tokens": 5,
        "trained_tokens": 2,
    }
    pieces = encoding.encode_all(records, characters(), window=6, too_long="split")
    assert pieces.report == {
        "count": 4,
        "dropped": 0,
        "truncated": 0,
        "split": 2,
        "skipped": 0,
        "tokens": 16,
        "trained_tokens": 8,
    }
    with pytest.raises(UserError, match="b: the example has 8 tokens and the window 6"):
        encoding.encode_all(records, characters(), window=6)
    with pytest.raises(UserError, match="none of the 3 examples has something to learn within a window of 2 .*needs 5"):
        encoding.encode_all(records, characters(), window=2, too_long="drop")
    with pytest.raises(UserError, match="too_long='cut' is not known; choose one of error, truncate, split, drop"):
        encoding.encode_all(records, characters(), window=6, too_long="cut")
    with pytest.raises(UserError, match="^train_on='lst' is not known; choose one of assistant, last, completion, all$"):
        encoding.encode_all(records, characters(), None, "lst", window=6, bad_rows="skip")


def test_an_example_that_trains_nothing_is_refused():
    record = Record({"messages": conversation("a", "b")}, "m.json, row 4")
    with pytest.raises(
        UserError, match="m.json, row 4, message 1: the chat template leaves out what the user says; use another"
    ):
        encoding.encode_all([record], characters(), "{{ eos_token }}", "all", window=9)
    marked = Record({"messages": [m | {"weight": 0} for m in conversation("a", "b")]}, "m.json, row 5")
    with pytest.raises(
        UserError, match="m.json, row 5: no token of it is trained on; every answer of it is marked as not to be"
    ):
        encoding.encode_all([marked], characters(), window=9)


def test_a_second_start_does_not_tokenise(monkeypatch):
    records = text_records("ab", "cdefg", "h")
    calls = []
    encode = chat.encode
    monkeypatch.setattr(chat, "encode", lambda *given: calls.append(given[0].place) or encode(*given))
    first = encoding.encode_all(records, characters(), window=5, too_long="truncate")
    assert calls == ["t.jsonl, line 1", "t.jsonl, line 2", "t.jsonl, line 3"]
    second = encoding.encode_all(records, characters(), window=5, too_long="truncate")
    assert len(calls) == 3
    assert second.lengths.tolist() == first.lengths.tolist() == [4, 5, 3] and second.report == first.report
    assert learned(second.examples[1], characters()) == "<s>⟦cdef⟧" and calls[3:] == []


def test_the_cache_is_missed_when_anything_that_matters_changes(tmp_path):
    def files():
        return len(list((tmp_path / "cache").iterdir()))

    base = {"records": text_records("ab"), "tokenizer": characters(), "window": 9}
    changes = [
        {},
        {"records": text_records("ac")},
        {"tokenizer": characters(adds_bos=False)},
        {"tokenizer": characters(eos_token="<unk>", pad_token="</s>")},
        {"template": "chatml"},
        {"train_on": "all"},
        {"window": 8},
        {"too_long": "drop"},
        {"columns": {"text": "text"}},
        {"bad_rows": "skip"},
    ]
    for number, change in enumerate(changes, start=1):
        encoding.encode_all(**(base | change))
        assert files() == number, change
    encoding.encode_all(**(base | {"records": [Record({"text": "ab"}, "elsewhere.json, row 5")]}))
    assert files() == len(changes), "the place of a row is no part of its length"


def test_a_broken_cache_file_or_folder_does_no_harm(tmp_path, monkeypatch):
    lengths = encoding.encode_all(text_records("ab", "c"), characters(), window=9).lengths
    (file,) = (tmp_path / "cache").iterdir()
    other = io.BytesIO()
    np.save(other, np.ones((5, 3), np.int32))
    for content in (b"", b"rubbish", file.read_bytes()[:-4], other.getvalue()):
        file.write_bytes(content)
        assert encoding.encode_all(text_records("ab", "c"), characters(), window=9).lengths.tolist() == lengths.tolist()
    monkeypatch.setenv("JAXPOST_CACHE", str(file / "below a file"))
    assert encoding.encode_all(text_records("ab", "c"), characters(), window=9).lengths.tolist() == [4, 3]


def test_split_is_disjoint_and_a_function_of_the_seed():
    for held_out, count in ((3, 3), (0.25, 5), (0.001, 1), (0, 0), (0.0, 0)):
        train, held = source.split(20, held_out, seed=1)
        assert len(held) == count and sorted([*train, *held]) == list(range(20))
    assert source.split(20, 5, 1)[1].tolist() == source.split(20, 5, 1)[1].tolist() != source.split(20, 5, 2)[1].tolist()
    for held_out in (20, -1, 1.0):
        with pytest.raises(UserError, match=f"held_out={held_out} of 20 examples leaves none to train on; give a number"):
            source.split(20, held_out, seed=1)
    with pytest.raises(UserError, match="held_out=1.5: more than 1 is a number of examples, so give a whole one, or a share"):
        source.split(20, 1.5, seed=1)
    with pytest.raises(UserError, match="held_out=0.5 of 1 examples leaves none to train on; give 0, or name eval_data"):
        source.split(1, 0.5, seed=1)


def numbered(count, window=3):
    """Rows of one example each, whose first token says which example it is, from 1."""
    return source.rows([item(i + 1, 99) for i in range(count)], [2] * count, window, packing=False, seed=0)


def firsts(batch):
    return batch["tokens"][:, 0].tolist()


def drain(batches):
    found = []
    while True:
        try:
            found.append(batches())
        except StopIteration:
            return found


def test_rows_pack_by_plan_or_one_example_a_row():
    examples = [item(1, 9), item(2, 9, 9), item(3)]
    packed = source.rows(examples, [2, 3, 1], 4, seed=0)
    assert [packed[i]["tokens"].tolist() for i in range(len(packed))] == [[2, 9, 9, 3], [1, 9, 0, 0]]
    assert packed[0]["segments"].tolist() == [1, 1, 1, 2]
    single = source.rows(examples, [2, 3, 1], 4, packing=False, seed=0)
    assert [single[i]["tokens"].tolist() for i in range(len(single))] == [[1, 9, 0, 0], [2, 9, 9, 0], [3, 0, 0, 0]]


def test_epochs_differ_in_order_and_not_in_content():
    batches = source.Batches(numbered(10), 5, seed=0, epochs=3)
    assert len(batches) == 6
    order = [first for batch in drain(batches) for first in firsts(batch)]
    epochs = [order[:10], order[10:20], order[20:]]
    assert all(sorted(epoch) == list(range(1, 11)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    assert epochs[0] != sorted(epochs[0])


def test_one_seed_is_not_another_an_epoch_later():
    first, second = (
        [first for batch in drain(source.Batches(numbered(30), 30, seed=seed, epochs=3)) for first in firsts(batch)]
        for seed in (0, 1)
    )
    assert first[30:60] != second[:30] and first[60:] != second[30:60]


def test_batches_run_on_over_epochs_and_only_the_very_last_is_padded():
    batches = source.Batches(numbered(5), 4, seed=0, shuffle=False, epochs=2)
    found = drain(batches)
    assert [firsts(batch) for batch in found] == [[1, 2, 3, 4], [5, 1, 2, 3], [4, 5, 0, 0]] and len(batches) == 3
    assert {column.shape for batch in found for column in batch.values()} == {(4, 3)}
    assert not any(column[2:].any() for column in found[-1].values())
    assert found[-1]["segments"][:2].tolist() == [[1, 1, 0]] * 2


@pytest.mark.parametrize("processes", [2, 4])
def test_any_number_of_processes_sees_the_same_batches(processes):
    whole = drain(source.Batches(numbered(11), 8, seed=5, epochs=3))
    share = 8 // processes
    parts = [
        drain(source.Batches(numbered(11), 8, seed=5, epochs=3, local=(i * share, (i + 1) * share))) for i in range(processes)
    ]
    assert [len(part) for part in parts] == [len(whole)] * processes == [5] * processes
    for number, batch in enumerate(whole):
        for name, column in batch.items():
            assert np.array_equal(np.concatenate([part[number][name] for part in parts]), column)
    assert firsts(whole[-1])[1:] == [0] * 7, "the last process has nothing but padding at the end, and still its shape"


@pytest.mark.parametrize("epochs", [4, None])
def test_resuming_at_any_position_continues_the_run(epochs):
    uninterrupted = source.Batches(numbered(7), 4, seed=2, epochs=epochs)
    expected = []
    for number in range(7):
        assert uninterrupted.position == number
        expected.append(firsts(uninterrupted()))
    for position in range(7):
        resumed = source.Batches(numbered(7), 4, seed=2, epochs=epochs)
        resumed.position = position
        assert [firsts(resumed()) for _ in range(position, 7)] == expected[position:] and resumed.position == 7
    uninterrupted.position = 2
    assert firsts(uninterrupted()) == expected[2], "going back discards what was prefetched"


def test_resuming_does_not_replay():
    asked = []

    class Watched(list):
        def __getitem__(self, index):
            asked.append(index)
            return super().__getitem__(index)

    rows = source.rows(Watched([item(i + 1, 9) for i in range(100)]), [2] * 100, 2, packing=False, seed=0)
    batches = source.Batches(rows, 1, seed=0, shuffle=False, epochs=1)
    batches.position = 95
    assert [firsts(batch) for batch in drain(batches)] == [[96], [97], [98], [99], [100]]
    assert sorted(asked) == [95, 96, 97, 98, 99]


def test_endless_batches_have_no_length_and_bad_sizes_are_refused():
    endless = source.Batches(numbered(3), 2, seed=0)
    with pytest.raises(TypeError, match="give epochs a number"):
        len(endless)
    assert [len(firsts(endless())) for _ in range(20)] == [2] * 20
    cases = [
        (lambda: source.Batches(numbered(0), 2, seed=0), "no rows to make batches of; give at least one example"),
        (lambda: source.Batches(numbered(3), 0, seed=0), "batch_size=0 has no rows 0 to 0; make it 1 or more for each process"),
        (lambda: source.Batches(numbered(3), 2, seed=0, local=(1, 3)), "batch_size=2 has no rows 1 to 3"),
        (lambda: source.Batches(numbered(3), 2, seed=0, epochs=0), "epochs=0 is not a number of passes; give 1 or more"),
        (lambda: setattr(source.Batches(numbered(3), 2, seed=0, epochs=1), "position", 3), "batch 3 of data with 2 batches"),
        (lambda: setattr(endless, "position", -1), "after batch -1 of data with no end"),
    ]
    for call, message in cases:
        with pytest.raises(UserError) as error:
            call()
        assert message in str(error.value)


def test_a_file_becomes_the_same_batches_whether_or_not_lengths_are_cached(tmp_path):
    rows = [{"prompt": "a" * (i % 5), "completion": "b" * (1 + i % 7)} for i in range(30)]
    (tmp_path / "d.jsonl").write_text("\n".join(map(json.dumps, rows)))
    records = readers.read(str(tmp_path / "d.jsonl"))
    runs = []
    for _ in range(2):
        encoded = encoding.encode_all(records, characters(), window=16)
        batches = source.Batches(source.rows(encoded.examples, encoded.lengths, 16, seed=1), 4, seed=1, epochs=2)
        runs.append(drain(batches))
        assert sum(int(batch["mask"].sum()) for batch in runs[-1]) == 2 * encoded.report["trained_tokens"]
    for one, other in zip(*runs, strict=True):
        assert all(np.array_equal(one[name], other[name]) for name in one)


@pytest.mark.skipif(not (STORIES.exists() and ALPACA.exists()), reason="the shared model and data are not here")
def test_alpaca_with_the_stories_tokenizer():
    tokenizer = transformers.AutoTokenizer.from_pretrained(os.fspath(STORIES))
    records = readers.read(str(ALPACA))
    encoded = encoding.encode_all(records, tokenizer, window=4096)
    assert encoded.report["count"] == len(records) == 999
    second = encoded.examples[1]
    question = "<s> Transform the following sentence using a synonym: The car sped quickly.\n"
    assert learned(second, tokenizer) == question + "⟦The car accelerated rapidly.</s>⟧"
    for i in range(0, 999, 50):
        example = encoded.examples[i]
        answer = tokenizer.decode(example["tokens"][example["mask"]].tolist(), clean_up_tokenization_spaces=False)
        assert answer == records[i].row["output"] + "</s>"
        assert (example["tokens"] == tokenizer.bos_token_id).sum() == 1
    assert encoded.lengths.sum() / (4096 * len(pack.plan(encoded.lengths, 4096, 0))) > 0.95


@pytest.mark.parametrize("too_long, learned_window", [("truncate", 9), ("split", 9), ("truncate", 60)])
def test_much_that_is_cut_off_for_its_length_is_warned_of_with_the_remedy(capsys, too_long, learned_window):
    records = text_records(*["ab"] * 7, *["c" * n for n in range(10, 52)])
    encoded = encoding.encode_all(records, characters(), window=learned_window, too_long=too_long)
    mixture.report("data d.txt", mixture.Part("d.txt", None, [], []), encoded, 1, learned_window, 100)
    printed = capsys.readouterr().err
    assert ("warning" in printed) == ((too_long, learned_window) == ("truncate", 9))
    if "warning" in printed:
        assert encoded.lost == sum(n + 1 for n in range(10, 52)) - 42 * 8 == 987
        assert (
            "warning: data d.txt: 987 of 1,344 tokens to be learned are cut off, being beyond a window of 9; "
            "--config.window=53 holds the longest, and --config.too_long=split makes pieces of plain text"
        ) in printed


def test_much_that_is_dropped_for_its_length_is_warned_of_with_the_remedy(capsys):
    records = text_records(*["ab"] * 7, *["c" * n for n in range(10, 52)])
    encoded = encoding.encode_all(records, characters(), window=9, too_long="drop")
    part = mixture.Part("d.txt", None, [], [])
    mixture.report("data d.txt", part, encoded, 1, 9, 100)
    printed = capsys.readouterr().err
    assert (
        "warning: data d.txt: 42 of 49 examples are dropped, being too long for a window of 9; --config.window=53 hold"
        in printed
    )
    assert "--config.too_long=truncate" in printed
    assert encoding.encode_all(records, characters(), window=53, too_long="drop").report["dropped"] == 0
    mixture.report("data d.txt", part, encoded, 1, 9, 20)
    assert "the longest needs a window of 53, and the model takes documents of 20" in capsys.readouterr().err
    few = encoding.encode_all(text_records(*["ab"] * 40, "c" * 10), characters(), window=9, too_long="drop")
    mixture.report("data d.txt", part, few, 1, 9, 100)
    assert few.report["dropped"] == 1 and "warning" not in capsys.readouterr().err


def test_the_example_that_is_shown_has_a_tool_call_where_there_are_some():
    call = {"role": "assistant", "content": "", "tool_calls": [{"name": "f", "arguments": {"x": 1}}]}
    rows = [conversation("a", "b"), [*conversation("a" * 99), call], [*conversation("c"), call]]
    records = [Record({"messages": row}, f"p{i}") for i, row in enumerate(rows)]
    encoded = encoding.encode_all(records, characters(), window=99, too_long="drop")
    plain = encoding.encode_all(records[:1], characters(), window=99)
    sets = [datasets.Set(name, 1.0, one, False) for name, one in (("plain", plain), ("calls", encoded))]
    (document,) = datasets.shown(sets)
    assert learned(document, characters()) == '<s>c\n⟦<tool_call>{"name": "f", "arguments": {"x": 1}}</tool_call></s>⟧'
    assert learned(datasets.shown(sets[:1])[0], characters()) == "<s>a\n⟦b</s>⟧"
