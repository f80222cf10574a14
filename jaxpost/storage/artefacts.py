"""Artefacts: the outputs of stages other than checkpoints, each in a folder named by a digest of its inputs.

    ROOT/<kind>/<key>/meta.json        its inputs, its files with their CRC-32C, its progress, whether it is done
                      part-....jsonl   a part; more follow

The key is a digest of everything that decides the content: settings, inputs, the sources of functions. So stages with the same
output share one folder, and a folder is never continued with different inputs. Parts are written whole, and meta.json after
each, so a killed run continues after the last part. A damaged file and the parts after it are made again by the stage that
makes them; a reader refuses them by name. Checkpoints are not artefacts: Orbax has them.

kinds: rows and figures; columns lie in a folder of their own, WORKDIR/columns or one that the user names, without a kind.
"""

import hashlib
import json
import sys
from collections.abc import Iterable, Mapping
from typing import Any

import jax
from etils import epath

from jaxpost import sharding
from jaxpost.errors import UserError, first_line
from jaxpost.reporting import writers
from jaxpost.storage import cloud, digests
from jaxpost.storage.host import read_object


def key(about: Any) -> str:
    """The name of a folder: a digest of what decides its content (JSON; other values by their str)."""
    return hashlib.sha256(json.dumps(about, sort_keys=True, default=str).encode()).hexdigest()[:16]


class Artefact:
    """The folder of one artefact, for the stage that makes it. All processes call `resume`; only the first one writes."""

    def __init__(self, root, kind: str, about: Mapping[str, Any]):
        self.folder = epath.Path(root) / kind / key(about)
        self.about = dict(about)
        self.parts: list[dict] = []  # {file, crc32c, progress} of each

    def resume(self, **start: float) -> tuple[dict[str, float], bool]:
        """(the progress at the last whole part, or `start`; whether the artefact is done), the same on every process."""
        meta = self._whole() if jax.process_index() == 0 else {}
        self.parts = meta.get("parts", [])
        progress = {**start, **(self.parts[-1]["progress"] if self.parts else {}), **meta.get("progress", {})}
        done = bool(sharding.agree(float(meta.get("done", False))))
        return {name: type(value)(sharding.agree(float(progress[name]))) for name, value in start.items()}, done

    def _whole(self) -> dict:
        """The meta, cut back to the files that are whole; files that it does not name are deleted."""
        meta, damage = {}, ""
        if (self.folder / "meta.json").exists():
            try:
                meta = read_meta(self.folder)
            except UserError as error:
                damage = str(error)
        files = [*meta.get("parts", []), *meta.get("files", [])]
        whole = next((i for i, file in enumerate(files) if (damage := _damage(self.folder, file))), len(files))
        if damage:
            print(f"{damage} It is made again, with what was made after it.", file=sys.stderr)
        if whole < len(files):
            meta = {"parts": meta["parts"][:whole]}
        named = {"meta.json", *(file["file"] for file in files[:whole])}
        for path in self.folder.iterdir() if self.folder.exists() else ():
            if path.name not in named and not path.is_dir():
                path.unlink()
        return meta

    def add(self, suffix: str, content: bytes, **progress: float) -> None:
        """Writes a part and the progress with it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        name = f"part-{len(self.parts):08d}{suffix}"
        writers.replace(self.folder / name, content)
        self.parts.append({"file": name, "crc32c": _checksum(self.folder / name), "progress": progress})
        self._write({"parts": self.parts})

    def write(self, suffix: str, content: bytes, **facts: Any) -> None:
        """Writes an artefact of one part, in place of what an attempt that was killed has left."""
        self.parts = []
        self.add(suffix, content)
        self.finish(**facts)

    def finish(self, files: Iterable[str] = (), **facts: Any) -> None:
        """Marks the artefact as done. files: names of files that replace the parts; facts: stored in the meta for readers."""
        self.folder.mkdir(parents=True, exist_ok=True)
        named = [{"file": name, "crc32c": _checksum(self.folder / name)} for name in files]
        last = self.parts[-1]["progress"] if self.parts else {}
        self._write({"parts": [] if named else self.parts, "files": named, "progress": last, "facts": facts, "done": True})
        for part in self.parts if named else ():
            (self.folder / part["file"]).unlink()

    def forget(self) -> None:
        """Removes the record of what was made, so that the next attempt begins anew."""
        (self.folder / "meta.json").unlink(missing_ok=True)

    def _write(self, state: Mapping) -> None:
        content = json.dumps({"about": self.about, **state}, indent=2, default=str) + "\n"
        writers.replace(self.folder / "meta.json", content.encode())


def read_meta(folder) -> dict:
    """The meta of an artefact's folder, without reading its files. Raises UserError where the meta is damaged."""
    path = epath.Path(folder) / "meta.json"
    meta = read_object(path)
    lists = [meta.get("parts", []), meta.get("files", [])]
    entries = [entry for each in lists if isinstance(each, list) for entry in each]
    good = all(isinstance(e, dict) and isinstance(e.get("file"), str) and "/" not in e["file"] for e in entries)
    if not (good and all(isinstance(each, list) for each in lists) and isinstance(meta.get("about"), dict)):
        raise UserError(f"{path}: is no record of an artefact; delete {folder} and run the command that makes it again.")
    return meta


def check(folder) -> dict:
    """The meta of a finished artefact, compared with its files. Raises UserError for one that is not whole."""
    meta = read_meta(folder)
    if not meta.get("done"):
        raise UserError(f"{folder}: is not finished; run the command that makes it again.")
    for file in (*meta["parts"], *meta["files"]):
        if damage := _damage(epath.Path(folder), file):
            raise UserError(f"{damage} Delete {folder} and run the command that makes it again.")
    return meta


def _damage(folder: epath.Path, file: Mapping) -> str:
    path = folder / file["file"]
    try:
        damaged = _checksum(path) != file.get("crc32c")
    except OSError as error:
        return f"{path}: damaged ({first_line(error)})."
    return f"{path}: damaged (its bytes are not those that were written)." if damaged else ""


def _checksum(path: epath.Path) -> int:
    with cloud.local_copy(path) as copy:
        return digests.checksum(epath.Path(copy))
