"""The Fisher information of a model on data, against its closed form for a softmax layer, and Fisher merging by it."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_merge_runs import equal, file_of, folder_of, folders  # noqa: F401 (a fixture)

from jaxpost import merge
from jaxpost.errors import UserError
from jaxpost.models import tensors
from jaxpost.stages import information
from jaxpost.types import Head, Output

VOCAB, WIDTH, LENGTH = 5, 3, 6
TABLE = np.random.default_rng(0).normal(size=(VOCAB, WIDTH)).astype(np.float32)
PARAMS = {"head": jnp.asarray(np.random.default_rng(1).normal(size=(VOCAB, WIDTH)), jnp.float32)}


def forward(params, batch):
    """A softmax layer over what stands for each token."""
    return Output(jnp.asarray(TABLE)[batch["tokens"]], Head(params["head"]))


def batch_of(rows: int) -> dict:
    rng = np.random.default_rng(2)
    tokens = rng.integers(0, VOCAB, (rows, LENGTH))
    mask = (rng.random((rows, LENGTH)) < 0.6) & (np.arange(LENGTH) > 0)
    return {"tokens": jnp.asarray(tokens), "mask": jnp.asarray(mask)}


@functools.partial(jax.jit, static_argnames="labels")
def summed(batch, labels, seed=0, first=0):
    zero = jax.tree.map(jnp.zeros_like, PARAMS)
    return information.squared(forward, zero, PARAMS, batch, jax.random.PRNGKey(seed), first, labels=labels)["head"]


def probabilities(tokens) -> tuple[np.ndarray, np.ndarray]:
    """(states [N,D], probabilities [N,V]) before each token, in float64."""
    states = TABLE[tokens].astype(np.float64)
    logits = states @ np.asarray(PARAMS["head"], np.float64).T
    return states, np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)


def test_of_the_datas_labels_it_is_the_square_of_each_examples_gradient():
    batch, expected = batch_of(4), 0.0
    for tokens, mask in zip(*(np.asarray(batch[k]) for k in ("tokens", "mask")), strict=True):
        states, p = probabilities(tokens)
        learned = np.flatnonzero(mask)
        gradient = (np.eye(VOCAB)[tokens[learned]] - p[learned - 1]).T @ states[learned - 1]
        expected = expected + gradient**2
    np.testing.assert_allclose(summed(batch, "data"), expected, rtol=1e-5)


def test_of_the_models_labels_its_mean_is_the_fisher_information():
    """E (sum_t g_t)^2 = sum_t E g_t^2, for labels drawn apart have scores of mean 0."""
    batch, expected = batch_of(3), 0.0
    for tokens, mask in zip(*(np.asarray(batch[k]) for k in ("tokens", "mask")), strict=True):
        states, p = probabilities(tokens)
        learned = np.flatnonzero(mask)
        expected = expected + ((p * (1 - p))[learned - 1]).T @ states[learned - 1] ** 2
    draws = jax.vmap(lambda seed: summed(batch, "model", seed))(jnp.arange(4000))
    error = np.std(draws, axis=0) / np.sqrt(len(draws))
    assert (np.abs(np.mean(draws, axis=0) - expected) < 4.5 * error).all() and (error < 0.05 * expected).all()


def test_it_depends_neither_on_the_batches_nor_on_padding():
    batch = batch_of(4)
    parts = [{k: x[i : i + 2] for k, x in batch.items()} for i in (0, 2)]
    padded = {k: jnp.pad(x, ((0, 1), (0, 3))) for k, x in batch.items()}
    whole = summed(batch, "model")
    np.testing.assert_allclose(sum(summed(part, "model", first=2 * i) for i, part in enumerate(parts)), whole, rtol=1e-6)
    np.testing.assert_allclose(summed(padded, "model"), whole, rtol=1e-6)


def test_it_is_stored_once_and_fisher_merging_reads_it(folders, tmp_path, capsys):  # noqa: F811
    data = tmp_path / "data.jsonl"
    rows = [{"prompt": f"{i}+{i}", "completion": f"{2 * i}"} for i in range(5)]
    data.write_text("\n".join(map(json.dumps, rows)) + "\n")
    common = {"data": str(data), "window": 16, "batch_size": 8, "labels": "data", "objective": "sft.nll"}
    artefacts = [information.fisher(None, tmp_path / "out", model=folder, **common) for folder in folders[:2]]
    assert capsys.readouterr().err.count("information of 5 examples") == 2
    assert information.fisher(None, tmp_path / "out", model=folders[0], **common) == artefacts[0]
    assert "information of" not in capsys.readouterr().err and artefacts[0] != artefacts[1]
    held, weights = [file_of(folder) for folder in artefacts], [file_of(folder) for folder in folders[:2]]
    assert {k: x.shape for k, x in held[0].items()} == {k: x.shape for k, x in weights[0].items()}
    assert all((x >= 0).all() and x.any() for x in held[0].values())
    what = {"name": "fisher", "information": artefacts, "floor": 1e-3}
    merge.merge(what, folders[:2], str(tmp_path / "merged"))
    expected = {}
    for name in held[0]:
        f, g = (np.maximum(x[name].astype(np.float64), 1e-3) for x in held)
        expected[name] = (f * weights[0][name] + g * weights[1][name]) / (f + g)
    for name, x in file_of(tmp_path / "merged").items():
        np.testing.assert_allclose(x, expected[name], rtol=1e-5, atol=1e-6)
    damaged = tmp_path / "out" / "information" / artefacts[1].rpartition("/")[2] / "model.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"!")
    tensors.in_folder.cache_clear()
    with pytest.raises(UserError, match="damaged"):
        merge.merge(what, folders[:2], str(tmp_path / "again"))


def test_what_it_is_not_made_of_is_refused(tmp_path):
    with pytest.raises(UserError, match="labels='gold': give 'model' or 'data'"):
        information.fisher(None, tmp_path, labels="gold")
    with pytest.raises(UserError, match="the recipe has 2 stages"):
        information.fisher(None, tmp_path, stages=("a", "b"), a={"steps": 1}, b={"steps": 1})
