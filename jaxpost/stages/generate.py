"""A stage that generates: completions of a task's prompts, judged, as rows that a later stage learns from like any file.

    drawn={"do": "generate", "model": "@sft", "task": {"name": "countdown", "examples": 4000}, "rows": "pairs"}

`rollouts.group` completions of each of `task.examples` prompts are drawn once. `rows` is the row type of the rows that they
give (`rows_of` in data/row_types/). A completion that no stop token ended gives none, since the row would end it with a token
that the model did not say. Rows are text: a tokenizer may write a text in other tokens than the model drew it in. Rows of one
prompt follow each other, so what a later stage holds out may be of prompts that it trains on.

With `prompt` the stage makes rows of another kind, by functions of the recipe's own (synthesis.py).
"""

import functools
import json
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import tqdm

from jaxpost import sharding
from jaxpost.config.naming import digest_of
from jaxpost.data import mixture, row_types
from jaxpost.data.row_types import RowType
from jaxpost.errors import UserError
from jaxpost.models import loading, routes
from jaxpost.models.identity import identity
from jaxpost.models.transformer import Transformer
from jaxpost.recipe import plain
from jaxpost.rollouts.scoring import judged
from jaxpost.sampling import processors
from jaxpost.sampling.decode import Completions, answers, in_chunks
from jaxpost.stages import datasets, synthesis, tasks
from jaxpost.stages.rollouts import sampling
from jaxpost.stages.run import Output, Run, check_room
from jaxpost.storage.artefacts import Artefact
from jaxpost.types import Params

SECONDS = 20.0  # between parts: what a kill costs
# The settings that decide what the rows are.
_DECIDING = ("task", "tokenizer", "reward", "rollouts", "seed", "dtype")


class Samples(NamedTuple):
    """What is drawn: `group` completions of each of `count` prompts.

    prompt: i -> (record, token ids); rewards: {name: (function, weight)}; row_type: of the rows that they give; batch: how
    many completions are drawn at a time, which changes nothing; seed, step: of the noise; judging: what `scoring.judged` takes;
    options: what `complete` takes.
    """

    model: Transformer
    tokenizer: Any
    prompt: Callable
    rewards: Mapping[str, tuple[Callable, float]]
    row_type: RowType
    count: int
    group: int
    batch: int
    seed: int
    step: int
    judging: dict
    options: dict


class Plan(NamedTuple):
    """A stage that generates, checked: nothing is compiled yet, and no weights are read."""

    name: str
    settings: Any
    spec: loading.ModelSpec
    samples: Samples
    trial: tuple[dict, ...]
    problems: Callable[[], str]


def planned(name: str, s, run: Run) -> Plan | synthesis.Synthesis:
    """Reads, resolves and checks what the settings name. Raises UserError for those that could give no rows."""
    if s.prompt or s.endpoint:
        return synthesis.planned(name, s, run)
    spec = run.described(s)
    check_room(spec, s.rollouts)
    row_type = row_types.load(s.rows)
    if row_type.rows_of is None:
        raise UserError(f"config.{name}.rows: {s.rows!r} has no rows_of(texts, rewards), which makes rows of completions.")
    if s.rollouts.group < 2 and not list(row_type.rows_of(["1"], np.ones(1))):
        raise UserError(f"config.rollouts.group: {s.rollouts.group} leaves nothing to compare; take 2 at least.")
    if not s.task:
        raise UserError("config.task: generate needs a task, or config.data with prompts and config.reward.")
    task, count = tasks.task(s), s.task.get("examples", datasets.EXAMPLES)
    if not isinstance(count, int) or isinstance(count, bool) or count < 1:
        raise UserError(f"config.task.examples: {count!r}; give how many problems to ask.")
    rewards = tasks.rewards(task, s.task["name"], plain(s.reward))
    tasks.check_rewards(s, rewards, learned=True)
    prompt = tasks.prompts(task, rewards, spec, s, leave_out=False)
    samples = Samples(
        model=spec.transformer,
        tokenizer=spec.tokenizer,
        prompt=prompt,
        rewards=rewards,
        row_type=row_type,
        count=count,
        group=s.rollouts.group,
        batch=s.eval_rows,
        seed=s.seed,
        step=zlib.crc32(name.encode()) >> 1,  # so that two stages draw different completions
        judging=tasks.judging(s),
        options=sampling(spec, s),
    )
    trial = [row for i in range(8) for row in rows(row_type, prompt(i)[0]["prompt"], ["1", "2"], [1, 0])]
    records = functools.partial(_records, task, s, count)
    return Plan(name, s, spec, samples, tuple(trial), records)


def _records(task, s, count: int) -> str:
    """A digest of the problems that are asked."""
    return mixture.digest_of_rows(task.record(i, seed=s.seed) for i in range(count))


def output(plan: Plan | synthesis.Synthesis) -> Output:
    """What later stages are told before there are rows."""
    return Output(pending=True, trial=plan.trial)


def make(plan: Plan | synthesis.Synthesis, run: Run) -> Output:
    """Draws what is not there yet, and gives the files."""
    if isinstance(plan, synthesis.Synthesis):
        return synthesis.make(plan, run)
    origin = run.starting(plan.spec, plan.settings)
    s = plan.settings
    about = {
        "weights": identity(origin, s.seed),
        "rows": [s.rows, plan.samples.row_type.digest],
        "step": plan.samples.step,
    }
    words = plan.spec.tokenizer.backend_tokenizer.to_str()
    about |= {"template": datasets.template(origin, s), "problems": plan.problems(), "tokenizer": digest_of(words)}
    about |= {"judge": digest_of([reward for reward, _ in plan.samples.rewards.values()])}
    about |= {k: plain(s[k]) for k in _DECIDING} | processors.identity(plan.samples.options["chain"])
    artefact = Artefact(run.root, "rows", about)
    weights = functools.partial(loading.weights, origin, run.mesh, s.seed)
    with run.stop.saving(f"{plan.name}, while it drew completions"):
        progress = draw(plan.samples, artefact, weights, run.mesh, lambda: run.stop.asked)
    spent = {"generated": progress["tokens"]}
    return Output(rows=str(artefact.folder / "part-*.jsonl"), seconds=progress["seconds"], spent=spent)


def draw(
    samples: Samples, artefact: Artefact, params: Callable[[], Params], mesh, stopped: Callable[[], bool] = lambda: False
) -> dict[str, float]:
    """Draws what is not there yet, until it is all there or `stopped`; how far it is then. params: gives the weights, if they
    are needed.

    All processes call it. Raises UserError where all completions together give no row.
    """
    progress, done = artefact.resume(prompts=0, rows=0, tokens=0, seconds=0.0)
    if not done:
        progress = _draw(samples, artefact, progress, params(), mesh, stopped)
    if progress["prompts"] < samples.count:
        return progress
    if not progress["rows"]:
        if jax.process_index() == 0:
            artefact.forget()  # what mends it may be nothing that the digest knows, as a file that the reward reads
        raise UserError(
            f"{samples.count:,} prompts, and in none do completions differ in their reward, so there is nothing to learn; give "
            "more prompts (config.task.examples), a larger group, or a model that is right now and then."
        )
    if jax.process_index() == 0:
        drawn = f"{progress['rows']:,} rows of {samples.group} completions to each of {samples.count:,} prompts"
        print(f"samples: {drawn}, drawn in {progress['seconds']:.0f}s; {artefact.folder}", file=sys.stderr)
    return progress


def _draw(samples: Samples, artefact: Artefact, progress: dict, params: Params, mesh, stopped) -> dict:
    """Draws the rest; the first process judges and writes. The progress at the end."""
    first, at_once, records = progress["prompts"], max(1, samples.batch // samples.group), []

    def prompts() -> Iterator[np.ndarray]:
        for i in range(first, samples.count):
            record, ids = samples.prompt(i)
            records.append(record)
            yield ids

    noise = {"seed": samples.seed, "step": samples.step, "number": first * samples.group, "group": samples.group}
    options = {"rows": at_once, "tokenizer": samples.tokenizer, **noise, **samples.options}
    if counts := routes.columns(params):
        asked = [samples.prompt(i)[0] for i in range(first, samples.count)]
        options["columns"] = routes.of_records(asked, counts)
    chunks = in_chunks(samples.model, params, prompts(), mesh=mesh, **options)
    pending, tokens, mark, total = [], progress["tokens"], time.monotonic(), -(-(samples.count - first) // at_once)
    for where, completions in tqdm.tqdm(chunks, desc="sampling", unit="batch", disable=None, total=total):
        at = first + where.stop
        ends = at == samples.count or stopped()
        if jax.process_index() == 0:
            pending += _rows(samples, records[where], completions)
            tokens += int(completions.lengths.sum())
            if ends or time.monotonic() - mark >= SECONDS:
                count, seconds = progress["rows"] + len(pending), progress["seconds"] + time.monotonic() - mark
                progress = {"prompts": at, "rows": count, "tokens": tokens, "seconds": seconds}
                lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in pending)
                artefact.add(".jsonl" if lines else ".none", lines.encode(), **progress)
                pending, mark = [], time.monotonic()
        if ends:
            break
    if jax.process_index() == 0 and progress["prompts"] == samples.count and progress["rows"]:
        artefact.finish(rows=progress["rows"])
    return {name: type(value)(sharding.agree(float(value))) for name, value in progress.items()}


def _rows(samples: Samples, records: Sequence[dict], completions: Completions) -> list[dict]:
    """The rows that these problems' completions give, `group` of each."""
    texts, lines = answers(completions, samples.tokenizer), []
    ended = np.flatnonzero(completions.stopped)
    judged_by = [records[j // samples.group] | {"stopped": True} for j in ended]
    scores = judged(samples.rewards, judged_by, [texts[j].strip() for j in ended], **samples.judging)
    for i, record in enumerate(records):
        own = [(texts[j].strip(), score.total) for j, score in zip(ended, scores, strict=True) if j // samples.group == i]
        own = [(text, total) for text, total in own if np.isfinite(total)]  # a completion that no reward applies to is no row
        lines += rows(samples.row_type, record["prompt"], [text for text, _ in own], [total for _, total in own])
    return lines


def rows(row_type: RowType, prompt: str | list, texts: Sequence[str], rewards: Sequence[float]) -> list[dict]:
    """The rows that a prompt's completions give, as a file of this row type has them, each once.

    Raises UserError for a reward that is no label where one is needed.
    """
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    distinct = {json.dumps(row): row for row in row_type.rows_of(texts, np.asarray(rewards, float))}
    return [{"prompt": messages, **row} for row in distinct.values()]
