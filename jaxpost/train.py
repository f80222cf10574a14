"""The one loop.

    python -m jaxpost.train --config=configs/quickstart.py --workdir=/tmp/quickstart

A run is a list of stages. A stage takes batches from a source (data, or completions of the current weights), steps an
objective's gradient, and logs, evaluates and saves on the way. The same command continues a run that was interrupted, exactly
where it was.

This file reads from top to bottom: the run, the plan of a stage (everything that can go wrong before anything is compiled), the
stage itself, its evaluation, its ending.
"""

import json
import signal
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from absl import flags
from etils import epath

from jaxpost import checkpoint, cli, evaluate, optim, recipe, report, sharding, writers
from jaxpost.data import chat, readers, source
from jaxpost.errors import UserError
from jaxpost.log import Log
from jaxpost.models import hf, loading
from jaxpost.resolve import bind, module, resolve
from jaxpost.rollouts.source import Rollouts
from jaxpost.step import combine, make_evaluation, make_step
from jaxpost.types import TrainState

# ---------------------------------------------------------------------------------------------------------------- Run


def run(config, workdir) -> dict[str, float]:
    """Runs (or continues) a recipe's stages in a workdir; returns the last evaluation's figures.

    config: a ConfigDict as `recipe.make` gives. Raises UserError, before anything is compiled, for whatever the recipe gets
    wrong, and SystemExit(0) after saving when the process is asked to stop (SIGTERM).
    """
    stages = recipe.stages(config)
    mesh = sharding.make_mesh(**config.mesh)
    workdir = epath.Path(workdir)
    _compare(workdir, config)
    with sharding.use(mesh), _StopRequest() as stop:
        plans = [_plan(name, settings, mesh) for name, settings in stages]
        _claim(workdir, config)
        _introduce(plans[0], workdir)
        for i, plan in enumerate(plans):
            results = _stage(plan, plans[:i], workdir, mesh, stop)
            if stop.asked and plan is not plans[-1]:
                _leave(f"after {plan.name}")
    if jax.process_index() == 0:
        print(report.summary(workdir), f"report: {report.write(workdir)}", sep="\n", file=sys.stderr)
    return results


def _compare(workdir: epath.Path, config) -> None:
    """Checks that a workdir is this config's, or nobody's: a run is never continued with other settings by accident."""
    path = workdir / "config.json"
    begun = (workdir / "checkpoints").exists() and any(checkpoint.steps(p) for p in (workdir / "checkpoints").iterdir())
    if begun and path.exists() and (changes := recipe.difference(json.loads(path.read_text()), config.to_dict())):
        raise UserError(
            f"{workdir} holds a run with other settings:\n  "
            + "\n  ".join(changes)
            + "\nUse another --workdir, or the same settings."
        )


def _claim(workdir: epath.Path, config) -> None:
    """Makes the workdir this config's, now that nothing is wrong with it."""
    if jax.process_index() == 0:
        workdir.mkdir(parents=True, exist_ok=True)
        for name, content in (("config", json.loads(config.to_json())), ("environment", report.environment())):
            writers.replace(workdir / f"{name}.json", (json.dumps(content, indent=2) + "\n").encode())


class _StopRequest:
    """Set by SIGTERM. With several processes jax's own handler speaks for all of them, so none is installed here."""

    def __init__(self):
        self.asked, self.before = False, None

    def __enter__(self):
        if jax.process_count() == 1:
            self.before = signal.signal(signal.SIGTERM, self._ask)
        return self

    def __exit__(self, *_):
        if self.before is not None:
            signal.signal(signal.SIGTERM, self.before)

    def _ask(self, *_):
        self.asked = True


def _leave(where: str) -> None:
    print(f"\nstopped {where}, all saved; the same command continues.", file=sys.stderr)
    raise SystemExit(0)


# --------------------------------------------------------------------------------------------------------------- Plan


class Plan(NamedTuple):
    """A stage, checked and ready: nothing of it is compiled yet, and no weights are read."""

    name: str
    settings: Any
    found: loading.Description
    objective: Callable
    source: Any  # state -> batch, with a position
    steps: int
    held_out: list  # this process's batches for evaluation
    problems: dict | None  # what evaluate.accuracy takes, for a task
    example: dict | None  # one encoded example, to be shown


def _plan(name: str, s, mesh) -> Plan:
    """Reads, resolves and checks everything that a stage's settings name."""
    found = loading.describe(_plain(s.model), s.tokenizer, s.dtype, s.remat)
    if found.folder is not None:
        hf.check(found.folder, found.transformer.arch)
    objective = resolve(_plain(s.objective), "objectives")
    if s.window > found.transformer.arch.max_positions:
        raise UserError(f"config.window: {s.window} tokens, but the model takes {found.transformer.arch.max_positions}.")
    if s.batch_size % (rows := s.microbatches * mesh.shape["data"] * mesh.shape["fsdp"]):
        raise UserError(
            f"config.batch_size: {s.batch_size} rows do not divide over microbatches x data x fsdp = {rows}; use a multiple."
        )
    if found.tokenizer is None:
        raise UserError(
            "config.tokenizer: the model comes without one; name a folder that has one, or a function that makes one."
        )
    task = module(s.task.get("name", ""), "tasks") if s.task else None
    problems = None if task is None else _problems(task, found, s)
    if s.source == "rollouts":
        batches, held_out, example, steps = _rollouts(task, found, s, mesh), [], None, s.steps
        if not steps:
            raise UserError("config.steps: rollouts have no epochs; say how many steps to take.")
    elif s.source == "data":
        batches, held_out, example = _data(task, found, s, mesh)
        steps = s.steps or len(batches)
    else:
        raise UserError(f"config.source: {s.source!r} is neither 'data' nor 'rollouts'.")
    longest, most = s.rollouts.prompt_window + s.rollouts.new, found.transformer.arch.max_positions
    if task is not None and longest > most:
        raise UserError(f"config.rollouts: prompt_window + new = {longest} tokens, but the model takes {most}.")
    optim.schedule(s.optimizer, steps)
    return Plan(name, s, found, objective, batches, steps, held_out, problems, example)


def _plain(value):
    return value.to_dict() if hasattr(value, "to_dict") else value


def _task_options(s) -> dict:
    return {k: v for k, v in _plain(s.task).items() if k not in ("name", "examples")}


def _problems(task, found, s) -> dict:
    options = {"prompt_window": s.rollouts.prompt_window, "new": s.rollouts.new, "template": s.template or None}
    records = task.test_records(s.eval_per_cell)
    return {"records": records, "reward": task.reward, "tokenizer": found.tokenizer, "rows": s.eval_rows, "options": options}


def _data(task, found, s, mesh):
    """(batches, held-out batches, one example) of a stage that learns from demonstrations."""
    if s.data:
        records = readers.read(s.data)
    elif task is not None:
        make = bind(task.conversation, {"seed": s.seed, **_task_options(s)}, f"task {s.task['name']}")
        records = [readers.Record(make(i), f"task {s.task['name']}, example {i}") for i in range(s.task.get("examples", 10000))]
    else:
        raise UserError("config.data: give a .jsonl or .json file, or a config.task with demonstrations of its own.")
    # On the command line every share is a float, a number of examples too.
    wanted = 0 if s.eval_data else int(s.held_out) if s.held_out >= 1 else float(s.held_out)
    rest, others = source.split(len(records), wanted, s.seed)
    kept = readers.read(s.eval_data) if s.eval_data else [records[i] for i in others]

    def rows(records):
        encoded = source.encode_all(
            records, found.tokenizer, s.template or None, s.train_on, window=s.window, too_long=s.too_long
        )
        return encoded, source.rows(encoded.examples, encoded.lengths, s.window, packing=s.packing, seed=s.seed)

    local = sharding.local_rows(mesh, s.batch_size)
    encoded, train = rows([records[i] for i in rest])
    if jax.process_index() == 0:
        print(f"data: {encoded.report}, {len(train)} rows of {s.window}", file=sys.stderr)
    batches = source.Batches(train, s.batch_size, seed=s.seed, epochs=None if s.steps else s.epochs, local=local)
    held_out = []
    if kept:
        once = source.Batches(rows(kept)[1], s.batch_size, seed=s.seed, shuffle=False, epochs=1, local=local)
        held_out = [once() for _ in range(len(once))]
    return batches, held_out, encoded.examples[0]


def _rollouts(task, found, s, mesh) -> Rollouts:
    if task is None:
        raise UserError("config.task: rollouts need a task, for prompts and a reward.")
    template = s.template or None

    def prompt(i):
        record = task.record(i, seed=s.seed)
        return record, chat.encode_prompt([{"role": "user", "content": record["prompt"]}], found.tokenizer, template)

    options = {
        "prompt_window": s.rollouts.prompt_window,
        "new": s.rollouts.new,
        "temperature": s.rollouts.temperature,
        "stop": chat.stop_ids(found.tokenizer, template),
    }
    return Rollouts(
        found.transformer,
        found.tokenizer,
        prompt,
        task.reward,
        mesh,
        batch_size=s.batch_size,
        group=s.rollouts.group,
        seed=s.seed,
        options=options,
    )


def _introduce(plan: Plan, workdir: epath.Path) -> None:
    """Says what is about to be trained on, one example with its mask."""
    if jax.process_index() != 0:
        return
    loading.keep_description(plan.found, workdir, chat.jinja(plan.found.tokenizer, plan.settings.template or None))
    arch = plan.found.transformer.arch
    print(f"model: {arch.parameters():,} parameters, {jax.device_count()} x {jax.devices()[0].device_kind}", file=sys.stderr)
    if plan.example is not None:
        shown = chat.show(plan.example["tokens"], plan.example["mask"], plan.found.tokenizer, colour=sys.stderr.isatty())
        print(f"one example (what is learned stands out):\n{shown}", file=sys.stderr, flush=True)


# -------------------------------------------------------------------------------------------------------------- Stage


def _stage(plan: Plan, before: list[Plan], workdir: epath.Path, mesh, stop: _StopRequest) -> dict[str, float]:
    """One stage from its start, or from where it was left, to its end."""
    s, names = plan.settings, [p.name for p in before] + [plan.name]
    saved = checkpoint.Checkpoints(workdir / "checkpoints" / plan.name, keep=s.keep, best=s.best, highest=s.highest)
    latest = saved.latest()
    meta = saved.meta(latest) if latest is not None else {"position": 0, "num_tokens": 0, "seconds": 0.0, "done": False}
    if meta["done"]:
        saved.close()
        print(f"{plan.name}: finished before, at step {latest}.", file=sys.stderr)
        return meta["results"]

    # Set up: the state, where it was left or where it starts, and the step; the files taken back to there.
    tx = optim.make(s.optimizer, plan.steps)
    state = _restore(plan, saved, latest, tx, mesh) if latest is not None else _start(plan, names, workdir, tx, mesh)
    step = _compiled(plan, tx, state, mesh)
    plan.source.position = meta["position"]
    budget = _seconds_of(s.time_of, workdir) if s.time_of else float("inf")
    log = Log(plan, workdir, names, meta, int(state.step), budget)
    judge = _Judge(plan, mesh)

    def save(done: bool) -> None:
        log.flush()
        counted = {"num_tokens": log.num_tokens, "seconds": log.seconds, "done": done, "results": results}
        saved.save(state, {"position": plan.source.position, **counted}, results if judged == at else None)

    # Loop: a batch, a step, and now and then a look at where we are.
    at, judged, results = int(state.step), -1, meta.get("results", {})
    if latest is None:
        results = judge(state, log, 0)
    # The last step is saved as the stage's end and never before it: a stage that is not done has a step to take.
    while True:
        log.clock()
        batch = plan.source(state)
        log.waited()
        state, measured = step(state, sharding.distribute(batch, mesh, s.batch_size))
        at += 1
        log.step(at, batch, measured)
        done = at == plan.steps or log.out_of_time()
        if done or (s.eval_every and at % s.eval_every == 0):
            results, judged = judge(state, log, at), at
        asked = stop.asked or (jax.process_count() > 1 and saved.reached_preemption(at))
        if done or asked or (s.save_every and at % s.save_every == 0):
            save(done)
        if done or asked:
            break
    saved.close()
    log.close()
    if not done:
        _leave(f"at {plan.name} step {at}")
    return results


def _compiled(plan: Plan, tx, state: TrainState, mesh) -> Callable:
    """The train step as one program, which takes the state's memory for the next state and leaves every leaf where it was."""
    s = plan.settings
    step = make_step(plan.found.transformer.forward, plan.objective, tx, microbatches=s.microbatches, ema=s.ema or None)
    places = sharding.stored(mesh, state), sharding.replicated(mesh)
    return jax.jit(step, out_shardings=places, donate_argnums=0)


def _start(plan: Plan, names: list[str], workdir: epath.Path, tx, mesh) -> TrainState:
    """A fresh state: the weights of the stage that this one starts from, or the model's own."""
    s = plan.settings
    origin = s.start or (names[-2] if len(names) > 1 else "")
    if origin:
        shapes = loading.abstract(plan.found.transformer, mesh)
        params = checkpoint.load_params(checkpoint.find_step(workdir / "checkpoints" / origin), shapes)
    else:
        params = loading.weights(plan.found, mesh, s.seed)
    train, frozen = optim.partition(params, s.trainable)

    def rest(train):
        count = jnp.zeros((), jnp.int32)
        mean = jax.tree.map(jnp.copy, train) if s.ema else None
        return {"opt_state": tx.init(train), "ema": mean, "step": count, "skipped": count, "streak": count}

    places = sharding.stored(mesh, jax.eval_shape(rest, train))
    key = jax.device_put(jax.random.PRNGKey(s.seed), sharding.replicated(mesh))
    return TrainState(train=train, frozen=frozen, key=key, **jax.jit(rest, out_shardings=places)(train))


def _restore(plan: Plan, saved: checkpoint.Checkpoints, step: int, tx, mesh) -> TrainState:
    """The state of a checkpoint; the mesh may be another than the one it was written on."""
    s = plan.settings
    train, frozen = optim.partition(loading.abstract(plan.found.transformer, mesh), s.trainable)
    count = jax.ShapeDtypeStruct((), jnp.int32)
    key = jax.eval_shape(lambda: jax.random.PRNGKey(0))
    rest = {"opt_state": jax.eval_shape(tx.init, train), "ema": train if s.ema else None, "key": key}
    shapes = TrainState(train=train, frozen=frozen, step=count, skipped=count, streak=count, **rest)
    places = sharding.stored(mesh, shapes)
    return saved.restore(step, jax.tree.map(lambda x, p: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=p), shapes, places))


def _seconds_of(stage: str, workdir: epath.Path) -> float:
    """The training time that a finished stage took, evaluation left out."""
    other = checkpoint.Checkpoints(workdir / "checkpoints" / stage)
    seconds = other.meta(other.latest())["seconds"]
    other.close()
    return seconds


# ---------------------------------------------------------------------------------------------------- Evaluate and log


class _Judge:
    """The stage's evaluations of a state: held-out loss, and a task's test problems."""

    def __init__(self, plan: Plan, mesh):
        self.plan, self.mesh = plan, mesh
        self.evaluate = jax.jit(make_evaluation(plan.found.transformer.forward, plan.objective))

    def __call__(self, state: TrainState, log: Log, step: int) -> dict[str, float]:
        log.settle()
        params, values, samples = combine(state.train if state.ema is None else state.ema, state.frozen), {}, []
        if self.plan.held_out:
            values |= dict(
                evaluate.held_out(self.evaluate, params, self.plan.held_out, self.mesh, self.plan.settings.batch_size)
            )
        if self.plan.problems:
            values |= dict(
                evaluate.accuracy(self.plan.found.transformer, params, mesh=self.mesh, step=step, **self.plan.problems)
            )
            samples = values.pop("samples")
        log.evaluated(step, values, samples)
        return values


# --------------------------------------------------------------------------------------------------------------- Main


def main(_) -> None:
    """The command line; see the module's docstring."""
    config, workdir = cli.required("config", "workdir")
    if flags.FLAGS.distributed:
        jax.distributed.initialize()
    results = run(config, workdir)
    if jax.process_index() == 0:
        print(json.dumps({k: v for k, v in results.items() if isinstance(v, float)}, indent=2))


if __name__ == "__main__":
    flags.DEFINE_string(
        "workdir", None, "Folder for checkpoints, metrics and the report; the same command continues what it holds."
    )
    flags.DEFINE_bool("distributed", False, "Several processes (a TPU pod slice, a GPU cluster): start jax.distributed first.")
    cli.run(
        main, "Trains a model as a recipe says.\n\n    python -m jaxpost.train --config=configs/sft.py --workdir=W", config=True
    )
