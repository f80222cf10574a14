"""A stage that trains: batches from a source, steps of an objective's gradient, and now and then a look at where it is.

It reads from top to bottom: the stage, its loop, then what the loop begins with. `plan.py` checks everything that can go wrong
before anything is compiled; `evaluation.py` has the evaluations.
"""

import contextlib
import dataclasses
import itertools
import sys
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from jaxpost import optim, sharding
from jaxpost.config import links
from jaxpost.config.unread import shares
from jaxpost.data import chat
from jaxpost.errors import UserError
from jaxpost.models import adapted, loading
from jaxpost.reporting import report
from jaxpost.reporting.log import Log
from jaxpost.reporting.profile import Profile
from jaxpost.rollouts import resume
from jaxpost.stages import annotations, datasets, evaluation, records
from jaxpost.stages.plan import Plan, plan_stage, scalars
from jaxpost.stages.run import Output, Run
from jaxpost.stages.state import program, shapes
from jaxpost.stages.stopping import leave
from jaxpost.storage import checkpoint
from jaxpost.types import TrainState

# What checkpoints record of the weights that they do not hold, and of the model that the workdir's stages do not share.
KEPT = ("adapter", "leaves", "base", "elsewhere", "attend")


def planned(name: str, s, run: Run) -> Plan:
    """The stage, checked, with the annotations of its batches; without a source while an earlier stage is still to make
    something that it reads.
    """
    pending = run.pending(s.annotations) if isinstance(s.annotations, str) else []
    columns = {name: x for output in pending for name, x in output.shapes.items()} if pending else None
    return annotations.planned(without_annotations(name, s, run), run.mesh, run.models(s), columns)


def without_annotations(name: str, s, run: Run) -> Plan:
    """The stage, checked. Where an earlier stage is still to make its data, it is checked by rows such as that will give."""
    if pending := run.pending(s.data):
        return plan_stage(name, s, run.mesh, [row for output in pending for row in output.trial])
    if not (run.pending(s.eval_data) or (isinstance(s.annotations, str) and run.pending(s.annotations))):
        return plan_stage(name, run.filled(s), run.mesh)
    plan = plan_stage(name, run.without_pending(s), run.mesh)
    plan.source.close()
    return plan._replace(settings=s, source=None, steps=s.steps)


def output(plan: Plan) -> Output:
    """What later stages are told before the stage has run."""
    return Output(pending=True, spec=plan.spec)


def make(plan: Plan, run: Run) -> Output:
    """The stage from its start, or from where it was left, to its end."""
    s = plan.settings
    if plan.source is None:
        plan = planned(plan.name, s, run)
        records.check_steps(run.workdir, plan.name, s, plan)
        records.begin(run.workdir, plan.name, s, plan)
        show(plan)
    saved = checkpoint.Checkpoints(run.workdir / "checkpoints" / plan.name, keep=s.keep, best=s.best, highest=s.highest)
    # Closed whatever happens: in a notebook the next attempt would meet the threads of this one, still writing.
    with contextlib.closing(saved), contextlib.closing(plan.source):
        output, left = _steps(plan, run, saved)
    run.stop.in_loop = False  # all is written
    if left is not None:
        leave(f"at {plan.name} step {left}", run.stop)
    if jax.process_index() == 0 and (change := report.change(run.workdir, plan.name)):
        print(change, file=sys.stderr, flush=True)
    return output._replace(spec=plan.spec)


def show(plan: Plan) -> None:
    """Prints one example of what a stage learns from, with its mask."""
    if plan.sets and jax.process_index() == 0:
        colour = sys.stderr.isatty()
        documents = datasets.shown(plan.sets)
        shown = [chat.show(document["tokens"], document["mask"], plan.spec.tokenizer, colour) for document in documents]
        print("one example (what is learned stands out):", *shown, sep="\n", file=sys.stderr, flush=True)


def _steps(plan: Plan, run: Run, saved: checkpoint.Checkpoints) -> tuple[Output, int | None]:
    """(what the stage hands on, None at its end or else the step that it was asked to stop at)."""
    s, mesh, stop, names = plan.settings, run.mesh, run.stop, [*run.outputs]
    latest, meta = _left(saved)
    _check_data(plan, meta, saved)
    if meta["done"] and (s.time_of or s.tokens_of or s.tokens or latest >= plan.steps):
        return _finished(plan, latest, meta), None

    # Set up: the state, where it was left or where it starts, and the step; the files taken back to there.
    tx = optim.make(s.optimizer, plan.steps)
    if latest is None:
        state, kept = _start(plan, run, tx)
    else:
        state, kept = _restore(plan, saved, latest, tx, mesh), {k: meta.get(k) for k in KEPT}
    plan = _annotated(plan, run, state, fresh=latest is None)
    step = program(plan.spec.transformer, plan.objective, tx, state, mesh, s)
    plan.source.position = meta["position"]
    log = Log(plan, run.workdir, names[: names.index(plan.name) + 1], meta, int(state.step), _budgets(s, run))
    profile = Profile(s.profile, run.workdir / "profile" / plan.name, int(state.step))
    evaluated = evaluation.Evaluation(plan, mesh, run.evaluated, s.start)

    def save(done: bool) -> None:
        log.flush()
        counted = log.counts | {"done": done, "results": results, "data": plan.data}
        counted["position"] = plan.source.keep(at, saved.steps())
        saved.save(state, counted | kept, results if judged == at else None)

    # Loop: a batch, a step, and now and then a look at where we are.
    judged, results = -1, evaluated(state, log, 0) if latest is None else meta.get("results", {})
    stop.in_loop = True
    # The last step is saved as the stage's end and never before it: a stage that is not done has a step to take.
    for at in itertools.count(int(state.step) + 1):
        with profile.step(at, state):
            log.clock()
            batch = plan.source(state) | scalars(at - 1, plan.steps)
            log.waited()
            state, measured = step(state, sharding.distribute(batch, mesh, s.batch_size))
        log.step(at, batch, {**measured, **plan.source.metrics})
        done = at == plan.steps or log.used_up() or 0 < s.tokens <= sum(spent(plan, log.drawn).values())
        if done or (s.eval_every and at % s.eval_every == 0):
            results, judged = evaluated(state, log, at), at
        asked = stop.asked or (jax.process_count() > 1 and saved.reached_preemption(at))
        if done or asked or (s.save_every and at % s.save_every == 0):
            save(done)
        if done or asked:
            break
    profile.close(state)
    log.close()
    return _output(plan, at, log.counts, results), None if done else at


def _finished(plan: Plan, step: int, meta: dict) -> Output:
    """What a stage hands on that was at its end already."""
    if jax.process_index() == 0:
        print(f"{plan.name}: finished before, at step {step}.", file=sys.stderr)
    return _output(plan, step, meta, meta["results"])


def _output(plan: Plan, steps: int, counts: Mapping, figures: Mapping[str, float]) -> Output:
    """What a stage hands on after so many steps; counts: of its log, or of its checkpoint."""
    about = {"seconds": counts["seconds"], "tokens": counts["num_tokens"]}
    return Output(figures=figures, spent={**spent(plan, counts), "steps": steps}, **about)


def spent(plan: Plan, counts: Mapping) -> dict[str, int]:
    """The tokens that a stage learned from, and those that were generated and scored by models for it."""
    tokens = {"learned": counts["num_tokens"], "generated": 0, "scored": 0, **counts.get("spent", {})}
    if "rollouts" not in shares(plan.settings.source):  # whose annotations are among what the batches took
        live = sum(one.weights == "current" for one in plan.annotations)
        once = sum(int(one.encoded.lengths.sum()) for one in plan.sets)
        tokens["scored"] += live * tokens["learned"] + (len(plan.annotations) - live) * once
    return tokens


def _left(saved: checkpoint.Checkpoints) -> tuple[int | None, dict]:
    """(step, meta) of where the stage was left; None and a fresh meta if it has not begun."""
    latest = saved.latest()
    if latest is None:
        return None, {"position": 0, "num_tokens": 0, "seconds": 0.0, "done": False}
    return latest, saved.meta(latest)


def _check_data(plan: Plan, meta: dict, saved: checkpoint.Checkpoints) -> None:
    """Raises UserError for other data than the stage was begun with."""
    if meta.get("data", plan.data) != plan.data:
        raise UserError(
            f"config.data: {saved.folder} was begun with other data than this, or another tokenizer. Bring them back as they "
            "were, or use another --workdir."
        )


def _start(plan: Plan, run: Run, tx) -> tuple[TrainState, dict]:
    """A fresh state: the weights of the stage that this one starts from, or the model's own; and what its checkpoints say of
    the weights that they do not hold.
    """
    s, mesh = plan.settings, run.mesh
    spec = run.starting(plan.spec, s)
    train, frozen = optim.partition(loading.weights(spec, mesh, s.seed), plan.trainable)
    elsewhere = loading.others(spec)  # another model's, which are read from there again
    own = {path: leaf for path, leaf in spec.leaves.items() if path not in elsewhere}
    kept = {"adapter": adapted.recorded(spec.adapter), "leaves": own, "elsewhere": sorted(elsewhere)}
    kept["base"] = loading.base_in(spec, run.workdir, frozen)
    kept["attend"] = getattr(getattr(spec.transformer, "arch", None), "attend", "")

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


def _annotated(plan: Plan, run: Run, state: TrainState, *, fresh: bool) -> Plan:
    """The plan whose batches have the columns that models make of them. fresh: whether the stage begins with this state."""
    plan.source.folder = run.workdir / "rollouts" / plan.name
    if fresh and jax.process_index() == 0:
        resume.clear(plan.source.folder)
    origin, folder = run.starting(plan.spec, plan.settings), run.root / "columns"
    return annotations.attached(plan, origin, state, folder, run.mesh, fresh=fresh, weights_of=run.models(plan.settings))


def _budgets(s, run: Run) -> dict[str, float]:
    """The training `seconds` (evaluation left out) and the `num_tokens` after which a stage ends: what the finished stages of
    time_of and of tokens_of used together, infinite for none.
    """
    outputs = {key: [run.outputs[name] for name in links.names(s[key])] for key in ("time_of", "tokens_of")}
    seconds = sum(output.seconds for output in outputs["time_of"]) if s.time_of else float("inf")
    tokens = sum(output.tokens for output in outputs["tokens_of"]) if s.tokens_of else float("inf")
    return {"seconds": seconds, "num_tokens": tokens}
