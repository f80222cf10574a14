"""What rewards said of a batch of completions, put together from the processes that asked them."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxpost import sharding
from jaxpost.errors import UserError
from jaxpost.rollouts.scoring import Scorer

LEVEL = 1e-8  # rewards of a group that differ by less are equal: rounding is no difference


class Verdicts(NamedTuple):
    """totals [B] float64: the weighted sums, nan where no reward that has a weight applies; each: by a reward's name what it
    said [B], nan where it does not apply; failures: how often one failed.
    """

    totals: np.ndarray
    each: dict[str, np.ndarray]
    failures: int

    def of(self, own: Any) -> "Verdicts":
        """Those of some completions, by an index; failures are not counted again."""
        return Verdicts(self.totals[own], {k: x[own] for k, x in self.each.items()}, 0)

    @staticmethod
    def together(parts: Sequence["Verdicts"]) -> "Verdicts":
        """One after the other."""
        each = {k: np.concatenate([p.each[k] for p in parts]) for k in parts[0].each}
        return Verdicts(np.concatenate([p.totals for p in parts]), each, sum(p.failures for p in parts))


def gathered(scorer: Scorer, count: int) -> Verdicts:
    """The verdicts on `count` completions, of which this process's scorer has some: on every process all of them.

    Raises UserError on every process where the scorer of any does.
    """
    names, error = list(scorer.rewards), None
    found = np.zeros((3 + 2 * len(names), count))  # judged, total, failures; of each reward: applies, value
    try:
        for i, score in scorer.results().items():
            found[:3, i] = 1, score.total, len(score.failures)
            for n, name in enumerate(names):
                value = score.each[name]
                found[3 + 2 * n : 5 + 2 * n, i] = value is not None, value or 0.0
    except UserError as e:
        error = e
    finally:
        scorer.close()
    if jax.process_count() > 1:
        own = np.append(found, np.full((1, count), error is not None), axis=0)[None]
        # As they are in memory: numbers of 64 bits would come back as 32.
        parts = sharding.everywhere(own.view(np.uint32)).view(np.float64)
        found, failed = parts.sum(0)[:-1], parts[:, -1].any()
        error = error or (UserError("another process's rewards failed; its message says why.") if failed else None)
    if error:
        raise error
    assert (found[0] == 1).all(), "each completion is judged by one process"
    each = {name: np.where(found[3 + 2 * n] > 0, found[4 + 2 * n], np.nan) for n, name in enumerate(names)}
    counted = [np.isfinite(each[name]) for name, (_, weight) in scorer.rewards.items() if weight]
    return Verdicts(np.where(np.any(counted, axis=0), found[1], np.nan), each, int(found[2].sum()))


def differing(groups: np.ndarray) -> np.ndarray:
    """[P] bool: whether rewards [P,G] of a group differ; those that are nan have no say."""
    there = np.isfinite(groups)
    return np.where(there, groups, -np.inf).max(1) - np.where(there, groups, np.inf).min(1) >= LEVEL
