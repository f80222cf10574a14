"""Embeddings in use: lists become documents, texts vectors, vectors rankings, rankings figures and harder lists."""

import dataclasses
import functools
import json
import sys

import jax
import numpy as np
import pytest
import runs
import transformers
from test_masked import words
from test_pairs import MODEL, PLAIN
from toy_tokenizers import characters

import jaxpost
from jaxpost import export, recipe, sharding, tokenizer
from jaxpost.config.resolve import resolve
from jaxpost.data import chat, encoding, source
from jaxpost.data.nearest import nearest
from jaxpost.data.readers import Record
from jaxpost.data.row_types import lists
from jaxpost.data.transforms import apply
from jaxpost.errors import UserError
from jaxpost.models import hf, loading
from jaxpost.stages import evaluation
from jaxpost.tasks import arithmetic


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXPOST_CACHE", str(tmp_path / "cache"))


def one_device():
    return sharding.make_mesh(devices=jax.devices()[:1])


@pytest.fixture(scope="module")
def model():
    fields = {**runs.MODEL, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "initializer_range": 0.5}
    loaded = jaxpost.load(fields, mesh=one_device())
    return dataclasses.replace(loaded, tokenizer=arithmetic.tokenizer())


# ------------------------------------------------------------------------------------------------------------- lists


def encode(*rows, **options):
    records = [Record(row, f"d.jsonl, line {i}") for i, row in enumerate(rows, start=1)]
    return encoding.encode_all(
        records, characters(), **{"window": 64, "template": PLAIN, "row_type": "lists", "reads": ["scores"], **options}
    )


LIST = {"query": "q", "positives": ["ab", "c"], "negatives": ["d"], "scores": [0.5, 0.25, -1]}


def test_a_list_is_its_texts_one_after_the_other():
    row = encode(LIST).examples[0]
    assert characters().decode(row["tokens"]) == "<s>q</s><s>ab</s><s>c</s><s>d</s>"
    assert row["segments"].tolist() == [1] * 3 + [2] * 4 + [3] * 3 + [4] * 3
    assert row["roles"].tolist() == [1] * 3 + [2] * 7 + [3] * 3
    assert row["scores"].tolist() == [0.0] * 3 + [0.5] * 4 + [0.25] * 3 + [-1.0] * 3
    assert (row["mask"] == (row["positions"] > 0)).all()


def test_instructions_and_messages():
    talk = [{"role": "user", "content": "ab"}]
    row = encode({"query": "q", "instruction": "ask: ", "positives": [talk, "ab"]}, reads=()).examples[0]
    assert characters().decode(row["tokens"]) == "<s>ask: q</s>ab<s>ab</s>"
    answered = [*talk, {"role": "assistant", "content": "c"}]
    row = encode({"query": talk, "instruction": "be: ", "positives": answered}, reads=()).examples[0]
    assert characters().decode(row["tokens"]) == "be: ababc</s>"


def test_ids_say_which_passages_are_the_same():
    def ids(**row):
        each = encode({"query": "q", "positives": ["a"], "negatives": ["b", "a"]} | row, reads=()).examples[0]
        return [each["ids"][each["segments"] == n][0] for n in range(1, 5)]

    query, positive, other, copy = ids()
    assert positive == copy and len({query, positive, other}) == 3
    _, positive, other, copy = ids(positive_ids=["d1"], negative_ids=["d2", "d3"])
    assert len({positive, other, copy}) == 3
    assert ids(positive_ids="d1", negative_ids=[None, "d1"])[1] == ids(positive_ids="d1")[1], "text or id, each by itself"
    assert ids(query_id=7)[0] == ids(query_id=7, query="other")[0] != query
    assert encode({"query": "b", "positives": ["b"]}, reads=()).examples[0]["ids"].dtype == np.int32


def test_what_is_no_list_is_refused_with_its_place():
    for row, message in (
        ({"query": "q"}, "line 1: the objective learns from lists, and there is no positives"),
        ({"positives": ["a"]}, "there is no query; .* config.columns='query=anchor,positives=positive'"),
        ({"query": "q", "positives": ["a", 3]}, r"positives is \['a', 3\]; write a list of texts"),
        ({"query": " ", "positives": ["a"]}, "line 1, query: text is empty"),
        ({"query": "q", "positives": ["a"], "positive_ids": ["x", "y"]}, "positive_ids is .*; write a list of 1 ids"),
        (LIST | {"scores": [1.0]}, "a number for each of the 3 passages"),
        (LIST | {"negatives": ["d"] * 14, "scores": [0.0] * 16}, "a list of 17 texts, .* 16 at most; make the window 272"),
    ):
        with pytest.raises(UserError, match=message):
            encode(row, window=128)
    with pytest.raises(UserError, match="config.columns: no shape has a column 'querry'. Did you mean 'query'"):
        encode(LIST, columns={"querry": "q"})
    assert (
        encode({"anchor": "q", "positive": "a"}, columns={"query": "anchor", "positives": "positive"}, reads=()).lengths[0] == 6
    )


def test_a_text_that_is_cut_keeps_its_end_and_rows_keep_to_their_documents():
    row = encode({"query": "q", "positives": ["abcdefgh" * 9]}, window=20, too_long="truncate", reads=()).examples[0]
    assert characters().decode(row["tokens"]) == "<s>q</s><s>" + "abcdefgh" * 1 + "abcdefg" + "</s>"
    many = encode(*[{"query": "q", "positives": ["a"]}] * 40, window=256, reads=())
    assert many.most == 16 and many.documents.tolist() == [2] * 40
    for in_order in (False, True):
        limits = {"documents": many.documents, "most": many.most}
        rows = source.bins(many.lengths, 256, seed=0, in_order=in_order, **limits)
        assert max(many.documents[row].sum() for row in rows) == 16 and sorted(np.concatenate(rows)) == list(range(40))
        assert len(source.bins(many.lengths, 256, seed=0, in_order=in_order)) == 1, "more would fit"


# -------------------------------------------------------------------------------------------------- embeddings


def test_embeddings_do_not_depend_on_the_batch_and_are_those_of_the_tokens(model):
    texts = ["1", "12+3", "4-5", "7" * 30]
    for options in ({}, {"pooling": "mean", "normalise": False}):
        vectors = model.embed(texts, **options)
        assert vectors.shape == (4, 8) and vectors.dtype == np.float32
        np.testing.assert_allclose(model.embed(texts, rows=1, **options), vectors, atol=1e-6)
        np.testing.assert_allclose(model.embed(texts[::-1], rows=3, **options)[::-1], vectors, atol=1e-6)
    ids = model.tokenizer("4-5")["input_ids"] + [model.tokenizer.eos_token_id]
    batch, _ = model._batch(np.array([ids], np.int32), None)
    hidden = np.asarray(model.forward(model.params, batch).hidden[0])
    np.testing.assert_allclose(vectors[2], hidden.mean(0), atol=1e-6)
    last = model.embed("4-5")[0]
    np.testing.assert_allclose(last, hidden[-1] / np.linalg.norm(hidden[-1]), atol=1e-6)
    assert np.array_equal(model.embed("5", instruction="4-")[0], last)


def test_a_prefix_model_embeds_as_it_was_trained(model):
    """All tokens but a document's first are learned of lists, so the first alone is a prompt."""
    arch = dataclasses.replace(model.transformer.arch, attend="prefix")
    prefix = dataclasses.replace(model, transformer=dataclasses.replace(model.transformer, arch=arch))
    np.testing.assert_allclose(prefix.embed("12+3", pooling="mean"), model.embed("12+3", pooling="mean"), atol=1e-6)


def test_latents_are_used_where_a_model_has_them(model):
    leaves = {"latent": {k: np.ones((8, 8), np.float32) * x for k, x in (("vectors", 1.0), ("up", 0.1), ("down", 0.5))}}
    latent = dataclasses.replace(model, params={**model.params, **leaves})
    assert np.array_equal(latent.embed("12+3"), latent.embed("12+3", pooling="latent"))
    assert np.abs(latent.embed("12+3") - latent.embed("12+3", pooling="last")).max() > 1e-2
    assert np.array_equal(latent.embed("12+3", pooling="last"), model.embed("12+3"))
    with pytest.raises(UserError, match="pooling='latent': the model has no latents"):
        model.embed("12+3", pooling="latent")


def test_a_stages_evals_pool_as_its_objective_does(tmp_path):
    pytest.importorskip("jaxpost.evals.ranking")
    objective, plain = (resolve(name, "objectives") for name in ("contrastive.triplet", "sft.nll"))
    like = evaluation.pooling_of(objective)
    assert like == {"pooling": "mean", "normalise": False} and evaluation.pooling_of(plain) == {}
    chosen = functools.partial(objective, pooling="last")
    assert evaluation.pooling_of(chosen) == {"pooling": "last", "normalise": False}
    for own in ({}, {"pooling": "last"}):
        (one,) = evaluation.configured({"nq": {"name": "ranking", **write(tmp_path), **own}}, Placed(), like=like)
        assert {k: one.run.keywords[k] for k in like} == {**like, **own}


def test_a_tokenizer_that_ends_texts_in_its_separator_is_taken():
    text = words()
    for texts, ids in (("ab", [2, 5, 6, 3]), ("a [SEP]", [2, 5, 31, 3, 3])):
        assert chat.encode_text(texts, text).tolist() == ids
        assert tokenizer.ending(text, 4)(texts)["input_ids"] == ids
    assert chat.encode_text("b", text, instruction="a").tolist() == [2, 5, 6, 3]
    ender = tokenizer.ending(text, 4)
    assert (ender.model_max_length, ender.pad_token) == (4, "[PAD]")
    row = encoding.encode_all(
        [Record(LIST, "d.jsonl, line 1")], text, window=64, template=PLAIN, row_type="lists", reads=["scores"]
    ).examples[0]
    assert row["tokens"].tolist()[:3] == [2, 5 + ord("q") - ord("a"), 3]
    neither = characters(eos_token=None)
    with pytest.raises(UserError, match="the tokenizer has no eos_token"):
        tokenizer.ending(neither, 4)
    with pytest.raises(UserError, match="the tokenizer has no eos_token"):
        chat.encode_text("ab", neither)


def test_texts_that_cannot_be_embedded_are_named(model):
    with pytest.raises(UserError, match="text 2: it has 100 tokens and the model takes 64; say too_long='truncate'"):
        model.embed(["1", "1" * 99])
    assert np.array_equal(model.embed("1" * 99, too_long="truncate"), model.embed("1" * 63))
    with pytest.raises(UserError, match="text 2: text is empty"):
        model.embed(["1", ""])
    with pytest.raises(UserError, match="pooling='first'"):
        model.embed(["1"], pooling="first")


# ------------------------------------------------------------------------------------------------------ search


@pytest.mark.parametrize(("block", "at_once"), [(65536, 1024), (7, 3), (1, 1)])
def test_search_is_brute_force_and_of_equal_scores_the_first_wins(block, at_once):
    rng = np.random.default_rng(0)
    queries, passages = rng.integers(-1, 2, (5, 4)), rng.integers(-1, 2, (33, 4))  # whole numbers: many equal scores
    scores, numbers = nearest(queries, passages, 9, block=block, at_once=at_once)
    whole = queries @ passages.T
    order = np.argsort(-whole, axis=1, kind="stable")[:, :9]
    assert np.array_equal(numbers, order) and np.array_equal(scores, np.take_along_axis(whole, order, axis=1))
    for k in (0, 34):
        with pytest.raises(UserError, match=f"k={k} of 33 passages; give 1 to 33"):
            nearest(queries, passages, k)


# ----------------------------------------------------------------------------------------------------- figures

FILES = {
    "corpus": [{"_id": f"d{i}", "title": "", "text": text} for i, text in enumerate(["1+1", "2-2", "3+3", "4-4", "12+3"])],
    "queries": [{"_id": "q0", "text": "1+1"}, {"_id": "q1", "text": "4-4"}, {"_id": "q2", "text": "nobody asks"}],
    "qrels": [
        {"query-id": "q0", "corpus-id": "d0", "score": 1},
        {"query-id": "q1", "corpus-id": "d1", "score": 2},
        {"query-id": "q1", "corpus-id": "d2", "score": 0},
        {"query-id": "q1", "corpus-id": "d4", "score": 1},
    ],
}


def write(folder, **changes):
    paths = {}
    for name, rows in (FILES | changes).items():
        paths[name] = str(folder / f"{name}.jsonl")
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return paths


class Placed:
    """A stand-in for a model: texts have given vectors, so the order of passages is known."""

    def __init__(self, **vectors):
        self.vectors = vectors

    def need_tokenizer(self):
        pass

    def embed(self, texts, **options):
        return np.array([[float(len(text)), self.vectors.get(text, 0.0)] for text in texts], np.float32)


def test_figures_by_hand(tmp_path):
    ranking = pytest.importorskip("jaxpost.evals.ranking")
    paths = write(tmp_path)
    # The order of passages for both queries: by length, then as they stand: d4, d0, d1, d2, d3.
    figures = dict(ranking.ranking(Placed(), **paths, measures=["nDCG@3", "R@2", "RR@10", "AP"]))
    # q0: d0 is the second. q1: d4 (grade 1) is the first and d1 (grade 2) the third.
    gains = (1 + 2 / np.log2(4)) / (2 + 1 / np.log2(3))
    assert figures["nDCG@3"] == pytest.approx((1 / np.log2(3) + gains) / 2)
    assert figures["R@2"] == pytest.approx((1 + 1 / 2) / 2) and figures["RR@10"] == pytest.approx((1 / 2 + 1) / 2)
    assert figures["AP"] == pytest.approx((1 / 2 + (1 + 2 / 3) / 2) / 2)
    assert (figures["queries"], figures["passages"]) == (2, 5) and figures["AP_low"] < figures["AP"] < figures["AP_high"]
    assert [row["prompt"] for row in figures["samples"]] == ["1+1", "4-4"] and figures["samples"][0]["completion"] == "12+3"
    own = write(tmp_path, queries=[{"_id": "d4", "text": "5"}], qrels=[{"query-id": "d4", "corpus-id": "d0", "score": 1}])
    assert dict(ranking.ranking(Placed(), **own, measures=["RR@10"]))["RR@10"] == 1.0, "the query itself is no result"


def test_bm25_finds_the_passage_with_the_query_words(tmp_path):
    pytest.importorskip("bm25s")
    ranking = pytest.importorskip("jaxpost.evals.ranking")
    texts = ["red apples fall", "green pears ripen slowly", "blue plums", "red plums fall slowly"]
    changes = {
        "corpus": [{"_id": str(i), "text": text} for i, text in enumerate(texts)],
        "queries": [{"_id": "q0", "text": "ripen pears"}, {"_id": "q1", "text": "blue plums"}],
        "qrels": [{"query-id": "q0", "corpus-id": "1", "score": 1}, {"query-id": "q1", "corpus-id": "3", "score": 1}],
    }
    figures = dict(ranking.bm25(None, **write(tmp_path, **changes), measures=["RR@10", "R@1"]))
    assert figures["RR@10"] == pytest.approx((1 + 1 / 2) / 2) and figures["R@1"] == 0.5


def test_wrong_files_and_measures_are_refused(tmp_path):
    ranking = pytest.importorskip("jaxpost.evals.ranking")
    paths = write(tmp_path)
    (tmp_path / "test.tsv").write_text("query-id\tcorpus-id\tscore\nq0\td0\t1\n")
    assert ranking.read(paths["corpus"], paths["queries"], str(tmp_path / "test.tsv")).grades == {"q0": {"d0": 1}}
    for changes, message in (
        ({"corpus": [{"text": "a"}]}, "corpus.jsonl, line 1: there is no _id"),
        ({"queries": [FILES["queries"][0]] * 2}, "queries.jsonl, line 2: an earlier row has the _id 'q0' too"),
        ({"corpus": [{"_id": 1, "text": ""}]}, "corpus.jsonl, line 1: text is ''"),
        ({"queries": FILES["queries"][:1]}, "no query 'q1' in"),
        ({"qrels": [{"query-id": "q0", "corpus-id": "d9", "score": 1}]}, "no passage 'd9' in"),
        ({"qrels": [{"query-id": "q0", "corpus-id": "d1", "score": 0.5}]}, "a whole number as score"),
    ):
        with pytest.raises(UserError, match=message):
            ranking.ranking.check(Placed(), **write(tmp_path, **changes))
    with pytest.raises(UserError, match="measures=.*nDGC@10.*give names of ir-measures"):
        ranking.ranking.check(Placed(), **write(tmp_path), measures=["nDGC@10"])


def test_faiss_finds_what_exact_search_finds():
    pytest.importorskip("faiss")
    ranking = pytest.importorskip("jaxpost.evals.ranking")
    rng = np.random.default_rng(0)
    passages = rng.normal(size=(400, 8)).astype(np.float32)
    passages /= np.linalg.norm(passages, axis=1, keepdims=True)
    _, numbers = ranking._approximate(passages[:50], passages, 1)
    assert (numbers[:, 0] == np.arange(50)).mean() > 0.9


# --------------------------------------------------------------------------------------------------- negatives

ANGLES = {"q0": 0, "p0": 10, "a": 20, "b": 40, "c": 60, "q1": 90, "p1": 80, "near": 5}


def vector(text):
    angle = np.deg2rad(ANGLES[text])
    return [3 * np.cos(angle), 3 * np.sin(angle)]


def test_negatives_are_the_nearest_that_do_not_answer():
    rows = [
        {"query": "q0", "positives": ["p0"], "negatives": ["a", "b", "near"], "scores": [1, 1, 1, 1]},
        {"query": "q1", "positives": ["p1"], "negatives": ["c"]},
        {"query": "q1", "positives": ["c"]},
    ]
    vectors = np.full((3, 5, 2), np.nan)
    for i, row in enumerate(rows):
        for k, text in enumerate([row["query"], *row["positives"], *row.get("negatives", [])]):
            vectors[i, k] = vector(text)

    def mined(rows=rows, **options):
        function = resolve({"name": "mine.negatives", **options}, "transforms")
        return [row["negatives"] for row in apply.apply(function, rows, {"embedding": vectors}, apply.key_of(0))]

    # near is nearer than the positive, so it may well answer; c answers q1, in another row.
    assert mined() == [["a", "b", "c", "p1"], ["b", "a", "p0", "near"], ["b", "a", "p0", "near"]]
    assert mined(count=1) == [["a"], ["b"], ["b"]]
    assert mined(first=2, last=3) == [["a", "b"], ["a", "p0"], ["a", "p0"]]
    assert mined(margin=0.1)[0] == ["b", "c", "p1"], "cos 10 - cos 20 is 0.045"
    named = [row | {"positive_ids": [f"{i}"]} for i, row in enumerate(rows)]
    named[1]["negative_ids"] = ["2"]
    done = apply.apply(resolve("mine.negatives", "transforms"), named, {"embedding": vectors}, apply.key_of(0))
    assert done[0]["negative_ids"] == [None, None, "2", "1"] and "scores" not in done[0] and rows[0]["scores"]
    for options, message in (({"first": 3, "last": 2}, "ranks and counts begin at 1"), ({"count": 0}, "begin at 1")):
        with pytest.raises(UserError, match=message):
            mined(**options)
    with pytest.raises(UserError, match=r"it takes a vector for each text of a list, \[N,K,D\]"):
        resolve("mine.negatives", "transforms")(rows, {"embedding": vectors[:, 0]}, None)
    assert lists.most(1024) == 64


@pytest.mark.slow
def test_a_recipe_mines_negatives_and_learns_from_them(tmp_path):
    rows = [{"query": f"{i}+1", "positives": [f"{i + 1}"]} for i in range(16)]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = recipe.make(
        stages=("near", "hard", "again"),
        model=runs.MODEL,
        tokenizer="tasks.arithmetic.tokenizer",
        data=str(tmp_path / "d.jsonl"),
        objective={"name": "contrastive.info_nce", "learned": True, "temperature": 0.1},
        window=32,
        batch_size=8,
        near={"do": "annotate", "with": {"name": "embedding", "pooling": "last"}},
        hard={"do": "select", "annotations": "@near", "with": {"name": "mine.negatives", "count": 2, "margin": -2.0}},
        again={"data": "@hard", "steps": 3, "microbatches": 1, "log_every": 1, "optimizer": {"lr": 1e-3, "warmup": 0}},
    )
    jaxpost.train(config, tmp_path / "run")
    (file,) = (tmp_path / "run" / "rows").glob("*/part-*.jsonl")
    mined = [json.loads(line) for line in file.read_text().splitlines()]
    assert [row["query"] for row in mined] == [row["query"] for row in rows]
    assert all(len(row["negatives"]) == 2 and row["positives"][0] not in row["negatives"] for row in mined)
    vectors = jaxpost.load(runs.MODEL, mesh=one_device())
    vectors = dataclasses.replace(vectors, tokenizer=arithmetic.tokenizer())
    queries, answers = vectors.embed([row["query"] for row in rows]), vectors.embed([row["positives"][0] for row in rows])
    scores = queries @ answers.T - 9 * np.eye(16)
    assert [row["negatives"][0] for row in mined] == [rows[i]["positives"][0] for i in scores.argmax(1)]
    log = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in log if "loss" in row]
    assert len(losses) == 3 and losses[-1] < losses[0]
    temperatures = [row["temperature"] for row in log if "temperature" in row]
    assert temperatures[0] == pytest.approx(0.1) and temperatures[-1] != temperatures[0]
    with pytest.raises(UserError, match="contrastive/log_scale besides the model's weights"):
        export.export(str(tmp_path / "run"), str(tmp_path / "out"), mesh=one_device())
    assert "modules.json" in export.export(str(tmp_path / "run"), str(tmp_path / "out"), mesh=one_device(), pooling="last")


# ------------------------------------------------------------------------------------------------------- MTEB


def test_mteb_runs_a_task_on_the_models_search(monkeypatch):
    pytest.importorskip("mteb")
    from mteb.mocks.mock_tasks.reranking import MockRerankingTask
    from mteb.mocks.mock_tasks.retrieval import MockRetrievalTask

    from jaxpost.evals import benchmark

    mocks = {"one": MockRetrievalTask, "other": MockRerankingTask}
    monkeypatch.setattr(benchmark, "get_task", lambda name: mocks[name]())
    figures = dict(benchmark.mteb(Placed(), tasks=["one", "other"]))
    assert figures.keys() > {"one/test/ndcg_at_10", "other/test/map_at_100"} and "torch" not in sys.modules
    # Two queries, each with one of two passages; the longer passage comes first for both.
    assert figures["one/test/mrr_at_10"] == pytest.approx((1 + 1 / 2) / 2)
    with pytest.raises(UserError, match="tasks: third"):
        benchmark.mteb.check(Placed(), tasks=["third"])


# ----------------------------------------------------------------------------------------- sentence-transformers


def test_an_exported_model_ends_texts_as_it_was_trained_to(tmp_path):
    spec = loading.describe(MODEL)
    hf.save(tmp_path / "in", loading.weights(spec, one_device()), spec.transformer.arch, MODEL)
    tokenizer.save(characters(), tmp_path / "in")
    names = export.export(str(tmp_path / "in"), str(tmp_path / "out"), mesh=one_device(), pooling="mean", normalise=False)
    assert {"modules.json", "1_Pooling", "model.safetensors", "tokenizer.json"} <= set(names)
    modules = json.loads((tmp_path / "out" / "modules.json").read_text())
    assert [module["type"].rpartition(".")[2] for module in modules] == ["Transformer", "Pooling"]
    pooling = json.loads((tmp_path / "out" / "1_Pooling" / "config.json").read_text())
    assert pooling["pooling_mode_mean_tokens"] and not pooling["pooling_mode_lasttoken"]
    # What sentence-transformers asks of the tokenizer: to pad, and to cut.
    text = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    batch = text(["ab", "a"], padding=True, truncation=True, max_length=16)
    expected = [chat.encode_text(one, characters()).tolist() for one in ("ab", "a")]
    assert batch["input_ids"][0] == expected[0] and batch["input_ids"][1][:3] == expected[1]
    assert batch["attention_mask"][1] == [1, 1, 1, 0]
    cut = text("ab" * 99, truncation=True, max_length=16)["input_ids"]
    assert len(cut) == 16 and cut[-1] == text.eos_token_id
    one, other = (jaxpost.load(str(tmp_path / name), mesh=one_device()) for name in ("in", "out"))
    assert np.array_equal(one.embed(["ab"], pooling="mean"), other.embed(["ab"], pooling="mean"))
