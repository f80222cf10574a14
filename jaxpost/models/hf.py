"""Hugging Face folders in and out: config.json and safetensors (sharded or not), never pickle.

Reading: every parameter is asked for by its shards. A device's slice of a stacked, transposed parameter is read from the file
as the same slice of each layer's tensor, so that the host never holds more than one device's piece beyond what it owns.
"""

import json
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from jaxpost import sharding
from jaxpost.errors import UserError
from jaxpost.models.families import Architecture, tensor_names
from jaxpost.types import Params

SHARD_BYTES = 5 * 2**30
_DTYPES = ("F64", "F32", "F16", "BF16")
_UNUSED = (".rotary_emb.inv_freq",)  # a constant that old exports stored


def read_config(folder: str | Path) -> dict:
    """The fields of folder/config.json. Raises UserError if there is none or it is broken."""
    path = Path(folder) / "config.json"
    if not Path(folder).is_dir():
        raise UserError(f"{folder}: no such folder. Give one with config.json and *.safetensors, or a workdir.")
    if not path.exists():
        raise UserError(f"{path}: no such file. A model folder holds config.json and *.safetensors.")
    return _object(path)


def _object(path: Path) -> dict:
    """A file's JSON object."""
    try:
        found = json.loads(path.read_text())
    except json.JSONDecodeError as e:
        raise UserError(f"{path}: not valid JSON, line {e.lineno} column {e.colno}: {e.msg}.") from None
    except UnicodeDecodeError as e:
        raise UserError(f"{path}: not a text file (byte {e.start}).") from None
    if not isinstance(found, dict):
        raise UserError(f"{path}: holds a JSON {type(found).__name__}, not an object.")
    return found


def _files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if index.exists():
        where = _object(index).get("weight_map")
        if not isinstance(where, dict) or not where:
            raise UserError(f"{index}: has no weight_map. Download the folder again.")
        files = sorted({folder / f for f in where.values()})
        if missing := [f.name for f in files if not f.exists()]:
            raise UserError(f"{index}: lists files that are not there: {', '.join(missing)}. Download the folder again.")
        return files
    if (folder / "model.safetensors").exists():
        return [folder / "model.safetensors"]
    pickles = [p.name for p in (*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth"))]
    hint = f" It has {pickles[0]}, a pickle, which is never read: convert it to safetensors first." if pickles else ""
    raise UserError(f"{folder}: no model.safetensors and no model.safetensors.index.json.{hint}")


def _open(folder: Path) -> dict[str, Any]:
    """Tensor name -> lazy slice, over all files. Raises UserError for a file that is cut off or broken."""
    slices = {}
    for path in _files(folder):
        try:
            file = safe_open(path, framework="np")
        except SafetensorError as e:
            raise UserError(f"{path}: not a whole safetensors file ({e}). Copy or download it again.") from None
        slices |= {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    return slices


def load(folder: str | Path, arch: Architecture, abstract: Params, dtype=np.float32) -> Params:
    """Parameters from a folder's safetensors.

    abstract: the tree of ShapeDtypeStruct (shapes, and shardings where wanted) that `Transformer.init` would give. dtype: what
    the parameters become (float32 masters; the files' own bfloat16 widens exactly). Raises UserError for missing, left-over or
    wrongly shaped tensors.
    """
    folder = Path(folder)
    slices, names = check(folder, arch), tensor_names(arch)
    flat = flatten_dict(abstract, sep="/")
    return unflatten_dict({path: _read(folder, slices, names[path], leaf, dtype) for path, leaf in flat.items()}, sep="/")


def check(folder: str | Path, arch: Architecture) -> dict[str, Any]:
    """Tensor name -> lazy slice of a folder's weights, of which only the headers are read.

    Raises UserError for files that are missing or cut off, and for tensors that are missing or that the architecture lacks.
    """
    folder = Path(folder)
    slices, names = _open(folder), tensor_names(arch)
    expected = {n.format(i) for n, _ in names.values() for i in range(arch.layers if "{}" in n else 1)}
    if missing := sorted(expected - set(slices)):
        raise UserError(
            f"{folder}: {len(missing)} tensors are missing, first {missing[0]}; the config does not fit the weights."
        )
    left = {n for n in set(slices) - expected if not n.endswith(_UNUSED)} - ({"lm_head.weight"} if arch.tied else set())
    if left:
        raise UserError(
            f"{folder}: {len(left)} tensors are not understood, first {min(left)}; the config does not fit the weights."
        )
    if arch.tied and "lm_head.weight" in slices:
        _check_tied(folder, slices)
    return slices


def _check_tied(folder: Path, slices: dict) -> None:
    """Some exports store a tied head as well; it must then be the embedding, or one of the two would be dropped unseen."""
    embed, head = slices["model.embed_tokens.weight"], slices["lm_head.weight"]
    same = embed.get_shape() == head.get_shape()
    for row in range(0, embed.get_shape()[0], 4096):
        rows = slice(row, min(row + 4096, embed.get_shape()[0]))
        same = same and np.array_equal(embed[rows], head[rows])
    if not same:
        raise UserError(
            f"{folder}: lm_head.weight differs from the embedding, but config.json says tie_word_embeddings; set it to false."
        )


def _read(folder: Path, slices: dict, name: tuple[str, bool], leaf, dtype) -> jax.Array:
    """One parameter, each device's piece read by itself; per-layer tensors are stacked, kernels transposed to [in, out]."""
    template, transposed = name
    stacked = "{}" in template
    want = tuple(leaf.shape[1:] if stacked else leaf.shape)
    want = want[::-1] if transposed else want
    for i in range(leaf.shape[0] if stacked else 1):
        if tuple(got := slices[template.format(i)].get_shape()) != want:
            raise UserError(f"{folder}: {template.format(i)} has shape {tuple(got)}, the config says {want}.")
        if (held := slices[template.format(i)].get_dtype()) not in _DTYPES:
            raise UserError(
                f"{folder}: {template.format(i)} holds {held}, not one of {', '.join(_DTYPES)}; quantised weights are not read."
            )

    def piece(index):
        inner = tuple(index[1:] if stacked else index)
        inner = inner[::-1] if transposed else inner
        layers = range(leaf.shape[0])[index[0]] if stacked else [0]
        parts = []
        for i in layers:
            part = np.asarray(slices[template.format(i)][inner])
            parts.append((part.T if transposed else part).astype(dtype))
        return np.stack(parts) if stacked else parts[0]

    place = getattr(leaf, "sharding", None) or sharding.single()
    return jax.make_array_from_callback(leaf.shape, place, piece)


def save(folder: str | Path, params: Params, arch: Architecture, config: dict, dtype: str | None = None) -> list[str]:
    """Writes config.json and safetensors that `transformers` opens; returns the files' names.

    dtype: "float32", "bfloat16" or "float16"; None keeps what the config names, else float32. Files are cut at 5 GiB with an
    index.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    dtype = dtype or config.get("dtype") or config.get("torch_dtype") or "float32"
    kind = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}.get(dtype)
    if kind is None:
        raise UserError(f"export: dtype {dtype!r} is not one of float32, bfloat16, float16.")
    config = {k: v for k, v in config.items() if k not in ("dtype", "torch_dtype")} | {"dtype": dtype}
    config["architectures"] = config.get("architectures") or ["LlamaForCausalLM"]
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    return _write_shards(folder, _tensors(params, arch, kind))


def _tensors(params: Params, arch: Architecture, kind):
    """Yields (Hugging Face name, array), a layer at a time, so that one copy of one tensor is made."""
    flat = flatten_dict(params, sep="/")
    for path, (template, transposed) in tensor_names(arch).items():
        for i in range(arch.layers if "{}" in template else 1):
            leaf = flat[path][i] if "{}" in template else flat[path]
            leaf = np.asarray(jax.device_get(leaf))
            if kind is np.float16 and np.max(np.abs(leaf), initial=0) > np.finfo(kind).max:
                raise UserError(f"export: {template.format(i)} has values beyond float16's; use bfloat16 or float32.")
            leaf = leaf.astype(kind)
            yield template.format(i), np.ascontiguousarray(leaf.T if transposed else leaf)


def _write_shards(folder: Path, tensors) -> list[str]:
    groups, size = [{}], 0
    temporary = []

    def flush():
        temporary.append((folder / f"part-{len(temporary)}.safetensors", list(groups[-1])))
        save_file(groups[-1], temporary[-1][0], metadata={"format": "pt"})

    total = 0
    for name, array in tensors:
        if groups[-1] and size + array.nbytes > SHARD_BYTES:
            flush()
            groups, size = [{}], 0
        groups[-1][name] = array
        size += array.nbytes
        total += array.nbytes
    flush()
    count = len(temporary)
    names = ["model.safetensors"] if count == 1 else [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
    for (path, _), name in zip(temporary, names, strict=True):
        path.rename(folder / name)
    if count > 1:
        where = {tensor: name for (_, held), name in zip(temporary, names, strict=True) for tensor in held}
        index = {"metadata": {"total_size": total}, "weight_map": where}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    return names
