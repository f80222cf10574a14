"""Several samples of a problem: each figure against its closed form and the mean over all subsets, and the way to them."""

import collections
import itertools
import math
import types
from fractions import Fraction

import numpy as np
import pytest
import sampler_cases

from jaxpost.errors import UserError
from jaxpost.evals import accuracy, pass_at_k
from jaxpost.sampling import decode
from jaxpost.sampling.decode import Completions
from jaxpost.tasks import arithmetic

TEXT = arithmetic.tokenizer()


def subsets(n, k):
    return list(itertools.combinations(range(n), k))


def voted(verdicts, given):
    """The verdict of the first among these samples' answers, the mean of those that tie."""
    votes = collections.Counter(a for a in given if a is not None)
    if not votes:
        return 0.0
    firsts = [a for a, count in votes.items() if count == max(votes.values())]
    return np.mean([verdicts[a] for a in firsts])


@pytest.mark.parametrize(("n", "c", "k", "expected"), [(10, 3, 1, 0.3), (10, 3, 5, 11 / 12), (10, 0, 4, 0.0), (10, 8, 3, 1.0)])
def test_pass_at_k_in_closed_form(n, c, k, expected):
    verdicts = np.arange(n)[None] < c
    assert pass_at_k.best(verdicts, k) == pytest.approx([expected], abs=1e-15)


def test_pass_at_k_stays_exact_where_the_binomials_are_beyond_a_float():
    n, c = 2000, 7
    for k in (1, 64, 1000, 1990, 2000):
        exact = 1 - Fraction(math.comb(n - c, k), math.comb(n, k))
        assert pass_at_k.best(np.arange(n)[None] < c, k)[0] == pytest.approx(float(exact), rel=1e-12)


@pytest.mark.parametrize("k", [1, 2, 4, 6])
def test_the_best_of_k_is_the_mean_over_all_subsets(k):
    values = np.random.RandomState(0).normal(size=(5, 6))
    expected = [np.mean([row[list(chosen)].max() for chosen in subsets(6, k)]) for row in values]
    assert pass_at_k.best(values, k) == pytest.approx(expected, abs=1e-14)


@pytest.mark.parametrize("k", [1, 2, 3, 5, 7])
def test_the_majority_of_k_is_the_mean_over_all_subsets_and_ties(k):
    draw = np.random.RandomState(1)
    given = [[[None, "a", "b", "c", "d"][i] for i in draw.randint(0, 5, 7)] for _ in range(12)]
    given += [[None] * 7, ["a"] * 7, ["b"] * 7]
    worth = {"a": 1.0, "b": 0.0, "c": 0.25, "d": 0.0}  # c: a reward that is no verdict
    verdicts = np.array([[worth.get(a, 0.0) for a in row] for row in given])
    expected = [np.mean([voted(worth, [row[i] for i in chosen]) for chosen in subsets(7, k)]) for row in given]
    assert pass_at_k.majority(verdicts, given, k) == pytest.approx(expected, abs=1e-14)


def test_one_answer_that_is_judged_both_ways_counts_as_its_mean():
    assert pass_at_k.majority([[1, 0, 0]], [["a", "a", "b"]], 3) == pytest.approx([0.5])


def test_a_silent_sample_has_no_vote_even_where_it_was_judged_right():
    assert pass_at_k.majority([[1, 1, 0]], [[None, None, "b"]], 3).tolist() == [0.0]


def test_figures_have_the_interval_over_problems():
    verdicts = np.array([[1, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]], bool)
    given = [["a", "a", "b", "c"], ["a", "b", "b", "c"], ["b", "b", "c", "c"]]
    figures = dict(pass_at_k.figures(verdicts, given, ks=(1, 4)))
    each = {
        "mean@4": [0.5, 0.25, 0],
        "pass@1": [0.5, 0.25, 0],
        "pass@4": [1, 1, 0],
        "maj@1": [0.5, 0.25, 0],
        "maj@4": [1, 0, 0],
    }
    assert list(figures) == [name + end for name in each for end in ("", "_low", "_high")]
    for name, values in each.items():
        half = 1.96 * np.std(values, ddof=1) / math.sqrt(3)
        expected = [np.mean(values), np.mean(values) - half, np.mean(values) + half]
        assert [figures[name + end] for end in ("", "_low", "_high")] == pytest.approx(expected, abs=1e-14), name


def test_weights_weigh_problems_and_a_problem_twice_is_not_two():
    figures = dict(pass_at_k.figures([[1.0], [0.0], [0.0]], weights=[2, 1, 1], name="best"))
    # By hand: deviations .5, -.5, -.5 times 2, 1, 1; the root of 3/2 * (1 + 1/4 + 1/4), over 4.
    assert figures["best@1"] == 0.5 and figures["best@1_high"] == pytest.approx(0.5 + 1.96 * 1.5 / 4, abs=1e-14)
    assert dict(pass_at_k.figures([[1.0, 0.0]])) == {"mean@2": 0.5, "pass@1": 0.5}


MODEL = types.SimpleNamespace(transformer=sampler_cases.MODEL, params={"layers": ()}, tokenizer=TEXT, mesh=None)


def answering(calls):
    """A stand-in for `complete`: completion i of all answers its own number modulo 4, and every third one is not stopped."""

    def complete(
        model, params, prompts, *, mesh, tokenizer, prompt_window, new, stop, group, slots, have, number, chain=(), **noise
    ):
        calls.append((len(prompts), slots, number, tuple(sorted(noise.items())), stop))
        count = group * len(prompts)
        tokens, text_lengths, stopped = np.zeros((count, new), np.int32), np.zeros(count, int), np.zeros(count, bool)
        for i in sorted(set(range(count)) - have):
            stopped[i] = (i + number) % 3
            reply = TEXT(str((i + number) % 4) + "<|end|>" * bool(stopped[i]), add_special_tokens=False)["input_ids"]
            tokens[i, : len(reply)], text_lengths[i] = reply, 1
        assert len(set(range(count)) - have) == 6 * min(len(prompts), 3 - number // 6)  # nothing is made in vain
        there = [i for i in range(count) if i not in have]
        return Completions(*(x[there] for x in (tokens, text_lengths + stopped, np.zeros(tokens.shape), stopped, text_lengths)))

    return complete


RECORDS = [{"prompt": "1+1", "answer": "2", "weight": 3.0}, {"prompt": "1+2", "answer": "3"}, {"prompt": "4+4", "answer": "3"}]


@pytest.mark.parametrize("rows", [1, 2, 5])
def test_samples_are_judged_each_by_its_own_record(monkeypatch, rows):
    calls = []
    monkeypatch.setattr(decode, "complete", answering(calls))
    options = {"prompt_window": 6, "new": 2, "template": None}

    def right(record, completion) -> bool:
        return completion == record["answer"] and record["stopped"]

    def score(record, completion):
        return float(right(record, completion))

    run = {"n": 6, "rows": rows, "options": options, "ks": (1, 3), "seed": 5, "step": 2}
    figures = dict(accuracy.sampled(MODEL, RECORDS, {"right": (right, 1.0)}, **run, extract=str.strip))
    table = figures.pop("samples")
    assert [row["completion"] for row in table] == [str(i % 4) for i in range(18)]
    assert [row["stopped"] for row in table] == [bool(i % 3) for i in range(18)]
    # Right are 2 of the first problem (0 to 5) and 7, 11 of the second (6 to 11); 15 of the third would be, but was cut off.
    assert [i for i, row in enumerate(table) if row["reward"]] == [2, 7, 11]
    judged = {"extracted": "3", "stopped": True, "reward": 1.0}
    assert table[7] == {"problem": 1, "prompt": "1+2", "completion": "3", "answer": "3", **judged}
    assert figures["mean@6"] == pytest.approx((3 * 1 / 6 + 2 / 6) / 5)
    assert figures["pass@3"] == pytest.approx((3 * 1 / 2 + (1 - 4 / 20)) / 5)  # one of six right: 1 - C(5,3)/C(6,3)
    assert figures["maj@1"] == pytest.approx(figures["mean@6"])
    # One shape whatever is left over, and a noise that belongs to the completion and not to the part it is drawn in.
    size = min(rows, 3)
    assert [call[:3] for call in calls] == [(size, size, 6 * first) for first in range(0, 3, size)]
    assert {call[3:] for call in calls} == {((("seed", 5), ("step", 2), ("temperature", 1.0)), (3,))}
    run["options"] = {**options, "stop": (7, 9)}
    plain = dict(accuracy.sampled(MODEL, RECORDS, {"score": (score, 1.0)}, **run))
    assert calls[-1][-1] == (7, 9) and "extracted" not in plain["samples"][0]
    assert plain["best@3"] == figures["pass@3"] and not {"pass@3", "maj@3"} & plain.keys()


@pytest.mark.parametrize("k", [0, 7])
def test_a_k_that_cannot_be_taken_is_refused_before_anything_is_sampled(monkeypatch, k):
    monkeypatch.setattr(decode, "complete", None)
    with pytest.raises(UserError, match=f"k={k}: of 6 samples"):
        next(accuracy.sampled(MODEL, RECORDS, {}, n=6, rows=4, options={}, ks=(1, k)))
    with pytest.raises(UserError, match=f"k={k}"):
        pass_at_k.best(np.zeros((1, 6)), k)
    with pytest.raises(UserError, match=f"k={k}"):
        pass_at_k.majority(np.zeros((1, 6)), [["a"] * 6], k)


def test_a_problem_with_a_sample_that_no_reward_applies_to_is_in_no_figure():
    rewards = np.array([[1.0, 0.0], [np.nan, 1.0]])
    values = dict(pass_at_k.figures_of_whole(rewards, [["a", "b"], ["a", "a"]], ks=(1,), weights=[1.0, 5.0], name="pass"))
    assert values["mean@2"] == 0.5 and values["left_out"] == 1
    with pytest.raises(UserError, match="None for some sample of every problem"):
        dict(pass_at_k.figures_of_whole(rewards[1:], None, ks=(1,), weights=[1.0], name="pass"))
