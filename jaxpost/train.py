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
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from jaxpost import checkpoint, cli, evaluate, metrics, optim, recipe, report, sharding, writers
from jaxpost.data import chat, readers, source
from jaxpost.errors import UserError
from jaxpost.models import loading
from jaxpost.progress import Progress, model_flops, peak_flops
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
    workdir = Path(workdir)
    _claim(workdir, config)
    with sharding.use(mesh):
        plans = [_plan(name, settings, mesh) for name, settings in stages]
        _introduce(plans[0], workdir)
        stop = _StopRequest()
        results = {}
        for i, plan in enumerate(plans):
            results = _stage(plan, plans[:i], workdir, mesh, stop) or results
    if jax.process_index() == 0:
        print(f"report: {report.write(workdir)}", file=sys.stderr)
    return results


def _claim(workdir: Path, config) -> None:
    """Makes the workdir this config's, or checks that it is: a run is never continued with other settings by accident."""
    path, plain = workdir / "config.json", json.loads(config.to_json())
    if path.exists() and (changes := recipe.difference(json.loads(path.read_text()), plain)):
        raise UserError(
            f"{workdir} holds a run with other settings:\n  "
            + "\n  ".join(changes)
            + "\nUse another --workdir, or the same settings."
        )
    if jax.process_index() == 0:
        workdir.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(plain, indent=2) + "\n")
        (workdir / "environment.json").write_text(json.dumps(report.environment(), indent=2) + "\n")


class _StopRequest:
    """Set by SIGTERM. With several processes jax's own handler speaks for all of them, so none is installed here."""

    def __init__(self):
        self.asked = False
        if jax.process_count() == 1:
            signal.signal(signal.SIGTERM, self._ask)

    def _ask(self, *_):
        self.asked = True


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
    objective = resolve(s.objective, "objectives")
    if s.window > found.transformer.arch.max_positions:
        raise UserError(
            f"config.window: {s.window} tokens, but the model takes {found.transformer.arch.max_positions} (max_position_embeddings)."
        )
    if s.batch_size % s.microbatches:
        raise UserError(f"config.microbatches: {s.microbatches} does not divide batch_size {s.batch_size}.")
    sharding.local_rows(mesh, s.batch_size // s.microbatches)
    if found.tokenizer is None:
        raise UserError(f"config.model: {s.model} has no tokenizer; name a folder that has one as config.tokenizer.")
    task = module(s.task["name"], "tasks") if s.task else None
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
        make = bind(task.conversation, _task_options(s), f"task {s.task['name']}")
        records = [readers.Record(make(i), f"task {s.task['name']}, example {i}") for i in range(s.task.get("examples", 10000))]
    else:
        raise UserError("config.data: give a .jsonl or .json file, or a config.task with demonstrations of its own.")
    rest, others = source.split(len(records), s.held_out, s.seed)
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


def _introduce(plan: Plan, workdir: Path) -> None:
    """Says what is about to be trained on, one example with its mask."""
    if jax.process_index() != 0:
        return
    loading.keep_description(plan.found, workdir)
    arch = plan.found.transformer.arch
    print(f"model: {arch.parameters():,} parameters, {jax.device_count()} x {jax.devices()[0].device_kind}", file=sys.stderr)
    if plan.example is not None:
        shown = chat.show(plan.example["tokens"], plan.example["mask"], plan.found.tokenizer, colour=sys.stderr.isatty())
        print(f"one example (what is learned stands out):\n{shown}", file=sys.stderr, flush=True)


# -------------------------------------------------------------------------------------------------------------- Stage


def _stage(plan: Plan, before: list[Plan], workdir: Path, mesh, stop: _StopRequest) -> dict[str, float]:
    """One stage from its start, or from where it was left, to its end."""
    s, names = plan.settings, [p.name for p in before] + [plan.name]
    saved = checkpoint.Checkpoints(workdir / "checkpoints" / plan.name, keep=s.keep, best=s.best, highest=s.highest)
    latest = saved.latest()
    meta = saved.meta(latest) if latest is not None else {"position": 0, "num_tokens": 0, "seconds": 0.0, "done": False}
    if meta["done"]:
        saved.close()
        return meta["results"]

    # Set up: the state, in its place on the mesh, and the compiled step.
    tx = optim.make(s.optimizer, plan.steps)
    state = _restore(plan, saved, latest, tx, mesh) if latest is not None else _start(plan, names, workdir, tx, mesh)
    places = sharding.stored(mesh, state)
    step = make_step(plan.found.transformer.forward, plan.objective, tx, microbatches=s.microbatches, ema=s.ema or None)
    step = jax.jit(step, out_shardings=(places, sharding.replicated(mesh)), donate_argnums=0)
    plan.source.position = meta["position"]
    if jax.process_index() == 0:
        writers.cut_back(workdir, names, plan.name, int(state.step) if latest is not None else -1)
    log = _Log(plan, workdir, names, meta, int(state.step))
    judge = _Judge(plan, mesh)
    budget = _seconds_of(s.time_of, workdir) if s.time_of else float("inf")

    def save(done: bool, results: dict) -> None:
        log.flush()
        counted = {"num_tokens": log.num_tokens, "seconds": log.seconds, "done": done, "results": results}
        saved.save(state, {"position": plan.source.position, **counted}, results)

    # Loop: a batch, a step, and now and then a look at where we are.
    results = meta.get("results", {})
    if latest is None:
        results = judge(state, log, 0)
    at = int(state.step)
    while at < plan.steps and log.seconds < budget:
        log.clock()
        batch = plan.source(state)
        log.waited()
        state, measured = step(state, sharding.distribute(batch, mesh, s.batch_size))
        at += 1
        log.step(at, batch, measured)
        asked = stop.asked or (jax.process_count() > 1 and saved.reached_preemption(at))
        last = at == plan.steps
        if s.eval_every and at % s.eval_every == 0 and not last:
            results = judge(state, log, at)
        if asked or (s.save_every and at % s.save_every == 0 and not last):
            save(False, results)
        if asked:
            saved.close()
            log.close()
            print(f"\nstopped at {plan.name} step {at}, all saved; the same command continues.", file=sys.stderr)
            raise SystemExit(0)

    # End: a last look, a last save.
    log.settle()
    results = judge(state, log, at)
    save(True, results)
    saved.close()
    log.close()
    return results


def _start(plan: Plan, names: list[str], workdir: Path, tx, mesh) -> TrainState:
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


def _seconds_of(stage: str, workdir: Path) -> float:
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

    def __call__(self, state: TrainState, log: "_Log", step: int) -> dict[str, float]:
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


class _Log:
    """The stage's figures: written one step late in time but never in name, so that the device need not wait for the host."""

    def __init__(self, plan: Plan, workdir: Path, names: list[str], meta: dict, step: int):
        self.plan, self.workdir = plan, workdir
        self.num_tokens, self.seconds = meta["num_tokens"], meta["seconds"]
        self.writer = (
            writers.MetricWriter(workdir, json.loads(plan.settings.to_json()), names) if jax.process_index() == 0 else None
        )
        self.progress = Progress(plan.name, plan.steps, step, quiet=self.writer is None)
        self.schedule = optim.schedule(plan.settings.optimizer, plan.steps)
        self.peak, self.pending, self.wait = peak_flops(), None, 0.0
        self.mark = None

    def clock(self) -> None:
        """Starts a step's time where no step came right before."""
        self.mark = self.mark or time.perf_counter()
        self.began = time.perf_counter()

    def waited(self) -> None:
        """The batch is here: what passed since `clock` was waiting for it."""
        self.wait = time.perf_counter() - self.began

    def step(self, at: int, batch: dict, measured: dict) -> None:
        """Takes a step's metrics without waiting for them, and deals with the step before."""
        self.settle(keep_mark=True)
        self.pending = (at, batch, measured, self.wait)

    def settle(self, keep_mark: bool = False) -> None:
        """Waits for the pending step's figures and writes them if it is their turn; stops the run after too many skipped
        updates.
        """
        if self.pending is not None:
            at, batch, measured, wait = self.pending
            self.pending = None
            values = metrics.values(measured)
            now = time.perf_counter()
            took, self.mark = now - self.mark, now
            self.seconds += took
            self.num_tokens += int(values["num_tokens"])
            self._guard(at, batch, values)
            self.progress.advance()
            every = self.plan.settings.log_every
            if every and (at % every == 0 or at in (1, self.plan.steps)):
                self._write(at, values, took, wait)
        if not keep_mark:
            self.mark = None

    def _write(self, at: int, values: dict, took: float, wait: float) -> None:
        tokens = values["num_tokens"]
        flops = model_flops(self.plan.found.transformer.arch, tokens, values.pop("num_trained"), values.pop("num_pairs"))
        values |= {
            "num_tokens": self.num_tokens,
            "learning_rate": float(self.schedule(at - 1 - int(values["skipped"]))),
            "step_time": took,
            "wait_time": wait,
            "tokens_per_second": tokens / took,
            "mfu": flops / took / self.peak,
        }
        if self.writer:
            self.writer.write(self.plan.name, at, values)
        self.progress.show(at, values)

    def _guard(self, at: int, batch: dict, values: dict) -> None:
        if values["skipped_in_a_row"] < max(self.plan.settings.max_skipped, 1):
            return
        path = self.workdir / f"nonfinite-{self.plan.name}-{at}-process{jax.process_index()}.npz"
        np.savez(path, **batch)
        raise UserError(
            f"{self.plan.name} step {at}: {int(values['skipped_in_a_row'])} updates in a row were not finite and were left out "
            f"(loss {values['loss']}, gradient norm {values['grad_norm']}). The batch is in {path}; lower the learning rate, or "
            "look at the data."
        )

    def evaluated(self, step: int, values: dict, samples: list[dict]) -> None:
        """Writes an evaluation, and samples beside it."""
        if self.writer and values:
            self.writer.write(self.plan.name, step, values)
        if self.writer and samples:
            self.writer.samples(self.plan.name, step, samples + getattr(self.plan.source, "samples", []))
        self.progress.show(step, values)

    def flush(self) -> None:
        """Everything up to here is in the files."""
        self.settle(keep_mark=True)
        if self.writer:
            self.writer.flush()

    def close(self) -> None:
        """Closes files and bar."""
        self.progress.close()
        if self.writer:
            self.writer.close()


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
