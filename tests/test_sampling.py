"""Sampling and rollouts: what is drawn has the probability that is recorded, and nothing else has a say in it.

The draw is held to the distribution by enumeration, the recorded log-probabilities to the training forward's, the noise to
(seed, step, row) alone, and the policy gradient to the exact gradient of the expected return, summed over every outcome.
"""

import functools
import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy_tokenizers import byte_pairs, characters

from jaxpost import sharding
from jaxpost.errors import UserError
from jaxpost.models.families import Architecture
from jaxpost.models.transformer import Transformer
from jaxpost.objectives.logprobs import token_scores
from jaxpost.objectives.policy_gradient import reinforce
from jaxpost.rollouts.advantages import leave_one_out
from jaxpost.rollouts.source import Rollouts
from jaxpost.sampling.decode import Completions, answers, complete, draw
from jaxpost.sampling.text import continuation
from jaxpost.step import gradients
from jaxpost.tasks import arithmetic
from jaxpost.types import Head, Output, TrainState

# ------------------------------------------------------------------------------------------------------------- draw


def test_draw_gives_each_token_its_share_of_a_uniform_grid():
    probs = np.array([0.5, 0.0, 0.125, 0.25, 0.0, 0.125])
    grid = jnp.arange(64) / 64
    with np.errstate(divide="ignore"):
        scores = jnp.broadcast_to(jnp.log(probs), (64, 6))
    token, logp = draw(scores, grid, jnp.float32(1.0))
    # Shares of 1/64 are exact in float32 and the grid begins each of them, so the counts are exact too.
    np.testing.assert_array_equal(np.bincount(token, minlength=6), probs * 64)
    np.testing.assert_allclose(np.exp(logp), probs[token], rtol=1e-6)  # the rounding of one log and one exp


def test_draw_applies_the_temperature_to_the_odds_and_the_record():
    scores = jnp.broadcast_to(jnp.log(jnp.array([0.8, 0.2])), (170, 2))
    token, logp = draw(scores, jnp.arange(170) / 170, jnp.float32(0.5))
    odds = np.array([0.64, 0.04]) / 0.68
    np.testing.assert_array_equal(np.bincount(token), [160, 10])
    np.testing.assert_allclose(np.exp(logp), odds[token], rtol=1e-6)


def test_greedy_takes_the_mode_and_records_temperature_one():
    scores = jnp.log(jnp.array([[0.2, 0.7, 0.1], [0.6, 0.1, 0.3]]))
    token, logp = draw(scores, jnp.array([0.01, 0.99]), jnp.float32(0.0))
    np.testing.assert_array_equal(token, [1, 0])
    np.testing.assert_allclose(np.exp(logp), [0.7, 0.6], rtol=1e-6)


def test_what_has_no_probability_is_never_drawn():
    """Over a wide vocabulary a parallel sum of probabilities rises, by rounding, at places that have none: aim at those."""
    rng = np.random.default_rng(0)
    scores = rng.normal(size=32000).astype(np.float32) * 3
    scores[rng.random(32000) < 0.5] = -np.inf
    scores[-1] = -np.inf
    mass = np.asarray(jnp.cumsum(jnp.exp(jax.nn.log_softmax(jnp.asarray(scores)))))
    rises = np.flatnonzero((np.diff(mass) > 0) & (scores[1:] == -np.inf))
    assert len(rises) > 100  # otherwise this test would show nothing
    aimed = np.concatenate([mass[rises] / mass[-1], np.nextafter(mass[rises], 1) / mass[-1], [0.0, 1 - 2**-24]])
    token, logp = draw(jnp.broadcast_to(scores, (len(aimed), 32000)), jnp.asarray(aimed, jnp.float32), jnp.float32(1.0))
    assert np.isfinite(scores[np.asarray(token)]).all() and np.isfinite(logp).all()


# ------------------------------------------------------------------------------------------------------ Completions

# Weights at a scale where the next token is neither certain nor uniform; all tests share its shapes, so it compiles twice.
MODEL = Transformer(
    Architecture(vocab=17, width=16, mlp_width=32, layers=2, heads=4, kv_heads=2, head_width=8, max_positions=64, init_std=0.4)
)
WINDOW, NEW, STOP, COUNT = 6, 10, 3, 8


@functools.cache
def weights():
    return MODEL.init(jax.random.PRNGKey(1))


@functools.cache
def prompts():
    rng = np.random.default_rng(2)
    return tuple(rng.integers(4, 17, 1 + i % WINDOW).astype(np.int32) for i in range(COUNT))


@functools.cache
def mesh(*sizes):
    devices = jax.devices()[: int(np.prod(sizes))]
    return sharding.make_mesh(*sizes, devices=devices)


def sampled(chosen, temperature=1.0, sizes=(1, 1, 1), stop=(STOP,), **noise):
    where = mesh(*sizes)
    with sharding.use(where):
        params = jax.device_put(weights(), sharding.stored(where, weights()))
    return complete(
        MODEL, params, chosen, mesh=where, prompt_window=WINDOW, new=NEW, stop=stop, temperature=temperature, **noise
    )


def tails(found, chosen):
    """Each completion's tokens, by prompt."""
    return [list(t[len(p) : len(p) + n]) for t, p, n in zip(found.tokens, chosen, found.lengths, strict=True)]


@jax.jit
def rescored(params, columns):
    return token_scores(MODEL.forward(params, columns), columns)["logps"]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_recorded_logps_are_the_training_forwards(temperature):
    found = sampled(prompts(), temperature, seed=1)
    starts = np.array([len(p) for p in prompts()])[:, None]
    ends, place = starts + found.lengths[:, None], np.arange(WINDOW + NEW)[None]
    columns = {
        "tokens": jnp.asarray(found.tokens),
        "segments": jnp.asarray((place < ends).astype(np.int32)),
        "positions": jnp.asarray(np.where(place < ends, place, 0)),
        "mask": jnp.asarray((place >= starts) & (place < ends)),
        "temperature": jnp.float32(temperature),
    }
    # 5e-5: float32 through two layers in another order, a row at a time against all at once; the design's bound.
    np.testing.assert_allclose(found.logps, rescored(weights(), columns), atol=5e-5)
    assert (found.logps < -0.01).sum() > COUNT and not found.logps[~np.asarray(columns["mask"])].any()


def test_a_row_does_not_depend_on_its_neighbours():
    found = sampled(prompts(), seed=5, step=7)
    others = list(prompts())
    others[:3], others[5:] = [prompts()[7]] * 3, [prompts()[0]] * 3
    again = sampled(others, seed=5, step=7)
    for i in (3, 4):
        np.testing.assert_array_equal(found.tokens[i], again.tokens[i])
        np.testing.assert_array_equal(found.logps[i], again.logps[i])


def test_a_row_does_not_depend_on_its_prompts_padding():
    """The same prompts in a wider window: another program, so tokens are equal and log-probabilities within rounding."""
    where = mesh(1, 1, 1)
    wide = complete(MODEL, weights(), prompts(), mesh=where, prompt_window=WINDOW + 5, new=NEW, stop=(STOP,), seed=1)
    found = sampled(prompts(), seed=1)
    assert tails(wide, prompts()) == tails(found, prompts())
    np.testing.assert_allclose(wide.logps.sum(1), found.logps.sum(1), atol=NEW * 5e-5)


def test_noise_belongs_to_seed_step_and_row():
    one = [prompts()[5]] * COUNT
    base = tails(sampled(one, seed=1, step=2), one)
    assert base == tails(sampled(one, seed=1, step=2), one)
    assert len({tuple(t) for t in base}) == COUNT
    for other in ({"seed": 2, "step": 2}, {"seed": 1, "step": 3}, {"seed": 2, "step": 1}):
        assert sum(a == b for a, b in zip(base, tails(sampled(one, **other), one), strict=True)) <= 1
    where = mesh(1, 1, 1)
    shifted = complete(
        MODEL, weights(), one, mesh=where, prompt_window=WINDOW, new=NEW, stop=(STOP,), seed=1, step=2, rows=(0, COUNT)
    )
    assert tails(shifted, one) == base


def test_the_stop_token_is_part_of_the_completion_and_the_limit_is_no_stop():
    found = sampled(prompts(), seed=3)
    own = tails(found, prompts())
    assert 0 < found.stopped.sum() < COUNT
    for tail, stopped, row, prompt in zip(own, found.stopped, found.tokens, prompts(), strict=True):
        assert (tail.index(STOP) == len(tail) - 1) if stopped else (STOP not in tail and len(tail) == NEW)
        np.testing.assert_array_equal(row[: len(prompt)], prompt)
        assert not row[len(prompt) + len(tail) :].any()
    ended = [own[i] for i in np.flatnonzero(found.stopped)]
    tokenizer = arithmetic.tokenizer()
    texts = answers(found, prompts(), tokenizer)
    assert [texts[i] for i in np.flatnonzero(found.stopped)] == [tokenizer.decode(t[:-1]) for t in ended]


def test_an_answer_is_judged_and_shown_as_it_was_written():
    """Some tokenizers tidy up what they decode, and a verifier would judge what the model did not say."""
    tokenizer = characters(adds_bos=False)
    tokenizer.clean_up_tokenization_spaces = True
    ids = np.array(tokenizer("a . b ?")["input_ids"])
    assert tokenizer.decode(ids) == "a. b?"
    found = Completions(ids[None], np.array([6]), np.zeros((1, 7)), np.array([False]))
    assert answers(found, [ids[:1]], tokenizer) == [" . b ?"] == [continuation(tokenizer, ids[:1], ids[1:])]
    # A prompt may end within a letter of several bytes: the completion then stands by itself.
    ids = np.array(byte_pairs()("é .")["input_ids"])
    assert continuation(byte_pairs(), ids[:1], ids[1:]) == "\N{REPLACEMENT CHARACTER} ."


class Counting(NamedTuple):
    """A model that always says token 1, and counts its calls."""

    arch: Architecture

    def make_cache(self, batch_size, length):
        return ()

    def forward(self, params, batch, cache):
        jax.debug.callback(lambda: CALLS.append(1))
        return Output(jnp.zeros((*batch["tokens"].shape, 2)).at[..., 1].set(1.0), Head(9 * jnp.eye(2)), cache)


CALLS = []


def test_sampling_ends_as_soon_as_every_row_has():
    for stop, calls in (((1,), 1 + 1), ((0,), 1 + NEW)):  # the prompt's, and one a turn
        CALLS.clear()
        found = complete(
            Counting(MODEL.arch), {"layers": ()}, prompts(), mesh=mesh(1, 1, 1), prompt_window=WINDOW, new=NEW, stop=stop,
            temperature=0.0,
        )  # fmt: skip
        jax.effects_barrier()
        assert len(CALLS) == calls and (found.stopped == (calls == 2)).all()


def test_every_token_a_stop_and_none():
    """With every token a stop each row is one token long; with none of them all go to the limit."""
    found = sampled(prompts(), seed=3, stop=tuple(range(17)))
    assert (found.lengths == 1).all() and found.stopped.all()
    found = sampled(prompts(), seed=3, stop=())
    assert (found.lengths == NEW).all() and not found.stopped.any()


def test_the_same_tokens_on_eight_devices():
    alone, spread = sampled(prompts(), seed=1), sampled(prompts(), sizes=(2, 2, 2), seed=1)
    np.testing.assert_array_equal(alone.tokens, spread.tokens)
    np.testing.assert_array_equal(alone.stopped, spread.stopped)
    np.testing.assert_allclose(alone.logps, spread.logps, atol=5e-5)  # sums in another order


def test_a_batch_that_devices_do_not_divide_is_filled_up_and_cut_again():
    chosen = prompts()[:6]
    assert tails(sampled(chosen, sizes=(2, 2, 2), seed=1), chosen) == tails(sampled(prompts(), seed=1), prompts())[:6]


@pytest.mark.parametrize("length", [0, WINDOW + 1])
def test_a_prompt_that_does_not_fit_is_refused(length):
    with pytest.raises(UserError, match=rf"{length} tokens; the prompt window takes 1 to {WINDOW}"):
        sampled([np.zeros(length, np.int32)])


# --------------------------------------------------------------------------------------------------------- Rollouts


def test_leave_one_out_by_hand():
    rewards = np.array([[1, 0, 0, 0], [1, 1, 0, 0], [2, 2, 2, 2], [0.1, 0.1, 0.1, 0.1]], np.float32)
    third = np.float32(1 / 3)
    expected = [[1, -third, -third, -third], [2 * third, 2 * third, -2 * third, -2 * third], [0] * 4, [0] * 4]
    np.testing.assert_allclose(leave_one_out(rewards), expected, rtol=1e-6)
    assert not leave_one_out(rewards)[2:].any() and leave_one_out(rewards).dtype == np.float32


def rollouts(reward, group=4, **changes):
    tokenizer = arithmetic.tokenizer()
    options = {"prompt_window": WINDOW, "new": NEW, "temperature": 1.0, "stop": (STOP,)} | changes

    def prompt(i):
        return {"number": i}, prompts()[i % COUNT]

    return Rollouts(MODEL, tokenizer, prompt, reward, mesh(1, 1, 1), batch_size=COUNT, group=group, seed=9, options=options)


def policy():
    count = jnp.zeros((), jnp.int32)
    frozen = jax.tree.map(lambda _: None, weights())
    return TrainState(count, weights(), frozen, None, None, jax.random.PRNGKey(0), count, count)


def test_a_batch_of_rollouts_says_what_happened():
    source = rollouts(lambda record, text: float(len(text) % 2 + record["number"]))
    batch = source(policy())
    starts = np.array([len(prompts()[i // 4]) for i in range(COUNT)])
    found = complete(
        MODEL, weights(), [prompts()[i // 4] for i in range(COUNT)], mesh=mesh(1, 1, 1), prompt_window=WINDOW, new=NEW,
        stop=(STOP,), seed=9, step=0,
    )  # fmt: skip
    np.testing.assert_array_equal(batch["tokens"], found.tokens)
    np.testing.assert_array_equal(batch["old_logps"], found.logps)
    np.testing.assert_array_equal(batch["mask"], np.asarray(found.logps) != 0)
    np.testing.assert_array_equal(batch["mask"].sum(1), found.lengths)
    np.testing.assert_array_equal(batch["segments"].sum(1), starts + found.lengths)
    np.testing.assert_array_equal(batch["positions"].max(1), starts + found.lengths - 1)
    np.testing.assert_array_equal(batch["truncated"], ~found.stopped)
    rewards = batch["rewards"].reshape(2, 4)
    np.testing.assert_array_equal(rewards // 1 >= [[0], [1]], True)
    np.testing.assert_allclose(batch["group_std"], np.repeat(rewards.std(1, ddof=1), 4), rtol=1e-6)
    wanted = np.where(batch["mask"], leave_one_out(rewards).reshape(-1, 1), 0)
    np.testing.assert_array_equal(batch["advantages"], wanted)
    assert rewards.std() > 0 and batch["temperature"] == 1.0


def test_position_is_the_whole_state_of_the_rollouts():
    source = rollouts(lambda record, text: float(len(text)))
    batches = [source(policy()) for _ in range(3)]
    assert source.position == 3 and not np.array_equal(batches[0]["tokens"], batches[2]["tokens"])
    other = rollouts(lambda record, text: float(len(text)))
    other.position = 2
    again = other(policy())
    assert again.keys() == batches[2].keys()
    for name, column in again.items():
        np.testing.assert_array_equal(column, batches[2][name])
    # Four batches of two prompts later the same prompts come again, and with them other noise.
    other.position = 4
    assert not np.array_equal(other(policy())["tokens"], batches[0]["tokens"])


def test_equal_rewards_teach_nothing():
    batch = rollouts(lambda record, text: 0.7)(policy())
    assert not batch["advantages"].any() and not batch["group_std"].any()


@pytest.mark.parametrize("group", [1, 3])
def test_a_group_must_have_siblings_and_fill_the_batch(group):
    with pytest.raises(UserError, match="rollouts.group"):
        rollouts(lambda record, text: 0.0, group=group)


# ---------------------------------------------------------------------------------------- The gradient's expectation


def tabular(params, batch):
    """A policy with a table: the logits of the first token after the prompt, and of the second given the first."""
    where = batch["positions"]
    rows = jnp.where(where == 0, 0, 1 + batch["tokens"])
    return Output(params["table"][rows], Head(jnp.eye(3)))


def test_reinforce_is_the_gradient_of_the_expected_return_by_enumeration():
    """Three tokens, two places, groups of two: all 81 pairs of completions, each with its probability."""
    rng = np.random.default_rng(3)
    params = {"table": jnp.asarray(rng.normal(size=(4, 3)), jnp.float32)}
    returns = jnp.asarray(rng.normal(size=(3, 3)), jnp.float32)
    outcomes = np.array(list(itertools.product(range(3), repeat=2)))

    def chances(params):
        table = jax.nn.softmax(params["table"])
        return table[0, outcomes[:, 0]] * table[1 + outcomes[:, 0], outcomes[:, 1]]

    def expected_return(params):
        return jnp.sum(chances(params) * returns[outcomes[:, 0], outcomes[:, 1]])

    pairs = np.array(list(itertools.product(range(9), repeat=2)))
    first = np.asarray(chances(params), np.float64)
    weight = first[pairs[:, 0]] * first[pairs[:, 1]]
    rewards = np.asarray(returns)[outcomes[pairs][..., 0], outcomes[pairs][..., 1]]
    advantages = leave_one_out(rewards)

    @jax.jit
    def estimate(tokens, advantages):
        columns = {
            "tokens": jnp.pad(tokens, ((0, 0), (1, 0))),  # the prompt is one token
            "positions": jnp.broadcast_to(jnp.arange(3), (2, 3)),
            "segments": jnp.ones((2, 3), jnp.int32),
            "mask": jnp.broadcast_to(jnp.arange(3) > 0, (2, 3)),
            "old_logps": jnp.zeros((2, 3)),
            "advantages": jnp.broadcast_to(advantages[:, None], (2, 3)),
            "temperature": jnp.float32(1.0),
        }
        return gradients(tabular, reinforce, params, {"table": None}, columns, jax.random.PRNGKey(0))[1]["table"]

    each = np.stack([estimate(outcomes[pair], a) for pair, a in zip(pairs, advantages, strict=True)]).astype(np.float64)
    exact = jax.grad(expected_return)(params)["table"]
    assert np.abs(exact).max() > 0.05
    # 1e-6: the rounding of float32 gradients of size one; their average over 81 pairs is taken in float64.
    np.testing.assert_allclose(-np.einsum("p,pij->ij", weight, each), exact, atol=1e-6)
