"""What policy gradients are in expectation, by enumeration: every completion of three tokens from a vocabulary of three.

A policy is a table of logits, one row for each beginning. Of all completions, or of all groups of them, the gradients are added
up by how likely each is, and held to the gradient of what is meant: the expected return, the KL divergence. Completions are
taken at their full length ("fixed", 27 of them), or end with the token 0 ("stops", 15).

Numbers are float32, and an expectation is a sum of up to 3,375 of them with weights that add up to 1: 1e-6 is about ten units
in the last place of the largest gradient.
"""

import functools
import itertools

import given_rollouts as given
import jax
import jax.numpy as jnp
import numpy as np
import policy_gradient_cases as cases
import pytest

from jaxpost.config.resolve import resolve
from jaxpost.rollouts import advantages
from jaxpost.step import contributions
from jaxpost.types import Head, Output

V, LENGTH = 3, 3
BEGINNINGS = 1 + V + V * V
NEAR = 1e-6


@functools.cache
def _tree(kind: str) -> dict:
    """Every completion, behind a prompt: tokens, contexts (which row of the table predicts a token) and mask, [C,1+LENGTH]."""
    texts = list(itertools.product(range(V), repeat=LENGTH))
    if kind == "stops":
        texts = sorted({text[: text.index(0) + 1] if 0 in text else text for text in texts})
    elif kind == "one":
        texts = [(v,) for v in range(V)]
    tokens, contexts = np.zeros((2, len(texts), LENGTH + 1), np.int32)
    mask = np.zeros(tokens.shape, bool)
    for i, text in enumerate(texts):
        for t, token in enumerate(text):
            before = text[:t]
            contexts[i, t + 1] = (0, 1 + before[0] if t else 0, 1 + V + V * before[0] + before[1] if t > 1 else 0)[t]
            tokens[i, t + 1], mask[i, t + 1] = token, True
    return {"tokens": tokens, "contexts": contexts, "mask": mask}


def _table(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(BEGINNINGS, V)).astype(np.float32)


POLICY, OLD, REFERENCE = (_table(seed) for seed in range(3))


def _logps(table, tree) -> jax.Array:
    logps = jax.nn.log_softmax(table)[tree["contexts"], tree["tokens"]]
    return jnp.where(tree["mask"], logps, 0.0)


def _likely(table, tree) -> jax.Array:
    """[C]: the probability of each completion."""
    return jnp.exp(jnp.sum(_logps(table, tree), axis=1))


def _forward(table, batch):
    logps = _logps(table, batch)
    return Output(jnp.stack([logps, 0 * logps, 0 * logps], axis=-1), Head(jnp.zeros((1, 3))))


def _expected(entry, kind, groups, made, old=POLICY, reference=REFERENCE) -> np.ndarray:
    """The expected gradient of an objective over groups [K,G] of completions (their numbers), with advantages `made` [K,G], or
    for every token [K,G,1+LENGTH].
    """
    objective, tree = resolve(entry, "objectives"), _tree(kind)
    made = np.asarray(made)
    batches = {k: x[groups] for k, x in tree.items()}
    columns = {"old_logps": _logps(old, tree), "ref_logps": _logps(reference, tree)}
    batches |= {k: np.asarray(x)[groups] for k, x in columns.items()}
    batches["advantages"] = (made if made.ndim == 3 else made[..., None]) * batches["mask"]
    batches["segments"] = (batches["mask"] | (np.arange(LENGTH + 1) == 0)).astype(np.int32)
    weights = jnp.prod(_likely(old, tree)[groups], axis=1)

    def loss(table):
        def one(batch):
            terms, _ = objective(_forward, table, batch, None)
            return sum(contributions(terms, {k: t.weight for k, t in terms.items()}).values())

        return jnp.sum(weights * jax.vmap(one)(batches))

    with given.scores():
        return np.asarray(jax.jit(jax.grad(loss))(POLICY))


def _same(found, expected):
    np.testing.assert_allclose(found, expected, rtol=0, atol=NEAR * max(1.0, np.abs(expected).max()))


def _rewards(kind: str) -> np.ndarray:
    return np.random.default_rng(5).normal(size=len(_tree(kind)["tokens"])).astype(np.float32)


def _return_gradient(kind: str, beta: float = 0.0) -> np.ndarray:
    """d E[R] - beta d KL(policy || reference), of whole completions."""
    tree, rewards = _tree(kind), _rewards(kind)

    def aim(table):
        gap = jnp.sum(_logps(table, tree) - _logps(REFERENCE, tree), axis=1)
        return jnp.sum(_likely(table, tree) * (rewards - beta * gap))

    return np.asarray(jax.grad(aim)(POLICY))


def _groups(kind: str, size: int) -> np.ndarray:
    return np.array(list(itertools.product(range(len(_tree(kind)["tokens"])), repeat=size)))


def _tokens(kind: str, groups: np.ndarray) -> dict:
    tree = _tree(kind)
    columns = {"mask": tree["mask"], "old_logps": _logps(POLICY, tree), "ref_logps": _logps(REFERENCE, tree)}
    return {k: np.asarray(x)[groups.ravel()] for k, x in columns.items()}


CONSTANT = {"name": "constant", "longest": LENGTH}
BOTH = pytest.mark.parametrize(("kind", "size"), [("fixed", 2), ("stops", 2), ("stops", 3)])


@BOTH
@pytest.mark.parametrize("name", ["reinforce", "rloo"])
def test_leaving_one_out_is_exact(name, kind, size):
    groups = _groups(kind, size)
    entry = cases.ours(name, **({"beta": 0.0} if name == "rloo" else {}))
    made = advantages.leave_one_out(_rewards(kind)[groups], {})
    _same(-_expected(entry, kind, groups, made), _return_gradient(kind))


@BOTH
def test_centring_without_the_deviation_is_exact_but_for_the_groups_size(kind, size):
    groups, share = _groups(kind, size), (size - 1) / size
    made, exact = advantages.centred(_rewards(kind)[groups], {}), _return_gradient(kind)
    _same(-_expected(cases.ours("dr_grpo", longest=LENGTH), kind, groups, made) * LENGTH, share * exact)
    sums = cases.variant(cases.ours("grpo", beta=0.0), aggregation="sequence_sum")
    _same(-_expected(sums, kind, groups, made), share * exact)


def test_the_deviation_and_means_over_tokens_are_biased():
    groups, exact = _groups("stops", 2), _return_gradient("stops").ravel()
    sums, grpo = cases.variant("trl", aggregation="sequence_sum"), cases.ours("grpo", beta=0.0)
    for entry, estimate in ((sums, advantages.group), (grpo, advantages.centred), (cases.ours("dapo"), advantages.centred)):
        found = -_expected(entry, "stops", groups, estimate(_rewards("stops")[groups], {})).ravel()
        nearest = (found @ exact) / (found @ found) * found  # whatever constant it is multiplied by
        assert np.linalg.norm(nearest - exact) > 0.05 * np.linalg.norm(exact)


@pytest.mark.parametrize("kind", ["fixed", "stops"])
def test_the_kl_in_the_reward_is_exact(kind, monkeypatch):
    # As a part of the completion's reward, or of each token's with what follows it.
    groups = _groups(kind, 2)
    made = advantages.leave_one_out(_rewards(kind)[groups], _tokens(kind, groups), beta=0.3)
    _same(-_expected(cases.ours("rloo", beta=0.3), kind, groups, made), _return_gradient(kind, 0.3))
    monkeypatch.setattr(advantages, "_whitened", lambda x, mask: np.where(mask, x, 0.0))
    groups = _groups(kind, 1)
    made = advantages.reinforce_pp(_rewards(kind)[groups], _tokens(kind, groups), beta=0.3)["advantages"]
    _same(-_expected(cases.ours("reinforce"), kind, groups, made[:, None]), _return_gradient(kind, 0.3))


# ------------------------------------------------------------------------------------------------------------- The KL


def _kl_of_texts(kind: str) -> np.ndarray:
    return -_return_gradient(kind, 1.0) + _return_gradient(kind, 0.0)


def _kl_of_tokens(kind: str, old, *, backwards: bool = False) -> np.ndarray:
    """The gradient of the sum over beginnings of P(beginning under old) KL there, the beginnings held as they are."""
    tree = _tree(kind)
    likely, logps = np.asarray(_likely(old, tree)), np.asarray(_logps(old, tree))
    reached = np.zeros(BEGINNINGS)
    for context in range(BEGINNINGS):
        for t in range(1, LENGTH + 1):
            reached[context] += likely[(tree["contexts"][:, t] == context) & tree["mask"][:, t]].sum()
    assert logps.shape and reached[0] == pytest.approx(1, rel=1e-5)

    def aim(table):
        p, q = jax.nn.log_softmax(table), jax.nn.log_softmax(REFERENCE)
        p, q = (q, p) if backwards else (p, q)
        return jnp.sum(jnp.asarray(reached, jnp.float32) * jnp.sum(jnp.exp(p) * (p - q), axis=-1))

    return np.asarray(jax.grad(aim)(POLICY))


def _of_term(name: str, kind: str, old=POLICY) -> np.ndarray:
    groups = _groups(kind, 1)
    return _expected(cases.plus(name), kind, groups, np.zeros(groups.shape), old)


@pytest.mark.parametrize("kind", ["fixed", "stops"])
def test_of_whole_completions_the_form_with_the_return_is_exact(kind):
    exact = _kl_of_texts(kind)
    _same(_of_term("kl_k1_return", kind), exact)
    # The others are not, as the page of terms says; but for the last token, after which nothing follows.
    found = _of_term("kl_k2", kind)
    assert np.abs(found - exact)[: 1 + V].max() > 0.01
    _same(found[1 + V :], exact[1 + V :])


@pytest.mark.parametrize("old", ["policy", "another"])
@pytest.mark.parametrize("kind", ["fixed", "stops"])
@pytest.mark.parametrize("name", ["kl_k1_ratio", "kl_k2", "kl_k3_ratio"])
def test_of_tokens_given_what_stands_before_them_the_forms_are_exact(name, kind, old):
    table = {"policy": POLICY, "another": OLD}[old]
    _same(_of_term(name, kind, table), _kl_of_tokens(kind, table))


@pytest.mark.parametrize("kind", ["fixed", "stops"])
def test_the_impostors_give_what_their_docstrings_say(kind):
    _same(_of_term("k1_in_loss", kind), np.zeros((BEGINNINGS, V)))
    _same(_of_term("k3_in_loss", kind), _kl_of_tokens(kind, POLICY, backwards=True))


def test_of_one_token_all_forms_are_the_same():
    exact = _kl_of_texts("one")
    np.testing.assert_allclose(exact, _kl_of_tokens("one", POLICY), atol=NEAR)
    for name in ("kl_k1_ratio", "kl_k2", "kl_k3_ratio", "kl_k1_return"):
        _same(_of_term(name, "one"), exact)


def test_the_gradients_of_three_tokens_are_the_known_ones(monkeypatch):
    policy, reference = np.zeros((2, BEGINNINGS, V), np.float32)
    policy[0], reference[0] = np.log([0.5, 0.3, 0.2]), np.log([0.2, 0.5, 0.3])
    monkeypatch.setitem(globals(), "POLICY", policy)
    known = dict.fromkeys(("kl_k1_ratio", "kl_k2", "kl_k3_ratio", "kl_k1_return"), (0.346243, -0.220389, -0.125854))
    known |= {"k3_in_loss": (0.3, -0.2, -0.1), "k1_in_loss": (0, 0, 0)}
    groups = _groups("one", 1)
    for name, gradient in known.items():
        found = _expected(cases.plus(name), "one", groups, np.zeros(groups.shape), policy, reference)
        np.testing.assert_allclose(found[0], gradient, atol=1e-6, err_msg=name)
