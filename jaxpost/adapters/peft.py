"""Adapters as the `peft` library keeps them: a folder of adapter_config.json and adapter_model.safetensors.

    adapter={"name": "peft", "folder": "FOLDER"}                      trains or runs one
    python -m jaxpost.export --checkpoint=W --out=FOLDER --adapter    writes one

LoRA, rsLoRA and DoRA are supported around the projections of the layers, the same in all layers and of one rank; anything else
is refused by name. A family whose files fuse several projections into one tensor (Phi-3) cannot be written: each of our
projections has its own A, and a fused tensor has a single one. Export it merged.
"""

import json
import math
import re
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax.traverse_util import flatten_dict, unflatten_dict

from jaxpost.adapters.lora import Dora, Lora, dora, lora
from jaxpost.errors import UserError
from jaxpost.models import hf, safetensors_io
from jaxpost.models.families import STEMS, Architecture, tensor_names
from jaxpost.storage import cloud
from jaxpost.types import Params

_PREFIX = "base_model.model."
_PARTS = {"lora_A.weight": "a", "lora_B.weight": "b", "lora_magnitude_vector": "magnitude"}
# _READ: fields that are read here or do not change what an adapter computes. _NEUTRAL: values of other fields that change
# nothing. Any other field must be empty.
_READ = {
    "r", "lora_alpha", "use_rslora", "use_dora", "target_modules", "base_model_name_or_path", "revision", "inference_mode",
    "task_type", "peft_version", "auto_mapping", "lora_dropout", "qalora_group_size", "megatron_core", "ensure_weight_tying",
}  # fmt: skip
_NEUTRAL = {"peft_type": ("LORA",), "bias": ("none",), "init_lora_weights": (True, False, "gaussian", "orthogonal")}


def peft(params: Params, key: jax.Array, *, folder: str, base: str = "") -> Params:
    """The adapter of a `peft` folder with its weights; base: as in adapters/lora.py.

    Raises UserError for a folder without an adapter, for an unsupported kind of adapter or field, for tensors that do not fit
    the model or are not finite, and for missing layers.
    """
    entry, read = recorded(folder=folder, base=base), _tensors(cloud.path(folder))
    function = dora if entry.pop("name") == "lora.dora" else lora

    def filled(path, node):
        if not isinstance(node, (Lora, Dora)):
            return node
        parts = {"a": node.a, "b": node.b} | ({"magnitude": node.magnitude} if isinstance(node, Dora) else {})
        stem = STEMS[path.removeprefix("layers/").removesuffix("/kernel")]
        return node.replace(**{k: _stacked(folder, read, stem, k, x.shape) for k, x in parts.items()})

    swapped = flatten_dict(function(params, key, **entry), sep="/")
    return unflatten_dict({path: filled(path, node) for path, node in swapped.items()}, sep="/")


def recorded(*, folder: str, base: str = "") -> dict:
    """The entry of adapters/lora.py with the shape and the scale of a folder's adapter."""
    config = _config(cloud.path(folder))
    rank = config["r"]
    alpha = float(config["lora_alpha"]) * (math.sqrt(rank) if config.get("use_rslora") else 1.0)
    stems = {v: k for k, v in STEMS.items() if re.fullmatch(r"attention/[qkvo]|mlp/(gate|up|down)", k)}
    names = list(_tensors(cloud.path(folder)))
    adapted = {m[1] for n in names if (m := re.fullmatch(r"model\.layers\.\d+\.(.*)\.lora_A\.weight", n))}
    if unknown := adapted - stems.keys():
        raise UserError(f"{folder}: adapts {min(unknown)}, which is no projection of a layer that jaxpost adapts.")
    if others := [n for n in names if not re.fullmatch(r"model\.layers\.\d+\..*", n)] or (not adapted and ["?"]):
        raise UserError(f"{folder}: {others[0]} is no tensor of a low-rank adapter around a layer's projections.")
    targets = f"layers/({'|'.join(sorted(stems[m] for m in adapted))})/kernel$"
    name = "lora.dora" if config.get("use_dora") else "lora.lora"
    return {"name": name, "rank": rank, "alpha": alpha, "targets": targets, "base": base}


peft.recorded = recorded


def _config(folder: epath.Path) -> dict:
    path = folder / "adapter_config.json"
    if not path.exists():
        raise UserError(f"config.adapter.folder: {folder} has no adapter_config.json; give a folder that peft saved.")
    config = hf.read_object(path)
    for field, value in config.items():
        if field not in _READ and value not in _NEUTRAL.get(field, (None, False, "", [], {})):
            raise UserError(
                f"{path}: {field} = {value!r} is not supported; merge the adapter into its model with peft instead."
            )
    if not isinstance(config.get("r"), int) or not isinstance(config.get("lora_alpha"), (int, float)):
        raise UserError(f"{path}: has no whole number `r` or no number `lora_alpha`; save it from peft again.")
    return config


def _tensors(folder: epath.Path) -> dict[str, np.ndarray]:
    """Tensor name without peft's prefix -> lazy slice."""
    path = folder / "adapter_model.safetensors"
    if not path.exists():
        raise UserError(f"{folder}: has no adapter_model.safetensors. Save it from peft with safe_serialization (the default).")
    return {name.removeprefix(_PREFIX): tensor for name, tensor in safetensors_io.tensors(path).items()}


def _stacked(folder: str, read: Mapping, stem: str, part: str, shape: tuple[int, ...]) -> jax.Array:
    """One part of all layers' adapters around a projection, float32, matrices transposed to [in, out]."""
    suffix = next(k for k, v in _PARTS.items() if v == part)
    names = [f"model.layers.{layer}.{stem}.{suffix}" for layer in range(shape[0])]
    if missing := [n for n in names if n not in read]:
        raise UserError(
            f"{folder}: {missing[0]} is missing; an adapter of some layers only is not supported. One of another base "
            "belongs to that: name it in config.model."
        )
    if f"model.layers.{shape[0]}.{stem}.{suffix}" in read:
        raise UserError(f"{folder}: adapts more than the model's {shape[0]} layers; it belongs to another model.")
    layers = [np.asarray(read[n][:], np.float32) for n in names]
    for name, values in zip(names, layers, strict=True):
        hf.check_finite(values, folder, name)
    layers = [x if part == "magnitude" else x.T for x in layers]
    if layers[0].shape != tuple(shape[1:]):
        raise UserError(
            f"{folder}: {names[0]} is {layers[0].shape} as [in, out], the model wants {tuple(shape[1:])}; the adapter "
            "belongs to another base: name that in config.model."
        )
    return jnp.asarray(np.stack(layers))


def _check_alone(nodes: Mapping, names: Mapping, arch: Architecture, beside) -> None:
    """Raises UserError where an adapter's file could not hold everything that was learned."""
    if not nodes:
        raise UserError("export: there is no adapter in this checkpoint; leave --adapter out.")
    if beside:
        raise UserError(
            f"export: this run learned {', '.join(sorted(beside)[:3])} as well, which is no part of an adapter. Leave "
            "--adapter out: all of it is then in the model."
        )
    if fused := [names[k].name for k in nodes if names[k].rows]:
        raise UserError(
            f"export: {arch.family} keeps several projections in one tensor ({fused[0].format(0)}), around which peft puts one "
            "adapter and this model has several. Leave --adapter out: the adapter is then merged into the model."
        )


def save(
    folder: str | epath.Path, params: Params, arch: Architecture, entry: Mapping, model: str | None, beside=()
) -> list[str]:
    """Writes the adapter of a tree as a `peft` folder; returns the files' names.

    entry: the config's or checkpoint's entry of the adapter; model: the name or folder of its base, None where that is no
    Hugging Face model; beside: other weights that were learned. Raises UserError for anything beside, for a tree without an
    adapter, and for a family with fused projections.
    """
    names = tensor_names(arch)
    nodes = {k: v for k, v in flatten_dict(params, sep="/").items() if isinstance(v, (Lora, Dora))}
    _check_alone(nodes, names, arch, beside)
    tensors = {}
    for path, node in nodes.items():
        for suffix, part in _PARTS.items():
            for layer, array in enumerate(np.asarray(getattr(node, part, ()))):
                name = names[path].name.format(layer).removesuffix("weight") + suffix
                tensors[_PREFIX + name] = np.ascontiguousarray(array if part == "magnitude" else array.T)
    node = next(iter(nodes.values()))
    rank = node.a.shape[-1]
    stabilised = entry.get("name") == "lora.rslora"
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": model,
        "r": rank,
        "lora_alpha": node.scale * (math.sqrt(rank) if stabilised else rank),
        "use_rslora": stabilised,
        "use_dora": isinstance(node, Dora),
        "target_modules": sorted({names[k].name.removesuffix(".weight").rpartition(".")[2] for k in nodes}),
        "bias": "none",
        "lora_dropout": 0.0,
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    folder = cloud.path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
    cloud.save_tensors(tensors, folder / "adapter_model.safetensors")
    return sorted(p.name for p in folder.iterdir())
