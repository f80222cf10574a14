"""The Fisher information of a model on data, against its closed form for a softmax layer; the moments of its layers' inputs;
merging by both.
"""

import functools
import json

import family_cases as cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_entry_points import one_device
from test_merge_runs import file_of, folders  # noqa: F401 (a fixture)

from jaxpost import merge, sharding
from jaxpost.errors import UserError
from jaxpost.models import families, loading, tensors
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


# ------------------------------------------------------------------------------------------------------ Moments of the inputs


def _kept(batches, distribute, rows, *mesh):
    batches.append(rows)
    return distribute(rows, *mesh)


@pytest.fixture(scope="module")
def of_two_models(folders, tmp_path_factory):  # noqa: F811
    """(folders of moments, each model's inputs {tensor: [tokens, in] float64}), from data of its own for each of two models."""
    place, moments, inputs = tmp_path_factory.mktemp("moments"), [], []
    for number, folder in enumerate(folders[:2]):
        data, batches = place / f"{number}.jsonl", []
        rows = [{"prompt": f"{i}{'+-'[number]}{7 * i % 23}", "completion": f"{i * 3}"} for i in range(9 + number)]
        data.write_text("\n".join(map(json.dumps, rows)) + "\n")
        with pytest.MonkeyPatch.context() as patch:
            distribute = sharding.distribute
            patch.setattr(sharding, "distribute", functools.partial(_kept, batches, distribute))
            common = {"data": str(data), "window": 16, "batch_size": 8, "objective": "sft.nll"}
            moments.append(information.moments(None, place / "out", model=folder, **common))
        assert sum((rows["segments"] > 0).any(axis=1).sum() for rows in batches) == 9 + number
        inputs.append(inputs_of(folder, batches))
    return moments, inputs


def inputs_of(folder: str, batches: list[dict]) -> dict[str, np.ndarray]:
    """The inputs of the linear layers, from the streams and the norms' weights."""
    spec, params = loading.open_model(folder, one_device())
    weights, out, sites = file_of(folder), {}, ("resid_pre", "head_out", "resid_mid", "mlp_act")
    tapped = jax.jit(lambda rows: spec.transformer.forward(params, rows, tap=[f"layers.*.{site}" for site in sites]).taps)
    for rows in batches:
        at = {name.rpartition(".")[2]: np.asarray(x, np.float64)[:, rows["segments"] > 0] for name, x in tapped(rows).items()}
        for layer in range(2):
            normed = [
                at[site][layer]
                / np.sqrt(np.mean(at[site][layer] ** 2, axis=-1, keepdims=True) + spec.transformer.arch.eps)
                * weights[f"model.layers.{layer}.{norm}.weight"]
                for site, norm in (("resid_pre", "input_layernorm"), ("resid_mid", "post_attention_layernorm"))
            ]
            each = {f"self_attn.{name}_proj": normed[0] for name in "qkv"}
            each |= {"self_attn.o_proj": at["head_out"][layer].reshape(len(normed[0]), -1)}
            each |= {"mlp.gate_proj": normed[1], "mlp.up_proj": normed[1], "mlp.down_proj": at["mlp_act"][layer]}
            for name, x in each.items():
                out.setdefault(f"model.layers.{layer}.{name}.weight", []).append(x)
    return {name: np.concatenate(x) for name, x in out.items()}


def test_moments_are_those_of_the_layers_inputs_without_padding(of_two_models):
    for folder, inputs in zip(*of_two_models, strict=True):
        held = file_of(folder)
        assert held.keys() == inputs.keys()
        for name, x in inputs.items():
            np.testing.assert_allclose(held[name], x.T @ x, rtol=1e-4, atol=1e-5 * np.abs(held[name]).max(), err_msg=name)


def test_regmean_by_them_is_the_least_squares_fit_of_both_models(folders, of_two_models, tmp_path):  # noqa: F811
    """A share of the diagonal is a row for each input alone, of that input's length."""
    moments, inputs = of_two_models
    merge.merge({"name": "regmean", "moments": moments, "diagonal": 0.1}, folders[:2], str(tmp_path / "out"), dtype="float32")
    weights = [file_of(folder) for folder in folders[:2]]
    for name, merged in file_of(tmp_path / "out").items():
        one, two = (x[name].astype(np.float64) for x in weights)
        if name not in inputs[0]:
            np.testing.assert_allclose(merged, (one + two) / 2, rtol=1e-6)
            continue
        x = [x[name] for x in inputs]
        x = [np.concatenate([np.sqrt(0.9) * x, np.sqrt(0.1) * np.diag(np.linalg.norm(x, axis=0))]) for x in x]
        targets = np.concatenate([x[0] @ one.T, x[1] @ two.T])
        expected = np.linalg.lstsq(np.concatenate(x), targets, rcond=None)[0].T
        np.testing.assert_allclose(merged, expected, rtol=1e-3, atol=1e-4 * np.abs(one).max(), err_msg=name)


@pytest.mark.parametrize("name", ["phi3/long", "qwen3_moe/normalised"])
def test_moments_go_by_the_names_of_the_files(name):
    """Fused projections have one input; each expert has its own tokens, which are not counted."""
    arch = families.architecture(cases.config(name))
    by_site = {site: [f"{site} {i}" for i in range(arch.layers)] for site in set(information.INPUTS.values())}
    last = {tensor.rpartition("layers.1.")[2]: x for tensor, x in information.of_tensors(by_site, arch).items()}
    attention = {"qkv_proj": "attn_input 1"} if arch.family == "phi3" else {f"{n}_proj": "attn_input 1" for n in "qkv"}
    expected = {f"self_attn.{n}.weight": x for n, x in (attention | {"o_proj": "head_out 1"}).items()}
    mlp = {"gate": "mlp_input 1"} if arch.experts else {"gate_up_proj": "mlp_input 1", "down_proj": "mlp_act 1"}
    expected |= {f"mlp.{n}.weight": x for n, x in mlp.items()}
    assert {tensor: x for tensor, x in last.items() if "layers" not in tensor} == expected


def test_moments_of_an_adapted_model_are_refused(folders, tmp_path):  # noqa: F811
    (tmp_path / "data.jsonl").write_text('{"prompt": "1", "completion": "2"}\n')
    with pytest.raises(UserError, match="moments: of a plain model"):
        information.moments(None, tmp_path, model=folders[0], data=str(tmp_path / "data.jsonl"), adapter="lora", window=16)
