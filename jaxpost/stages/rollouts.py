"""A stage's rollouts: how completions are drawn, judged and learned from, checked before anything is compiled."""

import inspect
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

from jaxpost.config.resolve import entry_of, find, resolve, within
from jaxpost.config.unread import shares
from jaxpost.declare import declared
from jaxpost.errors import UserError
from jaxpost.models import loading
from jaxpost.recipe import plain
from jaxpost.rollouts import steps as built
from jaxpost.rollouts.batch import RolloutBatch
from jaxpost.rollouts.scores import Scores
from jaxpost.rollouts.source import RolloutConfig, Rollouts, Rows
from jaxpost.sampling import processors
from jaxpost.sampling.decode import Completions
from jaxpost.stages import datasets
from jaxpost.stages.tasks import LOOK, Rewards, check_rewards, demonstrations, judging, prompts, stops


def sampling(model, s) -> dict:
    """What `decode.stream` takes."""
    r = s.rollouts
    stop, strings = stops(model, s, datasets.template(model, s))
    options = {k: r[k] for k in ("prompt_window", "new", "temperature", "top_k", "top_p", "min_p", "slots")}
    about = processors.About(model.tokenizer, tuple(stop), model.transformer.vocab, r.new)
    chain = processors.chain(plain(r.processors), about, "config.rollouts.processors")
    if s.do == "generate":  # a policy gradient's completions are drawn from the model as it is
        chain = processors.without(model.suppressed) + chain
    return {**options, "turns": r.segment, "stop": stop, "strings": strings, "chain": chain}


def source(name: str, task, judges: Rewards, model, s, objective: Callable, mesh) -> Rollouts:
    """The batch source of a stage that learns from completions of its own weights. Raises UserError for settings that do not go
    together.
    """
    r, chosen = s.rollouts, steps(s, objective)
    shape = rows(s, objective, chosen)
    check_rewards(s, judges, learned=shape.pairs or _compares(objective))
    _check_rollouts(s, objective, shape, chosen)
    hint = _given(r.given)
    answered = hint is not None or any(_named(step) == "exchange" for step in chosen)
    answers = demonstrations(task, model, s) if answered else None
    config = RolloutConfig(
        model=model.transformer,
        tokenizer=model.tokenizer,
        mesh=mesh,
        prompt=prompts(task, judges, model, s, leave_out=True, answers=answers),
        demonstration=answers,
        given=hint,
        rewards=judges,
        steps=chosen,
        rows=shape,
        microbatches=s.microbatches,
        seed=s.seed,
        minibatches=r.minibatches,
        epochs=r.epochs,
        lag=r.lag,
        length=s.steps,
        judging=judging(s),
        sampling=sampling(model, s),
        columns=tuple(loading.columns(model)),
    )
    _check_steps(config, s, objective)
    return Rollouts(config)


def rows(s, objective: Callable, chosen: list[Callable] | None = None) -> Rows:
    """The shape of the training batches that a stage's rollouts give; chosen: its `steps`, where they are there already."""
    r, pairs, chosen = s.rollouts, datasets.row_type(objective).completions == 2, chosen or steps(s, objective)
    corrected = "correction" in [_named(step) for step in chosen]
    options = {"pairs": pairs, "shared": s.shared_prefix, "corrected": corrected, "gives": _gives(s, objective, chosen)}
    return Rows(round(s.batch_size * shares(s.source).get("rollouts", 1.0)), r.group, r.prompt_window, r.new, **options)


def _gives(s, objective: Callable, chosen: list[Callable]) -> bool:
    """Whether batches say which tokens the policy drew: where others may be among them, or the objective asks."""
    reads = {"demonstrations", "sampled"} & {*declared(objective, "columns"), *declared(objective, "masks")}
    own = any(getattr(getattr(step, "func", step), "gives", False) for step in chosen)
    return bool(reads or own or s.rollouts.given or len(shares(s.source)) > 1)


# ---------------------------------------------------------------------------------------------------------------- Steps

# Of each step of rollouts/steps.py the settings that are its keywords, where a list of one's own names it without them.
_SETTINGS = {
    "resample": {"rounds": "resample"},
    "overlong": {"soft": "overlong"},
    "truncated": {"reward": "truncated"},
    "correction": {"way": "correction", "cap": "correction_cap"},
    "mask_truncated": {"": "mask_truncated"},
    "drop_level": {"": "drop_level"},
}
_ORDER = ("resample", "overlong", "truncated", "pairs", "annotate", "correction", "advantages", "mask_truncated", "drop_level")


def default(r: Mapping, pairs: bool) -> list[str]:
    """The names of the steps that the other settings ask for, in order. pairs: whether the objective learns from pairs."""
    chosen = {name for name, keys in _SETTINGS.items() if r[next(iter(keys.values()))]} | {"annotate"}
    chosen = (chosen - {"drop_level", "correction"}) | {"pairs"} if pairs else chosen | {"advantages"}
    return [name for name in _ORDER if name in chosen]


def steps(s, objective: Callable) -> list[Callable]:
    """The steps of `config.rollouts.steps`, or those that the other settings ask for, as functions of a batch.

    Raises UserError for an unknown name or keyword, a list in which a step stands where it cannot, and for a setting whose step
    is not in it.
    """
    r, place = s.rollouts, "config.rollouts.steps"
    entries = r.steps.split(",") if isinstance(r.steps, str) else r.steps
    entries = [dict(x) if isinstance(x, Mapping) else {"name": str(x).strip()} for x in map(plain, entries) if x]
    entries = entries or [{"name": name} for name in default(r, datasets.row_type(objective).completions == 2)]
    names = [str(entry.get("name", "")) for entry in entries]
    for name, settings in _SETTINGS.items():
        if (key := next(iter(settings.values()))) and r[key] and name not in names and r.steps:
            raise UserError(f"config.rollouts.{key}: {r[key]!r}, and {place} has no step {name}; add it, or leave this out.")
    if names.count("annotate") != 1:
        raise UserError(f"{place}: {', '.join(names)}; `annotate` stands once between what changes completions and the rest.")
    if "resample" in names[1:]:
        raise UserError(f"{place}: resample draws groups anew, to which no other step was done; put it first.")
    chosen = [_step(entry, r, objective) for entry in entries]
    for name, step in zip(names[names.index("annotate") :], chosen[names.index("annotate") :], strict=True):
        if getattr(getattr(step, "func", step), "changes", False):
            raise UserError(f"{place}: {name} changes which completions there are; put it before annotate.")
    return chosen


def _step(entry: dict, r: Mapping, objective: Callable) -> Callable:
    """A step of the list, with its settings bound."""
    name = entry["name"]
    if name in _SETTINGS and len(entry) == 1:
        entry = entry | {keyword: r[key] for keyword, key in _SETTINGS[name].items() if keyword and r[key]}
    if name == "advantages":
        entry = entry | {"of": _advantages(entry.get("of") or r.advantages, declared(objective, "advantages"))}
    if name == "exchange" and "rule" in entry:
        entry = entry | {"rule": resolve(within(entry["rule"], "steps"), "rollouts")}
    return resolve(within(entry, "steps"), "rollouts")


def _named(step: Callable) -> str:
    """The name of a built-in step; "" for one of the user's own."""
    function = getattr(step, "func", step)
    return function.__name__ if function.__module__ == built.__name__ else ""


def _given(entry: Mapping | str) -> Callable | None:
    """The function of `config.rollouts.given`, which takes what it has keywords for of progress, key and member, as one that
    gives the beginnings of a whole group.
    """
    if not (entry := entry_of(plain(entry), "config.rollouts.given")):
        return None
    entry = within(entry, "given")
    takes = inspect.signature(find(entry["name"], "rollouts")).parameters
    passed = {k: None for k in ("progress", "key", "member") if k in takes}
    bound = resolve({**entry, **passed}, "rollouts")

    def beginnings(record, ids, *, group: int, **about) -> list:
        members = range(group if "member" in passed else 1)
        each = [bound(record, ids, **{k: ({**about, "member": member})[k] for k in passed}) for member in members]
        return each if "member" in passed else each * group

    return beginnings


def _advantages(entry: Mapping | str, own: Mapping | str) -> Callable:
    """The function of rollouts/advantages.py that the settings ask for, with those of the objective's own keywords that it
    takes too (beta, for which the objective asks for the reference), or the objective's own.
    """
    entry = entry_of(plain(entry), "config.rollouts.advantages") or own
    own, entry = (within(x, "advantages") for x in (own, entry))
    takes = inspect.signature(find(entry["name"], "rollouts")).parameters if isinstance(entry.get("name"), str) else {}
    return resolve({**{k: v for k, v in own.items() if k in takes}, **entry}, "rollouts")


def _check_rollouts(s, objective: Callable, shape: Rows, chosen: list[Callable]) -> None:
    """Raises UserError for settings of which one makes another wrong, or idle."""
    r, compares, names = s.rollouts, _compares(objective), [_named(step) for step in chosen]
    way = next((step.keywords.get("way", built.WAYS[0]) for step in chosen if _named(step) == "correction"), "")
    if (count := shape.batch_size * r.minibatches) % shape.per_prompt:
        raise UserError(f"config.rollouts.group: {r.group} must divide config.batch_size x minibatches = {count}.")
    if r.minibatches * r.epochs + r.lag > 1 and not declared(objective, "off_policy"):
        raise UserError(
            "config.rollouts: with several steps a batch, or a lag, the weights are no longer those that sampled, and this "
            "objective does not make up for it; take one with a ratio (policy_gradient.grpo), or minibatches=epochs=1, lag=0."
        )
    if way not in ("", *built.WAYS):
        raise UserError(f"config.rollouts.correction: {way!r}; give '', 'truncate' or 'mask'.")
    restricted = [k for k in ("top_k", "top_p", "min_p", "processors") if r[k] not in ({"top_p": 1.0}.get(k, 0), "", (), [])]
    if not 0 < r.top_p <= 1 or r.min_p > 1:
        raise UserError(f"config.rollouts: top_p={r.top_p} and min_p={r.min_p} are shares; give top_p above 0, and 1 at most.")
    if restricted and compares and way != "truncate":
        raise UserError(
            f"config.rollouts.{restricted[0]}: completions are then drawn from another distribution than the policy's, each "
            "token more often than it would have said it; make up for that by config.rollouts.correction=truncate."
        )
    if "pairs" in names and not shape.pairs:
        raise UserError("config.rollouts.steps: pairs; this objective learns from all completions. Leave it out.")
    if shape.pairs and "pairs" not in names:
        raise UserError("config.rollouts.steps: this objective learns from pairs, and no step makes them; add `pairs`.")
    for key in ("correction", "advantages"):
        if r[key] and not compares:
            raise UserError(f"config.rollouts.{key}: {r[key]!r}; this objective reads no advantages. Leave it out.")
    if not r.correction_cap and way:
        raise UserError("config.rollouts.correction_cap: 0 lets nothing pass; give the largest ratio that may, as 2.0.")
    if declared(objective, "sequence_level") and way == "truncate":
        raise UserError("config.rollouts.correction: the objective weighs whole completions, not tokens; take 'mask'.")
    if r.overlong > r.new:
        raise UserError(f"config.rollouts.overlong: {r.overlong} of at most {r.new} new tokens; give fewer.")


def _compares(objective: Callable) -> bool:
    """Whether completions are weighed by how much better they did, as pairs are not, nor what a teacher judges."""
    return datasets.row_type(objective).completions != 2 and "teacher_hidden" not in declared(objective, "columns")


def _check_steps(config: RolloutConfig, s, objective: Callable) -> None:
    """Hands a trial batch through the steps: two of the task's problems, whose completions end at once; the first's rewards are
    0, the second's 1, 2, ... Raises UserError where what the objective reads is not made, and for groups in which there is
    nothing to compare.
    """
    r, names = s.rollouts, [_named(step) for step in config.steps]
    for key in ("resample", "drop_level"):
        if (r[key] or key in names) and r.group == 1:
            raise UserError(f"config.rollouts.{key}: a group of 1 is always tied; take config.rollouts.group=2 at least.")
    if config.rows.pairs and r.group == 1:
        raise UserError("config.rollouts.group: 1 is no pair; take 2 at least.")
    settled, batch = None, _trial(config, {"ref_logps", "values"} & {*declared(objective, "columns")})
    for step in config.steps:
        before, batch = batch, _tried(step, batch)
        settled = batch.completions if settled is None and _named(step) == "annotate" else settled
        if settled is not None and batch.completions is not settled:
            raise UserError("config.rollouts.steps: a step after annotate changed which completions there are; put it before.")
        if _named(step) == "advantages" and _compares(objective):
            _check_advantages(built.estimated(before, step.keywords["of"]), s, objective)
    if _compares(objective) and "advantages" not in batch.columns:
        raise UserError("config.rollouts.steps: the objective reads advantages, and no step makes them; add `advantages`.")


def _tried(step: Callable, batch: RolloutBatch) -> RolloutBatch:
    """What a step makes of the trial batch. Raises UserError where it raises, or gives no batch."""
    name = getattr(getattr(step, "func", step), "__name__", step)
    try:
        result = step(batch)
    except KeyError as error:
        if name != "advantages":
            raise
        raise UserError(
            f"config.rollouts.advantages: they read {error}, which this objective has no use for, so that nobody makes it; set "
            "their beta to 0, or take an objective that asks for it (policy_gradient.reinforce_pp, policy_gradient.ppo)."
        ) from error
    if not isinstance(result, RolloutBatch):
        raise UserError(f"config.rollouts.steps: {name} gave {type(result).__name__}; a step returns a RolloutBatch.")
    return result


class _Stand(NamedTuple):
    """What stands for the source of the trial batch."""

    columns: dict
    demonstration: Callable
    stop: tuple
    sample: Callable

    def annotate(self, batch: RolloutBatch) -> dict:
        return {k: np.full(batch.real.shape, x, np.float32) for k, x in self.columns.items()}


def _trial(config: RolloutConfig, reads: set[str]) -> RolloutBatch:
    """Two of the task's problems, the group's completions of two tokens each, or of one that all there is room for."""
    group, new = config.rows.group, config.rows.new
    problems = [problem for i in range(LOOK) if (problem := config.prompt(i)) is not None][:2]
    if len(problems) < 2:
        raise UserError(f"config.task: of its first {LOOK} problems fewer than two can be asked.")
    count, length = 2 * group, min(new, 2)
    tokens, ones = np.zeros((count, new), np.int32), np.ones(count, bool)
    tokens[:, :length] = next(iter(config.sampling["stop"]), 0)
    logps = np.where(np.arange(new) < length, np.float32(-1), np.float32(0)) * np.ones((count, 1), np.float32)
    lengths = np.full(count, length)
    completions = Completions(tokens, lengths, logps, ones, lengths - 1, np.zeros((count, new), bool))
    totals = np.maximum(np.arange(count) - group + 1.0, 0.0)
    scores = Scores(totals, {name: totals.copy() for name in config.rewards}, 0)
    values = {k: 0.0 if k == "values" else -1.0 for k in (*reads, "scored_logps")}
    records, prompts = ([problem[i] for problem in problems] for i in (0, 1))
    records = [{**record, "cell": record.get("cell", name)} for record, name in zip(records, "ab", strict=True)]
    batch = RolloutBatch(prompts, records, np.arange(2), completions, scores, ones, ones)
    return batch.replace(source=_Stand(values, config.demonstration, tuple(config.sampling["stop"]), lambda: batch))


def _check_advantages(estimates, s, objective: Callable) -> None:
    """Raises UserError for advantages that are all zero, or of tokens where the objective weighs completions."""
    group = s.rollouts.group
    if not np.any(estimates["advantages"] if isinstance(estimates, dict) else estimates):
        raise UserError(f"config.rollouts.group: {group} leaves nothing to compare with these advantages; take 2 at least.")
    if declared(objective, "sequence_level") and (isinstance(estimates, dict) or np.shape(estimates) != (2, group)):
        raise UserError("config.rollouts.advantages: these are tokens' own, and the objective weighs whole completions.")
