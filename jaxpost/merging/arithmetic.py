"""Merges by arithmetic: weighted sums of models, and of what tuning changed.

Each is mergekit's method of the same name, in float32.
"""

from collections.abc import Sequence

import numpy as np

from jaxpost.errors import UserError
from jaxpost.merging.coefficients import Each
from jaxpost.merging.tensorwise import tensorwise


@tensorwise(each=("weight",), elementwise=True)
def linear(tensor: np.ndarray, *others: np.ndarray, weight: Each = 1.0, normalize: bool = True) -> np.ndarray:
    """The weighted mean, a model soup:  sum_i w_i theta_i / sum_i w_i;  without `normalize` the sum alone.

    weight: of each model. Source: "Model soups: averaging weights of multiple fine-tuned models improves accuracy without
    increasing inference time". Raises UserError for weights that sum to 0 where they are to be normalized.
    """
    total = _weighted([tensor, *others], weight)
    return np.divide(total, np.float32(_divisor(weight)), out=total) if normalize else total


@tensorwise(base=True, each=("weight",), elementwise=True)
def task_arithmetic(
    base: np.ndarray,
    tuned: np.ndarray,
    *others: np.ndarray,
    weight: Each = 1.0,
    strength: float = 1.0,
    normalize: bool = False,
) -> np.ndarray:
    """Task vectors added up:  theta + lambda * sum_i w_i (theta_i - theta);  with `normalize` over sum_i w_i.

    It differs from `linear` in what it sums: the changes, not the weights. strength: lambda; a negative one takes tasks away.
    weight: of each tuned model. Source: "Editing Models with Task Arithmetic". Raises UserError as `linear` does.
    """
    total = _weighted([np.subtract(x, base, out=x) for x in (tuned, *others)], weight)
    total *= np.float32(strength / (_divisor(weight) if normalize else 1.0))
    return np.add(base, total, out=total)


def _weighted(arrays: Sequence[np.ndarray], weight: Sequence[float]) -> np.ndarray:
    """sum_i w_i x_i, in place of the first array; the others are changed."""
    for w, x in zip(weight, arrays, strict=True):
        x *= np.float32(w)
    for x in arrays[1:]:
        arrays[0] += x
    return arrays[0]


def _divisor(weight: Sequence[float]) -> float:
    if abs(total := sum(weight)) < 1e-8:
        raise UserError(f"weight={weight}: they sum to 0, and are to be normalized.")
    return total
