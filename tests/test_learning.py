"""From judged completions to columns, by hand: where tokens lie, what each step makes of a batch, who is learned from."""

import copy
import functools
import inspect
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from jaxpost.rollouts import advantages, layout, steps
from jaxpost.rollouts.batch import RolloutBatch, figures, rows
from jaxpost.rollouts.scores import gathered
from jaxpost.rollouts.scoring import Scorer
from jaxpost.sampling.decode import Completions

PROMPTS = [np.array([11, 12, 13]), np.array([21])]  # the second of a single token
LENGTHS = np.array([2, 1, 0, 3])  # and its first completion is empty


def laid_out(together: int, shared: bool) -> layout.Layout:
    return layout.laid_out(PROMPTS, LENGTHS, together, prompt_window=4, new=3, shared=shared)


def columns(where: layout.Layout) -> dict:
    """All columns with the completions' tokens filled in: 100 b + n for token n of completion b."""
    values = 100 * (1 + np.arange(4))[:, None] + np.arange(3)
    return where.columns | {"tokens": where.columns["tokens"] + where.spread(values.astype(np.int32))}


def test_a_completion_behind_its_prompt():
    found = columns(laid_out(1, False))
    assert layout.length(4, 3, 1, False) == 7
    np.testing.assert_array_equal(
        found["tokens"],
        [[11, 12, 13, 100, 101, 0, 0], [11, 12, 13, 200, 0, 0, 0], [21, 0, 0, 0, 0, 0, 0], [21, 400, 401, 402, 0, 0, 0]],
    )
    real = np.array([[5], [4], [1], [4]]) > np.arange(7)
    np.testing.assert_array_equal(found["segments"], real.astype(int))
    np.testing.assert_array_equal(found["positions"], np.where(real, np.arange(7), 0))
    np.testing.assert_array_equal(found["mask"], real & (np.arange(7) >= np.array([[3], [3], [1], [1]])))
    assert found.keys() == {"tokens", "segments", "positions", "mask"} and found["mask"].dtype == bool


def test_a_prompt_once_with_branches_behind_it():
    found = columns(laid_out(2, True))
    assert layout.length(4, 3, 2, True) == 11
    np.testing.assert_array_equal(found["tokens"][0], [11, 12, 13, 100, 101, 13, 200, 0, 0, 0, 0])
    np.testing.assert_array_equal(found["segments"][0], [1, 1, 1, 1, 1, 2, 2, 0, 0, 0, 0])
    np.testing.assert_array_equal(found["branches"][0], [0, 0, 1, 1, 1, 2, 2, 0, 0, 0, 0])
    np.testing.assert_array_equal(found["positions"][0], [0, 1, 2, 3, 4, 2, 3, 0, 0, 0, 0])
    np.testing.assert_array_equal(found["mask"][0], np.isin(np.arange(11), (3, 4, 6)))
    # Of a prompt of one token nothing comes once: each branch begins with it.
    np.testing.assert_array_equal(found["tokens"][1], [21, 21, 400, 401, 402, 0, 0, 0, 0, 0, 0])
    np.testing.assert_array_equal(found["segments"][1], [1, 2, 2, 2, 2, 0, 0, 0, 0, 0, 0])
    np.testing.assert_array_equal(found["branches"][1], found["segments"][1])
    np.testing.assert_array_equal(found["positions"][1], [0, 0, 1, 2, 3, 0, 0, 0, 0, 0, 0])


def test_two_documents_of_a_row_without_a_shared_prefix():
    found = columns(laid_out(2, False))
    assert layout.length(4, 3, 2, False) == 14 and "branches" not in found
    np.testing.assert_array_equal(found["tokens"][0], [11, 12, 13, 100, 101, 11, 12, 13, 200, 0, 0, 0, 0, 0])
    np.testing.assert_array_equal(found["segments"][0], [1] * 5 + [2] * 4 + [0] * 5)
    np.testing.assert_array_equal(found["positions"][0], [0, 1, 2, 3, 4, 0, 1, 2, 3, 0, 0, 0, 0, 0])
    np.testing.assert_array_equal(found["mask"][0], np.isin(np.arange(14), (3, 4, 8)))


@pytest.mark.parametrize(("together", "shared"), [(1, False), (2, True), (2, False)])
def test_what_is_spread_is_collected_again(together, shared):
    where = laid_out(together, shared)
    values = np.arange(1, 13, dtype=np.float32).reshape(4, 3)
    real = np.arange(3) < LENGTHS[:, None]
    column = where.spread(values)
    np.testing.assert_array_equal(where.collect(column), np.where(real, values, 0))
    np.testing.assert_array_equal(column != 0, where.columns["mask"])
    np.testing.assert_array_equal(where.collect(where.spread(values[:, :1])), np.where(real, values[:, :1], 0))
    states = np.stack([values, -values], axis=-1)
    np.testing.assert_array_equal(where.collect(where.spread(states)), np.where(real[..., None], states, 0))


# --------------------------------------------------------------------------------------------------------------- Steps


def completions(lengths, stopped, new: int = 3) -> Completions:
    zeros = np.zeros((len(lengths), new), np.float32)
    return Completions(zeros.astype(np.int32), np.array(lengths), zeros, np.array(stopped), np.array(lengths))


def judged(rewards: dict, count: int):
    """Scores of {name: (what it gives each completion, weight)}, by the scorer itself."""
    asked = {k: (lambda record, text, values=values: values[record["at"]], weight) for k, (values, weight) in rewards.items()}
    scorer = Scorer(asked)
    for i in range(count):
        scorer.submit(i, {"at": i}, "")
    return gathered(scorer, count)


def drawn(scores, completed=None, columns=None) -> RolloutBatch:
    """A batch of two prompts' completions."""
    completed = completions(LENGTHS, [True] * 4) if completed is None else completed
    kept = np.ones(len(completed.lengths), bool)
    return RolloutBatch(PROMPTS, [{}, {}], np.arange(2), completed, scores, kept, kept, columns or {})


def centred(batch: RolloutBatch) -> RolloutBatch:
    return steps.advantages(batch, of=advantages.centred)


def learned(batch: RolloutBatch, where: layout.Layout, pairs: bool = False) -> dict:
    return rows(batch, where, pairs=pairs, gives=False)


def test_the_punishment_for_length_is_in_tokens():
    assert steps.punished(np.array([0, 80, 90, 100]), 100, 20).tolist() == [0, 0, -0.5, -1]
    assert steps.punished(np.array([80, 100]), 100, 0).tolist() == [0, 0]


def test_rewards_as_they_are_learned_from():
    batch = drawn(judged({"right": ([1, 0, 1, 1], 2.0)}, 4), completions([1, 2, 3, 3], [True, True, True, False]))
    shaped = steps.truncated(steps.overlong(batch, soft=2), reward=-0.25)
    assert shaped.rewards.tolist() == [2, -0.5, 1, 0.75] and shaped.scores.totals.tolist() == [2, 0, 2, 2]
    assert shaped.replace(rewards=-shaped.rewards).rewards.tolist() == [-2, 0.5, -1, -0.75]  # a step of one's own


def test_rewards_are_weighed_and_each_is_a_figure():
    rewards = {"right": ([1, 0, None, None], 2.0), "form": ([0.5, None, None, 1], 0.5), "long": ([3, 4, 5, 6], 0.0)}
    scores, where = judged(rewards, 4), laid_out(1, False)
    np.testing.assert_array_equal(scores.totals, [2.25, 0, np.nan, 0.5])
    batch = centred(drawn(scores))
    measured, own = figures(batch), where.collect(learned(batch, where)["advantages"])
    assert measured["reward"] == pytest.approx(2.75 / 3) and measured["completions/judged_ratio"] == 0.75
    assert measured["rewards/right/mean"] == 0.5 and measured["rewards/right/std"] == 0.5
    assert measured["rewards/form/mean"] == 0.75 and measured["rewards/long/mean"] == 4.5
    assert measured["reward_std"] == pytest.approx(2.25 / np.sqrt(2) / 2)  # the second group has one reward
    assert measured["frac_reward_zero_std"] == 0.5
    np.testing.assert_array_equal(own, np.where(where.real, [[1.125], [-1.125], [0], [0]], 0))


def test_a_reward_that_says_nothing_to_anybody_is_no_figure():
    measured = figures(drawn(judged({"a": ([1, 0, 1, 0], 1.0), "b": ([None] * 4, 1.0)}, 4)))
    assert "rewards/a/mean" in measured and "rewards/b/mean" not in measured


@pytest.mark.parametrize("shared", [False, True])
def test_level_groups_are_dropped_and_truncated_completions_masked(shared):
    where = laid_out(2 if shared else 1, shared)
    batch = centred(drawn(judged({"right": ([1, 0, 1, 1], 1.0)}, 4), completions(LENGTHS, [True, False, True, True])))
    plain = learned(batch, where)
    np.testing.assert_array_equal(plain["mask"], where.columns["mask"])
    cut = steps.mask_truncated(batch)
    masked = learned(cut, where)
    assert where.collect(masked["mask"]).any(1).tolist() == [True, False, False, True]
    assert cut.figures["completions/learned_ratio"] == 0.75 and figures(cut)["completions/clipped_ratio"] == 0.25
    np.testing.assert_array_equal(masked["segments"], plain["segments"])
    level = steps.drop_level(batch)
    dropped = learned(level, where)
    assert where.collect(dropped["mask"]).any(1).tolist() == [True, True, False, False]
    assert level.figures["completions/learned_ratio"] == 0.5 == figures(level)["frac_reward_zero_std"]
    # A group that is dropped is padding: no denominator counts it, that of the number of completions neither.
    kept = len(plain["segments"]) // 2
    np.testing.assert_array_equal(dropped["segments"][:kept], plain["segments"][:kept])
    assert not dropped["segments"][kept:].any() and plain["segments"][kept:].any()


def test_advantages_of_tokens_lie_where_their_tokens_do():
    where = laid_out(2, True)

    def told(rewards, tokens):
        assert tokens.keys() == {"mask", "tasks", "old_logps", "values"} and tokens["mask"].tolist() == where.real.tolist()
        return {"advantages": tokens["old_logps"] * 10, "returns": tokens["values"] + 1}

    old = np.where(where.real, np.arange(12).reshape(4, 3) + 1.0, 0)
    completed = completions(LENGTHS, [True] * 4)._replace(logps=old)
    batch = drawn(judged({"right": ([1, 0, 1, 1], 1.0)}, 4), completed, {"values": old * 2})
    columns = learned(steps.advantages(batch, of=told), where)
    np.testing.assert_array_equal(where.collect(columns["advantages"]), 10 * old)
    np.testing.assert_array_equal(where.collect(columns["returns"]), np.where(where.real, 2 * old + 1, 0))


def every_step() -> dict:
    """Each function of rollouts/steps.py that takes a batch, with settings."""
    settings = {"overlong": {"soft": 1}, "truncated": {"reward": -0.5}, "advantages": {"of": advantages.centred}}
    public = [f for n, f in vars(steps).items() if inspect.isfunction(f) and f.__module__ == steps.__name__ and n[0] != "_"]
    taking = [f for f in public if str(inspect.signature(f).return_annotation) in (str(RolloutBatch), "RolloutBatch")]
    return {f.__name__: functools.partial(f, **settings.get(f.__name__, {})) for f in taking}


@pytest.mark.parametrize("name", every_step())
def test_a_step_gives_another_batch_and_leaves_its_own_as_it_was(name):
    shape, scored = (4, 3), np.where(np.arange(3) < LENGTHS[:, None], np.float32(-0.5), np.float32(0))
    completed = completions(LENGTHS, [True, False, True, True])
    columns = {"scored_logps": scored} if name == "correction" else {}
    batch = drawn(judged({"right": ([1, 0, 0, 0], 1.0)}, 4), completed, columns)
    answers = SimpleNamespace(
        sample=lambda: batch, annotate=lambda batch: {"ref_logps": np.zeros(shape)}, demonstration=lambda i: PROMPTS[i], stop=()
    )
    before, batch = copy.deepcopy(batch), batch.replace(source=answers)
    made = every_step()[name](batch)
    assert isinstance(made, RolloutBatch) and made is not batch and len(made.learned) == len(made.completions.lengths)
    for field in ("completions", "learned", "counted", "columns", "figures", "rewards"):
        jax.tree.map(np.testing.assert_array_equal, getattr(batch, field), getattr(before, field))


# --------------------------------------------------------------------------------------------------- The sampler's own


def test_a_samplers_probabilities_are_made_up_for():
    apart = np.log(np.array([[2, 3, 1], [0.5, 2, 1], [1.0, 1, 1]]))
    np.testing.assert_allclose(steps.corrected(apart, "truncate", 2.5), [[2, 2.5, 1], [0.5, 2, 1], [1, 1, 1]], rtol=1e-6)
    # The ratios of whole completions are 6, which is above the cap, 1 and 1.
    np.testing.assert_allclose(steps.corrected(apart, "mask", 2.5), [[0] * 3, [1] * 3, [1] * 3], rtol=1e-6)
    np.testing.assert_allclose(steps.corrected(apart, "mask", 7.0), [[6] * 3, [1] * 3, [1] * 3], rtol=1e-6)
    for way, most in (("truncate", 2.0), ("mask", 0.0)):
        with np.errstate(over="raise"):
            weights = steps.corrected(np.array([[900.0, 900.0]], np.float32), way, 2.0)
        np.testing.assert_allclose(weights, [[most] * 2], rtol=1e-6)


def test_with_a_correction_the_trainers_own_are_the_old_ones():
    where = laid_out(1, False)
    old, scored = np.where(where.real, -1.0, 0.0), np.where(where.real, -1.0 + np.log(1.5), 0.0)
    completed = completions(LENGTHS, [True] * 4)._replace(logps=old)
    batch = drawn(judged({"right": ([1, 0, 1, 0], 1.0)}, 4), completed, {"scored_logps": scored})
    columns = learned(centred(steps.correction(batch, way="truncate")), where)
    np.testing.assert_array_equal(where.collect(columns["old_logps"]), scored)
    np.testing.assert_array_equal(where.collect(columns["sampler_logps"]), old)
    assert "scored_logps" not in columns
    wanted = np.where(where.real, np.array([[0.5], [-0.5], [0.5], [-0.5]]) * 1.5, 0)
    np.testing.assert_allclose(where.collect(columns["advantages"]), wanted, rtol=1e-6)


# --------------------------------------------------------------------------------------------------------------- Pairs


def test_the_best_and_the_worst_of_a_group_are_a_pair():
    completed = completions([1, 2, 3, 0, 3, 3, 2, 1], [True] * 5 + [False] + [True] * 2)._replace(
        tokens=np.arange(8)[:, None] + np.zeros((8, 3), np.int32)
    )
    batch = steps.pairs(drawn(judged({"r": ([0.25, None, 1, 0.5, 2, 2, 2, 2], 1.0)}, 8), completed))
    assert batch.completions.tokens[:, 0].tolist()[:2] == [2, 0] and batch.scores.totals[:2].tolist() == [1, 0.25]
    assert batch.figures["frac_reward_zero_std"] == 0.5 and batch.figures["reward"] == pytest.approx(9.75 / 7)
    where = layout.laid_out(PROMPTS, batch.completions.lengths, 2, 4, 3, True)
    columns = learned(batch, where, pairs=True)
    assert set(np.unique(columns["margins"][0])) == {0.0, 0.75} and not columns["margins"][1].any()
    np.testing.assert_array_equal(columns["mask"][0], where.columns["mask"][0])
    assert not columns["mask"][1].any() and where.columns["mask"][1].any()  # a level pair teaches nothing
    assert batch.figures["completions/learned_ratio"] == 0.5
    assert batch.group == 2 and "advantages" not in columns
    cut = batch.replace(completions=batch.completions._replace(stopped=np.array([True, False, True, True])))
    assert not learned(steps.mask_truncated(cut), where, pairs=True)["mask"].any()
