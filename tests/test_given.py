"""Tokens that the policy did not draw: forced by the sampler, put in a completion's place, and learned from by imitation alone.

The last tests are whole methods, each from one file outside of the package: HPT and UFT.
"""

import functools
import json

import jax
import numpy as np
import pytest
import runs
import sampler_cases as cases
import scripted
import thin
from sampler_cases import COUNT, GROUP, NEW, assert_same, judged, sampled, streamed
from scripted import ROWS, rollouts, sampler, state
from test_decode import CALLS, WINDOW, counted
from test_rollout_runs import moved, planned, scored

from jaxpost import recipe, sharding, train
from jaxpost.errors import UserError
from jaxpost.rollouts import advantages, given, steps
from jaxpost.stages import rollouts as stage_rollouts

ALL = COUNT * GROUP


@pytest.fixture(autouse=True)
def closed():
    """Every source that a test makes is closed."""
    yield
    while scripted.OPEN:
        scripted.OPEN.pop().close()


# -------------------------------------------------------------------------------------------------------- The sampler


def hints() -> list[np.ndarray]:
    """None, one, two or three tokens for each completion, none of them a stop."""
    rng = np.random.default_rng(5)
    return [rng.integers(4, 17, i % 4).astype(np.int32) for i in range(ALL)]


@pytest.mark.parametrize(
    "way", thin.slow_after(1, [{"slots": 2}, {}, {"sizes": (2, 2, 2), "slots": 1}]), ids=["refilled", "whole", "mesh"]
)
def test_given_tokens_come_first_and_are_recorded_as_the_training_forward_has_them(way):
    found = sampled(temperature=0.5, given=hints(), **way)
    for row, ids, marks in zip(found.tokens, hints(), found.given, strict=True):
        np.testing.assert_array_equal(row[: len(ids)], ids)
        np.testing.assert_array_equal(marks, np.arange(NEW) < len(ids))
    # 5e-5: float32 through two layers in another order; the design's bound.
    np.testing.assert_allclose(found.logps, cases.logps(judged(found), found, 0.5), atol=5e-5, rtol=0)
    assert (found.lengths > found.given.sum(1)).all()


def test_nothing_given_changes_nothing_and_each_draw_keeps_its_noise():
    plain = sampled(slots=2)
    assert_same(sampled(slots=2, given=[np.zeros(0, np.int32)] * ALL), plain)
    # Some completions begin as they would have anyway, others otherwise: the first and those without go on to the bit.
    own = [plain.tokens[i, : min(2, plain.lengths[i] - 1)] if i % 3 == 0 else hints()[i] for i in range(ALL)]
    found = sampled(slots=2, given=own)
    same = [i for i in range(ALL) if i % 3 == 0 or not len(own[i])]
    for name in ("tokens", "logps", "lengths", "stopped", "text_lengths"):
        np.testing.assert_array_equal(getattr(found, name)[same], getattr(plain, name)[same])
    assert (found.tokens != plain.tokens).any() and len(same) == 7
    # A completion that is drawn alone has its own hint.
    (one,) = (one for some in streamed(slots=2, given=own, have=frozenset(range(ALL)) - {7}) for one in some)
    np.testing.assert_array_equal(one.tokens, found.tokens[7, : found.lengths[7]])
    assert one.given == len(own[7]) > 0


def test_given_tokens_are_not_restricted_and_may_end_a_completion():
    wrong = np.argsort(judged(sampled(temperature=0.5))[:, 0], axis=-1)[:, 0].astype(np.int32)  # the least likely of all
    wrong = np.where(wrong == cases.STOP, 5, wrong)
    found = sampled(temperature=0.5, top_k=1, given=[wrong[i : i + 1] for i in range(ALL)])
    np.testing.assert_array_equal(found.tokens[:, 0], wrong)
    own = cases.logps(judged(found), found, 0.5)
    np.testing.assert_allclose(found.logps[:, 0], own[:, 0], atol=5e-5, rtol=0)
    assert (found.logps[:, 1:] == 0).all()  # what is drawn is certain
    ended = sampled(given=[np.array([5, cases.STOP], np.int32)] * ALL)
    assert (ended.lengths == 2).all() and ended.stopped.all() and (ended.text_lengths == 1).all()
    with pytest.raises(UserError, match=f"15 beginnings of at most {NEW + 1} tokens for 15 completions of {NEW}"):
        sampled(given=[np.full(NEW + 1, 5, np.int32)] * ALL)


def test_a_prompt_with_a_hint_is_still_read_once_for_its_group():
    hint = np.array([1, 1], np.int32)
    found, calls = counted(given=[hint] * 12)
    assert calls == [(3, WINDOW)] + [(12, 1)] * (NEW - 1) and (found.tokens[:, :2] == 1).all()
    CALLS.clear()


# ------------------------------------------------------------------------------------------------- Hints and their share


def test_a_share_of_a_demonstration_anneals():
    ids = np.arange(1000, dtype=np.int32)

    def length(progress, key=0, **options):
        hint = given.share({}, ids, progress=progress, key=np.array([key, 1], np.uint32), **options)
        np.testing.assert_array_equal(hint, ids[: len(hint)])
        return len(hint)

    assert length(0.0) == 1000 and length(1.0) == 0 and length(0.3, start=0.25, end=0.25) == length(0.9, start=0.25, end=0.25)
    assert abs(length(0.5) - 500) < 60 and length(0.5) != length(0.5, key=1)
    assert abs(length(0.25) - 1000 * (1 + np.cos(np.pi / 4)) / 2) < 60


def test_all_completions_of_a_prompt_begin_alike_and_progress_is_that_of_the_stage(monkeypatch):
    seen = []

    def asked(record, ids, *, progress, key, group):
        seen.append((record["number"], progress, key.tolist()))
        return [ids[:1]] * group

    made = rollouts(monkeypatch, given=asked, demonstration=scripted.demonstration, gives=True)
    batch = made(state(step=0))
    made(state(step=4))
    assert [x[:2] for x in seen] == [(i, 0.0) for i in range(4)] + [(4 + i, 0.4) for i in range(4)]
    assert len({tuple(x[2]) for x in seen}) == 8
    # What is given is imitated, and everything else is learned by its advantage.
    shown, drawn = batch["demonstrations"], batch["sampled"]
    np.testing.assert_array_equal(batch["mask"], drawn)
    assert not (shown & drawn).any() and shown.sum(1).tolist() == [1] * ROWS
    assert (batch["tokens"][shown] == scripted.demonstration(0)[0]).all() and batch["old_logps"][shown].all()
    assert made.metrics["completions/given_ratio"] == shown.sum() / (shown | drawn).sum()
    assert made.metrics["completions/mean_length"] == drawn.sum() / ROWS
    assert {row["given"] for row in made.rows} == {"7"} and all(row["completion"].startswith("7") for row in made.rows)


def test_a_hint_may_differ_within_a_group(tmp_path):
    ids, about = np.arange(4), {"progress": 0.0, "key": np.zeros(2, np.uint32), "group": 3}
    (tmp_path / "mine.py").write_text("def first(record, ids, *, member):\n    return ids[:2] if member == 0 else ids[:0]\n")
    mine = stage_rollouts._given(f"{tmp_path}/mine.py:first")
    assert [x.tolist() for x in mine({}, ids, **about)] == [[0, 1], [], []]
    alike = stage_rollouts._given({"name": "share", "start": 1.0, "end": 1.0})({}, ids, **about)
    assert [x.tolist() for x in alike] == [[0, 1, 2, 3]] * 3


# ------------------------------------------------------------------------------------------------------------ Exchange


def wrong_for(*numbers: int):
    """A script in which all completions to these problems are wrong, and one of each other's is right."""
    return lambda batch, i: "1" if 4 * batch + i // 2 in numbers else str(1 + i % 2)


def exchanged(rule=steps.failed) -> list:
    return [
        functools.partial(steps.exchange, rule=rule),
        steps.annotate,
        functools.partial(steps.advantages, of=advantages.centred),
    ]


def test_a_group_that_fails_gets_its_demonstration(monkeypatch):
    about = {"demonstration": scripted.demonstration, "gives": True}
    made = rollouts(monkeypatch, sampler(wrong_for(1, 2)), steps=exchanged(), **about)
    batch = made(state())
    plain = rollouts(monkeypatch, sampler(wrong_for(1, 2)))(state())
    demos = [2, 4]
    assert np.flatnonzero(batch["demonstrations"].any(1)).tolist() == demos
    for row in range(ROWS):
        if row not in demos:
            for name in ("tokens", "mask", "old_logps", "advantages"):
                np.testing.assert_array_equal(batch[name][row], plain[name][row])
        else:
            np.testing.assert_array_equal(batch["tokens"][row][batch["demonstrations"][row]], scripted.demonstration(0))
            assert not batch["mask"][row].any() and not batch["sampled"][row].any() and not batch["advantages"][row].any()
    assert made.metrics["completions/demonstration_ratio"] == 0.25 and made.metrics["completions/dropped_ratio"] == 0
    assert made.metrics["reward"] == 0.25 and made.metrics["frac_reward_zero_std"] == 0.5  # of what the policy drew
    assert [row["completion"] for row in made.rows][2] == "77" and np.isnan(made.rows[2]["reward"])


def test_a_demonstration_is_in_no_groups_statistics_and_a_dropped_completion_in_no_count(monkeypatch):
    """A rule of one's own: the best becomes a demonstration, the worst of a level group is left out."""

    def rule(rewards):
        verdicts = np.full(rewards.shape, "keep", object)
        verdicts[np.arange(len(rewards)), rewards.argmax(1)] = "demonstration"
        verdicts[np.ptp(rewards, axis=1) == 0, -1] = "drop"
        return verdicts

    about = {"demonstration": scripted.demonstration, "gives": True, "group": 4, "batch_size": 8}
    script = sampler(lambda batch, i: "1" if i < 4 else "1212"[i % 4])
    for shared in (False, True):
        changes = {**about, "batch_size": 2 if shared else 8, "shared": shared}
        made = rollouts(
            monkeypatch, script, steps=exchanged(rule), mesh=sharding.make_mesh(devices=jax.devices()[:1]), **changes
        )
        batch = made(state())
        counted = batch["sampled"] & (batch["segments"] > 0)
        # Of the second group's 0, 1, 0, 1 the first 1 is gone; the first group's are all equal.
        np.testing.assert_allclose(np.unique(batch["advantages"][counted]), [-1 / 3, 0, 2 / 3], rtol=1e-6)
        completions = {(r, s) for r, c in zip(*np.nonzero(counted), strict=True) for s in [batch["segments"][r, c]]}
        assert len(completions) == 5 and made.metrics["completions/dropped_ratio"] == 1 / 8


def test_what_a_rule_may_not_say_is_refused(monkeypatch):
    for rule in (lambda rewards: np.full(rewards.shape, "replace"), lambda rewards: np.array(["keep"])):
        with pytest.raises(UserError, match=r"the rule of exchange gave .*; it gives \(4, 2\) of keep, drop, demonstration"):
            rollouts(monkeypatch, steps=exchanged(rule), demonstration=scripted.demonstration, gives=True)(state())
    with pytest.raises(UserError, match="put @steps.gives above its function"):
        rollouts(
            monkeypatch, steps=exchanged(lambda r: np.full(r.shape, "demonstration")), demonstration=scripted.demonstration
        )(state())


# ------------------------------------------------------------------------------------------- Whole methods from one file

TASK = """
import numpy as np
from jaxpost.tasks.arithmetic import conversation, demonstration, record, test_records, tokenizer  # noqa: F401


def reward(record, completion):
    return float(completion[:1].isdigit())


def drop_easy(batch, *, above=0.75):
    "Groups that nearly always succeed are not learned from."
    easy = batch.scores.totals.reshape(-1, batch.group).mean(1) > above
    return batch.replace(learned=batch.learned & ~np.repeat(easy, batch.group))


def gate(rewards, *, least=0.5):
    "HPT: imitation in place of one completion where the group's mean reward is below a gate."
    failed = np.nan_to_num(rewards).mean(1, keepdims=True) < least
    return np.where(failed & (np.arange(rewards.shape[1]) == 0), "demonstration", "keep")
"""
DR_GRPO = {"name": "policy_gradient.dr_grpo", "longest": 8}
IMITATES = {"name": "policy_gradient.variant", "of": DR_GRPO, "added_terms": {"sft": 1.0}}
SHAPE = {"group": 4, "prompt_window": 12, "new": 8}


def method(folder, **rollouts) -> dict:
    """A plan's changes for a method in `folder`/mine.py."""
    (folder / "mine.py").write_text(TASK)
    return {"task": {"name": str(folder / "mine.py")}, "rollouts": {**SHAPE, **rollouts}}


def hpt(folder) -> dict:
    rule = {"name": f"{folder}/mine.py:gate", "least": 0.9}
    return method(folder, steps=({"name": "exchange", "rule": rule}, f"{folder}/mine.py:drop_easy", "annotate", "advantages"))


def uft(folder) -> dict:
    return method(folder, given={"name": "share", "start": 0.75})


@pytest.mark.slow
def test_hpt_and_uft_are_a_file_and_a_few_settings(tmp_path):
    for name, changes in (("hpt", hpt(tmp_path)), ("uft", uft(tmp_path))):
        chosen = runs.settings(tmp_path, source="rollouts", objective=IMITATES, steps=3, **changes)
        train.run(recipe.make(**chosen, completions=1), tmp_path / name)
        lines = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        rows = [row for row in lines if "loss" in row]
        assert len(rows) == 3 and all(row["loss/sft"] > 0 and 0 < row["completions/given_ratio"] < 1 for row in rows)
        if name == "hpt":
            assert all(0 < row["completions/demonstration_ratio"] <= 0.25 for row in rows)
        else:
            assert rows[0]["completions/given_ratio"] > rows[2]["completions/given_ratio"]


@pytest.mark.slow
def test_a_batch_with_hints_is_the_trainers_to_the_last_given_token(tmp_path):
    mesh = sharding.make_mesh(2, 2, 2)
    plan, weights = planned(tmp_path, mesh, IMITATES, **uft(tmp_path))
    weights = moved(weights)
    with sharding.use(mesh):
        batch = plan.source(weights)
    own = scored(plan, weights, {**batch, "mask": batch["mask"] | batch["demonstrations"]}, mesh)
    assert batch["demonstrations"].sum() > 8 and batch["mask"].any()
    for column in ("demonstrations", "mask"):
        np.testing.assert_allclose(batch["old_logps"][batch[column]], own[batch[column]], atol=5e-5)  # the sampler's bound
    assert {k for k, x in batch.items()} == set(plan.source.columns)


REFUSED = {
    "unknown": (("anotate", "advantages"), "annotate` stands once"),
    "unknown besides": (("resampel", "annotate", "advantages"), "Did you mean 'resample'"),
    "an unknown keyword": (({"name": "resample", "round": 2}, "annotate", "advantages"), "Did you mean 'rounds'"),
    "no advantages": (("resample", "annotate"), "reads advantages, and no step makes them; add `advantages`"),
    "changed too late": (("annotate", "exchange", "advantages"), "exchange changes which completions there are; put it before"),
    "resampled too late": (("truncated", "resample", "annotate", "advantages"), "resample draws groups anew"),
    "pairs of none": (("pairs", "annotate", "advantages"), "this objective learns from all completions"),
    "no batch": (("MINE:nothing", "annotate", "advantages"), "nothing gave NoneType; a step returns a RolloutBatch"),
    "one's own too late": (
        ("annotate", "MINE:half", "advantages"),
        "a step after annotate changed which completions there are",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_list_of_steps_that_cannot_be_is_refused_before_anything_is_compiled(tmp_path, kind):
    listed, says = REFUSED[kind]
    changes = method(tmp_path)
    own = "\n\ndef nothing(batch):\n    pass\n\n\ndef half(batch):\n    return batch.take([0])\n"
    (tmp_path / "mine.py").write_text(TASK + own)
    changes["rollouts"]["steps"] = tuple(
        step.replace("MINE", f"{tmp_path}/mine.py") if isinstance(step, str) else step for step in listed
    )
    changes["rollouts"] |= {"truncated": -0.5} if "truncated" in listed else {}
    with pytest.raises(UserError, match=says):
        planned(tmp_path, sharding.make_mesh(), {"name": "policy_gradient.grpo"}, **changes)


def test_a_setting_whose_step_is_not_listed_and_a_task_without_demonstrations_are_refused(tmp_path):
    changes, entry = method(tmp_path, steps=("annotate", "advantages"), overlong=2), {"name": "policy_gradient.grpo"}
    mesh = sharding.make_mesh()
    with pytest.raises(UserError, match="config.rollouts.overlong: 2, and config.rollouts.steps has no step overlong"):
        planned(tmp_path, mesh, entry, **changes)
    for asks in ({"steps": ("exchange", "annotate", "advantages")}, {"given": "share"}):
        with pytest.raises(UserError, match="has no function demonstration, which config.rollouts asks for"):
            planned(tmp_path, mesh, entry, rollouts={**SHAPE, **asks})
    changes = method(tmp_path, given="share") | {"rollouts": {**SHAPE, "given": "share", "new": 3}}
    with pytest.raises(UserError, match="its demonstration has [45] tokens; config.rollouts.new takes 3"):
        planned(tmp_path, mesh, entry, **changes)
