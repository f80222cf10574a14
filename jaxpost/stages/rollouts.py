"""A stage's rollouts: how completions are drawn, judged and learned from, checked before anything is compiled."""

import functools
import inspect
from collections.abc import Callable, Mapping

import jax
import numpy as np

from jaxpost.declare import declared
from jaxpost.errors import UserError
from jaxpost.objectives import logprobs
from jaxpost.recipe import plain
from jaxpost.resolve import entries, find, resolve
from jaxpost.rollouts.learning import CORRECTIONS, Lessons
from jaxpost.rollouts.source import RolloutConfig, Rollouts
from jaxpost.stages import datasets
from jaxpost.stages.tasks import Rewards, check_rewards, given, judging, prompts, stops


def sampling(model, s) -> dict:
    """What `decode.stream` takes."""
    r = s.rollouts
    stop, strings = stops(model, s, datasets.template(model, s))
    options = {k: r[k] for k in ("prompt_window", "new", "temperature", "top_k", "top_p", "min_p", "slots")}
    return {**options, "turns": r.segment, "stop": stop, "strings": strings, "chain": tuple(_chain(r.processors))}


def _chain(processors) -> list[Callable]:
    return [resolve(entry, "processors") for entry in entries(plain(processors), "config.rollouts.processors")]


def source(name: str, found, judges: Rewards, model, s, objective: Callable, mesh) -> Rollouts:
    """The batch source of a stage that learns from completions of its own weights. Raises UserError for settings that do not go
    together.
    """
    r, lessons = s.rollouts, _lessons(s, objective)
    check_rewards(s, judges, learned=lessons.pairs or _compares(objective))
    _check_rollouts(s, objective, lessons)
    _check_groups(s, objective, lessons)
    making = RolloutConfig(
        model=model.transformer,
        tokenizer=model.tokenizer,
        mesh=mesh,
        prompt=prompts(found, judges, model, s, leave_out=True),
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
        sampling=sampling(model, s),
    )
    return Rollouts(making)


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
    asked = given(plain(asked), "config.rollouts.advantages") or own
    own, asked = ({"name": x} if isinstance(x, str) else dict(x) for x in (own, asked))
    for entry in (own, asked):
        if str(entry.get("name", "")).isidentifier():
            entry["name"] = f"advantages.{entry['name']}"
    takes = inspect.signature(find(asked["name"], "rollouts")).parameters if isinstance(asked.get("name"), str) else {}
    return resolve({**{k: v for k, v in own.items() if k in takes}, **asked}, "rollouts")


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
    restricted = [k for k in ("top_k", "top_p", "min_p", "processors") if r[k] not in ({"top_p": 1.0}.get(k, 0), "", (), [])]
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
