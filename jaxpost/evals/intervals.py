"""Means over problems, and how far another draw of problems would move them."""

import math
from collections.abc import Sequence

import numpy as np

Z = 1.96  # standard errors on either side of a mean, for 95%


def mean(scores: Sequence[float], weights: Sequence[float] | None = None) -> float:
    """The mean over the scores that are not nan, to which a reward applies; nan where there is none. weights: one a score."""
    scores = np.asarray(scores, float)
    weights = np.isfinite(scores) * (1.0 if weights is None else np.asarray(weights, float))
    return float(np.average(np.nan_to_num(scores), weights=weights)) if weights.any() else float("nan")


def standard_error(scores: Sequence[float], weights: Sequence[float] | None = None) -> float:
    """Of `mean`: with equal weights the usual one, the standard deviation over the root of the number. nan for fewer than two
    scores. Of several samples a problem, give the mean of each problem: they are no independent draws.
    """
    scores = np.asarray(scores, float)
    there = np.isfinite(scores)
    weights = (np.ones(len(scores)) if weights is None else np.asarray(weights, float))[there]
    if (n := len(weights)) < 2:
        return float("nan")
    gaps = scores[there] - np.average(scores[there], weights=weights)
    return math.sqrt(n / (n - 1) * np.sum((weights * gaps) ** 2)) / float(weights.sum())


def wilson(share: float, weights: Sequence[float]) -> tuple[float, float]:
    """The 95% interval of a share of problems that were solved, by Wilson's score: how far another draw of problems, each
    answered anew, would move it. Unlike the normal approximation it stays inside [0, 1] and has a width at 0 and 1.

    share: the mean of verdicts over problems with these weights. Unequal weights count as (sum w)^2 / sum w^2 equal ones.
    """
    weights = np.asarray(weights, np.float64)
    n = weights.sum() ** 2 / np.sum(weights**2)
    centre, width = share + Z**2 / (2 * n), Z * math.sqrt(share * (1 - share) / n + Z**2 / (4 * n**2))
    return max(0.0, (centre - width) / (1 + Z**2 / n)), min(1.0, (centre + width) / (1 + Z**2 / n))
