"""Scores of a batch of completions, put together from the processes that had rewards judge them."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxpost import sharding
from jaxpost.errors import UserError
from jaxpost.rollouts.scoring import Score, Scorer, judged

LEVEL = 1e-8  # rewards of a group that differ by less are equal: rounding is no difference


class Scores(NamedTuple):
    """totals [B] float64: the weighted sums, nan where no reward that has a weight applies; each: by a reward's name its
    values [B], nan where it does not apply; failures: how often one failed.
    """

    totals: np.ndarray
    each: dict[str, np.ndarray]
    failures: int

    def of(self, own: Any) -> "Scores":
        """Those of some completions, by an index; failures are not counted again."""
        return Scores(self.totals[own], {k: x[own] for k, x in self.each.items()}, 0)

    @staticmethod
    def together(parts: Sequence["Scores"]) -> "Scores":
        """One after the other."""
        each = {k: np.concatenate([p.each[k] for p in parts]) for k in parts[0].each}
        return Scores(np.concatenate([p.totals for p in parts]), each, sum(p.failures for p in parts))


class Pending:
    """Scores of `count` completions that rewards still judge: a scorer of this process's share of them, asked once."""

    def __init__(self, scorer: Scorer, count: int):
        self._scorer, self._count, self._scores = scorer, count, None

    def get(self) -> Scores:
        """The scores, once all are there. All processes call it together. Raises UserError as `gathered` does."""
        if self._scores is None:
            self._scores = gathered(self._scorer, self._count)
        return self._scores

    def close(self) -> None:
        """Ends the rewards' threads; what has not been asked for is dropped."""
        self._scorer.close()


def everywhere(rewards: Mapping, records: Sequence[dict], completions: Sequence[str], **options) -> list[Score]:
    """What `scoring.judged` gives, which every process asks for by itself. Raises UserError on all where it does on any."""
    error, scores = None, []
    try:
        scores = judged(rewards, records, completions, **options)
    except UserError as e:
        error = e
    _agree(error)
    return scores


def _agree(error: UserError | None) -> None:
    """Raises UserError on every process where any has one: the others would wait for it."""
    failed = error is not None
    if jax.process_count() > 1:
        failed = sharding.everywhere(np.array([failed], np.int32)).any()
    if failed:
        raise error or UserError("another process's rewards failed; its message says why.")


def gathered(scorer: Scorer, count: int) -> Scores:
    """The verdicts on `count` completions, of which this process's scorer has some: on every process all of them.

    Raises UserError on every process where the scorer of any does.
    """
    names, error = list(scorer.rewards), None
    table = np.zeros((3 + 2 * len(names), count))  # judged, total, failures; of each reward: applies, value
    try:
        for i, score in scorer.results().items():
            table[:3, i] = 1, score.total, len(score.failures)
            for n, name in enumerate(names):
                value = score.each[name]
                table[3 + 2 * n : 5 + 2 * n, i] = value is not None, value or 0.0
    except UserError as e:
        error = e
    finally:
        scorer.close()
    _agree(error)
    if jax.process_count() > 1:
        # As they are in memory: numbers of 64 bits would come back as 32.
        table = sharding.everywhere(table[None].view(np.uint32)).view(np.float64).sum(0)
    assert (table[0] == 1).all(), "each completion is judged by one process"
    each = {name: np.where(table[3 + 2 * n] > 0, table[4 + 2 * n], np.nan) for n, name in enumerate(names)}
    return Scores(table[1], each, int(table[2].sum()))


def differing(groups: np.ndarray) -> np.ndarray:
    """[P] bool: whether rewards [P,G] of a group differ; those that are nan have no say."""
    there = np.isfinite(groups)
    return np.where(there, groups, -np.inf).max(1) - np.where(there, groups, np.inf).min(1) >= LEVEL
