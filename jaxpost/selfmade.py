"""Data that a stage makes itself: a task's problems, the rewards that judge, and what completes the one and asks the other.

Everything that can be wrong with them is found here, before anything is compiled; `plan.py` puts it together with the rest.
"""

import functools
import inspect
import sys
import zlib
from collections.abc import Callable, Mapping

import jax
import numpy as np

from jaxpost import datasets
from jaxpost.data import chat
from jaxpost.declare import declared
from jaxpost.errors import UserError
from jaxpost.objectives import logprobs
from jaxpost.recipe import plain
from jaxpost.resolve import bind, entry_of, find, module, resolve
from jaxpost.rewards import trl
from jaxpost.rollouts.learning import CORRECTIONS, Lessons
from jaxpost.rollouts.samples import Samples, rows
from jaxpost.rollouts.scoring import Scorer, check_record
from jaxpost.rollouts.source import Making, Rollouts
from jaxpost.tokenizer import check_ids

Rewards = Mapping[str, tuple[Callable, float]]
LOOK = 256  # how many of a task's problems are looked at before anything is compiled


def opened(entry: Mapping):
    """The task of an entry: a module by its `name`, or what the module's `make` gives for the other keys."""
    if not (name := entry.get("name", "")):
        remedy = "give its name too, as config.task.name=arithmetic, or leave it out"
        raise UserError(f"config.task: {dict(entry)} names no task; {remedy}.")
    keys = {k: v for k, v in entry.items() if k not in ("name", "examples")}
    found = module(name, "tasks")
    return bind(found.make, keys, f"task {name}")() if callable(getattr(found, "make", None)) else found


def task(s):
    """The task that the settings name, with all that this stage will ask of it."""
    found = opened(plain(s.task))
    needed = (
        ["record", "test_records"]
        + ([] if s.reward else ["reward"])
        + (["conversation"] if s.source == "data" and not s.data else [])
    )
    if missing := [name for name in needed if not callable(getattr(found, name, None))]:
        raise UserError(f"config.task: {s.task['name']} has no function {missing[0]}; CONTRIBUTING.md lists what a task has.")
    return found


def rewards(found, name: str, asked: Mapping | str = "") -> Rewards:
    """{name: (function, weight)} of what judges a task's completions: its own reward, the one that an entry names in its place,
    or several: {name: entry with a weight}, where an entry called "task" is the task's own, and "task.NAME" another of its
    functions. A weight of 0 makes a reward a figure to be logged.
    """
    asked = _given(asked, "config.reward")
    if not asked:
        return {name.rpartition("/")[2].removesuffix(".py"): (_of_one(found.reward), 1.0)}
    if isinstance(asked, str) or "name" in asked:
        asked = {(asked if isinstance(asked, str) else str(asked["name"])).rpartition(":")[2].rpartition(".")[2]: asked}
    return {key: _reward(found, key, entry) for key, entry in asked.items()}


def _given(entry, place: str):
    """An entry as the command line may give it, JSON for a dict."""
    return entry_of(entry, place) if isinstance(entry, str) else entry


def _reward(found, key: str, entry: Mapping | str) -> tuple[Callable, float]:
    options = {"name": entry} if isinstance(entry, str) else dict(entry)
    weight, called = options.pop("weight", 1.0), options.get("name", "")
    if not isinstance(weight, (int, float)) or isinstance(weight, bool):
        raise UserError(f"config.reward.{key}.weight: {weight!r} is no number.")
    if called == "task" or called.startswith("task."):
        own = called.partition(".")[2] or "reward"
        if not callable(getattr(found, own, None)):
            raise UserError(f"config.reward.{key}: the task has no function {own}.")
        return _of_one(getattr(found, own)), float(weight)
    return _of_one(resolve(options, "rewards")), float(weight)


def _of_one(reward: Callable) -> Callable:
    """A reward as a function of one record and one completion."""
    return functools.partial(trl.judge, reward=reward) if trl.is_trl(reward) else reward


def problems(found, judges: Rewards, model, s) -> dict:
    """What `evaluate.graded` takes, of a task's test problems; nothing for a task without any. Raises UserError for one that
    cannot be asked and is not to be left out.
    """
    options = {"prompt_window": s.rollouts.prompt_window, "new": s.rollouts.new, "template": datasets.template(model, s)}
    options["stop"], options["strings"] = _stops(model, s, options["template"])
    records, every = [], found.test_records(s.eval_per_cell)
    if s.bad_rows != "skip":
        _check_records(found, judges)
    for i, record in enumerate(every):
        place = f"task {s.task['name']}, test problem {i}"
        try:
            _encoded(record, place, model, s, options["template"])
        except _TooLong:
            if s.too_long != "drop":
                raise
            continue
        try:
            check_record(judges, record, place)
        except UserError:
            if s.bad_rows != "skip":
                raise
            continue
        records.append(record)
    if every and not records:
        raise UserError(
            f"task {s.task['name']}: no test problem has a prompt of at most config.rollouts.prompt_window="
            f"{s.rollouts.prompt_window} tokens and an answer to judge by; make that longer, or mend the answers."
        )
    if len(records) < len(every) and jax.process_index() == 0:
        told = f"{len(every) - len(records)} of {len(every)} test problems are too long, or have no answer to judge by"
        print(f"task {s.task['name']}: {told}", file=sys.stderr)
    asked = {"records": records, "rewards": judges, "tokenizer": model.tokenizer, "rows": s.eval_rows, "options": options}
    return {**asked, "judging": judging(s)} if records else {}


def _check_records(found, judges: Rewards) -> None:
    """Raises UserError, with file and row, for the first record of a task with files by which a reward can judge nothing."""
    for record, place in found.placed_records() if callable(getattr(found, "placed_records", None)) else ():
        check_record(judges, record, place)


def _stops(model, s, jinja: str) -> tuple[list[int], tuple[str, ...]]:
    """(ids, texts) that end a completion: the tokenizer's, model's and template's ids, or those that the settings give."""
    given = s.rollouts.stop
    ids = [int(x) for x in given if not isinstance(x, str)]
    check_ids(np.array(ids, int), model.transformer.arch.vocab, model.tokenizer, "config.rollouts.stop")
    return ids or list(chat.stop_ids(model.tokenizer, jinja, model.ends)), tuple(x for x in given if isinstance(x, str))


class _TooLong(UserError):
    """A prompt is longer than the window, and nothing else is wrong with it."""


def _encoded(record: Mapping, place: str, model, s, jinja: str) -> np.ndarray:
    """The token ids of a problem's prompt. Raises UserError for a problem without one, and for one that cannot be asked."""
    if not isinstance(record.get("prompt"), str | list):
        raise UserError(f"{place}: has no text or messages under `prompt`; its keys are {', '.join(record)}.")
    try:
        ids = chat.encode_prompt(record["prompt"], model.tokenizer, jinja)
    except UserError as error:
        raise UserError(f"{place}: {error}") from error
    check_ids(ids, model.transformer.arch.vocab, model.tokenizer, place)
    if not len(ids):
        raise UserError(f"{place}: its prompt has no token.")
    if len(ids) > s.rollouts.prompt_window:
        raise _TooLong(
            f"{place}: its prompt has {len(ids)} tokens; config.rollouts.prompt_window takes {s.rollouts.prompt_window}. Make "
            'that longer, or have such problems left out and counted: config.too_long="drop".'
        )
    return ids


def _prompts(found, judges: Rewards, model, s, leave_out: bool) -> Callable:
    """i -> (record, token ids) of the i-th training problem, or None for one that the settings leave out (too_long="drop",
    bad_rows="skip") where that is possible; some are looked at now.
    """
    jinja = datasets.template(model, s)

    def prompt(i):
        record, place = found.record(i, seed=s.seed), f"task {s.task['name']}, problem {i}"
        try:
            check_record(judges, record, place)
            return record, _encoded(record, place, model, s, jinja)
        except UserError as error:
            lenient = s.too_long == "drop" if isinstance(error, _TooLong) else s.bad_rows == "skip"
            if not (lenient and leave_out):
                raise
            return None

    lacking = [i for i in range(LOOK) if prompt(i) is None]
    if lacking and jax.process_index() == 0:
        print(
            f"task {s.task['name']}: {len(lacking)} of the first {LOOK} problems are left out, first {lacking[0]}",
            file=sys.stderr,
        )
    return prompt


def _sampling(model, s) -> dict:
    """What `decode.stream` takes."""
    r = s.rollouts
    stop, strings = _stops(model, s, datasets.template(model, s))
    options = {k: r[k] for k in ("prompt_window", "new", "temperature", "top_k", "top_p", "min_p", "slots")}
    return {**options, "turns": r.segment, "stop": stop, "strings": strings, "chain": tuple(_chain(r.processors))}


def _chain(names: str) -> list[Callable]:
    return [resolve(name.strip(), "sampling") for name in names.split(",") if name.strip()]


def rollouts(name: str, found, judges: Rewards, model, s, objective: Callable, mesh) -> Rollouts:
    """The batch source of a stage that learns from completions of its own weights. Raises UserError for settings that do not go
    together.
    """
    r, lessons = s.rollouts, _lessons(s, objective)
    _check_rewards(s, judges, learned=lessons.pairs or _compares(objective))
    _check_rollouts(s, objective, lessons)
    _check_groups(s, objective, lessons)
    making = Making(
        model=model.transformer,
        tokenizer=model.tokenizer,
        mesh=mesh,
        prompt=_prompts(found, judges, model, s, leave_out=True),
        rewards=judges,
        lessons=lessons,
        now=_now(objective, model, r.correction),
        batch_size=s.batch_size,
        microbatches=s.microbatches,
        group=r.group,
        seed=s.seed,
        minibatches=r.minibatches,
        epochs=r.epochs,
        lag=r.lag,
        rounds=r.resample,
        judging=judging(s),
        sampling=_sampling(model, s),
    )
    return Rollouts(making)


def judging(s) -> dict:
    """What `scoring.Scorer` takes besides the rewards."""
    r = s.rollouts
    limits = {"seconds": r.reward_seconds, "workers": r.reward_workers, "memory": r.reward_memory}
    return {**limits, "failed": r.failed, "limit": r.failures}


def _lessons(s, objective: Callable) -> Lessons:
    r = s.rollouts
    return Lessons(
        advantages=_advantages(r.advantages, declared(objective, "advantages")),
        pairs=datasets.shape(objective) == "pairs",
        group=r.group,
        shared=s.shared_prefix,
        new=r.new,
        overlong=r.overlong,
        truncated=r.truncated,
        mask_truncated=r.mask_truncated,
        drop_level=r.drop_level,
        correction=r.correction,
        cap=r.correction_cap,
    )


def _advantages(asked: Mapping | str, own: Mapping | str) -> Callable:
    """The function of rollouts/advantages.py that the settings ask for, with those of the objective's own keywords that it
    takes too (beta, for which the objective asks for the reference), or the objective's own.
    """
    asked = _given(plain(asked), "config.rollouts.advantages") or own
    own, asked = ({"name": x} if isinstance(x, str) else dict(x) for x in (own, asked))
    for entry in (own, asked):
        if str(entry.get("name", "")).isidentifier():
            entry["name"] = f"advantages.{entry['name']}"
    takes = inspect.signature(find(asked["name"], "rollouts")).parameters if isinstance(asked.get("name"), str) else {}
    return resolve({**{k: v for k, v in own.items() if k in takes}, **asked}, "rollouts")


def _check_rewards(s, judges: Rewards, learned: bool) -> None:
    """learned: whether what they say is learned from. Raises UserError for settings of theirs that cannot be."""
    r = s.rollouts
    if learned and not any(weight for _, weight in judges.values()):
        raise UserError("config.reward: every weight is 0, which leaves figures and nothing to learn; give one another weight.")
    if not r.reward_seconds:
        raise UserError("config.rollouts.reward_seconds: 0 leaves no reward the time to answer; give seconds.")
    if r.failures > 1:
        raise UserError(f"config.rollouts.failures: {r.failures} is no share of the verdicts; give 0 to 1.")
    if not np.isfinite(r.failed):
        raise UserError(f"config.rollouts.failed: {r.failed} is no finite number.")
    Scorer(judges, **judging(s)).close()  # what a reward needs and has not, it says now


def _check_rollouts(s, objective: Callable, lessons: Lessons) -> None:
    """Raises UserError for settings of which one makes another wrong, or idle."""
    r, compares = s.rollouts, _compares(objective)
    if s.batch_size * r.minibatches % lessons.rows_a_prompt:
        raise UserError(
            f"config.rollouts.group: {r.group} must divide config.batch_size x minibatches = {s.batch_size * r.minibatches}."
        )
    if r.minibatches * r.epochs + r.lag > 1 and not declared(objective, "off_policy"):
        raise UserError(
            "config.rollouts: with several steps a batch, or a lag, the weights are no longer those that sampled, and this "
            "objective does not make up for it; take one with a ratio (policy_gradient.grpo), or minibatches=epochs=1, lag=0."
        )
    if r.correction not in CORRECTIONS:
        raise UserError(f"config.rollouts.correction: {r.correction!r}; give '', 'truncate' or 'mask'.")
    restricted = [k for k in ("top_k", "top_p", "min_p", "processors") if r[k] != {"top_p": 1.0, "processors": ""}.get(k, 0)]
    if not 0 < r.top_p <= 1 or r.min_p > 1:
        raise UserError(f"config.rollouts: top_p={r.top_p} and min_p={r.min_p} are shares; give top_p above 0, and 1 at most.")
    if restricted and compares and r.correction != "truncate":
        raise UserError(
            f"config.rollouts.{restricted[0]}: completions are then drawn from another distribution than the policy's, each "
            "token more often than it would have said it; make up for that by config.rollouts.correction=truncate."
        )
    for key in ("correction", "advantages"):
        if r[key] and not compares:
            raise UserError(f"config.rollouts.{key}: {r[key]!r}; this objective reads no advantages. Leave it out.")
    if r.correction and not r.correction_cap:
        raise UserError("config.rollouts.correction_cap: 0 lets nothing pass; give the largest ratio that may, as 2.0.")
    if r.overlong > r.new:
        raise UserError(f"config.rollouts.overlong: {r.overlong} of at most {r.new} new tokens; give fewer.")


def _compares(objective: Callable) -> bool:
    """Whether completions are weighed by how much better they did, as pairs are not, nor what a teacher judges."""
    return datasets.shape(objective) != "pairs" and "teacher_hidden" not in declared(objective, "columns")


def _check_groups(s, objective: Callable, lessons: Lessons) -> None:
    """Raises UserError for groups in which there is nothing to compare."""
    r = s.rollouts
    for key in ("resample", "drop_level"):
        if r[key] and r.group == 1:
            raise UserError(f"config.rollouts.{key}: a group of 1 is always level; take config.rollouts.group=2 at least.")
    if lessons.pairs and r.group == 1:
        raise UserError("config.rollouts.group: 1 is no pair; take 2 at least.")
    if not _compares(objective):
        return
    ones, reads = np.ones((2 * r.group, 2), np.float32), declared(objective, "columns")
    tokens = {"mask": ones > 0, "old_logps": -ones, "tasks": ["a", "b"]}
    tokens |= {k: x for k, x in (("ref_logps", -ones), ("values", 0 * ones)) if k in reads}
    try:
        made = lessons.advantages(np.arange(2.0 * r.group).reshape(2, r.group), tokens)
    except KeyError as error:
        raise UserError(
            f"config.rollouts.advantages: they read {error}, which this objective has no use for, so that nobody makes it; set "
            "their beta to 0, or take an objective that asks for it (policy_gradient.reinforce_pp, policy_gradient.ppo)."
        ) from error
    if not np.any(made["advantages"] if isinstance(made, dict) else made):
        raise UserError(f"config.rollouts.group: {r.group} leaves nothing to compare with these advantages; take 2 at least.")
    if declared(objective, "sequence_level") and (isinstance(made, dict) or np.shape(made) != (2, r.group)):
        raise UserError("config.rollouts.advantages: these are tokens' own, and the objective weighs whole completions.")
    if declared(objective, "sequence_level") and r.correction == "truncate":
        raise UserError("config.rollouts.correction: the objective weighs whole completions, not tokens; take 'mask'.")


def _now(objective: Callable, model, correction: str) -> tuple[Callable, ...]:
    """Programs (params, batch) -> columns of the weights that sampled: those that the objective names, and their own
    log-probabilities where the sampler's are corrected.
    """
    forward, made = model.transformer.forward, []
    for column in declared(objective, "current").values():
        made.append(jax.jit(functools.partial(column, forward)))
    if correction:

        def scored(params, batch):
            return {"scored_logps": logprobs.token_scores(forward(params, batch), batch)["logps"]}

        made.append(jax.jit(scored))
    return tuple(made)


def samples(name: str, found, judges: Rewards, model, s, objective: Callable, mesh) -> Samples:
    """The data set that a stage has its start weights make. Raises UserError for settings with which it could not be learned
    from.
    """
    if s.rollouts.group < 2:
        raise UserError(f"config.rollouts.group: {s.rollouts.group} leaves nothing to compare; take 2 at least.")
    _check_rewards(s, judges, learned=True)
    prompt, shape = _prompts(found, judges, model, s, leave_out=False), datasets.shape(objective)
    trial = [row for i in range(8) for row in rows(shape, prompt(i)[0]["prompt"], "12", (1, 0))]
    datasets.check(trial, model, s, objective)
    step = zlib.crc32(name.encode()) >> 1  # that each stage draws others
    return Samples(
        model=model.transformer,
        tokenizer=model.tokenizer,
        prompt=prompt,
        rewards=judges,
        shape=shape,
        count=s.task.get("examples", datasets.EXAMPLES),
        group=s.rollouts.group,
        rows=s.eval_rows,
        seed=s.seed,
        step=step,
        judging=judging(s),
        options=_sampling(model, s),
    )
