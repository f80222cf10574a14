"""Adapters as the `peft` library keeps them: a folder of adapter_config.json and adapter_model.safetensors.

    adapter={"name": "peft", "folder": "FOLDER"}                      trains or runs one
    python -m jaxpost.export --checkpoint=W --out=FOLDER --adapter    writes one

Which kinds there are, each adapter declares (`jaxpost.declare.Files`).
"""

import json
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from etils import epath

from jaxpost.config.resolve import find, known, resolve
from jaxpost.declare import Files, adapter, declared
from jaxpost.errors import UserError
from jaxpost.models import adapted, hf, routes, safetensors_io
from jaxpost.models.families import Architecture
from jaxpost.storage import cloud
from jaxpost.types import Params

_PREFIX = "base_model.model."
# Fields of every kind's config that do not change what an adapter computes.
_COMMON = {"peft_type", "base_model_name_or_path", "revision", "inference_mode", "task_type", "peft_version", "auto_mapping"}


def recorded(*, folder: str, base: str = "") -> dict:
    """The entry of the adapter that a folder holds, with its shape and its scale."""
    return _opened(folder, base)[1]


@adapter(recorded=recorded, reads=("folder",))
def peft(params: Params, key: jax.Array, *, folder: str, base: str = "") -> Params:
    """The adapter of a `peft` folder with its weights; base: as in adapters/lora.py.

    Raises UserError for a folder without an adapter, for an unsupported kind of adapter or field, for tensors that do not fit
    the model or are not finite, and for missing layers.
    """
    files, entry, tensors = _opened(folder, base)
    return files.filled(resolve(entry, "adapters")(params, key), tensors, folder)


def _opened(folder: str, base: str) -> tuple[Files, dict, dict[str, Any]]:
    """(how the kind of a folder's adapter is kept, its entry, {tensor name without peft's prefix: lazy slice})."""
    where = cloud.path(folder)
    config, tensors = where / "adapter_config.json", where / "adapter_model.safetensors"
    if not config.exists():
        raise UserError(f"config.adapter.folder: {where} has no adapter_config.json; give a folder that peft saved.")
    fields, kinds = hf.read_object(config), {}
    for name in known("adapters"):
        if (files := declared(find(name, "adapters"), "files")) is not None:
            kinds[files.kind] = files
    if (kind := fields.get("peft_type")) not in kinds:
        raise UserError(f"{config}: peft_type = {kind!r} is not supported; what is are {', '.join(sorted(kinds))}.")
    if not tensors.exists():
        raise UserError(f"{where}: has no adapter_model.safetensors. Save it from peft with safe_serialization (the default).")
    held = {name.removeprefix(_PREFIX): tensor for name, tensor in safetensors_io.tensors(tensors).items()}
    entry = kinds[kind].read({k: v for k, v in fields.items() if k not in _COMMON}, held, folder)
    return kinds[kind], entry | ({"base": base} if base else {}), held


def _parts(entry: dict, params: Params) -> list[tuple[str, dict, Params]]:
    """(folder, entry, parameters) of each of the adapters that rows choose among; of any other adapter itself, in ""."""
    whole = adapted.listed(adapted.recorded(entry))[0]
    if not (name := declared(resolve(whole, "adapters"), "one")):
        return [("", entry, params)]
    return [(str(i), {"name": name}, routes.only(params, i, whole["column"])) for i in range(whole["experts"])]


def save(
    folder: str | epath.Path,
    params: Params,
    arch: Architecture,
    entry: adapted.Adapter,
    model: str | None,
    beside: Sequence[str] = (),
) -> list[str]:
    """Writes the adapter of a tree as a `peft` folder, or each of several as a folder in it; returns the files' names. Those
    that rows choose among are folders with their numbers.

    entry: the config's or checkpoint's adapter; model: the name or folder of its base, None where that is no Hugging Face
    model; beside: other weights that were learned. Raises UserError for anything beside, for a tree without an adapter, and for
    an adapter for which `peft` has no place.
    """
    entries = adapted.listed(entry)
    if not entries:
        raise UserError("export: there is no adapter in this checkpoint; leave --adapter out.")
    if beside:
        raise UserError(
            f"export: this run learned {', '.join(sorted(beside)[:3])} as well, which is no part of an adapter. Leave "
            "--adapter out: all of it is then in the model."
        )
    folder, each = cloud.path(folder), {}
    for one in entries:
        parts = _parts(one, params)
        if (files := declared(resolve(parts[0][1], "adapters"), "files")) is None:
            raise UserError(f"export: peft has no place for the adapter {one['name']}; leave --adapter out.")
        if files.kind in (other.kind for other, *_ in each.values()):
            raise UserError(f"export: two adapters are {files.kind}, and a folder of peft's holds one; leave --adapter out.")
        place = folder / one["name"].rpartition(".")[2] if len(entries) > 1 else folder
        each |= {place / number: (files, *files.written(own, arch, plain)) for number, plain, own in parts}
    for place, (files, fields, tensors) in each.items():
        common = {"peft_type": files.kind, "task_type": "CAUSAL_LM", "base_model_name_or_path": model, "inference_mode": True}
        place.mkdir(parents=True, exist_ok=True)
        (place / "adapter_config.json").write_text(json.dumps(common | fields, indent=2) + "\n")
        tensors = {name: np.ascontiguousarray(x) for name, x in tensors.items()}
        cloud.save_tensors(tensors, place / "adapter_model.safetensors")
    return sorted(str(p.relative_to(folder)) for place in each for p in place.iterdir())
