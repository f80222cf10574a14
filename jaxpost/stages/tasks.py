"""A stage's task and rewards: its prompts, its test problems, and what judges completions.

Everything that can be wrong with them is found here, before anything is compiled.
"""

import functools
import sys
from collections.abc import Callable, Mapping

import jax
import numpy as np

from jaxpost.config.resolve import bind, entry_of, module, resolve
from jaxpost.config.unread import shares
from jaxpost.data import chat, formats
from jaxpost.data.readers import Record
from jaxpost.errors import UserError
from jaxpost.models import loading, routes
from jaxpost.recipe import plain
from jaxpost.rewards import trl
from jaxpost.rollouts.scoring import Scorer, check_record
from jaxpost.sampling import processors
from jaxpost.stages import datasets
from jaxpost.tokenizer import check_ids

Rewards = Mapping[str, tuple[Callable, float]]
_LEFT_OUT = ', or have such problems left out and counted: config.too_long="drop"'
LOOK = 256  # how many of a task's problems are looked at before anything is compiled


def opened(entry: Mapping):
    """The task of an entry: a module by its `name`, or what the module's `make` gives for the other keys."""
    if not (name := entry.get("name", "")):
        remedy = "give its name too, as config.task.name=arithmetic, or leave it out"
        raise UserError(f"config.task: {dict(entry)} names no task; {remedy}.")
    keys = {k: v for k, v in entry.items() if k not in ("name", "examples", "problems")}
    task = module(name, "tasks")
    return bind(task.make, keys, f"task {name}")() if callable(getattr(task, "make", None)) else task


def task(s):
    """The task that the settings name, with all that this stage will ask of it."""
    task = opened(plain(s.task))
    needed = (
        ["record", "test_records"]
        + ([] if s.reward else ["reward"])
        + (["conversation"] if s.do in ("train", "annotate") and "data" in shares(s.source) and not s.data else [])
    )
    if missing := [name for name in needed if not callable(getattr(task, name, None))]:
        raise UserError(f"config.task: {s.task['name']} has no function {missing[0]}; CONTRIBUTING.md lists what a task has.")
    return task


def rewards(task, name: str, entries: Mapping | str = "") -> Rewards:
    """{name: (function, weight)} of what judges a task's completions: its own reward, the one that an entry names in its place,
    or several: {name: entry with a weight}, where an entry called "task" is the task's own, and "task.NAME" another of its
    functions. A weight of 0 makes a reward a figure to be logged.
    """
    entries = entry_of(entries, "config.reward")
    if not entries:
        return {name.rpartition("/")[2].removesuffix(".py"): (_of_one(task.reward), 1.0)}
    if isinstance(entries, str) or "name" in entries:
        called = entries if isinstance(entries, str) else str(entries["name"])
        entries = {called.rpartition(":")[2].rpartition(".")[2]: entries}
    return {key: _reward(task, key, entry) for key, entry in entries.items()}


def _reward(task, key: str, entry: Mapping | str) -> tuple[Callable, float]:
    options = {"name": entry} if isinstance(entry, str) else dict(entry)
    weight, called = options.pop("weight", 1.0), options.get("name", "")
    if not isinstance(weight, (int, float)) or isinstance(weight, bool):
        raise UserError(f"config.reward.{key}.weight: {weight!r} is no number.")
    if called == "task" or called.startswith("task."):
        own = called.partition(".")[2] or "reward"
        if not callable(getattr(task, own, None)):
            raise UserError(f"config.reward.{key}: the task has no function {own}.")
        return _of_one(getattr(task, own)), float(weight)
    return _of_one(resolve(options, "rewards")), float(weight)


def _of_one(reward: Callable) -> Callable:
    """A reward as a function of one record and one completion."""
    return functools.partial(trl.judge, reward=reward) if trl.is_trl(reward) else reward


def problems(found, judges: Rewards, model, s) -> dict:
    """What `accuracy.graded` takes, of a task's test problems; nothing for a task without any. Raises UserError for one that
    cannot be asked and is not to be left out.
    """
    options = {"prompt_window": s.rollouts.prompt_window, "new": s.rollouts.new, "template": datasets.template(model, s)}
    options["stop"], options["strings"] = stops(model, s, options["template"])
    options["chain"] = processors.without(model.suppressed)
    records, every, counts = [], found.test_records(s.eval_per_cell), loading.columns(model)
    if s.bad_rows != "skip":
        _check_records(found, judges)
    for i, record in enumerate(every):
        place = f"task {s.task['name']}, test problem {i}"
        try:
            _encoded(record, place, model, s, options["template"])
            routes.check(record, counts, place)
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
        why = f"{len(every) - len(records)} of {len(every)} test problems are too long, or have no answer to judge by"
        print(f"task {s.task['name']}: {why}", file=sys.stderr)
    how = {"rows": s.eval_rows, "options": options, "judging": judging(s)}
    return {"records": records, "rewards": judges, **how} if records else {}


def _check_records(task, judges: Rewards) -> None:
    """Raises UserError, with file and row, for the first record of a task with files by which a reward can judge nothing."""
    for record, place in task.placed_records() if callable(getattr(task, "placed_records", None)) else ():
        check_record(judges, record, place)


def stops(model, s, jinja: str) -> tuple[list[int], tuple[str, ...]]:
    """(ids, texts) that end a completion: the tokenizer's, model's and template's ids, or those that the settings give."""
    given = s.rollouts.stop
    ids = [int(x) for x in given if not isinstance(x, str)]
    check_ids(np.array(ids, int), model.transformer.vocab, model.tokenizer, "config.rollouts.stop")
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
    check_ids(ids, model.transformer.vocab, model.tokenizer, place)
    if not len(ids):
        raise UserError(f"{place}: its prompt has no token.")
    if len(ids) > s.rollouts.prompt_window:
        raise _TooLong(
            f"{place}: its prompt has {len(ids)} tokens; config.rollouts.prompt_window takes {s.rollouts.prompt_window}. Make "
            f"that longer{_LEFT_OUT if s.do == 'train' else ''}."
        )
    return ids


def demonstrations(task, model, s) -> Callable:
    """i -> [n] int32, the ids of the task's answer to problem i as the assistant's turn, what ends it included.

    Raises UserError for a task without, and where the answer's text does not follow the prompt's token by token.
    """
    if not callable(getattr(task, "demonstration", None)):
        raise UserError(
            f"config.task: {s.task['name']} has no function demonstration, which config.rollouts asks for (exchange, given); "
            "CONTRIBUTING.md says what it gives."
        )
    jinja = datasets.template(model, s)

    def answer(i: int) -> np.ndarray:
        i = _within_bound(i, s)
        place, text = f"task {s.task['name']}, the demonstration of problem {i}", task.demonstration(i, seed=s.seed)
        prompt = task.record(i, seed=s.seed)["prompt"]
        opening = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        turns = [{"role": "assistant", "content": text}] if isinstance(text, str) else list(text)
        example = formats.demonstration(Record({"messages": [*opening, *turns]}, place), {})
        encoded, ids = chat.encode(example, model.tokenizer, jinja, "last"), chat.encode_prompt(prompt, model.tokenizer, jinja)
        if encoded["tokens"][: len(ids)].tolist() != ids.tolist():
            raise UserError(f"{place}: the tokenizer joins its beginning to the prompt's end; begin it with another letter.")
        return encoded["tokens"][len(ids) : np.flatnonzero(encoded["mask"])[-1] + 1]

    return answer


def _within_bound(i: int, s) -> int:
    """The problem that is drawn i-th: the first `config.task.problems` of them come round and round, or all if that is 0."""
    bound = s.task.get("problems", 0)
    return i % bound if bound else i


def prompts(task, judges: Rewards, model, s, leave_out: bool, answers: Callable | None = None) -> Callable:
    """i -> (record, token ids) of the i-th training problem, or None for one that the settings leave out (too_long="drop",
    bad_rows="skip") where that is possible; some are looked at now. answers: i -> the ids of the answer to it, which are to fit
    a completion.
    """
    jinja, bound, counts = datasets.template(model, s), s.task.get("problems", 0), loading.columns(model)
    if not isinstance(bound, int) or isinstance(bound, bool) or bound < 0:
        raise UserError(f"config.task.problems: {bound!r}; give how many problems to draw, or 0 for all that there are.")

    def prompt(i):
        i = _within_bound(i, s)
        record, place = task.record(i, seed=s.seed), f"task {s.task['name']}, problem {i}"
        try:
            check_record(judges, record, place)
            routes.check(record, counts, place)
            ids = _encoded(record, place, model, s, jinja)
            if answers and (length := len(answers(i))) > s.rollouts.new:
                raise _TooLong(
                    f"{place}: its demonstration has {length} tokens; config.rollouts.new takes {s.rollouts.new}. Make that "
                    f"longer{_LEFT_OUT}."
                )
            return record, ids
        except UserError as error:
            lenient = s.too_long == "drop" if isinstance(error, _TooLong) else s.bad_rows == "skip"
            if not (lenient and leave_out):
                raise
            return None

    looked_at = min(LOOK, bound or LOOK)
    lacking = [i for i in range(looked_at) if prompt(i) is None]
    if bound and len(lacking) == bound:
        raise UserError(f"config.task.problems: all of the first {bound} problems are left out; give more, or mend them.")
    if lacking and jax.process_index() == 0:
        print(
            f"task {s.task['name']}: {len(lacking)} of the first {looked_at} problems are left out, first {lacking[0]}",
            file=sys.stderr,
        )
    return prompt


def judging(s) -> dict:
    """What `scoring.Scorer` takes besides the rewards."""
    r = s.rollouts
    limits = {"seconds": r.reward_seconds, "workers": r.reward_workers, "memory": r.reward_memory}
    return {**limits, "failed": r.failed, "limit": r.failures}


def check_rewards(s, judges: Rewards, learned: bool) -> None:
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
