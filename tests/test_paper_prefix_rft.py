"""configs/papers/prefix_rft.py: value and gradient by hand, which prefix tokens learn, and where a prefix ends."""

from pathlib import Path

import given_rollouts as given
import numpy as np
import pytest

from jaxpost.config import resolve

PAPER = str(Path(__file__).parent.parent / "configs" / "papers" / "prefix_rft.py")
paper = resolve.find(f"{PAPER}:get_config", "configs").__globals__


def test_the_uncertain_prefix_tokens_learn_by_the_advantage_of_their_completion():
    # A completion of two drawn tokens, and one that goes on for a token after a prefix of five.
    batch = given.rows([[0.0, 0.0], [0.0] * 6], [-1 / 3, 2 / 3])
    second = np.flatnonzero((batch["segments"] == 2)[0] & batch["mask"][0])
    prefix = np.zeros_like(batch["mask"])
    prefix[0, second[:5]] = True
    batch["entropy"][0, second] = [0.1, 0.9, 0.2, 0.8, 0.3, 2.0]
    batch |= {"demonstrations": prefix, "mask": batch["mask"] & ~prefix}
    entry = {"name": f"{PAPER}:prefix_rft", "longest": 4, "share": 0.4}
    loss, gradient, _ = given.measured(entry, batch)
    by_token = gradient["logps"][0]
    # Dr. GRPO: -A / (completions * longest) for each drawn token; the same for 0.4 of five prefix tokens.
    expected = np.zeros(by_token.shape)
    expected[(batch["segments"] == 1)[0] & batch["mask"][0]] = 1 / 3 / 8
    expected[second[[1, 3, 5]]] = -2 / 3 / 8
    np.testing.assert_allclose(by_token, expected, atol=1e-7)
    logps = batch["logps"][0]
    drawn = 2 * 1 / 3 / 8 - 2 / 3 / 8
    assert loss == pytest.approx(drawn - 2 / 3 / 8 * logps[second[[1, 3]]].sum(), rel=1e-6)


def test_without_a_prefix_it_is_dr_grpo():
    batch = given.rows([[0.1, -0.2], [0.3]], [1, -1])
    batch |= {"demonstrations": np.zeros_like(batch["mask"])}
    ours, by_token, _ = given.measured({"name": f"{PAPER}:prefix_rft", "longest": 4}, batch)
    theirs = {"name": "policy_gradient.dr_grpo", "longest": 4, "low": 1e9, "high": 1e9}
    loss, expected, _ = given.measured(theirs, batch)
    assert ours == pytest.approx(loss, rel=1e-6)
    np.testing.assert_allclose(by_token["logps"], expected["logps"], rtol=1e-6)


def test_the_first_of_a_group_begins_with_a_share_that_falls():
    ids, keys = np.arange(100), [np.array([key, 1], np.uint32) for key in range(200)]

    def lengths(progress):
        return np.array([len(paper["beginning"]({}, ids, progress=progress, key=key, member=0)) for key in keys])

    assert (lengths(0.0) == 95).all() and (lengths(1.0) >= 5).all() and (lengths(1.0) <= 95).all()
    assert abs(lengths(1.0).mean() - 50) < 6 and abs(lengths(0.5).mean() - 72) < 4  # uniform in [5, 95] and [50, 95]
    assert len(paper["beginning"]({}, ids, progress=0.0, key=keys[0], member=1)) == 0
    assert len(paper["beginning"]({}, ids[:2], progress=1.0, key=keys[0], member=0)) == 1  # at least one, and one is left
