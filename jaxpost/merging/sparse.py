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
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from jaxpost.errors import UserError
from jaxpost.merging.coefficients import Each
from jaxpost.merging.tensorwise import Piece, each_of, tensorwise

RESCALE, CONSENSUS = ("", "density", "l1"), ("sum", "count")
SAMPLED = 512  # rows of a tensor by which the magnitude that the largest elements begin with is guessed
SLACKS = (0.01, 0.2, 1.0)  # the share of the sample's elements by which the guess may be off, one tried after the other


class Trim(NamedTuple):
    """What of a task vector stays, mask(a flat piece of it, the place of its first element) -> bool, and what it is times."""

    mask: Callable[[np.ndarray, int], np.ndarray]
    factor: float


class Cut(NamedTuple):
    """The largest elements of a task vector: those of a magnitude above `least`, and of those that have it the ones before the
    place `end`.
    """

    least: float
    end: int

    def mask(self, delta: np.ndarray, place: int) -> np.ndarray:
        """Which elements of a flat piece are among them, bool."""
        magnitude, equal = np.abs(delta), min(max(self.end - place, 0), delta.size)
        if equal == delta.size:
            return magnitude >= self.least
        mask = magnitude > self.least
        mask[:equal] |= magnitude[:equal] == self.least
        return mask


def _largest_of_each(pieces: Sequence[Piece], *, density: Sequence[float], rescale: str, **_) -> list[tuple]:
    """TIES' trims: (place, one for each model) of every piece."""
    size = math.prod(pieces[0].sources[0].shape)
    cuts = [_largest(pieces, number, int(share * size)) for number, share in enumerate(_shares(density), start=1)]
    return _trims(pieces, [cut.mask for cut in cuts], density, rescale)


def _drawn_of_each(pieces: Sequence[Piece], *, density: Sequence[float], rescale: str, seed: int, **_) -> list[tuple]:
    """DARE's."""
    masks = [functools.partial(_drawn, seed, number, share) for number, share in enumerate(_shares(density))]
    return _trims(pieces, masks, density, rescale)


def _middle_of_each(
    pieces: Sequence[Piece], *, density: Sequence[float], gamma: Sequence[float], rescale: str, **_
) -> list[tuple]:
    """The breadcrumbs'."""
    size, masks = math.prod(pieces[0].sources[0].shape), []
    for number, (share, top) in enumerate(zip(_shares(density), _shares(gamma, "gamma"), strict=True), start=1):
        keep = int(share * size)
        outliers = min(int(top * size), size - keep)
        cuts = [_largest(pieces, number, count) for count in (outliers + keep, outliers)]
        masks.append(functools.partial(_between, *cuts))
    return _trims(pieces, masks, density, rescale)


@tensorwise(base=True, each=("weight", "density"), elementwise=True, summary=_largest_of_each)
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
    summary: tuple,
) -> np.ndarray:
    """TIES: the elements of largest magnitude, with a sign elected. Among equal magnitudes the first in the tensor stay.

    Source: "TIES-Merging: Resolving Interference When Merging Models", which trims over the whole model and averages with equal
    weights.
    """
    return _elected(base, _kept(summary, base, tuned, *others), weight, strength, normalize, consensus)


@tensorwise(base=True, each=("weight", "density"), elementwise=True, summary=_drawn_of_each)
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
    summary: tuple,
) -> np.ndarray:
    """DARE: each element stays with probability `density`, all changes are summed.

    With rescale="density", as in the paper, the mean over seeds is the whole change. The seed and the tensor's name decide
    which elements stay. Source: "Language Models are Super Mario: Absorbing Abilities from Homologous Models as a Free Lunch".
    """
    return _summed(base, _kept(summary, base, tuned, *others), weight, strength, normalize)


@tensorwise(base=True, each=("weight", "density"), elementwise=True, summary=_drawn_of_each)
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
    summary: tuple,
) -> np.ndarray:
    """DARE with TIES' sign: as `dare_linear`, and only the changes that agree with the elected sign are summed."""
    return _elected(base, _kept(summary, base, tuned, *others), weight, strength, normalize, consensus)


@tensorwise(base=True, each=("weight", "density", "gamma"), elementwise=True, summary=_middle_of_each)
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
    summary: tuple,
) -> np.ndarray:
    """Model breadcrumbs: neither the largest share gamma of each task vector nor the smallest magnitudes.

    Of `size` elements the int(gamma * size) largest go, and int(density * size) of the next stay; where that is more than there
    are, fewer of the largest go. Source: "Model Breadcrumbs: Scaling Multi-Task Model Merging with Sparse Masks".
    """
    return _summed(base, _kept(summary, base, tuned, *others), weight, strength, normalize)


@tensorwise(base=True, each=("weight", "density", "gamma"), elementwise=True, summary=_middle_of_each)
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
    summary: tuple,
) -> np.ndarray:
    """Model breadcrumbs with TIES' sign: as `breadcrumbs`, and only the changes that agree with the elected sign are summed."""
    return _elected(base, _kept(summary, base, tuned, *others), weight, strength, normalize, consensus)


def _largest(pieces: Sequence[Piece], number: int, count: int) -> Cut:
    """The `count` elements of largest magnitude of a model's task vector; of equal ones the first are taken.

    A sample says about how large the least of them is. Those that are surely larger are then only counted, and the few around
    it are sorted.
    """
    size = math.prod(pieces[0].sources[0].shape)
    if count <= 0 or count >= size:
        return Cut(0.0, size) if count > 0 else Cut(math.inf, 0)
    some = pieces[:: max(1, len(pieces) // SAMPLED)]
    sample = np.sort(np.concatenate(each_of(some, lambda piece: _magnitudes(piece, number, most=1))))
    for slack in SLACKS:
        ends = len(sample) * (1 - count / size) + np.array([-1, 1]) * (slack * len(sample) + 2 * math.sqrt(len(sample)))
        low, high = (sample[int(end)] if 0 <= end < len(sample) else end * math.inf for end in ends)
        if cut := _within(pieces, number, count, low, high):
            return cut
    return Cut(0.0, size)  # a magnitude is NaN, and so the result, which is refused


def _within(pieces: Sequence[Piece], number: int, count: int, low: float, high: float) -> Cut | None:
    """The `count` largest, if the least of them lies from `low` to `high`."""

    def counted(piece: Piece) -> tuple[int, np.ndarray | int]:
        x = _magnitudes(piece, number)
        # Many elements may be of one magnitude, such as 0; they need no memory.
        inside = x.compress((x >= low) & (x <= high)) if low < high else np.count_nonzero(x == low)
        return np.count_nonzero(x > high), inside

    above, inside = zip(*each_of(pieces, counted), strict=True)
    least, equal, wanted = low, inside, count - sum(above)
    if low < high:
        together = np.concatenate(inside)
        if 0 < wanted <= len(together):
            together.partition(len(together) - wanted)
            least = together[len(together) - wanted]
            wanted -= np.count_nonzero(together > least)
        equal = [np.count_nonzero(x == least) for x in inside]
    if not 0 < wanted <= sum(equal):
        return None
    # `wanted` of the elements that are equal to the least stay; the last of them is in this piece.
    before = np.cumsum([0, *equal])
    last = np.searchsorted(before, wanted) - 1
    places = np.flatnonzero(_magnitudes(pieces[last], number) == least)
    return Cut(float(least), pieces[last].place + int(places[wanted - before[last] - 1]) + 1)


def _magnitudes(piece: Piece, number: int, most: int | None = None) -> np.ndarray:
    """Of a model's task vector in a piece, flat."""
    base, tuned = piece.arrays((0, number), most)
    tuned -= base
    return np.abs(tuned, out=tuned).reshape(-1)


def _between(outer: Cut, inner: Cut, delta: np.ndarray, place: int) -> np.ndarray:
    """A mask of what is in one cut and not in the other."""
    return outer.mask(delta, place) & ~inner.mask(delta, place)


def _drawn(seed: int, number: int, share: float, delta: np.ndarray, place: int) -> np.ndarray:
    """A mask of elements drawn one by one; the seed, the model's number and an element's place decide."""
    generator = np.random.PCG64([seed, number])
    generator.advance(place // 2)  # each of its steps gives the numbers of two places
    pairs = np.random.Generator(generator).integers(2**64, size=delta.size // 2 + 1, dtype=np.uint64).astype("<u8", copy=False)
    numbers = pairs.view("<u4")[place % 2 :][: delta.size]
    last = round(share * 2**32) - 1
    return numbers <= np.uint32(last) if last >= 0 else np.zeros(delta.size, bool)


def _trims(pieces: Sequence[Piece], masks: Sequence[Callable], density: Sequence[float], rescale: str) -> list[tuple]:
    """(place, the models' trims) of every piece."""
    if rescale not in RESCALE:
        raise UserError(f"rescale={rescale!r}: give one of {', '.join(map(repr, RESCALE))}.")
    factors = [1 / share if rescale == "density" and share > 0 else 1.0 for share in density]
    if rescale == "l1":
        factors = [_restoring(pieces, number, mask) for number, mask in enumerate(masks, start=1)]
    trims = [Trim(mask, factor) for mask, factor in zip(masks, factors, strict=True)]
    return [(piece.place, trims) for piece in pieces]


def _restoring(pieces: Sequence[Piece], number: int, mask: Callable) -> float:
    """The factor by which what stays has the whole task vector's sum of magnitudes."""

    def sums(piece: Piece) -> tuple[float, float]:
        x = _magnitudes(piece, number)
        return x.sum(dtype=np.float64), x[mask(x, piece.place)].sum(dtype=np.float64)

    before, after = np.sum(each_of(pieces, sums), axis=0)
    return before / after if min(before, after) >= 1e-7 else 1.0


def _kept(summary: tuple, base: np.ndarray, *tuned: np.ndarray) -> list[np.ndarray]:
    """The trimmed task vectors, in place of the tuned models."""
    place, trims = summary
    for delta, (mask, factor) in zip(tuned, trims, strict=True):
        delta -= base
        delta *= mask(delta.reshape(-1), place).reshape(delta.shape)
        if factor != 1:
            delta *= np.float32(factor)
    return list(tuned)


def _summed(base: np.ndarray, deltas: list, weight: Sequence[float], strength: float, normalize: bool) -> np.ndarray:
    """base + lambda * sum_i w_i delta_i, over sum_i w_i if normalize; in place."""
    divisor = sum(weight) if normalize else 1.0
    if abs(divisor) < 1e-8:
        raise UserError(f"weight={list(weight)}: they sum to 0, and are to be normalized.")
    for delta, w in zip(deltas, weight, strict=True):
        if (scale := np.float32(w * strength / divisor)) != 1:
            delta *= scale
        base += delta
    return base


def _elected(
    base: np.ndarray, deltas: list, weight: Sequence[float], strength: float, normalize: bool, consensus: str
) -> np.ndarray:
    """The same, of those changes alone whose sign is that of most."""
    if consensus not in CONSENSUS:
        raise UserError(f"consensus={consensus!r}: give one of {', '.join(map(repr, CONSENSUS))}.")
    for delta, w in zip(deltas, weight, strict=True):
        if w != 1:
            delta *= np.float32(w)
    votes = deltas if consensus == "sum" else [np.sign(x) for x in deltas]
    plus = functools.reduce(np.add, votes) >= 0
    for delta in deltas:
        delta *= (delta > 0) == plus
    total = functools.reduce(np.add, deltas)
    if normalize:
        divisor = functools.reduce(np.add, [np.float32(w) * (x != 0) for x, w in zip(deltas, weight, strict=True)])
        total /= divisor + (divisor == 0)
    total *= np.float32(strength)
    return np.add(base, total, out=base)


def _shares(values: Sequence[float], name: str = "density") -> Sequence[float]:
    if wrong := [x for x in values if not 0 <= x <= 1]:
        raise UserError(f"{name}={wrong[0]!r}: give a share from 0 to 1.")
    return values
