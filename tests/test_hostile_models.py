"""A model's folder that somebody else wrote, carelessly or with intent, ends with a message before memory is touched."""

import json
import os
import re

import jax.numpy as jnp
import llama_cases
import numpy as np
import pytest
import runs
from etils import epath
from safetensors.numpy import load_file, save_file

from jaxpost import sharding, tokenizer
from jaxpost.errors import UserError
from jaxpost.models import checks, families, hf, loading
from jaxpost.storage import host

SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "head_dim")


@pytest.fixture
def folder(tmp_path):
    llama_cases.write(tmp_path, "grouped")
    return tmp_path


def changed(folder, **fields) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | fields))


@pytest.mark.parametrize("name", [*SIZES, "num_key_value_heads", "max_position_embeddings"])
@pytest.mark.parametrize("value", [10**9 * 5, 10**30])
def test_a_size_that_no_model_has_is_refused_by_its_name(name, value):
    with pytest.raises(UserError, match=f"config.model: {name} = .* more than any model has"):
        loading.describe(runs.MODEL | {name: value}, "tasks.arithmetic.tokenizer")


@pytest.mark.parametrize("name", ["num_experts", "num_local_experts", "moe_intermediate_size"])
def test_so_are_the_sizes_of_mixtures(name):
    fields = families.Fields({name: 10**9}, "config.json")
    with pytest.raises(UserError, match=f"config.json: {name} = 1000000000 is more"):
        fields.take(name, int)


@pytest.mark.parametrize(
    "sizes", [{"num_hidden_layers": 4000}, {"head_dim": 8192, "hidden_size": 2**17}, {"vocab_size": 2**23}]
)
def test_a_config_larger_than_its_files_is_refused_by_their_headers(folder, sizes, monkeypatch):
    changed(folder, **sizes)
    arch = families.architecture(hf.read_config(folder))
    monkeypatch.setattr(hf, "_read", None)
    with pytest.raises(UserError) as refused:
        hf.check(folder, arch)
    assert re.search(r"config.json describes [\d,]+ parameters .* its files hold [\d,]+;", str(refused.value))
    assert all(f"{name} = {value:,}" in str(refused.value) for name, value in sizes.items())


def test_a_fresh_model_larger_than_the_memory_is_refused_by_its_fields(monkeypatch):
    spec = loading.describe(runs.MODEL, "tasks.arithmetic.tokenizer")
    loading.check(spec)
    monkeypatch.setattr(host, "memory", lambda: 4 * spec.transformer.arch.parameters() - 1)
    with pytest.raises(
        UserError, match="config.model: .* parameters .*num_hidden_layers = 2, .* GiB of memory; make it smaller"
    ):
        loading.check(spec)


@pytest.mark.parametrize("value", [1, 1.5, None, [], ["llama"], {"llama": 1}, True])
def test_a_model_type_of_another_kind_is_refused(value):
    with pytest.raises(UserError, match="config.json: model_type .* is not supported; known are"):
        families.architecture({"model_type": value})


@pytest.mark.parametrize(
    "fields",
    [
        {"rms_norm_eps": float("inf")},
        {"rms_norm_eps": float("nan")},
        {"rms_norm_eps": 10**400},
        {"rope_theta": float("inf")},
        {"initializer_range": float("-inf")},
        {"rope_scaling": {"type": ["linear"], "factor": 2.0}},
        {"rope_scaling": {"type": "linear", "factor": float("inf")}},
        {"rope_scaling": {"type": "longrope", "short_factor": ["a"], "long_factor": [1.0]}},
        {"rope_scaling": {"type": "longrope", "short_factor": [float("nan")] * 8, "long_factor": [1.0] * 8}},
    ],
)
def test_a_number_that_is_none_is_refused_by_its_field(fields):
    name = next(iter(fields))
    with pytest.raises(UserError, match=f"config.json: ({name}|rope_type|factor|short_factor)"):
        families.architecture(runs.MODEL | fields)


@pytest.mark.parametrize("content", ["[" * 100_000, '{"a":' * 100_000, "", "[]", '{"a": ' + "9" * 5000 + "}"])
@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
def test_json_that_is_no_object_is_refused(folder, name, content):
    (folder / name).write_text(content)
    (folder / "model.safetensors").unlink()  # beside it an index is not read
    with pytest.raises(UserError, match=f"{name}: "):
        hf.read_config(folder)
        hf.files(epath.Path(folder))


@pytest.mark.parametrize("name", ["../x.safetensors", "/etc/x.safetensors", "a/../../x.safetensors", 7, ["x"], None])
def test_an_index_names_files_of_its_folder(folder, name):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"model.norm.weight": name}}))
    with pytest.raises(UserError, match=r"index.json: lists .*(outside of the folder|no safetensors file)"):
        hf.listed(epath.Path(folder))


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_pipe_in_the_place_of_a_file_is_refused(folder, name):
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    with pytest.raises(UserError, match=f"{name}: a pipe, a socket or a device"):
        hf.read_config(folder)
        hf.files(epath.Path(folder))
        tokenizer.load(folder)


def test_a_folder_in_the_place_of_the_weights_is_refused(folder):
    (folder / "model.safetensors").rename(folder / "elsewhere")
    (folder / "model.safetensors").mkdir()
    with pytest.raises(UserError, match="model.safetensors: a folder, not a file"):
        hf.files(epath.Path(folder))


def test_control_characters_of_a_name_are_spelled_out():
    message = str(UserError("fields: \x1b]0;owned\x07\x9b2J\u202e\r\n\tnext"))
    assert message == "fields: \\x1b]0;owned\\x07\\x9b2J\\u202e\\r\n\tnext"


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.1.self_attn.q_proj.weight", "model.embed_tokens.weight"])
def test_weights_that_are_not_finite_are_refused_by_name(folder, name, value):
    tensors = load_file(folder / "model.safetensors")
    tensors[name].flat[-1] = value
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(UserError, match=f"{name} has 1 values that are NaN or infinite"):
        loading.open_model(str(folder), sharding.make_mesh())


def test_large_finite_weights_are_no_mistake():
    hf.check_finite(np.full(8, 3e38, np.float32), "folder", "name")


def test_a_checkpoint_that_is_not_finite_is_refused_by_name():
    checks.check_finite({"norm": {"scale": jnp.ones(3)}, "codes": jnp.ones(3, jnp.int8)}, "W")
    with pytest.raises(UserError, match="W: 1 weights have values that are NaN or infinite, first norm/scale"):
        checks.check_finite({"embed": jnp.ones(3), "norm": {"scale": jnp.array([1.0, jnp.nan])}}, "W")
