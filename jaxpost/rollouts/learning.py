"""What is learned from judged completions: rewards shaped, compared within their groups, and laid out as columns.

All of it is done at once for the whole rollout batch, before anything is split, so that no split changes an advantage.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from jaxpost.rollouts.layout import Layout
from jaxpost.rollouts.scores import LEVEL, Scores, differing
from jaxpost.sampling.decode import Completions

CORRECTIONS = ("", "truncate", "mask")


class Lessons(NamedTuple):
    """The settings of it.

    advantages: of rollouts/advantages.py; pairs: whether a prompt's best and worst are learned from, as a pair, in place of
    all; shared: whether a row has its prompt once; new: the most tokens of a completion; overlong: the last of these over which
    the punishment for length grows to 1, 0 for none; truncated: what a completion gets besides that nothing but the limit
    ended; mask_truncated: whether it is not learned from; drop_level: whether a group of equal rewards is not; correction: how
    the sampler's probabilities, where they are not the trainer's, are made up for (see `corrected`), up to cap.
    """

    advantages: Callable
    pairs: bool
    group: int
    shared: bool
    new: int
    overlong: int
    truncated: float
    mask_truncated: bool
    drop_level: bool
    correction: str
    cap: float

    @property
    def together(self) -> int:
        """Completions in a row."""
        return 2 if self.pairs else self.group if self.shared else 1

    @property
    def rows_a_prompt(self) -> int:
        """Rows of the batch that one prompt gives."""
        return 1 if self.pairs or self.shared else self.group

    def shaped(self, found: Completions, verdicts: Scores) -> np.ndarray:
        """[B] rewards as they are learned from, nan where none applies."""
        return verdicts.totals + punished(found.lengths, self.new, self.overlong) + self.truncated * ~found.stopped

    def learned(
        self, where: Layout, found: Completions, verdicts: Scores, columns: dict, tasks: Sequence[str] = ()
    ) -> tuple[dict[str, np.ndarray], dict[str, float], np.ndarray]:
        """(the columns that the objective reads, figures of the batch, each completion's mean advantage [B]). tasks: of each
        prompt the cell of its task.
        """
        groups = self.shaped(found, verdicts).reshape(-1, self.group)
        columns, weights = self._corrected(where, dict(columns))
        tokens = {k: where.collect(columns[k]) for k in ("old_logps", "ref_logps", "values") if k in columns}
        made = self.advantages(groups, {"mask": where.real, "tasks": tasks, **tokens})
        made = made if isinstance(made, dict) else {"advantages": np.asarray(made).reshape(-1, 1)}
        gone = self.drop_level & np.repeat(~differing(groups), self.group)
        kept = ~(self.mask_truncated & ~found.stopped) & ~gone
        columns["segments"] = columns["segments"].copy()
        columns["segments"][where.row[gone, 0]] = 0  # padding, which no denominator counts
        columns |= {k: where.spread(np.asarray(v, np.float32)) for k, v in made.items()}
        columns["advantages"] *= where.spread(weights)
        columns["mask"] = columns["mask"] & where.spread(kept[:, None])
        own = np.where(where.real, np.broadcast_to(made["advantages"], where.real.shape), 0.0).sum(1)
        return columns, self._figures(groups, found, verdicts, kept), own / np.maximum(found.lengths, 1)

    def paired(self, found: Completions, verdicts: Scores) -> tuple[Completions, Scores, dict[str, float]]:
        """(each prompt's best completion and its worst, one after the other, what was said of them, figures of all)."""
        groups = self.shaped(found, verdicts).reshape(-1, self.group)
        there = np.isfinite(groups)
        best, worst = np.argmax(np.where(there, groups, -np.inf), 1), np.argmin(np.where(there, groups, np.inf), 1)
        ends = np.stack([best, worst], axis=1)
        chosen = (np.arange(len(groups))[:, None] * self.group + ends).reshape(-1)
        kept = np.ones(len(found.lengths), bool)
        figures = self._figures(groups, found, verdicts, kept)
        return Completions(*(None if x is None else x[chosen] for x in found)), verdicts.of(chosen), figures

    def compared(
        self, where: Layout, found: Completions, verdicts: Scores, columns: dict, tasks: Sequence[str] = ()
    ) -> tuple[dict[str, np.ndarray], dict[str, float], np.ndarray]:
        """As `learned`, of pairs: how much better the best is stands in `margins`; where it is not, nothing is learned."""
        rewards = np.nan_to_num(self.shaped(found, verdicts)).reshape(-1, 2)
        gap = rewards[:, 0] - rewards[:, 1]
        kept = (gap >= LEVEL) & ~(self.mask_truncated & ~found.stopped.reshape(-1, 2)).any(1)
        columns = dict(columns) | {"margins": where.spread(np.repeat(gap, 2)[:, None].astype(np.float32))}
        columns["mask"] = columns["mask"] & where.spread(np.repeat(kept, 2)[:, None])
        figures = {"completions/learned_ratio": float(kept.mean())}
        return columns, figures, (rewards - rewards.mean(1, keepdims=True)).reshape(-1)

    def _corrected(self, where: Layout, columns: dict) -> tuple[dict, np.ndarray]:
        """The columns with the trainer's own log-probabilities for old ones, where they were asked; and weights [B,N]."""
        if "scored_logps" not in columns:
            return columns, np.ones((1, 1), np.float32)
        columns["sampler_logps"], columns["old_logps"] = columns["old_logps"], columns.pop("scored_logps")
        apart = where.collect(columns["old_logps"]) - where.collect(columns["sampler_logps"])
        return columns, corrected(apart, self.correction, self.cap)

    def _figures(self, groups, found: Completions, verdicts: Scores, kept) -> dict[str, float]:
        there = np.isfinite(groups)
        spread = [own[some].std(ddof=1) if some.sum() > 1 else 0.0 for own, some in zip(groups, there, strict=True)]
        figures = {
            "reward": groups[there].mean() if there.any() else np.nan,
            "reward_std": np.mean(spread),
            "frac_reward_zero_std": 1 - differing(groups).mean(),
            "completions/mean_length": found.lengths.mean(),
            "completions/min_length": found.lengths.min(),
            "completions/max_length": found.lengths.max(),
            "completions/clipped_ratio": (~found.stopped).mean(),
            "rewards/failures": verdicts.failures,
        }
        if (self.mask_truncated or self.drop_level) and not self.pairs:
            figures["completions/learned_ratio"] = kept.mean()
        if not there.all():
            figures["completions/judged_ratio"] = there.mean()
        for name, values in verdicts.each.items() if len(verdicts.each) > 1 else ():
            if np.isfinite(values).any():
                figures |= {f"rewards/{name}/mean": np.nanmean(values), f"rewards/{name}/std": np.nanstd(values)}
        return {k: float(v) for k, v in figures.items()}


def punished(lengths: np.ndarray, limit: int, soft: int) -> np.ndarray:
    """[B]: DAPO's soft punishment of length, in tokens: 0 up to limit - soft, then linearly to -1 at the limit and beyond; none
    where soft is 0. Source: "DAPO: An Open-Source LLM Reinforcement Learning System at Scale".
    """
    return -np.clip((np.asarray(lengths) - (limit - soft)) / soft, 0.0, 1.0) if soft else np.zeros(len(lengths))


def corrected(apart: np.ndarray, how: str, cap: float) -> np.ndarray:
    """Weights [B,N] for log-ratios trainer / sampler [B,N] (zero after a completion's end): the ratios of tokens, cut off at
    `cap` ("truncate"); or those of whole completions, 0 where they are above it ("mask").
    """
    apart = apart.astype(np.float64)
    apart = apart if how == "truncate" else np.broadcast_to(apart.sum(1, keepdims=True), apart.shape)
    ratio = np.exp(np.minimum(apart, np.log(cap) + 1))  # what is above the cap is so by however much
    return np.where(ratio > cap, cap if how == "truncate" else 0.0, ratio).astype(np.float32)
