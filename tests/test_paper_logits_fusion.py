"""configs/papers/logits_fusion.py: the strength of the fusion against a grid, its limits, and what changes nothing."""

from pathlib import Path

import jax
import numpy as np
import pytest

from jaxpost.config import resolve

PAPER = str(Path(__file__).parent.parent / "configs" / "papers" / "logits_fusion.py")
fusion = resolve.find(f"{PAPER}:get_config", "configs").__globals__


def kl(p, q):
    """KL(softmax p || softmax q) in float64."""
    p, q = (z - np.log(np.exp(z - z.max(-1, keepdims=True)).sum(-1, keepdims=True)) - z.max(-1, keepdims=True) for z in (p, q))
    return (np.exp(p) * (p - q)).sum(-1)


def logits(rows=16, vocab=12, seed=0):
    """Large, tuned and small."""
    large, small, change = np.random.default_rng(seed).normal(size=(3, rows, vocab)) * np.array([2.0, 1.0, 1.0])[:, None, None]
    return large, small + change, small


def test_the_strength_is_that_of_a_grid():
    large, tuned, small = logits()
    grid = np.linspace(0, 2, 4001)
    reached = kl(large + grid[:, None, None] * (tuned - small), large[None])  # [grid,R]
    assert (np.diff(reached, axis=0) >= -1e-12).all()  # the shift grows with the strength
    expected = grid[np.abs(reached - kl(tuned, small)).argmin(0)]
    strength = np.asarray(fusion["strength"](large, tuned, small))[:, 0]
    assert expected.min() > 0.3 and expected.max() == 2.0  # some are short of the tuned model's shift even at the most
    np.testing.assert_allclose(strength, expected, atol=1e-3)


def test_a_large_model_that_is_the_small_one_becomes_the_tuned_one():
    _, tuned, small = logits()
    np.testing.assert_allclose(fusion["strength"](small, tuned, small), 1.0, atol=1e-3)
    mixed = fusion["dynamic"](small, tuned, small)
    np.testing.assert_allclose(jax.nn.softmax(mixed), jax.nn.softmax(tuned), atol=1e-3)


def test_a_tuned_model_that_is_the_small_one_changes_nothing():
    large, _, small = logits()
    np.testing.assert_allclose(fusion["strength"](large, small, small), 0.0, atol=1e-5)
    np.testing.assert_allclose(fusion["dynamic"](large, small, small), large, atol=1e-5)


@pytest.mark.parametrize("which", [0, 1, 2])
def test_a_constant_added_to_logits_changes_no_probability(which):
    before = logits()
    after = [z + 3.0 * (i == which) for i, z in enumerate(before)]
    np.testing.assert_allclose(jax.nn.softmax(fusion["dynamic"](*after)), jax.nn.softmax(fusion["dynamic"](*before)), atol=1e-4)
