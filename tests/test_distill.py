"""Distillation against divergences written out in float64 over the whole vocabulary, differentiated numerically."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs
from test_pairs import MODEL, PLAIN

from jaxpost import annotate, export, metrics, recipe, sharding, train
from jaxpost.config.resolve import resolve
from jaxpost.errors import UserError
from jaxpost.models import hf, loading
from jaxpost.models.heads import logits
from jaxpost.objectives import distill, logprobs
from jaxpost.stages import annotations
from jaxpost.stages.plan import plan_stage
from jaxpost.step import gradients
from jaxpost.types import Head, Output

BATCHES, B, S, V, K, WIDTH = 50, 2, 5, 7, 3, 4
MASK = np.array([[0, 1, 0, 1, 1], [0, 0, 1, 0, 0]], bool)
BEFORE = [(0, 0), (0, 2), (0, 3), (1, 1)]  # the places that predict the learned tokens
TEMPERATURE = 1.7

RNG = np.random.default_rng(5)
STUDENT = RNG.normal(size=(BATCHES, B, S, V)).astype(np.float32)
HIDDEN = RNG.normal(size=(BATCHES, B, S, WIDTH)).astype(np.float32)
UNEMBED = RNG.normal(size=(V, WIDTH)).astype(np.float32)


def _log_softmax(x):
    return x - np.log(np.sum(np.exp(x), axis=-1, keepdims=True))


TEACHER = _log_softmax(HIDDEN.astype(np.float64) @ UNEMBED.T.astype(np.float64) / TEMPERATURE)
TOP = np.argsort(-TEACHER, axis=-1)[..., :K]
# A stored column is about the token at its own place: what the place before it predicts.
STORED = {
    "teacher_tokens": np.roll(TOP, 1, axis=2).astype(np.int32),
    "teacher_logps": np.roll(np.take_along_axis(TEACHER, TOP, -1), 1, axis=2).astype(np.float32),
}


def _kl(p, q):
    return np.sum(np.exp(p) * (p - q), axis=-1)


def _middle(beta):
    def loss(p, q):
        m = np.log(beta * np.exp(p) + (1 - beta) * np.exp(q))
        return beta * _kl(p, m) + (1 - beta) * _kl(q, m)

    return loss


def _cut(p, q):
    """The divergence of the top and of all the others as one outcome."""

    def short(x):
        top = np.take_along_axis(x, TOP, -1)
        return np.concatenate([top, np.log(1 - np.sum(np.exp(top), -1, keepdims=True))], axis=-1)

    return _kl(short(p), short(q))


LOSSES = {
    "forward_kl": ({}, _kl),
    "reverse_kl": ({}, lambda p, q: _kl(q, p)),
    "jensen_shannon": ({"beta": 0.3}, _middle(0.3)),
    "top_k": ({}, _cut),
}


def _measured(name, options, columns, student=STUDENT, head=UNEMBED):
    """(losses, gradients by the student's logits, metrics) of every batch; the student's hidden states are its logits."""
    objective = resolve({"name": f"distill.{name}", "temperature": TEMPERATURE, **options}, "objectives")

    def one(student, columns):
        params = {"student": student, "teacher_head": {"weight": jnp.asarray(head)}}
        forward = lambda params, batch: Output(params["student"], Head(jnp.eye(V)))  # noqa: E731
        batch = {"mask": MASK, "tokens": MASK.astype(np.int32), "segments": np.ones_like(MASK, np.int32), **columns}
        frozen = jax.tree.map(lambda _: None, params)
        loss, grads, measured = gradients(forward, objective, params, frozen, batch, jax.random.PRNGKey(0))
        return loss, grads, measured

    return jax.device_get(jax.jit(lambda s, c: jax.lax.map(lambda x: one(*x), (s, c)))(student, columns))


@pytest.mark.parametrize("name", LOSSES)
def test_value_and_gradient_are_the_divergences(name):
    options, divergence = LOSSES[name]
    found, grads, _ = _measured(name, options, STORED if name == "top_k" else {"teacher_hidden": np.roll(HIDDEN, 1, axis=2)})

    def reference(student):
        all_places = divergence(TEACHER, _log_softmax(student / TEMPERATURE))
        return sum(all_places[:, i, j] for i, j in BEFORE) / len(BEFORE)

    exact, step = STUDENT.astype(np.float64), 1e-4
    # float32 logits of a handful of terms; a divergence is a small difference of larger numbers, hence the absolute part.
    np.testing.assert_allclose(found, reference(exact), rtol=1e-5, atol=1e-6)
    wanted = np.zeros_like(exact)
    for place in np.ndindex(B, S, V):
        up, down = exact.copy(), exact.copy()
        up[:, *place] += step
        down[:, *place] -= step
        wanted[:, *place] = (reference(up) - reference(down)) / (2 * step)
    np.testing.assert_allclose(grads["student"], wanted, rtol=1e-5, atol=1e-6)
    assert not grads["teacher_head"]["weight"].any()


def test_a_student_like_its_teacher_has_nothing_to_learn():
    hidden, eye = {"teacher_hidden": np.roll(STUDENT, 1, axis=2)}, np.eye(V, dtype=np.float32)
    for name in ("forward_kl", "reverse_kl", "jensen_shannon"):
        loss, grads, measured = _measured(name, {}, hidden, head=eye)
        assert np.abs(loss).max() < 1e-6 and np.abs(grads["student"]).max() < 1e-7
        assert metrics.values({"a": jax.tree.map(lambda x: x[0], measured["agreement"])})["a"] == 1


def test_all_tokens_stored_are_the_whole_divergence():
    order = np.argsort(-TEACHER, axis=-1)
    stored = {
        "teacher_tokens": np.roll(order, 1, axis=2).astype(np.int32),
        "teacher_logps": np.roll(np.take_along_axis(TEACHER, order, -1), 1, axis=2).astype(np.float32),
    }
    whole, grads, _ = _measured("forward_kl", {}, {"teacher_hidden": np.roll(HIDDEN, 1, axis=2)})
    found, found_grads, _ = _measured("top_k", {}, stored)
    np.testing.assert_allclose(found, whole, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found_grads["student"], grads["student"], rtol=1e-5, atol=1e-6)


def test_chunks_change_nothing(monkeypatch):
    whole = _measured("reverse_kl", {}, {"teacher_hidden": np.roll(HIDDEN, 1, axis=2)})
    monkeypatch.setattr(logprobs, "CHUNK", 2 * V)  # one place of each row at a time
    parts = _measured("reverse_kl", {}, {"teacher_hidden": np.roll(HIDDEN, 1, axis=2)})
    np.testing.assert_allclose(parts[0], whole[0], rtol=1e-6)
    np.testing.assert_allclose(parts[1]["student"], whole[1]["student"], rtol=1e-5, atol=1e-8)


def test_a_beta_at_the_ends_names_the_function_that_is_meant():
    with pytest.raises(UserError, match="forward_kl"):
        distill.jensen_shannon(None, None, None, None, beta=0.0)


@pytest.mark.slow
def test_a_student_learns_the_whole_distribution_of_a_teacher_in_a_folder(tmp_path):
    """Of another width and with tied embeddings: its states are annotated, its head is read from its own files."""
    mesh, rows = sharding.make_mesh(), [{"prompt": "q" * (1 + i % 3), "completion": chr(97 + i % 9) * 4} for i in range(40)]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    models, described = {}, None
    for name, more in (("student", {}), ("teacher", {"hidden_size": 24, "tie_word_embeddings": True})):
        spec = loading.describe({**MODEL, **more}, "test_pairs.characters")
        params = loading.weights(spec, mesh, seed=len(name))
        hf.save(tmp_path / name, params, spec.transformer.arch, spec.config)
        models[name], described = (spec.transformer.forward, params), described or (spec.transformer.arch, spec.config)
    given = {"tokenizer": "test_pairs.characters", "template": PLAIN, "data": str(tmp_path / "d.jsonl"), "window": 16}
    given |= {"batch_size": 8, "steps": 2, "save_every": 1, "keep": 3, "best": ""}
    annotate.annotate(None, "hidden", out=str(tmp_path / "states"), model=str(tmp_path / "teacher"), **given)
    objective = {"name": "distill.forward_kl", "teacher": str(tmp_path / "teacher")}
    given |= {"model": str(tmp_path / "student"), "objective": objective, "annotations": str(tmp_path / "states")}

    work = tmp_path / "w"
    train.run(None, str(work), **given)
    first = next(row for row in runs.rows(work / "metrics.jsonl") if row["step"] == 1)
    ((_, s),) = recipe.stages(recipe.opened(None, **given))
    batch = annotations.planned(plan_stage("train", s, mesh), mesh).source(None)
    logps = {}
    for name, (forward, params) in models.items():
        out = forward(params, {k: jnp.asarray(x) for k, x in batch.items()})
        logps[name] = np.asarray(jax.nn.log_softmax(logits(out.hidden, out.head)), np.float64)[:, :-1]
    kl = (np.exp(logps["teacher"]) * (logps["teacher"] - logps["student"])).sum(-1)[batch["mask"][:, 1:]]
    assert first["loss"] == pytest.approx(kl.mean(), rel=1e-5) and kl.mean() > 1e-4

    # Without a folder the states are made before the first step, and are the same.
    own = tmp_path / "own"
    train.run(None, str(own), **{**given, "annotations": "", "steps": 1})
    assert next(row for row in runs.rows(own / "metrics.jsonl") if row["step"] == 1)["loss"] == first["loss"]
    written, made = ({p.parent.name: p.read_bytes() for p in f.rglob("*.npy")} for f in (tmp_path / "states", own / "columns"))
    assert written == made and len(made) == 1

    # The head is no part of what is saved, and is there again after an interruption and where the stage's result is used.
    last = runs.saved(work, "train")[2][0]
    shutil.rmtree(tmp_path / "student")  # of which nothing is frozen, so nothing is needed
    assert last["frozen/teacher_head/weight"].shape == (99, 24) and not [k for k in last if "mu/teacher" in k]
    shutil.rmtree(work / "checkpoints" / "train" / "2")
    hf.save(tmp_path / "student", models["student"][1], *described)
    train.run(None, str(work), **given)
    jax.tree.map(np.testing.assert_array_equal, runs.saved(work, "train")[2][0], last)
    assert "model.safetensors" in export.export(str(work), str(tmp_path / "out"), mesh=mesh)

    for changes, message in (
        ({"objective": "distill.reverse_kl"}, "config.objective.teacher: name the teacher"),
        ({"objective": {**objective, "teacher": str(tmp_path / "student")}}, "is not the model that wrote teacher_hidden"),
        ({"objective": {**objective, "teacher": str(work)}}, "a teacher is read from Hugging Face's files"),
    ):
        with pytest.raises(UserError, match=message):
            train.run(None, str(tmp_path / "x"), **{**given, **changes})
