"""The families of encoders, BERT and ModernBERT: what their config.json means and what their tensors are called.

As in families.py, each field is honoured, refused by name, or one that does not change the forward pass. BERT's dropout is such
a one: jaxpost trains without. The files are those of a masked language model (BertForMaskedLM, ModernBertForMaskedLM), or of an
encoder without a head where `architectures` says BertModel or ModernBertModel, as embedding models do. BERT's pooler and its
head for the next sentence are not read.
"""

import dataclasses
from collections.abc import Callable, Mapping

from jaxpost.errors import UserError
from jaxpost.models import families
from jaxpost.models.families import ACTIVATIONS, Architecture, Fields, Kind, Rope, Tensor

# Fields of both families that a masked language model's forward pass does not read.
_UNREAD = (
    *("cls_token_id", "sep_token_id", "mask_token_id", "classifier_dropout", "classifier_pooling", "gradient_checkpointing"),
    *("num_labels", "layer_norm_eps", "position_embedding_type"),
)
_LAYERS = ("full_attention", "sliding_attention")


@dataclasses.dataclass(frozen=True)
class EncoderArchitecture(Architecture):
    """The constants of an encoder with a head for masked tokens; eps is LayerNorm's.

    norms: "pre" normalises the inputs of attention and feed-forward (but not of the first attention, which gets normalised
    embeddings) and the last hidden states; "sum" each sum of the stream and what is added to it. positions: whether
    they are learned embeddings; types: how many kinds of tokens have an embedding; gated: whether the feed-forward is. The head
    is a dense layer (biased where head_bias is), head_activation, a norm, and the unembedding with decoder_bias; an encoder for
    embeddings has none.
    """

    norm_bias: bool = True
    positions: bool = False
    types: int = 0
    gated: bool = False
    head: bool = True
    head_activation: str = "gelu"
    head_bias: bool = True
    decoder_bias: bool = True
    attend: str = "whole"

    def parameters(self, active: bool = False) -> int:
        """The number of parameters, all of which each token uses."""
        d, f, norm = self.width, self.mlp_width, self.width * (1 + self.norm_bias)
        attention = 4 * d * d + self.qkv_bias * 3 * d + self.o_bias * d
        wide = 2 if self.gated else 1
        mlp = (wide + 1) * d * f + self.mlp_bias * (wide * f + d)
        embeddings = self.vocab * d + norm + self.positions * self.max_positions * d + self.types * d
        head = d * d + self.head_bias * d + norm + self.decoder_bias * self.vocab + (not self.tied) * self.vocab * d
        head = head if self.head else 0
        # With "pre" the first layer lacks a norm, and one is behind the last.
        return self.layers * (attention + mlp + 2 * norm) + embeddings + head

    def tensors(self) -> dict[str, Tensor]:
        """Our parameter path -> where it is in the family's files."""
        names = {"bert": _bert_tensors, "modernbert": _modernbert_tensors}[self.family](self)
        if self.head:
            return names
        names = {path: x for path, x in names.items() if not path.startswith(("transform/", "head/"))}
        return {path: x._replace(name=x.name.removeprefix("bert.").removeprefix("model.")) for path, x in names.items()}

    def copies(self) -> dict[str, str]:
        """A tensor that files may have a second time -> the one that it must equal."""
        if not self.head:
            return {}
        if self.family == "bert":
            decoder = "cls.predictions.decoder"
            return {
                f"{decoder}.weight": "bert.embeddings.word_embeddings.weight",
                f"{decoder}.bias": "cls.predictions.bias",
            }
        return {"decoder.weight": "model.embeddings.tok_embeddings.weight"} if self.tied else {}

    def leaves_out(self, name: str) -> bool:
        """Whether a tensor of a file has no part in the model."""
        unread = ("pooler.", "cls.seq_relationship.", "embeddings.position_ids")
        return self.family == "bert" and name.removeprefix("bert.").startswith(unread)


def _common(f: Fields, config: Mapping, **own) -> dict:
    """The constants that both families take from a config, and `own`."""
    f.unread(*_UNREAD)
    head = config.get("architectures") not in (["BertModel"], ["ModernBertModel"])
    width, heads = f.take("hidden_size", int, 768), f.take("num_attention_heads", int, 12)
    if heads < 1 or width % heads:
        raise UserError(f"{f.place}: hidden_size {width} is not a multiple of num_attention_heads {heads}.")
    if (attend := f.take("attend", str, "whole")) != "whole" or f.take("is_causal", bool, False):
        raise UserError(
            f"{f.place}: attend = {attend!r}: the {f.family} family sees whole documents; leave attend and is_causal out."
        )
    return {
        "family": f.family, "head": head, "width": width, "heads": heads, "kv_heads": heads, "head_width": width // heads,
        "init_std": f.take("initializer_range", float, 0.02), "tied": f.take("tie_word_embeddings", bool, True), **own,
    }  # fmt: skip


def bert(config: Mapping, place: str) -> EncoderArchitecture:
    """BERT: learned positions and token types, biases, and a norm behind each sum."""
    f = Fields(config, place)
    if (kind := f.left.pop("position_embedding_type", "absolute")) != "absolute":
        raise UserError(f"{place}: position_embedding_type = {kind!r} is not supported (only 'absolute' is).")
    if not f.left.get("tie_word_embeddings", True):
        raise UserError(f"{place}: tie_word_embeddings = False is not supported (BERT's head is its embedding).")
    eps = f.take("layer_norm_eps", float, 1e-12)
    f.unread("hidden_dropout_prob", "attention_probs_dropout_prob")
    f.unread("directionality", *(f"pooler_{x}" for x in ("fc_size", "num_attention_heads", "num_fc_layers", "size_per_head",
                                                         "type")))  # fmt: skip
    c = _common(
        f, config, vocab=f.take("vocab_size", int, 30522), layers=f.take("num_hidden_layers", int, 12), eps=eps,
        mlp_width=f.take("intermediate_size", int, 3072), max_positions=f.take("max_position_embeddings", int, 512),
        types=f.take("type_vocab_size", int, 2), activation=f.take("hidden_act", str, "gelu"),
    )  # fmt: skip
    if c["types"] < 1:
        raise UserError(f"{place}: type_vocab_size must be positive, not {c['types']}.")
    return f.finish(EncoderArchitecture(
        **c, head_activation=c["activation"], norms="sum", positions=True, qkv_bias=True, o_bias=True, mlp_bias=True,
        kinds=(Kind(None, Rope(kind="none")),),
    ))  # fmt: skip


def modernbert(config: Mapping, place: str) -> EncoderArchitecture:
    """ModernBERT: rotary positions, gated feed-forward, and layers that see the whole document or what is near.

    `local_attention` counts both sides: a token sees half of it before and half behind itself.
    """
    f = Fields(config, place)
    for name in ("embedding_dropout", "mlp_dropout"):
        if (value := f.take(name, float, 0.0)) != 0.0:
            raise UserError(f"{place}: {name} = {value} is not supported (only 0.0 is).")
    f.unread("deterministic_flash_attn", "sparse_prediction", "sparse_pred_ignore_index",
             "reference_compile", "repad_logits_with_grad", "initializer_cutoff_factor", "hidden_act")  # fmt: skip
    c = _common(
        f, config, vocab=f.take("vocab_size", int, 50368), layers=f.take("num_hidden_layers", int, 22),
        mlp_width=f.take("intermediate_size", int, 1152), max_positions=f.take("max_position_embeddings", int, 8192),
        eps=f.take("norm_eps", float, 1e-5), norm_bias=f.take("norm_bias", bool, False),
        activation=f.take("hidden_activation", str, "gelu"), head_activation=f.take("classifier_activation", str, "gelu"),
        head_bias=f.take("classifier_bias", bool, False), decoder_bias=f.take("decoder_bias", bool, True),
        mlp_bias=f.take("mlp_bias", bool, False), qkv_bias=f.take("attention_bias", bool, False),
    )  # fmt: skip
    if c["head_activation"] not in ACTIVATIONS:
        raise UserError(f"{place}: classifier_activation {c['head_activation']!r} is not supported; known: {ACTIVATIONS}.")
    every, near = f.take("global_attn_every_n_layers", int, 3), f.take("local_attention", int, 128)
    if every < 1 or near < 2:
        raise UserError(f"{place}: global_attn_every_n_layers must be positive, and local_attention 2 at least.")
    kinds = f.layer_types(c["layers"], [_LAYERS[bool(i % every)] for i in range(c["layers"])])
    full, sliding = _ropes(f, c["max_positions"])
    used = families.used_kinds((Kind(None, full), Kind(near // 2, sliding)), kinds)
    return f.finish(EncoderArchitecture(**c, **used, norms="pre", gated=True, o_bias=c["qkv_bias"]))


def _ropes(f: Fields, max_positions: int) -> list[Rope]:
    """The rotary constants of ModernBERT's two kinds of layers: one field each, or the newer rope_parameters."""
    bases = f.take("global_rope_theta", float, 160000.0), f.take("local_rope_theta", float, 10000.0)
    nested = f.take("rope_parameters", dict, {})
    if nested.keys() - set(_LAYERS) or not all(isinstance(x, dict) for x in nested.values() if x is not None):
        raise UserError(f"{f.place}: rope_parameters must hold {' and '.join(_LAYERS)}, each an object.")
    inner = [dict(nested.get(kind) or {}) for kind in _LAYERS]
    ropes = [families.rope_of(x, {}, f.place, max_positions, base) for x, base in zip(inner, bases, strict=True)]
    if scaled := [rope.kind for rope in ropes if rope.kind not in ("default", "linear")]:
        raise UserError(f"{f.place}: rope_parameters: rope_type {scaled[0]!r} is not supported (only default and linear are).")
    return ropes


FAMILIES: dict[str, Callable[[Mapping, str], EncoderArchitecture]] = {"bert": bert, "modernbert": modernbert}


def architecture(config: Mapping, place: str = "config.json") -> Architecture:
    """The architecture that a Hugging Face config describes, of an encoder or of a decoder (families.architecture)."""
    family = config.get("model_type")
    return (FAMILIES[family] if isinstance(family, str) and family in FAMILIES else families.architecture)(config, place)


def portable(config: dict) -> dict:
    """ModernBERT's fields in the spelling of transformers 4.57, where it can say them; 5 reads both."""
    config, nested = dict(config), config.get("rope_parameters") or {}
    if all((nested.get(kind) or {}).get("rope_type", "default") == "default" for kind in _LAYERS):
        config.pop("rope_parameters", None)
        for kind, name in zip(_LAYERS, ("global_rope_theta", "local_rope_theta"), strict=True):
            if "rope_theta" in (nested.get(kind) or {}):
                config[name] = nested[kind]["rope_theta"]
    types = config.get("layer_types") or []
    for every in range(1, len(types) + 1):
        if types == [_LAYERS[bool(i % every)] for i in range(len(types))]:
            config.pop("layer_types")
            return config | {"global_attn_every_n_layers": every}
    return config


# ----------------------------------------------------------------------------------------------------------- The names


def _linear(path: str, name: str, bias: bool, rows: tuple[int, int, int] | None = None) -> dict[str, Tensor]:
    biases = {f"{path}/bias": Tensor(f"{name}.bias", False, rows)} if bias else {}
    return {f"{path}/kernel": Tensor(f"{name}.weight", True, rows), **biases}


def _norm(path: str, name: str, bias: bool, first: int = 0) -> dict[str, Tensor]:
    biases = {f"{path}/bias": Tensor(f"{name}.bias", first=first)} if bias else {}
    return {f"{path}/scale": Tensor(f"{name}.weight", first=first), **biases}


def _bert_tensors(arch: EncoderArchitecture) -> dict[str, Tensor]:
    layer, embeddings, head = "bert.encoder.layer.{}", "bert.embeddings", "cls.predictions"
    stems = {f"attention/{n[0]}": f"attention.self.{n}" for n in ("query", "key", "value")}
    stems |= {"attention/o": "attention.output.dense", "mlp/up": "intermediate.dense", "mlp/down": "output.dense"}
    norms = {"norm1": "attention.output.LayerNorm", "norm2": "output.LayerNorm"}
    names = {
        "embed/weight": Tensor(f"{embeddings}.word_embeddings.weight"),
        "positions/weight": Tensor(f"{embeddings}.position_embeddings.weight"),
        "types/weight": Tensor(f"{embeddings}.token_type_embeddings.weight"),
        **_norm("embed_norm", f"{embeddings}.LayerNorm", True),
        **_linear("transform/dense", f"{head}.transform.dense", True),
        **_norm("transform/norm", f"{head}.transform.LayerNorm", True),
        "head/bias": Tensor(f"{head}.bias"),
    }
    for ours, theirs in stems.items():
        names |= _linear(f"layers/{ours}", f"{layer}.{theirs}", True)
    for ours, theirs in norms.items():
        names |= _norm(f"layers/{ours}", f"{layer}.{theirs}", True)
    return names


def _modernbert_tensors(arch: EncoderArchitecture) -> dict[str, Tensor]:
    layer, d, f, bias = "model.layers.{}", arch.width, arch.mlp_width, arch.norm_bias
    names = {
        "embed/weight": Tensor("model.embeddings.tok_embeddings.weight"),
        **_norm("embed_norm", "model.embeddings.norm", bias),
        **_linear("layers/attention/o", f"{layer}.attn.Wo", arch.o_bias),
        **_linear("layers/mlp/gate", f"{layer}.mlp.Wi", arch.mlp_bias, (0, f, 2 * f)),
        **_linear("layers/mlp/up", f"{layer}.mlp.Wi", arch.mlp_bias, (f, 2 * f, 2 * f)),
        **_linear("layers/mlp/down", f"{layer}.mlp.Wo", arch.mlp_bias),
        **_norm("layers/norm2", f"{layer}.mlp_norm", bias),
        **_norm("norm", "model.final_norm", bias),
        **_linear("transform/dense", "head.dense", arch.head_bias),
        **_norm("transform/norm", "head.norm", bias),
    }
    for i, ours in enumerate("qkv"):
        names |= _linear(f"layers/attention/{ours}", f"{layer}.attn.Wqkv", arch.qkv_bias, (i * d, (i + 1) * d, 3 * d))
    if arch.layers > 1:
        names |= _norm("attention_norm", f"{layer}.attn_norm", bias, first=1)
    names |= {"head/bias": Tensor("decoder.bias")} if arch.decoder_bias else {}
    return names if arch.tied else names | {"head/weight": Tensor("decoder.weight")}
