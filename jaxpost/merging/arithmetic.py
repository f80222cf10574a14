"""Merges by arithmetic on weights: models of one architecture become one, without data and without training.

A merge is `(params, *others, keyword-only settings) -> params`: the first model's tree, with the structure, shapes and number
formats kept. Sums are taken in float32.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxpost.errors import UserError
from jaxpost.sharding import path_name
from jaxpost.types import Params


def soup(params: Params, *others: Params, weights: Sequence[float] | None = None) -> Params:
    """Model soup, the weighted mean:  sum_i w_i theta_i / sum_i w_i.

    weights: one for each model, the first's first; None weighs all alike. Source: "Model soups: averaging weights of multiple
    fine-tuned models improves accuracy without increasing inference time". Raises UserError for trees that differ, and for
    weights that are not one a model or sum to 0.
    """
    models = [params, *others]
    shares = [1.0] * len(models) if weights is None else [float(w) for w in weights]
    if len(shares) != len(models) or not sum(shares):
        raise UserError(f"arithmetic.soup: weights={weights!r}; give {len(models)} numbers, one a model, whose sum is not 0.")
    return _leafwise(lambda *leaves: sum(w / sum(shares) * x for w, x in zip(shares, leaves, strict=True)), params, *others)


def task_vectors(params: Params, *others: Params, strength: float = 1.0) -> Params:
    """Task arithmetic:  theta + strength * sum_i (theta_i - theta),  params being the model that the others were tuned from.

    It differs from `soup` in what the others add up: their changes, not their weights. A negative strength takes a task away.
    Source: "Editing Models with Task Arithmetic". Raises UserError for trees that differ.
    """
    return _leafwise(
        lambda base, *tuned: base + strength * sum((x - base for x in tuned), jnp.zeros_like(base)), params, *others
    )


def _leafwise(function, params: Params, *others: Params) -> Params:
    """function of each leaf of all models, in float32, as a tree like the first. Raises UserError for trees that differ."""
    first = _leaves(params)
    for number, other in enumerate(others, start=2):
        _check(first, _leaves(other), number)

    def leaf(*same):
        return function(*(jnp.asarray(x, jnp.float32) for x in same)).astype(same[0].dtype)

    return jax.tree.map(leaf, params, *others)


def _leaves(params: Params) -> dict[str, Any]:
    return {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}


def _check(first: dict[str, Any], other: dict[str, Any], number: int) -> None:
    """Raises UserError, naming the leaf, where model `number` has other weights than the first or some are whole numbers."""
    if lacking := [*(first.keys() - other.keys()), *(other.keys() - first.keys())]:
        holder = number if min(lacking) in other else 1
        raise UserError(f"merge: only model {holder} has {min(lacking)}; merge models of one architecture, adapters merged.")
    for path, leaf in first.items():
        if leaf.shape != other[path].shape:
            shapes = f"{tuple(leaf.shape)} in model 1 and {tuple(other[path].shape)} in model {number}"
            raise UserError(f"merge: {path} is {shapes}; merge models of one architecture.")
        if not jnp.issubdtype(leaf.dtype, jnp.floating) or not jnp.issubdtype(other[path].dtype, jnp.floating):
            raise UserError(f"merge: {path} is quantised, and what is merged are full weights; take the models unquantised.")
