"""Columns that a frozen model makes: the same numbers whether written down or made on the spot, and after a kill as without.

A tiny transformer stands for the frozen model where its arithmetic matters; elsewhere a table of logits does, whose numbers
can be worked out by hand.
"""

import dataclasses
import functools
import json
import math
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import stubs
from test_pairs import MODEL, PLAIN, compared, pair, plan
from test_row_types import ranked
from toy_tokenizers import characters

from jaxpost import annotate, export, metrics, optim, recipe, sharding, train
from jaxpost.annotators import scores
from jaxpost.config.resolve import known, resolve
from jaxpost.data import examples
from jaxpost.declare import Column, annotator, declared, objective
from jaxpost.errors import UserError
from jaxpost.models import hf, loading
from jaxpost.objectives.logprobs import REFERENCE, token_scores
from jaxpost.reporting import writers
from jaxpost.stages import annotations, columns, datasets, evaluation
from jaxpost.stages.plan import columns as batch_columns
from jaxpost.stages.plan import scalars
from jaxpost.types import Head, Output, Term

ROWS = [pair("q" * (1 + i % 3), chr(97 + i % 26) * (1 + i % 4), "B" * (1 + i % 2)) for i in range(60)]


@objective(rows="pairs", columns=REFERENCE)
def referring(forward, params, batch, key):
    """An objective of pairs with a reference, never called here."""


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXPOST_CACHE", str(tmp_path / "cache"))


def table(params, batch):
    """The hidden states are the logits: a row of the table for each token."""
    return Output(params["table"][batch["tokens"]], Head(jnp.eye(params["table"].shape[1])))


def with_table(made):
    """A plan's model with the table for a transformer, and its weights."""
    arch = made.spec.transformer.arch
    weights = {"table": jax.random.normal(jax.random.PRNGKey(0), (arch.vocab, arch.vocab))}
    return dataclasses.replace(made.spec, transformer=types.SimpleNamespace(arch=arch, forward=table)), weights


def referenced(made, params, out, mesh):
    """The plan with what its annotations make of weights that it starts from: these."""
    return annotations.attached(made, made.spec, state_of(params), out, mesh, fresh=True)


@pytest.mark.slow
def test_stored_columns_are_those_made_on_the_spot(tmp_path):
    mesh = sharding.make_mesh(1, 1, 1, devices=jax.devices()[:1])
    for shared in (False, True):
        made, s = plan(tmp_path, ROWS, referring, held_out=8, shared_prefix=shared, epochs=2)
        with sharding.use(mesh):
            params = loading.weights(made.spec, mesh)
            made = annotations.planned(made, mesh)
            joined = referenced(made, params, tmp_path / "columns", mesh)
            here = jax.jit(lambda p, b, f=made.spec: scores.ref_logps(f.transformer.forward, p, b))
            batches = [joined.source(None) for _ in range(len(joined.source))] + joined.held_out
            for batch in batches:
                expected = jax.device_get(here(params, sharding.distribute(batch, mesh, s.batch_size))["ref_logps"])
                assert batch["ref_logps"].dtype == np.float32 and np.array_equal(batch["ref_logps"], expected), "bit for bit"
                assert (batch["ref_logps"] != 0).sum() == batch["mask"].sum()
            # At another shape sums may come in another order.
            row = {k: jnp.asarray(v[:1]) for k, v in batches[0].items()}
            alone = token_scores(made.spec.transformer.forward(params, row), row)["logps"]
            np.testing.assert_allclose(batches[0]["ref_logps"][:1], alone, atol=1e-5)


def test_it_is_said_whether_columns_were_made(tmp_path, capsys):
    mesh = sharding.make_mesh(1, 1, 1, devices=jax.devices()[:1])
    made, _ = plan(tmp_path, ROWS)
    found, weights = with_table(made)
    said = []
    for _ in range(2):
        capsys.readouterr()
        with sharding.use(mesh):
            (folder,) = columns.make("logps", made, found, lambda: weights, tmp_path / "out", mesh)
        said.append(capsys.readouterr().err)
    assert f"wrote logps of {made.sets[0].encoded.learned.sum()} tokens to {folder}" in said[0] and "already" not in said[0]
    assert f"logps is in {folder} already; nothing to do" in said[1] and "wrote" not in said[1]


def test_a_killed_annotation_goes_on_bit_for_bit(tmp_path, monkeypatch):
    made, _ = plan(tmp_path, ROWS * 4, batch_size=8)
    found, weights = with_table(made)
    mesh, scored = sharding.make_mesh(), []
    monkeypatch.setattr(columns, "SECONDS", 0.0)
    distribute = sharding.distribute
    monkeypatch.setattr(columns.sharding, "distribute", lambda *given: scored.append(1) or distribute(*given))
    options = [{"name": "topk", "k": 3}, made, found, lambda: weights]
    (whole,) = columns.make(*options, tmp_path / "whole", mesh)
    count = len(scored)

    def struck(path, content):
        if Path(path).name == "part-00000002.npz":
            raise KeyboardInterrupt
        replace(path, content)

    replace = writers.replace
    monkeypatch.setattr(writers, "replace", struck)
    with pytest.raises(KeyboardInterrupt):
        columns.make(*options, tmp_path / "cut", mesh)
    monkeypatch.setattr(writers, "replace", replace)
    (folder,) = (tmp_path / "cut").iterdir()
    assert sorted(p.name for p in folder.iterdir()) == ["meta.json", "part-00000000.npz", "part-00000001.npz"]
    scored.clear()
    (again,) = columns.make(*options, tmp_path / "cut", mesh)
    assert len(scored) == count - 2 and again.name == whole.name
    files = {p.name: p.read_bytes() for p in whole.iterdir()}
    assert files == {p.name: p.read_bytes() for p in again.iterdir()}
    assert files.keys() == {"meta.json", "teacher_tokens.npy", "teacher_logps.npy"}
    scored.clear()
    columns.make(*options, tmp_path / "cut", mesh)
    assert not scored, "what is there is not made again"


def test_damaged_columns_are_made_again_where_they_can_be_and_else_named(tmp_path, capsys):
    made, _ = plan(tmp_path, ROWS)
    found, weights = with_table(made)
    options = ["logps", made, found, lambda: weights, tmp_path / "out", sharding.make_mesh()]
    (folder,) = columns.make(*options)
    meta, column = folder / "meta.json", folder / "logps.npy"
    whole = {file: file.read_bytes() for file in folder.iterdir()}
    made.settings.annotations = str(tmp_path / "out")
    for file, content in (
        (meta, whole[meta][:-9]),
        (meta, b"[]"),
        (column, whole[column][:-4]),
        (column, b""),
        (column, None),
        (column, whole[column][:-1] + bytes([whole[column][-1] ^ 1])),
    ):
        for path, bytes_of in whole.items():
            path.write_bytes(bytes_of)
        file.unlink() if content is None else file.write_bytes(content)
        with pytest.raises(UserError, match=f"{file}: "):
            annotations.planned(made, options[-1])
    columns.make(*options)
    assert f"{column}: damaged (its bytes are not those that were written)." in capsys.readouterr().err
    assert {file: file.read_bytes() for file in folder.iterdir()} == whole
    columns.make(*options)
    assert "nothing to do" in capsys.readouterr().err


def test_other_weights_data_or_keywords_are_other_columns(tmp_path):
    made, _ = plan(tmp_path, ROWS)
    other, _ = plan(tmp_path, ROWS[1:])
    mesh, (found, weights) = sharding.make_mesh(), with_table(made)

    def double(forward, params, batch):
        return {"double": 2 * token_scores(forward(params, batch), batch)["logps"]}

    folders = set()
    for what, of, model in (
        ("ref_logps", made, found),
        ("ref_logps", other, found),
        ("ref_logps", made, dataclasses.replace(found, config=found.config | {"rope_theta": 3.0})),
        ({"name": "topk", "k": 2}, made, found),
        ({"name": "topk", "k": 4}, made, found),
    ):
        folders |= set(columns.make(what, of, model, lambda: weights, tmp_path / "c", mesh))
    assert len(folders) == 5
    own = annotate.named({"annotator": double}, ())["annotator"]
    (folder,) = columns.make(own, made, found, lambda: weights, tmp_path / "c", mesh)
    (plain,) = columns.make("logps", made, found, lambda: weights, tmp_path / "c", mesh)
    assert np.array_equal(columns.read(folder)["double"], 2 * columns.read(plain)["logps"])
    for what, message in (("topks", "Did you mean 'topk'"), ({"name": "topk", "k": 1000}, "k=1000; give 1 to 99")):
        with pytest.raises(UserError, match=message):
            columns.make(what, made, found, lambda: weights, tmp_path / "c", mesh)
    with pytest.raises(UserError, match=r"an annotator returns .* with \[B,S\] = \[8, 32\]"):
        columns.make("test_annotate.bad", made, found, lambda: weights, tmp_path / "c", mesh)


def bad(forward, params, batch):
    """One number a row."""
    return {"x": jnp.sum(batch["tokens"], axis=1)}


def test_annotations_come_along_and_must_be_of_this_data(tmp_path):
    @objective(rows="pairs", columns={"teacher_tokens": ("BSK", "int32"), **REFERENCE})
    def reads(forward, params, batch, key):
        """Reads what a teacher said."""

    made, _ = plan(tmp_path, ROWS, reads, held_out=8)
    mesh, (found, weights) = sharding.make_mesh(), with_table(made)
    with pytest.raises(UserError, match="reads the column teacher_tokens, which its batches do not have"):
        annotations.planned(made, mesh)
    out = tmp_path / "teacher"
    folders = columns.make({"name": "topk", "k": 2}, made, found, lambda: weights, out, mesh)
    named, s = plan(tmp_path, ROWS, reads, held_out=8, annotations=str(out))
    joined = annotations.planned(named, mesh)
    batch = joined.source(None)
    best = jnp.argmax(weights["table"], axis=1)[np.roll(batch["tokens"], 1, axis=1)]
    assert np.array_equal(batch["teacher_tokens"][..., 0], np.where(batch["mask"], best, 0))
    assert joined.held_out[0]["teacher_tokens"].shape == (8, 32, 2) and joined.data != named.data
    (shape,) = (x for name, x in batch_columns(s, joined.objective).items() if name == "teacher_tokens")
    assert (shape.shape, shape.dtype) == ((8, 32, 2), np.int32)
    # The reference's column is still to be made, beside the teacher's; not where the folder has it already.
    whole = referenced(joined._replace(spec=found), weights, tmp_path / "columns", mesh)
    assert {"ref_logps", "teacher_tokens"} <= whole.source(None).keys()
    other, _ = plan(tmp_path, ROWS[1:], reads, annotations=str(out))
    with pytest.raises(UserError, match="has no columns for this data, or not for all of it"):
        annotations.planned(other, mesh)
    columns.make({"name": "topk", "k": 3}, made, found, lambda: weights, out, mesh)
    with pytest.raises(UserError, match="is there twice, in "):
        annotations.planned(named, mesh)
    (folders[0] / "meta.json").unlink()
    for where, message in ((tmp_path / "none", "no folder"), (folders[0], "has no columns for this data")):
        gone, _ = plan(tmp_path, ROWS, reads, held_out=8, annotations=str(where))
        with pytest.raises(UserError, match=message):
            annotations.planned(gone, mesh)


def test_what_annotators_say_by_hand():
    # Two tokens of vocabulary 2, certain to one in four: log-odds of log 3 for the token itself to come again.
    logits = jnp.log(3.0) * jnp.eye(2)
    batch = {"tokens": jnp.array([[0, 0, 1, 1, 0]]), "segments": jnp.array([[1, 1, 1, 2, 2]])}
    batch["mask"] = jnp.array([[False, True, True, False, True]])
    params = {"table": logits, "reward_head": {"kernel": jnp.array([[1.0], [0.0]])}}
    right, wrong = math.log(0.75), math.log(0.25)
    expected = [[0, right, wrong, 0, wrong]]
    np.testing.assert_allclose(scores.ref_logps(table, params, batch)["ref_logps"], expected, rtol=1e-6)
    two = scores.logps(table, params, batch)
    np.testing.assert_allclose(two["logps"], expected, rtol=1e-6)
    np.testing.assert_allclose(two["entropy"][0, 1], -0.75 * right - 0.25 * wrong, rtol=1e-6)
    mean = math.exp(-(right + wrong) / 2)
    found = scores.perplexity(table, params, batch)["perplexity"]
    np.testing.assert_allclose(found, [[mean, mean, mean, 4, 4]], rtol=1e-6)
    # The head reads the first logit at the last learned token: 1, then 0.
    found = scores.reward(table, params, batch)["reward"]
    np.testing.assert_allclose(found, [[0, 0, 0, math.log(3), math.log(3)]], rtol=1e-6)
    top = scores.topk(table, params, batch, k=2)
    learned = np.array([1, 2, 4])
    assert top["teacher_tokens"][0, learned].tolist() == [[0, 1], [0, 1], [1, 0]]
    np.testing.assert_allclose(top["teacher_logps"][0, learned], [[right, wrong]] * 3, rtol=1e-6)
    hotter = scores.topk(table, params, batch, k=1, temperature=2.0)["teacher_logps"][0, learned]
    np.testing.assert_allclose(hotter, math.log(3**0.5 / (1 + 3**0.5)), rtol=1e-6)
    state = scores.hidden(table, params, batch)["teacher_hidden"]
    assert np.array_equal(state[0, 1:], logits[batch["tokens"][0, :-1]])
    with pytest.raises(UserError, match="the model has no reward head"):
        scores.reward(table, {"table": logits}, batch)


# ---------------------------------------------------------------------------------------------------- Every annotator

ANNOTATORS = known("annotators")
NEEDED = {"scores.topk": {"k": 4}}  # keywords that suit the stub


def contracted(name: str, rows, shape=(stubs.ROWS, stubs.LENGTH)) -> tuple[dict, dict]:
    """(an annotator's columns of a batch of these rows, the batch)."""
    batch = stubs.pack(rows, shape)
    program = functools.partial(resolve({"name": name, **NEEDED.get(name, {})}, "annotators"), stubs.forward)
    return jax.device_get(jax.jit(program)(stubs.init(), batch)), batch


def by_document(column: np.ndarray, batch: dict) -> dict[bytes, np.ndarray]:
    """The learned places of a column, for each document by its tokens."""
    spans = [(i, batch["segments"][i] == n) for i in range(len(column)) for n in range(1, int(batch["segments"][i].max()) + 1)]
    return {batch["tokens"][i, own].tobytes(): column[i, own & batch["mask"][i]] for i, own in spans}


@pytest.mark.parametrize("name", ANNOTATORS)
def test_every_annotator_is_deterministic_and_unchanged_by_padding_and_packing(name):
    rows = stubs.documents(2, columns={})
    made, batch = contracted(name, rows)
    again, _ = contracted(name, rows)
    # The same documents one a row, in another order, with padding at the end of rows and of the batch.
    apart = [[unit] for row in reversed(rows) for unit in row]
    other, spread = contracted(name, apart, (len(apart) + 2, stubs.LENGTH + 3))
    whole = declared(resolve(name, "annotators"), "per") == "document"
    assert made.keys() == other.keys() and made
    for column, values in made.items():
        assert values.shape[:2] == batch["mask"].shape and np.array_equal(values, again[column])
        each, moved = by_document(values, batch), by_document(other[column], spread)
        assert each.keys() == moved.keys() and len(each) == len(apart)
        for document, numbers in each.items():
            # Sums over a document or a vocabulary may come in another order.
            np.testing.assert_allclose(numbers, moved[document], rtol=1e-5, atol=1e-6)
            assert not whole or (numbers == numbers[0]).all()


def test_an_annotator_is_per_token_or_per_document_and_nothing_else():
    assert {n for n in ANNOTATORS if declared(resolve(n, "annotators"), "per") == "document"} == {
        "scores.perplexity",
        "scores.reward",
        "scores.embedding",
    }
    with pytest.raises(UserError, match="@annotator.per='row'.: give 'token' or 'document'"):
        annotator(per="row")


def per_token(forward, params, batch):
    """Perplexity as an annotator of tokens: what was stored before documents had one value."""
    return {"perplexity": scores.perplexity(forward, params, batch)["perplexity"]}


@pytest.mark.parametrize("shared", [False, True])
def test_a_documents_value_is_stored_once_and_joined_as_if_each_token_had_it(tmp_path, shared):
    made, s = plan(tmp_path, ROWS, shared_prefix=shared, batch_size=8)
    mesh, (found, weights) = sharding.make_mesh(), with_table(made)
    (once,), (often,) = (
        columns.make(what, made, found, lambda: weights, tmp_path / "c", mesh) for what in ("perplexity", per_token)
    )
    stored, learned = columns.read(once)["perplexity"], made.sets[0].encoded.learned
    assert stored.shape == (2 * len(ROWS),) and columns.read(often)["perplexity"].shape == (learned.sum(),)
    batches = [
        datasets.batches(made.sets, s, mesh, {made.sets[0].encoded.digest: columns.by_token(folder)[0]})[0](None)
        for folder in (once, often)
    ]
    assert batches[0]["perplexity"].dtype == np.float32 and np.array_equal(*(b["perplexity"] for b in batches))
    # In the order of the data's examples, the chosen before the rejected: each by itself.
    each = annotations.per_example(once)["perplexity"]
    assert each.shape == (len(ROWS), 2)
    for i in (0, 7, 31):
        documents = examples.documents(made.sets[0].encoded.examples[i])
        for value, document in zip(each[i], documents, strict=True):
            alone = {k: jnp.asarray(x)[None] for k, x in document.items()} | {
                "segments": jnp.ones((1, len(document["mask"])), int)
            }
            np.testing.assert_allclose(value, scores.perplexity(table, weights, alone)["perplexity"][0, 0], rtol=1e-5)
    with pytest.raises(
        UserError, match=f"{often}: perplexity has a value for each token; take an annotator with one for each doc"
    ):
        annotations.per_example(often)


def test_documents_of_lists_that_differ_in_length_keep_their_own_values(tmp_path):
    lists = [{"prompt": "q", "answers": list("abcd"[:n]), "ranks": list(range(n))} for n in (3, 2, 4, 2) * 6]
    made, s = plan(tmp_path, lists, ranked(tmp_path))
    mesh, (spec, weights) = sharding.make_mesh(), with_table(made)
    (folder,) = columns.make("perplexity", made, spec, lambda: weights, tmp_path / "c", mesh)
    each = annotations.per_example(folder)["perplexity"]
    assert np.isfinite(each).sum(axis=1).tolist() == [3, 2, 4, 2] * 6 and each.shape == (24, 4)
    alone = answers(made)
    by_answer = {letter: scores.perplexity(table, weights, x)["perplexity"][0, 0] for letter, x in alone.items()}
    for values, row in zip(each, lists, strict=True):
        np.testing.assert_allclose(values[: len(row["answers"])], [by_answer[a] for a in row["answers"]], rtol=1e-5)
    joined, _ = datasets.batches(made.sets, s, mesh, {made.sets[0].encoded.digest: columns.by_token(folder)[0]})
    batch = joined(None)
    for letter, value in by_answer.items():
        (token,) = characters().encode(letter, add_special_tokens=False)
        np.testing.assert_allclose(batch["perplexity"][(batch["tokens"] == token) & batch["mask"]], value, rtol=1e-5)


def answers(made) -> dict:
    """{the answer's letter: its document as a batch} of the longest list of a plan's data."""
    example = max((made.sets[0].encoded.examples[i] for i in range(24)), key=lambda example: len(example["tokens"]))
    documents = [{k: jnp.asarray(x)[None] for k, x in document.items()} for document in examples.documents(example)]
    return {
        letter: document | {"segments": jnp.ones(document["mask"].shape, int)}
        for letter, document in zip("abcd", documents, strict=True)
    }


def test_an_embedding_is_the_mean_hidden_state_of_the_learned_tokens_one_an_example():
    hidden = jnp.arange(10.0).reshape(1, 5, 2)
    batch = {"segments": jnp.array([[1, 1, 1, 2, 2]]), "mask": jnp.array([[False, True, True, False, True]])}
    made = scores.embedding(lambda params, batch: Output(hidden, None), {}, batch)["embedding"]
    assert made.tolist() == [[[3, 4]] * 3 + [[8, 9]] * 2]


# ------------------------------------------------------------------------------------------- Which annotation, of which weights


def surprise(forward, params, batch, *, scale: float = 1.0):
    """surprise [B,S]: less the log-probability, and how many times that."""
    return {"surprise": -scale * token_scores(forward(params, batch), batch)["logps"]}


@objective(rows="pairs", columns={"surprise": Column("BS", "float32", by={"name": surprise, "scale": 2.0}, weights="current")})
def surprised(forward, params, batch, key):
    """The mean of the column that the weights of the step are asked for."""
    total = jnp.sum(jnp.where(batch["mask"], batch["surprise"], 0.0))
    return {"surprise": Term(total, jnp.sum(batch["mask"].astype(jnp.float32)))}, {}


def state_of(params):
    """A train state of these weights, all of which train."""
    return types.SimpleNamespace(train=params, frozen=jax.tree.map(lambda _: None, params))


def test_current_weights_are_asked_of_each_batch_and_of_held_out_ones(tmp_path):
    made, _ = plan(tmp_path, ROWS, {"name": surprised}, held_out=8, microbatches=2, batch_size=16)
    mesh = sharding.make_mesh(1, 1, 1, devices=jax.devices()[:1])
    made = annotations.planned(made, mesh)
    (one,) = made.annotations
    assert one.weights == "current" and one.columns["surprise"].shape == (16, 32)
    made.settings.best = "eval/los"  # for which the objective is traced, with the column
    with pytest.raises(UserError, match="'eval/los' is no figure of train's evaluations. Did you mean 'eval/loss'"):
        evaluation.check(made, mesh)
    params, plain = loading.weights(made.spec, mesh), made.source(None)
    made.source.position = 0
    live = annotations.attached(made, made.spec, state_of(params), tmp_path / "columns", mesh, fresh=True)
    assert not (tmp_path / "columns").exists() and live.source.columns["surprise"].shape == (16, 32)
    program = jax.jit(one.program(made.spec.transformer.forward))
    for scale in (1.0, 0.5):
        weights = jax.tree.map(lambda x, scale=scale: scale * x, params)
        live.source.position = 0
        batch = live.source(state_of(weights))
        assert live.source.position == 1 and batch.keys() == {*plain, "surprise"}
        assert all(np.array_equal(batch[k], plain[k]) for k in plain)
        np.testing.assert_allclose(batch["surprise"], program(weights, plain)["surprise"], rtol=1e-5, atol=1e-6)
    # A held-out batch comes without the column, and its loss is of the weights that are evaluated.
    (batch,) = made.held_out
    value = metrics.values(annotations.evaluation(made)(weights, batch, jax.random.PRNGKey(0)))["loss"]
    wanted = np.asarray(program(weights, batch)["surprise"])[batch["mask"]]
    assert "surprise" not in batch and value == pytest.approx(wanted.mean(), rel=1e-5)


def test_a_recipe_names_annotators_and_the_weights_that_they_take(tmp_path):
    mesh = sharding.make_mesh(1, 1, 1, devices=jax.devices()[:1])
    plain, _ = plan(tmp_path, ROWS)
    start, other = (loading.weights(plain.spec, mesh, seed=seed) for seed in (0, 1))
    hf.save(tmp_path / "other", other, plain.spec.transformer.arch, plain.spec.config)
    asked = {
        "harder": {"name": "perplexity"},
        "their": {"name": surprise, "scale": 3.0, "weights": str(tmp_path / "other")},
        "ref": {"name": "ref_logps", "weights": str(tmp_path / "other")},
    }
    made, s = plan(tmp_path, ROWS, referring, annotations=asked)
    assert s.annotations.their.name == "test_annotate.surprise"
    made = annotations.planned(made, mesh)
    assert [a.weights for a in made.annotations] == ["start", *[str(tmp_path / "other")] * 2], "of the reference, once"
    assert made.data != plain.data, "what the other model is decides whether a run is continued"
    shapes = batch_columns(s, made.objective, made.spec)
    joined = annotations.attached(made, made.spec, state_of(start), tmp_path / "columns", mesh, fresh=True)
    batch = joined.source(None)
    columns_of_all = batch | scalars(0, 1)
    assert {k: (x.shape, x.dtype) for k, x in columns_of_all.items()} == {k: (x.shape, x.dtype) for k, x in shapes.items()}
    forward, mask = made.spec.transformer.forward, batch["mask"]
    theirs = token_scores(forward(other, batch), batch)["logps"]
    wanted = {
        "surprise": -3 * theirs,
        "ref_logps": theirs,
        "perplexity": scores.perplexity(forward, start, batch)["perplexity"],
    }
    for name, values in wanted.items():
        np.testing.assert_allclose(batch[name][mask], np.asarray(values)[mask], rtol=1e-4, err_msg=name)
        assert not batch[name][~mask].any()


def test_annotations_that_cannot_be_are_refused_before_anything_is_compiled(tmp_path):
    mesh = sharding.make_mesh()

    @objective(rows="pairs", columns={"reward": Column("BS", "float32", by="logps")})
    def mistaken(forward, params, batch, key):
        """Declares an annotator of other columns."""

    hf.save(tmp_path / "small", *small_model(mesh))
    for entry, loss, message in (
        ("perplexities", referring, "has no 'perplexities'.* Did you mean 'perplexity'"),
        ({"name": "perplexity", "weights": ""}, referring, "config.annotations.mine.weights: ''; give start, current"),
        ({"name": "perplexity", "weights": "@sft"}, referring, "weights='@sft' names no earlier stage of this recipe"),
        ({"name": "test_annotate.bad"}, referring, r"an annotator returns .* with \[B,S\] = \[8, 32\]"),
        ({"name": "reward"}, referring, "annotator reward: the model has no reward head"),
        ({"name": "test_annotate.masked"}, referring, "config.annotations.mine: the column mask is there already"),
        ({"name": "logps", "weights": str(tmp_path / "small")}, referring, "small has a vocabulary of 50, the tokenizer "),
        ({"name": "perplexity"}, mistaken, "its column reward is by scores.logps, which makes entropy, logps"),
        ({"name": "perplexity"}, compared, 'reads the column ref_logps, .*or declare it as Column.*, by="ref_logps"'),
        (
            {"name": "perplexity"},
            needy,
            "the column rated, which its batches do not have; write a number of that name .* have jaxpost.annotate make",
        ),
    ):
        made, _ = plan(tmp_path, ROWS, loss, annotations={"mine": entry})
        with pytest.raises(UserError, match=message):
            annotations.planned(made, mesh)


def small_model(mesh):
    """(weights, architecture, config) of a model with half of the vocabulary."""
    spec = loading.describe({**MODEL, "vocab_size": 50}, text=False)
    return loading.weights(spec, mesh), spec.transformer.arch, spec.config


def masked(forward, params, batch):
    """A column that every batch has."""
    return {"mask": batch["mask"]}


@objective(rows="pairs", columns={"rated": Column("BS", "float32")})
def needy(forward, params, batch, key):
    """Reads a column that nothing makes."""


def test_a_start_is_kept_as_it_was_and_current_weights_are_those_of_the_state():
    batch = {"tokens": jnp.array([[0, 1, 1]]), "mask": jnp.array([[False, True, True]])}
    spec = loading.ModelSpec(types.SimpleNamespace(forward=table), None, {}, None)
    made = types.SimpleNamespace(spec=spec, trainable=".*", settings=types.SimpleNamespace(seed=0))
    first = state_of({"table": jnp.eye(2)})
    of = [annotations.Annotation({}, columns.entry(surprise), weights) for weights in ("start", "current", "start")]
    options = {"origin": spec, "fresh": True, "weights_of": None}
    asked = annotations.programs(of, made, first, lambda: first.train, None, **options)
    before = [program(first, batch)["surprise"] for program in asked]
    first.train["table"].delete()  # as the step does, to which the state is donated
    later = state_of({"table": 3 * jnp.eye(2)})
    start, current, again = (program(later, batch)["surprise"] for program in asked)
    assert np.array_equal(start, before[0]) and np.array_equal(again, start) and np.array_equal(before[1], start)
    np.testing.assert_allclose(current[0, 2], math.log(1 + math.exp(-3)), rtol=1e-6)


def test_chunks_of_places_change_nothing(monkeypatch):
    tokens = np.random.default_rng(0).integers(0, 9, (2, 7))
    params = {"table": jax.random.normal(jax.random.PRNGKey(1), (9, 9))}
    batch = {"tokens": jnp.asarray(tokens), "mask": jnp.arange(7) != jnp.array([[0], [4]])}
    whole = scores.topk(table, params, batch, k=4)
    monkeypatch.setattr(scores.logprobs, "CHUNK", 2 * 9 * 3)
    parts = scores.topk(table, params, batch, k=4)
    assert all(np.array_equal(whole[name], parts[name]) for name in whole)


def test_the_command_names_what_is_missing(tmp_path):
    config = recipe.make(model=MODEL, tokenizer="test_pairs.characters", template=PLAIN, stages=("a", "b"))
    one = recipe.make(model=MODEL, tokenizer="test_pairs.characters", template=PLAIN)
    for given, message in (
        ({"config": config, "out": "o"}, "--stage=... is required: the recipe has a, b"),
        ({"config": config, "out": "o", "stage": "c"}, "--stage=c: the recipe has no such stage"),
        ({"config": one}, "--out=... is required where there is no --workdir"),
        ({"config": one, "out": "o"}, "config.window: 512 tokens, but the model takes 16"),
    ):
        with pytest.raises(UserError, match=message):
            annotate.annotate(what="ref_logps", **given)


@pytest.mark.slow
def test_a_run_starts_at_its_reference_and_finds_it_again(tmp_path):
    file = tmp_path / "d.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    adapter = {"name": "lora", "rank": 2}
    settings = {"model": MODEL, "tokenizer": "test_pairs.characters", "template": PLAIN, "data": str(file), "window": 32}
    settings |= {
        "objective": "preference.sigmoid",
        "steps": 3,
        "log_every": 1,
        "save_every": 1,
        "adapter": adapter,
    }
    config = recipe.opened(None, **settings)
    (folder,) = {Path(f).parent for f in annotate.annotate(config, "ref_logps", workdir=tmp_path / "run")}
    made = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    train.run(config, tmp_path / "run")
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == made, "the run took what was there"
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if "loss" in row]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-6) and losses[2] != losses[0]
    # Columns that are gone are made of the same weights again.
    for path in sorted((tmp_path / "run" / "columns").rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()
    last = tmp_path / "run" / "checkpoints" / "train" / "3"
    last.rename(tmp_path / "away")
    train.run(config, tmp_path / "run")
    again = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["loss"] for row in again if "loss" in row] == losses
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == made


def test_sets_are_joined_by_example_not_by_row(tmp_path):
    made, s = plan(tmp_path, ROWS, compared)
    total = int(made.sets[0].encoded.learned.sum())
    joined = datasets.rows(made.sets[0], s, {"n": np.arange(total, dtype=np.int32)})
    seen = np.concatenate([joined[i]["n"][joined[i]["mask"]] for i in range(len(joined))])
    assert sorted(seen.tolist()) == list(range(total)) and seen.tolist() != list(range(total))
    first = made.sets[0].encoded.examples[0]
    place = next(i for i in range(len(joined)) if joined[i]["n"].max() and 0 in joined[i]["n"][joined[i]["mask"]])
    start = int(np.flatnonzero((joined[place]["n"] == 0) & joined[place]["mask"])[0]) - int(np.argmax(first["mask"]))
    assert np.array_equal(joined[place]["tokens"][start : start + len(first["tokens"])], first["tokens"])


@objective(rows="pairs", leaves={"reward_head/kernel": ("D1", 0.5)})
def scored(forward, params, batch, key):
    """An objective with a head of its own, never called here."""


def test_an_objectives_leaf_is_there_from_the_start_and_trains_beside_an_adapter(tmp_path):
    made, _ = plan(tmp_path, ROWS, scored, adapter={"name": "lora", "rank": 2})
    mesh = sharding.make_mesh()
    params = loading.weights(made.spec, mesh)
    assert np.array_equal(params["reward_head"]["kernel"], np.full((16, 1), 0.5))
    shapes = loading.abstract(made.spec.transformer, mesh, made.spec.adapter, made.spec.leaves)
    assert jax.tree.map(lambda x: x.shape, shapes) == jax.tree.map(lambda x: x.shape, params)
    train, frozen = optim.partition(params, made.trainable)
    assert train["reward_head"]["kernel"] is not None and frozen["embed"]["weight"] is not None
    alone, _ = plan(tmp_path, ROWS, adapter={"name": "lora", "rank": 2})
    assert made.trained == alone.trained + 16 and "reward_head" not in loading.weights(alone.spec, mesh)


@pytest.mark.slow
def test_a_reward_model_goes_on_scores_and_is_no_language_model(tmp_path):
    file = tmp_path / "d.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    settings = {"model": MODEL, "tokenizer": "test_pairs.characters", "template": PLAIN, "data": str(file), "window": 32}
    settings |= {"log_every": 1, "save_every": 1, "optimizer": {"lr": 1e-2, "warmup": 0}}
    config = recipe.opened(None, objective="reward_model.bradley_terry", steps=3, **settings)
    folder = tmp_path / "run"

    def losses():
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        return [row["loss"] for row in rows if "loss" in row]

    train.run(config, folder)
    expected = losses()
    assert expected[0] == pytest.approx(math.log(2), abs=1e-6) and expected[2] < expected[1]
    (folder / "checkpoints" / "train" / "3").rename(tmp_path / "away")
    train.run(config, folder)
    assert losses() == expected
    (of,) = annotate.annotate(None, "reward", out=tmp_path / "r", **settings | {"model": str(folder)}, objective=compared)
    rewards = columns.read(of)["reward"]
    assert rewards.std() > 0
    mesh = sharding.make_mesh()
    made, _ = plan(tmp_path, ROWS, model=str(folder), tokenizer="")
    assert "reward_head" not in loading.weights(made.spec, mesh), "another objective has no use for it"
    with pytest.raises(UserError, match="reward_head/kernel besides the model's weights"):
        export.export(str(folder), str(tmp_path / "out"), mesh=mesh)
