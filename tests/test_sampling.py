"""Drawing tokens: what is drawn has the probability that is recorded, and nothing else has a say in it.

The draw is held to the distribution by enumeration, the noise to (seed, step, number) alone. What completions are is here, too:
where they end, what of them is an answer, and what cannot be completed. That the numbers are the trainer's, however the device
goes about it, is shown in test_decode.py.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sampler_cases as cases
from sampler_cases import COUNT, GROUP, NEW, STOP, WINDOW, sampled
from toy_tokenizers import byte_pairs, characters

from jaxpost.errors import UserError
from jaxpost.sampling.decode import Completions, Finished, answers, together
from jaxpost.sampling.slots import draw
from jaxpost.sampling.text import continuation
from jaxpost.tasks import arithmetic

# ------------------------------------------------------------------------------------------------------------- draw


def test_draw_gives_each_token_its_share_of_a_uniform_grid():
    probs = np.array([0.5, 0.0, 0.125, 0.25, 0.0, 0.125])
    grid = jnp.arange(64) / 64
    with np.errstate(divide="ignore"):
        scores = jnp.broadcast_to(jnp.log(probs), (64, 6))
    token, logp = draw(scores, grid, True)
    # Shares of 1/64 are exact in float32 and the grid begins each of them, so the counts are exact too.
    np.testing.assert_array_equal(np.bincount(token, minlength=6), probs * 64)
    np.testing.assert_allclose(np.exp(logp), probs[token], rtol=1e-6)  # the rounding of one log and one exp


def test_what_is_not_sampled_is_the_mode():
    scores = jnp.log(jnp.array([[0.2, 0.7, 0.1], [0.6, 0.1, 0.3]]))
    token, logp = draw(scores, jnp.array([0.01, 0.99]), False)
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
    token, logp = draw(jnp.broadcast_to(scores, (len(aimed), 32000)), jnp.asarray(aimed, jnp.float32), True)
    assert np.isfinite(scores[np.asarray(token)]).all() and np.isfinite(logp).all()


# ------------------------------------------------------------------------------------------------------ Completions


def own(found):
    """Each completion's tokens."""
    return [tuple(row[:n].tolist()) for row, n in zip(found.tokens, found.lengths, strict=True)]


def test_noise_belongs_to_seed_step_and_number():
    one = [cases.prompts()[2]] * COUNT
    base = own(sampled(one, stop=(), seed=1, step=2))
    assert base == own(sampled(one, stop=(), seed=1, step=2)) and len(set(base)) == len(base)
    for other in ({"seed": 2, "step": 2}, {"seed": 1, "step": 3}, {"seed": 2, "step": 1}):
        assert sum(a == b for a, b in zip(base, own(sampled(one, stop=(), **other)), strict=True)) <= 1
    later = own(sampled(one, stop=(), seed=1, step=2, number=4))
    assert later[:-4] == base[4:] and later[-4:] != base[:4]


def test_every_sample_is_by_its_own_number():
    """Each token of each completion is the one whose share of [0,1) has the completion's number for that place."""
    found = sampled(temperature=2.0)
    assert cases.gaps(found, found) == []
    scores = cases.judged(found) / 2
    chances = np.exp(scores) / np.exp(scores).sum(axis=-1, keepdims=True)
    ends = np.take_along_axis(np.cumsum(chances, axis=-1), found.tokens[..., None], axis=-1)[..., 0]
    begins = ends - np.take_along_axis(chances, found.tokens[..., None], axis=-1)[..., 0]
    numbers, places = np.nonzero(np.arange(NEW) < found.lengths[:, None])
    uniform = cases.uniforms(numbers, places)
    # 1e-5: float32's rounding of sums of 17 probabilities, by two programs.
    assert (begins[numbers, places] - 1e-5 < uniform).all() and (uniform < ends[numbers, places] + 1e-5).all()
    assert len(np.unique(uniform)) == len(uniform) and uniform.min() >= 0


def test_the_stop_token_is_part_of_the_completion_and_the_limit_is_no_stop():
    found = sampled()
    assert 0 < found.stopped.sum() < COUNT * GROUP
    for row, tokens, stopped, said in zip(found.tokens, own(found), found.stopped, found.text_lengths, strict=True):
        assert (tokens.index(STOP) == len(tokens) - 1) if stopped else (STOP not in tokens and len(tokens) == NEW)
        assert said == len(tokens) - stopped and not row[len(tokens) :].any()
    tokenizer = arithmetic.tokenizer()
    wanted = [tokenizer.decode(t[:-1] if s else t) for t, s in zip(own(found), found.stopped, strict=True)]
    assert answers(found, tokenizer) == wanted


def test_greedy_says_what_the_forward_finds_likeliest():
    found = sampled(temperature=0.0)
    scores = cases.judged(found)
    for tokens, every in zip(own(found), scores, strict=True):
        assert tokens == tuple(every[: len(tokens)].argmax(axis=-1))
    np.testing.assert_allclose(found.logps, cases.logps(scores, found), atol=5e-5)
    assert own(found)[::GROUP] == own(found)[1::GROUP] and len(set(own(found))) == COUNT


def test_every_token_a_stop_and_none():
    """With every token a stop each completion is one token long; with none of them all go to the limit."""
    for slots in (0, 2):
        found = sampled(stop=tuple(range(17)), slots=slots)
        assert (found.lengths == 1).all() and found.stopped.all() and not found.text_lengths.any()
        found = sampled(stop=(), slots=slots)
        assert (found.lengths == NEW).all() and not found.stopped.any()


def test_an_answer_is_judged_and_shown_as_it_was_written():
    """Some tokenizers tidy up what they decode, and a verifier would judge what the model did not say."""
    tokenizer = characters(adds_bos=False)
    tokenizer.clean_up_tokenization_spaces = True
    ids = np.array(tokenizer("a . b ?")["input_ids"])
    assert tokenizer.decode(ids) == "a. b?"
    found = Completions(ids[None, 1:], np.array([6]), np.zeros((1, 6)), np.array([False]), np.array([6]))
    assert answers(found, tokenizer) == [" . b ?"] == [continuation(tokenizer, ids[:1], ids[1:])]
    # A prompt may end within a letter of several bytes: the completion then stands by itself.
    ids = np.array(byte_pairs()("é .")["input_ids"])
    assert continuation(byte_pairs(), ids[:1], ids[1:]) == "\N{REPLACEMENT CHARACTER} ."


def test_completions_one_by_one_are_put_together():
    """None of them is a batch, too: a run may be killed before the first has ended."""
    ids, logps = np.array([4, 5], np.int32), np.array([-1, -2], np.float32)
    found = together([Finished(7, ids, logps, True, 1), Finished(9, ids[:1], logps[:1], False, 1)], 3)
    np.testing.assert_array_equal(found.tokens, [[4, 5, 0], [4, 0, 0]])
    np.testing.assert_array_equal(found.logps, [[-1, -2, 0], [-1, 0, 0]])
    assert (found.lengths.tolist(), found.stopped.tolist(), found.text_lengths.tolist()) == ([2, 1], [True, False], [1, 1])
    none = together([], 3)
    assert (none.tokens.shape, none.logps.shape, none.lengths.shape) == ((0, 3), (0, 3), (0,))


@pytest.mark.parametrize("length", [0, WINDOW + 1])
def test_a_prompt_that_does_not_fit_is_refused(length):
    with pytest.raises(UserError, match=rf"{length} tokens; the prompt window takes 1 to {WINDOW}"):
        sampled([np.zeros(length, np.int32)])
