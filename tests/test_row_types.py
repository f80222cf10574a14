"""Every row type keeps its contract, one of a user's own needs nothing of the package, and rows bring columns of numbers.

The contract: what is stored comes back, columns are those that are announced, the window is kept, and no document's first token
is learned.
"""

import json

import numpy as np
import pytest
from test_pairs import MODEL, PAIR, PLAIN, STEPS, compared, pair, plan
from toy_tokenizers import characters

import jaxpost
from jaxpost import sharding
from jaxpost.data import encoding, examples, row_types, source
from jaxpost.data.readers import Record
from jaxpost.declare import objective
from jaxpost.errors import UserError
from jaxpost.stages import annotations, datasets
from jaxpost.stages.plan import columns, scalars

NAMES = sorted(path.stem for path in row_types.FOLDER.glob("[!_]*.py"))
EVERY = {"demonstrations", "masked", "pairs", "labelled", "scored", "mismatched", "steps", "lists"}
JUDGED = [
    {"prompt": "q" * (1 + i % 4), "completion": "abcdef"[: 1 + i % 6] * 2, "label": i % 3 > 0, "score": i / 4}
    for i in range(24)
]
ROWS = {
    "pairs": [pair("pq"[i % 2] * (1 + i % 3), "ab" * (1 + i % 5), "c" * (1 + i % 4), margin=i) for i in range(24)],
    "steps": [STEPS, {"prompt": "p", "completions": ["x", "y" * 18], "labels": [False, True]}] * 4,
    "lists": [
        {
            "query": "q" * (1 + i % 2),
            "positives": ["ab" * (1 + i % 3)],
            "negatives": ["c"] * (i % 3),
            "scores": [1.0] * (1 + i % 3),
        }
        for i in range(24)
    ],
    "masked": [{"text": "abcdef"[: 1 + i % 6] * 3} for i in range(24)],
    "demonstrations": [{"prompt": row["prompt"], "completion": row["completion"]} for row in JUDGED],
}


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXPOST_CACHE", str(tmp_path / "cache"))


def encode(rows, **options):
    records = [Record(row, f"d.jsonl, line {i}") for i, row in enumerate(rows, start=1)]
    return encoding.encode_all(records, characters(mask_token="<unk>"), **{"window": 64, "template": PLAIN, **options})


def layouts(name):
    """Options of `encode_all` for each layout that a row type has."""
    for shared in {False, row_types.load(name).shareable}:
        for reads in ((), ("margins", "scores")):
            yield {"row_type": name, "shared": shared, "reads": reads}


def kinds(columns):
    return {name: (column.shape, column.dtype) for name, column in columns.items()}


# ---- the contract


def test_discovery_finds_the_row_types():
    assert set(NAMES) == EVERY


@pytest.mark.parametrize("name", NAMES)
def test_columns_are_those_announced_and_no_first_token_is_learned(name):
    for options in layouts(name):
        encoded = encode(ROWS.get(name, JUDGED), **options)
        rows = source.rows(encoded.examples, encoded.lengths, 64, seed=0)
        announced = source.columns(1, 64, **options)
        for i in range(len(rows)):
            assert {k: (x.shape, x.dtype) for k, x in rows[i].items()} == {
                k: (x.shape[1:], x.dtype) for k, x in announced.items()
            }
            assert not (rows[i]["mask"] & (rows[i]["positions"] == 0)).any() and rows[i]["mask"].any()
        for i, length in enumerate(encoded.lengths):
            assert len(encoded.examples[i]["tokens"]) == length
            assert encoded.examples[i]["mask"].sum() == encoded.learned[i]


@pytest.mark.parametrize("name", NAMES)
def test_what_is_stored_comes_back(name):
    for options in layouts(name):
        fresh = encode(ROWS.get(name, JUDGED), **options)
        cached = encode(ROWS.get(name, JUDGED), **options)
        assert fresh.digest == cached.digest and len(fresh.lengths) == len(cached.lengths) > 0
        for i in range(len(fresh.lengths)):
            assert all(np.array_equal(x, cached.examples[i][k]) for k, x in fresh.examples[i].items())


def test_examples_of_any_number_of_answers_are_stored():
    one, three = (
        PAIR._replace(answers=PAIR.answers[:1], masks=PAIR.masks[:1], values=()),
        PAIR._replace(
            answers=(*PAIR.answers, np.array([1, 2, 3])), masks=(*PAIR.masks, np.ones(3, bool)), values=[1.0, 2.0, 3.0]
        ),
    )
    several = [three, PAIR, one, three]
    flat = examples.stored(several)
    for shared in (False, True):
        expected = [examples.length(3, [len(a) for a in example.answers], shared) for example in several]
        assert examples.lengths(flat, shared).tolist() == expected
    for i, example in enumerate(several):
        again = examples.reader(flat)(i)
        assert [x.tolist() for x in again.answers] == [x.tolist() for x in example.answers]
        assert [x.tolist() for x in again.masks] == [x.tolist() for x in example.masks]
        assert again.prompt.tolist() == example.prompt.tolist() and again.values.tolist() == list(example.values)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("too_long", ["truncate", "drop"])
def test_fit_respects_the_window_and_the_model(name, too_long):
    kind, rows = row_types.load(name), ROWS.get(name, JUDGED)
    for options in layouts(name):
        for window, longest in ((8, 8), (14, 6)) if too_long == "truncate" else ((13, 13), (20, 10)):
            longest = window if kind.fills_window else longest
            encoded = encode(rows, window=window, longest=longest, too_long=too_long, **options)
            assert encoded.report["dropped"] or encoded.report["truncated"] or window == 20
            assert encoded.lengths.max() <= window
            for i in range(len(encoded.lengths)):
                documents = examples.documents(encoded.examples[i])
                assert all(len(document["tokens"]) <= longest and document["mask"].any() for document in documents)


def test_the_longest_answers_are_cut_first():
    answers = [np.arange(n) for n in (2, 9, 6)]
    example = examples.Example(np.zeros(0, np.int32), tuple(answers), tuple(np.ones(len(a), bool) for a in answers))
    settings = examples.Settings(None, None, "assistant", 12, 99, "truncate", {}, False, frozenset())
    (cut,) = examples.fit(example, settings, "p")
    assert [len(answer) for answer in cut.answers] == [2, 5, 5]


# ---- one of a user's own

RANKED = '''
"""Ranked lists: k answers to a prompt, each with its rank."""

from jaxpost.data import examples
from jaxpost.declare import objective
from jaxpost.errors import UserError
from jaxpost.objectives.logprobs import token_scores
from jaxpost.types import Term

import jax.numpy as jnp

shareable = True


def encode(record, settings):
    row = record.row
    if len(row.get("ranks", ())) != len(row.get("answers", ())) or not row.get("ranks"):
        raise UserError(f"{record.place}: give answers, and a rank for each.")
    documents = [examples.answered(row["prompt"], answer, settings, record.place) for answer in row["answers"]]
    return examples.of(documents, values=row["ranks"])


def lay_out(example, settings):
    row = examples.lay_out(example, settings)
    return row | {"ranks": example.values[row["segments"] - 1]}


def columns(reads):
    return {"ranks": "float32"}


@objective(rows=__file__)
def best(forward, params, batch, key):
    logps = token_scores(forward(params, batch), batch)["logps"]
    weight = jnp.where(batch["mask"], 1 / jnp.maximum(batch["ranks"], 1.0), 0.0)
    return {"ranked": Term(-jnp.sum(weight * logps), jnp.sum(weight))}, {}
'''
LISTS = [{"prompt": "q", "answers": ["ab", "c", "d" * (1 + i % 3)], "ranks": [2, 1, 3]} for i in range(24)]


def ranked(tmp_path):
    (tmp_path / "mine.py").write_text(RANKED)
    return f"{tmp_path}/mine.py:best"


def test_a_whole_row_type_lies_in_a_file_of_ones_own(tmp_path):
    mine = ranked(tmp_path)
    for shared in (False, True):
        made, s = plan(tmp_path, LISTS, mine, shared_prefix=shared)
        batch = made.source(None) | scalars(0, 1)
        assert kinds(batch) == kinds(columns(s, made.objective))
        # qab</s> qc</s> qd</s>, the prompt of one token before each or copied into each branch.
        lists = [example for example in (made.sets[0].encoded.examples[i] for i in range(24)) if len(example["tokens"]) == 10]
        assert lists[0]["ranks"].tolist() == [2] * 4 + [1] * 3 + [3] * 3 and len(datasets.shown(made.sets)) == 3
        assert (batch["segments"].max(axis=1) % 3 == 0).all()
    with pytest.raises(UserError, match="d.jsonl, line 1: give answers, and a rank for each"):
        plan(tmp_path, [LISTS[0] | {"ranks": [1]}, *LISTS], mine)
    with pytest.raises(UserError, match="the objective learns from mine.py of a data set, and rollouts are none"):
        plan(tmp_path, LISTS, mine, source="rollouts", data="", window=512)
    data = made.data
    (tmp_path / "mine.py").write_text(RANKED.replace("[row", "[0 * row"))
    assert plan(tmp_path, LISTS, mine, shared_prefix=True)[0].data != data, "other code, other data"
    (tmp_path / "mine.py").write_text(RANKED.replace('{"ranks": "float32"}', "{}"))
    with pytest.raises(
        UserError, match=r"rows='mine.py' lay out a column ranks of float32 \[10\], and their columns\(\) of none"
    ):
        plan(tmp_path, LISTS, mine)


@pytest.mark.slow
def test_a_row_type_of_ones_own_is_trained_on(tmp_path):
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in LISTS))
    settings = {"model": MODEL, "tokenizer": "test_pairs.characters", "template": PLAIN, "data": str(tmp_path / "d.jsonl")}
    optimizer = {"lr": 1e-2, "warmup": 0}
    jaxpost.train(
        None, tmp_path / "run", objective=ranked(tmp_path), steps=2, window=32, log_every=1, optimizer=optimizer, **settings
    )
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if "loss" in row]
    assert len(losses) == 2 and losses[1] < losses[0]


def test_what_is_no_row_type_is_refused(tmp_path):
    (tmp_path / "mine.py").write_text('"""Nothing."""')
    with pytest.raises(UserError, match="config.objective: its rows='.*mine.py' has no function encode"):
        row_types.load(str(tmp_path / "mine.py"))
    with pytest.raises(UserError, match="unknown module 'pair' for row_types. Did you mean 'pairs'"):
        row_types.load("pair")


# ---- columns of numbers from rows


@objective(columns={"weight": ("BS", "float32")})
def weighed(forward, params, batch, key):
    """One that reads a number of each row, never called here."""


WEIGHED = [
    {"prompt": "q" * (1 + i % 3), "completion": "ab" * (1 + i % 2), "weight": i / 2 + 1, "hard": i % 2 > 0} for i in range(20)
]


def test_a_number_of_the_rows_that_the_objective_reads_is_a_column(tmp_path):
    made, s = plan(tmp_path, WEIGHED, weighed, window=16, held_out=4)
    batch = made.source(None) | scalars(0, 1)
    assert batch["weight"].dtype == np.float32
    assert kinds(batch) == kinds(columns(s, weighed))
    assert made.held_out[0].keys() | scalars(0, 1).keys() == batch.keys()
    seen = {}
    for row in range(8):
        for segment in range(1, batch["segments"][row].max() + 1):
            (weight,) = set(batch["weight"][row][batch["segments"][row] == segment].tolist())
            seen[weight] = (batch["segments"][row] == segment).sum()
    assert len(seen) > 8 and not batch["weight"][batch["segments"] == 0].any()
    for weight, length in seen.items():  # <s>, prompt, completion, </s>
        assert length == 2 + len(WEIGHED[int(2 * weight) - 2]["prompt"] + WEIGHED[int(2 * weight) - 2]["completion"])
    other = [row | {"weight": 1} for row in WEIGHED]
    assert plan(tmp_path, other, weighed, window=16, held_out=4)[0].data != made.data
    split = encode([WEIGHED[1] | {"completion": "a" * 12}], window=8, too_long="split", row_columns=["weight"], template=None)
    assert [split.examples[i]["weight"].tolist() for i in range(2)] == [[1.5] * 8] * 2


def test_a_row_without_the_number_is_named_with_the_remedy(tmp_path):
    for broken, message in (
        ({"prompt": "q", "completion": "a"}, "d.jsonl, line 21: there is no number under weight, which .* write one, or leave"),
        (WEIGHED[0] | {"weight": "much"}, "d.jsonl, line 21: weight is 'much', no finite number"),
    ):
        with pytest.raises(UserError, match=message):
            plan(tmp_path, [*WEIGHED, broken], weighed, window=16)
        made, _ = plan(tmp_path, [*WEIGHED, broken], weighed, window=16, bad_rows="skip")
        assert made.sets[0].encoded.report["skipped"] == 1
    none = [{"prompt": "q", "completion": "a"}] * 8
    made, _ = plan(tmp_path, none, weighed, window=16)  # an annotation may make it
    with pytest.raises(UserError, match="config.objective: it reads the column weight, which .* write a number of that name"):
        annotations.planned(made, sharding.make_mesh())


def test_row_columns_that_the_settings_ask_for_come_along(tmp_path):
    made, s = plan(tmp_path, WEIGHED, "sft.nll", window=16, row_columns="weight, hard")
    batch = made.source(None) | scalars(0, 1)
    assert set(np.unique(batch["hard"])) == {0.0, 1.0} and "weight" in batch
    assert columns(s, made.objective).keys() == batch.keys()
    pairs = [pair("q", "a", "b", difficulty=3.5)] * 8
    made, _ = plan(tmp_path, pairs, compared, row_columns="difficulty", shared_prefix=True)
    batch = made.source(None)
    assert np.array_equal(batch["difficulty"] == 3.5, batch["segments"] > 0)
    with pytest.raises(UserError, match="config.row_columns: tokens is a column of every batch"):
        plan(tmp_path, WEIGHED, "sft.nll", window=16, row_columns="tokens")
    with pytest.raises(UserError, match="line 1: there is no number under easy"):
        plan(tmp_path, WEIGHED, "sft.nll", window=16, row_columns="easy")
