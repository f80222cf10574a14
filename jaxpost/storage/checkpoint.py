"""Checkpoints. The only file that imports Orbax.

A stage keeps its checkpoints under workdir/checkpoints/<stage>/<step>: the last few and the best by a metric, each written
asynchronously and renamed into place when whole. A checkpoint holds `params` (the model's tree), `ema` where there is one,
`optimizer` (the rest of the train state), and `meta`: the data's position and the loop's own numbers, as JSON.

Frozen weights that another folder holds are not written again. `params` then has only the other leaves, by path. `meta` names
under `base` the folder of the frozen ones, their digest, and under `beside` the frozen leaves that the checkpoint holds itself;
under `adapter` the adapter around them. `models/loading.py` builds the tree from both. A teacher's head is named under
`elsewhere` and is not written.

Every checkpoint has digests of its files (`digests.py`), which are checked before Orbax reads any of them. Where the newest one
is damaged, readers take the one before, and the loop moves it aside.
"""

import asyncio
import functools
import sys
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.experimental import multihost_utils
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN
from orbax.checkpoint.path import atomicity

from jaxpost import sharding
from jaxpost.config.resolve import check_origin
from jaxpost.errors import UserError, first_line
from jaxpost.step import combine
from jaxpost.storage import cloud, digests, lock
from jaxpost.storage.host import read_object
from jaxpost.types import Params, TrainState


class _Renamed(atomicity.AtomicRenameTemporaryPath):
    """A temporary folder whose digests are written before it is renamed."""

    async def finalize(self):
        await asyncio.to_thread(_write_digests, self.get())
        await super().finalize()


class _Marked(atomicity.CommitFileTemporaryPath):
    """A folder in a bucket whose digests are written before the object that marks it as whole."""

    async def finalize(self):
        await asyncio.to_thread(_write_digests, self.get())
        await super().finalize()


def _write_digests(folder: epath.Path) -> None:
    if (folder / "meta").exists():  # a whole checkpoint, not one item of it
        digests.write(folder)


class Checkpoints:
    """The checkpoints of one stage. The `keep` latest stay, and the best by `best` ("eval/loss"; lower is better unless
    `highest`). Damaged ones that are newer than the newest whole one are moved aside.

    Raises UserError where there are checkpoints and none is whole.
    """

    def __init__(self, folder, *, keep: int = 2, best: str = "", highest: bool = False):
        policies = [LatestN(n=keep)]
        if best:
            # Orbax ranks ascending; reverse puts the lowest value on top. Steps without an evaluation rank last; the latest of
            # them comes first, which is kept anyway.
            worst = -np.inf if highest else np.inf
            policies.append(
                BestN(
                    get_metric_fn=lambda m: m.get(best, worst), reverse=not highest, n=1, keep_checkpoints_without_metrics=False
                )
            )
        self.best = best
        self.folder = absolute(folder)
        if jax.process_index() == 0:
            _set_aside(self.folder)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices(f"damaged checkpoints of {self.folder}")
        options = ocp.CheckpointManagerOptions(
            preservation_policy=AnyPreservationPolicy(policies),
            # Orbax ignores it beside a policy, but without it keeps no metrics for the next process.
            best_fn=lambda m: m.get(best, np.nan),
            enable_async_checkpointing=True,
            cleanup_tmp_directories=True,
            temporary_path_class=_Marked if cloud.is_remote(self.folder) else _Renamed,
        )
        self.manager = ocp.CheckpointManager(self.folder, options=options)

    def save(self, state: TrainState, meta: dict, metrics: dict[str, float] | None = None) -> None:
        """Starts writing the state; returns when it is copied off the device.

        meta: with a `base`, only frozen weights that the base lacks are written; leaves in `elsewhere` are never written.
        metrics: of this state, or None where it was not evaluated (it is then no candidate for the best). Raises UserError
        where another run has taken over the workdir.
        """
        lock.check(self.folder)
        step = int(state.step)
        metrics = {k: v for k, v in (metrics or {}).items() if k == self.best and np.isfinite(v)}
        items = {k: ocp.args.StandardSave(v) for k, v in _items(state, meta).items()}
        meta = meta | {digests.MARK: digests.NAME}
        self.manager.save(step, args=ocp.args.Composite(meta=ocp.args.JsonSave(meta), **items), metrics=metrics, force=True)

    def latest(self) -> int | None:
        """The newest whole checkpoint's step."""
        return self.manager.latest_step()

    def steps(self) -> list[int]:
        """The steps of all whole checkpoints."""
        return list(self.manager.all_steps())

    def meta(self, step: int) -> dict:
        """The JSON part of a checkpoint. Raises UserError as `read_meta` does."""
        meta = self.manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]
        return _believable(meta, self.folder / str(step))

    def restore(self, step: int, abstract: TrainState, below: Params = None) -> TrainState:
        """The state at a step, with the shardings of `abstract`; any mesh can read what any other wrote.

        below: where frozen weights are elsewhere, a tree of parameters that has them.
        """
        meta = self.meta(step)
        items = {k: ocp.args.StandardRestore(v) for k, v in _items(abstract, meta).items()}
        restored = self.manager.restore(step, args=ocp.args.Composite(**items))
        rest, params = restored["optimizer"], restored["params"]
        if meta.get("base"):
            params = _over(params, below)
        elif elsewhere := meta.get("elsewhere"):
            flat, others = flatten_dict(params, sep="/"), flatten_dict(below, sep="/")
            params = unflatten_dict(flat | {path: others[path] for path in elsewhere}, sep="/")
        train = jax.tree.map(lambda a, x: None if a is None else x, abstract.train, params, is_leaf=lambda x: x is None)
        frozen = jax.tree.map(lambda a, x: None if a is None else x, abstract.frozen, params, is_leaf=lambda x: x is None)
        mean = None if abstract.ema is None else _unflat(restored["ema"], abstract.ema)
        return TrainState(train=train, frozen=frozen, ema=mean, **rest)

    def reached_preemption(self, step: int) -> bool:
        """Whether the cluster asked every process to stop at this step (several processes agree on one)."""
        return self.manager.reached_preemption(step)

    def close(self) -> None:
        """Waits for pending writes and ends the threads."""
        self.manager.close()


def _items(state: TrainState, meta: dict) -> dict[str, Any]:
    base, elsewhere = meta.get("base"), meta.get("elsewhere")
    rest = {k: getattr(state, k) for k in ("step", "opt_state", "key", "skipped", "streak")}
    params = combine(state.train, state.frozen)
    if base is not None:
        params = _flat(state.train) | {k: v for k, v in _flat(state.frozen).items() if k in base["beside"]}
    elif elsewhere:
        flat = flatten_dict(params, sep="/")
        params = unflatten_dict({path: x for path, x in flat.items() if path not in elsewhere}, sep="/")
    items = {"params": params, "optimizer": rest}
    return items if state.ema is None else {**items, "ema": _flat(state.ema)}


def _flat(tree: Params) -> dict[str, Any]:
    """A tree with missing leaves as {path: leaf}."""
    return {sharding.path_name(path).replace("/", "."): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _unflat(flat: dict[str, Any], like: Params) -> Params:
    """The inverse of _flat, with `like`'s structure; None where flat has no leaf."""
    return jax.tree_util.tree_map_with_path(lambda path, _: flat.get(sharding.path_name(path).replace("/", ".")), like)


def _over(flat: dict[str, Any], tree: Params) -> Params:
    """The tree with the leaves that `flat` has replaced."""
    keep = {"is_leaf": lambda x: x is None}
    return jax.tree_util.tree_map_with_path(lambda p, x: flat.get(sharding.path_name(p).replace("/", "."), x), tree, **keep)


def find_step(folder) -> epath.Path:
    """The newest whole checkpoint of a workdir's result stage (else of its last stage that has one), or of a stage's folder.

    A checkpoint's own folder gives itself. Newer damaged ones are skipped and named on stderr. Raises UserError if there is
    none, or none that is whole.
    """
    folder = epath.Path(folder)
    if not folder.exists():
        raise UserError(f"{folder}: no such folder; give a workdir that jaxpost.train made, or one of its checkpoints.")
    if (folder / "params").exists() or (folder / digests.NAME).exists():
        check(folder)
        return folder
    if (folder / "checkpoints").exists():
        config = read_object(folder / "config.json")
        names = config.get("stages") or ["train"]
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise UserError(f"{folder / 'config.json'}: `stages` is a list of names, and this is {str(names)[:60]}.")
        stages = [folder / "checkpoints" / name for name in names]
        folders = [x for x in stages if x.exists() and steps(x)]
        folders = [x for x in folders if x.name == config.get("result")] or folders
        folder = folders[-1] if folders else folder / "checkpoints"
    step, damaged = _newest_whole(folder)
    if step is None:
        raise UserError(f"{folder}: no checkpoint there yet.")
    for fault in damaged.values():
        print(f"damaged checkpoint: {fault}; taking step {step} instead.", file=sys.stderr)
    return folder / str(step)


def check(step_folder) -> None:
    """Raises UserError for a checkpoint whose files have changed, naming the first such file."""
    if fault := digests.damage(absolute(step_folder)):
        raise UserError(
            f"{step_folder}: a damaged checkpoint: {fault}. Bring that file back from a copy, or take another step."
        )


def _newest_whole(folder: epath.Path) -> tuple[int | None, dict[int, str]]:
    """(a stage's newest whole step, {newer step: its damage}); (None, {}) where there are no steps.

    Raises UserError where there are steps and none is whole.
    """
    damaged = {}
    for step in reversed(steps(folder)):
        fault = digests.damage(folder / str(step))
        if not fault:
            return step, damaged
        damaged[step] = fault
    if damaged:
        raise UserError(
            f"{folder}: none of its checkpoints is whole: {'; '.join(damaged.values())}. Bring the files back from a copy, or "
            "delete this folder, and the same command begins the stage anew."
        )
    return None, damaged


def _set_aside(folder: epath.Path) -> None:
    """Renames damaged checkpoints that are newer than the newest whole one, so that their steps can be written again."""
    step, damaged = _newest_whole(folder) if folder.exists() else (None, {})
    for number, fault in damaged.items():
        names = (f"damaged-{number}" + f"-{i}" * (i > 1) for i in range(1, 1000))
        target = next(folder / name for name in names if not (folder / name).exists())
        (folder / str(number)).rename(target)
        print(f"damaged checkpoint: {fault}; moved to {target}, going on from step {step}.", file=sys.stderr)


def steps(folder: epath.Path) -> list[int]:
    """The steps of the finished checkpoints in a stage's folder, in order; empty where there is no folder."""
    if not folder.is_dir():
        return []
    # In an object store, a checkpoint that is being written has its final name but lacks the object that marks it as whole.
    # Other names, such as a copy called 0007, are not ours.
    numbered = (p for p in folder.iterdir() if p.name.isdecimal() and p.name == str(int(p.name)) and p.is_dir())
    return sorted(int(p.name) for p in numbered if ocp.utils.is_checkpoint_finalized(p))


def read_meta(step_folder) -> dict:
    """The JSON part of one checkpoint's folder; empty where there is none. Raises UserError where its adapter is a function
    that is neither jaxpost's own nor named by the user.
    """
    folder = absolute(step_folder)
    if not (folder / "meta").exists():
        return {}
    try:
        with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as reader:
            meta = reader.restore(folder / "meta")
    except (ValueError, RecursionError) as error:
        raise UserError(f"{folder / 'meta' / 'metadata'}: no JSON ({first_line(error)}); take another checkpoint.") from error
    return _believable(meta, folder)


def _believable(meta: Any, folder: epath.Path) -> dict:
    """A checkpoint's meta. Raises UserError where it is not as `save` writes it, or names a foreign adapter."""
    file = folder / "meta" / "metadata"
    if not isinstance(meta, dict):
        raise UserError(f"{file}: holds a JSON {type(meta).__name__}, not an object; take another checkpoint.")
    base, leaves = meta.get("base"), meta.get("leaves") or {}
    strings = [base.get("reference"), base.get("hash")] if isinstance(base, dict) else [base or ""]
    strings += beside if isinstance(beside := base.get("beside") if isinstance(base, dict) else [], list) else [None]
    if not all(isinstance(x, str) for x in strings) or (base and not isinstance(base, dict)):
        raise UserError(f"{file}: `base` names no folder of frozen weights, but {str(base)[:60]}; take another checkpoint.")
    if not isinstance(leaves, dict) or not all(_is_leaf(leaf) for leaf in leaves.values()):
        raise UserError(f"{file}: `leaves` describes no weights, but {str(leaves)[:60]}; take another checkpoint.")
    if adapter := meta.get("adapter"):
        for entry in adapter if isinstance(adapter, list) else [adapter]:
            check_origin(entry, "adapters", file)
    return meta


def _is_leaf(entry: Any) -> bool:
    """Whether an entry is (letters, first value), as ModelSpec.leaves has them."""
    letters, first = entry if isinstance(entry, list | tuple) and len(entry) == 2 else (None, None)
    drawn = isinstance(first, dict) and first.keys() == {"normal"} and isinstance(first["normal"], int | float)
    return (
        isinstance(letters, str) and set(letters) <= set("DVT0123456789 ") and (isinstance(first, int | float | str) or drawn)
    )


def paths(step_folder, item: str = "params") -> list[str]:
    """The paths of the leaves that one checkpoint holds itself, with dots as separators."""
    # The handler itself: through a checkpointer, Orbax warns of a missing file that only whole checkpoints have.
    return sorted(ocp.PyTreeCheckpointHandler().metadata(absolute(step_folder) / item).tree.keys())


def load_params(step_folder, abstract: Params, below: Params = None) -> Params:
    """The parameters of one checkpoint, with the shardings of `abstract`: the running mean where it has one, else the weights.

    below: where frozen weights are elsewhere, the whole tree of parameters with them.
    """
    folder, flat = absolute(step_folder), _flat(abstract)
    _check_shapes(folder, flat, whole=below is None)
    with ocp.StandardCheckpointer() as reader:

        def some(item):
            return reader.restore(folder / item, {k: flat[k] for k in paths(folder, item)})

        params = reader.restore(folder / "params", abstract) if below is None else _over(some("params"), below)
        return _over(some("ema"), params) if (folder / "ema").exists() else params


def shapes(step_folder) -> dict[str, tuple[int, ...]]:
    """{path: shape} of the leaves that one checkpoint holds itself, with / between the names."""
    return {path.replace(".", "/"): tuple(x.shape) for path, x in _stored(absolute(step_folder) / "params").items()}


def load_leaf(step_folder, path: str) -> np.ndarray:
    """One leaf of a checkpoint, on the host: the running mean where it has one, else the weight."""
    folder, name = absolute(step_folder), path.replace("/", ".")
    item = "ema" if (folder / "ema").exists() and name in _stored(folder / "ema") else "params"
    tree = ocp.PyTreeCheckpointHandler().metadata(folder / item).tree
    keys = [name] if name in tree else path.split("/")
    wanted = functools.reduce(lambda inner, key: {key: inner}, reversed(keys), ocp.RestoreArgs(restore_type=np.ndarray))
    args = ocp.args.PyTreeRestore(item=jax.tree.map(lambda _: 0, wanted), restore_args=wanted, partial_restore=True)
    # The handler itself: a checkpointer waits for the other processes, which may read the leaves in another order.
    return jax.tree.leaves(ocp.PyTreeCheckpointHandler().restore(folder / item, args=args))[0]


def _stored(folder: epath.Path) -> dict[str, Any]:
    """{path with dots: shape and dtype} of an item's leaves."""
    return {k: x for k, x in _flat(ocp.PyTreeCheckpointHandler().metadata(folder).tree).items() if hasattr(x, "shape")}


def _check_shapes(folder: epath.Path, flat: dict[str, Any], *, whole: bool) -> None:
    """Raises UserError where a checkpoint's weights do not have the model's names and shapes, naming the first.

    whole: whether the checkpoint must have all of the model's weights.
    """
    stored = ocp.PyTreeCheckpointHandler().metadata(folder / "params").tree
    stored = {k: tuple(x.shape) for k, x in (_flat(stored) if whole else stored).items() if hasattr(x, "shape")}
    expected = {k: tuple(x.shape) for k, x in flat.items() if whole or k in stored}
    if differing := sorted(k for k in stored.keys() | expected.keys() if stored.get(k) != expected.get(k)):
        name = differing[0]
        raise UserError(
            f"{folder}: holds {name} {_shape_of(name, stored)}, and the model as its config.json describes it has it "
            f"{_shape_of(name, expected)}; bring back the config.json that the run wrote (model/ in its workdir)."
        )


def _shape_of(name: str, shapes: dict[str, tuple]) -> str:
    return f"as {shapes[name]}" if name in shapes else "nowhere"


def absolute(folder) -> epath.Path:
    """A folder's absolute path; a remote path is returned unchanged."""
    folder = epath.Path(folder)
    return folder if "://" in str(folder) else folder.absolute()
