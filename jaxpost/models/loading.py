"""A model as one object: its transformer, its tokenizer and its weights.

`describe` reads everything but the weights, so that mistakes show before the slow part begins. Weights then come from the same
folder, from a random initialisation, or from a workdir's checkpoint, straight into their place on the mesh.

Adapters are part of the description (adapted.py). Each weight that one adapts is replaced as it is read, one at a time. A
checkpoint of ours names its adapters. Where its frozen weights are elsewhere, it also names their folder and digest, and the
tree is made from both.
"""

import dataclasses
import functools
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath
from flax.traverse_util import flatten_dict, unflatten_dict

from jaxpost import sharding, tokenizer
from jaxpost.config.resolve import check_origin, find, resolve, trust
from jaxpost.errors import UserError
from jaxpost.models import (
    adapted,
    checks,
    computing,
    encoder,
    encoder_families,
    families,
    hf,
    hub,
    own_leaves,
    prefix,
    protocol,
    routes,
)
from jaxpost.storage import checkpoint, cloud, digests, fingerprint
from jaxpost.types import Params


@dataclasses.dataclass(frozen=True)
class ModelSpec:
    """A model without its weights: the transformer (or what a function made in its place), tokenizer (None if there is none),
    config.json's fields or the function's entry, and the folder of the weights (safetensors, or a checkpoint of ours), None for
    fresh ones.
    """

    transformer: protocol.Model
    tokenizer: Any
    config: dict
    folder: epath.Path | None
    hub: str = ""  # the model's name on the hub, where its weights may not be downloaded yet
    adapter: dict | list = dataclasses.field(default_factory=dict)  # config's, or a checkpoint's (adapted.as_one)
    leaves: dict = dataclasses.field(default_factory=dict)  # leaves beside the model's own: path -> (letters, first value)
    generation: dict = dataclasses.field(default_factory=dict)  # generation_config.json's fields
    ends: tuple[int, ...] = ()  # the ids that end a completion, from the model's own files
    suppressed: tuple[int, ...] = ()  # the ids that no completion has, from there too


def describe(
    model: str | Mapping,
    tokenizer_name: str = "",
    dtype: str = "float32",
    remat: str = "none",
    adapter: adapted.Adapter = None,
    *,
    attention: str = "auto",
    attend: str = "",
    device: Any = None,
    text: bool = True,
) -> ModelSpec:
    """The model that a recipe's `model`, `tokenizer` and `adapter` name.

    attention: the kernel over whole rows, "auto" for the platform's fast one. attend: what a token sees, "" for what the config
    says. device: a device that will compute, if not this process's; text: False leaves the tokenizer out.
    Raises UserError for files that are missing or broken and for settings that are not supported.
    """
    if not model:
        raise UserError("config.model: give a folder with config.json and *.safetensors, a workdir, or a config.json's fields.")
    computing.check(dtype, remat, attend)
    adapted.trusted(adapter)
    described, folder = _locate(model) if isinstance(model, str) else (None, None)
    attend = attend or carried(folder, "attend") or ""
    config = hf.read_config(described) if described else dict(model)
    if is_entry(config):
        settings = {"dtype": dtype, "remat": remat, "attention": attention}
        return _of_function(config, described, folder, tokenizer_name, settings, adapter, attend, text=text)
    config, place = families.language_part(config), str(described / "config.json") if described else "config.model"
    arch = encoder_families.architecture(config, place)
    if attend and attend != arch.attend:
        config |= {"attend": attend, "is_causal": attend != "whole"}
        arch = encoder_families.architecture(config, "config.attend")
    words = _tokenizer(tokenizer_name or described) if text else None
    # A tokenizer may name added tokens that its model has no row for, such as an image's; text does not contain them.
    if words is not None and words.vocab_size > arch.vocab:
        raise UserError(
            f"config.tokenizer: it has {words.vocab_size} tokens, the model's vocabulary {arch.vocab}; they are not a pair."
        )
    name = model if isinstance(model, str) and hub.is_name(model) else ""
    device = device or jax.devices()[0]
    transformer = encoder.model(arch, computing.number_format(dtype, device), remat, computing.kernel(attention, device))
    generation, *ids = hf.read_generation(described, config, arch.vocab, own_tokenizer=not tokenizer_name)
    spec = ModelSpec(transformer, words, config, folder, name, generation=generation, ends=ids[0], suppressed=ids[1])
    spec = dataclasses.replace(spec, adapter=adapted.chosen(adapter, carried(folder)), leaves=carried(folder, "leaves"))
    if text and words is None:
        adapted.check_text(adapter)
    return spec


def is_entry(config: Mapping) -> bool:
    """Whether a model's config is the entry of a function that makes it, and no config.json's fields."""
    return "name" in config and "model_type" not in config


def _of_function(
    entry: dict, described, folder, words: str, settings: dict, adapter: Any, attend: str, *, text: bool
) -> ModelSpec:
    """The model that a function makes, of its keywords and those of a recipe's `settings` that it has keywords for."""
    for function in protocol.functions(entry):
        if described:
            check_origin(function, "models", described / "config.json")
        trust(function)
    if attend:
        raise UserError(f"config.attend: {attend!r}; a model that a function makes decides itself what its tokens see.")
    own = computing.keywords(entry["name"], find(entry["name"], "models"), settings)
    model = resolve({**own, **entry}, "models")()
    protocol.check(model, f"config.model: {entry['name']}:")
    words = _tokenizer(words or described or getattr(model, "tokenizer", None)) if text else None
    spec = ModelSpec(model, words, dict(entry), folder)
    return dataclasses.replace(spec, adapter=adapted.chosen(adapter, carried(folder)), leaves=carried(folder, "leaves"))


def _locate(where: str) -> tuple[epath.Path, epath.Path]:
    """(folder of config.json and tokenizer, folder of the weights): the same for Hugging Face, two in a workdir."""
    path = epath.Path(hub.fetch(where)) if hub.is_name(where) else cloud.path(where)
    held = any((path / name).exists() for name in ("checkpoints", "params", digests.NAME))
    if not held and not (path.is_dir() and checkpoint.steps(path)):
        return path, path
    step = checkpoint.find_step(path)
    described = next((p / "model" for p in step.parents if (p / "model" / "config.json").exists()), None)
    if described is None:
        raise UserError(f"{where}: has a checkpoint, but no workdir around it with model/config.json.")
    return described, step


def _tokenizer(where: str | epath.Path | None):
    """The tokenizer of a folder, a workdir or a model on the hub, or the one that a function returns."""
    if hub.is_name(str(where)):
        where = hub.fetch(str(where))
    if where is None or cloud.path(where).is_dir():
        described = None if where is None else cloud.path(where) / "model"
        return described and tokenizer.load(described if (described / "config.json").exists() else described.parent)
    if ".py:" not in (name := str(where)) and ("/" in name or "." not in name):
        raise UserError(f"config.tokenizer: no folder {name}. Give one with a tokenizer.json, or the name of a function.")
    return find(name.removeprefix("tasks."), "tasks")()


def check(spec: ModelSpec) -> None:
    """Compares a folder's files with the architecture, without reading weights. Raises UserError where they do not fit."""
    if spec.hub:
        hub.fetch(spec.hub, weights=True)
    if spec.folder is not None and not (spec.folder / "params").exists():
        hf.check(spec.folder, spec.transformer.arch)
    if spec.folder is None:
        checks.check_memory(spec.transformer)
    adapted.check(spec)
    for name in others(spec).values():
        check(_other(name))


def others(spec: ModelSpec) -> dict[str, str]:
    """{path: model} of the leaves that are another model's head."""
    return {path: first for path, (_, first) in spec.leaves.items() if isinstance(first, str)}


def abstract(model: protocol.Model, mesh, adapter: adapted.Adapter = None, leaves: Mapping | None = None) -> Params:
    """The tree of shapes, dtypes and shardings that the model's parameters have on a mesh, with adapters around them.

    leaves: further leaves, path -> (letters, first value), where each letter (D, V) or digit, or number between spaces, gives a
    dimension's size. A first value that is a model's name means that model's head, and T its width. Raises UserError where the
    vocabularies differ.
    """
    shapes, beside = _shapes(model, adapter), {}
    sizes = {"D": model.width, "V": model.vocab}
    for path, (letters, first) in (leaves or {}).items():
        if isinstance(first, str):
            other = _other(first).transformer
            if other.vocab != model.vocab:
                raise UserError(f"{first}: a vocabulary of {other.vocab} tokens, and the model's has {model.vocab}.")
            sizes["T"] = other.width
        beside[path] = jax.ShapeDtypeStruct(own_leaves.shape(letters, sizes), jnp.float32)
    shapes |= unflatten_dict(beside, sep="/")
    return sharding.placed(shapes, sharding.stored(mesh, shapes))


def _shapes(model: protocol.Model, adapter: adapted.Adapter) -> Params:
    """The tree of shapes and dtypes of the model's parameters with adapters."""
    key = jax.eval_shape(lambda: jax.random.PRNGKey(0))  # a shape suffices, without a compilation
    shapes = jax.eval_shape(model.init, key)
    return jax.eval_shape(functools.partial(adapted.applied, adapter), shapes, key) if adapter else shapes


def columns(spec: ModelSpec) -> dict[str, int]:
    """{column: E} of the model's adapters among which rows choose (routes.py)."""
    return routes.columns(_shapes(spec.transformer, spec.adapter)) if spec.adapter else {}


def max_positions(spec: ModelSpec) -> int:
    """The most tokens that a document of the model may have. Raises UserError where a prefix leaves no room for two."""
    if not spec.adapter:
        return spec.transformer.max_positions
    most = prefix.max_positions(spec.transformer, _shapes(spec.transformer, spec.adapter))
    if most < 2:
        raise UserError(
            f"config.adapter: its prompt leaves room for {max(most, 0)} of the model's {spec.transformer.max_positions} "
            "positions; make it shorter."
        )
    return most


def reference(spec: ModelSpec) -> ModelSpec:
    """The model that a stage's annotations with the weights "start" ask: the one it starts from, without fresh adapters that
    change what it computes before they have learned (a soft prompt).
    """
    kept = spec.adapter if carried(spec.folder) else adapted.neutral(spec.adapter)
    return dataclasses.replace(spec, adapter=kept)


def to_reference(spec: ModelSpec) -> Callable[[Params], Params]:
    """The function from the spec's parameters to those of `reference(spec)`, which are among them."""
    if (kept := reference(spec).adapter) == spec.adapter:
        return lambda params: params
    return functools.partial(adapted.without, _shapes(spec.transformer, spec.adapter), _shapes(spec.transformer, kept))


def weights(spec: ModelSpec, mesh, seed: int = 0) -> Params:
    """The folder's weights, or fresh ones drawn from the seed; float32, in their place on the mesh, with the spec's adapters
    around them and its leaves beside them, which have their first values where the folder lacks them.
    """
    shapes = flatten_dict(abstract(spec.transformer, mesh, None, spec.leaves), sep="/")
    mine = {path: leaf for path, leaf in spec.leaves.items() if path not in others(spec)}
    params = _weights(dataclasses.replace(spec, leaves=mine), mesh, seed)
    held, flat = flatten_dict(params, sep="/"), flatten_dict(heads(spec, mesh), sep="/")
    for path, (_, first) in mine.items():
        flat[path] = held.get(
            path, jax.device_put(own_leaves.first(path, shapes[path].shape, first, seed), shapes[path].sharding)
        )
    gone = carried(spec.folder, "leaves").keys() - spec.leaves.keys()
    return unflatten_dict({path: x for path, x in held.items() if path not in gone} | flat, sep="/") if flat or gone else params


def _other(name: str) -> ModelSpec:
    """The spec of a model whose head is a leaf. Raises UserError for a checkpoint of ours, and for more than a matrix."""
    spec = describe(name, text=False)
    if spec.folder is None or (spec.folder / "params").exists():
        raise UserError(f"{name}: a teacher is read from Hugging Face's files; make them with python -m jaxpost.export.")
    if spec.transformer.arch.logit_cap is not None or isinstance(spec.transformer, encoder.Encoder):
        raise UserError(f"{name}: a teacher that caps its logits, or an encoder, is more than its head; take distill.top_k.")
    return spec


def heads(spec: ModelSpec, mesh) -> Params:
    """The leaves that are other models' heads; of those models nothing else is read."""
    shapes, flat = flatten_dict(abstract(spec.transformer, mesh, None, spec.leaves), sep="/"), {}
    for leaf, name in others(spec).items():
        of = _other(name)
        path = "embed/weight" if of.transformer.arch.tied else "head/weight"
        read = hf.load(of.folder, of.transformer.arch, unflatten_dict({path: shapes[leaf]}, sep="/"))
        flat[leaf] = flatten_dict(read, sep="/")[path]
    return unflatten_dict(flat, sep="/")


def _weights(spec: ModelSpec, mesh, seed: int) -> Params:
    """The folder's weights and all of its own leaves, or fresh weights without leaves."""
    shapes, key, leaves = abstract(spec.transformer, mesh), jax.random.PRNGKey(seed), carried(spec.folder, "leaves")
    makers = adapted.makers(spec, lambda adapter: abstract(spec.transformer, mesh, adapter, leaves)) if spec.adapter else {}
    around = adapted.around(makers, key)
    if spec.folder is not None and not (spec.folder / "params").exists():
        return adapted.beside(makers, hf.load(spec.folder, spec.transformer.arch, shapes, then=around), key)
    if spec.folder is None and hasattr(spec.transformer, "weights"):
        params = jax.device_put(spec.transformer.weights(mesh, seed), jax.tree.map(lambda x: x.sharding, shapes))
    elif spec.folder is None:
        places = jax.tree.map(lambda x: x.sharding, shapes)
        params = jax.jit(spec.transformer.init, out_shardings=places)(key)
    else:
        meta, inside = checkpoint.read_meta(spec.folder), carried(spec.folder)
        base, within = meta.get("base"), dataclasses.replace(spec, adapter=inside)
        below = base and weights(dataclasses.replace(within, folder=base_of(spec.folder, base)), mesh, seed)
        params = checkpoint.load_params(spec.folder, abstract(spec.transformer, mesh, inside, leaves), below)
        checks.check_finite(params, spec.folder)
        if inside:
            return params
    flat = flatten_dict(params, sep="/")
    del params
    return adapted.beside(makers, unflatten_dict({path: around(path, flat.pop(path)) for path in list(flat)}, sep="/"), key)


def carried(folder, what: str = "adapter") -> Any:
    """The adapters (or the leaves, or what tokens see) that a checkpoint's folder names; empty for none, and for a folder of
    another kind.
    """
    return checkpoint.read_meta(folder).get(what) or {} if folder is not None else {}


def base_in(spec: ModelSpec, workdir, frozen: Params) -> dict | None:
    """How a checkpoint in `workdir` names the folder of its frozen weights: a path (relative inside the workdir) or a name on
    the hub, its digest, and the frozen leaves that the checkpoint keeps itself. None where the weights are fresh or nothing is
    frozen: then the checkpoint keeps everything.
    """
    names = [sharding.path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(frozen)]
    names = [name for name in names if name not in others(spec)]
    if spec.folder is None or not names:
        return None
    base, held = checkpoint.read_meta(spec.folder).get("base"), set()
    folder, workdir = checkpoint.absolute(spec.folder), checkpoint.absolute(workdir)
    name = spec.hub and f"{spec.hub.partition('@')[0]}@{folder.name}"
    if base:
        held, folder = set(checkpoint.paths(spec.folder)), checkpoint.absolute(base_of(spec.folder, base, verify=False))
        name = base["reference"] if hub.is_spelled(base["reference"]) else ""
    elif (folder / "params").exists() and not checkpoint.read_meta(folder).get("done"):
        raise UserError(
            f"config.model: {folder} is a checkpoint of a run that is not over, which may delete it. Let the run end, or make "
            "a folder of it: python -m jaxpost.export."
        )
    if not name:  # a path inside the workdir begins with a dot, so that it never looks like a name on the hub
        name = f"./{folder.relative_to(workdir)}" if folder.is_relative_to(workdir) else str(folder)
    added = adapted.added(spec.adapter)
    beside = [n.replace("/", ".") for n in names if re.search(added, n) or n.replace("/", ".") in held]
    return {"reference": name, "hash": base["hash"] if base else fingerprint.digest(folder), "beside": sorted(beside)}


def beside(spec: ModelSpec) -> list[str]:
    """The weights that a checkpoint around a base holds and that do not belong to its adapters."""
    if spec.folder is None or not checkpoint.read_meta(spec.folder).get("base"):
        return []
    added = adapted.added(spec.adapter)
    return [name for name in checkpoint.paths(spec.folder) if not re.search(added, name.replace(".", "/"))]


def base_name(spec: ModelSpec) -> str | None:
    """The Hugging Face model that a spec's adapter goes around: a name on the hub or a folder; None if there is none."""
    base = spec.folder is not None and checkpoint.read_meta(spec.folder).get("base")
    if not base:
        return spec.hub or (None if spec.folder is None or (spec.folder / "params").exists() else str(spec.folder))
    if hub.is_spelled(base["reference"]):
        return base["reference"].partition("@")[0]
    folder = base_of(spec.folder, base, verify=False)
    return None if (folder / "params").exists() else str(folder)


def base_of(step, base: dict, verify: bool = True) -> epath.Path:
    """The folder of a checkpoint's frozen weights. Raises UserError where it is gone or its weights have changed."""
    where = base["reference"]
    if hub.is_spelled(where):
        folder = hub.fetch(where, weights=True)
    else:
        whole = "://" in where or Path(where).is_absolute()
        folder = epath.Path(where) if whole else checkpoint.absolute(step).parents[2] / where
    if not folder.exists():
        raise UserError(
            f"{step}: its frozen weights are those in {folder}, which is not there. Bring them back to that place (a link "
            "will do)."
        )
    if verify and (folder / "params").exists():
        checkpoint.check(folder)
        if checkpoint.read_meta(folder).get("base"):  # `base_in` names the innermost
            raise UserError(f"{step}: its frozen weights are in {folder}, and there they are elsewhere again; take another.")
    if verify and fingerprint.digest(folder) != base["hash"]:
        raise UserError(
            f"{step}: its frozen weights are those that {folder} held when training began; what it holds now is something "
            "else. Bring the old ones back to that place."
        )
    return folder


def keep_description(spec: ModelSpec, workdir, template: str) -> None:
    """Writes config.json, generation_config.json and the tokenizer under workdir/model, so that generate and export only need
    the workdir.

    template: the run's Jinja chat template, which becomes the tokenizer's default; its other templates stay.
    """
    folder = epath.Path(workdir) / "model"
    folder.mkdir(parents=True, exist_ok=True)
    for name, fields in (("config", spec.config), ("generation_config", spec.generation)):
        (folder / f"{name}.json").write_text(json.dumps(fields, indent=2) + "\n")
    if spec.tokenizer is not None:
        tokenizer.save(tokenizer.carrying(spec.tokenizer, template), folder)


def open_model(where: str, mesh, dtype: str = "float32", adapter: adapted.Adapter = None) -> tuple[ModelSpec, Params]:
    """ModelSpec and weights of a Hugging Face folder, a workdir (its newest checkpoint), or one checkpoint in a workdir, with
    the checkpoint's adapter or the one given. Raises UserError for any other `where`.
    """
    spec = describe(where, dtype=dtype, adapter=adapter)
    check(spec)
    return spec, weights(spec, mesh)
