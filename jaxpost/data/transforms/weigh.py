"""How much each row counts: (rows, columns, key, *, ...) -> weights [N] float, which become the rows' `weight`."""

from collections.abc import Mapping, Sequence

import numpy as np

from jaxpost.errors import UserError


def quality(
    rows: Sequence[dict],
    columns: Mapping,
    key,
    *,
    of: Mapping[str, float],
    temperature: float = 1.0,
    most: float = 10.0,
) -> np.ndarray:
    """Weights of mean 1 that grow with several scores: exp(z / temperature), cut off at `most` and divided by its mean, where z
    is the sum of the standardised columns, each times its coefficient in `of`.

    A column that is the same in all rows adds nothing. Standardised scores in a linear combination are those of "Meta-rater: A
    Multi-dimensional Data Selection Method for Pre-training Language Models", which takes the best instead of weighing all.
    Raises UserError for columns that are not one number a row, and for numbers that cannot be.
    """
    _check(of=of, temperature=temperature, most=most)
    total = np.zeros(len(rows))
    for column, coefficient in of.items():
        numbers = np.asarray(columns[column], np.float64)
        if numbers.ndim != 1:
            raise UserError(f"weigh.quality: {column} has {list(numbers.shape[1:])} numbers a row; it takes one.")
        spread = numbers.std()
        total += coefficient * (numbers - numbers.mean()) / spread if spread > 0 else 0.0
    weights = np.exp(np.minimum(total / temperature, np.log(most)))
    return weights / weights.mean()


def _check(*, of: Mapping[str, float], temperature: float, most: float) -> None:
    if not of or not temperature > 0 or not most >= 1:
        raise UserError(
            f"weigh.quality: of={dict(of)}, temperature={temperature}, most={most}; name columns, and give numbers "
            "above 0 and of at least 1."
        )


quality.check = _check
