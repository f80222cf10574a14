"""Transforms keep their contract, whoever calls them, and batches come in the order that one gives.

The contract: the same result for the same key, and indices that are a permutation or a part of the rows, weights, or rows.
"""

import json
from pathlib import Path

import numpy as np
import pytest
from test_pairs import plan

from jaxpost.config.resolve import known, resolve
from jaxpost.data import pack
from jaxpost.data.transforms import apply, order, select
from jaxpost.errors import UserError

KEY = apply.key_of(3)
DATA = [{"prompt": f"p{i % 4}", "hard": (7 * i) % 10, "even": i % 2 == 0, "text": "x"} for i in range(10)]
DATA = [row | {"query": f"q{i}", "positives": [f"a{i}"]} for i, row in enumerate(DATA)]
# Keywords that a transform needs.
NEEDS = {
    "select.top": {"column": "hard", "keep": 0.3},
    "select.threshold": {"column": "hard", "least": 4},
    "select.random": {"keep": 4},
    "select.unique": {"field": "prompt"},
    "order.by": {"column": "hard"},
    "mine.negatives": {},
}
NAMES = known("transforms")


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXPOST_CACHE", str(tmp_path / "cache"))


# ---- the contract


def test_discovery_finds_transforms_and_nothing_else():
    assert {*NEEDS, "order.as_given"} == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_transform_is_deterministic_and_gives_what_it_may(name):
    function, rows = resolve({"name": name, **NEEDS.get(name, {})}, "transforms"), [dict(row) for row in DATA]
    columns = {"surprise": np.arange(10.0), "embedding": np.random.default_rng(0).normal(size=(10, 2, 3))}
    once, again = (apply.apply(function, rows, columns, KEY) for _ in range(2))
    assert once == again and rows == DATA, "the same for the same key, and nothing is changed"
    result = np.asarray(function(rows, apply.Columns(rows, columns), KEY))
    if result.dtype.kind in "iu":
        assert len(np.unique(result)) == len(result) == len(once) and set(result.tolist()) <= set(range(10))
    if name.startswith("order."):
        assert sorted(result.tolist()) == list(range(10)), "an order has each row once"


def test_what_is_selected_by_hand():
    columns = apply.Columns(DATA)
    assert [row["hard"] for row in DATA] == [0, 7, 4, 1, 8, 5, 2, 9, 6, 3]
    assert select.top(DATA, columns, KEY, column="hard", keep=3).tolist() == [1, 4, 7]
    assert select.top(DATA, columns, KEY, column="hard", keep=0.2, highest=False).tolist() == [0, 3]
    assert select.top(DATA, columns, KEY, column="even", keep=2).tolist() == [0, 2], "of equal ones the first"
    assert select.threshold(DATA, columns, KEY, column="hard", least=4, most=6).tolist() == [2, 5, 8]
    with pytest.raises(UserError, match="the transform failed with ZeroDivisionError: "):
        apply.apply(lambda *_: 1 // 0, DATA, {}, KEY)
    with pytest.raises(UserError, match=r"select.threshold: pairs has \[2\] numbers a row; it takes one"):
        select.threshold(DATA, {"pairs": np.zeros((len(DATA), 2))}, KEY, column="pairs", least=4)
    assert select.unique(DATA, columns, KEY, field="prompt").tolist() == [0, 1, 2, 3]
    drawn = select.random(DATA, columns, KEY, keep=0.5).tolist()
    assert len(drawn) == 5 and drawn != select.random(DATA, columns, apply.key_of(5), keep=0.5).tolist()
    assert order.by(DATA, columns, KEY, column="hard").tolist() == [0, 3, 6, 9, 2, 5, 8, 1, 4, 7]
    assert order.by(DATA, columns, KEY, column="hard", descending=True).tolist() == [7, 4, 1, 8, 5, 2, 9, 6, 3, 0]
    for keep in (0, 11, -1, 1.5, 0.0):
        with pytest.raises(UserError, match="of 10 rows; give a number of rows, or a share"):
            select.top(DATA, columns, KEY, column="hard", keep=keep)
    with pytest.raises(UserError, match="no row has 'id'; name a field"):
        select.unique(DATA, columns, KEY, field="id")


def test_what_a_result_means():
    assert apply.apply(lambda *_: np.array([2, 0, 2]), DATA, {}, KEY) == [DATA[2], DATA[0], DATA[2]]
    weighed = apply.apply(lambda rows, columns, key: columns["surprise"] / 2, DATA, {"surprise": np.arange(10)}, KEY)
    assert weighed == [row | {"weight": i / 2} for i, row in enumerate(DATA)]
    assert apply.apply(lambda rows, columns, key: [{"n": len(rows)}], DATA, {}, KEY) == [{"n": 10}]
    wrong = (np.array([10]), np.array([-1]), np.ones(9), np.full(10, np.nan), np.ones(10, bool), np.zeros((2, 2), int), "x")
    for result in wrong:
        with pytest.raises(UserError, match=r"a transform returns indices \[K\] int below 10, finite weights \[10\] float"):
            apply.apply(lambda *_, result=result: result, DATA, {}, KEY)


def test_columns_are_the_numbers_of_all_rows_and_what_is_given():
    columns = apply.Columns([*DATA, {"hard": 3, "even": None}], {"hard": np.zeros((11, 2))}, [f"line {i}" for i in range(11)])
    assert columns.keys() == {"hard"} and columns["hard"].shape == (11, 2), "what is given goes before a row's own"
    with pytest.raises(UserError, match="line 10: there is no number under 'even', .* Known: hard"):
        columns["even"]
    with pytest.raises(UserError, match="row 1: there is no number under 'herd', .* Did you mean 'hard'"):
        select.top(DATA, apply.Columns(DATA), KEY, column="herd", keep=1)


# ---- an order of batches


def test_consecutive_packing_keeps_the_order_and_fills_rows():
    assert [row.tolist() for row in pack.consecutive([4, 3, 6, 7, 2], 10)] == [[0, 1], [2], [3, 4]]
    lengths = np.random.default_rng(0).integers(1, 33, 500)
    rows = pack.consecutive(lengths, 32)
    assert np.concatenate(rows).tolist() == list(range(500)) and max(lengths[row].sum() for row in rows) <= 32
    for row, after in zip(rows, rows[1:], strict=False):
        assert lengths[row].sum() + lengths[after[0]] > 32, "a row takes whatever fits"
    assert pack.consecutive([], 4) == []
    with pytest.raises(ValueError, match=r"lengths must lie in 1\.\.4, and one is 5"):
        pack.consecutive([2, 5], 4)


HARD = [{"prompt": "q", "completion": "ab" * (1 + i % 3), "hard": (7 * i) % 40} for i in range(40)]


def difficulties(source, count):
    """The numbers of `hard` in the order of rows and documents, of so many batches."""
    seen = []
    for _ in range(count):
        batch = source(None)
        for hard, segments in zip(batch["hard"], batch["segments"], strict=True):
            starts = np.flatnonzero(np.diff(segments, prepend=0) > 0)
            seen += hard[starts].tolist()
    return seen


@pytest.mark.parametrize("packing", [True, False])
def test_batches_come_in_the_order_of_a_column_and_epochs_repeat_it(tmp_path, packing):
    options = {"window": 16, "row_columns": "hard", "epochs": 2, "batch_size": 8, "packing": packing, "held_out": 8}
    made, _ = plan(tmp_path, HARD, "sft.nll", order={"name": "by", "column": "hard"}, **options)
    seen = difficulties(made.source, len(made.source))
    assert len(seen) == 64 and seen[:32] == sorted(seen[:32]) and seen[32:] == seen[:32]
    again, _ = plan(tmp_path, HARD, "sft.nll", order={"name": "by", "column": "hard"}, **options)
    again.source.position = 1
    resumed = difficulties(again.source, len(again.source) - 1)
    assert resumed == seen[-len(resumed) :], "one integer is its state"
    shuffled, _ = plan(tmp_path, HARD, "sft.nll", **options)
    assert difficulties(shuffled.source, len(shuffled.source))[:32] != seen[:32]
    assert sorted(shuffled.held_out[0]["hard"].max(1).tolist()) == sorted(made.held_out[0]["hard"].max(1).tolist())


def test_an_order_is_named_by_a_function_a_file_or_json(tmp_path):
    def backwards(rows, columns, key):
        return np.arange(len(rows))[::-1]

    options = {"window": 16, "row_columns": "hard"}
    seen = {}
    for name, given in (
        ("given", "as_given"),
        ("down", '{"name": "by", "column": "hard", "descending": true}'),
        ("back", backwards),
        ("named", {"name": "order.by", "column": "hard"}),
    ):
        made, _ = plan(tmp_path, HARD, "sft.nll", order=given, **options)
        seen[name] = (difficulties(made.source, len(made.source)), made.data)
    own = [float(row["hard"]) for row in HARD]
    assert [seen[name][0] for name in seen] == [own, sorted(own)[::-1], own[::-1], sorted(own)]
    assert len({data for _, data in seen.values()}) == 4
    assert plan(tmp_path, HARD, "sft.nll", **options)[0].data != seen["given"][1], "the same tokens in other rows"


def test_what_is_no_order_of_the_data_is_refused(tmp_path):
    (tmp_path / "e.jsonl").write_text("".join(json.dumps(row) + "\n" for row in HARD))
    mixture = f"{tmp_path}/d.jsonl=1,{tmp_path}/e.jsonl=3"
    for given, changes, message in (
        ("as_given", {"data": mixture}, "config.order: the rows of a mixture are drawn by weight, so they have no one order"),
        ({"name": "by", "column": "heavy"}, {}, "d.jsonl, line 1: there is no number under 'heavy'"),
        (
            {"name": "select.top", "column": "hard", "keep": 4},
            {},
            "config.order: it gives 4 of 40 rows, and an order has",
        ),
        ("backwards", {}, "transforms.order has no 'backwards'. Known: as_given, by"),
        (lambda rows, columns, key: np.ones(40), {}, "a transform returns indices"),
        ("as_given", {"source": "rollouts", "data": ""}, "config.order: .* is not read by source='rollouts'"),
    ):
        with pytest.raises(UserError, match=message):
            plan(tmp_path, HARD, "sft.nll", order=given, **{"window": 16, **changes})


def test_a_transform_of_ones_own_file(tmp_path):
    (tmp_path / "mine.py").write_text(
        "import numpy\n\n\ndef odd(rows, columns, key):\n    return numpy.arange(1, len(rows), 2)\n"
    )
    function = resolve(f"{Path(tmp_path)}/mine.py:odd", "transforms")
    assert apply.apply(function, DATA, {}, KEY) == DATA[1::2]
