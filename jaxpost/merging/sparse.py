"""Merges of task vectors that keep a part of each: the largest changes, a random part, or all but the extremes.

    theta + lambda * sum_i w_i s(theta_i - theta)

What s keeps is the method. Where it also elects a sign, an element sums only the changes that agree with the sign of the
weighted sum of all. Each is mergekit's method of the same name, in float32 and tensor by tensor, unlike the papers that trim
the whole model at once. mergekit's int8_mask has nothing to save here.

Common keywords. weight: of each tuned model. density: the share of each task vector's elements that stays, int(density * size)
of them (with `dare`, as many on average). strength: lambda. normalize: whether to divide by the sum of weights, of those that
agree where a sign is elected. rescale: what makes up for the elements that went: "" nothing; "density" divides by it; "l1"
restores the sum of magnitudes, which is mergekit's `rescale: true`. consensus, where a sign is elected: "sum" of the changes or
"count" of their signs; 0 elects plus. All raise UserError for a density outside of 0 to 1 and for unknown words.
"""

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np

from jaxpost.errors import UserError
from jaxpost.merging.coefficients import Each
from jaxpost.merging.tensorwise import BLOCK, tensorwise

RESCALE, CONSENSUS = ("", "density", "l1"), ("sum", "count")


@tensorwise(base=True, each=("weight", "density"))
def ties(
    base: np.ndarray,
    tuned: np.ndarray,
    *others: np.ndarray,
    weight: Each = 1.0,
    density: Each = 0.2,
    strength: float = 1.0,
    normalize: bool = True,
    rescale: str = "",
    consensus: str = "sum",
) -> np.ndarray:
    """TIES: the elements of largest magnitude, with a sign elected. Among equal magnitudes the first in the tensor stay.

    Source: "TIES-Merging: Resolving Interference When Merging Models", which trims over the whole model and averages with equal
    weights.
    """
    deltas = _changes(base, tuned, *others)
    masks = (largest(x, int(share * x.size)) for x, share in zip(deltas, _shares(density), strict=True))
    return _elected(base, _kept(deltas, masks, density, rescale), weight, strength, normalize, consensus)


@tensorwise(base=True, each=("weight", "density"))
def dare_linear(
    base: np.ndarray,
    tuned: np.ndarray,
    *others: np.ndarray,
    weight: Each = 1.0,
    density: Each = 0.5,
    strength: float = 1.0,
    normalize: bool = False,
    rescale: str = "density",
    seed: int = 0,
) -> np.ndarray:
    """DARE: each element stays with probability `density`, all changes are summed.

    With rescale="density", as in the paper, the mean over seeds is the whole change. The seed and the tensor's name decide
    which elements stay. Source: "Language Models are Super Mario: Absorbing Abilities from Homologous Models as a Free Lunch".
    """
    deltas = _changes(base, tuned, *others)
    return _summed(base, _kept(deltas, _drawn(deltas, density, seed), density, rescale), weight, strength, normalize)


@tensorwise(base=True, each=("weight", "density"))
def dare_ties(
    base: np.ndarray,
    tuned: np.ndarray,
    *others: np.ndarray,
    weight: Each = 1.0,
    density: Each = 0.5,
    strength: float = 1.0,
    normalize: bool = False,
    rescale: str = "density",
    consensus: str = "sum",
    seed: int = 0,
) -> np.ndarray:
    """DARE with TIES' sign: as `dare_linear`, and only the changes that agree with the elected sign are summed."""
    deltas = _changes(base, tuned, *others)
    kept = _kept(deltas, _drawn(deltas, density, seed), density, rescale)
    return _elected(base, kept, weight, strength, normalize, consensus)


@tensorwise(base=True, each=("weight", "density", "gamma"))
def breadcrumbs(
    base: np.ndarray,
    tuned: np.ndarray,
    *others: np.ndarray,
    weight: Each = 1.0,
    density: Each = 0.9,
    gamma: Each = 0.01,
    strength: float = 1.0,
    normalize: bool = False,
    rescale: str = "",
) -> np.ndarray:
    """Model breadcrumbs: neither the largest share gamma of each task vector nor the smallest magnitudes.

    Of `size` elements the int(gamma * size) largest go, and int(density * size) of the next stay; where that is more than there
    are, fewer of the largest go. Source: "Model Breadcrumbs: Scaling Multi-Task Model Merging with Sparse Masks".
    """
    deltas = _changes(base, tuned, *others)
    return _summed(base, _kept(deltas, _middle(deltas, density, gamma), density, rescale), weight, strength, normalize)


@tensorwise(base=True, each=("weight", "density", "gamma"))
def breadcrumbs_ties(
    base: np.ndarray,
    tuned: np.ndarray,
    *others: np.ndarray,
    weight: Each = 1.0,
    density: Each = 0.9,
    gamma: Each = 0.01,
    strength: float = 1.0,
    normalize: bool = False,
    rescale: str = "",
    consensus: str = "sum",
) -> np.ndarray:
    """Model breadcrumbs with TIES' sign: as `breadcrumbs`, and only the changes that agree with the elected sign are summed."""
    deltas = _changes(base, tuned, *others)
    kept = _kept(deltas, _middle(deltas, density, gamma), density, rescale)
    return _elected(base, kept, weight, strength, normalize, consensus)


def largest(array: np.ndarray, count: int) -> np.ndarray:
    """Which elements are the `count` largest in magnitude, bool of the array's shape; of equal ones the first are taken."""
    if count <= 0 or count >= array.size:
        return np.full(array.shape, count > 0)
    magnitude = np.abs(array).reshape(-1)
    magnitude.partition(array.size - count)
    least = magnitude[array.size - count]
    np.abs(array.reshape(-1), out=magnitude)
    mask = magnitude > least
    mask[np.flatnonzero(magnitude == least)[: count - np.count_nonzero(mask)]] = True
    return mask.reshape(array.shape)


def _changes(base: np.ndarray, *tuned: np.ndarray) -> list[np.ndarray]:
    """The task vectors, in place of the tuned models."""
    return [np.subtract(x, base, out=x) for x in tuned]


def _middle(deltas: Sequence, density: Sequence[float], gamma: Sequence[float]) -> Iterator[np.ndarray]:
    """The elements that breadcrumbs keeps of each task vector."""
    for x, share, top in zip(deltas, _shares(density), _shares(gamma, "gamma"), strict=True):
        keep = int(share * x.size)
        outliers = min(int(top * x.size), x.size - keep)
        yield largest(x, outliers + keep) & ~largest(x, outliers)


def _drawn(deltas: Sequence, density: Sequence[float], seed: int) -> Iterator[np.ndarray]:
    """Elements of each task vector, drawn one by one."""
    for number, (x, share) in enumerate(zip(deltas, _shares(density), strict=True)):
        rng = np.random.default_rng([seed, number])
        pieces = [rng.random(min(BLOCK, x.size - start), np.float32) < share for start in range(0, x.size, BLOCK)]
        yield np.concatenate(pieces).reshape(x.shape)


def _kept(deltas: list, masks: Iterable[np.ndarray], density: Sequence[float], rescale: str) -> list[np.ndarray]:
    """The task vectors with zeros outside of the masks, rescaled; in place."""
    if rescale not in RESCALE:
        raise UserError(f"rescale={rescale!r}: give one of {', '.join(map(repr, RESCALE))}.")
    for delta, mask, share in zip(deltas, masks, density, strict=True):
        before = _norm(delta) if rescale == "l1" else 0.0
        delta *= mask
        if rescale == "density" and share > 0:
            delta /= np.float32(share)
        if rescale == "l1" and min(before, after := _norm(delta)) >= 1e-7:
            delta *= np.float32(before / after)
    return deltas


def _norm(array: np.ndarray) -> float:
    """The sum of magnitudes."""
    flat = array.reshape(-1)
    return sum(float(np.abs(flat[start : start + BLOCK]).sum(dtype=np.float64)) for start in range(0, flat.size, BLOCK))


def _summed(base: np.ndarray, deltas: Sequence, weight: Sequence[float], strength: float, normalize: bool) -> np.ndarray:
    """base + lambda * sum_i w_i delta_i, over sum_i w_i if normalize."""
    divisor = sum(weight) if normalize else 1.0
    if abs(divisor) < 1e-8:
        raise UserError(f"weight={list(weight)}: they sum to 0, and are to be normalized.")
    return _added(base, deltas, lambda pieces: np.float32(strength / divisor) * _total(_weighted(weight, pieces)))


def _elected(
    base: np.ndarray, deltas: Sequence, weight: Sequence[float], strength: float, normalize: bool, consensus: str
) -> np.ndarray:
    """The same, of those changes alone whose sign is that of most."""
    if consensus not in CONSENSUS:
        raise UserError(f"consensus={consensus!r}: give one of {', '.join(map(repr, CONSENSUS))}.")

    def agreed(pieces: Sequence[np.ndarray]) -> np.ndarray:
        weighted = _weighted(weight, pieces)
        plus = _total(weighted if consensus == "sum" else map(np.sign, weighted)) >= 0
        agree = [((x > 0) == plus) & (x != 0) for x in weighted]
        for x, mask in zip(weighted, agree, strict=True):
            x *= mask
        total = _total(weighted)
        if normalize:
            divisor = _total(_weighted(weight, agree))
            total /= divisor + (divisor == 0)
        return np.float32(strength) * total

    return _added(base, deltas, agreed)


def _weighted(weight: Sequence[float], arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
    return [np.float32(w) * x for w, x in zip(weight, arrays, strict=True)]


def _total(arrays: Iterable[np.ndarray]) -> np.ndarray:
    return functools.reduce(np.add, arrays)


def _added(base: np.ndarray, deltas: Sequence, change: Callable) -> np.ndarray:
    """base + change(deltas), in place and in pieces, which need no memory to speak of."""
    flat, changes = base.reshape(-1), [delta.reshape(-1) for delta in deltas]
    for start in range(0, flat.size, BLOCK):
        flat[start : start + BLOCK] += change([x[start : start + BLOCK] for x in changes])
    return base


def _shares(values: Sequence[float], name: str = "density") -> Sequence[float]:
    if wrong := [x for x in values if not 0 <= x <= 1]:
        raise UserError(f"{name}={wrong[0]!r}: give a share from 0 to 1.")
    return values
