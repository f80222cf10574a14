"""The one loop.

    python -m jaxpost.train --config=configs/quickstart.py --workdir=/tmp/quickstart

A run is a list of stages. A stage takes batches from a source (data, or completions of the current weights), steps an
objective's gradient, and logs, evaluates and saves on the way. The same command continues a run that was interrupted, exactly
where it was.

From Python it is the same loop, with functions where a recipe has names:

    jaxpost.train("configs/sft.py", "runs/mine", model="FOLDER", data="FILE.jsonl", objective=my_loss)

This file reads from top to bottom: the run, then a stage, whose evaluations are in `stages/judge.py`.
`stages/plan.py` checks everything that can go wrong before anything is compiled.
"""

import contextlib
import dataclasses
import functools
import itertools
import json
import sys
import types

import jax
import jax.numpy as jnp
from absl import flags
from etils import epath
from ml_collections import ConfigDict

from jaxpost import checkpoint, cli, cloud, columns, compile_cache, lock, optim, recipe, report, sharding, writers
from jaxpost.agreement import check_inputs, check_settings
from jaxpost.annotators import scores
from jaxpost.data import chat
from jaxpost.errors import UserError
from jaxpost.host import CONTINUES, check_writable, disk_errors, read_object
from jaxpost.log import Log
from jaxpost.models import loading
from jaxpost.naming import digest_of
from jaxpost.profile import Profile
from jaxpost.rollouts import resume, samples
from jaxpost.stages import datasets, judge
from jaxpost.stages.plan import Plan, plan_stage, starting
from jaxpost.stages.state import program, shapes
from jaxpost.step import combine
from jaxpost.stopping import StopRequest, leave
from jaxpost.types import TrainState

KEPT = ("adapter", "leaves", "base", "elsewhere")  # what checkpoints say of the weights that they do not hold
SAMPLED = ("task", "tokenizer", "reward", "rollouts", "seed", "dtype")  # the settings that decide what samples are

# ---------------------------------------------------------------------------------------------------------------- Run


def run(config, workdir, **changes) -> dict[str, float]:
    """Runs (or continues) a recipe's stages in a workdir; returns the last evaluation's figures.

    config: a ConfigDict as `recipe.make` gives, a recipe's path, or None for the defaults. changes: settings that differ from
    it; `objective`, `reward` and `task` may be the function or object itself, of which config.json keeps the name (`naming`).
    Raises UserError, before anything is compiled, for whatever the recipe gets wrong, and SystemExit after saving when
    the process is asked to stop (0 for SIGTERM, 130 for Ctrl-C).
    """
    compile_cache.keep()
    config = recipe.opened(config, **changes)
    stages = recipe.stages(config)
    mesh = sharding.make_mesh(**config.mesh)
    workdir = cloud.path(workdir)
    cloud.check_bucket(workdir)
    check_writable(workdir)
    _compare(workdir, config)
    with disk_errors(workdir, CONTINUES), lock.held(workdir), sharding.use(mesh), StopRequest() as stop:
        check_settings(config)
        plans = [columns.annotated(plan_stage(name, settings, mesh), mesh) for name, settings in stages]
        check_inputs(plans)
        for plan in plans:
            judge.check_best(plan, mesh)
        _claim(workdir, config)
        _introduce(plans, workdir)
        graded: dict = {}
        for i, plan in enumerate(plans):
            results = _stage(plan, plans[:i], workdir, mesh, stop, graded)
            if stop.asked and plan is not plans[-1]:
                leave(f"after {plan.name}", stop)
        if jax.process_index() == 0:
            print(report.summary(workdir), f"report: {report.write(workdir)}", sep="\n", file=sys.stderr)
    return results


def _compare(workdir: epath.Path, config) -> None:
    """Checks that a workdir is this config's, or nobody's: a run is never continued with other settings by accident."""
    path = workdir / "config.json"
    held = read_object(path) if path.exists() else {}
    if "model_type" in held:
        raise UserError(f"--workdir={workdir} is a model's folder, whose config.json a run would replace; give another.")
    begun = (workdir / "checkpoints").is_dir() and any(checkpoint.steps(p) for p in (workdir / "checkpoints").iterdir())
    if begun and path.exists() and (changes := recipe.difference(held, config.to_dict())):
        other = next(new for i in itertools.count(2) if not (new := workdir.parent / f"{workdir.name}-{i}").exists())
        again = cli.command({"workdir": str(other), "config.model": str(workdir)})
        raise UserError(
            f"{workdir} holds a run with other settings:\n  "
            + "\n  ".join(changes)
            + "\nThe same settings continue it. Other settings begin a new run from its weights"
            + (f":\n  {again}\n" if again else f", with another workdir and model={str(workdir)!r}. ")
            + "Its weights go on (their running mean, where it has one); the optimizer, the schedule and the position in the "
            "data begin anew."
        )


def _claim(workdir: epath.Path, config) -> None:
    """Makes the workdir this config's, now that nothing is wrong with it."""
    if jax.process_index() == 0:
        workdir.mkdir(parents=True, exist_ok=True)
        for name, content in (("config", json.loads(config.to_json())), ("environment", report.environment())):
            writers.replace(workdir / f"{name}.json", (json.dumps(content, indent=2) + "\n").encode())


def _introduce(plans: list[Plan], workdir: epath.Path) -> None:
    """Says what is about to be trained on, one example with its mask."""
    if jax.process_index() != 0:
        return
    result = next((p for p in plans if p.name == p.settings.result), plans[-1])
    loading.keep_description(result.spec, workdir, datasets.template(result.spec, result.settings))
    plan = plans[0]
    arch = plan.spec.transformer.arch
    learned = "" if plan.trained == arch.parameters() else f", {plan.trained:,} learned"
    devices = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
    print(f"model: {arch.parameters():,} parameters{learned}, {devices}", file=sys.stderr)
    for each in plans:
        most = "until the time is up" if each.settings.time_of else f"{each.steps:,} steps"
        print(f"{each.name}: {most} of {each.settings.batch_size} rows", file=sys.stderr)
    _show(plan)


def _show(plan: Plan) -> None:
    """One example of what a stage learns from, with its mask."""
    if plan.example and jax.process_index() == 0:
        colour = sys.stderr.isatty()
        shown = [chat.show(document["tokens"], document["mask"], plan.spec.tokenizer, colour) for document in plan.example]
        print("one example (what is learned stands out):", *shown, sep="\n", file=sys.stderr, flush=True)


# -------------------------------------------------------------------------------------------------------------- Stage


def _stage(plan: Plan, before: list[Plan], workdir: epath.Path, mesh, stop: StopRequest, graded: dict) -> dict[str, float]:
    """One stage from its start, or from where it was left, to its end. graded: as `judge.Judge` takes it."""
    s = plan.settings
    saved = checkpoint.Checkpoints(workdir / "checkpoints" / plan.name, keep=s.keep, best=s.best, highest=s.highest)
    # Closed whatever happens: in a notebook the next attempt would meet the threads of this one, still writing.
    with contextlib.closing(saved), contextlib.closing(plan.source) if s.source == "rollouts" else contextlib.nullcontext():
        results, left = _steps(plan, before, workdir, mesh, stop, saved, graded)
    stop.in_loop = False  # all is written
    if left is not None:
        leave(f"at {plan.name} step {left}", stop)
    if jax.process_index() == 0 and (change := report.change(workdir, plan.name)):
        print(change, file=sys.stderr, flush=True)
    return results


def _steps(plan: Plan, before: list[Plan], workdir, mesh, stop: StopRequest, saved, graded: dict) -> tuple[dict, int | None]:
    """The results of a stage, and None at its end or else the step that it was asked to stop at."""
    s, names = plan.settings, [p.name for p in before] + [plan.name]
    latest, meta = _left(saved)
    if meta["done"]:
        print(f"{plan.name}: finished before, at step {latest}.", file=sys.stderr)
        return meta["results"], None
    plan = _with_data(plan, names, workdir, mesh, meta, saved, stop)

    # Set up: the state, where it was left or where it starts, and the step; the files taken back to there.
    tx = optim.make(s.optimizer, plan.steps)
    if latest is None:
        state, kept = _start(plan, names, workdir, tx, mesh)
    else:
        state, kept = _restore(plan, saved, latest, tx, mesh), {k: meta.get(k) for k in KEPT}
    plan = _with_reference(plan, names, workdir, mesh, state, fresh=latest is None)
    step = program(plan.spec.transformer, plan.objective, tx, state, mesh, s)
    plan.source.position = meta["position"]
    log = Log(plan, workdir, names, meta, int(state.step), _seconds_of(s.time_of, workdir))
    profile = Profile(s.profile, workdir / "profile" / plan.name, int(state.step))
    evaluated = judge.Judge(plan, mesh, graded, s.start or names[-2] if before else "")

    def save(done: bool) -> None:
        log.flush()
        counted = {"num_tokens": log.num_tokens, "seconds": log.seconds, "done": done, "results": results}
        counted |= {"position": _position(plan, saved, at), "data": plan.data}
        saved.save(state, counted | kept, results if judged == at else None)

    # Loop: a batch, a step, and now and then a look at where we are.
    judged, results = -1, evaluated(state, log, 0) if latest is None else meta.get("results", {})
    stop.in_loop = True
    # The last step is saved as the stage's end and never before it: a stage that is not done has a step to take.
    for at in itertools.count(int(state.step) + 1):
        with profile.step(at, state):
            log.clock()
            batch = plan.source(state)
            log.waited()
            state, measured = step(state, sharding.distribute(batch, mesh, s.batch_size))
        log.step(at, batch, {**measured, **getattr(plan.source, "metrics", {})})
        done = at == plan.steps or log.out_of_time()
        if done or (s.eval_every and at % s.eval_every == 0):
            results, judged = evaluated(state, log, at), at
        asked = stop.asked or (jax.process_count() > 1 and saved.reached_preemption(at))
        if done or asked or (s.save_every and at % s.save_every == 0):
            save(done)
        if done or asked:
            break
    profile.close(state)
    log.close()
    return results, None if done else at


def _left(saved: checkpoint.Checkpoints) -> tuple[int | None, dict]:
    """(step, meta) of where the stage was left; None and a fresh meta if it has not begun."""
    latest = saved.latest()
    if latest is None:
        return None, {"position": 0, "num_tokens": 0, "seconds": 0.0, "done": False}
    return latest, saved.meta(latest)


def _with_data(plan: Plan, names: list[str], workdir: epath.Path, mesh, meta: dict, saved, stop: StopRequest) -> Plan:
    """The plan with its data, where that is samples: completions of the weights that the stage starts from. Making them counts
    as the stage's time. Raises UserError for other data than the stage was begun with.
    """
    s = plan.settings
    if s.source == "samples":
        origin = starting(plan.spec, s, names[:-1], workdir)
        about = {"stage": plan.name, "weights": columns.identity(origin, s.seed), "shape": plan.source.shape}
        judges = [reward for reward, _ in plan.source.rewards.values()]
        about |= {"template": datasets.template(origin, s), "judge": digest_of(judges)}
        about |= {k: recipe.plain(s[k]) for k in SAMPLED}
        weights = functools.partial(loading.weights, origin, mesh, s.seed)
        stop.in_loop = True
        files, seconds = samples.make(plan.source, about, weights, workdir / "samples", mesh, lambda: stop.asked)
        stop.in_loop = False
        if not files or stop.asked:
            leave(f"{plan.name}, while it drew samples", stop)
        settings = ConfigDict({**recipe.plain(s), "source": "data", "data": files})
        plan = columns.annotated(plan_stage(plan.name, settings, mesh), mesh)
        _show(plan)
        meta["seconds"] += 0.0 if "data" in meta else seconds
    if meta.get("data", plan.data) != plan.data:
        raise UserError(
            f"config.data: {saved.folder} was begun with other data than this, or another tokenizer. Bring them back as they "
            "were, or use another --workdir."
        )
    return plan


def _start(plan: Plan, names: list[str], workdir: epath.Path, tx, mesh) -> tuple[TrainState, dict]:
    """A fresh state: the weights of the stage that this one starts from, or the model's own; and what its checkpoints say of
    the weights that they do not hold.
    """
    s, found = plan.settings, starting(plan.spec, plan.settings, names[:-1], workdir)
    train, frozen = optim.partition(loading.weights(found, mesh, s.seed), plan.trainable)
    elsewhere = loading.others(found)  # another model's, which are read from there again
    own = {path: leaf for path, leaf in found.leaves.items() if path not in elsewhere}
    kept = {"adapter": loading.recorded(found.adapter), "leaves": own, "elsewhere": sorted(elsewhere)}
    kept["base"] = loading.base_in(found, workdir, frozen)

    def rest(train):
        count = jnp.zeros((), jnp.int32)
        mean = jax.tree.map(jnp.copy, train) if s.ema else None
        return {"opt_state": tx.init(train), "ema": mean, "step": count, "skipped": count, "streak": count}

    places = sharding.stored(mesh, jax.eval_shape(rest, train))
    key = jax.device_put(jax.random.PRNGKey(s.seed), sharding.replicated(mesh))
    return TrainState(train=train, frozen=frozen, key=key, **jax.jit(rest, out_shardings=places)(train)), kept


def _restore(plan: Plan, saved: checkpoint.Checkpoints, step: int, tx, mesh) -> TrainState:
    """The state of a checkpoint; the mesh may be another than the one it was written on."""
    if jax.process_index() == 0:
        print(f"{plan.name}: continuing from step {step}.", file=sys.stderr)
    s, meta = plan.settings, saved.meta(step)
    inside, base = meta.get("adapter") or {}, meta.get("base")
    state = shapes(plan.spec.transformer, mesh, tx, plan.trainable, adapter=inside, leaves=plan.spec.leaves, ema=s.ema > 0)
    if not base:
        return saved.restore(step, state, loading.heads(plan.spec, mesh))
    folder = loading.base_of(saved.folder / str(step), base)
    below = loading.weights(dataclasses.replace(plan.spec, folder=folder, adapter=inside), mesh, s.seed)
    return saved.restore(step, state, below)


def _with_reference(plan: Plan, names: list[str], workdir: epath.Path, mesh, state: TrainState, *, fresh: bool) -> Plan:
    """The plan with its frozen reference as a column: the weights that the stage starts from. A fresh state has them still; for
    a restored one they are read again, should the column be gone. Rollouts ask the reference anew for each of their batches, so
    what of it trains is kept beside the weights.
    """
    origin = starting(plan.spec, plan.settings, names[:-1], workdir)

    def weights():
        return combine(state.train, state.frozen) if fresh else loading.weights(origin, mesh, plan.settings.seed)

    if plan.settings.source != "rollouts":
        return columns.referenced(plan, origin, weights, workdir / "columns", mesh)
    plan.source.folder = workdir / "rollouts" / plan.name
    if fresh and jax.process_index() == 0:
        resume.clear(plan.source.folder)
    if columns.REFERENCE in plan.reads:
        first, _ = optim.partition(weights(), plan.trainable)
        first = jax.tree.map(jnp.copy, first) if fresh else first
        program = jax.jit(functools.partial(scores.ref_logps, plan.spec.transformer.forward))
        plan.source.frozen += (lambda state, batch: program(combine(first, state.frozen), batch),)
    for folder in dict.fromkeys(loading.others(plan.spec).values()):
        teacher = loading.describe(folder, "", plan.settings.dtype, text=False)
        known = loading.weights(teacher, mesh, plan.settings.seed)
        says = jax.jit(functools.partial(scores.hidden, teacher.transformer.forward))
        plan.source.frozen += (lambda state, batch, says=says, known=known: says(known, batch),)
    return plan


def _position(plan: Plan, saved: checkpoint.Checkpoints, step: int):
    """Where the source is, for the checkpoint of a step; what of it no checkpoint could make again is in files by then."""
    if plan.settings.source != "rollouts":
        return plan.source.position
    return plan.source.keep(step, saved.steps())


def _seconds_of(stages: str, workdir: epath.Path) -> float:
    """The training time that finished stages took together, evaluation left out; without end for none."""
    seconds = 0.0
    for stage in stages.split(",") if stages else ():
        other = checkpoint.Checkpoints(workdir / "checkpoints" / stage)
        seconds += other.meta(other.latest())["seconds"]
        other.close()
    return seconds if stages else float("inf")


# --------------------------------------------------------------------------------------------------------------- Main


def main(_) -> None:
    """The command line; see the module's docstring."""
    config, workdir = cli.required("config", "workdir")
    results = run(config, workdir)
    if results and jax.process_index() == 0:
        told = {k: v for k, v in results.items() if isinstance(v, float)}
        cells = [k for k in told if k.count("/") > 1 and k.endswith(("_low", "_high"))]  # two more lines for each of many
        print(json.dumps({k: v for k, v in told.items() if k not in cells}, indent=2))


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
