"""What happens between drawing completions and learning from them, as a list of functions: `rollouts.steps` names them.

A step is (batch: RolloutBatch, *, its settings) -> RolloutBatch (`rollouts/batch.py`). Those up to `annotate` run when the
completions are drawn, the others when they are learned from: with a lag, rewards have that time, and a step that reads
`batch.scores` or `batch.rewards` before `annotate` waits for them. What completions there are is settled by then.

    resample       more groups, in place of those whose rewards are equal; the first step, where it is one
    exchange       a group's demonstration in place of completions, as a rule over its rewards has it
    overlong       a punishment that grows with the length
    truncated      a number added to the reward of a completion that only the limit ended
    pairs          of each group the best and the worst, for objectives of pairs
    annotate       what models say of the completions: a reference, a critic, the trainer's own log-probabilities
    correction     weights for a sampler whose probabilities are not the trainer's
    advantages     how much better than expected each completion, or token, did (`rollouts/advantages.py`)
    mask_truncated truncated completions are not learned from, but counted
    drop_level     groups of equal rewards are neither learned from nor counted
"""

from collections.abc import Callable

import numpy as np

from jaxpost.errors import UserError
from jaxpost.rollouts.batch import RolloutBatch, figures, joined
from jaxpost.rollouts.scores import LEVEL, differing

WAYS = ("truncate", "mask")
VERDICTS = ("keep", "drop", "demonstration")


def changes(step: Callable) -> Callable:
    """Declares that a step changes which completions there are: it must stand before `annotate`."""
    step.changes = True
    return step


def gives(step: Callable) -> Callable:
    """Declares that a step puts tokens into completions that the policy did not draw, or leaves single ones out."""
    step.gives = step.changes = True
    return step


# ------------------------------------------------------------------------------------------------ Which completions


@changes
def resample(batch: RolloutBatch, *, rounds: int = 3) -> RolloutBatch:
    """As many groups as before, of those that are sampled until there are enough whose rewards differ, or `rounds` times more;
    then others fill the batch. Scores decide, without what length adds. Source: "DAPO: An Open-Source LLM Reinforcement
    Learning System at Scale", whose dynamic sampling has no limit of rounds.
    """
    target, batches, differs = len(batch.numbers), [batch], differing(batch.scores.totals.reshape(-1, batch.group))
    while len(batches) <= rounds and differs.sum() < target:
        batches.append(batch.source.sample())
        differs = np.append(differs, differing(batches[-1].scores.totals.reshape(-1, batch.group)))
    order = np.concatenate([np.flatnonzero(differs), np.flatnonzero(~differs)])[:target]
    counts = {"prompts_sampled": float(len(differs)), "prompts_level": float((~differs).sum())}
    return joined(batches).take(order).replace(figures={**batch.figures, **counts})


def failed(rewards: np.ndarray, *, bar: float = 0.0, replaced: int = 1, others: str = "keep") -> np.ndarray:
    """The rule of `exchange`: where no reward [P,G] of a group is above `bar`, its first `replaced` completions (0: all) become
    its demonstration, and the others are kept or dropped.
    """
    lost = ~(np.nan_to_num(rewards, nan=-np.inf) > bar).any(axis=1)
    first = np.arange(rewards.shape[1]) < (replaced or rewards.shape[1])
    return np.where(lost[:, None], np.where(first, "demonstration", others), "keep")


@gives
def exchange(batch: RolloutBatch, *, rule: Callable = failed) -> RolloutBatch:
    """Puts the task's demonstration in place of completions, or leaves them out. rule: rewards [P,G], nan where none applies,
    -> [P,G] of "keep", "drop" and "demonstration"; a function, or {"name": "failed", "bar": 0.5, ...}.

    A demonstration has no reward, so the group's advantages are its others'. Source: the gate of "Towards a Unified View of
    Large Language Model Post-Training" (HPT), where a group that fails is learned from by imitation.
    """
    verdicts = np.asarray(rule(batch.rewards.reshape(-1, batch.group)))
    if verdicts.shape != (len(batch.numbers), batch.group) or not np.isin(verdicts, VERDICTS).all():
        raise UserError(
            f"config.rollouts.steps: the rule of exchange gave {verdicts.shape} of {sorted(map(str, set(verdicts.flat)))}; it "
            f"gives ({len(batch.numbers)}, {batch.group}) of {', '.join(VERDICTS)}."
        )
    replaced, measured = (verdicts == "demonstration").reshape(-1), figures(batch)
    measured |= {
        "completions/demonstration_ratio": float(replaced.mean()),
        "completions/dropped_ratio": float((verdicts == "drop").mean()),
    }
    scores, arrays = batch.scores, {name: np.array(x) for name, x in batch.completions._asdict().items() if x is not None}
    arrays["given"] = batch.given.copy()
    for row in np.flatnonzero(replaced):
        ids = batch.source.demonstration(int(batch.numbers[row // batch.group]))
        arrays["tokens"][row], arrays["logps"][row] = 0, 0.0
        arrays["tokens"][row, : len(ids)], arrays["given"][row] = ids, np.arange(arrays["tokens"].shape[1]) < len(ids)
        arrays["lengths"][row], arrays["stopped"][row] = len(ids), True
        arrays["text_lengths"][row] = len(ids) - int(ids[-1] in batch.source.stop)
    each = {k: np.where(replaced, np.nan, x) for k, x in scores.each.items()}
    return batch.replace(
        completions=batch.completions._replace(**arrays),
        judged=scores._replace(totals=np.where(replaced, np.nan, scores.totals), each=each),
        rewards=np.where(replaced, np.nan, batch.rewards),
        counted=batch.counted & (verdicts != "drop").reshape(-1),
        figures={**batch.figures, **measured},
    )


@changes
def pairs(batch: RolloutBatch) -> RolloutBatch:
    """Each prompt's best completion and its worst, one after the other. `margins` says how much better the best is; where it is
    not, the pair is not learned from.
    """
    measured, groups = figures(batch), batch.rewards.reshape(-1, batch.group)
    there = np.isfinite(groups)
    best, worst = np.argmax(np.where(there, groups, -np.inf), 1), np.argmin(np.where(there, groups, np.inf), 1)
    ends = np.arange(len(groups))[:, None] * batch.group + np.stack([best, worst], axis=1)
    chosen = batch.take(np.arange(len(groups)), ends.reshape(-1))
    rewards = np.nan_to_num(chosen.rewards).reshape(-1, 2)
    gap = np.repeat(rewards[:, 0] - rewards[:, 1], 2)
    margins = np.where(chosen.real, gap[:, None].astype(np.float32), np.float32(0))
    paired = chosen.replace(columns={**chosen.columns, "margins": margins}, figures={**batch.figures, **measured})
    return _masked(paired, gap >= LEVEL)


# --------------------------------------------------------------------------------------------------------- Rewards


def overlong(batch: RolloutBatch, *, soft: int) -> RolloutBatch:
    """DAPO's soft punishment of length, in tokens: 0 up to `soft` before the limit, then linearly to -1 at the limit. Source:
    "DAPO: An Open-Source LLM Reinforcement Learning System at Scale".
    """
    return batch.replace(shaping=(*batch.shaping, punished(batch.completions.lengths, batch.real.shape[1], soft)))


def punished(lengths: np.ndarray, limit: int, soft: int) -> np.ndarray:
    """[R]: 0 up to limit - soft tokens, then linearly to -1 at the limit and beyond; none where soft is 0."""
    return -np.clip((np.asarray(lengths) - (limit - soft)) / soft, 0.0, 1.0) if soft else np.zeros(len(lengths))


def truncated(batch: RolloutBatch, *, reward: float) -> RolloutBatch:
    """Adds `reward` to that of each completion that nothing but the limit ended."""
    return batch.replace(shaping=(*batch.shaping, reward * ~batch.completions.stopped))


# ------------------------------------------------------------------------------------------------------ Annotations


def annotate(batch: RolloutBatch) -> RolloutBatch:
    """Has models say what they have to say of the completions, as columns."""
    return batch.replace(columns={**batch.columns, **batch.source.annotate(batch)})


def correction(batch: RolloutBatch, *, way: str = "truncate", cap: float = 2.0) -> RolloutBatch:
    """Weights for a sampler whose probabilities are not the trainer's, which become the old ones; `sampler_logps` keeps the
    sampler's. See `corrected` for way and cap.
    """
    columns = dict(batch.columns)
    trainer = np.where(batch.real, columns.pop("scored_logps"), np.float32(0))
    sampler = np.where(batch.real, batch.completions.logps, np.float32(0))
    apart = np.where(batch.given, np.float32(0), trainer - sampler)
    return batch.replace(
        columns={**columns, "sampler_logps": sampler, "old_logps": trainer}, weights=corrected(apart, way, cap)
    )


def corrected(apart: np.ndarray, way: str, cap: float) -> np.ndarray:
    """Weights [R,N] for log-ratios trainer / sampler [R,N] (zero after a completion's end): the ratios of tokens, cut off at
    `cap` ("truncate"); or those of whole completions, 0 where they are above it ("mask").
    """
    apart = apart.astype(np.float64)
    apart = apart if way == "truncate" else np.broadcast_to(apart.sum(1, keepdims=True), apart.shape)
    ratio = np.exp(np.minimum(apart, np.log(cap) + 1))  # what is above the cap is so by however much
    return np.where(ratio > cap, cap if way == "truncate" else 0.0, ratio).astype(np.float32)


# ------------------------------------------------------------------------------------------------------- Advantages


def advantages(batch: RolloutBatch, *, of: Callable) -> RolloutBatch:
    """The column `advantages`, and what else `of` makes: a function of `rollouts/advantages.py`, or of one's own, by name or as
    a dict with one; without it the objective's own.
    """
    values = estimated(batch, of)
    values = values if isinstance(values, dict) else {"advantages": np.asarray(values).reshape(-1, 1)}
    spread = {k: np.where(batch.real, np.asarray(x, np.float32), np.float32(0)) for k, x in values.items()}
    return batch.replace(columns={**batch.columns, **spread})


def estimated(batch: RolloutBatch, of: Callable) -> np.ndarray | dict[str, np.ndarray]:
    """What a function of `rollouts/advantages.py` gives for the batch: [P,G], or {column: [R,N]}."""
    columns = {"old_logps": batch.completions.logps, **batch.columns}
    tokens = {k: np.where(batch.real, columns[k], np.float32(0)) for k in ("old_logps", "ref_logps", "values") if k in columns}
    cells = [record.get("cell", "") for record in batch.records]
    return of(batch.rewards.reshape(-1, batch.group), {"mask": batch.drawn, "tasks": cells, **tokens})


# ------------------------------------------------------------------------------------------------ Who is learned from


def _masked(batch: RolloutBatch, kept: np.ndarray) -> RolloutBatch:
    """The batch where only completions that are `kept` [R] are learned from."""
    learned = batch.learned & kept
    return batch.replace(learned=learned, figures={**batch.figures, "completions/learned_ratio": float(learned.mean())})


def mask_truncated(batch: RolloutBatch) -> RolloutBatch:
    """Completions that nothing but the limit ended are not learned from, nor is a pair with one; they are counted."""
    stopped = np.asarray(batch.completions.stopped)
    if "margins" in batch.columns:
        stopped = np.repeat(stopped.reshape(-1, 2).all(1), 2)
    return _masked(batch, stopped)


def drop_level(batch: RolloutBatch) -> RolloutBatch:
    """Groups whose rewards are all equal are neither learned from nor counted in a denominator."""
    differs = np.repeat(differing(batch.rewards.reshape(-1, batch.group)), batch.group)
    return _masked(batch.replace(counted=batch.counted & differs), differs)
