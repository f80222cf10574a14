"""BERT and ModernBERT against `transformers`: logits of the head for masked tokens, files, fields; and as models of jaxpost.

The golden values come from tests/golden/make_encoders.py.
"""

import dataclasses
import json
import re
from pathlib import Path

import encoder_cases as cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from safetensors.numpy import load_file, save_file
from test_families import _another

from jaxpost import sharding
from jaxpost.errors import UserError
from jaxpost.models import encoder, encoder_families, families, hf, loading, protocol
from jaxpost.models.heads import logits
from jaxpost.models.sites import LAYER

GOLDEN = Path(__file__).parent / "golden" / "encoders.npz"
QUICK = {"bert/types", "bert/eps", "modernbert/biased", "modernbert/nested"}
each_case = pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in cases.NAMES])


def one():
    return sharding.make_mesh(devices=jax.devices()[:1])


def batch_of(name: str, length: int = cases.LENGTHS[0]) -> dict:
    """A case's rows, a document each, padded to one length."""
    batch = {k: np.zeros((len(cases.LENGTHS), length), np.int32) for k in ("tokens", "token_types", "segments", "positions")}
    for i, (tokens, types) in enumerate(zip(cases.tokens(name), cases.types(name), strict=True)):
        n = len(tokens)
        for key, values in {"tokens": tokens, "token_types": types, "segments": 1, "positions": np.arange(n)}.items():
            batch[key][i, :n] = values
    return batch


def scores(model, params, batch) -> np.ndarray:
    def run(params, batch):
        out = model.forward(params, batch)
        return logits(out.hidden, out.head)

    return np.asarray(jax.jit(run)(params, batch))


def logits_of(model, params, name: str) -> np.ndarray:
    """The logits of a case's rows, one after the other."""
    rows = scores(model, params, batch_of(name))
    return np.concatenate([row[:n] for row, n in zip(rows, cases.LENGTHS, strict=True)])


def opened(folder, name):
    cases.write(folder, name)
    spec, params = loading.open_model(str(folder), one())
    return spec, params


@each_case
def test_logits_equal_those_of_transformers(name, tmp_path):
    spec, params = opened(tmp_path, name)
    with np.load(GOLDEN) as golden:
        expected = golden[name]
    np.testing.assert_allclose(logits_of(spec.transformer, params, name), expected, atol=1e-5 * np.abs(expected).max(), rtol=0)


@pytest.mark.parametrize("name", cases.NAMES)
def test_a_folder_that_was_read_is_written_bit_for_bit(name, tmp_path):
    spec, params = opened(tmp_path / "a", name)
    hf.save(tmp_path / "b", params, spec.transformer.arch, spec.config)
    first, second = (load_file(tmp_path / f / "model.safetensors") for f in "ab")
    assert first.keys() == second.keys()
    for key, tensor in first.items():
        np.testing.assert_array_equal(second[key], tensor, err_msg=key)
    assert spec.transformer.arch.parameters() == sum(x.size for x in jax.tree.leaves(params))
    written = json.loads((tmp_path / "b" / "config.json").read_text())
    assert written["architectures"] == [{"bert": "BertForMaskedLM", "modernbert": "ModernBertForMaskedLM"}[name.split("/")[0]]]
    assert encoder_families.architecture(written) == spec.transformer.arch


def test_every_field_is_honoured_harmless_or_refused():
    """Each field of a case set to something else: the architecture changes, or the config is refused by name."""
    related = {"num_attention_heads": "hidden_size|head_dim", "num_hidden_layers": "layers"}
    for family in cases.CASES:
        for case in cases.CASES[family]:
            fields = cases.config(f"{family}/{case}")
            arch = encoder_families.architecture(fields)
            for key in fields.keys() - families.HARMLESS:
                try:
                    changed = encoder_families.architecture({**fields, key: _another(fields[key])})
                except UserError as error:
                    assert re.search(related.get(key, key), str(error)), f"{family}/{case} {key}: {error}"
                    continue
                # No layer of these cases slides.
                idle = key == "local_attention" and arch.kinds[-1].window is None
                assert idle == (changed == arch), f"{family}/{case}: {key} is read and ignored"
        with pytest.raises(UserError, match=f"the {family} family does not understand: surprise"):
            encoder_families.architecture({**fields, "surprise": 1})


def test_what_transformers_writes_for_each_family_is_understood():
    sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    for family in cases.CASES:
        fields = transformers.AutoConfig.for_model(family).to_dict()
        sparse = {"model_type": family, **{k: fields[k] for k in sizes}}
        # The defaults of absent fields are transformers' own.
        assert encoder_families.architecture(fields) == encoder_families.architecture(sparse)
        assert encoder_families.architecture({"model_type": family}) == encoder_families.architecture(fields)


@pytest.mark.parametrize("name", cases.BARE)
def test_an_encoder_without_a_head_is_read_written_and_gives_hidden_states(name, tmp_path):
    cases.write_bare(tmp_path / "a", name)
    spec, params = loading.open_model(str(tmp_path / "a"), one())
    batch = {k: x for k, x in batch_of(name).items() if k != "token_types"}
    out = jax.jit(spec.transformer.forward)(params, batch)
    with np.load(GOLDEN) as golden:
        expected = golden[f"{name}/hidden"]
    np.testing.assert_allclose(out.hidden[0], expected, atol=1e-5 * np.abs(expected).max(), rtol=0)
    with pytest.raises(UserError, match="it has no head for tokens"):
        logits(out.hidden, out.head)
    assert spec.transformer.arch.parameters() == sum(x.size for x in jax.tree.leaves(params))
    assert jax.tree.structure(jax.eval_shape(spec.transformer.init, jax.random.PRNGKey(0))) == jax.tree.structure(params)
    hf.save(tmp_path / "b", params, spec.transformer.arch, spec.config)
    first, second = (load_file(tmp_path / f / "model.safetensors") for f in "ab")
    assert first.keys() == second.keys() and all(np.array_equal(x, second[k]) for k, x in first.items())
    assert json.loads((tmp_path / "b" / "config.json").read_text())["architectures"] == spec.config["architectures"]


def test_published_sizes_are_those_of_the_hub():
    """What the hub counts in the files of bert-base-uncased, without pooler and next sentence, and of both ModernBERTs."""
    large = {"hidden_size": 1024, "intermediate_size": 2624, "num_hidden_layers": 28, "num_attention_heads": 16}
    for fields, count in (
        ({"model_type": "bert"}, 110_106_428 - 768 * 769 - 2 * 769),
        ({"model_type": "modernbert"}, 149_655_232),
        ({"model_type": "modernbert", **large}, 395_881_664),
    ):
        assert encoder_families.architecture(fields).parameters() == count


def test_what_cannot_be_honoured_is_refused_by_name():
    wrong = {
        "bert": [{"position_embedding_type": "relative_key"}, {"tie_word_embeddings": False}, {"is_decoder": True},
                 {"attend": "causal"}, {"hidden_act": "mish"}, {"num_attention_heads": 5}, {"type_vocab_size": 0}],
        "modernbert": [{"rope_scaling": {"type": "linear", "factor": 2.0}}, {"classifier_activation": "mish"},
                       {"layer_types": ["full_attention"]}, {"rope_parameters": {"other": {}}},
                       {"rope_parameters": {"full_attention": {"rope_type": "yarn", "factor": 2.0}}},
                       {"attention_dropout": 0.1}, {"mlp_dropout": 0.1}],
    }  # fmt: skip
    for family, each in wrong.items():
        for changes in each:
            with pytest.raises(UserError, match=next(iter(changes))):
                encoder_families.architecture({**cases.config(f"{family}/plain"), **changes})


def test_older_names_copies_and_other_heads_of_berts_files_are_read(tmp_path):
    spec, params = opened(tmp_path / "a", "bert/plain")
    held = load_file(tmp_path / "a" / "model.safetensors")
    old = {
        k.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): v for k, v in held.items()
    }
    copy, bias = "cls.predictions.decoder.weight", "cls.predictions.bias"
    old |= {copy: held["bert.embeddings.word_embeddings.weight"], "cls.predictions.decoder.bias": held[bias]}
    old |= {"bert.pooler.dense.weight": np.ones((24, 24), np.float32), "cls.seq_relationship.bias": np.ones(2, np.float32)}
    cases.write(tmp_path / "b", "bert/plain")
    save_file(old, tmp_path / "b" / "model.safetensors")
    _, again = loading.open_model(str(tmp_path / "b"), one())
    jax.tree.map(np.testing.assert_array_equal, params, again)
    save_file(old | {copy: old[copy] + 1}, tmp_path / "b" / "model.safetensors")
    with pytest.raises(UserError, match="decoder.weight differs from the embedding"):
        loading.open_model(str(tmp_path / "b"), one())
    save_file({k: v for k, v in held.items() if k != bias}, tmp_path / "b" / "model.safetensors")
    with pytest.raises(UserError, match="1 tensors are missing, first cls.predictions.bias"):
        loading.open_model(str(tmp_path / "b"), one())


@pytest.mark.parametrize("name", [pytest.param("bert/plain", marks=pytest.mark.slow), "modernbert/biased"])
def test_packed_documents_equal_documents_alone_in_value_and_gradient(name, tmp_path):
    """Also rematerialised, and over eight devices."""
    spec, params = opened(tmp_path, name)
    model, alone = spec.transformer, batch_of(name)
    packed = {k: np.zeros((8, 40), np.int32) for k in alone}
    for key, rows in alone.items():
        values = np.concatenate([rows[1, :9], rows[0, :24]])
        packed[key][:, :33] = values + (np.repeat([0, 1], [9, 24]) if key == "segments" else 0)

    def total(model, batch, weight):
        def loss(params):
            out = model.forward(params, batch)
            return jnp.sum(jnp.sin(logits(out.hidden, out.head)) * weight[..., None]), logits(out.hidden, out.head)

        return jax.jit(jax.value_and_grad(loss, has_aux=True))

    (_, rows), grads = total(model, alone, alone["segments"] > 0)(params)
    remat = dataclasses.replace(model, remat="full")
    mesh = sharding.make_mesh(2, 2, 2)
    with sharding.use(mesh):
        placed = jax.device_put(jax.device_get(params), sharding.stored(mesh, params))
        spread = sharding.distribute(packed, mesh, 8)
        (_, together), own = total(remat, spread, (spread["segments"] > 0) / 8)(placed)
    together = np.asarray(together)
    size = float(jnp.abs(rows).max())
    np.testing.assert_allclose(together[0, :9], rows[1, :9], atol=1e-5 * size)
    np.testing.assert_allclose(together[3, 9:33], rows[0], atol=1e-5 * size)
    # Sums in another order; BERT's key biases move all scores of a token alike, so that their gradient is rounding alone.
    largest = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(grads))
    for a, b in zip(jax.tree.leaves(jax.device_get(own)), jax.tree.leaves(grads), strict=True):
        np.testing.assert_allclose(a, b, atol=max(2e-5 * float(jnp.abs(b).max()), 1e-6 * largest), rtol=0)


@pytest.mark.parametrize("name", ["bert/plain", "modernbert/biased"])
def test_sites_are_tapped_and_patched(name, tmp_path):
    spec, params = opened(tmp_path, name)
    model, batch = spec.transformer, batch_of(name)
    every = tuple(f"layers.*.{site}" for site in LAYER)
    out = jax.jit(lambda p: model.forward(p, batch, tap=(*every, "embed", "final")))(params)
    at = {name.rpartition(".")[2]: np.asarray(x) for name, x in out.taps.items()}
    layer = jax.tree.map(np.asarray, params["layers"])
    np.testing.assert_array_equal(at["final"], out.hidden)
    np.testing.assert_array_equal(at["resid_pre"][0], at["embed"])
    np.testing.assert_array_equal(at["resid_pre"][1:], at["resid_post"][:-1])
    down = layer["mlp"]["down"]
    mlp_out = np.einsum("lbsf,lfd->lbsd", at["mlp_act"], down["kernel"]) + down["bias"][:, None, None]
    np.testing.assert_allclose(at["mlp_out"], mlp_out, rtol=1e-4, atol=1e-4)

    def dense(x, linear):
        return np.einsum("lbsd,ldf->lbsf", x, linear["kernel"]) + linear["bias"][:, None, None]

    v = dense(at["attn_input"], layer["attention"]["v"])
    np.testing.assert_allclose(at["v"].reshape(v.shape), v, rtol=1e-4, atol=1e-5)
    inner = {name: dense(at["mlp_input"], layer["mlp"][name]) for name in ("gate", "up") if name in layer["mlp"]}
    act = jax.nn.gelu(inner.get("gate", inner["up"]), approximate=False) * inner["up"] ** ("gate" in inner)
    np.testing.assert_allclose(at["mlp_act"], act, rtol=1e-4, atol=1e-5)
    heads = np.einsum("lbnst,lbtnh->lbsnh", at["pattern"], at["v"])
    np.testing.assert_allclose(at["head_out"], heads, rtol=1e-4, atol=1e-5)
    added = at["resid_mid"] + at["mlp_out"]
    if name.startswith("bert"):
        added = (added - added.mean(-1, keepdims=True)) / np.sqrt(added.var(-1, keepdims=True) + model.arch.eps)
        added = added * layer["norm2"]["scale"][:, None, None] + layer["norm2"]["bias"][:, None, None]
    np.testing.assert_allclose(at["resid_post"], added, rtol=1e-4, atol=1e-4)
    assert at["pattern"][:, 0, :, 0, 5:].any(), "the first token sees what follows it"
    stream = out.taps["layers.*.resid_post"][1]
    both = {**batch, "tokens": (batch["tokens"] + 1) % 37}
    patched = jax.jit(lambda p: model.forward(p, both, patch={"layers.1.resid_post": stream}))(params)
    np.testing.assert_allclose(patched.hidden, out.hidden, rtol=1e-5, atol=1e-5)


def test_an_encoder_is_a_model_that_cannot_be_sampled():
    arch = encoder_families.architecture(cases.config("bert/plain"))
    model = encoder.model(arch)
    protocol.check(model, "it:")
    with pytest.raises(UserError, match="Encoder lacks cache_axes"):
        protocol.check(model, "it:", protocol.Sampled)
    with pytest.raises(UserError, match="bert is an encoder and cannot be sampled"):
        model.forward(None, {}, cache=())
    params = jax.jit(model.init)(jax.random.PRNGKey(0))
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(params)) and params["layers"]["mlp"]["up"]["kernel"].std() > 0.01
