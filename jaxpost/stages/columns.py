"""Columns of a data set on disk: an annotator's numbers, computed once, in the order of the data set's examples.

A column has a value for each token that is learned, or for each document, so it does not depend on how examples are packed. The
columns of one annotator are an artefact (storage/artefacts.py):

    OUT/<key>/<column>.npy             [T, ...]: T learned tokens; or [N, ...]: N documents
              document_lengths.npy     [N], of documents: how many learned tokens each has
              documents.npy            [examples]: how many documents each example has

whose key is a digest of the tokens (which are all that a model sees of text, tokenizer and template), of the annotator with its
options and source, of the weights, and of the batches' shape. Rows are packed as the training's are, in batches of the
training's shape, so that the numbers are bit for bit those of the same program on the training's batches.
"""

import functools
import io
import re
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
import tqdm
from etils import epath

from jaxpost import sharding
from jaxpost.config.naming import digest_of, named
from jaxpost.config.resolve import resolve, within
from jaxpost.data import source
from jaxpost.declare import declared
from jaxpost.errors import UserError
from jaxpost.models import loading
from jaxpost.models.identity import identity
from jaxpost.stages import datasets
from jaxpost.storage import artefacts, cloud
from jaxpost.storage.artefacts import Artefact
from jaxpost.types import Params

# Beside columns of documents: how many tokens of each are learned, and how many documents each example has.
LENGTHS, DOCUMENTS = "document_lengths", "documents"
# A part is written after so many seconds, or bytes: what a kill costs.
SECONDS, BYTES = 20.0, 2**26


def entry(annotator: Mapping | Callable | str) -> dict:
    """An annotator's config entry as a dict with its whole name; a bare name is one of annotators/scores.py."""
    return within(named({"annotator": annotator}, ())["annotator"], "scores")


def make(what: Mapping | Callable | str, plan, spec: loading.ModelSpec, params: Callable[[], Params], out, mesh) -> list:
    """The folders under `out` of an annotator's columns, one for each of a stage's data sets; those that are missing are made.

    what: the annotator's entry; plan: the stage's stages.plan.Plan; spec: the model; params: gives its weights in their place
    on the mesh, and is called only if they are needed. Raises UserError for an unknown annotator, and for one that returns no
    columns.
    """
    what, s = entry(what), plan.settings
    annotator, short = resolve(what, "annotators"), re.split("[.:]", what["name"])[-1]
    # The annotator's source too: a user's own may change under its name.
    origin = {"what": {**what, "does": digest_of(annotator)}, "weights": identity(spec, s.seed)}
    origin |= {k: s[k] for k in ("window", "packing", "seed", "batch_size", "dtype")}
    program, folders, weights = jax.jit(functools.partial(annotator, spec.transformer.forward)), [], None
    for one in plan.sets:
        artefact = Artefact(out, "", {"data": one.encoded.digest, **origin})
        folders.append(artefact.folder)
        progress, done = artefact.resume(batches=0)
        if done:
            _report(f"{one.name}: {short} is in {artefact.folder} already; nothing to do")
            continue
        weights = params() if weights is None else weights
        _score(one, program, weights, s, mesh, artefact, progress["batches"], declared(annotator, "per") == "document")
        if jax.process_index() == 0:
            _gather(one, s, artefact)
        _report(f"{one.name}: wrote {short} of {one.encoded.learned.sum():,} tokens to {artefact.folder}")
        sharding.agree(0.0)  # nobody reads before all is written
    return folders


def _report(text: str) -> None:
    if jax.process_index() == 0:
        print(text, file=sys.stderr)


def _score(
    one: datasets.Set, program: Callable, params: Params, s, mesh, artefact: Artefact, first: int, documents: bool
) -> None:
    """Scores the batches from `first` on, part after part. documents: whether one value of each is kept."""
    local = sharding.local_rows(mesh, s.batch_size)
    batches = source.Batches(datasets.rows(one, s, {}), s.batch_size, seed=0, shuffle=False, epochs=1, local=local)
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
                artefact.add(".npz", content.getvalue(), batches=at + 1)
            held, since = [], time.monotonic()


def _last(mask: np.ndarray, segments: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(flat places of each document's last learned token, how many learned tokens it has) of a batch, in the rows' order."""
    rows, columns = np.nonzero(mask)
    numbers = rows * (segments.max() + 1) + segments[mask]
    ends = np.flatnonzero(np.diff(numbers, append=-1))
    return (rows * mask.shape[1] + columns)[ends], np.diff(ends, prepend=-1)


def check(columns: Any, shape: tuple[int, int]) -> None:
    """Raises UserError unless the shapes that an annotator gave are {column: [B,S,...]}."""
    good = isinstance(columns, dict) and all(getattr(x, "shape", ())[:2] == shape for x in columns.values())
    if not good or not columns:
        raise UserError(
            f"an annotator returns {{column: array [B,S,...]}} with [B,S] = {list(shape)}; this one gave {columns}."
        )


def _gather(one: datasets.Set, s, artefact: Artefact) -> None:
    """Puts the parts' values, which lie in the order of the rows, into that of the examples."""
    parts = [artefact.folder / part["file"] for part in artefact.parts]
    with np.load(io.BytesIO(parts[0].read_bytes())) as part:
        kinds = {name: (part[name].shape[1:], part[name].dtype) for name in part.files}
    counts = _documents(one) if LENGTHS in kinds else one.encoded.learned  # values of each example
    order = np.concatenate(datasets.bins(one, s))
    begins = (np.cumsum(counts) - counts)[order]
    before = np.cumsum(counts[order]) - counts[order]
    places = np.repeat(begins - before, counts[order]) + np.arange(counts.sum())
    for name, (shape, dtype) in kinds.items():
        with cloud.local_target(artefact.folder / f"{name}.npy") as target:
            whole = np.lib.format.open_memmap(target, "w+", dtype, (len(places), *shape))
            done = 0
            for part in parts:
                with np.load(io.BytesIO(part.read_bytes())) as stored:
                    values = stored[name]
                whole[places[done : done + len(values)]] = values
                done += len(values)
            assert done == len(places), "the parts have all batches"
            whole.flush()
            del whole
    about = {k: {"shape": list(shape), "dtype": str(dtype)} for k, (shape, dtype) in kinds.items() if k != LENGTHS}
    if LENGTHS in kinds:
        kinds[DOCUMENTS] = ((), counts.dtype)
        with cloud.local_target(artefact.folder / f"{DOCUMENTS}.npy") as target:
            np.save(target, counts)
    artefact.finish([f"{name}.npy" for name in kinds], columns=about)


def _documents(one: datasets.Set) -> np.ndarray:
    """How many documents with a learned token each example of a data set has: a list of answers has as many as it is long."""
    rows = (one.encoded.examples[i] for i in range(len(one.encoded.learned)))
    return np.array([len(np.unique(row["segments"][row["mask"]])) if "segments" in row else 1 for row in rows])


def read(folder) -> dict[str, np.ndarray]:
    """The columns in one of `make`'s folders, {name: [T, ...]} or, of documents, {name: [N, ...]}; on a disk of this machine
    they stay there until used. Raises UserError where they are damaged.
    """
    arrays, _ = whole(folder)
    return {name: x for name, x in arrays.items() if name not in (LENGTHS, DOCUMENTS)}


def by_token(folder) -> tuple[dict[str, Any], dict]:
    """(columns, meta) of a folder, with a value for each learned token [T, ...], as `datasets.batches` joins them: arrays, or
    where values are documents' what gives them in slices. Raises UserError where they are damaged.
    """
    arrays, meta = whole(folder)
    if (lengths := arrays.pop(LENGTHS, None)) is not None:
        del arrays[DOCUMENTS]
        return {name: _Spread(values, np.cumsum(lengths)) for name, values in arrays.items()}, meta
    return arrays, meta


class _Spread:
    """Documents' values [N, ...] as one for each of their learned tokens [T, ...], read in slices. ends: [N], running sums."""

    def __init__(self, values: np.ndarray, ends: np.ndarray):
        self.values, self.ends = values, ends
        self.shape, self.dtype = (int(ends[-1]), *values.shape[1:]), values.dtype

    def __getitem__(self, tokens: slice) -> np.ndarray:
        return self.values[np.searchsorted(self.ends, np.arange(tokens.start, tokens.stop), side="right")]


def shapes(folder) -> dict[str, dict]:
    """{name: {"shape": of one token's value, "dtype"}} of a folder's columns. Raises UserError where it is not finished."""
    facts = artefacts.read_meta(folder).get("facts", {})
    if "columns" not in facts:
        raise UserError(f"{folder}: is not finished, or holds no columns; run the command that makes it again.")
    return facts["columns"]


def whole(folder) -> tuple[dict[str, np.ndarray], dict]:
    """(the arrays of a folder, its meta). Raises UserError where one is damaged."""
    meta, arrays = artefacts.check(folder), {}
    for file in meta["files"]:
        path = epath.Path(folder) / file["file"]
        with cloud.local_copy(path) as copy:
            arrays[path.stem] = np.load(copy, mmap_mode=None if cloud.is_remote(path) else "r")
    return arrays, meta


def folders(annotations: str) -> list[epath.Path]:
    """The folders of columns that config.annotations names, with commas between. Raises UserError where there is none."""
    every = []
    for part in filter(None, (part.strip() for part in annotations.split(","))):
        if not (folder := cloud.path(part)).exists():
            raise UserError(f"config.annotations: no folder {folder}; give one that jaxpost.annotate wrote.")
        every += [folder] if (folder / "meta.json").exists() else [m.parent for m in sorted(folder.glob("*/meta.json"))]
    return every
