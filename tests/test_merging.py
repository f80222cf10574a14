"""Every merge under one contract, by discovery, and each against its closed form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpost.config.resolve import fits, known, resolve
from jaxpost.errors import UserError
from jaxpost.merging import arithmetic

MERGES = known("merging")
# The settings at which a merge of three models gives the first.
NOTHING = {"arithmetic.soup": {"weights": (1.0, 0.0, 0.0)}, "arithmetic.task_vectors": {"strength": 0.0}}


def model(seed: int) -> dict:
    rng = np.random.default_rng(seed)
    kernel = jnp.asarray(rng.normal(size=(2, 3, 4)), jnp.bfloat16)
    return {"layers": {"mlp": {"kernel": kernel}}, "norm": {"weight": jnp.asarray(rng.normal(size=4), jnp.float32)}}


ONE, TWO, THREE = map(model, range(3))


def test_the_first_family_is_known():
    assert {"arithmetic.soup", "arithmetic.task_vectors"} <= set(MERGES)


@pytest.mark.parametrize("name", MERGES)
def test_a_merge_keeps_the_tree_and_without_strength_gives_the_first_model(name):
    merged = resolve(name, "merging")(ONE, TWO, THREE)
    assert jax.tree.structure(merged) == jax.tree.structure(ONE)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), merged) == jax.tree.map(lambda x: (x.shape, x.dtype), ONE)
    same = resolve({"name": name, **NOTHING[name]}, "merging")(ONE, TWO, THREE)
    jax.tree.map(np.testing.assert_array_equal, same, ONE)
    assert not np.array_equal(merged["norm"]["weight"], ONE["norm"]["weight"])


def test_closed_forms():
    one, two, three = (np.asarray(m["norm"]["weight"], np.float64) for m in (ONE, TWO, THREE))
    for merged, expected in (
        (arithmetic.soup(ONE, TWO, THREE), (one + two + three) / 3),
        (arithmetic.soup(ONE, TWO, THREE, weights=(2, 1, 1)), (2 * one + two + three) / 4),
        (arithmetic.task_vectors(ONE, TWO, THREE, strength=0.5), one + 0.5 * (two - one + three - one)),
        (arithmetic.task_vectors(ONE, TWO, strength=-1.0), 2 * one - two),
    ):
        np.testing.assert_allclose(merged["norm"]["weight"], expected, rtol=1e-6, atol=1e-7)
    jax.tree.map(np.testing.assert_array_equal, arithmetic.task_vectors(ONE, TWO), TWO | {"norm": _added(ONE, TWO)})


def _added(one, two):
    return {"weight": one["norm"]["weight"] + (two["norm"]["weight"] - one["norm"]["weight"])}


def test_trees_that_differ_are_refused_by_leaf():
    wide = {**TWO, "norm": {"weight": jnp.ones(5)}}
    with pytest.raises(UserError, match=r"norm/weight is \(4,\) in model 1 and \(5,\) in model 3"):
        arithmetic.soup(ONE, TWO, wide)
    with pytest.raises(UserError, match="only model 2 has head/weight"):
        arithmetic.task_vectors(ONE, {**TWO, "head": {"weight": jnp.ones(2)}})
    with pytest.raises(UserError, match="only model 1 has norm/weight"):
        arithmetic.soup(ONE, {"layers": TWO["layers"]})
    with pytest.raises(UserError, match="norm/weight is quantised"):
        arithmetic.soup(ONE, {**TWO, "norm": {"weight": jnp.ones(4, jnp.int8)}})
    for weights in ((1.0,), (1.0, -1.0)):
        with pytest.raises(UserError, match="give 2 numbers, one a model, whose sum is not 0"):
            arithmetic.soup(ONE, TWO, weights=weights)


def test_a_merge_takes_further_models_and_keyword_settings():
    assert fits(lambda params, *others, strength=1.0: params, "merging") and fits(lambda params: params, "merging")
    assert not fits(lambda params, other, *more: params, "merging") and not fits(lambda: None, "merging")
