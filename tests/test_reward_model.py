"""Reward models against their equations in float64, differentiated numerically; and the scalar head."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_pairs import plan

from jaxpost import metrics
from jaxpost.config.resolve import resolve
from jaxpost.declare import declared
from jaxpost.objectives import reward_model
from jaxpost.step import gradients
from jaxpost.types import Head, Output

BATCHES = 50
# Two rows of two documents and padding; two learned tokens each, but for one of a single token.
SEGMENTS = np.array([[1, 1, 1, 2, 2, 2, 0], [1, 1, 1, 1, 2, 2, 2]], np.int32)
MASK = np.array([[0, 1, 1, 0, 1, 1, 0], [0, 0, 1, 1, 0, 0, 1]], bool)
LAST = [(0, 2), (0, 5), (1, 3), (1, 6)]  # the last learned token of each document; pairs are the first two, and the others


def _forward(params, batch):
    """The token's reward is its hidden state, seen through a head of one."""
    return Output(params["hidden"][..., None], Head(jnp.zeros((1, 1))))


def _cases():
    rng = np.random.default_rng(11)
    rewards = rng.normal(size=(BATCHES, *MASK.shape)).astype(np.float32)
    of_documents = rng.random((BATCHES, 4)).astype(np.float32)
    constant = np.zeros_like(rewards)
    for i, (row, last) in enumerate(LAST):
        constant[:, row, SEGMENTS[row] == SEGMENTS[row, last]] = of_documents[:, i, None]
    steps = np.where(MASK & (rng.random(rewards.shape) < 0.6), rng.integers(0, 2, rewards.shape), -1).astype(np.float32)
    steps[:, 0, 1] = 1
    return rewards, of_documents, constant, steps


REWARDS, NUMBERS, CONSTANT, STEPS = _cases()


def _softplus(x):
    return np.logaddexp(0, x)


def _ends(rewards):
    return np.stack([rewards[:, i, j] for i, j in LAST], axis=1)


def _compared(margins, centring):
    def loss(rewards):
        r = _ends(rewards).reshape(-1, 2, 2)
        m = NUMBERS[:, ::2] if margins else 0.0
        return np.mean(_softplus(m - r[..., 0] + r[..., 1]) + centring * (r[..., 0] + r[..., 1]) ** 2, axis=1)

    return loss


def _cross_entropy(r, y):
    return y * _softplus(-r) + (1 - y) * _softplus(r)


REFERENCES = {
    "bradley_terry": ({}, _compared(False, 0.0), {}),
    "centred": ({"centring": 0.3}, _compared(False, 0.3), {}),
    "offset": ({"centring": 0.01}, _compared(True, 0.01), {"margins": CONSTANT}),
    "regression": ({}, lambda rewards: np.mean((_ends(rewards) - NUMBERS) ** 2, axis=1), {"labels": CONSTANT}),
    "logistic": ({}, lambda rewards: np.mean(_cross_entropy(_ends(rewards), NUMBERS), axis=1), {"labels": CONSTANT}),
    "process": (
        {},
        lambda rewards: np.sum((STEPS >= 0) * _cross_entropy(rewards, STEPS), (1, 2)) / np.sum(STEPS >= 0, (1, 2)),
        {"labels": STEPS},
    ),
}


@pytest.mark.parametrize("name", REFERENCES)
def test_value_and_gradient_are_the_equations(name):
    options, reference, columns = REFERENCES[name]
    known = "bradley_terry" if name == "centred" else name
    objective = resolve({"name": f"reward_model.{known}", **options}, "objectives")

    def one(rewards, columns):
        params = {"hidden": rewards, "reward_head": {"kernel": jnp.ones((1, 1))}}
        batch = {"mask": MASK, "segments": SEGMENTS, "tokens": SEGMENTS, **columns}
        loss, grads, _ = gradients(_forward, objective, params, {"hidden": None, "reward_head": {"kernel": None}}, batch, None)
        return loss, grads["hidden"]

    found, gradient = jax.device_get(jax.jit(jax.vmap(one))(REWARDS, columns))
    exact = REWARDS.astype(np.float64)
    np.testing.assert_allclose(found, reference(exact), rtol=1e-5)
    # Central differences: off by the third derivative times 1e-8, far below float32.
    wanted, step = np.zeros_like(exact), 1e-4
    for place in np.ndindex(MASK.shape):
        up, down = exact.copy(), exact.copy()
        up[:, *place] += step
        down[:, *place] -= step
        wanted[:, *place] = (reference(up) - reference(down)) / (2 * step)
    np.testing.assert_allclose(gradient, wanted, rtol=1e-5, atol=1e-6)


def test_a_fresh_head_gives_no_reward_and_log_two():
    rng = np.random.default_rng(0)
    hidden = rng.normal(size=(*MASK.shape, 3)).astype(np.float32)
    params = {"reward_head": {"kernel": jnp.zeros((3, 1))}}
    forward = lambda params, batch: Output(hidden, Head(jnp.zeros((1, 3))))  # noqa: E731
    batch = {"mask": MASK, "segments": SEGMENTS}
    frozen = {"reward_head": {"kernel": None}}
    step = jax.jit(lambda params: gradients(forward, reward_model.bradley_terry, params, frozen, batch, None))
    loss, grads, measured = step(params)
    assert float(loss) == np.log(np.float32(2)) and metrics.values(measured)["accuracy"] == 0
    # Half of the difference of the last hidden states, per pair.
    apart = sum(hidden[LAST[i]] - hidden[LAST[i + 1]] for i in (0, 2))
    np.testing.assert_allclose(grads["reward_head"]["kernel"][:, 0], -0.25 * apart, rtol=1e-5)
    leaves = declared(reward_model.bradley_terry, "leaves")
    (path,) = leaves
    node = params
    for part in path.split("/"):
        node = node[part]
    assert node.ndim == len(leaves[path][0])


ANSWERS = [{"prompt": "q", "completion": "a" * (1 + i % 3), "label": i % 2 > 0, "score": 2.5 + i % 2} for i in range(24)]
SOLUTIONS = [{"prompt": "q", "completions": ["ab", "c" * (1 + i % 3)], "labels": [True, False]} for i in range(24)]


@pytest.mark.parametrize(
    ("name", "rows", "labels"),
    [("regression", ANSWERS, [2.5, 3.5]), ("logistic", ANSWERS, [0, 1]), ("process", SOLUTIONS, [0, 1])],
)
def test_each_finds_its_labels_in_rows_of_its_own(name, rows, labels, tmp_path):
    made, _ = plan(tmp_path, rows, f"reward_model.{name}")
    batch = made.source(None)
    assert declared(made.objective, "columns").keys() <= made.own.keys()
    assert np.unique(batch["labels"][batch["mask"]]).tolist() == labels
    documents = np.sum((batch["positions"] == 0) & (batch["segments"] > 0))
    assert documents == 24 and (name != "process" or np.sum(batch["mask"]) == 2 * documents)
