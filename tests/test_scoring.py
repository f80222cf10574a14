"""Rewards that raise, hang, and give no number, beside ones that do their work: counted, told, scored as configured."""

import contextlib
import functools
import math
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from decimal import Decimal
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from jaxpost.config import resolve
from jaxpost.errors import UserError
from jaxpost.rollouts.scoring import Scorer, judged

RECORDS = [{"answer": str(i)} for i in range(40)]
TEXTS = [f"{i}" + " word" * (i % 3) for i in range(40)]


def length(record, completion):
    return len(completion)


def right(record, completion):
    """None where the record's number is odd: not applicable. Slower for some, so that threads change their order."""
    time.sleep(0.002 * (int(record["answer"]) % 4))
    return None if int(record["answer"]) % 2 else completion == record["answer"]


def forgets(record, completion):
    len(completion)


def threads():
    return [t for t in threading.enumerate() if t.name == "jaxpost reward"]


def ended():
    """Whether no thread of a scorer is left, waiting for it 5 s: ten times what a machine under load was seen to need."""
    end = time.monotonic() + 5
    while threads() and time.monotonic() < end:
        time.sleep(0.02)
    return not threads()


def test_a_total_is_the_weighted_sum_of_what_applies():
    scores = judged({"right": (right, 2.0), "length": (length, -0.5), "seen": (length, 0.0)}, RECORDS, TEXTS)
    assert [s.each["right"] for s in scores[:4]] == [1.0, None, 0.0, None]
    assert scores[0].total == 2 * 1 - 0.5 * 1 and scores[1].total == -0.5 * 6 and scores[2].total == -0.5 * 11
    assert [s.each["seen"] for s in scores] == [len(t) for t in TEXTS] and not any(s.failures for s in scores)
    assert list(scores[0].each) == ["right", "length", "seen"]


def test_scores_do_not_depend_on_the_threads_and_come_by_key():
    rewards = {"right": (right, 1.0), "length": (length, 0.1)}
    alone = judged(rewards, RECORDS, TEXTS, workers=0, threads=1)
    scorer = Scorer(rewards, workers=0, threads=8)
    for first in (0, 20):  # two rounds of one scorer, submitted from the end
        for key in reversed(range(first, first + 20)):
            scorer.submit(key, RECORDS[key], TEXTS[key])
        found = scorer.results()
        assert list(found) == list(reversed(range(first, first + 20)))
        assert all(found[key] == alone[key] for key in found)
    assert scorer.results() == {}
    scorer.submit(3, RECORDS[3], "x")
    with pytest.raises(ValueError, match="key 3"):
        scorer.submit(3, RECORDS[3], "y")
    scorer.close()
    assert ended()


def test_judging_goes_on_while_nobody_waits():
    begun = threading.Event()
    scorer = Scorer({"one": (lambda record, completion: begun.set() or 1.0, 1.0)}, workers=0)
    scorer.submit(0, {}, "")
    assert begun.wait(5) and scorer.results()[0].total == 1.0
    scorer.close()


GOOD = [(True, 1.0), (np.bool_(True), 1.0), (np.float32(0.5), 0.5), (np.int64(-3), -3.0), (jnp.float32(2), 2.0), (None, None)]
GOOD += [(np.array(1.5), 1.5), (7, 7.0), (jnp.bfloat16(1.5), 1.5), (np.array(2, jnp.bfloat16), 2.0), (Decimal("0.5"), 0.5)]
BAD = [math.nan, math.inf, np.float32("nan"), "1.0", [1.0], np.ones(1), 1j, {}, 10**400, np.str_("1"), jnp.ones(1)]


@pytest.mark.parametrize(("value", "wanted"), GOOD, ids=repr)
def test_numbers_of_any_make_are_taken(value, wanted):
    (score,) = judged({"r": (lambda record, completion: value, 2.0)}, [{}], [""], workers=0)
    assert score.each == {"r": wanted} and not score.failures
    assert math.isnan(score.total) if wanted is None else score.total == 2 * wanted
    assert wanted is None or type(score.each["r"]) is float


@pytest.mark.parametrize("value", BAD, ids=lambda value: repr(value)[:20])
@pytest.mark.parametrize("together", [False, True])
def test_what_is_no_finite_number_is_a_failure(value, together):
    def reward(record, completion):
        return value

    if together:
        reward.many = lambda records, completions: [value] * len(records)
    (score,) = judged({"r": (reward, 2.0)}, [{}], ["said " + "x" * 100], failed=-0.25, workers=0)
    assert score.each == {"r": -0.25} and score.total == -0.5
    (told,) = score.failures
    assert told.startswith("reward r: ") and "'said xxx" in told and len(told) < 300


def sometimes(record, completion, *, every, error):
    if int(record["answer"]) % every == 0:
        raise error
    return 1.0


def test_a_reward_that_raises_is_counted_and_the_others_are_heard():
    bad = functools.partial(sometimes, every=10, error=KeyError("column"))
    scores = judged({"bad": (bad, 1.0), "length": (length, 1.0)}, RECORDS, TEXTS, failed=-1.0)
    assert [i for i, s in enumerate(scores) if s.failures] == [0, 10, 20, 30]  # 4 of 40 are the limit of 0.1
    assert scores[10].total == -1 + len(TEXTS[10]) and scores[11].total == 1 + len(TEXTS[11])
    assert scores[10].failures == ["reward bad: KeyError: 'column'; the completion begins '10 word'"]


def test_past_the_limit_the_run_stops_and_says_why():
    bad = functools.partial(sometimes, every=8, error=RuntimeError("no luck"))
    with pytest.raises(UserError, match="reward bad failed on 5 of 40 completions") as caught:
        judged({"length": (length, 1.0), "bad": (bad, 1.0)}, RECORDS, TEXTS)
    assert str(caught.value).count("RuntimeError: no luck") == 3
    judged({"bad": (bad, 1.0)}, RECORDS, TEXTS, limit=0.125)
    # One failure is no trend, but for who allows none; and a share is one reward's own.
    judged({"bad": (bad, 1.0)}, RECORDS[:3], TEXTS[:3])
    with pytest.raises(UserError, match="1 of 3"):
        judged({"bad": (bad, 1.0)}, RECORDS[:3], TEXTS[:3], limit=0.0)
    good = {f"good {i}": (length, 1.0) for i in range(20)}
    with pytest.raises(UserError, match="reward bad failed on 5 of 40"):
        judged({**good, "bad": (bad, 1.0)}, RECORDS, TEXTS)


def test_what_the_user_must_mend_is_raised_and_not_scored():
    bad = functools.partial(sometimes, every=39, error=UserError("the package x is missing"))
    scorer = Scorer({"bad": (bad, 1.0)}, limit=1.0)
    for key in range(40):
        scorer.submit(key, RECORDS[key], TEXTS[key])
    with pytest.raises(UserError, match="the package x"):
        scorer.results()
    scorer.submit(1, RECORDS[1], "")  # and nothing of it is left over
    assert scorer.results()[1].total == 1.0
    scorer.close()


def spin(record, completion):
    while completion == "spin":
        pass
    return 1.0


def stubborn(record, completion):
    left = 3 if completion == "spin" else 0
    while left:
        try:
            while True:
                pass
        except BaseException:  # what no reward should do
            left -= 1
    return 1.0


def sleepy(record, completion):
    time.sleep(0.6 if completion == "spin" else 0)
    return 1.0


@pytest.mark.parametrize("reward", [spin, stubborn, sleepy])
def test_a_reward_that_hangs_is_given_up_and_its_thread_ends(reward):
    texts = ["spin", "a", "spin", "b", "c", "d"]
    # Two threads and two hangs: without others in their place nobody would be left for the rest.
    scorer = Scorer({"r": (reward, 1.0)}, seconds=0.2, failed=-1.0, workers=0, threads=2, limit=0.5)
    for key, text in enumerate(texts):
        scorer.submit(key, {}, text)
    found = scorer.results()
    assert [found[i].total for i in range(6)] == [-1.0, 1.0, -1.0, 1.0, 1.0, 1.0]
    assert found[0].failures == ["reward r: TimeoutError: took more than 0.2 s; the completion begins 'spin'"]
    end = time.monotonic() + 5
    while len(threads()) > 3 and time.monotonic() < end:  # two workers and the clock
        time.sleep(0.02)
    assert len(threads()) == 3
    scorer.submit(0, {}, "on")  # with its two threads alive
    assert scorer.results()[0].total == 1.0
    scorer.close()
    assert ended()


def test_closing_ends_what_runs_and_drops_what_waits():
    begun, later = threading.Event(), threading.Event()

    def reward(record, completion):
        (begun if completion == "first" else later).set()
        while True:
            pass

    scorer = Scorer({"r": (reward, 1.0)}, workers=0, threads=1)
    scorer.submit(0, {}, "first")
    scorer.submit(1, {}, "second")
    assert begun.wait(5)
    scorer.close()
    assert ended() and not later.is_set()


def test_an_exit_in_a_reward_is_a_failure_like_any_other():
    def leave(record, completion):
        raise SystemExit(3)

    (score,) = judged({"r": (leave, 1.0)}, [{}], [""])
    assert "SystemExit: 3" in score.failures[0]


def at_length(record, completion, *, bonus):
    raise AssertionError("judged one by one")


calls = []
at_length.many = lambda records, completions, *, bonus: calls.append(len(records)) or [len(c) + bonus for c in completions]


def test_a_reward_that_judges_many_is_asked_once_with_its_keywords():
    calls.clear()
    scorer = Scorer({"m": (functools.partial(at_length, bonus=100), 1.0), "r": (length, 1.0)})
    for key in (2, 0, 1):
        scorer.submit(key, {}, "x" * key)
    found = scorer.results()
    assert {k: s.total for k, s in found.items()} == {2: 104.0, 0: 100.0, 1: 102.0} and calls == [3]
    assert scorer.results() == {} and calls == [3]
    scorer.close()


@pytest.mark.parametrize(
    ("many", "message"),
    [
        (lambda records, completions: [1.0], "gave 1 scores for 4"),
        (lambda records, completions: 1 / 0, "ZeroDivisionError"),
        (lambda records, completions: [1.0, ValueError("too long"), ValueError("too long"), 2.0], "ValueError: too long"),
    ],
)
def test_failures_of_a_reward_that_judges_many(many, message):
    def reward(record, completion):
        return 0.0

    reward.many = many
    scores = judged({"m": (reward, 1.0)}, RECORDS[:4], TEXTS[:4], limit=1.0, failed=-1.0)
    assert message in scores[1].failures[0] and scores[1].total == -1.0
    with pytest.raises(UserError, match="reward m failed"):
        judged({"m": (reward, 1.0)}, RECORDS[:4], TEXTS[:4])
    reward.many = lambda records, completions: [UserError("no such folder")] * 4
    with pytest.raises(UserError, match="no such folder"):
        judged({"m": (reward, 1.0)}, RECORDS[:4], TEXTS[:4], limit=1.0)


def test_a_reward_is_made_ready_before_anything_is_judged():
    def reward(record, completion, *, folder):
        return 1.0

    asked = []
    reward.ready = lambda *, folder: asked.append(folder)
    judged({"r": (functools.partial(reward, folder="here"), 1.0)}, [], [])
    assert asked == ["here"]


@pytest.mark.parametrize(
    ("rewards", "options", "message"),
    [
        ({}, {}, "no reward"),
        ({"r": length}, {}, "reward r"),
        ({"r": ("length", 1.0)}, {}, "reward r"),
        ({"r": (length, math.nan)}, {}, "reward r"),
        ({"r": (length, 1.0)}, {"seconds": 0.0}, "seconds=0.0"),
        ({"r": (length, 1.0)}, {"limit": 1.5}, "limit=1.5"),
        ({"r": (length, 1.0)}, {"failed": math.inf}, "failed=inf"),
        ({"r": (length, 1.0)}, {"workers": -1}, "workers=-1"),
        ({"r": (length, 1.0)}, {"threads": 0}, "threads=0"),
        ({"r": (length, 1e39)}, {"failed": 2.0}, "beyond the largest float32"),
        ({"r": (forgets, 1.0)}, {}, "reward r: it never returns a value"),
        ({"r": (functools.partial(forgets), 1.0)}, {}, "reward r: it never returns a value"),
    ],
)
def test_settings_that_mean_nothing_are_refused(rewards, options, message):
    before = len(threads())
    with pytest.raises(UserError, match=message):
        Scorer(rewards, **options)
    assert len(threads()) == before


# --------------------------------------------------------------------------------------------------- In worker processes


class Speechless(Exception):
    def __str__(self):
        raise ValueError("no")


def expression(record, completion):
    return bool(re.fullmatch(r"(a|aa)+", "a" * 60 + "b"))


def power(record, completion):
    return 7**10**8 % 7


def leaves(record, completion):
    os._exit(3)


def crashes(record, completion):
    os.kill(os.getpid(), signal.SIGSEGV)


def speechless(record, completion):
    raise Speechless


def floods(record, completion):
    while True:
        print("x" * 2**20)


def scribbles(record, completion):
    for descriptor in range(3, 1000):  # the worker's has the number that it had in this process
        with contextlib.suppress(OSError):
            os.write(descriptor, b'3\n{"value": "x"}\n')
    return 1.0


HOSTILE = [(expression, "TimeoutError: took more than 0.3 s"), (power, "TimeoutError"), (floods, "TimeoutError")]
HOSTILE += [(leaves, "ended its process (3)"), (crashes, "ended its process (-11)"), (scribbles, "written among its scores")]
HOSTILE += [(speechless, "Speechless, whose message cannot be read")]


@pytest.mark.parametrize(("reward", "message"), HOSTILE, ids=lambda value: getattr(value, "__name__", ""))
def test_a_hostile_reward_is_one_failure_and_the_others_are_judged(reward, message):
    def mixed(record, completion):
        return reward(record, completion) if completion == "bad" else 1.0

    texts = ["good"] * 5 + ["bad"] + ["good"] * 6
    scores = judged({"r": (mixed, 1.0)}, [{}] * 12, texts, seconds=0.3, failed=-1.0)
    assert [score.total for score in scores] == [1.0] * 5 + [-1.0] + [1.0] * 6
    assert message in scores[5].failures[0]


def test_a_message_that_raises_is_a_failure_in_this_process_too():
    (score,) = judged({"r": (speechless, 1.0)}, [{}], [""], workers=0)
    assert "Speechless, whose message cannot be read" in score.failures[0]


def asks(record, completion):
    return len(bytearray(int(record["bytes"]))) / record["bytes"]


@pytest.mark.skipif(sys.platform != "linux", reason="no other system has a limit that holds")
@pytest.mark.parametrize("memory", [0.5, 1.0])
def test_a_reward_that_asks_for_too_much_memory_is_a_failure(memory):
    records = [{"bytes": size} for size in (50 * 2**30, 600 * 2**20, 1)]
    scores = judged({"asks": (asks, 1.0)}, records, ["a"] * 3, failed=-1.0, limit=1.0, workers=1, memory=memory)
    assert [s.total for s in scores] == [-1.0, 1.0 if memory == 1.0 else -1.0, 1.0]
    assert "reward asks: MemoryError" in scores[0].failures[0]


def scribbles_later(record, completion):
    threading.Timer(0.2, scribbles, (record, completion)).start()
    return 1.0


def where():
    time.sleep(0.4)
    return lambda record, completion: float(os.getpid())


class Slow:
    """Takes its time to be loaded."""

    def __call__(self, record, completion):
        return float(os.getpid())

    def __reduce__(self):
        return where, ()


def test_what_a_reward_left_behind_does_not_bring_the_next_one_into_this_process(capsys):
    judged({"r": (scribbles_later, 1.0)}, RECORDS[:1], TEXTS[:1])
    scores = judged({"where": (Slow(), 1.0)}, RECORDS[:1], TEXTS[:1])
    assert scores[0].total != os.getpid() and not scores[0].failures and "in this process" not in capsys.readouterr().err


def test_a_rewards_message_does_not_reach_the_terminal_raw(capsys):
    def clears(record, completion):
        raise ValueError("\x1b[2Jcleared")

    judged({"r": (clears, 1.0)}, RECORDS[:1], TEXTS[:1], limit=1.0)
    assert "\\x1b[2Jcleared" in (told := capsys.readouterr().err) and "\x1b" not in told


def test_what_a_reward_changes_stays_in_its_worker():
    def changes(record, completion):
        random.seed(0)
        np.random.seed(0)
        record["numbers"].remove(2)
        if os.fork():
            os.environ["CHANGED"] = "1"
        return float(len(record["numbers"]))

    record, before = {"numbers": [1, 2]}, (random.getstate(), np.random.get_state()[1].tolist())
    scores = judged({"r": (changes, 1.0)}, [record] * 6, ["x"] * 6)
    assert [score.total for score in scores] == [1.0] * 6 and record == {"numbers": [1, 2]}
    assert before == (random.getstate(), np.random.get_state()[1].tolist()) and "CHANGED" not in os.environ


@pytest.mark.parametrize("kind", ["thread", "many"])
def test_a_record_is_a_copy_in_this_process_too(kind):
    def removes(record, completion):
        record["numbers"].remove(2)
        return 1.0

    if kind == "many":
        removes.many = lambda records, completions: [removes(r, c) for r, c in zip(records, completions, strict=True)]
    record = {"numbers": [1, 2]}
    assert [s.total for s in judged({"r": (removes, 1.0)}, [record] * 3, ["x"] * 3, workers=0)] == [1.0] * 3
    assert record == {"numbers": [1, 2]}


def test_rewards_that_cannot_be_sent_stay_and_are_named(capsys):
    lock, array = threading.Lock(), jnp.ones(2)

    def locked(record, completion):
        return float(lock.locked()) + os.getpid()

    def on_device(record, completion):
        return float(array.sum()) + os.getpid()

    def own(record, completion):
        return os.getpid()

    own.in_process = True
    rewards = {"locked": (locked, 1.0), "device": (on_device, 1.0), "own": (own, 1.0), "sent": (lambda *_: os.getpid(), 1.0)}
    (score,) = judged(rewards, [{}], [""])
    told, here = capsys.readouterr().err, os.getpid()
    assert score.each["locked"] == here and score.each["device"] == here + 2 and score.each["own"] == here
    assert score.each["sent"] != here
    assert "reward locked is judged in this process" in told and "reward device is judged in this process" in told
    assert "arrays of jax" in told and "own is judged" not in told and "sent is judged" not in told


def test_rewards_of_a_file_are_loaded_by_workers_and_anew_when_it_changes(tmp_path):
    file = tmp_path / "mine.py"
    for number in (1, 2):
        file.write_text(f"import beside\n\n\ndef mine(record, completion):\n    return beside.VALUE + {number}\n")
        (tmp_path / "beside.py").write_text("VALUE = 10\n")
        os.utime(file, ns=(number, number))
        reward = resolve.resolve({"name": f"{file}:mine"}, "rewards")
        assert judged({"r": (reward, 1.0)}, [{}], [""])[0].total == 10 + number


def test_a_worker_dies_with_the_process_that_started_it():
    code = """
import os, time
from jaxpost.rollouts.scoring import Scorer
scorer = Scorer({"r": (lambda record, completion: float(os.getpid()), 1.0)})
scorer.submit(0, {}, "")
print(int(scorer.results()[0].total), flush=True)
Scorer({"r": (lambda record, completion: 7 ** 10 ** 9 % 7, 1.0)}).submit(0, {}, "")
time.sleep(60)
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    worker = int(process.stdout.readline())
    process.kill()
    process.wait()
    end = time.monotonic() + 10
    while time.monotonic() < end:
        try:
            os.kill(worker, 0)
            gone = Path(f"/proc/{worker}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
        except (OSError, ProcessLookupError):
            gone = True
        if gone:
            return
        time.sleep(0.05)
    raise AssertionError("the worker is still there")


def test_a_total_beyond_the_range_is_a_failure_and_not_silence():
    rewards = {"a": (lambda record, completion: 3e38, 1.0), "b": (lambda record, completion: 1e300, 10.0)}
    (score,) = judged(rewards, [{}], [""], failed=-1.0, workers=0)
    assert score.total == 3e38 - 10.0 and score.each == {"a": 3e38, "b": -1.0}
    assert "OverflowError" in score.failures[0] and "reward b" in score.failures[0]


def test_a_batch_that_no_reward_applies_to_is_told_with_the_rewards_name(capsys):
    def silent(record, completion):
        return 1.0 if completion == "on" else None

    rewards = {"silent": (silent, 1.0), "figure": (length, 0.0)}
    scores = judged(rewards, [{}] * 2, ["off"] * 2, workers=0)
    assert all(math.isnan(score.total) for score in scores)
    assert "reward silent: None for each of 2 completions" in capsys.readouterr().err
    judged(rewards, [{}] * 2, ["off", "on"], workers=0)
    assert "None for each" not in capsys.readouterr().err
