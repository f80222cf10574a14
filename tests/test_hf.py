"""Model folders: what goes out comes back bit for bit, and what is not understood is refused by its name.

No test here runs a forward. A field of config.json is honoured (tests/test_llama.py), harmless, or refused; a tensor is where
the config says, or the folder is refused.
"""

import json
import pickle

import jax
import llama_cases
import ml_dtypes
import numpy as np
import pytest
import transformers

from jaxpost import sharding
from jaxpost.errors import UserError
from jaxpost.models import block, families, hf, loading
from jaxpost.models.transformer import Transformer

HONOURED = {
    "initializer_range",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "rms_norm_eps",
    "hidden_act",
    "tie_word_embeddings",
    "attention_bias",
    "mlp_bias",
    "rope_theta",
    "rope_scaling",
    "rope_parameters",
}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3["original_max_position_embeddings"] = 32


def architecture(**changes):
    return families.architecture({**llama_cases.config("grouped"), **changes})


def opened(folder, name="grouped"):
    arch = families.architecture(hf.read_config(folder))
    shapes = jax.eval_shape(Transformer(arch).init, jax.random.PRNGKey(0))
    return hf.load(folder, arch, shapes)


# -------------------------------------------------------------------------------------------------------------- Fields


def test_every_field_of_a_default_config_is_honoured_harmless_or_refused():
    """Walks what this `transformers` writes, so a field that a later one adds is noticed here first."""
    fields = transformers.LlamaConfig().to_dict()
    families.architecture(fields)
    for name in fields:
        assert (name in HONOURED) + (name in families.HARMLESS) + (name in families.NEUTRAL) == 1, name
    assert {"vocab_size", "rope_parameters", "attention_dropout", "use_cache"} <= set(fields)


def test_honoured_fields_reach_the_architecture():
    """Each honoured field, moved, moves the architecture."""
    moved = {
        "vocab_size": 38,
        "hidden_size": 32,
        "intermediate_size": 21,
        "num_hidden_layers": 3,
        "num_attention_heads": 12,
        "num_key_value_heads": 4,
        "head_dim": 8,
        "max_position_embeddings": 65,
        "rms_norm_eps": 1e-4,
        "hidden_act": "relu",
        "tie_word_embeddings": True,
        "attention_bias": True,
        "mlp_bias": True,
        "initializer_range": 0.5,
        "rope_theta": 500000,
        "rope_scaling": {"type": "linear", "factor": 2},
        "rope_parameters": LLAMA3 | {"rope_theta": 10000.0},
    }
    assert set(moved) == HONOURED
    for name, value in moved.items():
        assert architecture(**{name: value}) != architecture(), name
    ropes = {
        "base": ({"rope_theta": 500000}, families.Rope(theta=500000.0)),
        "linear": ({"rope_scaling": {"type": "linear", "factor": 2}}, families.Rope(kind="linear", factor=2.0)),
        "llama3": ({"rope_scaling": LLAMA3}, families.Rope(kind="llama3", factor=8.0, original=32)),
    }
    for changes, rope in ropes.values():
        assert architecture(**changes).kinds == (families.Kind(None, rope),)
    assert architecture(rope_theta=None, rope_parameters=LLAMA3 | {"rope_theta": 7}).kinds[0].rope.theta == 7.0


def test_fields_left_out_have_the_defaults_of_transformers():
    given = ("model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    fields = {k: v for k, v in llama_cases.config("grouped").items() if k in given}
    assert families.architecture(fields) == families.architecture(transformers.LlamaConfig(**fields).to_dict())


@pytest.mark.parametrize("name", sorted(families.NEUTRAL))
def test_a_neutral_field_is_refused_off_its_neutral_value(name):
    neutral = families.NEUTRAL[name][0]
    assert all(architecture(**{name: value}) == architecture() for value in families.NEUTRAL[name])
    other = {bool: not neutral, int: 2, float: 0.5, type(None): {"bits": 4}, dict: {"0": [1]}}[type(neutral)]
    with pytest.raises(UserError, match=rf"config\.json: {name} = .* is not supported"):
        architecture(**{name: other})


@pytest.mark.parametrize("name", ["sliding_window", "rope_ratio", "original_max_position_embeddings", "logit_scale"])
def test_an_unknown_field_is_refused_by_its_name(name):
    with pytest.raises(UserError, match=f"does not understand: {name}"):
        architecture(**{name: 1})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": None}, "vocab_size is missing"),
        ({"vocab_size": "37"}, "vocab_size = '37' is not a whole number"),
        ({"hidden_size": 24.5}, "hidden_size = 24.5 is not a whole number"),
        ({"num_hidden_layers": True}, "num_hidden_layers = True is not a whole number"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings = 'false' is not true or false"),
        ({"rms_norm_eps": "1e-5"}, "rms_norm_eps = '1e-5' is not a number"),
        ({"rms_norm_eps": 0.0}, "rms_norm_eps and rope_theta must be positive"),
        ({"rope_theta": -1.0}, "rms_norm_eps and rope_theta must be positive"),
        ({"num_hidden_layers": 0}, "layers must be positive"),
        ({"num_attention_heads": 0}, "heads must be positive"),
        ({"num_key_value_heads": 3}, "4 is not a multiple of num_key_value_heads 3"),
        ({"head_dim": 5}, "head_dim 5 x 1.0 is odd"),
        ({"hidden_act": "mish"}, "hidden_act 'mish' is not supported; known are silu"),
        ({"model_type": "mamba"}, "model_type 'mamba' is not supported; known are llama"),
        (
            {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
            "rope_type 'dynamic' is not supported; known are default, linear, llama3, yarn, longrope",
        ),
        ({"rope_scaling": {"type": "linear"}}, "'linear' lacks factor"),
        ({"rope_scaling": {"type": "linear", "factor": 0}}, "rope scaling needs factor > 0"),
        ({"rope_scaling": {"type": "linear", "factor": "2"}}, "factor = '2' is not a number"),
        ({"rope_scaling": {"factor": 2.0}}, "'default' has fields that are not understood: factor"),
        ({"rope_scaling": {**LLAMA3, "beta_fast": 2}}, "'llama3' has fields that are not understood: beta_fast"),
        ({"rope_scaling": {**LLAMA3, "low_freq_factor": 4.0}}, "high_freq_factor > low_freq_factor"),
        ({"rope_scaling": "linear"}, "rope_scaling = 'linear' is not an object"),
        ({"rope_scaling": LLAMA3, "rope_parameters": {"rope_theta": 1e4}}, "both given, and differ"),
        ({"rope_parameters": {"rope_theta": 5e5}}, r"rope_theta = 10000.0, but the rotary parameters say 500000.0"),
        ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "partial_rotary_factor = 0.5 is not"),
    ],
)
def test_a_field_out_of_range_is_refused(changes, message):
    with pytest.raises(UserError, match=message):
        architecture(**changes)


def test_activations_are_those_that_the_transformer_has():
    assert set(families.ACTIVATIONS) == set(block.ACTIVATIONS)


@pytest.mark.parametrize("name", llama_cases.NAMES)
def test_the_parameter_count_is_that_of_the_tensors(name):
    arch = families.architecture(llama_cases.config(name))
    assert arch.parameters() == sum(w.size for w in llama_cases.weights(name).values())


# ------------------------------------------------------------------------------------------------------------- Folders


@pytest.mark.parametrize("name", ["both_biases_tied", "multi_head"])
def test_an_exported_folder_holds_the_same_bits(tmp_path, name):
    """Names, shapes, bits: what went in as safetensors comes out as the same safetensors; fields stay as they were."""
    llama_cases.write(tmp_path / "in", name, files=2)
    arch = families.architecture(llama_cases.config(name))
    params = opened(tmp_path / "in")
    assert hf.save(tmp_path / "out", params, arch, llama_cases.config(name)) == ["model.safetensors"]
    written = hf._open(tmp_path / "out")
    wanted = llama_cases.weights(name)
    assert set(written) == set(wanted)
    for tensor, values in wanted.items():
        np.testing.assert_array_equal(written[tensor][:], values)
    extra = {"dtype": "float32", "architectures": ["LlamaForCausalLM"]}
    assert hf.read_config(tmp_path / "out") == hf.portable(llama_cases.config(name)) | extra
    jax.tree.map(np.testing.assert_array_equal, opened(tmp_path / "out"), params)


def test_a_large_export_is_cut_into_files_with_an_index(tmp_path, monkeypatch):
    llama_cases.write(tmp_path / "in", "multi_query")
    arch = families.architecture(llama_cases.config("multi_query"))
    params = opened(tmp_path / "in")
    monkeypatch.setattr(hf, "SHARD_BYTES", 10_000)
    names = hf.save(tmp_path / "out", params, arch, llama_cases.config("multi_query"))
    assert len(names) > 2 and sorted(p.name for p in (tmp_path / "out").glob("*.safetensors")) == names
    assert names[0] == f"model-00001-of-{len(names):05}.safetensors"
    assert all((tmp_path / "out" / n).stat().st_size < 12_000 for n in names)  # 10,000 and a header
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 4 * arch.parameters()
    assert set(index["weight_map"]) == set(llama_cases.weights("multi_query"))
    jax.tree.map(np.testing.assert_array_equal, opened(tmp_path / "out"), params)


def test_bfloat16_and_float16_files_are_read_exactly(tmp_path):
    for kind in (ml_dtypes.bfloat16, np.float16):
        narrow = {k: v.astype(kind) for k, v in llama_cases.weights("grouped").items()}
        folder = tmp_path / np.dtype(kind).name
        llama_cases.write(folder, "grouped", weight_changes=narrow)
        found = opened(folder)["layers"]["mlp"]["down"]["kernel"]
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found[1], narrow["model.layers.1.mlp.down_proj.weight"].astype(np.float32).T)


def test_an_unknown_export_dtype_and_a_float16_overflow_are_refused(tmp_path):
    llama_cases.write(tmp_path / "in", "grouped", weight_changes={"model.norm.weight": np.full(24, 7e4, np.float32)})
    arch, params = architecture(), opened(tmp_path / "in")
    with pytest.raises(UserError, match="dtype 'int8' is not one of float32, bfloat16, float16"):
        hf.save(tmp_path / "a", params, arch, {}, "int8")
    with pytest.raises(UserError, match=r"model\.norm\.weight .* float16"):
        hf.save(tmp_path / "b", params, arch, {}, "float16")


SQUARE = np.zeros((24, 24), np.float32)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.layers.1.mlp.up_proj.weight": None}, r"1 tensors are missing, first model\.layers\.1\.mlp\.up_proj\.weight"),
        ({"lm_head.weight": None}, "1 tensors are missing, first lm_head.weight"),
        (
            {"model.layers.0.self_attn.q_norm.weight": np.ones(6)},
            r"1 tensors are not understood, first model\.layers\.0\.self_attn\.q_norm",
        ),
        ({"model.layers.1.mlp.up_proj.weight": SQUARE}, r"up_proj\.weight has shape \(24, 24\), the config says \(20, 24\)"),
        ({"model.norm.weight": np.ones(24, np.int8)}, r"model\.norm\.weight holds I8, not one of"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(tmp_path, changes, message):
    llama_cases.write(tmp_path, "grouped", weight_changes=changes)
    with pytest.raises(UserError, match=message):
        opened(tmp_path)


def test_a_tied_head_may_be_stored_but_must_be_the_embedding(tmp_path):
    embedding = llama_cases.weights("tied")["model.embed_tokens.weight"]
    for folder in ("same", "other"):
        changes = {"lm_head.weight": embedding if folder == "same" else embedding + 1, "model.rotary_emb.inv_freq": np.ones(3)}
        llama_cases.write(tmp_path / folder, "tied", weight_changes=changes)
    assert "head" not in opened(tmp_path / "same")
    with pytest.raises(UserError, match="lm_head.weight differs from the embedding"):
        opened(tmp_path / "other")


def test_a_truncated_file_and_a_missing_one_are_refused(tmp_path):
    llama_cases.write(tmp_path, "grouped", files=2)
    first, second = sorted(tmp_path.glob("*.safetensors"))
    whole = first.read_bytes()
    for length in (0, 5, 200, len(whole) - 1):
        first.write_bytes(whole[:length])
        with pytest.raises(UserError, match=rf"{first.name}: not a whole safetensors file"):
            opened(tmp_path)
    first.write_bytes(whole)
    second.unlink()
    with pytest.raises(UserError, match=rf"lists files that are not there: {second.name}"):
        opened(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", '{"weight_map": {}}', "\xff"])
def test_a_broken_index_or_config_is_refused(tmp_path, text):
    llama_cases.write(tmp_path, "grouped")
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.safetensors.index.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=r"model\.safetensors\.index\.json: "):
        opened(tmp_path)
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=r"config\.json: "):
        loading.describe(str(tmp_path))


def test_a_single_file_is_taken_before_an_index_and_a_line_says_so(tmp_path, capsys):
    """transformers looks for model.safetensors first, however old it is."""
    llama_cases.write(tmp_path, "grouped", files=2)
    other = {"model.norm.weight": np.full(24, 3.0, np.float32)}
    llama_cases.write(tmp_path / "single", "grouped", weight_changes=other)
    (tmp_path / "single" / "model.safetensors").rename(tmp_path / "model.safetensors")
    np.testing.assert_array_equal(opened(tmp_path)["norm"]["scale"], other["model.norm.weight"])
    hf.check(tmp_path, architecture())
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{tmp_path}: model.safetensors is read, as transformers does" in line


class _Trap:
    """What unpickles to a failure."""

    def __reduce__(self):
        return pytest.fail, ("a pickle was read",)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.pt"])
def test_pickles_are_never_read(tmp_path, name):
    llama_cases.write(tmp_path, "grouped")
    trap = pickle.dumps(_Trap())
    (tmp_path / name).write_bytes(trap)
    opened(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    with pytest.raises(UserError, match=rf"It has {name}, a pickle, which is never read"):
        loading.open_model(str(tmp_path), mesh)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"model.norm.weight": name}}))
    with pytest.raises(UserError, match=rf"lists {name}, which is no safetensors file"):
        loading.open_model(str(tmp_path), mesh)


def test_a_folder_without_a_tokenizer_opens(tmp_path):
    llama_cases.write(tmp_path, "tied")
    spec, params = loading.open_model(str(tmp_path), sharding.make_mesh(devices=jax.devices()[:1]))
    assert spec.tokenizer is None and spec.folder == tmp_path
    np.testing.assert_array_equal(params["norm"]["scale"], llama_cases.weights("tied")["model.norm.weight"])


def test_a_folder_that_is_not_there_or_is_empty_is_refused(tmp_path):
    with pytest.raises(UserError, match="gone: no such folder"):
        loading.describe(str(tmp_path / "gone"))
    with pytest.raises(UserError, match=r"config\.json: no such file"):
        loading.describe(str(tmp_path))
