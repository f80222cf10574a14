"""Model families: what a Hugging Face config means, field by field, and what its tensors are called.

A family is a function from the fields of a `config.json` to an Architecture, and a table of names. A field that changes the
forward pass is honoured or refused by name; a field that cannot change it is listed as harmless. Nothing is read and ignored.
"""

import dataclasses
import functools
import math
from collections.abc import Callable

from jaxpost.errors import UserError


@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotary position constants. kind: default, linear or llama3; factor and the rest are read by the scaled kinds alone."""

    theta: float = 10000.0
    kind: str = "default"
    factor: float = 1.0
    low_factor: float = 1.0
    high_factor: float = 4.0
    original: int = 8192


@dataclasses.dataclass(frozen=True)
class Architecture:
    """The constants of a transformer. Widths in channels; eps is RMSNorm's; init_std the initial standard deviation."""

    vocab: int
    width: int
    mlp_width: int
    layers: int
    heads: int
    kv_heads: int
    head_width: int
    max_positions: int
    rope: Rope = Rope()
    eps: float = 1e-6
    activation: str = "silu"
    tied: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    init_std: float = 0.02

    def parameters(self) -> int:
        """How many parameters the model has."""
        d, qk, kv = self.width, self.heads * self.head_width, self.kv_heads * self.head_width
        attention = 2 * d * qk + 2 * d * kv + self.attention_bias * (qk + 2 * kv + d)
        mlp = 3 * d * self.mlp_width + self.mlp_bias * (2 * self.mlp_width + d)
        return self.layers * (attention + mlp + 2 * d) + d + self.vocab * d * (1 if self.tied else 2)


# Fields of config.json that do not change the forward pass: bookkeeping, generation defaults, classification labels.
HARMLESS = {
    "architectures",
    "model_type",
    "transformers_version",
    "torch_dtype",
    "dtype",
    "use_cache",
    "_name_or_path",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "id2label",
    "label2id",
    "problem_type",
    "return_dict",
    "return_dict_in_generate",
    "output_hidden_states",
    "output_attentions",
    "output_scores",
    "chunk_size_feed_forward",
    "tokenizer_class",
    "task_specific_params",
    "finetuning_task",
    "prefix",
    "_commit_hash",
    "_attn_implementation",
    "initializer_range",
    "unsloth_version",
    "unsloth_fixed",
    "mlx_version",
    "is_llama_config",
    "transformers.js_config",
}

# Fields that would change it, and the one value at which they do not.
NEUTRAL = {
    "attention_dropout": 0.0,
    "pretraining_tp": 1,
    "is_encoder_decoder": False,
    "add_cross_attention": False,
    "is_decoder": False,
    "cross_attention_hidden_size": None,
    "tie_encoder_decoder": False,
    "quantization_config": None,
    "partial_rotary_factor": 1.0,
    "rope_interleaved": False,
    "pruned_heads": {},
    "torchscript": False,
}

_KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a string"}

ACTIVATIONS = ("silu", "swish", "gelu", "gelu_new", "gelu_pytorch_tanh", "relu")


def _take(fields: dict, place: str, name: str, kind: type, default=None):
    """Removes a field and gives its value, of exactly this kind (a whole number may stand for a number); null is absent."""
    value = fields.pop(name, None)
    value = default if value is None else value
    if value is None:
        raise UserError(f"{place}: {name} is missing.")
    if type(value) is not kind and not (kind is float and type(value) is int):
        raise UserError(f"{place}: {name} = {value!r} is not {_KINDS[kind]}.")
    return kind(value)


def _rope(fields: dict, place: str) -> Rope:
    """Both spellings: rope_theta + rope_scaling, and the newer rope_parameters that holds everything."""
    given, scaling = fields.pop("rope_parameters", None) or {}, fields.pop("rope_scaling", None) or {}
    theta = fields.pop("rope_theta", None)
    for name, value in (("rope_parameters", given), ("rope_scaling", scaling)):
        if not isinstance(value, dict):
            raise UserError(f"{place}: {name} = {value!r} is not an object.")
    if given and scaling and given != scaling:
        raise UserError(f"{place}: rope_parameters and rope_scaling are both given, and differ; keep one.")
    merged = dict(given or scaling)
    if theta is not None and merged.setdefault("rope_theta", theta) != theta:
        raise UserError(f"{place}: rope_theta = {theta!r}, but the rotary parameters say {merged['rope_theta']!r}; keep one.")
    merged.setdefault("rope_theta", 10000.0)
    kind = merged.pop("rope_type", None) or merged.pop("type", None) or "default"
    merged.pop("type", None)
    wanted = {
        "default": ("rope_theta",),
        "linear": ("rope_theta", "factor"),
        "llama3": ("rope_theta", "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    }
    if kind not in wanted:
        raise UserError(f"{place}: rope_type {kind!r} is not supported; known are {', '.join(wanted)}.")
    if merged.get("partial_rotary_factor", 1.0) == 1.0:
        merged.pop("partial_rotary_factor", None)
    if extra := sorted(set(merged) - set(wanted[kind])):
        raise UserError(f"{place}: rope scaling {kind!r} has fields that are not understood: {', '.join(extra)}.")
    if missing := [k for k in wanted[kind] if k not in merged]:
        raise UserError(f"{place}: rope scaling {kind!r} lacks {', '.join(missing)}.")
    number = functools.partial(_take, merged, place)
    rope = Rope(theta=number("rope_theta", float), kind=kind)
    if kind != "default":
        rope = dataclasses.replace(rope, factor=number("factor", float))
    if kind == "llama3":
        low, high = number("low_freq_factor", float), number("high_freq_factor", float)
        original = number("original_max_position_embeddings", int)
        rope = dataclasses.replace(rope, low_factor=low, high_factor=high, original=original)
    return rope


def llama(config: dict, place: str = "config.json") -> Architecture:
    """Llama 1 to 3 (and what shares its config): grouped attention, RMSNorm, gated feed-forward, rotary positions.

    Raises UserError for a field that is missing, out of range, or not understood.
    """
    fields = {k: v for k, v in config.items() if k not in HARMLESS}
    init_std = _take(dict(config), place, "initializer_range", float, 0.02)
    for name, neutral in NEUTRAL.items():
        if (value := fields.pop(name, neutral)) != neutral:
            raise UserError(f"{place}: {name} = {value!r} is not supported (only {neutral!r} is).")

    take = functools.partial(_take, fields, place)
    width, heads = take("hidden_size", int), take("num_attention_heads", int)
    arch = Architecture(
        vocab=take("vocab_size", int),
        width=width,
        mlp_width=take("intermediate_size", int),
        layers=take("num_hidden_layers", int),
        heads=heads,
        kv_heads=take("num_key_value_heads", int, heads),
        head_width=take("head_dim", int, width // max(heads, 1)),
        max_positions=take("max_position_embeddings", int, 2048),
        rope=_rope(fields, place),
        eps=take("rms_norm_eps", float, 1e-6),
        activation=take("hidden_act", str, "silu"),
        tied=take("tie_word_embeddings", bool, False),
        attention_bias=take("attention_bias", bool, False),
        mlp_bias=take("mlp_bias", bool, False),
        init_std=init_std,
    )
    if fields:
        raise UserError(f"{place}: fields that the llama family does not understand: {', '.join(sorted(fields))}.")
    _check(arch, place)
    return arch


def _check(arch: Architecture, place: str) -> None:
    for field in ("vocab", "width", "mlp_width", "layers", "heads", "kv_heads", "head_width", "max_positions"):
        if getattr(arch, field) <= 0:
            raise UserError(f"{place}: {field} must be positive, not {getattr(arch, field)}.")
    if arch.heads % arch.kv_heads:
        raise UserError(f"{place}: num_attention_heads {arch.heads} is not a multiple of num_key_value_heads {arch.kv_heads}.")
    if arch.head_width % 2:
        raise UserError(f"{place}: head_dim {arch.head_width} is odd; rotary positions need pairs of channels.")
    if arch.activation not in ACTIVATIONS:
        raise UserError(f"{place}: hidden_act {arch.activation!r} is not supported; known are {', '.join(ACTIVATIONS)}.")
    if not (arch.eps > 0 and math.isfinite(arch.rope.theta) and arch.rope.theta > 0):
        raise UserError(f"{place}: rms_norm_eps and rope_theta must be positive.")
    if not (arch.rope.factor > 0 and arch.rope.high_factor > arch.rope.low_factor > 0 and arch.rope.original > 0):
        raise UserError(
            f"{place}: rope scaling needs factor > 0, high_freq_factor > low_freq_factor > 0 and a positive original length."
        )


FAMILIES: dict[str, Callable[..., Architecture]] = {"llama": llama}


def architecture(config: dict, place: str = "config.json") -> Architecture:
    """The Architecture that a Hugging Face config describes; `place` names it in errors."""
    family = config.get("model_type")
    if family not in FAMILIES:
        raise UserError(f"{place}: model_type {family!r} is not supported; known are {', '.join(FAMILIES)}.")
    return FAMILIES[family](config, place)


def tensor_names(arch: Architecture) -> dict[str, tuple[str, bool]]:
    """Our parameter path -> (Hugging Face name, transposed?). `{}` in a name stands for the layer, our leading axis."""
    names = {"embed/weight": ("model.embed_tokens.weight", False), "norm/scale": ("model.norm.weight", False)}
    if not arch.tied:
        names["head/weight"] = ("lm_head.weight", False)
    layer = {"norm1": "input_layernorm", "norm2": "post_attention_layernorm"}
    names |= {f"layers/{ours}/scale": (f"model.layers.{{}}.{theirs}.weight", False) for ours, theirs in layer.items()}
    for block, ours, theirs, biased in (
        ("attention", "qkvo", "self_attn.{}_proj", arch.attention_bias),
        ("mlp", ("gate", "up", "down"), "mlp.{}_proj", arch.mlp_bias),
    ):
        for name in ours:
            stem = "model.layers.{}." + theirs.format(name)
            names[f"layers/{block}/{name}/kernel"] = (f"{stem}.weight", True)
            if biased:
                names[f"layers/{block}/{name}/bias"] = (f"{stem}.bias", False)
    return names
