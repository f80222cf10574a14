"""One process of several, or all there is: the same work either way, for test_multiprocess.py to compare.

    python tests/worker.py <part> <processes> <number of this one> <port> <folder>

The part `steps` writes what the steps of some objectives gave on the stub (`steps.json`); the part `stages` a workdir `run` of
a recipe with an SFT and a GRPO stage, and what of its rollouts this process had (`sampled-<number>.npz`). The part `failing`
writes what a stage whose reward fails in one process alone was told (`told-<number>.txt`).
"""

import json
import os
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import runs
import stubs

from jaxpost import metrics, recipe, sharding, train
from jaxpost.config import resolve
from jaxpost.errors import UserError
from jaxpost.rollouts.scoring import Scorer
from jaxpost.rollouts.source import Rollouts
from jaxpost.step import make_step
from jaxpost.types import TrainState

MESH = {"data": 2, "fsdp": 2, "tensor": 2}
LENGTH = """
def length(record, completion):
    return len(completion) / 3 if completion else None
"""
FAILS = """
import jax

CALLS = []


def fails(record, completion):
    CALLS.append(record)
    if jax.process_index() and len(CALLS) > 18:  # the start's two evaluations, of nine problems each
        raise RuntimeError("the disk of this machine is full")
    return 1.0
"""
OBJECTIVES = ("sft.nll", "sft.dft", "policy_gradient.reinforce", "matched")


def steps(mesh) -> dict:
    """objective -> its metrics at each of two SGD steps, and the norm of every gradient leaf, in two microbatches."""
    tx, found = optax.chain(optax.trace(0.0), optax.scale(-0.05)), {}

    def start():
        params, zero = stubs.init(), jnp.zeros((), jnp.int32)
        nothing = jax.tree.map(lambda _: None, params)
        return TrainState(zero, params, nothing, tx.init(params), None, jax.random.PRNGKey(3), zero, zero)

    first, last = sharding.local_rows(mesh, stubs.ROWS)
    places = sharding.stored(mesh, jax.eval_shape(start))
    for name in OBJECTIVES:
        objective = stubs.TOYS.get(name) or resolve.find(name, "objectives")
        step = make_step(stubs.forward, objective, tx, microbatches=2)
        step = jax.jit(step, out_shardings=(places, sharding.replicated(mesh)))
        state, found[name] = jax.jit(start, out_shardings=places)(), []
        for seed in (1, 2):
            batch = stubs.pack(stubs.documents(seed))
            own = {k: v[first:last] if v.ndim else v for k, v in batch.items()}
            state, measured = step(state, sharding.distribute(own, mesh, stubs.ROWS))
            gradients = {}
            for path, leaf in jax.tree_util.tree_leaves_with_path(state.opt_state[0].trace):
                gradients[sharding.path_name(path)] = sharding.everywhere(leaf).ravel().tolist()
            found[name].append({"metrics": metrics.values(measured), "gradients": gradients})
    return found


def stages(number: int, folder: Path) -> None:
    """A recipe with an SFT and a GRPO stage, in `run`; the rollouts' tokens and advantages beside it, and the numbers of the
    completions that this process judged.
    """
    sampled, judged, make, submit = {}, [], Rollouts.__call__, Scorer.submit

    def remembered(self, state):
        batch = make(self, state)
        sampled.update({f"{name}-{len(sampled) // 2}": batch[name] for name in ("tokens", "advantages")})
        return batch

    def noted(self, key, record, completion):
        judged.append(key)
        return submit(self, key, record, completion)

    Rollouts.__call__, Scorer.submit = remembered, noted
    rewards = {"digits": {"name": "task", "weight": 0.1}, "length": {"name": f"{folder / 'mine.py'}:length", "weight": 0.3}}
    (folder / "mine.py").write_text(LENGTH)
    options = {"source": "rollouts", "objective": {"name": "policy_gradient.grpo"}, "steps": 4, "best": "", "reward": rewards}
    options |= {"rollouts": {"minibatches": 2, "lag": 1}, "save_every": 1}
    both = {"sft": {"steps": 4, "microbatches": 2, "best": ""}, "reinforce": options}
    settings = runs.settings(folder, stages=("sft", "reinforce"), mesh=MESH, **both)
    # In effect plain descent, by an eps above every gradient: Adam would turn the rounding of a tiny gradient into a step.
    settings["optimizer"] = {"lr": 1e-1, "schedule": "constant", "warmup": 0, "eps": 10.0}
    train.run(recipe.make(**settings), folder / "run")
    np.savez(folder / f"sampled-{number}.npz", judged=np.array(judged), **sampled)


def failing(number: int, folder: Path) -> None:
    """A stage whose reward fails on completions of the second process alone."""
    (folder / "mine.py").write_text(FAILS)
    options = {"source": "rollouts", "objective": {"name": "policy_gradient.reinforce"}, "steps": 2, "best": ""}
    # Judged in this process: a worker counts its own calls, and has no index among the processes.
    rollouts = {"group": 4, "prompt_window": 12, "new": 6, "reward_workers": 0}
    options |= {"reward": f"{folder / 'mine.py'}:fails", "rollouts": rollouts}
    try:
        train.run(recipe.make(**runs.settings(folder, mesh=MESH, **options)), folder / "run")
    except UserError as error:
        (folder / f"told-{number}.txt").write_text(str(error))


def unequal(number: int, folder: Path) -> None:
    """A stage whose data file, of one name, has a row more where the second process runs."""
    (folder / str(number)).mkdir()
    os.chdir(folder / str(number))
    Path("data.jsonl").write_text("".join(json.dumps({"text": f"{i}+{i}"}) + "\n" for i in range(40 + number)))
    try:
        train.run(recipe.make(**runs.settings(folder, mesh=MESH, steps=2, data="data.jsonl", held_out=0)), folder / "run")
    except UserError as error:
        (folder / f"told-{number}.txt").write_text(str(error))


def main(part: str, processes: int, number: int, port: int, folder: Path) -> None:
    """Joins the other processes and does the part."""
    if processes > 1:
        jax.distributed.initialize(f"127.0.0.1:{port}", processes, number, initialization_timeout=60)
    if part in ("stages", "failing", "unequal"):
        return {"stages": stages, "failing": failing, "unequal": unequal}[part](number, folder)
    mesh = sharding.make_mesh(**MESH)
    with sharding.use(mesh):
        found = steps(mesh)
    if number == 0:
        (folder / "steps.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:5]), Path(sys.argv[5]))
