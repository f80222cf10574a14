"""In-context episodes: which demonstrations a row gets, never itself, and what is learned of what comes out."""

import json
import math

import numpy as np
import pytest
from test_pairs import PLAIN
from toy_tokenizers import characters, conversation, learned

import jaxpost
from jaxpost import recipe
from jaxpost.data import encoding
from jaxpost.data.readers import Record
from jaxpost.data.transforms import apply, episodes
from jaxpost.errors import UserError

KEY = apply.key_of(3)
ROWS = [{"prompt": f"q{i % 7}", "completion": f"a{i}", "task": "xy"[i % 2], "n": i} for i in range(14)]


def parts(row) -> list[str]:
    return row["prompt"].split("\n\n")


def test_demonstrations_are_drawn_from_other_rows():
    shown_rows = episodes.random(ROWS, {}, KEY, k=3)
    answers = {f"{row['prompt']}{row['completion']}": row for row in ROWS}
    counts = dict.fromkeys(answers, 0)
    for row, own in zip(shown_rows, ROWS, strict=True):
        *shown, last = parts(row)
        assert (last, row["completion"], row["n"]) == (own["prompt"], own["completion"], own["n"]) and len(set(shown)) == 3
        for text in shown:
            assert answers[text]["prompt"] != own["prompt"], "never the row itself, nor its prompt"
            counts[text] += 1
    assert sum(counts.values()) == 42 and max(counts.values()) < 14
    assert shown_rows == episodes.random(ROWS, {}, KEY, k=3) != episodes.random(ROWS, {}, apply.key_of(4), k=3)
    for row, own in zip(episodes.random(ROWS, {}, KEY, k=3, same="task"), ROWS, strict=True):
        assert all(answers[text]["task"] == own["task"] for text in parts(row)[:-1])


def test_fewer_others_give_fewer_demonstrations_and_are_counted(capsys):
    shown_rows = episodes.random(ROWS[:2], {}, KEY, k=3)
    assert [parts(row) for row in shown_rows] == [["q1a1", "q0"], ["q0a0", "q1"]]
    assert "2 of 2 rows have fewer than 3 demonstrations" in capsys.readouterr().err
    assert episodes.random(ROWS[:1], {}, KEY, k=1)[0]["prompt"] == "q0"


def test_the_nearest_by_vectors_stand_last():
    vectors = np.array([[1.0, 0], [2, 0.2], [1, 1], [0, 1], [-1, 0]])
    rows = [{"prompt": f"q{i}", "completion": f"a{i}"} for i in range(5)]
    shown_rows = episodes.nearest(rows, {"v": vectors}, KEY, k=2, column="v", between="|")
    assert (
        shown_rows[0]["prompt"] == "q2a2|q1a1|q0"
        and shown_rows[3]["prompt"] in ("q1a1|q2a2|q3",)
        and shown_rows[4]["prompt"] == "q2a2|q3a3|q4"
    )
    with pytest.raises(UserError, match=r"v is \[5\]; it takes vectors"):
        episodes.nearest(rows, {"v": np.ones(5)}, KEY, k=2, column="v")


def bm25(corpus, asked, k1=1.5, b=0.75) -> list[float]:
    """Lucene's, from its definition."""
    mean, scores = sum(map(len, corpus)) / len(corpus), []
    for document in corpus:
        score = 0.0
        for word in asked:
            holding = sum(word in other for other in corpus)
            idf = math.log(1 + (len(corpus) - holding + 0.5) / (holding + 0.5))
            count = document.count(word)
            score += idf * count / (count + k1 * (1 - b + b * len(document) / mean))
        scores.append(score)
    return scores


def test_the_most_similar_by_words_are_those_of_bm25():
    pytest.importorskip("bm25s")
    rng = np.random.default_rng(0)
    vocabulary = [f"w{i}" for i in range(30)]
    prompts = [" ".join(rng.choice(vocabulary, rng.integers(3, 12))) for _ in range(40)] + ["zz yy", "..."]
    rows = [{"prompt": prompt, "completion": f"#{i}"} for i, prompt in enumerate(prompts)]
    shown_rows = episodes.bm25(rows, {}, KEY, k=4)
    corpus = [[word for word in prompt.split() if word != "..."] for prompt in prompts]
    for i, row in enumerate(shown_rows[:40]):
        scores = np.array(bm25(corpus, corpus[i]))
        shown = [int(text.rpartition("#")[2]) for text in parts(row)[:-1]]
        others = np.delete(scores, i)
        np.testing.assert_allclose(scores[shown[::-1]], np.sort(others)[::-1][:4], rtol=1e-5)
        assert i not in shown
    assert len(parts(shown_rows[40])) == len(parts(shown_rows[41])) == 5, "a row without known words gets the first others"
    assert (
        episodes.bm25([{"prompt": "?", "completion": "a"}, {"prompt": "!", "completion": "b"}], {}, KEY, k=1)[0]["prompt"]
        == "!b\n\n?"
    )


def test_a_conversation_gets_turns_that_are_not_learned():
    rows = [{"messages": conversation("a", "b"), "id": 1}, {"messages": conversation("c", "d", "e", "f")}]
    first, second = episodes.random(rows, {}, KEY, k=1)
    assert first["id"] == 1 and [turn["content"] for turn in first["messages"]] == list("cdefab")
    data = encoding.encode_all([Record(first, "x"), Record(second, "y")], characters(), PLAIN, window=32)
    shown = [learned(data.examples[i], characters()) for i in range(2)]
    assert shown == ["cd</s>ef</s>a⟦b</s>⟧", "ab</s>c⟦d</s>⟧e⟦f</s>⟧"]
    first, _ = episodes.random(rows, {}, KEY, k=1, learn=True)
    data = encoding.encode_all([Record(first, "x")], characters(), PLAIN, window=32)
    assert learned(data.examples[0], characters()) == "c⟦d</s>⟧e⟦f</s>⟧a⟦b</s>⟧"
    system = [{"role": "system", "content": "s"}]
    rows = [
        {"messages": system + conversation("a", "b")},
        {"messages": [{"role": "system", "content": "t"}] + conversation("c", "d")},
    ]
    first, _ = episodes.random(rows, {}, KEY, k=1)
    assert [turn["content"] for turn in first["messages"]] == list("scdab"), "the row's own system turn alone, in front"
    skipped = [{"messages": [*conversation("a", "b"), {"role": "user", "content": "c"}, {"role": "assistant", "content": "d"}]}]
    skipped[0]["messages"][1]["weight"] = 0
    (row,) = episodes.random(skipped, {}, KEY, k=1)
    assert [turn.get("weight") for turn in row["messages"]] == [None, 0, None, None], "what is not learned stays so"


def test_demonstrations_of_a_pool_and_through_a_stage(tmp_path):
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    pool = [{"prompt": "q0", "completion": "same"}, {"prompt": "p", "completion": "1"}, {"question": "p2", "answer": "2"}]
    (tmp_path / "pool.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pool))
    entry = {"name": "episodes.random", "k": 5, "pool": str(tmp_path / "pool.jsonl")}
    config = recipe.make(stages=("shown",), shown={"do": "select", "data": str(tmp_path / "d.jsonl"), "with": entry})
    jaxpost.train(config, tmp_path / "w")
    (part,) = (tmp_path / "w" / "rows").glob("*/part-*.jsonl")
    rows = [json.loads(line) for line in part.read_text().splitlines()]
    assert parts(rows[0]) == ["p1", "q0"] and sorted(parts(rows[1])) == ["p1", "q0same", "q1"]


def test_what_is_no_episode_is_refused():
    for rows, options, message in (
        (ROWS, {"k": 0}, "episodes: k=0"),
        (ROWS, {"k": 1, "learn": True}, "episodes: learn=True is for conversations"),
        (ROWS, {"k": 1, "same": "topic"}, "a row has nothing under 'topic'"),
        ([{"text": "a"}], {"k": 1}, "row 1: an episode is made of prompts with answers"),
        ([{"prompt": "a", "chosen": "b", "rejected": "c"}], {"k": 1}, "row 1: a pair of answers"),
    ):
        with pytest.raises(UserError, match=message):
            episodes.random(rows, {}, KEY, **options)
