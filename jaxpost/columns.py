"""A frozen model is a column: made once for a data set, kept on disk, and read back into its batches.

A column has a number (or several) for each token that is learned, in the order of the data set's examples, so it does not
depend on how they are packed. It lies in a folder of its own,

    OUT/<key>/meta.json        whose data, which annotator, which weights; written last, and what says that all is there
              <column>.npy     [T, ...]: T learned tokens

whose key is a digest of the tokens (which are all that a model sees of text, tokenizer and template), of the annotator with its
options and source, of the weights, and of the batches' shape. Rows are scored packed as the training's are, in batches of the
training's shape and by a program of their own, so that the numbers are bit for bit what that program gives on the training's
batches. Until all of them are there they lie in parts, and a run that was killed goes on after the last part. What is damaged,
by the CRC-32C of a column in meta.json or the one that a part has inside, is made again by whoever can, and else refused.

A stage whose objective reads `ref_logps` makes that column itself, before its first step, with the weights that it starts
from. For an adapter that is new these are the base's, since it adds nothing yet. Nothing else of the reference is kept.
"""

import contextlib
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
from jaxpost.naming import digest_of
from jaxpost.resolve import resolve
from jaxpost.stages import datasets
from jaxpost.stages.plan import Plan
from jaxpost.types import Params
from jaxpost.unread import shares

REFERENCE = "ref_logps"  # the column that a stage makes itself, and the annotator that does
# A part is written after so many seconds, or bytes: what a kill costs.
SECONDS, BYTES = 20.0, 2**26


def identity(spec: loading.ModelSpec, seed: int) -> dict[str, Any]:
    """What tells a stage's first weights from any others: a digest of their files, or what fresh ones are drawn from."""
    drawn = {"config": dict(spec.config), "seed": seed} if spec.folder is None else {}
    files = "" if spec.folder is None else fingerprint.digest(spec.folder)
    return {"files": files, **drawn, "adapter": loading.recorded(spec.adapter)}


def make(what: Mapping | str, plan: Plan, spec: loading.ModelSpec, params: Callable[[], Params], out, mesh) -> list:
    """The folders under `out` of an annotator's columns for each of a stage's data sets; whatever is not there yet is made.

    what: the annotator's entry, a bare name being one of annotators/scores.py; spec: the model, which says what `params`
    gives: its weights in their place on the mesh, which are asked for only if needed. Raises UserError for an unknown
    annotator, and for one that gives no columns.
    """
    what = {"name": what} if isinstance(what, str) else dict(what)
    if str(what.get("name", "")).isidentifier():
        what["name"] = f"scores.{what['name']}"
    annotator, s = resolve(what, "annotators"), plan.settings
    # The annotator's source too: one of the user's own may change under its name.
    recorded = {**what, "does": digest_of(annotator)}
    told = {"what": recorded, "weights": identity(spec, s.seed)}
    told |= {k: s[k] for k in ("window", "packing", "seed", "batch_size", "dtype")}
    program, folders = _program(annotator, spec.transformer.forward), []
    weights = None
    for one in plan.sets:
        meta = {"data": one.encoded.digest, **told}
        folder = epath.Path(out) / hashlib.sha256(json.dumps(meta, sort_keys=True, default=str).encode()).hexdigest()[:16]
        folders.append(folder)
        if _there(folder):
            _tell(f"{one.name}: {what['name'].rpartition('.')[2]} is in {folder} already; nothing to do")
            continue
        weights = params() if weights is None else weights
        _score(one, program, weights, s, mesh, folder)
        if jax.process_index() == 0:
            _gather(one, s, folder, meta)
        _tell(f"{one.name}: wrote {what['name'].rpartition('.')[2]} of {one.encoded.learned.sum():,} tokens to {folder}")
        sharding.agree(0.0)  # nobody reads before all is written
    return folders


def _there(folder: epath.Path) -> bool:
    """Whether a folder has all of its columns, the first process's view; it deletes the meta of damaged ones."""
    there = (folder / "meta.json").exists()
    if there and jax.process_index() == 0:
        try:
            _read(folder, _meta(folder))
        except (FileNotFoundError, ValueError) as e:
            _tell(f"{folder}: damaged columns ({first_line(e)}); they are made again")
            (folder / "meta.json").unlink()
            there = False
    return bool(sharding.agree(float(there)))


def _tell(text: str) -> None:
    if jax.process_index() == 0:
        print(text, file=sys.stderr)


def _program(annotator: Callable, forward: Callable) -> Callable:
    return jax.jit(lambda params, batch: annotator(forward, params, batch))


def _score(one: datasets.Set, program: Callable, params: Params, s, mesh, folder: epath.Path) -> None:
    """Scores the batches that no part in the folder holds yet, part after part."""
    local = sharding.local_rows(mesh, s.batch_size)
    batches = source.Batches(datasets.rows(one, s, {}), s.batch_size, seed=0, shuffle=False, epochs=1, local=local)
    first = int(sharding.agree(_scored(folder) if jax.process_index() == 0 else 0))
    batches.position, held, since = first, [], time.monotonic()
    for at in tqdm.tqdm(range(first, len(batches)), desc=f"annotating {one.name}", unit="batch", disable=None):
        batch = sharding.distribute(batches(), mesh, s.batch_size)
        if at == first:
            _check(jax.eval_shape(program, params, batch), batch["mask"].shape)
        mask = sharding.everywhere(batch["mask"])
        held.append({name: sharding.everywhere(x)[mask] for name, x in program(params, batch).items()})
        full = time.monotonic() - since >= SECONDS or sum(x.nbytes for part in held for x in part.values()) >= BYTES
        if full or at + 1 == len(batches):
            if jax.process_index() == 0:
                content = io.BytesIO()
                np.savez(content, **{name: np.concatenate([part[name] for part in held]) for name in held[0]})
                folder.mkdir(parents=True, exist_ok=True)
                writers.replace(folder / f"part-{at + 1:08d}.npz", content.getvalue())
            held, since = [], time.monotonic()


def _scored(folder: epath.Path) -> int:
    """After how many batches the last whole part in a folder ends; deletes a damaged one, and those after it."""
    parts = _parts(folder)
    whole = next((i for i, part in enumerate(parts) if not read_arrays(part)), len(parts))
    for part in parts[whole:]:
        _tell(f"{part}: it or a part before it is damaged; it is made again")
        part.unlink()
    return int(parts[whole - 1].name[5:13]) if whole else 0


def _parts(folder: epath.Path) -> list[epath.Path]:
    return sorted(folder.glob("part-*.npz"), key=lambda p: p.name) if folder.exists() else []


def _check(columns: Any, shape: tuple[int, int]) -> None:
    good = isinstance(columns, dict) and all(getattr(x, "shape", ())[:2] == shape for x in columns.values())
    if not good or not columns:
        raise UserError(
            f"an annotator returns {{column: array [B,S,...]}} with [B,S] = {list(shape)}; this one gave {columns}."
        )


def _gather(one: datasets.Set, s, folder: epath.Path, meta: dict) -> None:
    """Puts the parts' numbers, which lie in the order of the rows, into that of the examples, and says that all is there."""
    learned = one.encoded.learned
    order = np.concatenate(source.bins(one.encoded.lengths, s.window, packing=s.packing, seed=s.seed))
    begins = (np.cumsum(learned) - learned)[order]
    before = np.cumsum(learned[order]) - learned[order]
    places = np.repeat(begins - before, learned[order]) + np.arange(learned.sum())
    parts = _parts(folder)
    with np.load(io.BytesIO(parts[0].read_bytes())) as part:
        kinds, sums = {name: (part[name].shape[1:], part[name].dtype) for name in part.files}, {}
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
    writers.replace(folder / "meta.json", (json.dumps(meta | {"columns": about}, indent=2, default=str) + "\n").encode())
    for part in parts:
        part.unlink()


def read(folder) -> dict[str, np.ndarray]:
    """The columns in one of `make`'s folders, {name: [T, ...]}; on a disk of this machine they stay there until used.

    Raises UserError where they are damaged.
    """
    folder = epath.Path(folder)
    with _refused(folder):
        return _read(folder, _meta(folder))


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


def _read(folder: epath.Path, meta: Mapping) -> dict[str, np.ndarray]:
    """The columns that a meta names. Raises FileNotFoundError or ValueError where one is gone or damaged."""
    columns = {}
    for name, about in meta["columns"].items():
        file = folder / f"{name}.npy"
        with cloud.local_copy(file) as copy:
            if about.get("crc32c") not in (None, digests.checksum(epath.Path(copy))):  # None: an older jaxpost's
                raise ValueError(f"{file} was changed")
            try:
                columns[name] = np.load(copy, mmap_mode=None if cloud.is_remote(file) else "r")
            except (EOFError, ValueError) as e:
                raise ValueError(f"{file}: {first_line(e)}") from e
    return columns


def annotated(plan: Plan, mesh) -> Plan:
    """The plan with the columns that config.annotations names in its batches.

    Raises UserError where they are of other data, and for a column that the objective reads and nothing gives.
    """
    if "rollouts" in shares(plan.settings.source):  # which ask whoever makes them, batch by batch
        columns = {REFERENCE, "returns", "margins", *declared(plan.objective, "current")}
        columns |= {"teacher_hidden"} if loading.others(plan.spec) else set()
        if lacking := [name for name in plan.reads if name not in columns]:
            raise UserError(f"config.objective: it reads the column {lacking[0]}, which rollouts do not have.")
        return plan
    if plan.settings.source == "samples":  # there is no data yet to have columns
        if lacking := [name for name in plan.reads if name != REFERENCE]:
            raise UserError(f"config.objective: it reads the column {lacking[0]}, which samples cannot have; name a data set.")
        return plan
    folders = [cloud.path(part.strip()) for part in plan.settings.annotations.split(",") if part.strip()]
    used = [plan.data]
    made = {one.encoded.digest: {} for one in plan.sets}
    for file in [meta for folder in folders for meta in sorted(_metas(folder))]:
        with _refused(file.parent):
            meta = _meta(file.parent)
        of = made.get(meta["data"])
        if of is not None:
            found = read(file.parent)
            _check_teacher(plan, meta, found)
            if twice := of.keys() & found.keys():
                raise UserError(
                    f"config.annotations: {', '.join(twice)} is there twice, in {file.parent} again; name one folder."
                )
            of |= found
            used.append(file.parent.name)
    if folders and not all(made.values()):
        raise UserError(
            f"config.annotations: {plan.settings.annotations} has no columns for this data, or not for all of it (held-out "
            "rows too), with this tokenizer, template and window; run jaxpost.annotate with the same settings."
        )
    lacking = [name for name in plan.reads if name != REFERENCE and not all(name in of for of in made.values())]
    if lacking or (plan.reads and not plan.sets):
        name = (lacking or plan.reads)[0]
        raise UserError(
            f"config.objective: it reads the column {name}, which its batches do not have; have jaxpost.annotate make it of "
            "the data, and name the folder in config.annotations."
        )
    if not folders:
        return plan
    # A run is never continued with what another model said of the same data.
    data = hashlib.sha256(" ".join(used).encode()).hexdigest()[:16]
    return _joined(plan._replace(data=data), made, mesh)


def _check_teacher(plan: Plan, meta: dict, found: Mapping) -> None:
    """Raises UserError where states are another model's than the head that will read them."""
    for name in loading.others(plan.spec).values() if "teacher_hidden" in found else ():
        if meta["weights"]["files"] != fingerprint.digest(loading.describe(name, text=False).folder):
            raise UserError(
                f"config.objective.teacher: {name} is not the model that wrote teacher_hidden in config.annotations, or has "
                "changed since; name that one, or have jaxpost.annotate write its states."
            )


def _metas(folder: epath.Path) -> list[epath.Path]:
    if not folder.exists():
        raise UserError(f"config.annotations: no folder {folder}; give one that jaxpost.annotate wrote.")
    return list(folder.glob("*/meta.json"))


def referenced(plan: Plan, spec: loading.ModelSpec, params: Callable[[], Params], out, mesh) -> Plan:
    """The plan with the reference's column in its batches, where its objective reads one that nothing else gave; see `make`."""
    if REFERENCE not in plan.reads or (plan.made and all(REFERENCE in of for of in plan.made.values())):
        return plan
    if jax.process_index() == 0:
        print(f"{plan.name}: the reference is the model as it starts; its column {REFERENCE} is made once", file=sys.stderr)
    folders = make(REFERENCE, plan, spec, params, out, mesh)
    columns = {one.encoded.digest: read(folder) for one, folder in zip(plan.sets, folders, strict=True)}
    return _joined(plan, {key: {**plan.made.get(key, {}), **own} for key, own in columns.items()}, mesh)


def _joined(plan: Plan, made: dict, mesh) -> Plan:
    stream, held_out = datasets.batches(plan.sets, plan.settings, mesh, made)
    return plan._replace(source=stream, held_out=held_out, made=made)
