"""Tiny Llama checkpoints that vary every field the family honours: what the golden file was made of, and what the tests read.

A checkpoint is a config.json's fields and numpy weights under their Hugging Face names, both functions of the case's name
alone, so only the logits of `transformers` need storing. Weights are drawn so that nothing hides: norms are not one, biases not
zero, and the widths of a case all differ where they can.
"""

import json
import math
import zlib

import numpy as np
from safetensors.numpy import save_file

_BASE = {
    "model_type": "llama",
    "vocab_size": 37,
    "hidden_size": 24,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
}
_LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}

# What each case has that the base has not. A field that is None is left out of config.json, so that its default is tested.
_CASES = {
    "grouped": {"rope_theta": 10000.0},
    "multi_query": {"num_key_value_heads": 1, "rope_theta": 500.0, "vocab_size": 41, "num_hidden_layers": 3},
    "multi_head": {"num_key_value_heads": None, "rope_parameters": {"rope_type": "default", "rope_theta": 77.0}},
    "wide_heads": {"head_dim": 10, "hidden_act": "gelu", "hidden_size": 28, "rope_theta": 1e6},
    "narrow_heads": {
        "head_dim": 4,
        "num_attention_heads": 3,
        "num_key_value_heads": 3,
        "hidden_act": "gelu_new",
        "hidden_size": 36,
    },
    "tied": {"tie_word_embeddings": True, "rms_norm_eps": 0.3, "hidden_act": "relu", "intermediate_size": 44},
    "attention_bias": {"attention_bias": True, "hidden_act": "gelu_pytorch_tanh", "num_hidden_layers": 1},
    "mlp_bias": {"mlp_bias": True, "hidden_act": "swish", "rms_norm_eps": None, "max_position_embeddings": None},
    "both_biases_tied": {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True, "num_attention_heads": 6},
    "linear": {"rope_theta": 900.0, "rope_scaling": {"type": "linear", "factor": 3.5}},
    "linear_new_spelling": {"rope_parameters": {"rope_type": "linear", "factor": 0.5, "rope_theta": 3e4}, "head_dim": 8},
    "llama3": {"rope_theta": 5e4, "rope_scaling": {**_LLAMA3, "original_max_position_embeddings": 32}, "head_dim": 16},
    "llama3_new_spelling": {
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 300.0,
            "factor": 5.0,
            "low_freq_factor": 2.0,
            "high_freq_factor": 9.0,
            "original_max_position_embeddings": 60,
        },
        "head_dim": 12,
    },
}
NAMES = tuple(_CASES)
# Long enough that the rotary scalings turn by radians between the ends: the logits of `llama3` move by 10% and more without it.
LENGTHS = (40, 17)


def config(name: str) -> dict:
    """The fields of the case's config.json."""
    return {k: v for k, v in {**_BASE, **_CASES[name]}.items() if v is not None}


def tokens(name: str) -> list[np.ndarray]:
    """Two rows of ids, of LENGTHS."""
    random = np.random.RandomState(zlib.crc32(name.encode()) + 1)
    return [random.randint(0, config(name)["vocab_size"], n).astype(np.int32) for n in LENGTHS]


def weights(name: str) -> dict[str, np.ndarray]:
    """Hugging Face name -> float32 array."""
    c = config(name)
    random = np.random.RandomState(zlib.crc32(name.encode()))
    width, inner = c["hidden_size"], c["intermediate_size"]
    head = c.get("head_dim", width // c["num_attention_heads"])
    queries, keys = head * c["num_attention_heads"], head * c.get("num_key_value_heads", c["num_attention_heads"])
    held = {"model.embed_tokens.weight": random.randn(c["vocab_size"], width)}

    def linear(stem, rows, columns, bias):
        held[f"{stem}.weight"] = 1.3 * random.randn(rows, columns) / math.sqrt(columns)
        if bias:
            held[f"{stem}.bias"] = 0.5 * random.randn(rows)

    for i in range(c["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        for part, rows, columns in (("q", queries, width), ("k", keys, width), ("v", keys, width), ("o", width, queries)):
            linear(f"{layer}.self_attn.{part}_proj", rows, columns, c["attention_bias"])
        for part, rows, columns in (("gate", inner, width), ("up", inner, width), ("down", width, inner)):
            linear(f"{layer}.mlp.{part}_proj", rows, columns, c["mlp_bias"])
        for part in ("input_layernorm", "post_attention_layernorm"):
            held[f"{layer}.{part}.weight"] = 1 + 0.3 * random.randn(width)
    held["model.norm.weight"] = 1 + 0.3 * random.randn(width)
    if not c["tie_word_embeddings"]:
        held["lm_head.weight"] = random.randn(c["vocab_size"], width) / math.sqrt(width)
    return {k: v.astype(np.float32) for k, v in held.items()}


def write(folder, name: str, files: int = 1, config_changes=None, weight_changes=None) -> None:
    """Writes the case as a model folder: config.json and `files` safetensors, with an index where there are several.

    Changes: fields and tensors that replace or join the case's; a None leaves one out.
    """
    folder.mkdir(parents=True, exist_ok=True)
    fields = {**config(name), **(config_changes or {})}
    (folder / "config.json").write_text(json.dumps({k: v for k, v in fields.items() if v is not None}))
    held = {k: v for k, v in {**weights(name), **(weight_changes or {})}.items() if v is not None}
    if files == 1:
        save_file(held, folder / "model.safetensors", metadata={"format": "pt"})
        return
    where = {tensor: f"model-{i % files + 1:05}-of-{files:05}.safetensors" for i, tensor in enumerate(held)}
    for file in set(where.values()):
        save_file({k: held[k] for k, f in where.items() if f == file}, folder / file, metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
