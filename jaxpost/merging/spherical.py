"""Merges by angles: along the arc between two models, and to where tuned models surround a centre.

Each is mergekit's method of the same name; norms and angles are summed in float64.
"""

import itertools

import numpy as np

from jaxpost.merging.tensorwise import tensorwise

COLINEAR = 0.9995  # the cosine from which an arc is taken for a line


@tensorwise(base=True)
def slerp(base: np.ndarray, other: np.ndarray, *, t: float) -> np.ndarray:
    """Spherical interpolation:  sin((1-t) a) / sin(a) * base + sin(t a) / sin(a) * other,  a the angle between the two tensors.

    t: 0 gives the base, 1 the other. Tensors that are nearly colinear are interpolated linearly. The tensors' own lengths stay
    in: only the angle is that of unit vectors. Source: "Animating rotation with quaternion curves".
    """
    norms = [np.sqrt(_inner(x, x)) for x in (base, other)]
    cosine = _inner(base, other) / np.prod([norm if norm > 1e-8 else 1.0 for norm in norms])
    if abs(cosine) > COLINEAR:
        shares = 1 - t, t
    else:
        angle = np.arccos(cosine)
        shares = np.sin((1 - t) * angle) / np.sin(angle), np.sin(t * angle) / np.sin(angle)
    base *= np.float32(shares[0])
    other *= np.float32(shares[1])
    return np.add(base, other, out=base)


@tensorwise(base=True)
def model_stock(
    base: np.ndarray, first: np.ndarray, second: np.ndarray, *others: np.ndarray, filter_wise: bool = False
) -> np.ndarray:
    """Model Stock:  t * mean_i theta_i + (1 - t) * theta,  t = N c / (1 + (N - 1) c),  c the mean cosine of two task vectors.

    N: the tuned models, of which it needs two. filter_wise: a cosine for each row of a matrix (an output of the layer), in
    place of one for the tensor. Source: "Model Stock: All we need is just a few fine-tuned models", which has two and three
    models; the mean over pairs of more is mergekit's.
    """
    tuned = [first, second, *others]
    shape = base.shape if filter_wise and base.ndim > 1 else (1, base.size)
    deltas = [np.subtract(x, base, out=x).reshape(shape[0], -1) for x in tuned]
    norms = [np.sqrt(_inner(x, x, rows=True)) for x in deltas]
    cosines = [
        np.clip(_inner(deltas[i], deltas[j], rows=True) / np.maximum(norms[i] * norms[j], 1e-6), -1, 1)
        for i, j in itertools.combinations(range(len(tuned)), 2)
    ]
    cosine, count = np.mean(cosines, axis=0), len(tuned)
    divisor = 1 + (count - 1) * cosine  # 0 only where the changes cancel, so that the mean is the base
    t = np.where(divisor > 1e-6, count * cosine / np.maximum(divisor, 1e-6), 0.0).astype(np.float32)
    for delta in deltas[1:]:
        deltas[0] += delta
    deltas[0] *= t[:, None] / np.float32(count)
    return np.add(base, deltas[0].reshape(base.shape), out=base)


def _inner(one: np.ndarray, other: np.ndarray, rows: bool = False) -> np.ndarray:
    """The inner product of two arrays in float64, or one for each row [R]."""
    shape = (one.shape[0], -1) if rows else (1, -1)
    products = np.einsum("ri,ri->r", one.reshape(shape), other.reshape(shape), dtype=np.float64)
    return products if rows else products[0]
