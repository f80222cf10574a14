"""Advantages by hand: the values of the papers and of the frameworks that the presets are named after."""

import numpy as np
import pytest

from jaxpost.errors import UserError
from jaxpost.rollouts import advantages

ONE_OF_FOUR = np.array([[1.0, 0, 0, 0]])
COMPARING = ("centred", "group", "batch_std", "task_std", "leave_one_out", "opo")
# What an estimate is exactly, rounded to float32.
EXACT = {"rtol": 1e-6, "atol": 1e-7}


def _tokens(prompts: int, group: int, width: int = 4, seed: int = 0) -> dict:
    """Completions of 1 to `width` tokens with log-probabilities and values; what lies outside the mask is noise."""
    rng = np.random.default_rng(seed)
    rows = prompts * group
    found = {k: rng.normal(size=(rows, width)).astype(np.float32) for k in ("old_logps", "ref_logps", "values")}
    return found | {"mask": np.arange(width) < rng.integers(1, width + 1, (rows, 1)), "tasks": ["a", "b"] * (prompts // 2 + 1)}


def _of(name, rewards, tokens=None, **options):
    rewards = np.asarray(rewards)
    tokens = _tokens(*rewards.shape) if tokens is None else tokens
    tokens = tokens | ({"tasks": tokens["tasks"][: len(rewards)]} if "tasks" in tokens else {})
    return getattr(advantages, name)(rewards, tokens, **options)


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("group", {"eps": 0.0}, [1.5, -0.5, -0.5, -0.5]),
        ("group", {"eps": 0.0, "ddof": 0}, [np.sqrt(3), -1 / np.sqrt(3), -1 / np.sqrt(3), -1 / np.sqrt(3)]),
        ("group", {}, np.array([0.75, -0.25, -0.25, -0.25]) / (0.5 + 1e-4)),
        ("group", {"eps": 0.1}, np.array([0.75, -0.25, -0.25, -0.25]) / 0.6),
        ("centred", {}, [0.75, -0.25, -0.25, -0.25]),
        ("leave_one_out", {}, [1, -1 / 3, -1 / 3, -1 / 3]),
    ],
)
def test_one_right_answer_of_four(name, options, expected):
    found = _of(name, ONE_OF_FOUR, **options)
    assert found.dtype == np.float32 and found.shape == (1, 4)
    np.testing.assert_allclose(found[0], expected, **EXACT)


def test_the_deviation_may_be_the_batchs_or_the_tasks():
    rewards = np.array([[1, 0], [1, 1], [0.2, 0]])
    np.testing.assert_allclose(
        _of("task_std", rewards, {"tasks": ["x"] * 3}),
        np.array([[0.5, -0.5], [0, 0], [0.1, -0.1]]) / (0.516398 + 1e-6),
        rtol=2e-6,
    )
    np.testing.assert_allclose(
        _of("batch_std", rewards), np.array([[0.5, -0.5], [0, 0], [0.1, -0.1]]) / (0.516398 + 1e-4), rtol=2e-6
    )
    # Two tasks, the one ten times the other's scale: each is divided by its own.
    both = _of("task_std", np.array([[1.0, 0], [10, 0]]), {"tasks": ["x", "y"]}, eps=0.0)
    np.testing.assert_allclose(both, [[2**-0.5, -(2**-0.5)]] * 2, **EXACT)


def test_opo_weighs_the_baseline_by_length():
    tokens = {"mask": np.arange(3) < np.array([[3], [1]])}
    np.testing.assert_allclose(_of("opo", [[1.0, 0]], tokens), [[0.25, -0.75]], **EXACT)


@pytest.mark.parametrize("name", COMPARING)
def test_equal_rewards_and_lone_ones_are_exactly_zero_and_groups_apart(name):
    rewards = np.array([[0.1 + 0.2, 0.3, 0.3], [1, 0, 0.4], [7, 7, 7]])
    found = _of(name, rewards)
    assert not found[[0, 2]].any() and found[1].all()
    assert not _of(name, [[3.0], [-2.0]]).any()
    if name not in ("batch_std", "task_std"):
        np.testing.assert_array_equal(_of(name, rewards + np.array([[5], [0], [9]])), found)


@pytest.mark.parametrize("name", ("centred", "group", "batch_std", "leave_one_out"))
def test_a_group_adds_up_to_zero_and_scales(name):
    rewards = np.random.default_rng(1).normal(size=(5, 4))
    found = _of(name, rewards)
    np.testing.assert_allclose(found.sum(1), 0, atol=1e-6)
    scale = 1.0 if name in ("group", "batch_std") else 3.0
    options = {"eps": 0.0} if scale == 1 else {}
    np.testing.assert_allclose(_of(name, 3 * rewards + 2, **options), scale * _of(name, rewards, **options), rtol=1e-5)


@pytest.mark.parametrize("name", COMPARING)
def test_a_completion_without_a_reward_counts_nowhere(name):
    tokens = _tokens(2, 3)
    full, gap = np.array([[1.0, 0, 0.5], [0, 1, 1]]), np.array([[1.0, 0, np.nan], [0, 1, 1]])
    found = _of(name, gap, tokens)
    assert np.isfinite(found).all() and found[0, 2] == 0 and found[0, 0] > 0
    if name != "batch_std":
        pair = {k: v[:2] for k, v in tokens.items()}
        np.testing.assert_allclose(found[0, :2], _of(name, full[:1, :2], pair)[0], **EXACT)


def test_leave_one_out_takes_the_kl_out_of_the_reward():
    mask = np.array([[1, 1, 0], [1, 1, 1]], bool)
    tokens = {"mask": mask, "old_logps": np.full((2, 3), -1.0), "ref_logps": np.array([[-2.0, -1, 9], [-1, -1, -4]])}
    # Sums of k1: 1 and 3.
    np.testing.assert_allclose(_of("leave_one_out", [[1.0, 0]], tokens, beta=0.1), [[1.2, -1.2]], **EXACT)


def test_permuted_prompts_and_completions_permute_the_advantages():
    rewards, order = np.random.default_rng(2).normal(size=(4, 3)), [2, 0, 3, 1]
    for name in COMPARING[:3] + COMPARING[4:5]:
        np.testing.assert_allclose(_of(name, rewards[order][:, ::-1]), _of(name, rewards)[order][:, ::-1], rtol=1e-6)


# -------------------------------------------------------------------------------------------------------- Of each token


def _one(width: int = 3, **columns) -> dict:
    zeros = np.zeros((1, width))
    return {"mask": np.ones((1, width), bool), "old_logps": zeros, "ref_logps": zeros, "values": zeros} | columns


def _unwhitened(monkeypatch):
    monkeypatch.setattr(advantages, "_whitened", lambda x, mask: np.where(mask, x, 0.0).astype(np.float32))


def test_gae_by_hand(monkeypatch):
    _unwhitened(monkeypatch)
    values = np.array([[0.2, 0.4, 0.6]])
    found = _of("gae", [[1.0]], _one(values=values), beta=0.0)
    np.testing.assert_allclose(found["advantages"], [[0.751, 0.58, 0.4]], rtol=1e-6)
    np.testing.assert_allclose(found["returns"], [[0.951, 0.98, 1.0]], rtol=1e-6)
    # decay 1: rewards to go, less what was expected; decay 0: one step ahead.
    np.testing.assert_allclose(_of("gae", [[1.0]], _one(values=values), decay=1.0)["returns"], [[1, 1, 1]], rtol=1e-6)
    np.testing.assert_allclose(_of("gae", [[1.0]], _one(values=values), decay=0.0)["advantages"], [[0.2, 0.2, 0.4]], rtol=1e-6)
    half = _of("gae", [[1.0]], _one(values=values), decay=0.0, gamma=0.5)["advantages"]
    np.testing.assert_allclose(half, [[0.0, -0.1, 0.4]], atol=1e-7)


def test_a_tools_answer_takes_no_time_and_the_reward_stands_at_the_last_sampled_token(monkeypatch):
    _unwhitened(monkeypatch)
    mask = np.array([[True, False, True, False, True, False]])
    values = np.array([[0.2, 9, 0.4, 9, 0.6, 9]])
    found = _of("gae", [[1.0]], _one(6, mask=mask, values=values), beta=0.0)
    np.testing.assert_allclose(found["advantages"], [[0.751, 0, 0.58, 0, 0.4, 0]], rtol=1e-6)
    np.testing.assert_allclose(found["returns"], [[0.951, 0, 0.98, 0, 1.0, 0]], rtol=1e-6)


def test_the_kl_is_in_every_tokens_reward(monkeypatch):
    _unwhitened(monkeypatch)
    tokens = _one(ref_logps=np.array([[-1.0, -2.0, -3.0]]))
    found = _of("reinforce_pp", [[1.0]], tokens, beta=0.1)["advantages"]
    np.testing.assert_allclose(found, [[1 - 0.6, 1 - 0.5, 1 - 0.3]], rtol=1e-6)
    np.testing.assert_allclose(_of("reinforce_pp", [[1.0]], tokens, beta=0.0, gamma=0.5)["advantages"], [[0.25, 0.5, 1]])
    np.testing.assert_allclose(_of("gae", [[1.0]], tokens, beta=0.1, decay=1.0)["advantages"], found, rtol=1e-6)
    # The baseline is the group's, of the rewards before the KL.
    pair = {k: np.concatenate([v, v]) for k, v in tokens.items()}
    found = _of("reinforce_pp_baseline", [[1.0, 0.0]], pair, beta=0.1)["advantages"]
    np.testing.assert_allclose(found, [[0.5 - 0.6, 0.5 - 0.5, 0.5 - 0.3], [-0.5 - 0.6, -0.5 - 0.5, -0.5 - 0.3]], atol=1e-7)


@pytest.mark.parametrize("name", ("reinforce_pp", "reinforce_pp_baseline", "gae"))
def test_whitened_over_the_sampled_tokens_of_the_batch(name):
    rewards, tokens = np.random.default_rng(3).normal(size=(4, 3)), _tokens(4, 3)
    found, mask = _of(name, rewards, tokens)["advantages"], tokens["mask"]
    kept = found[mask].astype(np.float64)
    assert abs(kept.mean()) < 1e-6 and abs(kept.std() - 1) < 1e-6 and not found[~mask].any()
    other = {k: np.where(mask, v, 123.0) if k.endswith(("logps", "values")) else v for k, v in tokens.items()}
    np.testing.assert_array_equal(_of(name, rewards, other)["advantages"], found)
    level = {"beta": 0.0} | ({"decay": 1.0} if name == "gae" else {})
    assert not _of(name, np.ones((4, 3)), tokens | {"values": 0 * tokens["values"]}, **level)["advantages"].any()


def test_returns_are_those_before_whitening_and_rewardless_completions_have_none():
    tokens, rewards = _tokens(2, 2), np.array([[1.0, 0.0], [np.nan, 1.0]])
    found = _of("gae", rewards, tokens, decay=1.0, beta=0.0)
    mask = tokens["mask"]
    np.testing.assert_allclose(found["returns"], np.where(mask, [[1], [0], [0], [1]], 0), atol=1e-6)
    assert not found["advantages"][2].any() and found["advantages"][3][mask[3]].any()


def test_tasks_that_nobody_tells_are_asked_for():
    with pytest.raises(UserError, match="batch_std"):
        advantages.task_std(ONE_OF_FOUR, {})
