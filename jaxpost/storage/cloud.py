"""Paths in Google Cloud Storage, for libraries that only know local files too.

Every path that a user gives, from a workdir to an export, may be `gs://bucket/folder`. `etils.epath` reads and writes, by
TensorFlow where that is installed, else by `gcsfs`. Orbax writes its arrays through TensorStore. Orbax and `digests` also use
Google's own client. `pip install 'jaxpost[gcs]'` brings these packages. Credentials are Google's defaults: the machine's
service account on Google Cloud, elsewhere those of `gcloud auth application-default login`. A workdir needs the right to read,
list, write and delete objects, and `storage.buckets.get`, which Orbax uses.

An object store differs from a disk in three ways that matter here. An object appears whole when its upload ends, so no file is
renamed into place; renaming is a slow copy. Nothing can be appended to (`writers`). A folder is only a common prefix of names,
so it need not be created, and an empty one does not exist.
"""

import base64
import contextlib
import functools
import importlib.util
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from etils import epath

from jaxpost.errors import UserError, first_line


def is_remote(where) -> bool:
    """Whether a path is in an object store, not on a disk of this machine."""
    return "://" in str(where)


def path(where) -> epath.Path:
    """The path, local or gs://. Raises UserError for another store, and where a library for gs:// is missing."""
    if is_remote(where):
        if not str(where).startswith("gs://"):
            raise UserError(f"{where}: of the object stores only gs:// is known; copy it there, or to a local folder.")
        _prepare()
    return epath.Path(where)


@functools.cache
def _prepare() -> None:
    tensorflow = importlib.util.find_spec("tensorflow") is not None
    needed = ["google.cloud.storage"] if tensorflow else ["gcsfs", "google.cloud.storage"]
    if missing := [name for name in needed if not _installed(name)]:
        raise UserError(f"gs:// paths need {' and '.join(missing)}, which is not installed; pip install 'jaxpost[gcs]'.")
    if not tensorflow:
        from etils.epath import backend

        # Its cached listings would miss what TensorStore, another process or another machine writes.
        listings = backend.fsspec_backend.fs("gs://").dircache
        listings.clear()
        listings.use_listings_cache = False


def _installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # not even the package that it would be in
        return False


def check_bucket(where) -> None:
    """Raises UserError if the bucket of a gs:// path does not exist or these credentials may not use it."""
    if is_remote(where):
        with _client(where) as (client, name):
            client.get_bucket(name)


def objects(folder) -> dict[str, tuple[int, int, int | None]]:
    """{name relative to the folder: (bytes, generation, CRC-32C)} of the objects below a gs:// folder, by one listing.

    The CRC is None where the store does not know it. Raises UserError where the bucket cannot be listed.
    """
    prefix = "/".join(path(folder).parts[3:]) + "/"
    with _client(folder) as (client, name):
        listed = [blob for blob in client.list_blobs(name, prefix=prefix) if not blob.name.endswith("/")]
    sums = {blob.name: blob.crc32c and int.from_bytes(base64.b64decode(blob.crc32c), "big") for blob in listed}
    return {blob.name.removeprefix(prefix): (blob.size, blob.generation, sums[blob.name]) for blob in listed}


@contextlib.contextmanager
def _client(where) -> Iterator[tuple]:
    """(Google's client, the name of a gs:// path's bucket). Turns the store's errors inside the block into a UserError."""
    name = path(where).parts[2]
    from google.api_core.exceptions import GoogleAPIError
    from google.auth.exceptions import DefaultCredentialsError, GoogleAuthError
    from google.cloud import storage

    try:
        try:
            client = storage.Client(project=None)
        except DefaultCredentialsError:  # enough for a public bucket
            client = storage.Client.create_anonymous_client()
        yield client, name
    except (GoogleAPIError, GoogleAuthError, OSError) as e:
        raise UserError(
            f"{where}: the bucket {name} cannot be used ({first_line(e)}). Check its name, that this machine's account has "
            "storage.buckets.get and may write objects there, or log in: gcloud auth application-default login."
        ) from e


def cache_folder() -> epath.Path:
    """The folder of caches, which may be deleted between runs: the environment's JAXPOST_CACHE, else ~/.cache/jaxpost."""
    return epath.Path(os.environ.get("JAXPOST_CACHE") or "~/.cache/jaxpost").expanduser()


@contextlib.contextmanager
def local_copy(file: epath.Path) -> Iterator[Path]:
    """A local file with the content of `file`: itself, or a copy that exists during the block."""
    if not is_remote(file):
        yield Path(file)
        return
    with tempfile.TemporaryDirectory() as folder:
        file.copy(epath.Path(folder) / file.name)
        yield Path(folder) / file.name


def save_tensors(tensors: dict, file: epath.Path) -> None:
    """Writes a safetensors file, local or remote, with the usual permissions of a new file."""
    from safetensors.numpy import save_file

    with local_target(file) as place:
        save_file(tensors, place, metadata={"format": "pt"})
        mask = os.umask(0)
        os.umask(mask)
        place.chmod(0o666 & ~mask)  # the library's files are readable by their owner only


@contextlib.contextmanager
def local_target(file: epath.Path) -> Iterator[Path]:
    """A local path to write to; its content is in `file` when the block ends."""
    if not is_remote(file):
        yield Path(file)
        return
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder) / file.name
        epath.Path(folder, file.name).copy(file, overwrite=True)
