"""Columns that a frozen model makes: the same numbers whether written down or made on the spot, and after a kill as without.

A tiny transformer stands for the frozen model where its arithmetic matters; elsewhere a table of logits does, whose numbers
can be worked out by hand.
"""

import dataclasses
import json
import math
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_pairs import MODEL, PLAIN, compared, pair, plan

from jaxpost import annotate, annotations, columns, export, optim, recipe, sharding, train, writers
from jaxpost.annotators import scores
from jaxpost.declare import objective
from jaxpost.errors import UserError
from jaxpost.models import loading
from jaxpost.objectives.logprobs import REFERENCE, token_scores
from jaxpost.stages import datasets
from jaxpost.stages.plan import columns as batch_columns
from jaxpost.types import Head, Output

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
    state = types.SimpleNamespace(train=params, frozen=jax.tree.map(lambda _: None, params))
    return annotations.attached(made, made.spec, state, out, mesh, fresh=True)


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
