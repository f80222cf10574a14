"""Merges by angles: along the arc between two models, and to where tuned models surround a centre.

Each is mergekit's method of the same name; norms and angles are sums of rows in float32, added up in float64.
"""

import itertools
from collections.abc import Sequence

import numpy as np

from jaxpost.merging.tensorwise import Piece, each_of, tensorwise

COLINEAR = 0.9995  # the cosine from which an arc is taken for a line


def _cosine(pieces: Sequence[Piece], **_) -> list[float]:
    """The cosine of the angle between two tensors, for each piece the same."""

    def products(piece: Piece) -> list[float]:
        one, other = piece.arrays()
        return [np.vecdot(a, b).sum(dtype=np.float64) for a, b in ((one, one), (other, other), (one, other))]

    *squares, product = np.sum(each_of(pieces, products), axis=0)
    norms = [norm if (norm := np.sqrt(square)) > 1e-8 else 1.0 for square in squares]
    return [product / np.prod(norms)] * len(pieces)


@tensorwise(base=True, elementwise=True, summary=_cosine)
def slerp(base: np.ndarray, other: np.ndarray, *, t: float, summary: float) -> np.ndarray:
    """Spherical interpolation:  sin((1-t) a) / sin(a) * base + sin(t a) / sin(a) * other,  a the angle between the two tensors.

    t: 0 gives the base, 1 the other. Tensors that are nearly colinear are interpolated linearly. The tensors' own lengths stay
    in: only the angle is that of unit vectors. summary: its cosine. Source: "Animating rotation with quaternion curves".
    """
    if abs(summary) > COLINEAR:
        shares = 1 - t, t
    else:
        angle = np.arccos(summary)
        shares = np.sin((1 - t) * angle) / np.sin(angle), np.sin(t * angle) / np.sin(angle)
    base *= np.float32(shares[0])
    other *= np.float32(shares[1])
    return np.add(base, other, out=base)


def _steps(pieces: Sequence[Piece], *, filter_wise: bool) -> list[np.ndarray]:
    """Model Stock's t of each piece, [rows] float32, or [1] where it is one for the tensor."""

    def products(piece: Piece) -> np.ndarray:
        base, *tuned = (x.reshape(len(x), -1) for x in piece.arrays())
        pairs = itertools.combinations_with_replacement([x - base for x in tuned], 2)
        return np.stack([np.vecdot(one, other) for one, other in pairs]).astype(np.float64)

    by_row = each_of(pieces, products)
    if filter_wise and len(pieces[0].sources[0].shape) > 1:
        return [_step(each, len(pieces[0].sources) - 1) for each in by_row]
    total = sum(each.sum(axis=1, keepdims=True) for each in by_row)
    return [_step(total, len(pieces[0].sources) - 1)] * len(pieces)


def _step(products: np.ndarray, count: int) -> np.ndarray:
    """t [R] of the inner products [pairs,R] of `count` task vectors, those with themselves included."""
    pairs = dict(zip(itertools.combinations_with_replacement(range(count), 2), products, strict=True))
    norms = [np.sqrt(pairs[i, i]) for i in range(count)]
    cosines = [np.clip(x / np.maximum(norms[i] * norms[j], 1e-6), -1, 1) for (i, j), x in pairs.items() if i != j]
    cosine = np.mean(cosines, axis=0)
    divisor = 1 + (count - 1) * cosine  # 0 only where the changes cancel, so that the mean is the base
    return np.where(divisor > 1e-6, count * cosine / np.maximum(divisor, 1e-6), 0.0).astype(np.float32)


@tensorwise(base=True, elementwise=True, summary=_steps)
def model_stock(
    base: np.ndarray,
    first: np.ndarray,
    second: np.ndarray,
    *others: np.ndarray,
    filter_wise: bool = False,
    summary: np.ndarray,
) -> np.ndarray:
    """Model Stock:  t * mean_i theta_i + (1 - t) * theta,  t = N c / (1 + (N - 1) c),  c the mean cosine of two task vectors.

    N: the tuned models, of which it needs two. filter_wise: a cosine for each row of a matrix (an output of the layer), in
    place of one for the tensor. summary: t. Source: "Model Stock: All we need is just a few fine-tuned models", which has two
    and three models; the mean over pairs of more is mergekit's.
    """
    tuned = [first, second, *others]
    total = sum(x - base for x in tuned)
    total *= summary.reshape(-1, *[1] * (base.ndim - 1)) / np.float32(len(tuned))
    return np.add(base, total, out=base)
