"""Prompts that are learned: vectors, or keys and values, before every document, while the model's own weights are frozen.

    adapter={"name": "prompts.soft", "length": 20, "text": "Answer with a number."}
    adapter={"name": "prompts.prefix", "length": 20}
    adapter=({"name": "prompts.soft"}, {"name": "lora", "rank": 8})     both

Neither is a token of a row. The model computes a soft prompt's keys and values once a forward, by its own layers, and every
document sees them before its own tokens (models/prefix.py). So encoding, packing, masks and the sampler are as without it, the
reference reads the same rows without it, and m virtual tokens are computed once, not once a document. What a document may have
is shorter by m tokens.
"""

import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from jaxpost import tokenizer
from jaxpost.declare import Files, adapter
from jaxpost.errors import UserError
from jaxpost.models import hf
from jaxpost.models.einsum import dense
from jaxpost.models.families import Architecture
from jaxpost.models.prefix import KeysValues
from jaxpost.types import Params


class Soft(flax.struct.PyTreeNode):
    """Virtual tokens: vectors [m,D] as they enter the first layer."""

    vectors: jax.Array

    @property
    def length(self) -> int:
        """The number of places, m."""
        return self.vectors.shape[0]

    def keys_values(self, model: Any, params: Params) -> KeysValues:
        """What the model's layers make of the vectors, as of a document's first tokens: [L,1,m,K,H] each."""
        return model.keys_values(params, self.vectors[None])


class Prefix(flax.struct.PyTreeNode):
    """Keys, as they are after rotation, and values of each layer: [L,m,K*H] each."""

    k: jax.Array
    v: jax.Array

    @property
    def length(self) -> int:
        """The number of places, m."""
        return self.k.shape[1]

    def keys_values(self, model: Any, params: Params) -> KeysValues:
        """[L,1,m,K,H] each."""
        return KeysValues(*(x.reshape(len(x), 1, self.length, model.arch.kv_heads, -1) for x in (self.k, self.v)))


class Projected(flax.struct.PyTreeNode):
    """A prefix by a perceptron: tanh(inputs W1 + b1) W2 + b2, with inputs [m,I], W1 [I,P], b1 [P], W2 [P,2*L*K*H], b2."""

    inputs: jax.Array
    w1: jax.Array
    b1: jax.Array
    w2: jax.Array
    b2: jax.Array

    @property
    def length(self) -> int:
        """The number of places, m."""
        return self.inputs.shape[0]

    def plain(self) -> Prefix:
        """The prefix that it stands for: all that is needed once it is trained."""
        flat = jnp.tanh(self.inputs @ self.w1 + self.b1) @ self.w2 + self.b2
        return _apart(flat, self.inputs.shape[1])

    def keys_values(self, model: Any, params: Params) -> KeysValues:
        """[L,1,m,K,H] each."""
        return self.plain().keys_values(model, params)


def _apart(flat: Any, width: int) -> Prefix:
    """A prefix as `peft` has it, [m, L * 2 * width] with a layer's keys before its values."""
    layers = flat.reshape(flat.shape[0], -1, 2, width)
    return Prefix(layers[:, :, 0].swapaxes(0, 1), layers[:, :, 1].swapaxes(0, 1))


# ----------------------------------------------------------------------------------------------------------- peft's files

# Fields of the config that say how a prompt began, or what the tensor says too.
_READ = {
    "num_virtual_tokens", "token_dim", "num_transformer_submodules", "num_attention_heads", "num_layers", "prompt_tuning_init",
    "prompt_tuning_init_text", "prompt_tuning_init_state_dict", "tokenizer_name_or_path", "tokenizer_kwargs",
    "encoder_hidden_size", "prefix_projection",
}  # fmt: skip
_TENSOR = "prompt_embeddings"


def _read(name: str):
    """(config, tensors, place) -> the entry of an adapter of this name."""

    def read(config: Mapping, tensors: Mapping, place: str) -> dict:
        if other := [f"{k} = {v!r}" for k, v in config.items() if k not in _READ and v not in (None, False, "", [], {}, 1)]:
            raise UserError(f"{place}/adapter_config.json: {other[0]} is not supported.")
        if set(tensors) != {_TENSOR}:
            raise UserError(f"{place}: holds {', '.join(sorted(tensors)[:3])}; a prompt is one tensor, {_TENSOR}.")
        return {"name": name, "length": int(tensors[_TENSOR].get_shape()[0])}

    return read


def _values(tensors: Mapping, place: str, width: int) -> np.ndarray:
    """The folder's tensor [m, width], float32."""
    values = np.asarray(tensors[_TENSOR][:], np.float32)
    hf.check_finite(values, place, _TENSOR)
    if values.ndim != 2 or values.shape[1] != width:
        raise UserError(
            f"{place}: {_TENSOR} is {values.shape}, the model wants {width} numbers a token; the prompt belongs to another "
            "base: name that in config.model."
        )
    return values


def _filled(params: Params, tensors: Mapping, place: str) -> Params:
    if "prefix" not in params:  # a part of the tree
        return params
    held = params["prefix"]
    if isinstance(held, Soft):
        return {**params, "prefix": Soft(jnp.asarray(_values(tensors, place, held.vectors.shape[1])))}
    layers, _, width = held.k.shape
    return {**params, "prefix": _apart(jnp.asarray(_values(tensors, place, 2 * layers * width)), width)}


def _written(params: Params, arch: Architecture, entry: Mapping) -> tuple[dict, dict[str, np.ndarray]]:
    held, width = params["prefix"], arch.kv_heads * arch.head_width
    config = {"num_virtual_tokens": held.length, "num_transformer_submodules": 1, "num_layers": arch.layers}
    if isinstance(held, Soft):
        config |= {"token_dim": arch.width, "num_attention_heads": arch.heads, "prompt_tuning_init": "RANDOM"}
        return config, {_TENSOR: np.asarray(held.vectors)}
    held = held.plain() if isinstance(held, Projected) else held
    config |= {
        "token_dim": width,
        "num_attention_heads": arch.kv_heads,
        "prefix_projection": False,
        "encoder_hidden_size": width,
    }
    layers = np.stack([np.asarray(held.k), np.asarray(held.v)], axis=1)  # [L,2,m,K*H]
    return config, {_TENSOR: layers.transpose(2, 0, 1, 3).reshape(held.length, -1)}


# -------------------------------------------------------------------------------------------------------------- Adapters


def _ids(spec: Any, keywords: Mapping) -> list[int]:
    """The ids of the text that a soft prompt begins as."""
    text = keywords.get("text", "")
    if not text or spec.tokenizer is None:
        return []
    try:
        return tokenizer.encode(spec.tokenizer, text)
    except UserError as error:
        raise UserError(f"config.adapter.text: {error}") from error


def _scale(spec: Any, keywords: Mapping) -> float:
    return spec.transformer.arch.embed_scale


COMPLETED = {"ids": _ids, "scale": _scale}


@adapter(
    adds=("prefix/vectors",),
    neutral=False,
    merges=False,
    files=Files("PROMPT_TUNING", _read("prompts.soft"), _filled, _written),
    completed=COMPLETED,
)
def soft(
    params: Params, key: jax.Array, *, length: int = 20, text: str = "", ids: Sequence[int] = (), scale: float = 1.0
) -> Params:
    """Soft prompt: `length` vectors before every document ("The Power of Scale for Parameter-Efficient Prompt Tuning").

    They begin as the embeddings of a text's tokens, cut or repeated to the length, or without a text as those of tokens drawn
    at random. ids: the text's tokens; scale: the model's factor of its embeddings. Both come from the model.
    """
    table = params.get("embed", {}).get("weight")
    if table is None:  # a part of the tree
        return params
    _check(params, length)
    ids = np.resize(ids, length) if len(ids) else jax.random.randint(_key(key), (length,), 0, table.shape[0])
    return {**params, "prefix": Soft(scale * jnp.take(table, jnp.asarray(ids), axis=0).astype(jnp.float32))}


@adapter(
    adds=tuple(f"prefix/{part}" for part in ("k", "v", "inputs", "w1", "b1", "w2", "b2")),
    neutral=False,
    merges=False,
    files=Files("PREFIX_TUNING", _read("prompts.prefix"), _filled, _written),
)
def prefix(params: Params, key: jax.Array, *, length: int = 20, hidden: int = 0, std: float = 0.02) -> Params:
    """Prefix tuning: `length` keys and values in every layer before every document ("Prefix-Tuning: Optimizing Continuous
    Prompts for Generation").

    They are normal with the standard deviation `std`. With hidden > 0 a perceptron of that width makes them from `length`
    vectors, as in the paper; its weights begin as torch's do, and an export drops it.
    """
    kernel = params.get("layers", {}).get("attention", {}).get("k", {}).get("kernel")
    if kernel is None:  # a part of the tree
        return params
    _check(params, length)
    while hasattr(kernel, "base"):
        kernel = kernel.base
    layers, _, width = jax.eval_shape(dense, kernel).shape
    if not isinstance(hidden, int) or hidden < 0:
        raise UserError(f"config.adapter.hidden: {hidden!r}; it is a whole number, 0 for no perceptron.")
    keys, shape = jax.random.split(_key(key), 5), (layers, length, width)
    if not hidden:
        return {**params, "prefix": Prefix(*(std * jax.random.normal(k, shape) for k in keys[:2]))}

    def uniform(key, inputs, *shape):
        return jax.random.uniform(key, shape, jnp.float32, -(inputs**-0.5), inputs**-0.5)

    out = 2 * layers * width
    weights = uniform(keys[1], width, width, hidden), uniform(keys[2], width, hidden)
    weights += uniform(keys[3], hidden, hidden, out), uniform(keys[4], hidden, out)
    return {**params, "prefix": Projected(jax.random.normal(keys[0], (length, width)), *weights)}


def _key(key: jax.Array) -> jax.Array:
    return jax.random.fold_in(key, zlib.crc32(b"prefix"))


def _check(params: Params, length: int) -> None:
    if not isinstance(length, int) or isinstance(length, bool) or length < 1:
        raise UserError(f"config.adapter.length: {length!r}; it is a whole number of at least 1.")
    if "prefix" in params:
        raise UserError("config.adapter: two prompts stand before a document; give one, with the length of both.")
