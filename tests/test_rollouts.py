"""Rollouts as a batch source: what a batch says, when it was made and by which weights, and that it goes on where it was.

The sampler is a script (scripted.py); tests/test_rollout_runs.py has the real one.
"""

import functools
import threading

import jax
import numpy as np
import pytest
import scripted
from scripted import GROUP, ROWS, STOP, TOKENIZER, rollouts, sampler, says, state

from jaxpost import sharding
from jaxpost.errors import UserError
from jaxpost.rollouts import advantages, resume, source, steps

PROMPTS = ROWS // GROUP


@pytest.fixture(autouse=True)
def closed():
    """Every source that a test makes is closed, or its rewards would wait to be asked while others are measured."""
    yield
    while scripted.OPEN:
        scripted.OPEN.pop().close()


def even(text: str) -> float:
    return float(int(text[-1]) % 2 == 0)


def test_a_batch_says_what_happened(monkeypatch):
    made = rollouts(monkeypatch)
    for n in range(2):
        batch = made(state(weights=n / 8))
        rewards = np.array([even(says(n, i)) for i in range(ROWS)])
        for i in range(ROWS):
            ids = TOKENIZER.encode(f"{n * PROMPTS + i // GROUP}+")
            said = [TOKENIZER.encode(letter)[-1] for letter in says(n, i)] + [STOP] * (len(says(n, i)) == 1)
            begin, end = len(ids), len(ids) + len(said)
            inside, real = (np.arange(10) >= begin) & (np.arange(10) < end), np.arange(10) < end
            np.testing.assert_array_equal(batch["tokens"][i], [*ids, *said, *[0] * (10 - end)])
            np.testing.assert_array_equal(batch["mask"][i], inside)
            np.testing.assert_array_equal(batch["segments"][i], real)
            np.testing.assert_array_equal(batch["positions"][i], np.where(real, np.arange(10), 0))
            np.testing.assert_array_equal(batch["old_logps"][i][inside], scripted.logp(n / 8, n, i, len(said)))
            assert not batch["old_logps"][i][~inside].any()
            wanted = rewards[i] - rewards.reshape(-1, GROUP).mean(1)[i // GROUP]
            np.testing.assert_allclose(batch["advantages"][i], wanted * inside, rtol=1e-6)
        assert batch["temperature"] == np.float32(0.5) and batch["temperature"].dtype == np.float32
        lengths = np.array([2] * ROWS)
        groups = rewards.reshape(-1, GROUP)
        table = made.rows
        assert [row["completion"] for row in table] == [says(n, i) for i in range(ROWS)] and made.samples == table[: 2 * GROUP]
        assert [row["prompt"] for row in table[::GROUP]] == [f"{n * PROMPTS + i}+" for i in range(PROMPTS)]
        np.testing.assert_allclose([row["reward"] for row in table], rewards)
        np.testing.assert_allclose([row["advantage"] for row in table], batch["advantages"].max(1) + batch["advantages"].min(1))
        assert made.metrics == pytest.approx(
            {
                "reward": rewards.mean(),
                "reward_std": groups.std(1, ddof=1).mean(),
                "frac_reward_zero_std": (groups[:, 0] == groups[:, 1]).mean(),
                "completions/mean_length": lengths.mean(),
                "completions/min_length": 2,
                "completions/max_length": 2,
                "completions/clipped_ratio": 2 / 8,
                "rewards/failures": 0,
            }
        )
        shown = made.samples
        assert [(s["prompt"], s["completion"]) for s in shown[:2]] == [
            (TOKENIZER.decode(TOKENIZER.encode(f"{n * PROMPTS}+")), says(n, i)) for i in range(2)
        ]
        assert [s["reward"] for s in shown] == rewards[:4].tolist() and shown[0]["advantage"] == batch["advantages"][
            0
        ].max() + (batch["advantages"][0].min())
    assert made.position == {"prompts": 2 * PROMPTS, "left_out": 0, "calls": 2, "due": 1, "held": ""}


def test_the_columns_are_those_that_are_told_beforehand(monkeypatch):
    for pairs, shared, correction in ((False, False, ""), (False, True, "mask"), (True, True, "")):
        annotators = (lambda state, batch: {"scored_logps": batch["old_logps"]},) if correction else ()
        made = rollouts(monkeypatch, pairs=pairs, shared=shared, correction=correction, annotators=annotators)
        columns, batch = made.columns, made(state())
        assert {k: (x.shape, x.dtype) for k, x in columns.items()} == {k: (np.shape(x), x.dtype) for k, x in batch.items()}


# ------------------------------------------------------------------------------------------------- Which weights, which rows


def test_a_batch_serves_several_steps_and_epochs(monkeypatch):
    asked = []
    made = rollouts(monkeypatch, sampler(asked=asked), minibatches=3, epochs=2)
    parts = [made(state(weights=k, step=k)) for k in range(6)]
    assert len(asked) == 1 and {len(part["tokens"]) for part in parts} == {ROWS}
    assert [bool(part["fresh"]) for part in parts] == [True] + [False] * 5  # its weights are those that sampled
    assert made(state(step=6))["fresh"]
    assert len(asked) == 2 and made.due == 1
    one = rollouts(monkeypatch, batch_size=3 * ROWS)(state())
    names = [k for k in one if np.ndim(one[k])]

    def rows(*batches):
        return [tuple(tuple(batch[k][i].tolist()) for k in names) for batch in batches for i in range(len(batch["tokens"]))]

    epochs = [rows(*parts[:3]), rows(*parts[3:])]
    # Advantages do not depend on the split, and every row comes once an epoch, in another order each.
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(rows(one)) and len(set(epochs[0])) == 3 * ROWS
    assert epochs[0] != epochs[1] and rows(one) not in epochs


def test_with_a_lag_the_weights_of_the_call_before_sampled(monkeypatch):
    made = rollouts(monkeypatch, lag=1)
    seen = []
    for k in range(5):
        batch = made(state(weights=10 * k))
        seen.append(np.unique(-batch["old_logps"][batch["mask"]] // 10).tolist())  # what the script adds is below 10
    assert seen == [[0], [0], [1], [2], [3]] and not batch["fresh"]


def test_what_the_weights_that_sampled_say_is_asked_of_them_and_of_no_others(monkeypatch):
    made = rollouts(monkeypatch, lag=1, minibatches=2)
    made.annotators = (
        lambda state, batch: {"values": 0 * batch["old_logps"] + state.train},
        lambda state, batch: {"ref_logps": batch["tokens"] * 1.0 + 0 * state.step},
    )
    seen = []
    for k in range(6):
        batch = made(state(weights=k, step=k))
        seen.append(np.unique(batch["values"][batch["mask"]]).tolist())
        np.testing.assert_array_equal(batch["ref_logps"], batch["tokens"] * batch["mask"])
    assert seen == [[0.0], [0.0], [0.0], [0.0], [2.0], [2.0]]


def test_rows_are_scored_a_microbatch_at_a_time(monkeypatch):
    rows, alone = [], sharding.make_mesh(devices=jax.devices()[:1])
    for count in (1, 4):
        made = rollouts(monkeypatch, minibatches=2, microbatches=count, mesh=alone)
        made.annotators = (lambda state, b: rows.append(len(b["tokens"])) or {"ref_logps": b["tokens"] * 1.0},)
        batch = made(state())
        np.testing.assert_array_equal(batch["ref_logps"], batch["tokens"] * batch["mask"])
    assert rows == [ROWS, ROWS, *[ROWS // 4] * 8]


# ---------------------------------------------------------------------------------------------------------- Which groups


def level(numbers):
    """A script in which the groups of these prompts are all wrong, and the others right once."""
    return lambda batch, i: "1" if batch * PROMPTS + i // GROUP in numbers else str(1 + i % GROUP)


@pytest.mark.parametrize(("cap", "calls", "teaching"), [(3, 3, 4), (1, 2, 3), (2, 3, 4)])
def test_groups_that_teach_nothing_are_sampled_anew(monkeypatch, cap, calls, teaching):
    asked, dull = [], {0, 1, 3, 4, 6, 7, 9}  # of 12 prompts, 2 teaches in the first batch, 5 in the second, then 8, 10 and 11
    made = rollouts(monkeypatch, sampler(level(dull - {7}), asked), resample=cap)
    batch = made(state())
    assert [n for n, _ in asked] == list(range(calls))
    informative = [n for n in range(calls * PROMPTS) if n not in dull - {7}]
    filled = [n for n in range(calls * PROMPTS) if n in dull - {7}]
    wanted = (informative + filled)[:PROMPTS]
    found = [TOKENIZER.decode(batch["tokens"][i][: batch["mask"][i].argmax()]) for i in range(0, ROWS, GROUP)]
    assert found == [TOKENIZER.decode(TOKENIZER.encode(f"{n}+")) for n in wanted]
    assert (np.abs(batch["advantages"]).max(1) > 0).sum() == GROUP * teaching
    assert made.metrics["prompts_sampled"] == calls * PROMPTS and made.metrics["prompts_level"] == len(filled)
    assert made.metrics["frac_reward_zero_std"] == (PROMPTS - teaching) / PROMPTS
    assert made.position["prompts"] == calls * PROMPTS  # the next ones come after all that were sampled
    made(state())
    assert asked[calls][0] == calls


def test_enough_is_enough(monkeypatch):
    asked = []
    made = rollouts(monkeypatch, sampler(level(()), asked), resample=3)
    made(state())
    assert len(asked) == 1 and made.metrics["prompts_sampled"] == PROMPTS and made.metrics["prompts_level"] == 0


def test_failures_of_groups_that_are_gone_are_counted(monkeypatch):
    def fails(record, text):
        if record["number"] in (0, 4) and text == "1":
            raise ValueError("no")
        return float(text == "2")

    judging = {"limit": 1.0}
    made = rollouts(monkeypatch, sampler(level({0, 4})), resample=1, judging=judging, rewards={"r": (fails, 1.0)})
    made(state())
    assert made.metrics["rewards/failures"] == 4 and made.metrics["prompts_level"] == 2


# ----------------------------------------------------------------------------------------------------- What can go wrong


def test_prompts_that_cannot_be_asked_are_left_out_and_counted(monkeypatch):
    made = rollouts(monkeypatch, prompt=lambda i: None if i in (1, 2, 5) else scripted.prompt(i))
    batch = made(state())
    found = [TOKENIZER.decode(batch["tokens"][i][: batch["mask"][i].argmax()]) for i in range(0, ROWS, GROUP)]
    assert found == [TOKENIZER.decode(TOKENIZER.encode(f"{n}+")) for n in (0, 3, 4, 6)]
    assert made.metrics["problems_left_out"] == 3 and made.position["prompts"] == 7
    with pytest.raises(UserError, match="config.task: of problems 0 to 1400 all but 1 had to be left out"):
        rollouts(monkeypatch, prompt=lambda i: None if i else scripted.prompt(i))(state())


def test_a_problem_is_asked_for_once_and_its_cell_is_its_task(monkeypatch):
    asked, seen = [], []

    def prompt(i):
        asked.append(i)
        record, ids = scripted.prompt(10 * i + len(asked))  # another whenever it is asked for
        return {**record, "cell": "ab"[i % 2]}, ids

    def told(rewards, tokens):
        seen.append(list(tokens["tasks"]))
        return rewards - rewards.mean(1, keepdims=True)

    made = rollouts(monkeypatch, prompt=prompt, advantages=told, lag=1)
    batches = [made(state()) for _ in range(3)]
    assert asked == list(range(4 * PROMPTS)) and seen == [["a", "b"] * (PROMPTS // 2)] * 3
    first = TOKENIZER.encode(f"{1}+")
    np.testing.assert_array_equal(batches[0]["tokens"][0][: len(first)], first)
    assert [batch.numbers.tolist() for batch in made.waiting] == [list(range(3 * PROMPTS, 4 * PROMPTS))]


def test_rewards_that_fail_are_contained_and_past_the_limit_stop_the_run(monkeypatch, capsys):
    def reward(record, text):
        kind = record["number"]
        if kind == 0:
            raise ValueError("no")
        if kind == 1:
            while True:
                pass
        return (float("nan"), "a text")[kind - 2] if kind < 4 else 1.0

    judging = {"seconds": 0.2, "limit": 1.0, "failed": -1.0}
    made = rollouts(monkeypatch, rewards={"mine": (reward, 1.0)}, judging=judging)
    made(state())
    assert made.metrics["rewards/failures"] == ROWS and made.metrics["reward"] == -1
    told = "reward mine failed on 8 of 8 completions, scored -1: reward mine: ValueError: no; the completion begins"
    assert told in capsys.readouterr().err
    made(state())
    assert made.metrics["rewards/failures"] == 0 and made.metrics["reward"] == 1
    made = rollouts(monkeypatch, rewards={"mine": (reward, 1.0)}, judging={"seconds": 0.2, "limit": 0.5})
    with pytest.raises(UserError, match="reward mine failed on 8 of 8 completions"):
        made(state())


def test_a_sampler_that_breaks_leaves_no_threads(monkeypatch):
    def broken(batch, ended):
        raise RuntimeError("the device is gone")

    before = set(threading.enumerate())
    with pytest.raises(RuntimeError, match="the device is gone"):
        rollouts(monkeypatch, sampler(killed=broken), judging={"workers": 0})(state())
    assert gone(before)
    made = rollouts(monkeypatch, lag=1, judging={"workers": 0})  # nor does one that is closed with a batch that waits
    made(state())
    assert set(threading.enumerate()) - before
    made.close()
    assert gone(before)


def gone(before: set) -> bool:
    """Whether all threads but those from before end soon."""
    for thread in set(threading.enumerate()) - before:
        thread.join(timeout=5)
    return not set(threading.enumerate()) - before


# -------------------------------------------------------------------------------------------------------------- Going on


class Killed(Exception):
    """The machine is gone."""


def left(made, folder):
    made.folder = folder
    return made


def run(made, steps: range, kept: dict | None = None) -> list:
    """(batch, metrics, samples) of each step; a position is kept before each step, as a checkpoint would, in `kept`."""
    found = []
    for k in steps:
        if kept is not None:
            kept[k] = made.keep(k, list(kept))
        batch = made(state(weights=k, step=k))
        found.append((batch, made.metrics, made.samples))
    return found


def same(one: list, other: list) -> None:
    for (batch, *told), (found, *said) in zip(one, other, strict=True):
        assert batch.keys() == found.keys() and repr(told) == repr(said)  # nan is nan
        for name, x in batch.items():
            assert x.dtype == found[name].dtype
            np.testing.assert_array_equal(found[name], x, err_msg=name)


def hinted(record, ids, *, progress, key, group):
    """Beginnings of a group that depend on all that they may depend on."""
    return [ids[: (record["number"] + int(10 * progress) + int(key[0]) + member) % 2] for member in range(group)]


EXCHANGED = [
    functools.partial(steps.exchange, rule=functools.partial(steps.failed, bar=0.4)),
    steps.annotate,
    functools.partial(steps.advantages, of=advantages.centred),
]
GIVEN = {"gives": True, "given": hinted, "demonstration": scripted.demonstration, "steps": EXCHANGED}


def scored(state, batch: dict) -> dict:
    """What stands for the trainer's own log-probabilities."""
    return {"scored_logps": batch["old_logps"] * 1.5}


@pytest.mark.parametrize(
    "changes",
    [
        {"minibatches": 2, "epochs": 2},
        {"lag": 1},
        {"lag": 2, "minibatches": 2, "resample": 1},
        {"lag": 1, "shared": True, "correction": "mask", "annotators": (scored,)},
        {"lag": 1, "pairs": True, "group": 4, "resample": 1, "prompt": lambda i: None if i % 3 == 1 else scripted.prompt(i)},
        {
            "lag": 1,
            "minibatches": 2,
            "gives": True,
            "given": hinted,
            "demonstration": scripted.demonstration,
            "steps": EXCHANGED,
        },
    ],
    ids=["in the middle", "waiting", "both", "branches", "pairs", "given"],
)
def test_it_goes_on_exactly_where_it_was(monkeypatch, tmp_path, changes):
    several = {"failures": (lambda record, text: int(text[0]) / 3, 0.5), "sampled": (lambda record, text: None, 1.0)}
    changes = {**changes, "rewards": several}
    kept = {}
    whole = run(left(rollouts(monkeypatch, **changes), tmp_path), range(9), kept)
    for step in range(9):
        again = left(rollouts(monkeypatch, **changes), tmp_path)
        again.position = kept[step] if step else 0
        same(whole[step:], run(again, range(step, 9)))


def test_only_what_cannot_be_made_again_is_in_files(monkeypatch, tmp_path):
    made = left(rollouts(monkeypatch), tmp_path)
    made(state())
    assert made.keep(1, [])["held"] == "" and not list(tmp_path.iterdir())
    made = left(rollouts(monkeypatch, minibatches=2), tmp_path)
    names = {}
    for step in range(1, 8):
        made(state())
        made.keep(step, [s for s in (step - 1, step - 2) if s > 0])
        names[step] = sorted(path.name for path in tmp_path.iterdir())
    # Of an odd step half a batch is left; a file goes when its checkpoint has gone.
    assert names[3] == [resume.held(1), resume.held(3)] and names[5] == [resume.held(3), resume.held(5)]
    made = left(rollouts(monkeypatch, lag=1), tmp_path / "other")
    made(state())
    batch, waiting, _ = resume.read(tmp_path / "other" / made.keep(1, [])["held"])
    assert batch == {} and len(waiting) == 1  # what is used up is not kept beside what waits


def test_a_file_stays_until_its_checkpoint_is_gone(monkeypatch, tmp_path):
    made = left(rollouts(monkeypatch, minibatches=2), tmp_path)
    made(state())
    made.keep(7, [5])
    # A checkpoint that is still being written is in no list yet, and keeps its file.
    made(state())
    made(state())
    made.keep(9, [5])
    assert resume.held(7) in [path.name for path in tmp_path.iterdir()]


def test_what_had_ended_when_a_run_was_killed_is_found_again(monkeypatch, tmp_path):
    whole, asked = run(rollouts(monkeypatch), range(2)), []

    def killed(batch, ended):
        if batch == 1 and ended == ROWS:
            raise Killed

    made = left(rollouts(monkeypatch, sampler(killed=killed)), tmp_path)
    monkeypatch.setattr(source, "SECONDS", 0.0)
    same(whole[:1], run(made, range(1)))
    kept = made.keep(1, [])
    with pytest.raises(Killed):
        made(state(weights=1, step=1))
    again = left(rollouts(monkeypatch, sampler(asked=asked)), tmp_path)
    again.position = kept
    same(whole[1:], run(again, range(1, 2)))
    assert asked == [(1, frozenset({1, 3, 5, 7}))]
    # Nothing of it is taken for another batch's, nor after a start from the beginning.
    other = left(rollouts(monkeypatch, sampler(asked=asked)), tmp_path)
    other.position = {**kept, "calls": 2}
    other(state(weights=1, step=1))
    assert asked[1:] == [(2, frozenset())]
    resume.clear(tmp_path)
    assert not list(tmp_path.iterdir())
