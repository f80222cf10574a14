"""A run: its stages, one after the other.

    python -m jaxpost.train --config=configs/quickstart.py --workdir=/tmp/quickstart

A stage makes one artefact of earlier ones: weights, rows, columns of rows, or figures; `stages/` has a file for each kind, and
`stages/train.py` the one loop. All stages are checked before the first begins. The same command continues a run that was
interrupted, exactly where it was; a finished run takes further stages, and more steps where they change nothing that is done.

From Python it is the same, with functions where a recipe has names:

    jaxpost.train("configs/sft.py", "runs/mine", model="FOLDER", data="FILE.jsonl", objective=my_loss)
"""

import contextlib
import copy
import json
import os
import sys
import time
import types
from collections.abc import Iterator

import jax
import numpy as np
from absl import flags
from etils import epath
from ml_collections import ConfigDict

from jaxpost import recipe, sharding
from jaxpost.config import cli, resolve
from jaxpost.errors import UserError
from jaxpost.models import checks, loading
from jaxpost.reporting import report, writers
from jaxpost.stages import annotate, datasets, evaluate, evaluation, generate, merge, records, select, train
from jaxpost.stages.agreement import check_inputs, check_settings
from jaxpost.stages.plan import Plan
from jaxpost.stages.run import Output, Run
from jaxpost.stages.stopping import StopRequest, leave
from jaxpost.storage import cloud, compile_cache, lock
from jaxpost.storage.artefacts import key
from jaxpost.storage.host import CONTINUES, check_writable, disk_errors

FEW = 20  # steps; where epochs give fewer, a message says why
TURN = 2.0  # seconds between two looks whether another process has left a model's workdir
# What a stage does: a module with `planned`, which checks it, `output`, what later ones are told of it, and `make`.
DO = {
    "train": train,
    "generate": generate,
    "annotate": annotate,
    "select": select,
    "merge": merge,
    "evaluate": evaluate,
}


def run(config, workdir, *, trust=(), **changes) -> dict[str, float]:
    """Runs (or continues) a recipe's stages in a workdir; returns the last stage's figures.

    config: a ConfigDict as `recipe.make` gives, a recipe's path, or None for the defaults. changes: settings that differ from
    it; `objective`, `reward` and `task` may be the function or object itself, of which config.json keeps the name (`naming`).
    trust: functions of yours, FILE.py:function, that models' files may name.
    Raises UserError, before anything is compiled, for whatever the recipe gets wrong, and SystemExit after saving when
    the process is asked to stop (0 for SIGTERM, 130 for Ctrl-C).
    """
    *_, last = outputs(config, workdir, trust=trust, **changes).values()
    return dict(last.figures)


def outputs(config, workdir, *, trust=(), **changes) -> dict[str, Output]:
    """The same as `run`, and returns what each stage hands on (stages/run.py): its figures, seconds, and tokens spent."""
    compile_cache.keep()
    resolve.trust(trust)
    config = recipe.opened(config, **changes)
    stages = recipe.stages(_with_recipes(config))
    mesh = sharding.make_mesh(**config.mesh)
    workdir = cloud.path(workdir)
    root = cloud.path(config.artefacts) if config.artefacts else workdir
    cloud.check_bucket(workdir)
    check_writable(workdir)
    if (special := set("*?[],") & set(str(root))) and any(settings.do != "train" for _, settings in stages):
        place = "config.artefacts" if config.artefacts else "--workdir"
        raise UserError(f"{place}={root}: {min(special)!r} has a meaning in names of data; give a folder without it.")
    records.check(workdir, stages)
    with disk_errors(workdir, CONTINUES), lock.held(workdir), sharding.use(mesh), StopRequest() as stop:
        check_settings(config)
        this, plans = Run(workdir, root, mesh, stop, {}, {}), {}
        for name, settings in stages:
            with _named(name, stages):
                plans[name] = DO[settings.do].planned(name, settings, this)
            this.outputs[name] = DO[settings.do].output(plans[name])
        trained = [plan for plan in plans.values() if isinstance(plan, Plan)]
        check_inputs([plan.data if isinstance(plan, annotate.Annotation) else plan for plan in plans.values()])
        for plan in trained:
            with _named(plan.name, stages):
                evaluation.check(plan, mesh)
        for name, settings in stages:
            records.check_steps(workdir, name, settings, plans[name])
        _claim(workdir, config, stages)
        _keep_description([p for p in plans.values() if isinstance(p, (Plan, merge.Merge))], config.result, workdir)
        _introduce(trained)
        for name, settings in stages:
            records.begin(workdir, name, settings, plans[name])
            with _named(name, stages):
                this.outputs[name] = DO[settings.do].make(plans[name], this)
            if stop.asked and name != stages[-1][0]:
                leave(f"after {name}", stop)
        if jax.process_index() == 0:
            print(report.summary(workdir), f"report: {report.write(workdir)}", sep="\n", file=sys.stderr)
    return this.outputs


@contextlib.contextmanager
def _named(name: str, stages: list[tuple]) -> Iterator[None]:
    """Errors of a stage begin with its name, where there are several."""
    try:
        yield
    except UserError as error:
        if len(stages) == 1 or f"config.{name}" in str(error) or str(error).startswith(f"{name}:"):
            raise
        raise UserError(f"{name}: {error}") from error


def _with_recipes(config):
    """The config with a finished run's workdir in place of each model (of `model`, its parts, and `of`) that is named as a
    recipe, which is run if need be.
    """
    changed = copy.deepcopy(config)
    for settings in (changed, *(changed[name] for name in config.stages if name in changed)):
        with settings.unlocked(), settings.ignore_type():
            if _is_recipe(settings.get("model")):
                settings.model = _of_recipe(settings.model.removeprefix("recipe:"), config)
            entry = settings.get("model")
            for naming in (settings, entry if isinstance(entry, ConfigDict) else {}):
                of = naming.get("of", ())
                names = {x: _of_recipe(x.removeprefix("recipe:"), config) for x in np.ravel(of).tolist() if _is_recipe(x)}
                if names:
                    naming["of"] = names[of] if isinstance(of, str) else tuple(names.get(x, x) for x in of)
    return changed


def _is_recipe(model) -> bool:
    return isinstance(model, str) and model.startswith("recipe:")


def _of_recipe(path: str, config) -> str:
    """The workdir of a recipe that is another's model, which is run on first use and kept; {seed} in its path is the seed of
    the recipe `config` that names it.
    """
    path, artefacts = path.replace("{seed}", str(config.seed)), config.artefacts
    config = recipe.opened(path)
    root = cloud.path(artefacts) if artefacts else cloud.cache_folder()
    settings = json.loads(config.to_json())
    # Where a setting names a file of the current folder, that folder decides the run too.
    folder = os.getcwd() if any(map(_is_relative, recipe.flat(settings).values())) else ""
    workdir = root / "recipes" / key({"config": settings, "folder": folder})
    if jax.process_index() == 0:
        print(f"model recipe:{path}: {workdir}", file=sys.stderr)
    _run_in_turn(config, workdir)
    return str(workdir)


def _run_in_turn(config, workdir: epath.Path) -> None:
    """Runs a recipe, or finds it done, when no other process is at work in its workdir, as several studies of one model are."""
    waits = False
    while True:
        try:
            run(config, workdir)
            return
        except lock.Occupied as error:
            if jax.process_count() > 1:  # the others would not know
                raise
            if not waits:
                print(f"waiting for the model of a recipe: {error}", file=sys.stderr)
            waits = True
            time.sleep(TURN)


def _is_relative(value) -> bool:
    """Whether a setting's value, or one of its list, names a file of the current folder."""
    if isinstance(value, (list, tuple)):
        return any(map(_is_relative, value))
    path = value.removeprefix("recipe:").partition(":")[0].partition("=")[0] if isinstance(value, str) else ""
    return bool(path) and len(path) < 256 and not os.path.isabs(path) and os.path.exists(path)


def _claim(workdir: epath.Path, config, stages: list[tuple]) -> None:
    """Makes the workdir this config's, now that nothing is wrong with it."""
    if jax.process_index() == 0:
        if others := records.left_out(workdir, stages):
            about = "the run's result is that of the stages that it names"
            print(f"{workdir} also has {', '.join(others)}, which this command does not name; {about}", file=sys.stderr)
        workdir.mkdir(parents=True, exist_ok=True)
        for name, content in (("config", json.loads(config.to_json())), ("environment", report.environment())):
            writers.replace(workdir / f"{name}.json", (json.dumps(content, indent=2) + "\n").encode())


def _keep_description(plans: list, result: str, workdir: epath.Path) -> None:
    """Writes the model's description beside the weights that the run ends with, of the stages that make weights."""
    if jax.process_index() == 0 and plans:
        last = next((p for p in plans if p.name == result), plans[-1])
        loading.keep_description(last.spec, workdir, datasets.template(last.spec, last.settings))


def _introduce(plans: list[Plan]) -> None:
    """Prints what is about to be trained on, one example with its mask."""
    if jax.process_index() != 0 or not plans:
        return
    plan = plans[0]
    count = checks.parameters(plan.spec.transformer)
    learned = "" if plan.trained == count else f", {plan.trained:,} learned"
    devices = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
    print(f"model: {count:,} parameters{learned}, {devices}", file=sys.stderr)
    for each in plans:
        steps = f"{each.steps:,} steps" if each.steps else "as many steps as its data has,"
        budgets = (("time_of", "time is up"), ("tokens_of", "tokens are used up"), ("tokens", "tokens are spent"))
        ends = [what for key, what in budgets if each.settings[key]]
        most = f"until the {' or the '.join(ends)}" if ends else steps
        print(f"{each.name}: {most} of {each.settings.batch_size} rows", file=sys.stderr)
        if each.steps and not each.settings.steps and each.steps < FEW:
            more = each.settings.epochs * -(-FEW // each.steps)
            why = f"short examples share a row of {each.settings.window} tokens"
            print(f"{each.name}: an epoch is few steps where {why}; epochs={more} takes {FEW} or more", file=sys.stderr)
    train.show(plan)


def main(_) -> None:
    """The command line; see the module's docstring."""
    config, workdir = cli.required("config", "workdir")
    results = run(config, workdir)
    if results and jax.process_index() == 0:
        figures = {k: v for k, v in results.items() if isinstance(v, float)}
        cells = [k for k in figures if k.count("/") > 1 and k.endswith(("_low", "_high", "_se"))]  # more lines for each of many
        print(json.dumps({k: v for k, v in figures.items() if k not in cells}, indent=2))


class _Callable(types.ModuleType):
    """This module, which is called as the function it is named after: `import jaxpost.train` puts the module where
    `jaxpost.train` would be looked for, so in either order of imports there is one object, and it does both."""

    __call__ = staticmethod(run)


if __name__ != "__main__":
    sys.modules[__name__].__class__ = _Callable

if __name__ == "__main__":
    flags.DEFINE_string(
        "workdir", None, "Folder for checkpoints, metrics and the report; the same command continues what it holds."
    )
    cli.run(
        main,
        "Trains a model as a recipe says.\n\n    python -m jaxpost.train --config=configs/sft.py --workdir=W",
        config=True,
        distributed=True,
    )
