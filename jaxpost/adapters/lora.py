"""Low-rank adapters: a frozen kernel of the tree is replaced by a node that adds two thin matrices to it.

    adapter={"name": "lora", "rank": 8, "alpha": 16.0}              in a recipe; also lora.rslora and lora.dora
    adapter={"name": "lora", "base": "nf4", "targets": "attention/(q|v)/kernel$"}

An adapter is a function (params, key, **keywords) -> params. It works on any part of the tree, on shapes alone and under jit.
Each leaf's result depends only on that leaf, its path and the key, so weights are adapted one at a time as they are read. Every
array of a node has the layers in front, as kernels do. `base` "int8" or "nf4" quantises the frozen kernel
(adapters/quantise.py). Initial values have `peft`'s distributions.

`peft`'s files hold LoRA, rsLoRA and DoRA around the projections of the layers, the same in all layers and of one rank; anything
else is refused by name. A family whose files fuse several projections into one tensor (Phi-3) cannot be written: each of our
projections has its own A, and a fused tensor has a single one. Export it merged.
"""

import math
import re
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from jaxpost.adapters.quantise import quantised
from jaxpost.declare import Files, adapter
from jaxpost.errors import UserError
from jaxpost.models import hf
from jaxpost.models.einsum import dense, project
from jaxpost.models.families import STEMS, Architecture, tensor_names
from jaxpost.sharding import path_name
from jaxpost.types import Params

# The projections of a layer; all of them are the default. A mixture's router and experts do not go through `project`.
TARGETS = "layers/(attention/(q|k|v|o)|mlp/(gate|up|down))/kernel$"


class Lora(flax.struct.PyTreeNode):
    """W + scale * A B: base a kernel [..., I, O] or a quantised one, a [..., I, r], b [..., r, O]."""

    parts = {"a": "Ir", "b": "rO"}
    base: Any
    a: jax.Array
    b: jax.Array
    scale: float = flax.struct.field(pytree_node=False)

    def project(self, x: jax.Array) -> jax.Array:
        """x [T, I] -> [T, O], in x's dtype. Where b is zero the result is the base's, bit for bit."""
        return project(x, self.base) + self.scale * project(project(x, self.a), self.b)

    def merged(self) -> jax.Array:
        """The kernel [..., I, O] that it stands for."""
        return dense(self.base) + self.scale * jnp.matmul(self.a, self.b, precision="highest")


class Dora(flax.struct.PyTreeNode):
    """magnitude * V / |V| with V = W + scale * A B, the norm taken over the inputs of each output; magnitude [..., O]."""

    parts = {"a": "Ir", "b": "rO", "magnitude": "O"}
    base: Any
    a: jax.Array
    b: jax.Array
    magnitude: jax.Array
    scale: float = flax.struct.field(pytree_node=False)

    def project(self, x: jax.Array) -> jax.Array:
        """x [T, I] -> [T, O], in x's dtype."""
        out = project(x, self.base) + self.scale * project(project(x, self.a), self.b)
        return out * self._length().astype(x.dtype)

    def merged(self) -> jax.Array:
        """The kernel [..., I, O] that it stands for."""
        return self._direction() * self._length()[..., None, :]

    def _direction(self) -> jax.Array:
        return dense(self.base) + self.scale * jnp.matmul(self.a, self.b, precision="highest")

    def _length(self) -> jax.Array:
        """magnitude / |V|. The norm has no gradient: the paper drops it to save memory, at no cost in quality."""
        return self.magnitude / jax.lax.stop_gradient(jnp.linalg.norm(self._direction(), axis=-2))


# ----------------------------------------------------------------------------------------------------------- peft's files

_PARTS = {"lora_A.weight": "a", "lora_B.weight": "b", "lora_magnitude_vector": "magnitude"}
# _READ: fields that are read here or do not change what an adapter computes. _NEUTRAL: values of other fields that change
# nothing. Any other field must be empty.
_READ = {
    "r", "lora_alpha", "use_rslora", "use_dora", "target_modules", "lora_dropout", "qalora_group_size", "megatron_core",
    "ensure_weight_tying",
}  # fmt: skip
_NEUTRAL = {"bias": ("none",), "init_lora_weights": (True, False, "gaussian", "orthogonal")}


def _read(config: Mapping, tensors: Mapping, place: str) -> dict:
    """The entry with the shape and the scale of a folder's adapter."""
    for field, value in config.items():
        if field not in _READ and value not in _NEUTRAL.get(field, (None, False, "", [], {})):
            raise UserError(
                f"{place}/adapter_config.json: {field} = {value!r} is not supported; merge the adapter into its model with "
                "peft instead."
            )
    rank = config.get("r")
    if not isinstance(rank, int) or not isinstance(config.get("lora_alpha"), (int, float)):
        raise UserError(
            f"{place}/adapter_config.json: has no whole number `r` or no number `lora_alpha`; save it from peft again."
        )
    alpha = float(config["lora_alpha"]) * (math.sqrt(rank) if config.get("use_rslora") else 1.0)
    stems = {v: k for k, v in STEMS.items() if re.fullmatch(r"attention/[qkvo]|mlp/(gate|up|down)", k)}
    adapted = {m[1] for n in tensors if (m := re.fullmatch(r"model\.layers\.\d+\.(.*)\.lora_A\.weight", n))}
    if unknown := adapted - stems.keys():
        raise UserError(f"{place}: adapts {min(unknown)}, which is no projection of a layer that jaxpost adapts.")
    if others := [n for n in tensors if not re.fullmatch(r"model\.layers\.\d+\..*", n)] or (not adapted and ["?"]):
        raise UserError(f"{place}: {others[0]} is no tensor of a low-rank adapter around a layer's projections.")
    targets = f"layers/({'|'.join(sorted(stems[m] for m in adapted))})/kernel$"
    return {"name": "lora.dora" if config.get("use_dora") else "lora.lora", "rank": rank, "alpha": alpha, "targets": targets}


def _filled(params: Params, tensors: Mapping, place: str) -> Params:
    """The tree with the values of a folder's adapter in its nodes."""

    def filled(path, node):
        if not isinstance(node, (Lora, Dora)):
            return node
        parts = {"a": node.a, "b": node.b} | ({"magnitude": node.magnitude} if isinstance(node, Dora) else {})
        stem = STEMS[path.removeprefix("layers/").removesuffix("/kernel")]
        return node.replace(**{k: _stacked(place, tensors, stem, k, x.shape) for k, x in parts.items()})

    return unflatten_dict({path: filled(path, x) for path, x in flatten_dict(params, sep="/").items()}, sep="/")


def _stacked(place: str, tensors: Mapping, stem: str, part: str, shape: tuple[int, ...]) -> jax.Array:
    """One part of all layers' adapters around a projection, float32, matrices transposed to [in, out]."""
    suffix = next(k for k, v in _PARTS.items() if v == part)
    names = [f"model.layers.{layer}.{stem}.{suffix}" for layer in range(shape[0])]
    if missing := [n for n in names if n not in tensors]:
        raise UserError(
            f"{place}: {missing[0]} is missing; an adapter of some layers only is not supported. One of another base "
            "belongs to that: name it in config.model."
        )
    if f"model.layers.{shape[0]}.{stem}.{suffix}" in tensors:
        raise UserError(f"{place}: adapts more than the model's {shape[0]} layers; it belongs to another model.")
    layers = [np.asarray(tensors[n][:], np.float32) for n in names]
    for name, values in zip(names, layers, strict=True):
        hf.check_finite(values, place, name)
    layers = [x if part == "magnitude" else x.T for x in layers]
    if layers[0].shape != tuple(shape[1:]):
        raise UserError(
            f"{place}: {names[0]} is {layers[0].shape} as [in, out], the model wants {tuple(shape[1:])}; the adapter "
            "belongs to another base: name that in config.model."
        )
    return jnp.asarray(np.stack(layers))


def _written(params: Params, arch: Architecture, entry: Mapping) -> tuple[dict, dict[str, np.ndarray]]:
    """(config's fields, tensors) of a tree's adapter. Raises UserError for a family with fused projections."""
    names = tensor_names(arch)
    nodes = {k: v for k, v in flatten_dict(params, sep="/").items() if isinstance(v, (Lora, Dora))}
    if fused := [names[k].name for k in nodes if names[k].rows]:
        raise UserError(
            f"export: {arch.family} keeps several projections in one tensor ({fused[0].format(0)}), around which peft puts one "
            "adapter and this model has several. Leave --adapter out: the adapter is then merged into the model."
        )
    tensors = {}
    for path, node in nodes.items():
        for suffix, part in _PARTS.items():
            for layer, array in enumerate(np.asarray(getattr(node, part, ()))):
                name = names[path].name.format(layer).removesuffix("weight") + suffix
                tensors[f"base_model.model.{name}"] = array if part == "magnitude" else array.T
    node = next(iter(nodes.values()))
    rank, stabilised = node.a.shape[-1], entry.get("name") == "lora.rslora"
    config = {
        "r": rank,
        "lora_alpha": node.scale * (math.sqrt(rank) if stabilised else rank),
        "use_rslora": stabilised,
        "use_dora": isinstance(node, Dora),
        "target_modules": sorted({names[k].name.removesuffix(".weight").rpartition(".")[2] for k in nodes}),
        "bias": "none",
        "lora_dropout": 0.0,
        "fan_in_fan_out": False,
    }
    return config, tensors


FILES = Files("LORA", _read, _filled, _written)


# -------------------------------------------------------------------------------------------------------------- Adapters


@adapter(adds=("a", "b"), files=FILES)
def lora(
    params: Params, key: jax.Array, *, rank: int = 8, alpha: float = 16.0, targets: str = TARGETS, base: str = ""
) -> Params:
    """LoRA: W + (alpha / rank) A B ("LoRA: Low-Rank Adaptation of Large Language Models").

    A is uniform within 1/sqrt(I), B zero. targets: pattern over the paths of the kernels to adapt. Raises UserError where it
    matches none, or anything but a layer's projection.
    """
    scale = _positive("alpha", alpha) / _rank(rank)
    return _swap(params, targets, lambda path, w: Lora(quantised(w, base), *_factors(path, w, key, rank), scale))


@adapter(adds=("a", "b"), files=FILES)
def rslora(
    params: Params, key: jax.Array, *, rank: int = 8, alpha: float = 16.0, targets: str = TARGETS, base: str = ""
) -> Params:
    """rsLoRA: W + (alpha / sqrt(rank)) A B, whose updates keep their size as the rank grows ("A Rank Stabilization Scaling
    Factor for Fine-Tuning with LoRA"). It differs from `lora` in the scale alone.
    """
    scale = _positive("alpha", alpha) / math.sqrt(_rank(rank))
    return _swap(params, targets, lambda path, w: Lora(quantised(w, base), *_factors(path, w, key, rank), scale))


@adapter(adds=("a", "b", "magnitude"), files=FILES)
def dora(
    params: Params, key: jax.Array, *, rank: int = 8, alpha: float = 16.0, targets: str = TARGETS, base: str = ""
) -> Params:
    """DoRA: magnitude * V / |V|, V = W + (alpha / rank) A B, with a learned magnitude for each output, |W| at first
    ("DoRA: Weight-Decomposed Low-Rank Adaptation"). Each use builds the merged kernel, for the norm.
    """
    scale = _positive("alpha", alpha) / _rank(rank)

    def node(path, w):
        held = quantised(w, base)
        return Dora(held, *_factors(path, w, key, rank), jnp.linalg.norm(dense(held), axis=-2), scale)

    return _swap(params, targets, node)


def _swap(params: Params, targets: str, node: Callable[[str, Any], Any]) -> Params:
    """params with node(path, kernel) for each kernel that the pattern matches."""
    try:
        matches = re.compile(targets).search
    except re.error as e:
        raise UserError(f"config.adapter.targets: {targets!r} is no regular expression: {e}.") from None
    count = 0

    def leaf(path, x):
        nonlocal count
        name = path_name(path)
        if not matches(name):
            return x
        if not re.search(TARGETS, name):
            raise UserError(
                f"config.adapter.targets: {targets!r} matches {name}, which cannot be adapted; what can are "
                "layers/attention/{q,k,v,o}/kernel and, where the layers are no mixtures, layers/mlp/{gate,up,down}/kernel."
            )
        if hasattr(x, "project"):
            raise UserError(
                f"config.adapter: two adapters are around {name}, and a weight takes one; give one of both ranks together, or "
                "`targets` that have no weight in common."
            )
        count += 1
        return node(name, x)

    swapped = jax.tree_util.tree_map_with_path(leaf, params, is_leaf=lambda x: hasattr(x, "project"))
    if not count:
        raise UserError(f"config.adapter.targets: {targets!r} matches no parameter; the default is {TARGETS!r}.")
    return swapped


def _factors(path: str, kernel: jax.Array, key: jax.Array, rank: int) -> tuple[jax.Array, jax.Array]:
    """(a, b) for a kernel [..., I, O]: a uniform within 1/sqrt(I), b zero; float32, as all trained weights."""
    *lead, inputs, outputs = kernel.shape
    key = jax.random.fold_in(key, zlib.crc32(path.encode()))
    bound = 1 / math.sqrt(inputs)
    a = jax.random.uniform(key, (*lead, inputs, rank), jnp.float32, -bound, bound)
    return a, jnp.zeros((*lead, rank, outputs), jnp.float32)


def _rank(rank: int) -> int:
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise UserError(f"config.adapter.rank: {rank!r}; it is a whole number of at least 1.")
    return rank


def _positive(name: str, value: float) -> float:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < math.inf:
        raise UserError(f"config.adapter.{name}: {value!r}; it is a number above 0.")
    return float(value)
