"""Hugging Face folders in and out: config.json and safetensors (sharded or not), never pickle.

Parameters are read shard by shard. A device's slice of a stacked, transposed parameter is read from the file as the same slice
of each layer's tensor, so the host never holds more than one device's piece at a time.
"""

import functools
import itertools
import json
import math
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import PurePosixPath
from typing import Any

import jax
import ml_dtypes
import numpy as np
from etils import epath
from flax.traverse_util import flatten_dict, unflatten_dict

from jaxpost import sharding
from jaxpost.errors import UserError
from jaxpost.models import encoder_families, safetensors_io
from jaxpost.models.encoder_families import EncoderArchitecture
from jaxpost.models.families import Architecture, Tensor, tensor_names
from jaxpost.models.layout import in_files, places
from jaxpost.storage import cloud
from jaxpost.storage.host import check_regular, read_object
from jaxpost.types import Params

SHARD_BYTES = 5 * 2**30
_STACKED = re.compile(r"model\.layers\.(\d+)\.mlp\.experts\.(gate_up|down)_proj")
_ROUTER = re.compile(r"model\.layers\.(\d+)\.mlp\.gate\.weight")
_UNUSED = (".rotary_emb.inv_freq",)  # a constant that old exports stored
_NORMS = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}  # as BERT's first files have them
# In a multimodal model the language model has other names; the rest is not read.
_LANGUAGE = {"language_model.model.": "model.", "model.language_model.": "model.", "language_model.lm_head.": "lm_head."}
_VISION = ("vision_tower.", "multi_modal_projector.", "model.vision_tower.", "model.multi_modal_projector.")
# Families whose rope_scaling may only have these fields in transformers 4.57.
_SCALING = dict.fromkeys(("olmo2", "olmoe"), ("type", "factor")) | {"phi3": ("type", "short_factor", "long_factor")}
_CLASSES = {"qwen3_moe": "Qwen3Moe", "gemma3_text": "Gemma3", "smollm3": "SmolLM3", "modernbert": "ModernBert"}


def read_config(folder: str | epath.Path) -> dict:
    """The fields of folder/config.json. Raises UserError if there is none or it is broken."""
    path = cloud.path(folder) / "config.json"
    if not path.parent.is_dir():
        raise UserError(f"{folder}: no such folder. Give one with config.json and *.safetensors, or a workdir.")
    if not path.exists():
        raise UserError(f"{path}: no such file. A model folder holds config.json and *.safetensors.")
    return read_object(path)


def read_generation(
    folder: epath.Path | None, config: dict, vocab: int, own_tokenizer: bool = True
) -> tuple[dict, tuple[int, ...], tuple[int, ...]]:
    """(the fields of a folder's generation_config.json, the ids that end a completion, its suppress_tokens, which no completion
    has). Without that file, the ids that end one are config.json's eos_token_id, as in transformers.

    own_tokenizer: whether the model's own tokenizer is used; for another one ids mean nothing and are left out. vocab: ids from
    there on cannot be sampled and are left out. Raises UserError for ids that are not whole numbers.
    """
    written = folder is not None and (path := folder / "generation_config.json").exists()
    fields = read_object(path) if written else {"eos_token_id": config.get("eos_token_id")}
    foreign = () if own_tokenizer else ("_token_id", "suppress_tokens")
    fields = {k: v for k, v in fields.items() if v is not None and not k.endswith(foreign)}
    each = []
    for key in ("eos_token_id", "suppress_tokens"):
        ids = ids if isinstance(ids := fields.get(key, []), list) else [ids]
        if wrong := [x for x in ids if type(x) is not int]:
            place = path if written else "config.model" if folder is None else folder / "config.json"
            raise UserError(f"{place}: {key} has {wrong[0]!r}, not a whole number; give an id, or a list of ids.")
        each.append(tuple(x for x in ids if 0 <= x < vocab))
    return fields, *each


def listed(folder: epath.Path) -> list[str]:
    """The names of the files that hold a folder's weights, which may be missing: model.safetensors, or the index's files where
    there is no model.safetensors. This is transformers' order.
    """
    index = folder / "model.safetensors.index.json"
    if not index.exists() or (folder / "model.safetensors").exists():
        return ["model.safetensors"]
    where = read_object(index).get("weight_map")
    if not isinstance(where, dict) or not where:
        raise UserError(f"{index}: has no weight_map. Download the folder again.")
    if others := [f for f in where.values() if not (isinstance(f, str) and f.endswith(".safetensors"))]:
        raise UserError(f"{index}: lists {others[0]}, which is no safetensors file. Convert the weights to safetensors first.")
    if outside := [f for f in where.values() if PurePosixPath(f).is_absolute() or ".." in PurePosixPath(f).parts]:
        raise UserError(f"{index}: lists {outside[0]}, which is outside of the folder. Download the folder again.")
    return sorted(set(where.values()))


def files(folder: epath.Path) -> list[epath.Path]:
    """The files that hold a folder's weights. Raises UserError where one is missing."""
    paths = [folder / name for name in listed(folder)]
    missing = [path.name for path in paths if not path.exists()]
    if not missing:
        for file in paths:
            check_regular(file)
            if not cloud.is_remote(file) and file.is_dir():
                raise UserError(f"{file}: a folder, not a file. Download it again.")
        _name_unread(folder)
        return paths
    if (index := folder / "model.safetensors.index.json").exists():
        raise UserError(f"{index}: lists files that are not there: {', '.join(missing)}. Download the folder again.")
    pickles = [p.name for p in (*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth"))]
    hint = f" It has {pickles[0]}, a pickle, which is never read: convert it to safetensors first." if pickles else ""
    raise UserError(f"{folder}: no model.safetensors and no model.safetensors.index.json.{hint}")


@functools.lru_cache(maxsize=8)  # once for each folder
def _name_unread(folder: epath.Path) -> None:
    if all((folder / name).exists() for name in ("model.safetensors", "model.safetensors.index.json")):
        line = "model.safetensors is read, as transformers does; the files that model.safetensors.index.json lists are not."
        print(f"{folder}: {line} Delete what is out of date.", file=sys.stderr)


def _open(folder: epath.Path) -> dict[str, Any]:
    """Tensor name -> lazy slice, over all files. Raises UserError for a file that is cut off or broken."""
    slices = {}
    for path in files(folder):
        slices |= safetensors_io.tensors(path)
    if any(name.startswith(_VISION) for name in slices):
        slices = {_language(name): x for name, x in slices.items() if not name.startswith(_VISION)}
    return {re.sub(r"LayerNorm\.(gamma|beta)$", lambda m: _NORMS[m[0]], name): x for name, x in slices.items()}


def _language(name: str) -> str:
    prefix = next((p for p in _LANGUAGE if name.startswith(p)), None)
    return name if prefix is None else _LANGUAGE[prefix] + name.removeprefix(prefix)


def _apart(slices: dict, arch: Architecture, names: dict[str, Tensor]) -> dict[str, Any]:
    """Slices with one entry for each expert's tensor and the router, by their names on the hub. Files of transformers 5 stack a
    layer's experts in gate_up_proj [E, 2F, D] and down_proj [E, D, F]; other files come back as they are.
    """
    if not arch.experts or not any(_STACKED.fullmatch(name) for name in slices):
        return slices
    hub = {part: names[f"layers/mlp/{part}/kernel"].name for part in ("router", "experts/gate", "experts/up", "experts/down")}
    apart = {}
    for name, whole in slices.items():
        stacked, router, shape = _STACKED.fullmatch(name), _ROUTER.fullmatch(name), whole.get_shape()
        if router:
            apart[hub["router"].format(router[1])] = whole
        elif stacked and len(shape) == 3 and shape[0] == arch.experts:
            parts = ("experts/gate", "experts/up") if stacked[2] == "gate_up" else ("experts/down",)
            rows = shape[1] // len(parts)
            for (number, part), expert in itertools.product(enumerate(parts), range(arch.experts)):
                apart[hub[part].format(stacked[1], expert)] = safetensors_io.Row(
                    whole, expert, number * rows, (number + 1) * rows
                )
        else:
            apart[name] = whole
    return apart


def load(
    folder: str | epath.Path,
    arch: Architecture,
    abstract: Params,
    dtype=np.float32,
    then: Callable[[str, jax.Array], Any] = lambda path, array: array,
) -> Params:
    """Parameters from a folder's safetensors.

    abstract: the tree of ShapeDtypeStruct (with shardings, if any) that `Transformer.init` would give. dtype: the parameters'
    dtype (float32 masters; the files' bfloat16 widens exactly). then(path, array): maps each parameter to the leaf that is
    kept, before the next one is read. Raises UserError for missing, left-over or wrongly shaped tensors.
    """
    folder = cloud.path(folder)
    slices, names = check(folder, arch), tensor_names(arch)
    flat = flatten_dict(abstract, sep="/")
    return unflatten_dict({p: then(p, _read(folder, slices, names[p], leaf, dtype)) for p, leaf in flat.items()}, sep="/")


def check(folder: str | epath.Path, arch: Architecture) -> dict[str, Any]:
    """Tensor name -> lazy slice of a folder's weights. Only the files' headers are read.

    Raises UserError for files that are missing or cut off, and for tensors that are missing or that the architecture lacks.
    """
    folder = cloud.path(folder)
    names = tensor_names(arch)
    slices = _apart(_open(folder), arch, names)
    if (described := arch.parameters()) > 8 * (held := sum(math.prod(x.get_shape()) for x in slices.values())):
        raise UserError(
            f"{folder}: config.json describes {described:,} parameters ({sizes(arch)}), and its files hold {held:,}; the "
            "config does not fit the weights."
        )
    expected = {n for t in names.values() for n in _each(t, (arch.layers - t.first, arch.experts))}
    if missing := sorted(expected - set(slices)):
        raise UserError(
            f"{folder}: {len(missing)} tensors are missing, first {missing[0]}; the config does not fit the weights."
        )
    copies, encoder = (
        {"lm_head.weight": "model.embed_tokens.weight"} if arch.tied else {},
        isinstance(arch, EncoderArchitecture),
    )
    if encoder:
        copies = arch.copies()
    left = {n for n in set(slices) - expected if not n.endswith(_UNUSED)} - copies.keys()
    if left := {n for n in left if not (encoder and arch.leaves_out(n))}:
        raise UserError(
            f"{folder}: {len(left)} tensors are not understood, first {min(left)}; the config does not fit the weights."
        )
    for copy, first in copies.items():
        if copy in slices:
            _check_tied(folder, slices, copy, first)
    return slices


def sizes(arch: Architecture) -> str:
    """The fields of config.json that decide how large a model is, with their values."""
    names = {"num_hidden_layers": arch.layers, "hidden_size": arch.width, "intermediate_size": arch.mlp_width}
    names |= {"vocab_size": arch.vocab, "num_attention_heads": arch.heads, "head_dim": arch.head_width}
    return ", ".join(f"{k} = {v:,}" for k, v in names.items()) + (f", {arch.experts:,} experts" if arch.experts else "")


def _check_tied(folder: epath.Path, slices: dict, copy: str, first: str) -> None:
    """Raises UserError where a stored head of a tied model differs from the embedding: one of the two would be lost."""
    embed, head = slices[first], slices[copy]
    same = embed.get_shape() == head.get_shape()
    for row in range(0, embed.get_shape()[0], 4096):
        rows = slice(row, min(row + 4096, embed.get_shape()[0]))
        same = same and np.array_equal(embed[rows], head[rows])
    if not same:
        raise UserError(
            f"{folder}: {copy} differs from the embedding, but config.json says tie_word_embeddings; set it to false."
        )


def _each(tensor: Tensor, counts: tuple[int, ...]) -> list[str]:
    """The names of all tensors that make up a parameter, in the order of our leading axes (layers, experts)."""
    lead = tensor.name.count("{}")
    return [_at(tensor, index) for index in itertools.product(*map(range, counts[:lead]))]


def _at(tensor: Tensor, index: tuple[int, ...]) -> str:
    """The name of the tensor at an index of our leading axes."""
    return tensor.name.format(*(i + tensor.first * (axis == 0) for axis, i in enumerate(index)))


def _read(folder: epath.Path, slices: dict, tensor: Tensor, leaf, dtype) -> jax.Array:
    """One parameter, each device's piece read by itself; per-layer tensors are stacked, kernels transposed to [in, out]."""
    lead = tensor.name.count("{}")
    want = tuple(leaf.shape[lead:])
    want = want[::-1] if tensor.transposed else want
    start, _, total = tensor.rows or (0, 0, want[0])
    for name in _each(tensor, leaf.shape):
        if tuple(got := slices[name].get_shape()) != (total, *want[1:]):
            raise UserError(f"{folder}: {name} has shape {tuple(got)}, the config says {(total, *want[1:])}.")
        dtype_of(folder, name, slices[name])

    def piece(index):
        inner = tuple(index[lead:])
        inner = inner[::-1] if tensor.transposed else inner
        rows = range(start, start + want[0])[inner[0]]
        inner = (slice(rows.start, rows.stop), *inner[1:])
        outer = [range(n)[i] for n, i in zip(leaf.shape[:lead], index[:lead], strict=True)]
        out = _aligned(tuple(len(range(n)[i]) for n, i in zip(leaf.shape, index, strict=True)), dtype)
        for number, place in enumerate(itertools.product(*outer)):
            part = slices[_at(tensor, place)][inner]
            out.reshape(-1, *out.shape[lead:])[number] = part.T if tensor.transposed else part
            check_finite(out.reshape(-1, *out.shape[lead:])[number], folder, _at(tensor, place))
        return out

    # One device's piece at a time, so the host holds no more than that.
    place = getattr(leaf, "sharding", None) or sharding.single()
    return sharding.assembled(leaf.shape, place, piece)


def dtype_of(folder: epath.Path, name: str, tensor) -> np.dtype:
    """The number format of a tensor in a file. Raises UserError for one that is quantised."""
    if (held := tensor.get_dtype()) not in safetensors_io.DTYPES:
        formats = ", ".join(safetensors_io.DTYPES)
        raise UserError(f"{folder}: {name} holds {held}, not one of {formats}; quantised weights are not read.")
    return np.dtype(safetensors_io.DTYPES[held])


def check_finite(values: np.ndarray, where, name: str) -> None:
    """Raises UserError for a weight with NaN or infinity in it: every output would be NaN."""
    with np.errstate(over="ignore", invalid="ignore"):  # a sum of finite numbers may overflow
        if np.isfinite(values.sum()) or np.isfinite(values).all():
            return
    raise UserError(
        f"{where}: {name} has {np.size(values) - np.isfinite(values).sum():,} values that are NaN or infinite. Its training "
        "diverged or the file is damaged; take an earlier checkpoint, or download it again."
    )


def _aligned(shape: tuple[int, ...], dtype) -> np.ndarray:
    """An empty array, aligned so that a CPU device can take it over without a copy."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    room = np.empty(size + 64, np.uint8)
    first = -room.ctypes.data % 64
    return room[first : first + size].view(dtype).reshape(shape)


def save(folder: str | epath.Path, params: Params, arch: Architecture, config: dict, dtype: str | None = None) -> list[str]:
    """Writes config.json and safetensors that `transformers` opens; returns the files' names.

    dtype: "float32", "bfloat16" or "float16"; None keeps the config's, else float32. Files above 5 GiB are split, with an
    index.
    """
    folder, kind = cloud.path(folder), format_of(config, dtype)
    save_config(folder, arch, config, dtype)
    where = places(arch)
    about = {name: (kind, shape) for name, (shape, _) in where.items()}
    return write_shards(folder, about, (_in_format(name, array, kind) for name, array in in_files(params, where)))


def save_config(folder: epath.Path, arch: Architecture, config: dict, dtype: str | None = None) -> None:
    """Writes config.json for weights of this dtype, as `save` takes it."""
    folder.mkdir(parents=True, exist_ok=True)
    dtype = np.dtype(format_of(config, dtype)).name
    config = portable({k: v for k, v in config.items() if k not in ("dtype", "torch_dtype")} | {"dtype": dtype})
    task = "MaskedLM" if arch.family in encoder_families.FAMILIES else "CausalLM"
    config["architectures"] = config.get("architectures") or [f"{_CLASSES.get(arch.family, arch.family.capitalize())}For{task}"]
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def format_of(config: dict, dtype: str | None = None) -> Any:
    """numpy's type of a dtype's name; None is the config's, else float32. Raises UserError for one that is not written."""
    dtype = dtype or config.get("dtype") or config.get("torch_dtype") or "float32"
    kind = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}.get(dtype)
    if kind is None:
        raise UserError(f"export: dtype {dtype!r} is not one of float32, bfloat16, float16.")
    return kind


def portable(config: dict) -> dict:
    """A config's fields in the spelling of transformers 4.57, which 5 reads too.

    4.57 has separate fields for the rotary base and its scaling, where 5 writes rope_parameters, and a single name for the
    number of experts.
    """
    config, family = dict(config), config.get("model_type")
    if family == "modernbert":
        return encoder_families.portable(config)
    nested = config.pop("rope_parameters", None) or {}
    if local := nested.get("sliding_attention"):
        config.setdefault("rope_local_base_freq", local.get("rope_theta", 10000.0))
    rope = dict(nested.get("full_attention") or (nested if local is None else {}))
    for name in ("rope_theta", "partial_rotary_factor"):
        if name in rope:
            config[name] = rope.pop(name)
    if rope.get("rope_type", "default") != "default":
        config["rope_scaling"] = rope
    if (scaling := config.get("rope_scaling")) and (held := _SCALING.get(family)):
        scaling = {"type": scaling.get("rope_type"), **scaling}
        config["rope_scaling"] = {k: scaling[k] for k in held if k in scaling}
    name, other = ("num_local_experts", "num_experts") if family == "mixtral" else ("num_experts", "num_local_experts")
    if config.get(other) is not None:
        config[name] = config.pop(other)
    return config


def _in_format(name: str, array: np.ndarray, kind) -> np.ndarray:
    if kind is np.float16 and np.max(np.abs(array), initial=0) > np.finfo(kind).max:
        raise UserError(f"export: {name} has values beyond float16's; use bfloat16 or float32.")
    return array.astype(kind)


def write_shards(
    folder: epath.Path, about: Mapping[str, tuple[Any, tuple[int, ...]]], arrays: Iterable[np.ndarray]
) -> list[str]:
    """Writes the tensors {name: (dtype, shape)}, whose arrays come in that order and are written one by one; returns the files'
    names. Files above 5 GiB are split, with an index.
    """
    groups, size, total = [{}], 0, 0
    for name, (dtype, shape) in about.items():
        length = math.prod(shape) * np.dtype(dtype).itemsize
        if groups[-1] and size + length > SHARD_BYTES:
            groups, size = [*groups, {}], 0
        groups[-1][name] = (dtype, shape)
        size, total = size + length, total + length
    count, arrays = len(groups), iter(arrays)
    names = ["model.safetensors"] if count == 1 else [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
    for name, group in zip(names, groups, strict=True):
        safetensors_io.write(folder / name, group, itertools.islice(arrays, len(group)))
    if count > 1:
        where = {tensor: name for name, group in zip(names, groups, strict=True) for tensor in group}
        index = {"metadata": {"total_size": total}, "weight_map": where}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    return names
