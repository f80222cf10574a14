"""What a workdir records of its stages, and what may change of them: nothing that is done.

    WORKDIR/stages/<name>.json    the settings that the stage was begun with

A stage that has begun is continued with the settings that it has. A workdir may get further stages, and a stage more steps,
where those that are taken stay what they are.
"""

import itertools
import json

import jax
import numpy as np
from etils import epath

from jaxpost import optim, recipe
from jaxpost.config import cli, links
from jaxpost.config.resolve import resolve
from jaxpost.declare import declared
from jaxpost.errors import UserError
from jaxpost.recipe import plain
from jaxpost.reporting import writers
from jaxpost.storage import checkpoint
from jaxpost.storage.host import read_object

LENGTHS = ("steps", "epochs")  # settings that may grow


def _path(workdir: epath.Path, name: str) -> epath.Path:
    return workdir / "stages" / f"{name}.json"


def _taken(workdir: epath.Path, name: str) -> int | None:
    """The latest step of a stage that has checkpoints; None for one that has none."""
    return max(checkpoint.steps(workdir / "checkpoints" / name), default=None)


def check(workdir: epath.Path, stages: list[tuple]) -> None:
    """Raises UserError for a workdir whose stages were begun with other settings, by an older jaxpost, or that is a model's."""
    config = read_object(workdir / "config.json") if (workdir / "config.json").exists() else {}
    if "model_type" in config:
        raise UserError(f"--workdir={workdir} is a model's folder, whose config.json a run would replace; give another.")
    begun = {name: taken for name, _ in stages if (taken := _taken(workdir, name)) is not None}
    for name, settings in stages:
        record = _path(workdir, name)
        if not record.exists():
            if name in begun:
                raise _of_older(workdir)
            continue
        if name not in begun and not begun.keys() & _users(name, stages):  # nothing of it is there yet, or has been used
            continue
        changes = recipe.difference(read_object(record)["settings"], settings.to_dict(), free=(*recipe.FREE, *_NOT_ITS_OWN))
        if longer := [line for line in changes if line.split(":")[0] in LENGTHS]:
            _check_unused(workdir, name, stages, begun, longer)
        if others := [line for line in changes if line not in longer]:
            raise _of_others(workdir, name, others)


_NOT_ITS_OWN = ("stages", "artefacts")


def left_out(workdir: epath.Path, stages: list[tuple]) -> list[str]:
    """The stages that a workdir has begun and that are not among these."""
    folder = workdir / "stages"
    begun = sorted(path.stem for path in folder.glob("*.json")) if folder.exists() else []
    return [name for name in begun if name not in dict(stages)]


def check_steps(workdir: epath.Path, name: str, settings, plan) -> None:
    """Raises UserError for a stage that has grown where its learning rate at steps that are taken would have been another."""
    path, steps = _path(workdir, name), getattr(plan, "steps", 0)
    if path.exists() and steps and (taken := _taken(workdir, name)) is not None:
        record = read_object(path)
        if (before := record["steps"]) and before != steps:
            _check_rates(workdir, name, settings, taken, before, steps)
            _check_last_batch(workdir, name, record, taken)


def begin(workdir: epath.Path, name: str, settings, plan) -> None:
    """Records the settings of a stage that begins or goes on."""
    path, steps = _path(workdir, name), getattr(plan, "steps", 0)
    if not steps and path.exists():  # an earlier stage is still to make its data
        steps = read_object(path)["steps"]
    if jax.process_index() == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = getattr(getattr(plan, "source", None), "epoch", 0)
        content = {"settings": json.loads(settings.to_json()), "steps": steps, "rows": rows}
        writers.replace(path, (json.dumps(content, indent=2) + "\n").encode())


def _check_rates(workdir, name: str, settings, taken: int, before: int, steps: int) -> None:
    if steps <= taken:
        raise UserError(f"{workdir}: {name} has taken {taken:,} steps, and {steps:,} are no more. {_new_run(workdir)}")
    old, new = (optim.schedule(settings.optimizer, n)(np.arange(taken)) for n in (before, steps))
    if not np.array_equal(np.broadcast_to(old, taken), np.broadcast_to(new, taken)):
        chosen = f"schedule={settings.optimizer.schedule!r} and warmup={settings.optimizer.warmup:g}"
        raise UserError(
            f"{workdir}: {name} has taken {taken:,} of {before:,} steps, and with {steps:,} their learning rates would have "
            f"been others, by {chosen}. Only a run that was begun with a constant schedule and a warm-up of 0, or of so many "
            f"steps, takes more. {_new_run(workdir)}"
        )


def _check_last_batch(workdir, name: str, record: dict, taken: int) -> None:
    """Raises UserError where the last batch of a stage's epochs was not full: further epochs would have filled it with rows."""
    s, rows = record["settings"], record.get("rows", 0)
    if not s["steps"] and taken == record["steps"] and (rest := rows * s["epochs"] % s["batch_size"]):
        raise UserError(
            f"{workdir}: the last batch of {name} had {rest} of {s['batch_size']} rows, which more epochs would have filled. "
            f"{_new_run(workdir)}"
        )


def _check_unused(workdir, name: str, stages: list[tuple], begun: dict, longer: list[str]) -> None:
    """Raises UserError for more steps of a stage that another one, which has begun, started from."""
    if users := begun.keys() & _users(name, stages):
        raise UserError(
            f"{workdir}: {name} has other settings ({'; '.join(longer)}), and {min(users)} has begun from what it was. "
            f"{_new_run(workdir)}"
        )


def _users(name: str, stages: list[tuple]) -> set[str]:
    """The stages that take what a stage makes, directly or through others."""
    users = set()
    for other, settings in stages:  # in order: a stage takes from earlier ones only
        if {name, *users} & (links.inputs(plain(settings)) | _weights_of(settings)):
            users.add(other)
    return users - {name}


def _weights_of(settings) -> set[str]:
    """The stages whose weights make columns of the objective."""
    try:
        columns = declared(resolve(plain(settings.objective), "objectives"), "columns")
    except UserError:  # which planning reports
        return set()
    return {column.weights[1:] for column in columns.values() if column.weights.startswith("@")}


def _of_others(workdir, name: str, changes: list[str]) -> UserError:
    prefix = "" if name == "train" else f"{name}."
    lines = "\n  ".join(prefix + line for line in changes)
    return UserError(
        f"{workdir} holds a run with other settings:\n  {lines}\nThe same settings continue it. {_new_run(workdir)}"
    )


def _of_older(workdir) -> UserError:
    about = workdir / "environment.json"
    version = read_object(about).get("jaxpost", "of an unknown version") if about.exists() else "of an unknown version"
    return UserError(
        f"{workdir}: its stages were begun by jaxpost {version}, whose runs this one does not continue. Continue them with "
        f"that version. {_new_run(workdir)}"
    )


def _new_run(workdir) -> str:
    """How a new run begins from a workdir's weights."""
    other = next(new for i in itertools.count(2) if not (new := workdir.parent / f"{workdir.name}-{i}").exists())
    command = cli.command({"workdir": str(other), "config.model": str(workdir)})
    how = f":\n  {command}\n" if command else f", with another workdir and model={str(workdir)!r}. "
    return (
        f"Other settings begin a new run from its weights{how}Its weights go on (their running mean, where it has one); the "
        "optimizer, the schedule and the position in the data begin anew."
    )
