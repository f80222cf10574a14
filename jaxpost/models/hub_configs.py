"""The config.json of models by their names on the hub, so that `fit` needs no network.

These are sizes and constants as the models' makers publish them. Training reads the model's own file.
"""

import copy

_LLAMA = {
    "model_type": "llama",
    "vocab_size": 128256,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}
_QWEN3 = {
    "model_type": "qwen3",
    "vocab_size": 151936,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 40960,  # of the tuned models; base models have _QWEN3_BASE
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
}
_QWEN3_BASE = 32768


def _sized(base: dict, width: int, mlp_width: int, layers: int, heads: int, **others) -> dict:
    sizes = {"hidden_size": width, "intermediate_size": mlp_width, "num_hidden_layers": layers, "num_attention_heads": heads}
    return {**base, **sizes, **others}


_MODELS = {
    "meta-llama/Llama-3.1-8B": _sized(_LLAMA, 4096, 14336, 32, 32),
    "meta-llama/Llama-3.1-70B": _sized(_LLAMA, 8192, 28672, 80, 64),
    "Qwen/Qwen3-1.7B": _sized(_QWEN3, 2048, 6144, 28, 16, tie_word_embeddings=True),
    "Qwen/Qwen3-8B": _sized(_QWEN3, 4096, 12288, 36, 32),
    "Qwen/Qwen3-32B": _sized(_QWEN3, 5120, 25600, 64, 64),
    "Qwen/Qwen3-30B-A3B": _sized(
        _QWEN3,
        2048,
        6144,
        48,
        32,
        model_type="qwen3_moe",
        num_key_value_heads=4,
        num_experts=128,
        num_experts_per_tok=8,
        moe_intermediate_size=768,
        norm_topk_prob=True,
    ),
    "google/gemma-3-12b-pt": {
        "model_type": "gemma3_text",
        "vocab_size": 262208,
        "hidden_size": 3840,
        "intermediate_size": 15360,
        "num_hidden_layers": 48,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 256,
        "max_position_embeddings": 131072,
        "query_pre_attn_scalar": 256,
        "sliding_window": 1024,
        "sliding_window_pattern": 6,
        "rope_theta": 1000000.0,
        "rope_local_base_freq": 10000.0,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    },
}


def fields(name: str) -> dict | None:
    """The fields of config.json of a model on the hub or of a tuned variant; None for a model that is not here."""
    whole = name.partition("@")[0]
    plain = whole.removesuffix("-Instruct").removesuffix("-Base")
    config = copy.deepcopy(_MODELS.get(plain) or _MODELS.get(f"{plain.removesuffix('-it')}-pt"))
    if config and whole.endswith("-Base"):
        config["max_position_embeddings"] = _QWEN3_BASE
    return config


def names() -> list[str]:
    """The models that are here."""
    return list(_MODELS)
