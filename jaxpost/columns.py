"""Columns of a data set on disk: an annotator's numbers, computed once, in the order of the data set's examples.

A column has a value for each token that is learned, or for each document, so it does not depend on how examples are packed. The
columns of one annotator lie in a folder of their own,

    OUT/<key>/meta.json        the data, the annotator, the weights; written last, so where it is, all is there
              <column>.npy     [T, ...]: T learned tokens; or [N, ...]: N documents, whose learned tokens are counted in
              document_lengths.npy

whose key is a digest of the tokens (which are all that a model sees of text, tokenizer and template), of the annotator with its
options and source, of the weights, and of the batches' shape. Rows are packed as the training's are, in batches of the
training's shape, so that the numbers are bit for bit those of the same program on the training's batches. Until all of them are
there they lie in parts, and a run that was killed goes on after the last part. Damage, found by the CRC-32C in meta.json or
inside a part, is mended by whoever can compute the numbers again, and refused by anyone else.
"""

import contextlib
import functools
import hashlib
import io
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
import tqdm
from etils import epath

from jaxpost import cloud, digests, fingerprint, sharding, writers
from jaxpost.data import source
from jaxpost.declare import declared
from jaxpost.errors import UserError, first_line
from jaxpost.host import read_arrays, read_object
from jaxpost.models import loading
from jaxpost.naming import digest_of, named
from jaxpost.resolve import resolve
from jaxpost.stages import datasets
from jaxpost.types import Params

LENGTHS = "document_lengths"  # beside columns of documents: how many tokens of each are learned
# A part is written after so many seconds, or bytes: what a kill costs.
SECONDS, BYTES = 20.0, 2**26


def identity(spec: loading.ModelSpec, seed: int) -> dict[str, Any]:
    """What tells a stage's first weights from any others: a digest of their files, or what fresh ones are drawn from."""
    drawn = {"config": dict(spec.config), "seed": seed} if spec.folder is None else {}
    files = "" if spec.folder is None else fingerprint.digest(spec.folder)
    return {"files": files, **drawn, "adapter": loading.recorded(spec.adapter)}


def entry(annotator: Mapping | Callable | str) -> dict:
    """An annotator's config entry as a dict with its whole name; a bare name is one of annotators/scores.py."""
    called = named({"annotator": annotator}, ())["annotator"]
    called = {"name": called} if isinstance(called, str) else dict(called)
    if str(called.get("name", "")).isidentifier():
        called["name"] = f"scores.{called['name']}"
    return called


def make(what: Mapping | Callable | str, plan, spec: loading.ModelSpec, params: Callable[[], Params], out, mesh) -> list:
    """The folders under `out` of an annotator's columns, one for each of a stage's data sets; those that are missing are made.

    what: the annotator's entry; plan: the stage's stages.plan.Plan; spec: the model; params: gives its weights in their place
    on the mesh, and is called only if they are needed. Raises UserError for an unknown annotator, and for one that returns no
    columns.
    """
    what, s = entry(what), plan.settings
    annotator, short = resolve(what, "annotators"), what["name"].rpartition(".")[2]
    # The annotator's source too: a user's own may change under its name.
    origin = {"what": {**what, "does": digest_of(annotator)}, "weights": identity(spec, s.seed)}
    origin |= {k: s[k] for k in ("window", "packing", "seed", "batch_size", "dtype")}
    program, folders, weights = jax.jit(functools.partial(annotator, spec.transformer.forward)), [], None
    for one in plan.sets:
        meta = {"data": one.encoded.digest, **origin}
        folder = epath.Path(out) / hashlib.sha256(json.dumps(meta, sort_keys=True, default=str).encode()).hexdigest()[:16]
        folders.append(folder)
        if _there(folder):
            _report(f"{one.name}: {short} is in {folder} already; nothing to do")
            continue
        weights = params() if weights is None else weights
        _score(one, program, weights, s, mesh, folder, declared(annotator, "per") == "document")
        if jax.process_index() == 0:
            _gather(one, s, folder, meta)
        _report(f"{one.name}: wrote {short} of {one.encoded.learned.sum():,} tokens to {folder}")
        sharding.agree(0.0)  # nobody reads before all is written
    return folders


def _there(folder: epath.Path) -> bool:
    """Whether a folder has all of its columns, as the first process sees it; deletes the meta of damaged ones."""
    there = (folder / "meta.json").exists()
    if there and jax.process_index() == 0:
        try:
            _arrays(folder, _meta(folder))
        except (FileNotFoundError, ValueError) as e:
            _report(f"{folder}: damaged columns ({first_line(e)}); they are made again")
            (folder / "meta.json").unlink()
            there = False
    return bool(sharding.agree(float(there)))


def _report(text: str) -> None:
    if jax.process_index() == 0:
        print(text, file=sys.stderr)


def _score(one: datasets.Set, program: Callable, params: Params, s, mesh, folder: epath.Path, documents: bool) -> None:
    """Scores the batches that no part in the folder holds, part after part. documents: whether one value of each is kept."""
    local = sharding.local_rows(mesh, s.batch_size)
    batches = source.Batches(datasets.rows(one, s, {}), s.batch_size, seed=0, shuffle=False, epochs=1, local=local)
    first = int(sharding.agree(_scored(folder) if jax.process_index() == 0 else 0))
    batches.position, held, since = first, [], time.monotonic()
    for at in tqdm.tqdm(range(first, len(batches)), desc=f"annotating {one.name}", unit="batch", disable=None):
        batch = sharding.distribute(batches(), mesh, s.batch_size)
        if at == first:
            check(jax.eval_shape(program, params, batch), batch["mask"].shape)
        places = np.flatnonzero(mask := sharding.everywhere(batch["mask"]))
        part = {}
        if documents:
            places, part[LENGTHS] = _last(mask, sharding.everywhere(batch["segments"]))
        for name, x in program(params, batch).items():
            part[name] = sharding.everywhere(x).reshape(-1, *x.shape[2:])[places]
        held.append(part)
        full = time.monotonic() - since >= SECONDS or sum(x.nbytes for part in held for x in part.values()) >= BYTES
        if full or at + 1 == len(batches):
            if jax.process_index() == 0:
                content = io.BytesIO()
                np.savez(content, **{name: np.concatenate([part[name] for part in held]) for name in part})
                folder.mkdir(parents=True, exist_ok=True)
                writers.replace(folder / f"part-{at + 1:08d}.npz", content.getvalue())
            held, since = [], time.monotonic()


def _last(mask: np.ndarray, segments: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(flat places of each document's last learned token, how many learned tokens it has) of a batch, in the rows' order."""
    rows, columns = np.nonzero(mask)
    numbers = rows * (segments.max() + 1) + segments[mask]
    ends = np.flatnonzero(np.diff(numbers, append=-1))
    return (rows * mask.shape[1] + columns)[ends], np.diff(ends, prepend=-1)


def _scored(folder: epath.Path) -> int:
    """The number of batches up to the end of the last whole part in a folder; deletes a damaged one, and those after it."""
    parts = _parts(folder)
    whole = next((i for i, part in enumerate(parts) if not read_arrays(part)), len(parts))
    for part in parts[whole:]:
        _report(f"{part}: it or a part before it is damaged; it is made again")
        part.unlink()
    return int(parts[whole - 1].name[5:13]) if whole else 0


def _parts(folder: epath.Path) -> list[epath.Path]:
    return sorted(folder.glob("part-*.npz"), key=lambda p: p.name) if folder.exists() else []


def check(columns: Any, shape: tuple[int, int]) -> None:
    """Raises UserError unless the shapes that an annotator gave are {column: [B,S,...]}."""
    good = isinstance(columns, dict) and all(getattr(x, "shape", ())[:2] == shape for x in columns.values())
    if not good or not columns:
        raise UserError(
            f"an annotator returns {{column: array [B,S,...]}} with [B,S] = {list(shape)}; this one gave {columns}."
        )


def _gather(one: datasets.Set, s, folder: epath.Path, meta: dict) -> None:
    """Puts the parts' values, which lie in the order of the rows, into that of the examples, and writes the meta."""
    parts = _parts(folder)
    with np.load(io.BytesIO(parts[0].read_bytes())) as part:
        kinds, sums = {name: (part[name].shape[1:], part[name].dtype) for name in part.files}, {}
    counts = one.encoded.learned  # values of each example
    if LENGTHS in kinds:
        counts = np.full(len(counts), np.max(one.encoded.examples[0].get("segments", 1)))
    order = np.concatenate(source.bins(one.encoded.lengths, s.window, packing=s.packing, seed=s.seed))
    begins = (np.cumsum(counts) - counts)[order]
    before = np.cumsum(counts[order]) - counts[order]
    places = np.repeat(begins - before, counts[order]) + np.arange(counts.sum())
    for name, (shape, dtype) in kinds.items():
        with cloud.local_target(folder / f"{name}.npy") as target:
            whole = np.lib.format.open_memmap(target, "w+", dtype, (len(places), *shape))
            done = 0
            for part in parts:
                with np.load(io.BytesIO(part.read_bytes())) as stored:
                    if set(stored.files) != kinds.keys():
                        raise UserError(f"{part}: it has other columns than {parts[0].name}; delete this folder.")
                    values = stored[name]
                whole[places[done : done + len(values)]] = values
                done += len(values)
            whole.flush()
            del whole
            sums[name] = digests.checksum(epath.Path(target))
        if done != len(places):
            raise UserError(f"{folder}: parts are missing ({done:,} of {len(places):,} numbers are there); delete this folder.")
    about = {k: {"shape": list(shape), "dtype": str(dtype), "crc32c": sums[k]} for k, (shape, dtype) in kinds.items()}
    if LENGTHS in about:
        meta = meta | {LENGTHS: about.pop(LENGTHS), "examples": len(counts)}
    writers.replace(folder / "meta.json", (json.dumps(meta | {"columns": about}, indent=2, default=str) + "\n").encode())
    for part in parts:
        part.unlink()


def read(folder) -> dict[str, np.ndarray]:
    """The columns in one of `make`'s folders, {name: [T, ...]} or, of documents, {name: [N, ...]}; on a disk of this machine
    they stay there until used. Raises UserError where they are damaged.
    """
    arrays, _ = whole(folder)
    arrays.pop(LENGTHS, None)
    return arrays


def by_token(folder) -> tuple[dict[str, Any], dict]:
    """(columns, meta) of a folder, with a value for each learned token [T, ...], as `datasets.batches` joins them: arrays, or
    where values are documents' what gives them in slices. Raises UserError where they are damaged.
    """
    arrays, meta = whole(folder)
    if (lengths := arrays.pop(LENGTHS, None)) is not None:
        return {name: _Spread(values, np.cumsum(lengths)) for name, values in arrays.items()}, meta
    return arrays, meta


class _Spread:
    """Documents' values [N, ...] as one for each of their learned tokens [T, ...], read in slices. ends: [N], running sums."""

    def __init__(self, values: np.ndarray, ends: np.ndarray):
        self.values, self.ends = values, ends
        self.shape, self.dtype = (int(ends[-1]), *values.shape[1:]), values.dtype

    def __getitem__(self, tokens: slice) -> np.ndarray:
        return self.values[np.searchsorted(self.ends, np.arange(tokens.start, tokens.stop), side="right")]


def whole(folder) -> tuple[dict[str, np.ndarray], dict]:
    """(the arrays of a folder, its meta). Raises UserError where one is damaged."""
    folder = epath.Path(folder)
    with _refused(folder):
        meta = _meta(folder)
        return _arrays(folder, meta), meta


@contextlib.contextmanager
def _refused(folder: epath.Path) -> Iterator[None]:
    """Turns what damage raises inside the block into a UserError."""
    try:
        yield
    except (FileNotFoundError, ValueError) as e:
        raise UserError(
            f"{folder}: damaged columns ({first_line(e)}). Delete that folder, and have jaxpost.annotate make them again."
        ) from e


def _meta(folder: epath.Path) -> dict:
    """The meta of a folder of columns. Raises ValueError where it is damaged."""
    meta = read_object(folder / "meta.json")
    for field, kind in (("data", str), ("weights", dict), ("columns", dict)):
        if not isinstance(meta.get(field), kind):
            raise ValueError(f"{folder / 'meta.json'} has no {field}")
    return meta


def _arrays(folder: epath.Path, meta: Mapping) -> dict[str, np.ndarray]:
    """The arrays that a meta names. Raises FileNotFoundError or ValueError where one is gone or damaged."""
    arrays, lengths = {}, {LENGTHS: meta[LENGTHS]} if LENGTHS in meta else {}
    for name, about in {**meta["columns"], **lengths}.items():
        file = folder / f"{name}.npy"
        with cloud.local_copy(file) as copy:
            if about.get("crc32c") not in (None, digests.checksum(epath.Path(copy))):  # None: an older jaxpost's
                raise ValueError(f"{file} was changed")
            try:
                arrays[name] = np.load(copy, mmap_mode=None if cloud.is_remote(file) else "r")
            except (EOFError, ValueError) as e:
                raise ValueError(f"{file}: {first_line(e)}") from e
    return arrays


def folders(annotations: str) -> list[epath.Path]:
    """The folders of columns that config.annotations names, with commas between. Raises UserError where there is none."""
    every = []
    for part in filter(None, (part.strip() for part in annotations.split(","))):
        if not (folder := cloud.path(part)).exists():
            raise UserError(f"config.annotations: no folder {folder}; give one that jaxpost.annotate wrote.")
        every += [meta.parent for meta in sorted(folder.glob("*/meta.json"))]
    return every


def meta_of(folder) -> dict:
    """A folder's meta. Raises UserError where it is damaged."""
    with _refused(epath.Path(folder)):
        return _meta(epath.Path(folder))
