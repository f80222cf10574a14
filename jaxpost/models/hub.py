"""Models by their name on the Hugging Face hub: `organisation/model`, or `organisation/model@revision`.

`huggingface_hub` downloads, so its cache, HF_HOME, HF_TOKEN and HF_HUB_OFFLINE mean what they always do. Only JSON, text,
tokenizers and safetensors are fetched: never a pickle, never code. The small files come first, so a model that cannot be used
is refused before its weights are downloaded.
"""

import re
from collections.abc import Sequence
from pathlib import Path

from etils import epath

from jaxpost.errors import UserError, first_line
from jaxpost.models import hf
from jaxpost.storage import network

_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w./-]+)?")
SMALL = ("*.json", "*.model", "*.jinja", "*.txt")


def is_spelled(name: str) -> bool:
    """Whether this is spelled like a model's name on the hub; local folders are not looked at."""
    return _NAME.fullmatch(name) is not None


def is_name(where: str) -> bool:
    """Whether this is spelled like a model's name on the hub and is no local path: its parent folder does not exist."""
    return is_spelled(where) and not Path(where).parent.exists()


def fetch(name: str, weights: bool = False) -> Path:
    """The folder in the cache with the model's small files. weights: whether to fetch the weights too: the files that the index
    names, since some repositories hold the model a second time in its makers' own layout.

    Raises UserError where there is no such model or revision, where it is gated, and where there is neither network nor a
    cached copy.
    """
    folder = _snapshot(name, SMALL)
    return _snapshot(name, hf.listed(epath.Path(folder))) if weights else folder


def _snapshot(name: str, patterns: Sequence[str]) -> Path:
    import huggingface_hub
    from huggingface_hub import errors

    model, _, revision = name.partition("@")
    reason = ""
    try:
        with network.hub() as reason:
            folder = huggingface_hub.snapshot_download(model, revision=revision or None, allow_patterns=list(patterns))
    except errors.GatedRepoError:
        raise UserError(f"{name}: the hub keeps this model behind its licence; accept it there and set HF_TOKEN.") from None
    except errors.RevisionNotFoundError:
        raise UserError(f"{name}: the hub has this model, but no revision {revision!r} of it.") from None
    except errors.RepositoryNotFoundError:
        raise UserError(
            f"{name}: no such folder, and no such model on the hub (a private one needs HF_TOKEN). Check the spelling."
        ) from None
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, errors.HfHubHTTPError, OSError) as e:
        raise UserError(
            f"{name}: no such folder, and the hub cannot give a model of this name now ({reason or first_line(e)}); the cache "
            f"does not hold it. Give a folder; on a machine with a network: hf download {model} --local-dir=FOLDER."
        ) from None
    return Path(folder)
