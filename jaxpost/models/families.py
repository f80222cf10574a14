"""Model families: what a Hugging Face config means, field by field, and what its tensors are called.

A family is one function from the fields of a `config.json` to an Architecture, and, where its tensors have names of their own,
an entry in NAMES. A field that changes the forward pass is honoured or refused by name. A field that cannot change it is listed
as harmless. No field is silently ignored. An absent field has the default that `transformers` gives the family.
"""

import dataclasses
import math
import reprlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from jaxpost.errors import UserError


@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotary position constants. kind: default, linear, llama3, yarn, longrope or none (no rotation at all).

    share: the share of a head's channels that rotate; scale: the factor on cosine and sine (yarn and longrope). The other
    fields belong to single kinds: short and long are longrope's divisors, [R/2] each.
    """

    theta: float = 10000.0
    kind: str = "default"
    share: float = 1.0
    scale: float = 1.0
    factor: float = 1.0
    low_factor: float = 1.0
    high_factor: float = 4.0
    original: int = 8192
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    short: tuple[float, ...] = ()
    long: tuple[float, ...] = ()


class Kind(NamedTuple):
    """A kind of attention layer. window: how many tokens a token sees, itself included; None is all."""

    window: int | None = None
    rope: Rope = Rope()


@dataclasses.dataclass(frozen=True)
class Architecture:
    """The constants of a transformer. Widths in channels; eps is RMSNorm's; init_std the initial standard deviation.

    kinds, pattern: the kinds of layers, and the index of each layer's kind (() is 0 throughout). norms: "pre" normalises the
    inputs of attention and feed-forward, "post" their outputs, "both" both; norm_offset is added to every norm's scale.
    qk_norm: "head" normalises each query and key head, "all" all heads together. experts: 0 is a dense feed-forward; each
    token goes to `chosen` of them, with weights that add up to 1 if `normalised`. attend: what a token sees (settings.py).
    """

    vocab: int
    width: int
    mlp_width: int
    layers: int
    heads: int
    kv_heads: int
    head_width: int
    max_positions: int
    family: str = "llama"
    kinds: tuple[Kind, ...] = (Kind(),)
    pattern: tuple[int, ...] = ()
    eps: float = 1e-6
    norms: str = "pre"
    norm_offset: float = 0.0
    activation: str = "silu"
    tied: bool = False
    embed_scale: float = 1.0
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: str = ""
    qkv_clip: float | None = None
    attention_scale: float | None = None  # None is head_width ** -0.5
    attention_cap: float | None = None
    logit_cap: float | None = None
    experts: int = 0
    chosen: int = 0
    normalised: bool = True
    init_std: float = 0.02
    attend: str = "causal"

    def kind(self, layer: int) -> int:
        """The index of a layer's kind."""
        return self.pattern[layer] if self.pattern else 0

    def parameters(self, active: bool = False) -> int:
        """The number of parameters; with `active` only those that one token uses, so of the experts only the chosen ones."""
        d, q, kv = self.width, self.heads * self.head_width, self.kv_heads * self.head_width
        attention = 2 * d * q + 2 * d * kv + self.qkv_bias * (q + 2 * kv) + self.o_bias * d
        attention += {"": 0, "head": 2 * self.head_width, "all": q + kv}[self.qk_norm]
        mlp = 3 * d * self.mlp_width + self.mlp_bias * (2 * self.mlp_width + d)
        if self.experts:
            mlp = (self.chosen if active else self.experts) * mlp + d * self.experts
        norms = (4 if self.norms == "both" else 2) * d
        return self.layers * (attention + mlp + norms) + d + self.vocab * d * (1 if self.tied else 2)


# Fields of config.json that do not change the forward pass: bookkeeping, generation defaults, classification labels.
HARMLESS = {
    "architectures", "model_type", "transformers_version", "torch_dtype", "dtype", "use_cache", "_name_or_path", "bos_token_id",
    "eos_token_id", "pad_token_id", "id2label", "label2id", "problem_type", "return_dict", "return_dict_in_generate",
    "output_hidden_states", "output_attentions", "output_scores", "output_router_logits", "router_aux_loss_coef",
    "chunk_size_feed_forward", "tokenizer_class", "task_specific_params", "finetuning_task", "prefix", "_commit_hash",
    "_attn_implementation", "unsloth_version", "unsloth_fixed", "mlx_version", "is_llama_config", "transformers.js_config",
    "auto_map", "cache_implementation", "use_mambapy", "pretraining_tp",
}  # fmt: skip

# Fields that would change the forward pass, and the values at which they do not.
NEUTRAL = {
    "attention_dropout": (0.0,),
    "resid_pdrop": (0.0,),
    "embd_pdrop": (0.0,),
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "is_decoder": (False,),
    "cross_attention_hidden_size": (None,),
    "tie_encoder_decoder": (False,),
    "quantization_config": (None,),
    "rope_interleaved": (False,),
    "pruned_heads": ({},),
    "torchscript": (False,),
    "router_jitter_noise": (0.0,),
    "use_bidirectional_attention": (None, False),
    "clip_qkv": (None,),
    "use_mrope": (False, None),
}

ACTIVATIONS = ("silu", "swish", "gelu", "gelu_new", "gelu_pytorch_tanh", "relu")
_KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a string", list: "a list", dict: "an object"}
_REQUIRED = object()
# The largest value of each field, several times that of the largest models. Memory grows with these, in part for the shapes
# alone, so a file from elsewhere must not ask for too much. Any other number fits into 32 bits.
_MOST = {
    int: 2**31 - 1, float: 3e38, "vocab_size": 2**23, "hidden_size": 2**18, "intermediate_size": 2**21,
    "moe_intermediate_size": 2**21, "num_hidden_layers": 4096, "num_attention_heads": 2**13, "num_key_value_heads": 2**13,
    "head_dim": 2**13, "num_experts": 2**13, "num_local_experts": 2**13, "max_window_layers": 4096,
}  # fmt: skip


_SHORT = reprlib.Repr()  # a value in a message, cut to its beginning
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 100
_shown = _SHORT.repr


class Fields:
    """The fields of one config. Each is taken out as it is read, so `finish` sees which ones were not."""

    def __init__(self, config: Mapping, place: str, honoured: tuple[str, ...] = ()):
        self.left = {k: v for k, v in config.items() if k not in HARMLESS}
        self.place, self.family = place, config.get("model_type", "")
        for name, neutral in NEUTRAL.items():
            if name not in honoured and (value := self.left.pop(name, neutral[0])) not in neutral:
                raise UserError(f"{place}: {name} = {_shown(value)} is not supported (only {neutral[0]!r} is).")

    def take(self, name: str, kind: type, default: Any = _REQUIRED):
        """Removes a field and returns its value, which must be of this kind (an int may stand for a float).

        An absent or null field gives the default. Use `maybe` for a field where null means none.
        """
        value = self.left.pop(name, None)
        value = default if value is None else value
        if value is _REQUIRED:
            raise UserError(f"{self.place}: {name} is missing.")
        if value is not None and type(value) is not kind and not (kind is float and type(value) is int):
            raise UserError(f"{self.place}: {name} = {_shown(value)} is not {_KINDS[kind]}.")
        if value is not None and kind in (int, float) and not abs(value) <= (most := _MOST.get(name, _MOST[kind])):
            raise UserError(f"{self.place}: {name} = {_shown(value)} is more than any model has; give {most:,} at most.")
        return value if value is None else kind(value)

    def maybe(self, name: str, kind: type, default: Any = None):
        """Like take, for a field where null means that there is none, whatever the default."""
        if name in self.left and self.left[name] is None:
            return self.left.pop(name)
        return self.take(name, kind, default)

    def numbers(self, name: str) -> tuple[float, ...]:
        """Takes a field that is a list of numbers."""
        values = self.take(name, list)
        if not all(type(x) in (int, float) and abs(x) <= _MOST[float] for x in values):
            raise UserError(f"{self.place}: {name} = {_shown(values)} is not a list of numbers.")
        return tuple(map(float, values))

    def unread(self, *names: str) -> None:
        """Drops fields that released files have and that transformers never reads for this family. Where such a field describes
        weights, loading still compares the tensors with the architecture.
        """
        for name in names:
            self.left.pop(name, None)

    def common(self, **changes) -> dict:
        """The constants that all families have, by transformers' names and usual defaults; `changes` replaces defaults."""
        default = {"head_dim": None, "hidden_act": "silu", "rms_norm_eps": 1e-6, "tie_word_embeddings": False,
                   "num_key_value_heads": None, "max_position_embeddings": 2048} | changes  # fmt: skip
        width, heads = (
            self.take("hidden_size", int, changes.get("hidden_size", _REQUIRED)),
            self.take("num_attention_heads", int, changes.get("num_attention_heads", _REQUIRED)),
        )
        return {
            "family": self.family,
            "vocab": self.take("vocab_size", int, changes.get("vocab_size", _REQUIRED)),
            "width": width,
            "mlp_width": self.take("intermediate_size", int, changes.get("intermediate_size", _REQUIRED)),
            "layers": self.take("num_hidden_layers", int, changes.get("num_hidden_layers", _REQUIRED)),
            "heads": heads,
            "kv_heads": self.take("num_key_value_heads", int, default["num_key_value_heads"] or heads),
            "head_width": self.take("head_dim", int, default["head_dim"] or width // max(heads, 1)),
            "max_positions": self.take("max_position_embeddings", int, default["max_position_embeddings"]),
            "eps": self.take("rms_norm_eps", float, default["rms_norm_eps"]),
            "activation": self.take("hidden_act", str, default["hidden_act"]),
            "tied": self.take("tie_word_embeddings", bool, default["tie_word_embeddings"]),
            "init_std": self.take("initializer_range", float, 0.02),
            "attend": self.attend(),
        }

    def attend(self) -> str:
        """Takes what a token sees: transformers' is_causal, and our own field where that says too little."""
        causal = self.take("is_causal", bool, True)
        attend = self.take("attend", str, "causal" if causal else "whole")
        if attend not in ("causal", "prefix", "whole") or causal == (attend == "whole"):
            raise UserError(f"{self.place}: attend = {_shown(attend)}, is_causal = {causal}; false goes with whole alone.")
        return attend

    def experts(self, default: int) -> int:
        """Takes the number of experts, for which the hub's files and transformers 5 have different names."""
        one, other = self.take("num_experts", int, None), self.take("num_local_experts", int, None)
        if one is not None and other not in (None, one):
            raise UserError(f"{self.place}: num_local_experts = {other}, but num_experts = {one}; keep one.")
        return next((x for x in (one, other) if x is not None), default)

    def layer_types(self, layers: int, default: list[str]) -> tuple[int, ...]:
        """Which layers are full (0) and which slide (1): from the field layer_types, else the family's default."""
        types = self.take("layer_types", list, default)
        numbers = {"full_attention": 0, "sliding_attention": 1}
        if len(types) != layers or not all(isinstance(t, str) and t in numbers for t in types):
            raise UserError(
                f"{self.place}: layer_types must name {' or '.join(numbers)} for each of {layers} layers, not {_shown(types)}."
            )
        return tuple(numbers[t] for t in types)

    def rope(self, max_positions: int, theta: float = 10000.0, partial: bool = False) -> Rope:
        """Takes the rotary fields: rope_theta and rope_scaling, or the newer rope_parameters that holds everything.

        theta: the family's default base; partial: whether the family can rotate only a part of a head.
        """
        parameters, scaling = self.left.pop("rope_parameters", None) or {}, self.left.pop("rope_scaling", None) or {}
        for name, value in (("rope_parameters", parameters), ("rope_scaling", scaling)):
            if not isinstance(value, dict):
                raise UserError(f"{self.place}: {name} = {_shown(value)} is not an object.")
        if parameters and scaling and parameters != scaling:
            raise UserError(f"{self.place}: rope_parameters and rope_scaling are both given, and differ; keep one.")
        merged, outside = dict(parameters or scaling), {}
        for name in ("rope_theta", "partial_rotary_factor"):
            value = self.left.pop(name, None)
            if value is not None and merged.setdefault(name, value) != value:
                raise UserError(f"{self.place}: {name} = {value!r}, but the rotary parameters say {merged[name]!r}; keep one.")
        original, kind = "original_max_position_embeddings", merged.get("rope_type") or merged.get("type") or "default"
        if original in self.left and kind not in ("default", "linear"):
            outside[original] = self.left.pop(original)  # a value outside takes precedence
        rope = rope_of(merged, outside, self.place, max_positions, theta)
        if rope.share != 1 and not partial:
            raise UserError(f"{self.place}: partial_rotary_factor = {rope.share} is not supported (only 1.0 is).")
        return rope

    def finish(self, arch: Architecture) -> Architecture:
        """The architecture. Raises UserError for fields that nobody took and for numbers that do not fit together."""
        if names := ", ".join(sorted(name for name, value in self.left.items() if value is not None)):
            raise UserError(
                f"{self.place}: fields that the {self.family} family does not understand: {names}. "
                "If what made the model does not read them, delete them from the file."
            )
        _check(arch, self.place)
        return arch


_SCALINGS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "attention_factor", "mscale",
             "mscale_all_dim", "truncate"),
    "longrope": ("factor", "original_max_position_embeddings", "short_factor", "long_factor", "attention_factor"),
}  # fmt: skip
_OPTIONAL = ("beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim", "truncate")


def rope_of(merged: dict, outside: dict, place: str, max_positions: int, theta: float) -> Rope:
    """A Rope from the fields of rope_parameters. The fields in `outside`, which stood beside them, take precedence."""
    kind = merged.pop("rope_type", None) or merged.pop("type", None) or "default"
    merged.pop("type", None)
    kind = "longrope" if kind == "su" else kind
    if not isinstance(kind, str) or kind not in _SCALINGS:
        raise UserError(f"{place}: rope_type {_shown(kind)} is not supported; known are {', '.join(_SCALINGS)}.")
    names = _SCALINGS[kind]
    if "original_max_position_embeddings" in names:
        merged |= outside
        merged.setdefault("original_max_position_embeddings", max_positions)
    if kind == "yarn":
        merged.pop("attn_factor", None)  # another engine's; transformers only reads attention_factor
    original = merged.get("original_max_position_embeddings", 1)
    if kind == "longrope" and type(original) is int and original > 0:
        merged.setdefault("factor", max_positions / original)
    if extra := sorted(set(merged) - {"rope_theta", "partial_rotary_factor", *names}):
        raise UserError(f"{place}: rope scaling {kind!r} has fields that are not understood: {', '.join(extra)}.")
    if missing := [k for k in names if k not in merged and k not in _OPTIONAL]:
        raise UserError(f"{place}: rope scaling {kind!r} lacks {', '.join(missing)}.")
    fields = Fields({}, place)
    fields.left = merged
    rope = Rope(
        theta=fields.take("rope_theta", float, theta), kind=kind, share=fields.take("partial_rotary_factor", float, 1.0)
    )
    if kind == "default":
        return rope
    rope = dataclasses.replace(rope, factor=fields.take("factor", float))
    if kind == "linear":
        return rope
    rope = dataclasses.replace(rope, original=fields.take("original_max_position_embeddings", int))
    if kind == "llama3":
        low, high = fields.take("low_freq_factor", float), fields.take("high_freq_factor", float)
        return dataclasses.replace(rope, low_factor=low, high_factor=high)
    scale = fields.take("attention_factor", float, None)
    if kind == "longrope":
        short, long = (fields.numbers(f"{n}_factor") for n in ("short", "long"))
        if scale is None:
            scale = math.sqrt(1 + math.log(rope.factor) / math.log(rope.original)) if rope.factor > 1 else 1.0
        return dataclasses.replace(rope, short=short, long=long, scale=scale)
    mscale, mscale_all = fields.take("mscale", float, None), fields.take("mscale_all_dim", float, None)
    if scale is None:
        scale = (
            _yarn_scale(rope.factor, mscale) / _yarn_scale(rope.factor, mscale_all)
            if mscale and mscale_all
            else _yarn_scale(rope.factor)
        )
    betas = fields.take("beta_fast", float, 32.0), fields.take("beta_slow", float, 1.0)
    truncate = fields.take("truncate", bool, True)
    return dataclasses.replace(rope, scale=scale, beta_fast=betas[0], beta_slow=betas[1], truncate=truncate)


def _yarn_scale(factor: float, weight: float = 1.0) -> float:
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0


def _check(arch: Architecture, place: str) -> None:
    for field in ("vocab", "width", "mlp_width", "layers", "heads", "kv_heads", "head_width", "max_positions"):
        if getattr(arch, field) <= 0:
            raise UserError(f"{place}: {field} must be positive, not {getattr(arch, field)}.")
    if arch.heads % arch.kv_heads:
        raise UserError(f"{place}: num_attention_heads {arch.heads} is not a multiple of num_key_value_heads {arch.kv_heads}.")
    if arch.activation not in ACTIVATIONS:
        raise UserError(f"{place}: hidden_act {arch.activation!r} is not supported; known are {', '.join(ACTIVATIONS)}.")
    if arch.experts and not 0 < arch.chosen <= arch.experts:
        raise UserError(f"{place}: num_experts_per_tok {arch.chosen} must be between 1 and the {arch.experts} experts.")
    for window, rope in arch.kinds:
        if window is not None and window < 1:
            raise UserError(f"{place}: sliding_window {window} must be positive.")
        if not (arch.eps > 0 and math.isfinite(rope.theta) and rope.theta > 0):
            raise UserError(f"{place}: rms_norm_eps and rope_theta must be positive.")
        if not (rope.factor > 0 and rope.high_factor > rope.low_factor > 0 and rope.original > 0 and 0 < rope.share <= 1):
            raise UserError(
                f"{place}: rope scaling needs factor > 0, high_freq_factor > low_freq_factor > 0, a positive original length, "
                "and a partial_rotary_factor between 0 and 1."
            )
        turning = int(arch.head_width * rope.share)
        if turning % 2 and rope.kind != "none":
            raise UserError(
                f"{place}: head_dim {arch.head_width} x {rope.share} is odd; rotary positions need pairs of channels."
            )
        if rope.kind == "longrope" and {len(rope.short), len(rope.long)} != {turning // 2}:
            raise UserError(f"{place}: short_factor and long_factor need {turning // 2} numbers each.")


# -------------------------------------------------------------------------------------------------------- The families


def llama(config: Mapping, place: str) -> Architecture:
    """Llama 1 to 3, and models that share its config (SmolLM, TinyLlama). Other families describe how they differ."""
    f = Fields(config, place)
    c = f.common()
    bias = f.take("attention_bias", bool, False)
    rope = f.rope(c["max_positions"])
    return f.finish(Architecture(
        **c, kinds=(Kind(None, rope),), qkv_bias=bias, o_bias=bias, mlp_bias=f.take("mlp_bias", bool, False)
    ))  # fmt: skip


def mistral(config: Mapping, place: str) -> Architecture:
    """Mistral: a sliding window in every layer (or none), no biases."""
    f = Fields(config, place)
    c = f.common(num_key_value_heads=8, max_position_embeddings=131072)
    return f.finish(Architecture(**c, kinds=(Kind(f.maybe("sliding_window", int, 4096), f.rope(c["max_positions"])),)))


def qwen2(config: Mapping, place: str) -> Architecture:
    """Qwen 2 and 2.5: biases on queries, keys and values; the last layers may slide."""
    f = Fields(config, place)
    f.unread("dual_chunk_attention_config")  # how other engines go beyond the trained length
    c = f.common(num_key_value_heads=32, max_position_embeddings=32768)
    return f.finish(Architecture(**c, **_qwen_kinds(f, c), qkv_bias=True))


def qwen3(config: Mapping, place: str) -> Architecture:
    """Qwen 3: each query and key head normalised; the last layers may slide."""
    f = Fields(config, place)
    c = f.common(num_key_value_heads=32, head_dim=128, max_position_embeddings=32768)
    bias = f.take("attention_bias", bool, False)
    return f.finish(Architecture(**c, **_qwen_kinds(f, c), qkv_bias=bias, o_bias=bias, qk_norm="head"))


def _qwen_kinds(f: Fields, c: dict) -> dict:
    """Full attention below max_window_layers; sliding from there on if use_sliding_window is set."""
    window, rope = f.maybe("sliding_window", int, 4096), f.rope(c["max_positions"])
    first = f.take("max_window_layers", int, 28)
    slides = f.take("use_sliding_window", bool, False) and window is not None
    default = ["sliding_attention" if slides and i >= first else "full_attention" for i in range(c["layers"])]
    pattern = f.layer_types(c["layers"], default)
    if any(pattern) and not slides:
        raise UserError(f"{f.place}: layer_types names sliding_attention, but use_sliding_window is false.")
    if not slides:
        return {"kinds": (Kind(None, rope),)}
    return {"kinds": (Kind(None, rope), Kind(window, rope)), "pattern": pattern}


def qwen3_moe(config: Mapping, place: str) -> Architecture:
    """Qwen 3 mixtures: Qwen 3's attention, experts in every layer."""
    f = Fields(config, place)
    f.unread("max_window_layers", "qkv_bias", "use_qk_norm", "shared_expert_intermediate_size")
    c = f.common(num_key_value_heads=4, max_position_embeddings=32768)
    window = f.maybe("sliding_window", int, 4096)
    window = window if f.take("use_sliding_window", bool, False) else None
    if (step := f.take("decoder_sparse_step", int, 1)) != 1 or f.take("mlp_only_layers", list, []):
        raise UserError(f"{place}: decoder_sparse_step = {step} and mlp_only_layers: layers without experts are not supported.")
    c["mlp_width"] = f.take("moe_intermediate_size", int, 768)
    experts = f.experts(128)
    bias = f.take("attention_bias", bool, False)
    return f.finish(Architecture(
        **c, kinds=(Kind(window, f.rope(c["max_positions"])),), qkv_bias=bias, o_bias=bias, qk_norm="head",
        experts=experts, chosen=f.take("num_experts_per_tok", int, 8), normalised=f.take("norm_topk_prob", bool, False),
    ))  # fmt: skip


def mixtral(config: Mapping, place: str) -> Architecture:
    """Mixtral: Mistral with experts, whose weights always add up to one."""
    f = Fields(config, place)
    c = f.common(num_key_value_heads=8, max_position_embeddings=131072, rms_norm_eps=1e-5)
    rope = f.rope(c["max_positions"], theta=1e6)
    return f.finish(Architecture(
        **c, kinds=(Kind(f.maybe("sliding_window", int, None), rope),),
        experts=f.experts(8), chosen=f.take("num_experts_per_tok", int, 2),
    ))  # fmt: skip


def olmo2(config: Mapping, place: str) -> Architecture:
    """OLMo 2: norms after attention and feed-forward instead of before, queries and keys normalised over all heads."""
    f = Fields(config, place)
    c = f.common(rms_norm_eps=1e-5)
    bias = f.take("attention_bias", bool, False)
    rope = f.rope(c["max_positions"])
    return f.finish(Architecture(**c, kinds=(Kind(None, rope),), norms="post", qk_norm="all", qkv_bias=bias, o_bias=bias))


def olmoe(config: Mapping, place: str) -> Architecture:
    """OLMoE: experts, queries and keys normalised over all heads and perhaps clipped."""
    f = Fields(config, place, honoured=("clip_qkv",))
    c = f.common(rms_norm_eps=1e-5, max_position_embeddings=4096)
    bias = f.take("attention_bias", bool, False)
    return f.finish(Architecture(
        **c, kinds=(Kind(None, f.rope(c["max_positions"])),), qk_norm="all", qkv_bias=bias, o_bias=bias,
        qkv_clip=f.maybe("clip_qkv", float), experts=f.experts(64),
        chosen=f.take("num_experts_per_tok", int, 8), normalised=f.take("norm_topk_prob", bool, False),
    ))  # fmt: skip


# Fields of Phi-4-mini's files, and the values at which they change nothing.
_PHI4 = {"attention_bias": False, "mlp_bias": False, "lm_head_bias": False, "full_attn_mod": 1, "interpolate_factor": 1}


def phi3(config: Mapping, place: str) -> Architecture:
    """Phi-3 and 4: fused projections in the file, a part of each head rotates, longrope, perhaps a sliding window."""
    f = Fields(config, place)
    c = f.common(rms_norm_eps=1e-5, max_position_embeddings=4096)
    f.left.setdefault("original_max_position_embeddings", 4096)
    for name, neutral in _PHI4.items():
        if (value := f.left.pop(name, neutral)) != neutral:
            raise UserError(f"{place}: {name} = {_shown(value)} is not supported (only {neutral!r} is).")
    if isinstance(scaling := f.left.get("rope_scaling"), dict) and scaling.get("type") == "yarn":
        f.left["rope_scaling"] = {**scaling, "type": "longrope"}  # the first release called longrope yarn
    rope = f.rope(c["max_positions"], partial=True)
    f.left.pop("original_max_position_embeddings", None)  # only longrope reads it
    return f.finish(Architecture(**c, kinds=(Kind(f.maybe("sliding_window", int), rope),)))


def smollm3(config: Mapping, place: str) -> Architecture:
    """SmolLM 3: every fourth layer has no rotary positions."""
    f = Fields(config, place)
    c = f.common(num_key_value_heads=4, max_position_embeddings=32768, tie_word_embeddings=True)
    f.unread("max_window_layers")
    bias, interval = f.take("attention_bias", bool, False), f.take("no_rope_layer_interval", int, 4)
    rotated = f.take("no_rope_layers", list, [int((i + 1) % interval != 0) for i in range(c["layers"])])
    if len(rotated) != c["layers"] or not set(rotated) <= {0, 1}:
        raise UserError(f"{place}: no_rope_layers must be 1 (rotary) or 0 for each of {c['layers']} layers, not {rotated}.")
    window = f.maybe("sliding_window", int)
    slides = f.take("use_sliding_window", bool, False) and window is not None
    default = ["full_attention" if not slides or r else "sliding_attention" for r in rotated]
    sliding = f.layer_types(c["layers"], default)
    if any(sliding) and not slides:
        raise UserError(f"{place}: layer_types names sliding_attention, but there is no sliding_window to use.")
    rope = f.rope(c["max_positions"], theta=2e6)
    kinds = tuple(Kind(w, r) for w in (None, window) for r in (Rope(kind="none"), rope))
    pattern = tuple(2 * s + r for s, r in zip(sliding, rotated, strict=True))
    return f.finish(Architecture(
        **c, **used_kinds(kinds, pattern), qkv_bias=bias, o_bias=bias, mlp_bias=f.take("mlp_bias", bool, False)
    ))  # fmt: skip


def used_kinds(kinds: tuple[Kind, ...], pattern: tuple[int, ...]) -> dict:
    """The kinds that the pattern uses, renumbered from 0."""
    used = sorted(set(pattern))
    return {"kinds": tuple(kinds[k] for k in used), "pattern": tuple(used.index(k) for k in pattern)}


def gemma(config: Mapping, place: str) -> Architecture:
    """Gemma 1: norms scaled by 1 + w, embeddings by the root of the width, wide heads, GELU by tanh."""
    f = Fields(config, place)
    other = f.take("hidden_activation", str, None)
    c = f.common(head_dim=256, num_key_value_heads=16, tie_word_embeddings=True, max_position_embeddings=8192,
                 hidden_act="gelu_pytorch_tanh")  # fmt: skip
    if c["activation"] == "gelu":
        c["activation"] = "gelu_pytorch_tanh"  # the first files say gelu and mean this
    if other not in (None, c["activation"]):
        raise UserError(f"{place}: hidden_activation = {other!r}, but hidden_act = {c['activation']!r}; make them the same.")
    bias = f.take("attention_bias", bool, False)
    return f.finish(Architecture(
        **c, kinds=(Kind(None, f.rope(c["max_positions"])),), norm_offset=1.0, embed_scale=math.sqrt(c["width"]),
        qkv_bias=bias, o_bias=bias,
    ))  # fmt: skip


def _gemma23(f: Fields, c: dict) -> dict:
    bias = f.take("attention_bias", bool, False)
    return {"norm_offset": 1.0, "norms": "both", "embed_scale": math.sqrt(c["width"]), "qkv_bias": bias, "o_bias": bias,
            "attention_scale": f.take("query_pre_attn_scalar", float, 256.0) ** -0.5}  # fmt: skip


def gemma2(config: Mapping, place: str) -> Architecture:
    """Gemma 2: Gemma with norms before and after, soft caps on scores and logits, every other layer sliding."""
    f = Fields(config, place)
    f.unread("hidden_act", "sliding_window_size")
    activation = f.take("hidden_activation", str, "gelu_pytorch_tanh")
    c = f.common(head_dim=256, tie_word_embeddings=True, num_key_value_heads=4, max_position_embeddings=8192)
    c["activation"] = activation
    rope, window = f.rope(c["max_positions"]), f.maybe("sliding_window", int, 4096)
    default = ["full_attention" if i % 2 or window is None else "sliding_attention" for i in range(c["layers"])]
    return f.finish(Architecture(
        **c, **_gemma23(f, c), **used_kinds((Kind(None, rope), Kind(window, rope)), f.layer_types(c["layers"], default)),
        attention_cap=f.maybe("attn_logit_softcapping", float, 50.0),
        logit_cap=f.maybe("final_logit_softcapping", float, 30.0),
    ))  # fmt: skip


def gemma3(config: Mapping, place: str) -> Architecture:
    """Gemma 3 (text): Gemma 2 with normalised query and key heads and no caps; local layers have a rotary base of their own."""
    f = Fields(config, place)
    if (cap := f.left.pop("attn_logit_softcapping", None)) is not None:
        raise UserError(f"{place}: attn_logit_softcapping = {cap!r} is not supported (Gemma 3 has none).")
    f.unread("hidden_act")
    activation = f.take("hidden_activation", str, "gelu_pytorch_tanh")
    c = f.common(head_dim=256, tie_word_embeddings=True, num_attention_heads=8, num_key_value_heads=4, vocab_size=262208,
                 hidden_size=2304, intermediate_size=9216, num_hidden_layers=26, max_position_embeddings=131072)  # fmt: skip
    c["activation"] = activation
    window, every = f.take("sliding_window", int, 4096), f.take("_sliding_window_pattern", int, 6)  # as it writes it, and as
    every = f.take("sliding_window_pattern", int, every)  # the files on the hub do
    local = f.take("rope_local_base_freq", float, 10000.0)
    nested = f.left.pop("rope_parameters", None) or {}
    inner = {k: dict(nested.get(k) or {}) for k in ("sliding_attention", "full_attention")}
    if nested.keys() - inner.keys():
        raise UserError(f"{place}: rope_parameters must hold {' and '.join(inner)}, not {', '.join(nested)}.")
    slow = rope_of(inner["sliding_attention"], {}, place, c["max_positions"], local)
    f.left["rope_parameters"] = inner["full_attention"]
    fast = f.rope(c["max_positions"], theta=1e6)
    default = ["sliding_attention" if (i + 1) % every else "full_attention" for i in range(c["layers"])]
    return f.finish(Architecture(
        **c, **_gemma23(f, c), **used_kinds((Kind(None, fast), Kind(window, slow)), f.layer_types(c["layers"], default)),
        qk_norm="head", logit_cap=f.maybe("final_logit_softcapping", float),
    ))  # fmt: skip


FAMILIES: dict[str, Callable[[Mapping, str], Architecture]] = {
    "llama": llama, "mistral": mistral, "qwen2": qwen2, "qwen3": qwen3, "qwen3_moe": qwen3_moe, "mixtral": mixtral,
    "olmo2": olmo2, "olmoe": olmoe, "phi3": phi3, "smollm3": smollm3, "gemma": gemma, "gemma2": gemma2, "gemma3_text": gemma3,
}  # fmt: skip


def language_part(config: Mapping) -> dict:
    """The fields of the language model in a multimodal model's config; any other config as it is."""
    if config.get("model_type") != "gemma3" or not isinstance(config.get("text_config"), Mapping):
        return dict(config)
    ends = {k: config[k] for k in ("eos_token_id",) if k in config}
    return {**ends, **config["text_config"], "model_type": "gemma3_text"}


def architecture(config: Mapping, place: str = "config.json") -> Architecture:
    """The Architecture that a Hugging Face config describes; `place` names it in errors.

    Raises UserError for an unknown family, and for a field that is missing, out of range, or not understood.
    """
    family = config.get("model_type")
    if not isinstance(family, str) or family not in FAMILIES:
        raise UserError(f"{place}: model_type {_shown(family)} is not supported; known are {', '.join(FAMILIES)}.")
    return FAMILIES[family](config, place)


# ----------------------------------------------------------------------------------------------------------- The names


class Tensor(NamedTuple):
    """Where a parameter is in a file: the tensor's name, whether it is transposed there, and its rows in that tensor.

    Each `{}` of the name stands for one of our leading axes: the layer, from `first` on, the expert. rows: (first, end, rows in
    all) of a fused tensor, None for a whole one.
    """

    name: str
    transposed: bool = False
    rows: tuple[int, int, int] | None = None
    first: int = 0


# Our path inside a layer -> the tensor's stem inside model.layers.N, for Llama and families without an entry in NAMES.
STEMS = {
    "attention/q": "self_attn.q_proj", "attention/k": "self_attn.k_proj", "attention/v": "self_attn.v_proj",
    "attention/o": "self_attn.o_proj", "attention/q_norm": "self_attn.q_norm", "attention/k_norm": "self_attn.k_norm",
    "mlp/gate": "mlp.gate_proj", "mlp/up": "mlp.up_proj", "mlp/down": "mlp.down_proj", "mlp/router": "mlp.gate",
    "mlp/experts/gate": "mlp.experts.{}.gate_proj", "mlp/experts/up": "mlp.experts.{}.up_proj",
    "mlp/experts/down": "mlp.experts.{}.down_proj",
    "norm1": "input_layernorm", "norm2": "post_attention_layernorm",
}  # fmt: skip
_AFTER = {
    "norm1_post": "post_attention_layernorm",
    "norm2": "pre_feedforward_layernorm",
    "norm2_post": "post_feedforward_layernorm",
}
NAMES = {
    "olmo2": _AFTER,
    "gemma2": _AFTER,
    "gemma3_text": _AFTER,
    "mixtral": {
        "mlp/router": "block_sparse_moe.gate",
        "mlp/experts/gate": "block_sparse_moe.experts.{}.w1",
        "mlp/experts/down": "block_sparse_moe.experts.{}.w2",
        "mlp/experts/up": "block_sparse_moe.experts.{}.w3",
    },
    "phi3": {
        "attention/q": "self_attn.qkv_proj",
        "attention/k": "self_attn.qkv_proj",
        "attention/v": "self_attn.qkv_proj",
        "mlp/gate": "mlp.gate_up_proj",
        "mlp/up": "mlp.gate_up_proj",
    },  # fmt: skip
}


def tensor_names(arch: Architecture) -> dict[str, Tensor]:
    """Our parameter path -> where it is in the family's files."""
    if hasattr(arch, "tensors"):  # an encoder's (encoder_families.py)
        return arch.tensors()
    stems = STEMS | NAMES.get(arch.family, {})
    names = {"embed/weight": Tensor("model.embed_tokens.weight"), "norm/scale": Tensor("model.norm.weight")}
    if not arch.tied:
        names["head/weight"] = Tensor("lm_head.weight")

    def stem(ours):
        return f"model.layers.{{}}.{stems[ours]}"

    for ours in {"pre": ("norm1", "norm2"), "post": ("norm1_post", "norm2_post")}.get(
        arch.norms, ("norm1", "norm1_post", "norm2", "norm2_post")
    ):
        names[f"layers/{ours}/scale"] = Tensor(f"{stem(ours)}.weight")
    if arch.qk_norm:
        names |= {f"layers/attention/{n}_norm/scale": Tensor(f"{stem(f'attention/{n}_norm')}.weight") for n in "qk"}
    q, kv, f = arch.heads * arch.head_width, arch.kv_heads * arch.head_width, arch.mlp_width
    fused = {"attention/q": (0, q), "attention/k": (q, q + kv), "attention/v": (q + kv, q + 2 * kv)}
    fused |= {"mlp/gate": (0, f), "mlp/up": (f, 2 * f)}
    biased = {"q": arch.qkv_bias, "k": arch.qkv_bias, "v": arch.qkv_bias, "o": arch.o_bias}
    weights = {f"attention/{n}": b for n, b in biased.items()}
    if arch.experts:
        weights |= {"mlp/router": False} | {f"mlp/experts/{n}": False for n in ("gate", "up", "down")}
    else:
        weights |= {f"mlp/{n}": arch.mlp_bias for n in ("gate", "up", "down")}
    for ours, bias in weights.items():
        shared = [fused[k] for k in fused if stems[k] == stems[ours]]
        rows = (*fused[ours], max(end for _, end in shared)) if len(shared) > 1 else None
        names[f"layers/{ours}/kernel"] = Tensor(f"{stem(ours)}.weight", True, rows)
        if bias:
            names[f"layers/{ours}/bias"] = Tensor(f"{stem(ours)}.bias", False, rows)
    return names
