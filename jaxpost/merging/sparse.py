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

from collections.abc import Sequence

import numpy as np

from jaxpost.errors import UserError
from jaxpost.merging.tensorwise import tensorwise

RESCALE, CONSENSUS = ("", "density", "l1"), ("sum", "count")


@tensorwise(base=True, each=("weight", "density"))
def ties(
    base: np.ndarray,
    tuned: np.ndarray,
    *others: np.ndarray,
    weight: Sequence[float] = 1.0,
    density: Sequence[float] = 0.2,
    strength: float = 1.0,
    normalize: bool = True,
    rescale: str = "",
    consensus: str = "sum",
) -> np.ndarray:
    """TIES: the elements of largest magnitude, with a sign elected. Among equal magnitudes the first in the tensor stay.

    Source: "TIES-Merging: Resolving Interference When Merging Models", which trims over the whole model and averages with equal
    weights.
    """
    masks = [largest(np.abs(x - base), int(d * x.size)) for x, d in zip((tuned, *others), _shares(density), strict=True)]
    deltas = _kept(base, (tuned, *others), masks, density, rescale)
    return base + _elected(deltas, weight, strength, normalize, consensus)


@tensorwise(base=True, each=("weight", "density"))
def dare_linear(
    base: np.ndarray,
    tuned: np.ndarray,
    *others: np.ndarray,
    weight: Sequence[float] = 1.0,
    density: Sequence[float] = 0.5,
    strength: float = 1.0,
    normalize: bool = False,
    rescale: str = "density",
    seed: int = 0,
) -> np.ndarray:
    """DARE: each element stays with probability `density`, all changes are summed.

    With rescale="density", as in the paper, the mean over seeds is the whole change. The seed and the tensor's name decide
    which elements stay. Source: "Language Models are Super Mario: Absorbing Abilities from Homologous Models as a Free Lunch".
    """
    masks = _drawn((tuned, *others), density, seed)
    return base + _summed(_kept(base, (tuned, *others), masks, density, rescale), weight, strength, normalize)


@tensorwise(base=True, each=("weight", "density"))
def dare_ties(
    base: np.ndarray,
    tuned: np.ndarray,
    *others: np.ndarray,
    weight: Sequence[float] = 1.0,
    density: Sequence[float] = 0.5,
    strength: float = 1.0,
    normalize: bool = False,
    rescale: str = "density",
    consensus: str = "sum",
    seed: int = 0,
) -> np.ndarray:
    """DARE with TIES' sign: as `dare_linear`, and only the changes that agree with the elected sign are summed."""
    masks = _drawn((tuned, *others), density, seed)
    deltas = _kept(base, (tuned, *others), masks, density, rescale)
    return base + _elected(deltas, weight, strength, normalize, consensus)


@tensorwise(base=True, each=("weight", "density", "gamma"))
def breadcrumbs(
    base: np.ndarray,
    tuned: np.ndarray,
    *others: np.ndarray,
    weight: Sequence[float] = 1.0,
    density: Sequence[float] = 0.9,
    gamma: Sequence[float] = 0.01,
    strength: float = 1.0,
    normalize: bool = False,
    rescale: str = "",
) -> np.ndarray:
    """Model breadcrumbs: neither the largest share gamma of each task vector nor the smallest magnitudes.

    Of `size` elements the int(gamma * size) largest go, and int(density * size) of the next stay; where that is more than there
    are, fewer of the largest go. Source: "Model Breadcrumbs: Scaling Multi-Task Model Merging with Sparse Masks".
    """
    masks = _middle(base, (tuned, *others), density, gamma)
    return base + _summed(_kept(base, (tuned, *others), masks, density, rescale), weight, strength, normalize)


@tensorwise(base=True, each=("weight", "density", "gamma"))
def breadcrumbs_ties(
    base: np.ndarray,
    tuned: np.ndarray,
    *others: np.ndarray,
    weight: Sequence[float] = 1.0,
    density: Sequence[float] = 0.9,
    gamma: Sequence[float] = 0.01,
    strength: float = 1.0,
    normalize: bool = False,
    rescale: str = "",
    consensus: str = "sum",
) -> np.ndarray:
    """Model breadcrumbs with TIES' sign: as `breadcrumbs`, and only the changes that agree with the elected sign are summed."""
    masks = _middle(base, (tuned, *others), density, gamma)
    deltas = _kept(base, (tuned, *others), masks, density, rescale)
    return base + _elected(deltas, weight, strength, normalize, consensus)


def largest(magnitude: np.ndarray, count: int) -> np.ndarray:
    """Which elements are the `count` largest, bool of magnitude's shape; of equal ones the first are taken."""
    flat = magnitude.reshape(-1)
    if count <= 0 or count >= flat.size:
        return np.full(magnitude.shape, count > 0)
    least = np.partition(flat, flat.size - count)[flat.size - count]
    mask = flat > least
    mask[np.flatnonzero(flat == least)[: count - np.count_nonzero(mask)]] = True
    return mask.reshape(magnitude.shape)


def _middle(base: np.ndarray, tuned: Sequence, density: Sequence[float], gamma: Sequence[float]) -> list[np.ndarray]:
    """The elements that breadcrumbs keeps of each task vector."""
    masks = []
    for x, share, top in zip(tuned, _shares(density), _shares(gamma, "gamma"), strict=True):
        magnitude, keep = np.abs(x - base), int(share * x.size)
        outliers = min(int(top * x.size), x.size - keep)
        masks.append(largest(magnitude, outliers + keep) & ~largest(magnitude, outliers))
    return masks


def _drawn(tuned: Sequence, density: Sequence[float], seed: int) -> list[np.ndarray]:
    """Elements of each task vector, drawn one by one."""
    draws = (np.random.default_rng([seed, number]) for number in range(len(tuned)))
    return [rng.random(x.shape, np.float32) < d for rng, x, d in zip(draws, tuned, _shares(density), strict=True)]


def _kept(base: np.ndarray, tuned: Sequence, masks: Sequence, density: Sequence[float], rescale: str) -> list[np.ndarray]:
    """The task vectors with zeros outside of the masks, rescaled."""
    if rescale not in RESCALE:
        raise UserError(f"rescale={rescale!r}: give one of {', '.join(map(repr, RESCALE))}.")
    deltas = []
    for x, mask, share in zip(tuned, masks, density, strict=True):
        delta = x - base
        before = np.abs(delta).sum(dtype=np.float64) if rescale == "l1" else 0.0
        delta *= mask
        if rescale == "density" and share > 0:
            delta /= np.float32(share)
        if rescale == "l1" and min(before, after := np.abs(delta).sum(dtype=np.float64)) >= 1e-7:
            delta *= np.float32(before / after)
        deltas.append(delta)
    return deltas


def _summed(deltas: Sequence, weight: Sequence[float], strength: float, normalize: bool) -> np.ndarray:
    """lambda * sum_i w_i delta_i, over sum_i w_i if normalize."""
    divisor = sum(weight) if normalize else 1.0
    if abs(divisor) < 1e-8:
        raise UserError(f"weight={list(weight)}: they sum to 0, and are to be normalized.")
    return np.float32(strength / divisor) * sum(np.float32(w) * x for w, x in zip(weight, deltas, strict=True))


def _elected(deltas: Sequence, weight: Sequence[float], strength: float, normalize: bool, consensus: str) -> np.ndarray:
    """The same, of those alone whose sign is that of most."""
    if consensus not in CONSENSUS:
        raise UserError(f"consensus={consensus!r}: give one of {', '.join(map(repr, CONSENSUS))}.")
    weighted = [np.float32(w) * x for w, x in zip(weight, deltas, strict=True)]
    votes = sum(weighted) if consensus == "sum" else sum(map(np.sign, weighted))
    plus = votes >= 0
    agree = [np.where(plus, x > 0, x < 0) for x in weighted]
    total = sum(x * mask for x, mask in zip(weighted, agree, strict=True))
    if normalize:
        divisor = sum(np.float32(w) * mask for w, mask in zip(weight, agree, strict=True))
        divisor[divisor == 0] = 1.0
        total /= divisor
    return np.float32(strength) * total


def _shares(values: Sequence[float], name: str = "density") -> Sequence[float]:
    if wrong := [x for x in values if not 0 <= x <= 1]:
        raise UserError(f"{name}={wrong[0]!r}: give a share from 0 to 1.")
    return values
