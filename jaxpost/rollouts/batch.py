"""A rollout batch: P prompts, G completions of each, and all that is known of them; and how it becomes rows to learn from.

    R = P G completions, the groups one after the other: row p G + g is completion g of prompt p
    N the most new tokens of a completion; numbers about tokens are [R,N], zero after a completion's end

The steps of `rollouts/steps.py` take such a batch and give another. Nothing is changed in place: `batch.replace(...)`.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxpost.errors import UserError
from jaxpost.rollouts.layout import Layout
from jaxpost.rollouts.scores import Pending, Scores, differing
from jaxpost.sampling.decode import Completions


@dataclasses.dataclass(frozen=True)
class RolloutBatch:
    """prompts: the P prompts' ids; records: what their rewards read; numbers [P]: which of the task's problems they are.

    completions: see `decode.Completions`; judged: what rewards make of them, or that they are still at it (`scores`).
    learned [R]: whether a completion is learned from; counted [R]: whether denominators count it. One that is not learned from
    but counted pulls the others' share down, as a truncated one in DAPO does.
    columns: {name: [R,N] or [R,N,D]} that the batch will have, at the completions' tokens. figures: {name: float} for the log.
    shaping: numbers [R] that are added to the scores' totals, in this order; weights [R,N]: what advantages are multiplied by.
    assigned [R]: rewards that a step put in place of the scores' totals, or None.
    source: the `Rollouts` that drew it, which steps ask for more groups, annotations and demonstrations.
    """

    prompts: Sequence[np.ndarray]
    records: Sequence[Mapping]
    numbers: np.ndarray
    completions: Completions
    judged: Pending | Scores
    learned: np.ndarray
    counted: np.ndarray
    columns: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    figures: dict[str, float] = dataclasses.field(default_factory=dict)
    shaping: tuple[np.ndarray, ...] = ()
    weights: np.ndarray | None = None
    assigned: np.ndarray | None = None
    source: Any = None

    @property
    def group(self) -> int:
        """G, completions of a prompt."""
        return len(self.completions.lengths) // len(self.numbers)

    @functools.cached_property
    def real(self) -> np.ndarray:
        """[R,N] bool: which places hold a token."""
        return np.arange(self.completions.tokens.shape[1]) < np.asarray(self.completions.lengths)[:, None]

    @functools.cached_property
    def given(self) -> np.ndarray:
        """[R,N] bool: the tokens that the policy did not draw."""
        given = self.completions.given
        return np.zeros(self.real.shape, bool) if given is None else given & self.real

    @property
    def drawn(self) -> np.ndarray:
        """[R,N] bool: the tokens that the policy drew."""
        return self.real & ~self.given

    @property
    def scores(self) -> Scores:
        """What the rewards gave each completion; waits for them, on every process."""
        return self.judged if isinstance(self.judged, Scores) else self.judged.get()

    @property
    def rewards(self) -> np.ndarray:
        """[R] float64: the rewards as they are learned from, nan where none applies. Waits for them."""
        rewards = self.scores.totals if self.assigned is None else self.assigned
        return functools.reduce(np.add, self.shaping, rewards)

    def replace(self, **changes) -> "RolloutBatch":
        """The batch with other fields; `rewards` [R] may be among them."""
        if "rewards" in changes:
            changes |= {"assigned": np.asarray(changes.pop("rewards"), np.float64), "shaping": ()}
        return dataclasses.replace(self, **changes)

    def take(self, groups: np.ndarray, rows: np.ndarray | None = None) -> "RolloutBatch":
        """Some of the prompts, by their places, with some of the completions: `rows`, by default all of theirs. Waits for the
        scores, whose failures are all counted still.
        """
        groups = np.asarray(groups, int)
        rows = (groups[:, None] * self.group + np.arange(self.group)).reshape(-1) if rows is None else rows
        arrays = {
            k: None if (x := getattr(self, k)) is None else x[rows] for k in ("learned", "counted", "weights", "assigned")
        }
        return self.replace(
            prompts=[self.prompts[i] for i in groups],
            records=[self.records[i] for i in groups],
            numbers=self.numbers[groups],
            completions=Completions(*(None if x is None else x[rows] for x in self.completions)),
            judged=self.scores.of(rows)._replace(failures=self.scores.failures),
            columns={k: x[rows] for k, x in self.columns.items()},
            shaping=tuple(x[rows] for x in self.shaping),
            **arrays,
        )

    def stored(self) -> dict:
        """What a file keeps of a batch that waits, as arrays by name; `restored` reads it."""
        names = ("numbers", "completions", "learned", "counted", "columns", "figures", "weights", "assigned")
        shaping = {str(i): x for i, x in enumerate(self.shaping)}
        return {**{name: getattr(self, name) for name in names}, "judged": self.scores, "shaping": shaping}


def restored(stored: Mapping, problems: Sequence[tuple[Mapping, np.ndarray]]) -> RolloutBatch:
    """The batch of what a file kept, and of its problems, (record, prompt ids) each."""
    fields = dict(stored)
    fields |= {"completions": Completions(**fields["completions"]), "judged": Scores(**fields["judged"])}
    fields["figures"] = {name: float(x) for name, x in fields.get("figures", {}).items()}
    fields["shaping"] = tuple(fields["shaping"][str(i)] for i in range(len(fields.get("shaping", {}))))
    return RolloutBatch([ids for _, ids in problems], [record for record, _ in problems], **fields)


def joined(batches: Sequence[RolloutBatch]) -> RolloutBatch:
    """Batches that were just drawn, one after the other. Waits for their scores."""

    def whole(name: str) -> np.ndarray:
        return np.concatenate([getattr(batch, name) for batch in batches])

    columns = zip(*(batch.completions for batch in batches), strict=True)
    return batches[0].replace(
        prompts=[ids for batch in batches for ids in batch.prompts],
        records=[record for batch in batches for record in batch.records],
        completions=Completions(*(None if x[0] is None else np.concatenate(x) for x in columns)),
        judged=Scores.together([batch.scores for batch in batches]),
        **{name: whole(name) for name in ("numbers", "learned", "counted")},
    )


def figures(batch: RolloutBatch) -> dict[str, float]:
    """The figures of what the policy drew: rewards, and lengths of its own tokens."""
    groups, scores, drawn = batch.rewards.reshape(-1, batch.group), batch.scores, batch.drawn.sum(1)
    there = np.isfinite(groups)
    spread = [group[some].std(ddof=1) if some.sum() > 1 else 0.0 for group, some in zip(groups, there, strict=True)]
    measured = {
        "reward": groups[there].mean() if there.any() else np.nan,
        "reward_std": np.mean(spread),
        "frac_reward_zero_std": 1 - differing(groups).mean(),
        "rewards/failures": scores.failures,
    }
    sampled = drawn > 0 if batch.given.any() else slice(None)  # a demonstration is none of the policy's
    if len(drawn[sampled]):
        measured |= {f"completions/{k}_length": getattr(drawn[sampled], k)() for k in ("mean", "min", "max")}
        measured["completions/clipped_ratio"] = (~batch.completions.stopped)[sampled].mean()
    if not there.all():
        measured["completions/judged_ratio"] = there.mean()
    for name, values in scores.each.items() if len(scores.each) > 1 else ():
        if np.isfinite(values).any():
            measured |= {f"rewards/{name}/mean": np.nanmean(values), f"rewards/{name}/std": np.nanstd(values)}
    return {k: float(v) for k, v in measured.items()}


def rows(batch: RolloutBatch, where: Layout, *, pairs: bool, gives: bool) -> dict[str, np.ndarray]:
    """The columns [rows,S] to learn from. pairs: whether rows are pairs, which have no advantages; gives: whether there may be
    tokens that the policy did not draw: then the columns `sampled` and `demonstrations` say which are which.

    Raises UserError for tokens that were given, or completions left out beside others of a row, where no column says so.
    """
    columns = {k: where.spread(x) for k, x in batch.columns.items() if k != "demonstrations"}
    if not pairs:
        columns.setdefault("old_logps", where.spread(batch.completions.logps))
        columns.setdefault("advantages", np.zeros(where.columns["tokens"].shape, np.float32))
    if batch.weights is not None:
        columns["advantages"] *= where.spread(batch.weights)
    laid = where.columns | {"tokens": where.columns["tokens"] + where.spread(batch.completions.tokens)} | columns
    imitated = batch.columns.get("demonstrations", batch.given)
    gone = np.ones(len(laid["tokens"]), bool)
    gone[where.row[batch.counted | imitated.any(1), 0]] = False
    laid["segments"] = np.where(gone[:, None], 0, laid["segments"])  # padding, which no denominator counts
    laid["mask"] = where.spread(batch.drawn & (batch.learned & batch.counted)[:, None])
    if gives:
        laid |= {"sampled": where.spread(batch.drawn & batch.counted[:, None]), "demonstrations": where.spread(imitated)}
    elif batch.given.any() or not gone[where.row[~batch.counted, 0]].all():
        raise UserError(
            "config.rollouts.steps: a step gave tokens that the policy did not draw, or left single completions of a row out; "
            "put @steps.gives above its function (from jaxpost.rollouts import steps), so that batches say which."
        )
    return laid
