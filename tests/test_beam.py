"""Beam search against all completions that there are, and against the search that transformers defines, written plainly.

What a completion's log-probability is, the training forward says in both.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sampler_cases as cases
from sampler_cases import MODEL, STOP, WINDOW, sampled

import jaxpost
from jaxpost import sharding
from jaxpost.errors import UserError
from jaxpost.models.heads import logits
from jaxpost.sampling import beam, processors
from jaxpost.tasks import arithmetic

VOCAB, SIZE = 17, 16


@functools.partial(jax.jit, static_argnums=0)
def _next(model, params, tokens, length):
    place = jnp.arange(SIZE)[None]
    inside = place < length[:, None]
    out = model.forward(
        params, {"tokens": tokens, "segments": inside.astype(jnp.int32), "positions": jnp.where(inside, place, 0)}
    )
    return jax.nn.log_softmax(logits(out.hidden[jnp.arange(len(tokens)), length - 1], out.head))


@functools.cache
def following(prompt: tuple, sequences: tuple) -> np.ndarray:
    """[n,V]: the training forward's log-probabilities of what follows the prompt and each sequence, all of one length."""
    rows = np.zeros((1 << max(len(sequences) - 1, 0).bit_length(), SIZE), np.int32)
    for row, own in zip(rows, sequences, strict=False):
        row[: len(prompt) + len(own)] = [*prompt, *own]
    lengths = np.full(len(rows), len(prompt) + len(sequences[0]))
    return np.asarray(_next(MODEL, cases.weights(), rows, lengths), np.float64)[: len(sequences)]


def searched(beams: int, *, sizes=(1, 1, 1), window=WINDOW, **changes) -> beam.Completed:
    (model, params, prompts), options = cases.asked(sizes=sizes)
    options = {"mesh": options["mesh"], "prompt_window": window, "new": 3, "stop": (STOP,), **changes}
    return beam.search(model, params, prompts, beams=beams, **options)


def everything(prompt: tuple, new: int, stop: int) -> dict[tuple, float]:
    """{completion: its log-probability}, of all that end or have `new` tokens."""
    complete, going = {}, {(): 0.0}
    for _ in range(new):
        sequences = tuple(going)
        logps = following(prompt, sequences)
        extended = {(*own, x): going[own] + row[x] for own, row in zip(sequences, logps, strict=True) for x in range(VOCAB)}
        complete |= {own: logp for own, logp in extended.items() if own[-1] == stop}
        going = {own: logp for own, logp in extended.items() if own[-1] != stop}
    return complete | going


def assert_best(completed: beam.Completed, i: int, wanted: list[tuple[float, float, tuple]]):
    """wanted: (score, log-probability, completion) of a prompt, the best first."""
    rows = zip(completed.tokens[i], completed.lengths[i], strict=True)
    scores = [score for score, _, _ in wanted]
    np.testing.assert_allclose(completed.scores[i][: len(wanted)], scores, atol=5e-5)
    np.testing.assert_allclose(completed.logps[i][: len(wanted)], [logp for _, logp, _ in wanted], atol=2e-4)
    for n, (row, length) in enumerate(rows):
        near = [own for score, _, own in wanted if n < len(wanted) and abs(score - scores[n]) < 1e-4]  # equal to rounding
        assert n >= len(wanted) or tuple(row[:length].tolist()) in near
        assert not row[length:].any()


@pytest.mark.parametrize("penalty", [1.0, 0.0, 2.0, -1.0])
def test_a_search_wide_enough_gives_the_best_of_all_completions(penalty):
    completed = searched(300, length_penalty=penalty)
    assert np.isfinite(completed.scores).all() and completed.tokens.shape == (cases.COUNT, 300, 3)
    for i, prompt in enumerate(cases.prompts()):
        all_of_them = everything(tuple(prompt.tolist()), 3, STOP)
        ordered = sorted(((logp / len(own) ** penalty, logp, own) for own, logp in all_of_them.items()), reverse=True)
        assert_best(completed, i, ordered[:300])
    np.testing.assert_array_equal(
        completed.stopped, np.take_along_axis(completed.tokens, completed.lengths[..., None] - 1, 2)[..., 0] == STOP
    )


def plain_search(prompt: tuple, beams: int, new: int, stop: int, penalty: float) -> list[tuple[float, float, tuple]]:
    """Beam search as transformers has it, without an early end: (score, log-probability, completion), the best first."""
    running, complete = [(0.0, ())], []
    for count in range(1, new + 1):
        logps = following(prompt, tuple(own for _, own in running))
        candidates = [(logp + row[x], (*own, x)) for (logp, own), row in zip(running, logps, strict=True) for x in range(VOCAB)]
        running = []
        for rank, (logp, own) in enumerate(sorted(candidates, reverse=True)[: 2 * beams]):
            if own[-1] == stop and rank < beams:
                complete.append((logp / count**penalty, logp, own))
            elif own[-1] != stop and len(running) < beams:
                running.append((logp, own))
    complete += [(logp / new**penalty, logp, own) for logp, own in running]
    return sorted(complete, reverse=True)[:beams]


@pytest.mark.parametrize("beams, penalty", [(1, 1.0), (3, 1.0), (3, 0.0), (3, -1.0), (4, 2.0)])
def test_a_narrow_search_is_that_of_transformers(beams, penalty):
    completed = searched(beams, new=8, length_penalty=penalty)
    for i, prompt in enumerate(cases.prompts()):
        assert_best(completed, i, plain_search(tuple(prompt.tolist()), beams, 8, STOP, penalty))


def test_one_beam_is_the_greedy_completion():
    completed, greedy = searched(1, new=8), sampled(group=1, temperature=0.0, new=8)
    np.testing.assert_array_equal(completed.tokens[:, 0], greedy.tokens)
    np.testing.assert_array_equal(completed.lengths[:, 0], greedy.lengths)
    np.testing.assert_allclose(completed.logps[:, 0], greedy.logps.sum(1), atol=5e-5)


@pytest.mark.parametrize("changes", [{"sizes": (2, 2, 2)}, {"window": WINDOW + 3}], ids=["devices", "padding"])
def test_neither_devices_nor_padding_change_what_is_best(changes):
    one, other = searched(3, new=8), searched(3, new=8, **changes)
    np.testing.assert_allclose(one.scores, other.scores, atol=5e-5)
    np.testing.assert_array_equal(one.tokens, other.tokens)


def test_a_search_keeps_to_its_processors_and_scores_are_the_models_own():
    titles = [[5, 6], [5, 6, 7], [9], [16, 4, 4, 4]]
    about = processors.About(None, (STOP,), VOCAB, 8)
    chain = processors.chain([{"name": "constrained.trie", "texts": titles}], about, "p")
    completed = searched(6, new=8, chain=chain)
    for i, prompt in enumerate(cases.prompts()):
        wanted = []
        for own in titles:
            ids = (*own, STOP)
            logps = [following(tuple(prompt.tolist()), (ids[:n],))[0, ids[n]] for n in range(len(ids))]
            wanted.append((sum(logps) / len(ids), sum(logps), ids))
        assert_best(completed, i, sorted(wanted, reverse=True))
    assert np.isneginf(completed.scores[:, 4:]).all()  # there are no more


def test_a_models_generate_searches():
    fields = {"model_type": "llama", "vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    fields |= {"num_attention_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.5}
    loaded = jaxpost.load(fields, mesh=sharding.make_mesh(devices=jax.devices()[:1]))
    model = dataclasses.replace(loaded, tokenizer=arithmetic.tokenizer())
    sums = ["46", "4", "123", "99"]
    trie = {"name": "constrained.trie", "texts": sums}
    best = model.generate(["12+34", "7x8"], new=6, beams=4, n=4, processors=[trie])
    assert sorted(best[:4]) == sorted(best[4:]) == sorted(sums)
    assert model.generate(["12+34", "7x8"], new=6, beams=4, processors=[trie]) == [best[0], best[4]]
    drawn = model.generate("12+34", new=6, n=20, temperature=2.0, processors=trie)
    assert set(drawn) <= set(sums) and len(set(drawn)) > 2
    for options, message in (
        ({"beams": 2, "n": 3}, "beams=2 with temperature=0.0 and n=3"),
        ({"beams": 2, "temperature": 1.0}, "beams=2 with temperature=1.0"),
        ({"length_penalty": 2.0}, "length_penalty=2.0 is of a beam search"),
        ({"beams": 0}, "beams=0: give n and beams of at least 1"),
        ({"beams": 4, "n": 4, "processors": {**trie, "texts": ["46", "123", "99"]}}, "n=4: the search has 3 completions"),
    ):
        with pytest.raises(UserError, match=message):
            model.generate("12+34", new=6, **options)
