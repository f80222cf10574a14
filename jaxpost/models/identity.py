"""Which model it is: what an artefact records of the one that made it, so that another model makes another artefact."""

from typing import Any

from etils import epath

from jaxpost.config.naming import digest_of
from jaxpost.config.resolve import resolve
from jaxpost.declare import declared
from jaxpost.models import adapted, loading, protocol
from jaxpost.storage import fingerprint


def identity(spec: loading.ModelSpec, seed: int) -> dict[str, Any]:
    """What tells a model from any other, as JSON: a digest of its weights' files or what fresh ones are drawn from, its config,
    the ids that end its completions or are in none, its adapters, and of a model that a function makes that function's source
    and the models that it is made of.

    seed: of what is drawn afresh. A function's source does not cover the functions that it calls (config/naming.py).
    """
    about = {"files": "", "config": dict(spec.config), "adapter": adapted.recorded(spec.adapter)}
    about |= {"seed": seed} if spec.folder is None else {"files": fingerprint.digest(spec.folder)}
    about |= {"ends": list(spec.ends), "suppressed": list(spec.suppressed)}
    if base := loading.carried(spec.folder, "base"):
        about["base"] = base["hash"]
    if spec.adapter:
        about |= _of_adapter(spec, seed)
    if loading.is_entry(spec.config):
        about |= _of_function(spec, seed)
    return about


def _of_adapter(spec: loading.ModelSpec, seed: int) -> dict[str, Any]:
    """The sources of the adapters' functions; of fresh ones what they are read from, and the seed where it shows at once."""
    entries = adapted.listed(spec.adapter)
    functions = [resolve(entry, "adapters") for entry in entries]
    about: dict[str, Any] = {"adapter_source": digest_of([function.func for function in functions])}
    if loading.carried(spec.folder):
        return about
    read = [function.keywords[name] for function in functions for name in declared(function, "reads")]
    folders = [folder for value in read for folder in ([value] if isinstance(value, str) else value)]
    about["adapter_files"] = [_content(epath.Path(folder)) for folder in folders]
    return about | ({} if adapted.neutral(spec.adapter) == adapted.as_one(entries) else {"adapter_seed": seed})


def _content(folder: epath.Path) -> str:
    return fingerprint.of_files([path for path in folder.iterdir() if path.suffix in (".json", ".safetensors")], folder)


def _of_function(spec: loading.ModelSpec, seed: int) -> dict[str, Any]:
    """The sources of the functions that an entry names and of the model's class, unless that is jaxpost's, and the identities
    of the models that fresh weights are of.
    """
    functions = [entry if callable(entry) else resolve(entry, "models") for entry in protocol.functions(spec.config)]
    kind = type(spec.transformer)
    own = [] if kind.__module__.startswith("jaxpost.") else [kind]
    parts = getattr(spec.transformer, "parts", ()) if spec.folder is None else ()
    of_parts = [identity(loading.describe(part, text=False), seed) for part in parts]
    return {"source": digest_of([functions, own]), "parts": of_parts}
