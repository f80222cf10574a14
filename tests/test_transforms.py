"""Transforms keep their contract, whoever calls them, and batches come in the order that one gives.

The contract: the same result for the same key, and indices that are a permutation or a part of the rows, weights, or rows.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import runs
from test_pairs import plan

import jaxpost
from jaxpost import recipe
from jaxpost.config.resolve import find, known, resolve
from jaxpost.data import pack
from jaxpost.data.transforms import apply, coreset, decontaminate, duplicates, order, select, weigh, words
from jaxpost.errors import UserError
from jaxpost.tasks import arithmetic

KEY = apply.key_of(3)
DATA = [{"prompt": f"p{i % 4}", "hard": (7 * i) % 10, "even": i % 2 == 0, "completion": "x"} for i in range(10)]
DATA = [row | {"query": f"q{i}", "positives": [f"a{i}"]} for i, row in enumerate(DATA)]
# Keywords that a transform needs.
NEEDS = {
    "select.top": {"column": "hard", "keep": 0.3},
    "select.threshold": {"column": "hard", "least": 4},
    "select.random": {"keep": 4},
    "select.unique": {"field": "prompt"},
    "select.quantiles": {"column": "hard", "low": 0.25, "high": 0.75},
    "select.uncertain": {"column": "rate", "keep": 3},
    "order.by": {"column": "hard"},
    "order.round_robin": {"field": "prompt"},
    "order.stratified": {"field": "prompt"},
    "coreset.k_centre": {"column": "vectors", "keep": 4},
    "coreset.clusters": {"column": "vectors", "keep": 4, "clusters": 3},
    "weigh.quality": {"of": {"hard": 1.0, "surprise": -0.5}},
    "episodes.random": {"k": 2},
    "episodes.bm25": {"k": 2},
    "episodes.nearest": {"k": 2, "column": "vectors"},
    "decontaminate.ngrams": {"against": str(Path(__file__).parent / "answers.jsonl"), "n": 3, "least": 2},
    "mine.negatives": {},
}
PLAIN = {"order.given", "duplicates.exact", "duplicates.near"}  # those that need none
NAMES = known("transforms")


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXPOST_CACHE", str(tmp_path / "cache"))


# ---- the contract


def test_discovery_finds_transforms_and_nothing_else():
    assert {*NEEDS, *PLAIN} == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_transform_is_deterministic_and_gives_what_it_may(name):
    function, rows = resolve({"name": name, **NEEDS.get(name, {})}, "transforms"), [dict(row) for row in DATA]
    columns = {"surprise": np.arange(10.0), "rate": np.linspace(0, 1, 10)}
    columns["vectors"] = np.random.default_rng(0).normal(size=(10, 4))
    columns["embedding"] = np.random.default_rng(0).normal(size=(10, 2, 3))
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
        with pytest.raises(UserError, match="transform: keep=.*; give a number of rows, or a share"):
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


def test_difficulty_and_uncertainty_by_hand():
    columns = {"hard": [0, 7, 4, 1, 8, 5, 2, 9, 6, 3], "rate": [0, 0.5, 0.9, 0.4, 1.0, 0.6]}
    assert select.quantiles(DATA, columns, KEY, column="hard", low=0.3, high=0.6).tolist() == [2, 5, 9]
    thirds = [
        select.quantiles(DATA, columns, KEY, column="hard", low=a, high=b) for a, b in ((0, 0.33), (0.33, 0.66), (0.66, 1))
    ]
    assert sorted(np.concatenate(thirds).tolist()) == list(range(10)), "neighbouring ranges share no row and leave out none"
    assert select.uncertain(DATA[:6], columns, KEY, column="rate", keep=3).tolist() == [1, 3, 5]
    assert select.uncertain(DATA[:6], columns, KEY, column="rate", keep=4).tolist() == [1, 2, 3, 5]
    with pytest.raises(UserError, match="hard has 0 to 9; it takes shares"):
        select.uncertain(DATA, columns, KEY, column="hard", keep=3)
    with pytest.raises(UserError, match="give 0 <= low < high <= 1"):
        select.quantiles(DATA, columns, KEY, column="hard", low=0.5, high=0.5)


def test_orders_over_a_taxonomy_by_hand():
    rows = [{"topic": topic} for topic in "aaaabbc"]
    assert order.round_robin(rows, {}, KEY, field="topic").tolist() == [0, 4, 6, 1, 5, 2, 3]
    # a at 1/8, 3/8, 5/8, 7/8; b at 1/4, 3/4; c at 1/2.
    assert order.stratified(rows, {}, KEY, field="topic").tolist() == [0, 4, 1, 6, 2, 5, 3]
    many = [{"topic": "abc"[min(i // 100, 2)]} for i in range(600)]
    spread = order.stratified(many, {}, KEY, field="topic")
    for start in range(0, 600, 60):
        topics = [many[i]["topic"] for i in spread[start : start + 60]]
        assert abs(topics.count("a") - 10) <= 1 and abs(topics.count("c") - 40) <= 1
    for function in (order.round_robin, order.stratified):
        with pytest.raises(UserError, match="row 2 has nothing under 'topic'"):
            function([{"topic": 1}, {}], {}, KEY, field="topic")


def test_duplicates_by_hand():
    rows = [{"text": text, "n": i} for i, text in enumerate(["A b, c!", " a B,\tC!", "a b c", "", " ", "46-20", "46+20"])]
    assert duplicates.exact(rows, {}, KEY).tolist() == [0, 2, 3, 5, 6]
    assert duplicates.near(rows[3:], {}, KEY).tolist() == [0, 2, 3], "signs tell problems apart"
    assert duplicates.exact([{"messages": [{"role": "user", "content": "a"}]}, {"text": "user a"}], {}, KEY).tolist() == [0, 1]
    assert duplicates.exact([{"a": "x", "b": "y"}, {"a": "x", "b": "z"}], {}, KEY, fields=["a"]).tolist() == [0]
    assert words.text({"a": ["x", {"role": "user", "content": "y"}], "b": 3, "c": "z"}) == "x\ny\nz"


def test_near_duplicates_are_those_of_the_exact_jaccard():
    rng, vocabulary = np.random.default_rng(0), [f"w{i}" for i in range(2000)]
    rows = [{"text": " ".join(rng.choice(vocabulary, 60))} for _ in range(150)]
    for i in range(150):  # copies of which more and more words are others
        copy = rows[i]["text"].split()
        for place in rng.choice(60, i // 15, replace=False):
            copy[place] = "other"
        rows.append({"text": " ".join(copy)})
    rows = [rows[i] for i in rng.permutation(300)]
    grams = [set(zip(*(row["text"].split()[k:] for k in range(3)), strict=False)) for row in rows]
    for threshold in (0.5, 0.8, 1.0):
        kept: list[int] = []
        for i, own in enumerate(grams):
            if all(len(own & grams[j]) / len(own | grams[j]) < threshold for j in kept):
                kept.append(i)
        assert duplicates.near(rows, {}, KEY, threshold=threshold).tolist() == kept and 150 < len(kept) < 300
    assert duplicates.near([{"text": ""}, {"text": "a"}, {"text": "a"}, {"text": " "}], {}, KEY).tolist() == [0, 1]
    for wrong, message in (({"threshold": 0}, "threshold=0"), ({"threshold": 0.02}, "128 permutations miss rows at thr")):
        with pytest.raises(UserError, match=message):
            duplicates.near(rows, {}, KEY, **wrong)


def test_what_is_tested_is_taken_out_and_named(tmp_path, capsys):
    test = " ".join(f"w{i}" for i in range(20))
    (tmp_path / "test.jsonl").write_text(json.dumps({"question": test, "id": "q1"}) + '\n{"question": "a b c d e f g h"}\n')
    rows = [
        {"text": "x y " + " ".join(f"W{i}," for i in range(3, 16)) + " z"},  # thirteen of its words, w3 to w15, of sixteen
        {"text": " ".join(f"w{i}" for i in range(12))},  # twelve are no 13-gram
        {"text": "so: A b c d e f g H? i"},  # a tested text of eight words, whole
        {"text": "a b c d e f g"},
        {"text": ""},
    ]
    options = {"against": str(tmp_path / "test.jsonl"), "of": ["question"]}
    assert decontaminate.ngrams(rows, {}, KEY, **options).tolist() == [1, 3, 4]
    printed = capsys.readouterr().err
    assert f"2 of 5 rows hold what {options['against']} has" in printed
    assert "row 1: 81% of its words, as 'w3 w4 w5 w6 w7 w8 w9 w10 w11 w12 w13 w14 w15' of test.jsonl, line 1" in printed
    assert "row 3: 80% of its words, as 'a b c d e f g h' of test.jsonl, line 2" in printed
    assert decontaminate.ngrams(rows, {}, KEY, **options, share=0.805).tolist() == [1, 2, 3, 4]
    assert decontaminate.ngrams(rows, {}, KEY, **options, n=12).tolist() == [3, 4]
    marked = decontaminate.ngrams(rows, {}, KEY, **options, mark=True)
    assert [row["contaminated_by"] for row in marked] == ["test.jsonl, line 1", "", "test.jsonl, line 2", "", ""]
    assert [row["contaminated_share"] for row in marked] == [13 / 16, 0, 8 / 10, 0, 0] and "contaminated" not in rows[0]
    with pytest.raises(UserError, match="no row of .*test.jsonl has a text of 8 words; name its fields"):
        decontaminate.ngrams(rows, {}, KEY, against=options["against"], of=["id"])
    with pytest.raises(UserError, match="give least up to n"):
        decontaminate.ngrams(rows, {}, KEY, **options, n=5, least=6)


def test_a_core_set_covers_what_is_there():
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(5, 8)) * 20
    labels = np.repeat(np.arange(5), [100, 50, 5, 2, 1])
    vectors = {"v": centres[labels] + rng.normal(size=(158, 8)) * 0.1}
    options = {"column": "v", "normalise": False}
    chosen = coreset.k_centre(labels, vectors, KEY, keep=5, **options)
    assert sorted(labels[chosen].tolist()) == [0, 1, 2, 3, 4], "one of each cluster, the least one too"
    # The greedy rule, row by row.
    order_, first = [], np.random.default_rng(KEY).integers(158)
    for _ in range(9):
        order_.append(int(first))
        distances = np.linalg.norm(vectors["v"][:, None] - vectors["v"][order_], axis=2).min(1)
        first = np.argmax(distances)
    assert coreset.k_centre(labels, vectors, KEY, keep=9, **options).tolist() == sorted(order_)
    chosen = coreset.clusters(labels, vectors, KEY, keep=10, clusters=5, **options)
    assert np.bincount(labels[chosen], minlength=5).tolist() == [3, 2, 2, 2, 1], "as many of each, as far as there are"
    near = vectors["v"] - np.array([vectors["v"][labels == k].mean(0) for k in range(5)])[labels]
    own = np.flatnonzero(labels == 0)
    assert set(chosen[labels[chosen] == 0]) == set(own[np.argsort((near[own] ** 2).sum(1))[:3]])
    hard = coreset.clusters(labels, vectors, KEY, keep=10, clusters=5, hard=True, **options)
    assert set(hard[labels[hard] == 0]) == set(own[np.argsort(-(near[own] ** 2).sum(1))[:3]])
    same = {"v": np.ones((6, 3))}
    for function, more in ((coreset.k_centre, {}), (coreset.clusters, {"clusters": 3})):
        assert len(set(function(DATA[:6], same, KEY, column="v", keep=4, **more).tolist())) == 4, "equal rows are still rows"
        with pytest.raises(UserError, match=r"v is \[6\]; it takes finite vectors"):
            function(DATA[:6], {"v": np.ones(6)}, KEY, column="v", keep=4, **more)
    with pytest.raises(UserError, match="clusters=7 of 6 rows"):
        coreset.clusters(DATA[:6], same, KEY, column="v", keep=4, clusters=7)


def test_weights_of_quality_by_hand():
    columns = {"a": np.array([0.0, 1, 2, 3]), "b": np.array([5.0, 5, 9, 9]), "same": np.ones(4)}
    z = (columns["a"] - 1.5) / np.sqrt(1.25) - 0.5 * np.array([-1, -1, 1, 1])
    expected = np.exp(z / 2) / np.exp(z / 2).mean()
    weights = weigh.quality(DATA[:4], columns, KEY, of={"a": 1, "b": -0.5, "same": 3}, temperature=2)
    np.testing.assert_allclose(weights, expected, rtol=1e-12)
    cut = weigh.quality(DATA[:4], columns, KEY, of={"a": 1}, temperature=0.01, most=3)
    np.testing.assert_allclose(cut, [0, 0, 2, 2], atol=1e-12)
    assert weigh.quality(DATA[:4], columns, KEY, of={"same": 1}).tolist() == [1] * 4
    for wrong in ({"of": {}}, {"of": {"a": 1}, "temperature": 0}, {"of": {"a": 1}, "most": 0.5}):
        with pytest.raises(UserError, match="weigh.quality: of="):
            weigh.quality(DATA[:4], columns, KEY, **wrong)


def test_a_selection_is_made_again_when_a_file_that_it_reads_has_changed(tmp_path):
    (tmp_path / "d.jsonl").write_text("".join(f'{{"text": "one two three w{i}"}}\n' for i in range(4)))
    test = tmp_path / "test.jsonl"
    transform = {"name": "decontaminate.ngrams", "against": str(test), "n": 4, "least": 4}
    config = recipe.make(stages=("clean",), clean={"do": "select", "data": str(tmp_path / "d.jsonl"), "with": transform})
    with pytest.raises(UserError, match="test.jsonl: no such file"):
        jaxpost.train(config, tmp_path / "w")
    for tested, left in (("one two three w0", 3), ("one two three w1 one two three w2", 2)):
        test.write_text(json.dumps({"text": tested}) + "\n")
        for _ in range(2):
            jaxpost.train(config, tmp_path / "w")
        counts = [len(part.read_text().splitlines()) for part in (tmp_path / "w" / "rows").glob("*/part-*.jsonl")]
        assert left in counts
    assert sorted(counts) == [2, 3]


def test_a_selection_takes_a_tasks_demonstrations(tmp_path):
    task = {"name": "arithmetic", "examples": 20, "corrupt": 0.0}
    half = {"do": "select", "task": task, "with": {"name": "select.random", "keep": 0.5}}
    jaxpost.train(recipe.make(stages=("half",), half=half), tmp_path)
    rows = [json.loads(line) for part in tmp_path.glob("rows/*/part-*.jsonl") for line in part.read_text().splitlines()]
    shown = [arithmetic.conversation(i, corrupt=0.0)["messages"] for i in range(20)]
    assert len(rows) == 10 and all(row["messages"] in shown for row in rows)
    with pytest.raises(UserError, match="give files or an earlier stage's rows, as @NAME, to select from, or a task"):
        jaxpost.train(recipe.make(stages=("half",), half=half | {"task": ""}), tmp_path / "none")


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


@pytest.mark.parametrize("packing", [True, False])
def test_rows_are_learned_in_the_order_of_the_file_wherever_a_run_goes_on(tmp_path, packing):
    options = {"window": 16, "row_columns": "hard", "epochs": 2, "batch_size": 8, "packing": packing, "order": "given"}
    planned, _ = plan(tmp_path, HARD, "sft.nll", **options)
    each = [difficulties(planned.source, 1) for _ in range(len(planned.source))]
    assert sum(each, []) == [row["hard"] for row in HARD] * 2
    for start in range(len(each)):
        planned.source.position = start
        assert [difficulties(planned.source, 1) for _ in each[start:]] == each[start:]


def test_an_order_is_named_by_a_function_a_file_or_json(tmp_path):
    def backwards(rows, columns, key):
        return np.arange(len(rows))[::-1]

    options = {"window": 16, "row_columns": "hard"}
    seen = {}
    for name, given in (
        ("given", "given"),
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
        ("given", {"data": mixture}, "config.order: the rows of a mixture are drawn by weight, so they have no one order"),
        ({"name": "by", "column": "heavy"}, {}, "d.jsonl, line 1: there is no number under 'heavy'"),
        (
            {"name": "select.top", "column": "hard", "keep": 4},
            {},
            "config.order: it gives 4 of 40 rows, and an order has",
        ),
        ("backwards", {}, "transforms.order has no 'backwards'. Known: by, given, round_robin, stratified"),
        (lambda rows, columns, key: np.ones(40), {}, "a transform returns indices"),
        ("given", {"source": "rollouts", "data": ""}, "config.order: .* is not read by source='rollouts'"),
    ):
        with pytest.raises(UserError, match=message):
            plan(tmp_path, HARD, "sft.nll", order=given, **{"window": 16, **changes})


def test_a_transform_of_ones_own_file(tmp_path):
    (tmp_path / "mine.py").write_text(
        "import numpy\n\n\ndef odd(rows, columns, key):\n    return numpy.arange(1, len(rows), 2)\n"
    )
    function = resolve(f"{Path(tmp_path)}/mine.py:odd", "transforms")
    assert apply.apply(function, DATA, {}, KEY) == DATA[1::2]


WRONG = {  # of each transform whose keywords may be wrong whatever the rows are
    "duplicates.near": ({"threshold": 1.5}, "threshold=1.5"),
    "decontaminate.ngrams": ({"against": "x.jsonl", "n": 5, "least": 6}, "n=5, share=0.0, least=6"),
    "select.top": ({"column": "x", "keep": 0}, "keep=0"),
    "select.uncertain": ({"column": "x", "keep": 1.5}, "keep=1.5"),
    "select.random": ({"keep": -1}, "keep=-1"),
    "select.quantiles": ({"column": "x", "low": 0.8, "high": 0.2}, "low=0.8, high=0.2"),
    "coreset.k_centre": ({"column": "x", "keep": 0}, "keep=0"),
    "coreset.clusters": ({"column": "x", "keep": 1, "clusters": 0}, "clusters=0"),
    "episodes.random": ({"k": 0}, "k=0"),
    "episodes.bm25": ({"k": 0}, "k=0"),
    "episodes.nearest": ({"k": 0, "column": "x"}, "k=0"),
    "mine.negatives": ({"first": 0}, "first=0"),
    "weigh.quality": ({"of": {"x": 1.0}, "temperature": 0.0}, "temperature=0.0"),
}


@pytest.mark.parametrize("name", [name for name in known("transforms") if hasattr(find(name, "transforms"), "check")])
def test_keywords_that_cannot_be_are_refused_while_rows_are_still_to_be_made(tmp_path, name):
    keywords, message = WRONG[name]
    drawn = {"do": "generate", "rows": "scored", "task": {"name": "arithmetic", "examples": 4}}
    drawn |= {"rollouts": {"group": 2, "prompt_window": 12, "new": 2}}
    kept = {"do": "select", "data": "@drawn", "with": {"name": name, **keywords}}
    model = {"model": runs.MODEL, "tokenizer": "tasks.arithmetic.tokenizer"}
    with pytest.raises(UserError, match=f"^kept: .*{message}"):
        jaxpost.train(recipe.make(stages=("drawn", "kept"), **model, drawn=drawn, kept=kept), tmp_path / "w")
    assert not (tmp_path / "w" / "rows").exists()


def test_short_grams_need_no_least(tmp_path):
    (tmp_path / "t.jsonl").write_text('{"text": "a b c d"}\n')
    rows = [{"text": "x b c d"}, {"text": "a b x c d"}]
    assert decontaminate.ngrams(rows, {}, KEY, against=str(tmp_path / "t.jsonl"), n=3).tolist() == [1]
    with pytest.raises(UserError, match="has a text of 8 words"):
        decontaminate.ngrams(rows, {}, KEY, against=str(tmp_path / "t.jsonl"))
