"""A model as one object: what to compute with, what to compute on, and how text becomes tokens.

`describe` reads everything but the weights, so that a mistake is found before the long part begins. Weights then come from the
same folder, from a fresh start, or from a workdir's checkpoint, in any case straight into their place on the mesh.
"""

import copy
import dataclasses
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath

from jaxpost import checkpoint, sharding, tokenizer
from jaxpost.errors import UserError
from jaxpost.models import families, hf, hub
from jaxpost.models.transformer import REMAT, Transformer
from jaxpost.resolve import find, nearest
from jaxpost.types import Params

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


@dataclasses.dataclass(frozen=True)
class Description:
    """A model without its weights: transformer, tokenizer (None if the folder has none), config.json's fields, and the folder
    of the weights (of safetensors, or a checkpoint of ours), None for fresh ones.
    """

    transformer: Transformer
    tokenizer: Any
    config: dict
    folder: Path | None
    hub: str = ""  # the name that the folder came by, where its weights may still be on the hub


def describe(model: str | Mapping, tokenizer_name: str = "", dtype: str = "float32", remat: str = "none") -> Description:
    """The model that a recipe's `model` and `tokenizer` name. Raises UserError for what is missing, broken or not supported."""
    if not model:
        raise UserError("config.model: give a folder with config.json and *.safetensors, a workdir, or a config.json's fields.")
    for value, known, key in ((dtype, DTYPES, "dtype"), (remat, REMAT, "remat")):
        if value not in known:
            raise UserError(f"config.{key}: unknown {value!r}.{nearest(str(value), known)}")
    described, folder = _locate(model) if isinstance(model, str) else (None, None)
    config = hf.read_config(described) if described else dict(model)
    if config.get("model_type") == "gemma3" and isinstance(config.get("text_config"), Mapping):
        config = {**config["text_config"], "model_type": "gemma3_text"}  # the part of it that reads and writes
    arch = families.architecture(config, str(described / "config.json") if described else "config.model")
    text = _tokenizer(tokenizer_name or described)
    # A tokenizer may name added tokens that its model has no row for, such as a picture's; text then has none of them.
    if text is not None and text.vocab_size > arch.vocab:
        raise UserError(
            f"config.tokenizer: it has {text.vocab_size} tokens, the model's vocabulary {arch.vocab}; they are not a pair."
        )
    name = model if isinstance(model, str) and hub.is_name(model) else ""
    return Description(Transformer(arch, _computable(dtype), remat), text, config, folder, name)


def _computable(dtype: str):
    """The dtype to compute in: float32 where the device has no bfloat16 of its own (GPUs before compute capability 8)."""
    device = jax.devices()[0]
    capability = getattr(device, "compute_capability", None)
    if dtype == "bfloat16" and device.platform == "gpu" and capability and float(capability) < 8:
        print(f"config.dtype: {device.device_kind} has no bfloat16; computing in float32 instead.", file=sys.stderr)
        return DTYPES["float32"]
    return DTYPES[dtype]


def _locate(where: str) -> tuple[Path, Path]:
    """(folder of config.json and tokenizer, folder of the weights): a Hugging Face folder twice, or a workdir's two."""
    path = hub.fetch(where) if hub.is_name(where) else Path(where)
    if not any((path / name).is_dir() for name in ("checkpoints", "params")) and not (path.is_dir() and checkpoint.steps(path)):
        return path, path
    step = Path(checkpoint.find_step(path))
    described = next((p / "model" for p in step.parents if (p / "model" / "config.json").exists()), None)
    if described is None:
        raise UserError(f"{where}: has a checkpoint, but no workdir around it with model/config.json.")
    return described, step


def _tokenizer(where: str | Path | None):
    """The tokenizer of a folder or of a model on the hub, or one that a function makes."""
    if hub.is_name(str(where)):
        where = hub.fetch(str(where))
    if where is None or Path(where).is_dir():
        return None if where is None else tokenizer.load(where)
    if ".py:" not in (name := str(where)) and ("/" in name or "." not in name):
        raise UserError(f"config.tokenizer: no folder {name}. Give one with a tokenizer.json, or the name of a function.")
    return find(name.removeprefix("tasks."), "tasks")()


def check(found: Description) -> None:
    """Holds a folder's files against the architecture, without reading weights. Raises UserError for what does not belong."""
    if found.hub:
        hub.fetch(found.hub, weights=True)
    if found.folder is not None and not (found.folder / "params").exists():
        hf.check(found.folder, found.transformer.arch)


def abstract(model: Transformer, mesh) -> Params:
    """The tree of shapes, dtypes and shardings that the model's parameters have on a mesh."""
    shapes = jax.eval_shape(model.init, jax.random.PRNGKey(0))
    places = sharding.stored(mesh, shapes)
    return jax.tree.map(lambda x, p: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=p), shapes, places)


def weights(found: Description, mesh, seed: int = 0) -> Params:
    """The folder's weights, or fresh ones drawn from the seed; float32, in their place on the mesh."""
    shapes = abstract(found.transformer, mesh)
    if found.folder is not None and (found.folder / "params").exists():
        return checkpoint.load_params(found.folder, shapes)
    if found.folder is not None:
        return hf.load(found.folder, found.transformer.arch, shapes)
    places = jax.tree.map(lambda x: x.sharding, shapes)
    return jax.jit(found.transformer.init, out_shardings=places)(jax.random.PRNGKey(seed))


def keep_description(found: Description, workdir, template: str) -> None:
    """Writes config.json and the tokenizer under workdir/model, so that a workdir is all that generate and export need.

    template: the Jinja that the run trains with, which the tokenizer carries from here on, whatever it came with.
    """
    folder = epath.Path(workdir) / "model"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(found.config, indent=2) + "\n")
    if found.tokenizer is not None:
        text = copy.deepcopy(found.tokenizer)
        text.chat_template = template
        tokenizer.save(text, folder)


def open_model(where: str, mesh, dtype: str = "float32") -> tuple[Description, Params]:
    """Description and weights of a Hugging Face folder, a workdir, or one checkpoint in a workdir (its newest, where it has
    several).

    Raises UserError if `where` is none of them.
    """
    found = describe(where, dtype=dtype)
    check(found)
    return found, weights(found, mesh)
