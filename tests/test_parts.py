"""Rows of parts: each has the tokens that it has alone, and those that say so are learned."""

import numpy as np
import pytest
from toy_tokenizers import byte_pairs, characters, learned

from jaxpost import tokenizer
from jaxpost.data import chat, encoding, formats, source
from jaxpost.data.readers import Record
from jaxpost.errors import UserError


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXPOST_CACHE", str(tmp_path / "cache"))


def row(*parts, **more) -> Record:
    return Record({"parts": [{"text": text, "learn": learn} for text, learn in parts], **more}, "d.jsonl, line 1")


def encoded(record, tokenizer, train_on="assistant"):
    return chat.encode(formats.demonstration(record), tokenizer, None, train_on)


def test_parts_by_hand():
    words = characters()
    one = encoded(row(("ab", False), ("c", True), ("d", False), ("ef", True)), words)
    assert learned(one, words) == "<s>ab⟦c⟧d⟦ef</s>⟧"
    one = encoded(row(("ab", True), ("c", False)), words)
    assert learned(one, words) == "<s>⟦ab⟧c</s>", "the end is learned where the last part is"
    everything = encoded(row(("ab", False), ("c", False)), words, "all")
    assert everything["mask"].tolist() == [False, True, True, True, True]
    alone = encoded(row(("ab", True)), characters(adds_bos=False))
    assert alone["mask"].tolist() == [False, True, True], "nothing precedes a first token"
    default = encoded(Record({"parts": [{"text": "a"}, {"text": "b", "learn": True}]}, "x"), words)
    assert learned(default, words) == "<s>a⟦b</s>⟧"
    assert formats.recognise(row(("a", True), text="whole")).text == "whole", "an older shape goes first"


def test_parts_keep_their_own_tokens():
    words = byte_pairs()
    texts = ["ab", "cab", "b"]
    alone = [words(text, add_special_tokens=False)["input_ids"] for text in texts]
    one = encoded(row(*((text, i % 2 == 1) for i, text in enumerate(texts))), words)
    ends = [i % 2 == 1 for i, ids in enumerate(alone) for _ in ids]
    start = len(one["tokens"]) - 1 - sum(map(len, alone))
    assert one["tokens"].tolist()[start:-1] == sum(alone, []) != words("".join(texts), add_special_tokens=False)["input_ids"]
    assert one["mask"].tolist()[max(start, 1) : -1] == ends[max(1 - start, 0) :] and not one["mask"][-1]


def test_parts_are_packed_with_other_rows():
    records = [row(("ab", False), ("c", True)), Record({"text": "de"}, "x"), Record({"prompt": "f", "completion": "g"}, "y")]
    data = encoding.encode_all(records, characters(), window=16)
    rows = source.rows(data.examples, data.lengths, 16, seed=0)
    assert len(rows) == 1 and int(rows[0]["mask"].sum()) == 2 + 3 + 2
    assert sorted(data.lengths.tolist()) == [4, 4, 5]
    again = encoding.encode_all(records, characters(), window=16)
    assert again.digest == data.digest and np.array_equal(again.lengths, data.lengths)


@pytest.mark.parametrize(
    "parts, message",
    [
        ([], "parts must be a list of objects"),
        ("ab", "parts must be a list of objects"),
        (["ab"], "line 1, part 1: has no text"),
        ([{"text": "a"}, {"text": ""}], "line 1, part 2: has no text"),
        ([{"text": "a", "learn": 1}], "part 1: has learn=1, which is neither true nor false"),
        ([{"text": "a", "lern": True}], "part 1: has a key 'lern', which nothing reads"),
        ([{"text": "a"}], "line 1: no token of it is trained on"),
    ],
)
def test_what_are_no_parts_is_refused(parts, message):
    with pytest.raises(UserError, match=message):
        encoding.encode_all([Record({"parts": parts}, "d.jsonl, line 1")], characters(), window=16)


def test_a_character_without_a_token_is_named():
    with pytest.raises(UserError, match="line 1: '2x': the tokenizer has no token for 'x'"):
        encoded(row(("1", False), ("2x", True)), tokenizer.characters("0123456789+"))
