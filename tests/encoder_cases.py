"""Tiny checkpoints of the families of encoders, each varying fields that the family honours, as family_cases.py has decoders'.

A case is a config.json's fields and numpy weights, both functions of its name alone.
"""

import json
import zlib

import family_cases
import jax
import numpy as np
from flax.traverse_util import flatten_dict
from safetensors.numpy import save_file

from jaxpost.models import encoder, encoder_families, hf

_BASE = {
    "vocab_size": 37,
    "hidden_size": 24,
    "intermediate_size": 20,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
_LAYERS = ["sliding_attention", "full_attention", "full_attention"]
_NEAR = {"global_attn_every_n_layers": 2, "local_attention": 6}

CASES = {
    "bert": {
        "plain": {},
        "wide": {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 48},
        "eps": {"layer_norm_eps": 0.3, "hidden_act": "relu"},
        "types": {"type_vocab_size": 5, "hidden_act": "gelu_new", "num_hidden_layers": 1},
        "odd": {"hidden_size": 15, "num_attention_heads": 3, "max_position_embeddings": 40},
    },
    "modernbert": {
        "plain": {"local_attention": 4},
        "biased": {**_NEAR, "attention_bias": True, "mlp_bias": True, "norm_bias": True, "classifier_bias": True},
        "bases": {**_NEAR, "global_rope_theta": 900.0, "local_rope_theta": 40.0, "norm_eps": 0.2, "num_hidden_layers": 4},
        "nested": {
            "layer_types": _LAYERS,
            "local_attention": 9,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 700.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 33.0},
            },
        },
        "head": {"tie_word_embeddings": False, "classifier_activation": "relu", "hidden_activation": "silu",
                 "local_attention": 2},
        "bare": {"decoder_bias": False, "num_hidden_layers": 1, "hidden_activation": "gelu_pytorch_tanh"},
        "near": {"global_attn_every_n_layers": 1, "local_attention": 8, "num_attention_heads": 2},
    },
}  # fmt: skip
# Cases that are written as bare encoders, of which the hidden states are compared.
BARE = ("bert/types", "modernbert/biased")
CLASSES = {"bert": "BertModel", "modernbert": "ModernBertModel"}
# Cases of family_cases.py that see whole documents: is_causal is false.
WHOLE = ("qwen3/bias", "qwen2/layer_types")
NAMES = tuple(f"{family}/{case}" for family, cases in CASES.items() for case in cases)
LENGTHS = (24, 9)


def config(name: str) -> dict:
    """The fields of the case's config.json."""
    family, _, case = name.partition("/")
    return {"model_type": family, **_BASE, **CASES[family][case]}


def tokens(name: str) -> list[np.ndarray]:
    """Two rows of ids, of LENGTHS."""
    random = np.random.RandomState(zlib.crc32(name.encode()) + 1)
    return [random.randint(0, config(name)["vocab_size"], n).astype(np.int32) for n in LENGTHS]


def types(name: str) -> list[np.ndarray]:
    """The rows' token types; a family without them ignores them."""
    random = np.random.RandomState(zlib.crc32(name.encode()) + 2)
    return [random.randint(0, config(name).get("type_vocab_size", 2), n).astype(np.int32) for n in LENGTHS]


def weights(name: str) -> dict[str, np.ndarray]:
    """Hugging Face name -> float32 array, drawn so that nothing hides: no norm is neutral, no bias zero."""
    arch = encoder_families.architecture(config(name))
    shapes = flatten_dict(jax.eval_shape(lambda: encoder.model(arch).init(jax.random.PRNGKey(0))), sep="/")
    random, held = np.random.RandomState(zlib.crc32(name.encode())), {}
    for path, tensor in arch.tensors().items():
        shape = shapes[path].shape[tensor.name.count("{}") :]
        shape = shape[::-1] if tensor.transposed else shape
        shape = (tensor.rows[2], *shape[1:]) if tensor.rows else shape
        for each in hf._each(tensor, (arch.layers - tensor.first,)):
            if path.endswith("scale"):
                value = 1 + 0.3 * random.randn(*shape)
            elif path.endswith("bias"):
                value = 0.5 * random.randn(*shape)
            elif path.startswith(("embed", "positions", "types")):
                value = random.randn(*shape)
            else:
                value = 1.3 * random.randn(*shape) / np.sqrt(shape[1])
            held.setdefault(each, value.astype(np.float32))
    return held


def write_bare(folder, name: str) -> None:
    """Writes a case without its head, as embedding models are."""
    bare = {**config(name), "architectures": [CLASSES[name.partition("/")[0]]]}
    names = {tensor.format(i) for _, (tensor, *_) in encoder_families.architecture(bare).tensors().items() for i in range(9)}
    held = {k.removeprefix("bert.").removeprefix("model."): x for k, x in weights(name).items()}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(bare))
    save_file({k: x for k, x in held.items() if k in names}, folder / "model.safetensors", metadata={"format": "pt"})


def write_whole(folder, name: str) -> None:
    """Writes a decoder's case whose tokens see their whole document."""
    family_cases.write(folder, name)
    (folder / "config.json").write_text(json.dumps({**family_cases.config(name), "is_causal": False}))


def write(folder, name: str) -> None:
    """Writes the case as a model folder: config.json and one safetensors file."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config(name)))
    save_file(weights(name), folder / "model.safetensors", metadata={"format": "pt"})
