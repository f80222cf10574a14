"""Tiny checkpoints of every family but Llama (which has llama_cases.py), each varying fields that the family honours.

A case is a config.json's fields and numpy weights, both functions of its name alone; only what `transformers` makes of them is
stored. The weights' names and shapes are jaxpost's own account of the family, which the generator of the golden file holds
against transformers' (nothing missing, nothing left over, no shape that differs).
"""

import json
import zlib

import jax
import numpy as np
from flax.traverse_util import flatten_dict
from safetensors.numpy import save_file

from jaxpost.models import families, hf
from jaxpost.models.transformer import Transformer

_BASE = {
    "vocab_size": 37,
    "hidden_size": 24,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
_LONG = {"type": "longrope", "short_factor": [1.0, 1.5, 2.5], "long_factor": [1.3, 2.0, 9.0]}
_MIX = {"num_experts": 5, "num_experts_per_tok": 2}
_SLIDE = {"use_sliding_window": True, "sliding_window": 4}
_LAYERS = ["sliding_attention", "full_attention"]
_LINEAR = {"rope_type": "linear", "factor": 8.0}
_GEMMA = {"head_dim": 8, "query_pre_attn_scalar": 11, "sliding_window": 5}

# What each case has that the base has not. A field that is None here is null in the file; "absent" leaves it out.
CASES = {
    "mistral": {
        "window": {"sliding_window": 5},
        "no_window": {"sliding_window": None, "head_dim": 10, "rope_theta": 500.0},
        "defaults": {"hidden_size": 32, "num_attention_heads": 8, "num_key_value_heads": "absent", "tie_word_embeddings": True},
        "yarn": {"sliding_window": 9, "rope_theta": 300.0, "rope_scaling": _YARN, "rms_norm_eps": 0.3},
        "linear": {"sliding_window": 2, "hidden_act": "gelu", "num_hidden_layers": 3,
                   "rope_scaling": {"type": "linear", "factor": 3.0}},
    },
    "qwen2": {
        "plain": {"rope_theta": 1e6, "rms_norm_eps": 1e-5},
        "tied": {"tie_word_embeddings": True, "num_key_value_heads": 4, "hidden_act": "relu"},
        "slides_late": {**_SLIDE, "max_window_layers": 1, "num_hidden_layers": 3},
        "layer_types": {**_SLIDE, "layer_types": _LAYERS},
        "slides_not": {"sliding_window": 4, "use_sliding_window": False, "max_window_layers": 0},
        "yarn_ramp": {"rope_parameters": {**_YARN, "rope_theta": 90.0, "beta_fast": 3.0, "beta_slow": 0.5, "truncate": False}},
        "yarn_mscale": {"rope_scaling": {**_YARN, "mscale": 0.7, "mscale_all_dim": 1.3}, "rope_theta": 777.0},
    },
    "qwen3": {
        "plain": {"head_dim": 6, "rope_theta": 1e6},
        "bias": {"head_dim": 10, "attention_bias": True, "rms_norm_eps": 0.2},
        "tied": {"head_dim": 4, "tie_word_embeddings": True, "num_key_value_heads": 1},
        "slides": {"head_dim": 8, **_SLIDE, "max_window_layers": 1, "hidden_act": "gelu_new"},
        "yarn": {"head_dim": 12, "rope_scaling": {**_YARN, "attention_factor": 1.7}, "num_hidden_layers": 3},
    },
    "qwen3_moe": {
        "plain": {**_MIX, "moe_intermediate_size": 12, "head_dim": 6},
        "normalised": {**_MIX, "moe_intermediate_size": 16, "head_dim": 8, "norm_topk_prob": True},
        "one": {"num_experts": 3, "num_experts_per_tok": 1, "moe_intermediate_size": 8, "head_dim": 6, "attention_bias": True},
        "all": {"num_experts": 3, "num_experts_per_tok": 3, "moe_intermediate_size": 8, "head_dim": 6,
                "tie_word_embeddings": True},
        "window": {**_MIX, **_SLIDE, "moe_intermediate_size": 10, "head_dim": 6, "rope_theta": 1e6, "hidden_act": "gelu"},
    },
    "mixtral": {
        "plain": {"num_local_experts": 4, "num_experts_per_tok": 2, "rope_theta": 1e4},
        "default_base": {"num_local_experts": 3, "num_experts_per_tok": 2},
        "window": {"num_local_experts": 5, "num_experts_per_tok": 3, "sliding_window": 6, "rms_norm_eps": 0.1},
        "one": {"num_local_experts": 4, "num_experts_per_tok": 1, "tie_word_embeddings": True, "head_dim": 10},
        "deep": {"num_local_experts": 2, "num_experts_per_tok": 2, "num_hidden_layers": 3, "hidden_act": "gelu_pytorch_tanh"},
    },
    "olmo2": {
        "plain": {},
        "bias": {"attention_bias": True, "rope_theta": 5e5},
        "tied": {"tie_word_embeddings": True, "num_key_value_heads": "absent"},
        "eps": {"rms_norm_eps": 0.3, "num_hidden_layers": 3, "hidden_act": "gelu"},
        "one_key": {"num_key_value_heads": 1, "rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    },
    "olmoe": {
        "plain": {**_MIX},
        "clipped": {**_MIX, "clip_qkv": 0.4},
        "normalised": {**_MIX, "norm_topk_prob": True, "rms_norm_eps": 0.2},
        "bias": {"num_experts": 4, "num_experts_per_tok": 3, "attention_bias": True, "rope_theta": 300.0},
        "tied": {"num_experts": 3, "num_experts_per_tok": 1, "tie_word_embeddings": True,
                 "num_hidden_layers": 3, "hidden_act": "relu"},
    },
    "phi3": {
        "plain": {"sliding_window": None},
        "window": {"sliding_window": 4, "num_key_value_heads": "absent", "rms_norm_eps": 0.1},
        "partial": {"head_dim": "absent", "hidden_size": 32, "partial_rotary_factor": 0.5, "tie_word_embeddings": True},
        "short": {"rope_scaling": _LONG, "original_max_position_embeddings": 48, "rope_theta": 100.0},
        "long": {"rope_scaling": _LONG, "original_max_position_embeddings": 4, "num_hidden_layers": 3, "hidden_act": "gelu"},
    },
    "smollm3": {
        "default_pattern": {"num_hidden_layers": 5},
        "interval": {"no_rope_layer_interval": 2, "num_hidden_layers": 3, "rope_theta": 100.0},
        "listed": {"no_rope_layers": [0, 1], "attention_bias": True, "tie_word_embeddings": False},
        "window": {**_SLIDE, "no_rope_layers": [1, 0, 1], "num_hidden_layers": 3, "mlp_bias": True},
        "all_rotary": {"no_rope_layers": [1, 1], "rms_norm_eps": 0.2, "hidden_act": "gelu"},
    },
    "gemma": {
        "plain": {"head_dim": 8},
        "wide": {"head_dim": 16, "num_key_value_heads": 1, "rope_theta": 300.0},
        "untied": {"head_dim": 6, "tie_word_embeddings": False, "rms_norm_eps": 0.3},
        "bias": {"head_dim": 6, "attention_bias": True, "hidden_act": "gelu"},
        "deep": {"head_dim": 4, "num_hidden_layers": 3, "hidden_size": 28},
    },
    "gemma2": {
        "plain": {**_GEMMA},
        "caps": {**_GEMMA, "attn_logit_softcapping": 0.7, "final_logit_softcapping": 2.0},
        "no_caps": {**_GEMMA, "attn_logit_softcapping": None, "final_logit_softcapping": None, "query_pre_attn_scalar": 3},
        "listed": {**_GEMMA, "layer_types": _LAYERS[::-1], "attention_bias": True, "rms_norm_eps": 0.2},
        "deep": {**_GEMMA, "num_hidden_layers": 3, "tie_word_embeddings": False, "rope_theta": 99.0, "sliding_window": 2},
    },
    "gemma3_text": {
        "plain": {**_GEMMA, "num_hidden_layers": 7},
        "pattern": {**_GEMMA, "num_hidden_layers": 3, "sliding_window_pattern": 2, "rope_local_base_freq": 50.0,
                    "rope_theta": 900.0},
        "scaled": {**_GEMMA, "num_hidden_layers": 2, "layer_types": _LAYERS, "rope_scaling": _LINEAR},
        "nested": {
            **_GEMMA,
            "layer_types": _LAYERS,
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 33.0},
                "full_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 4444.0},
            },
        },
        "caps": {
            **_GEMMA,
            "layer_types": _LAYERS,
            "final_logit_softcapping": 1.5,
            "attention_bias": True,
            "tie_word_embeddings": False,
        },
    },
}  # fmt: skip
NAMES = tuple(f"{family}/{case}" for family, cases in CASES.items() for case in cases)
LENGTHS = (24, 9)
PROMPT, NEW = 5, 32  # greedy decoding: the first tokens of the first row, and how many follow


def config(name: str) -> dict:
    """The fields of the case's config.json."""
    family, _, case = name.partition("/")
    fields = {"model_type": family, **_BASE, **CASES[family][case]}
    return {k: v for k, v in fields.items() if v != "absent"}


def tokens(name: str) -> list[np.ndarray]:
    """Two rows of ids, of LENGTHS."""
    random = np.random.RandomState(zlib.crc32(name.encode()) + 1)
    return [random.randint(0, config(name)["vocab_size"], n).astype(np.int32) for n in LENGTHS]


def weights(name: str) -> dict[str, np.ndarray]:
    """Hugging Face name -> float32 array, drawn so that nothing hides: no norm is neutral, no bias zero."""
    arch = families.architecture(config(name))
    shapes = flatten_dict(jax.eval_shape(lambda: Transformer(arch).init(jax.random.PRNGKey(0))), sep="/")
    random = np.random.RandomState(zlib.crc32(name.encode()))
    held = {}
    for path, tensor in families.tensor_names(arch).items():
        shape = shapes[path].shape[tensor.name.count("{}") :]
        shape = shape[::-1] if tensor.transposed else shape
        shape = (tensor.rows[2], *shape[1:]) if tensor.rows else shape
        for each in hf._each(tensor, (arch.layers, arch.experts)):
            if path.endswith("scale"):
                value = 1 - arch.norm_offset + 0.3 * random.randn(*shape)
            elif path.endswith("bias"):
                value = 0.5 * random.randn(*shape)
            elif path.startswith("embed"):
                value = random.randn(*shape) / max(1.0, arch.embed_scale)
            else:
                value = 1.3 * random.randn(*shape) / np.sqrt(shape[1])
            held.setdefault(each, value.astype(np.float32))
    return held


def stacked(name: str) -> dict[str, np.ndarray]:
    """A mixture's weights as transformers 5 has them with save_original_format=False: a layer's experts in one tensor,
    [E, 2F, D] and [E, D, F], and one name for the router.
    """
    arch, held = families.architecture(config(name)), weights(name)
    hub = families.STEMS | families.NAMES.get(arch.family, {})
    for layer in range(arch.layers):
        gate, up, down = (
            np.stack(
                [held.pop(f"model.layers.{layer}.{hub[f'mlp/experts/{part}']}.weight".format(e)) for e in range(arch.experts)]
            )
            for part in ("gate", "up", "down")
        )
        held[f"model.layers.{layer}.mlp.experts.gate_up_proj"] = np.concatenate([gate, up], axis=1)
        held[f"model.layers.{layer}.mlp.experts.down_proj"] = down
        held[f"model.layers.{layer}.mlp.gate.weight"] = held.pop(f"model.layers.{layer}.{hub['mlp/router']}.weight")
    return held


def write(folder, name: str) -> None:
    """Writes the case as a model folder: config.json and one safetensors file."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config(name)))
    save_file(weights(name), folder / "model.safetensors", metadata={"format": "pt"})
