"""Metrics that add up over rows, microbatches, devices and evaluation batches, so that there is no mean of means.

An objective returns {name: metric}. `merge` reduces a stacked leading axis (microbatches, or batches of an evaluation), `value`
gives the number to log, nan if nothing was measured.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Mean(NamedTuple):
    """sum / weight; both are scalars that add."""

    sum: jax.Array
    weight: jax.Array

    def merge(self):
        return Mean(self.sum.sum(0), self.weight.sum(0))

    def value(self):
        return np.float64(self.sum) / np.float64(self.weight) if self.weight else float("nan")


class Total(NamedTuple):
    """The sum of several Means with their own weights; one without weight adds zero, and nan if none has any."""

    parts: tuple[Mean, ...]

    def merge(self):
        return Total(tuple(part.merge() for part in self.parts))

    def value(self):
        measured = [part.value() for part in self.parts if part.weight]
        return sum(measured) if measured else float("nan")


class Difference(NamedTuple):
    """One Mean minus another, with their own weights; nan where either has none."""

    one: Mean
    other: Mean

    def merge(self):
        return Difference(self.one.merge(), self.other.merge())

    def value(self):
        return self.one.value() - self.other.value()


class Std(NamedTuple):
    """Population standard deviation from two sums and a weight."""

    sum: jax.Array
    square: jax.Array
    weight: jax.Array

    def merge(self):
        return Std(*(x.sum(0) for x in self))

    def value(self):
        if not self.weight:
            return float("nan")
        mean, square = np.float64(self.sum) / self.weight, np.float64(self.square) / self.weight
        return np.sqrt(max(square - mean * mean, 0.0))


class Explained(NamedTuple):
    """The share of the target's variance that a prediction explains: 1 - var(error) / var(target); nan where that is zero."""

    error: Std
    target: Std

    def merge(self):
        return Explained(self.error.merge(), self.target.merge())

    def value(self):
        whole = self.target.value() ** 2
        return 1 - self.error.value() ** 2 / whole if whole > 0 else float("nan")


class Min(NamedTuple):
    """The smallest value; `least` is +inf where there was none."""

    least: jax.Array

    def merge(self):
        return Min(self.least.min(0))

    def value(self):
        return np.float64(self.least) if np.isfinite(self.least) else float("nan")


class Max(NamedTuple):
    """The largest value; `most` is -inf where there was none."""

    most: jax.Array

    def merge(self):
        return Max(self.most.max(0))

    def value(self):
        return np.float64(self.most) if np.isfinite(self.most) else float("nan")


def masked_mean(values: jax.Array, mask: jax.Array) -> Mean:
    """The Mean of values where the mask is set; a masked-out nan does not count."""
    return Mean(jnp.sum(jnp.where(mask, values, 0.0)), jnp.sum(mask.astype(jnp.float32)))


def masked_max(values: jax.Array, mask: jax.Array) -> Max:
    """The Max of values where the mask is set."""
    return Max(jnp.max(jnp.where(mask, values, -jnp.inf)))


def is_metric(x) -> bool:
    """Whether x is one of the metrics above; for jax.tree.map's is_leaf."""
    return isinstance(x, (Mean, Total, Difference, Std, Explained, Min, Max))


def merge(stacked: dict) -> dict:
    """Reduces the leading axis of every metric."""
    return {k: v.merge() for k, v in stacked.items()}


def values(metrics: dict) -> dict[str, float]:
    """Metrics fetched from the device, as plain numbers under their names."""
    fetched = jax.device_get(metrics)
    return {k: float(v.value()) if is_metric(v) else float(v) for k, v in fetched.items()}
