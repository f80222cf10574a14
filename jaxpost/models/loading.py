"""A model as one object: what to compute with, what to compute on, and how text becomes tokens.

`describe` reads everything but the weights, so that a mistake is found before the long part begins. Weights then come from the
same folder, from a fresh start, or from a workdir's checkpoint, in any case straight into their place on the mesh.
"""

import copy
import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath

from jaxpost import checkpoint, sharding, tokenizer
from jaxpost.errors import UserError
from jaxpost.models import families, hf
from jaxpost.models.transformer import REMAT, Transformer
from jaxpost.resolve import find, nearest
from jaxpost.types import Params

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


@dataclasses.dataclass(frozen=True)
class Description:
    """A model without its weights: transformer, tokenizer (None if the folder has none), config.json's fields, the folder or
    None.
    """

    transformer: Transformer
    tokenizer: Any
    config: dict
    folder: Path | None


def describe(model: str | Mapping, tokenizer_name: str = "", dtype: str = "float32", remat: str = "none") -> Description:
    """The model that a recipe's `model` and `tokenizer` name. Raises UserError for what is missing, broken or not supported."""
    if not model:
        raise UserError("config.model: give a folder with config.json and *.safetensors, or the fields of a config.json.")
    for value, known, key in ((dtype, DTYPES, "dtype"), (remat, REMAT, "remat")):
        if value not in known:
            raise UserError(f"config.{key}: unknown {value!r}.{nearest(str(value), known)}")
    folder = Path(model) if isinstance(model, str) else None
    config = hf.read_config(folder) if folder else dict(model)
    arch = families.architecture(config, str(folder / "config.json") if folder else "config.model")
    if tokenizer_name and not Path(tokenizer_name).is_dir():
        text = find(tokenizer_name.removeprefix("tasks."), "tasks")()
    else:
        text = tokenizer.load(tokenizer_name or folder) if tokenizer_name or folder else None
    if text is not None and len(text) > arch.vocab:
        raise UserError(
            f"config.tokenizer: it has {len(text)} tokens, the model's vocabulary {arch.vocab}; they do not belong together."
        )
    return Description(Transformer(arch, DTYPES[dtype], remat), text, config, folder)


def abstract(model: Transformer, mesh) -> Params:
    """The tree of shapes, dtypes and shardings that the model's parameters have on a mesh."""
    shapes = jax.eval_shape(model.init, jax.random.PRNGKey(0))
    places = sharding.stored(mesh, shapes)
    return jax.tree.map(lambda x, p: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=p), shapes, places)


def weights(found: Description, mesh, seed: int = 0) -> Params:
    """The folder's weights, or fresh ones drawn from the seed; float32, in their place on the mesh."""
    shapes = abstract(found.transformer, mesh)
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
    path = epath.Path(where)
    # A workdir has a config.json too, the recipe's, which names no model_type.
    if (path / "config.json").exists() and "model_type" in hf.read_config(path):
        found = describe(str(path), dtype=dtype)
        return found, weights(found, mesh)
    step = checkpoint.find_step(path)
    described = next((p / "model" for p in step.parents if (p / "model" / "config.json").exists()), None)
    if described is None:
        raise UserError(f"{where}: has a checkpoint, but no workdir around it with model/config.json.")
    found = describe(str(described), dtype=dtype)
    return found, checkpoint.load_params(step, abstract(found.transformer, mesh))
