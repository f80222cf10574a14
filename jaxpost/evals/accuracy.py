"""A task's accuracy, or the mean of a reward: the model answers test problems, and rewards judge.

    evals={"sums": {"name": "accuracy", "task": "arithmetic"}, "school": {"name": "accuracy", "task": {"name": "gsm8k"}, ...}}
    python -m jaxpost.evaluate --model=FOLDER --task=arithmetic --samples=16 --k=1,4,16

One answer to each problem is sampled at temperature 1 and one is greedy; or `samples` of each are drawn, for pass@k and maj@k
(evals/pass_at_k.py). The mean of a reward that is annotated `-> bool`, as a verifier is, is called accuracy; that of any other
is called reward. A completion's noise is a function of the seed and the problem's number alone: the same weights always have
the same figure.
"""

import inspect
import types
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from jaxpost.data import chat
from jaxpost.errors import UserError
from jaxpost.evals import pass_at_k
from jaxpost.evals.intervals import mean, standard_error, wilson
from jaxpost.models import protocol, routes
from jaxpost.rollouts import scoring
from jaxpost.rollouts.scores import everywhere
from jaxpost.sampling.decode import answers, in_chunks, ready
from jaxpost.sampling.processors import About, chain, without
from jaxpost.stages import tasks

NOISE = 271828  # the seed of the one sampled answer to each problem


def accuracy(
    model: Any,
    *,
    task: str | Mapping,
    reward: str | Mapping = "",
    per_cell: int = 50,
    new: int = 64,
    samples: int = 0,
    ks: Sequence[int] = (1,),
    template: str | None = None,
    processors: str | Sequence = "",
    rows: int = 64,
) -> Iterator[tuple[str, float | list]]:
    """(accuracy or reward, the same _greedy, and of each cell) of a task's test problems, see `graded`; or, of several
    `samples` of each problem, pass@k and maj@k for each k of ks, see `sampled`. First comes ("problems", how many there are),
    last ("samples", rows) as there.

    model: api.Model. task: its name, or a dict with its keys; reward: an entry in place of the task's own; per_cell: test
    problems of each of the task's cells; new: the most tokens of an answer; processors: what an answer may be, named as in
    `rollouts.processors`; rows: problems at a time, which changes nothing.
    Raises UserError for an unknown task, or one whose problems the model has no room for.
    """
    records, rewards, extract, options = _asked(model, task, reward, per_cell, new, samples, ks, template, processors)
    yield "problems", len(records)
    how = {"rows": min(rows, len(records)), "options": options}
    if samples:
        yield from sampled(model, records, rewards, n=samples, ks=ks, extract=extract, **how)
    else:
        yield from graded(model, records, rewards, **how)


def _asked(
    model, task, reward="", per_cell=50, new=64, samples=0, ks=(1,), template=None, processors="", rows=64
) -> tuple[list[dict], tasks.Rewards, Callable | None, dict]:
    """(test problems, what judges them, the task's `extract`, options of `graded`). Raises what `accuracy` raises; of the model
    no weights are needed.
    """
    protocol.check(model.transformer, "accuracy: its answers are sampled, and", protocol.Sampled)
    model.need_tokenizer()
    entry = dict(task) if isinstance(task, Mapping) else {"name": task}
    opened, name = tasks.opened(entry), entry["name"]
    if not callable(getattr(opened, "test_records", None)):
        raise UserError(f"task={name}: has no function test_records; CONTRIBUTING.md lists what a task has.")
    if not (reward or callable(getattr(opened, "reward", None))):
        raise UserError(f"task={name}: has no reward of its own; name one, as reward=FILE.py:reward.")
    rewards = tasks.rewards(opened, name, reward)
    if not (records := opened.test_records(per_cell)):
        raise UserError(f"task={name}: has no test problems.")
    for i, record in enumerate(records):
        if not isinstance(record.get("prompt"), str | list):
            raise UserError(f"task={name}, test problem {i}: has no text or messages under `prompt`.")
        scoring.check_record(rewards, record, f"task={name}, test problem {i}")
    for k in ks if samples else ():
        pass_at_k.check(k, samples)
    longest = max(len(chat.encode_prompt(r["prompt"], model.tokenizer, template)) for r in records)
    if (new := min(new, model.max_positions - longest)) < 1:
        raise UserError(f"task={name}: a prompt of {longest} tokens leaves no room for an answer in the model's positions.")
    options = {"prompt_window": longest, "new": new, "template": template}
    options["stop"] = chat.stop_ids(model.tokenizer, template, model.ends)
    about = About(model.tokenizer, tuple(options["stop"]), model.transformer.vocab, new)
    options["chain"] = without(model.suppressed) + chain(processors, about, f"task={name}, processors")
    return records, rewards, getattr(opened, "extract", None), options


accuracy.check = _asked


def graded(
    model: Any,
    records: Sequence[dict],
    rewards: Mapping,
    *,
    rows: int,
    options: dict,
    judging: Mapping = types.MappingProxyType({}),
) -> Iterator[tuple[str, float | list]]:
    """(reward, mean of one sample a problem), (reward_greedy, ...), the same for each cell as <name>/<cell>, where there are
    several. Where a reward is a verifier, whose signature says that it gives a bool, these are called accuracy and are about
    it, and reward is there besides. After each comes its uncertainty: of an accuracy _low and _high, its 95% interval
    (`intervals.wilson`), of a reward _se, its standard error. Of several rewards each as rewards/<its name>, too. A completion
    that a reward does not apply to is left out of its mean.

    records: dicts with prompt, and maybe answer, cell (else "all") and a weight in the overall mean. rewards: {name:
    (function, weight)}; judging: what `scoring.judged` takes. rows: how many are completed at a time; options: prompt_window,
    new, template, and maybe stop and strings. Last yields ("samples", rows of problem (its number), cell, prompt, completion,
    answer, reward, kind). All processes compute the same.
    """
    params, verifier = ready(model.transformer, model.params, model.mesh), _verifier(rewards)
    kind, table = "accuracy" if verifier else "reward", []
    cells, weights = np.array([r.get("cell", "all") for r in records]), [r.get("weight", 1.0) for r in records]
    for suffix, temperature in (("", 1.0), ("_greedy", 0.0)):
        drawn = _drawn(model, params, records, rows=rows, options=options, temperature=temperature, seed=NOISE)
        judged = everywhere(rewards, *zip(*drawn, strict=True), **judging)
        scores = np.array([_verdict(score, verifier) for score in judged])
        yield from _figures(f"{kind}{suffix}", scores, weights, verifier)
        if verifier and temperature:
            yield from _figures("reward", [score.total for score in judged], weights)
        for name in rewards if len(rewards) > 1 else ():
            yield from _figures(f"rewards/{name}{suffix}", [_verdict(score, name) for score in judged])
        for cell in dict.fromkeys(cells) if len(set(cells)) > 1 else ():
            yield from _figures(f"{kind}{suffix}/{cell}", scores[cells == cell], None, verifier)
        for i, ((record, text), score) in enumerate(zip(drawn, scores, strict=True)):
            row = _row(i, record, text) | {"reward": float(score), "kind": "sampled" if temperature else "greedy"}
            table.append({**row, "cell": str(cells[i])} if len(set(cells)) > 1 else row)
    yield "samples", table


def names(records: Sequence[Mapping], rewards: Mapping) -> Iterator[str]:
    """The names of the figures that `graded` gives for these problems and rewards."""
    verifier, cells = _verifier(rewards), {r.get("cell", "all") for r in records}
    kind, ends = ("accuracy", ("_low", "_high")) if verifier else ("reward", ("_se",))
    for suffix in ("", "_greedy"):
        yield from (f"rewards/{name}{suffix}{end}" for name in rewards if len(rewards) > 1 for end in ("", "_se"))
        for part in ("", *(f"/{cell}" for cell in cells if len(cells) > 1)):
            yield from (f"{kind}{suffix}{part}{end}" for end in ("", *ends))
    yield from ("reward", "reward_se")


def sampled(
    model: Any,
    records: Sequence[dict],
    rewards: Mapping,
    *,
    n: int,
    rows: int,
    options: dict,
    ks: Sequence[int] = (1,),
    extract: Callable[[str], Hashable | None] | None = None,
    temperature: float = 1.0,
    seed: int = 0,
    step: int = 0,
) -> Iterator[tuple[str, float | list]]:
    """`pass_at_k.figures` of n samples of each problem at a temperature, judged by the verifier among the rewards or else by
    their sum, and last ("samples", rows): each sample's problem (its number), prompt, completion, answer (the record's),
    extracted (where there is `extract`), reward and stopped.

    records, rewards, rows and options as `graded` takes them. A problem with a sample to which no reward applies is in no
    figure, and "left_out" says how many there are. extract: from a completion to its answer, for the majority. All processes
    compute the same. Raises UserError for a k that is not between 1 and n, before anything is sampled.
    """
    for k in ks:
        pass_at_k.check(k, n)
    params, verifier, rows = ready(model.transformer, model.params, model.mesh), _verifier(rewards), min(rows, len(records))
    noise = {"temperature": temperature, "seed": seed, "step": step, "slots": rows}
    drawn = _drawn(model, params, records, rows=rows, options=options, group=n, **noise)
    scores = [_verdict(score, verifier) for score in everywhere(rewards, *zip(*drawn, strict=True))]
    predictions = None if extract is None else [extract(text) for _, text in drawn]
    by_problem = None if predictions is None else [predictions[i : i + n] for i in range(0, len(predictions), n)]
    weights, name = [r.get("weight", 1.0) for r in records], "pass" if verifier else "best"
    yield from pass_at_k.figures_of_whole(np.reshape(scores, (-1, n)), by_problem, ks=ks, weights=weights, name=name)
    table = [_row(i // n, record, text) for i, (record, text) in enumerate(drawn)]
    extracted = [{}] * len(table) if predictions is None else [{"extracted": answer} for answer in predictions]
    last = [{"stopped": record["stopped"], "reward": float(score)} for (record, _), score in zip(drawn, scores, strict=True)]
    yield "samples", [a | b | c for a, b, c in zip(table, extracted, last, strict=True)]


def _drawn(model, params, records: Sequence[dict], *, options: dict, group: int = 1, **how) -> list[tuple[dict, str]]:
    """(record, completion) of `group` completions of each problem in turn; records say by `stopped` whether it ended by itself,
    at a stop token or string.
    """
    sampling = {key: value for key, value in options.items() if key != "template"} | how
    sampling.setdefault("stop", chat.stop_ids(model.tokenizer, options["template"]))
    prompts = [chat.encode_prompt(r["prompt"], model.tokenizer, options["template"]) for r in records]
    drawn = []
    columns = routes.of_records(records, routes.columns(params))
    where = {"mesh": model.mesh, "tokenizer": model.tokenizer, "group": group, "columns": columns}
    for which, completions in in_chunks(model.transformer, params, prompts, **where, **sampling):
        repeated_records = [record for record in records[which] for _ in range(group)]
        texts = answers(completions, model.tokenizer)
        for record, text, stopped in zip(repeated_records, texts, completions.stopped.tolist(), strict=True):
            drawn.append(({**record, "stopped": stopped}, text))
    return drawn


def _figures(
    name: str, scores: Sequence[float], weights: Sequence[float] | None = None, verifier: str | None = None
) -> Iterator[tuple[str, float]]:
    """(name, the weighted mean of what a reward applies to), and how far other problems would move it: of a verifier its
    interval as NAME_low and NAME_high, else the standard error NAME_se.
    """
    yield name, (average := mean(scores, weights))
    weights = np.ones(len(scores)) if weights is None else np.asarray(weights)
    counted = weights[np.isfinite(scores)]
    if verifier and len(counted):
        yield from zip((f"{name}_low", f"{name}_high"), wilson(average, counted), strict=True)
    elif len(counted) > 1:
        yield f"{name}_se", standard_error(scores, weights)


def _row(problem: int, record: Mapping, text: str) -> dict:
    return {"problem": problem, "prompt": record["prompt"], "completion": text, "answer": record.get("answer", "")}


def _verifier(rewards: Mapping) -> str | None:
    """The name of the reward that is a verifier: its signature says that it gives a bool."""
    return next((name for name, (reward, _) in rewards.items() if _gives_bool(reward)), None)


def _gives_bool(reward: Callable) -> bool:
    return inspect.signature(reward).return_annotation in (bool, "bool")


def _verdict(score: scoring.Score, name: str | None) -> float:
    """What the reward of a name, or else all together, made of a completion; nan where it does not apply."""
    verdict = score.each[name] if name else score.total
    return float("nan") if verdict is None else verdict
