"""Scores completions with several rewards on the host, while the device makes the next ones, and contains their failures.

A reward is a user's function on a model's output, so it may raise, hang, end its process, or return no number. Such a failure
must not stop a run or pass unnoticed: it gets the configured score and its message is printed. If a reward fails more often
than the limit allows, the run stops, since it would learn from failures. An error that the user has to fix (a UserError: a
missing package or column) is not contained: `results` raises it.

**Where a reward runs.** In a worker process (pool.py), which is killed when a completion exceeds its time limit. Three kinds
run in threads of this process: a reward that scores many completions at once (`many`); one with the attribute `in_process =
True`, because it needs the device or has its own process; and one that cannot be sent, with a message on stderr. With workers=0
all do. Each completion is scored with its own copy of its record.

**The time limit of a thread.** A thread cannot be killed. One whose reward takes too long is abandoned: its score no longer
counts, another thread replaces it, and it is sent an exception repeatedly until it ends. That stops a loop in Python, but not
one in C. The exception may arrive anywhere, so threads hold no locks and communicate by queues alone. One atomic operation
decides whether a job's thread or the clock reports its score.
"""

import copy
import ctypes
import dis
import functools
import inspect
import math
import os
import queue
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import cloudpickle
import numpy as np
import tqdm

from jaxpost.errors import UserError, first_line
from jaxpost.rollouts import pool
from jaxpost.rollouts.worker import Failure, described, number

WORKERS, THREADS = 4, 4
MEMORY = 8.0  # GiB of a worker
LARGEST = float(np.finfo(np.float32).max)  # the largest total


class Score(NamedTuple):
    """The scores of a completion: the weighted sum (nan if no reward with a weight applies), each reward's score (None: not
    applicable), and the messages of failures.
    """

    total: float
    each: dict[str, float | None]
    failures: list[str]


class _Stop(BaseException):
    """Sent to an abandoned thread; a reward's `except Exception` does not catch it."""


class _Job:
    def __init__(self, key: int, name: str, reward: Callable, record: dict, completion: str):
        self.key, self.name, self.reward, self.record, self.completion = key, name, reward, record, completion
        self.decided: dict[str, str] = {}
        self.thread, self.started = None, math.inf

    def decide(self, who: str) -> bool:
        """Whether `who` reports the job's score: the first caller does."""
        return self.decided.setdefault("by", who) == who


class Scorer:
    """Scores completions with rewards: {name: (function, weight)}; with weight 0 a reward is only reported.

    seconds: the time limit of a reward for one completion. failed: the score of a failure, before its weight. limit: the share
    of a reward's scores in one `results` that may be failures; one failure is always allowed, unless the limit is 0. workers:
    the most processes of all Scorers together. memory: GiB that each of them may allocate, on Linux; 0 is no limit. threads:
    for rewards that run in this process.

    A reward is (record, completion) -> a number, or None where it does not apply. It may have three attributes, functions with
    the reward's keywords. `ready()` is called here, to report what is missing early. `many(records, completions)` -> a number,
    None or an exception for each replaces it, once a `results` and without a time limit. `check(record)` raises for a record
    that cannot be scored (see `check_record`). Raises UserError for an invalid reward, such as a function that returns nothing.
    """

    def __init__(
        self,
        rewards: Mapping[str, tuple[Callable, float]],
        *,
        seconds: float = 10.0,
        failed: float = 0.0,
        limit: float = 0.1,
        workers: int = WORKERS,
        memory: float = MEMORY,
        threads: int = THREADS,
    ):
        _check(rewards, seconds, failed, limit, workers, memory, threads)
        self.rewards, self.seconds, self.failed, self.limit = dict(rewards), seconds, failed, limit
        self._many = {name: many for name, (reward, _) in self.rewards.items() if (many := _attribute(reward, "many"))}
        for reward, _ in self.rewards.values():
            if ready := _attribute(reward, "ready"):
                ready()
        self._jobs, self._finished, self._closed = queue.SimpleQueue(), queue.SimpleQueue(), threading.Event()
        self._running: dict[int, _Job] = {}
        self._submitted: dict[int, tuple[dict, str]] = {}
        alone = {name: reward for name, (reward, _) in self.rewards.items() if name not in self._many}
        self._workers, self._payload = workers, _payload_of(alone, workers, memory)
        self._threads = threads if alone.keys() - (self._payload.pickles if self._payload else ()) else 0
        for _ in range(self._threads):
            self._start(self._work)
        if self._threads:
            self._start(self._watch)

    def submit(self, key: int, record: dict, completion: str) -> None:
        """Starts scoring a completion; `key` identifies it in the next `results`."""
        if key in self._submitted:
            raise ValueError(f"a completion with the key {key} is being judged already")
        self._submitted[key] = (record, completion)
        jobs, sent = [], self._payload.pickles if self._payload else ()
        content = _record(record) if sent else b""
        for name, (reward, _) in self.rewards.items():
            if name in sent and isinstance(content, bytes):
                answer = functools.partial(self._receive, key, name)
                jobs.append(
                    pool.Job(self._payload, name, content, completion, self.seconds, answer, self._closed, time.monotonic())
                )
            elif name in sent:
                self._finished.put((key, name, content))
            elif name not in self._many:
                self._jobs.put(_Job(key, name, reward, record, completion))
        if jobs:
            pool.shared().submit(jobs, self._workers)

    def _receive(self, key: int, name: str, value: Any) -> None:
        self._finished.put((key, name, value))

    def results(self) -> dict[int, Score]:
        """{key: Score} of all completions submitted since the last call; waits for them.

        Raises UserError if a reward did, and if one failed more often than the limit allows.
        """
        submitted, self._submitted = self._submitted, {}
        values: dict[tuple[int, str], Any] = {}
        for _ in range(len(submitted) * (len(self.rewards) - len(self._many))):
            key, name, value = self._finished.get()
            values[key, name] = value
        for name, many in self._many.items():
            values |= {(key, name): value for key, value in zip(submitted, _score_many(many, submitted), strict=True)}
        return self._scores(submitted, values)

    def close(self) -> None:
        """Ends the threads. Drops completions without a `results`."""
        self._closed.set()
        if self._payload and self._submitted:
            pool.shared().nudge()
        for job in list(self._running.values()):
            job.decide("clock")
            _interrupt(job.thread)
        for _ in range(self._threads):
            self._jobs.put(None)

    def _scores(self, submitted: Mapping, values: Mapping) -> dict[int, Score]:
        scores, failures = {}, {name: [] for name in self.rewards}
        for key, (_, completion) in submitted.items():
            each, messages, total, applies = {}, [], 0.0, False
            for name, (_, weight) in self.rewards.items():
                value = values[key, name]
                if isinstance(value, UserError):
                    raise value
                if weight and isinstance(value, float) and not abs(total + weight * value) <= LARGEST:
                    value = OverflowError(f"{value:g} with the weight {weight:g} makes a total beyond the largest float32")
                if isinstance(value, Exception):
                    messages.append(f"reward {name}: {described(value)}; the completion begins {completion[:60]!r}")
                    failures[name].append(messages[-1])
                    value = self.failed
                each[name] = value
                total += 0.0 if value is None else weight * value
                applies |= bool(weight) and value is not None
            scores[key] = Score(total if applies else math.nan, each, messages)
        self._stop_past_limit(failures, len(submitted))
        if submitted and all(math.isnan(score.total) for score in scores.values()):
            silent = ", ".join(name for name, (_, weight) in self.rewards.items() if weight)
            if silent:
                message = f"reward {silent}: None for each of {len(submitted)} completions, so that there is nothing to learn "
                tqdm.tqdm.write(f"{message}from them. A reward that applies returns a number.", file=sys.stderr)
        return scores

    def _stop_past_limit(self, failures: Mapping[str, list[str]], count: int) -> None:
        """Prints the failures of each reward. Raises UserError if one has more than the limit allows."""
        for name, messages in failures.items():
            if messages:
                summary = f"reward {name} failed on {len(messages)} of {count} completions, scored {self.failed:g}"
                tqdm.tqdm.write(f"{summary}: {messages[0]}", file=sys.stderr)
            if len(messages) > self.limit * count and (len(messages) > 1 or not self.limit):
                raise UserError(
                    f"reward {name} failed on {len(messages)} of {count} completions, which is more than the limit "
                    f"{self.limit:g} allows. Fix it, or allow more.\n  " + "\n  ".join(messages[:3])
                )

    def _start(self, what: Callable) -> None:
        threading.Thread(target=what, daemon=True, name="jaxpost reward").start()

    def _work(self) -> None:
        me = threading.get_ident()
        try:
            while (job := self._jobs.get()) is not None and not self._closed.is_set():
                job.thread, job.started = threading.current_thread(), time.monotonic()
                self._running[me] = job
                try:
                    value = number(job.reward(copy.deepcopy(job.record), job.completion))
                except _Stop:
                    return
                except BaseException as error:  # also SystemExit, which would end the thread alone
                    value = error if isinstance(error, UserError) else Failure(described(error))
                if not job.decide("thread"):
                    while True:  # wait for the exception: a new thread with this one's number must not get it
                        time.sleep(0.01)
                del self._running[me]
                self._finished.put((job.key, job.name, value))
        except _Stop:
            pass

    def _watch(self) -> None:
        """The clock: abandons threads over their time, and ends them if it can."""
        abandoned: list[threading.Thread] = []
        while not self._closed.wait(min(0.1, self.seconds / 4)):
            abandoned = [thread for thread in abandoned if thread.is_alive()]
            for thread in abandoned:
                _interrupt(thread)
            for me, job in list(self._running.items()):
                if time.monotonic() - job.started <= self.seconds or not job.decide("clock"):
                    continue
                del self._running[me]
                _interrupt(job.thread)
                abandoned.append(job.thread)
                self._start(self._work)
                self._finished.put((job.key, job.name, TimeoutError(f"took more than {self.seconds:g} s")))


def check_record(rewards: Mapping[str, tuple[Callable, float]], record: Mapping, place: str) -> None:
    """Raises UserError, with the record's place, if a reward's `check` refuses the record."""
    for name, (reward, _) in rewards.items():
        if check := _attribute(reward, "check"):
            try:
                check(record)
            except Exception as error:
                raise UserError(f"{place}: reward {name}: {first_line(error)}") from error


def judged(
    rewards: Mapping[str, tuple[Callable, float]], records: Sequence[dict], completions: Sequence[str], **options
) -> list[Score]:
    """The scores of completions with their records; options and errors are the Scorer's."""
    scorer = Scorer(rewards, **options)
    try:
        for key, (record, completion) in enumerate(zip(records, completions, strict=True)):
            scorer.submit(key, record, completion)
        return list(scorer.results().values())
    finally:
        scorer.close()


def _check(rewards: Mapping, seconds: float, failed: float, limit: float, workers: int, memory: float, threads: int) -> None:
    if not rewards:
        raise UserError("there is no reward to judge completions by; name one at least.")
    for name, entry in rewards.items():
        if not isinstance(entry, Sequence) or len(entry) != 2 or not callable(entry[0]) or not math.isfinite(entry[1]):
            raise UserError(f"reward {name}: {entry!r}; give a function and its weight, a finite number.")
        if _returns_nothing(entry[0]):
            raise UserError(f"reward {name}: it never returns a value; is there a `return` missing?")
        if not abs(entry[1] * failed) <= LARGEST:
            raise UserError(f"reward {name}: its weight {entry[1]:g} times failed={failed:g} is beyond the largest float32.")
    finite = math.isfinite(memory) and math.isfinite(failed)
    if not (seconds > 0 and 0 <= limit <= 1 and workers >= 0 and memory >= 0 and threads >= 1 and finite):
        raise UserError(
            f"scoring: seconds={seconds} must be positive, limit={limit} a share, workers={workers} and memory={memory} 0 at "
            f"least, threads={threads} 1 at least, and failed={failed} and memory finite numbers."
        )


def _returns_nothing(reward: Callable) -> bool:
    """Whether it is a function by `def` that always returns None."""
    function = inspect.unwrap(reward.func if isinstance(reward, functools.partial) else reward)
    code = getattr(function, "__code__", None)
    if (
        code is None
        or code.co_name == "<lambda>"
        or code.co_flags & (inspect.CO_GENERATOR | inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR)
    ):
        return False
    steps = [step for step in dis.get_instructions(code) if step.opname != "RETURN_GENERATOR"]
    returns = []  # the step that loads each returned value; a `return` that is a jump's target has several
    for before, step in zip([None, *steps], steps, strict=False):
        if step.opname.startswith("RETURN_"):
            returns.append(step if step.opname == "RETURN_CONST" or step.is_jump_target else before)
    return bool(returns) and all(step.opname in ("LOAD_CONST", "RETURN_CONST") and step.argval is None for step in returns)


_PAYLOADS: list[tuple[Mapping[str, Callable], float, pool.Payload | None]] = []  # of the latest rewards
_WARNED: set[str] = set()


def _payload_of(rewards: Mapping[str, Callable], workers: int, memory: float) -> pool.Payload | None:
    """The payload of the rewards that workers have loaded; None if all stay in this process."""
    rewards = {name: reward for name, reward in rewards.items() if not _attribute(reward, "in_process")}
    if not workers or not rewards:
        return None
    for earlier, limit, payload in _PAYLOADS:
        same = earlier.keys() == rewards.keys() and limit == memory
        if same and all(earlier[name] is reward for name, reward in rewards.items()):
            return payload
    pickles, stays = {}, {}
    for name, reward in rewards.items() if os.name == "posix" else ():
        try:
            pickles[name] = pool.pickled(reward)
        except UserError as error:
            stays[name] = str(error)
    payload = pool.payload(pickles, rewards, memory) if pickles else None
    if payload and (errors := pool.shared().load(payload, workers)):
        stays |= {name: f"a worker cannot load it ({error})" for name, error in errors.items()}
        pickles = {name: content for name, content in pickles.items() if name not in errors}
        payload = pool.payload(pickles, rewards, memory) if pickles else None
    for name, why in stays.items():
        message = f"reward {name} is judged in this process, where the clock does not stop a loop in C: {why}"
        if message not in _WARNED:
            _WARNED.add(message)
            tqdm.tqdm.write(message, file=sys.stderr)
    _PAYLOADS[:] = [*_PAYLOADS[-7:], (rewards, memory, payload)]
    return payload


def _record(record: Mapping) -> bytes | Failure:
    """A pickled record for workers, or why it cannot be pickled."""
    try:
        return cloudpickle.dumps(record)
    except Exception as error:
        return Failure(
            f"{described(error)}: the record cannot be sent to a worker; config.rollouts.reward_workers=0 sends none"
        )


def _attribute(reward: Callable, name: str) -> Any:
    """An attribute of a reward or None; a function is bound to the reward's keywords."""
    if value := getattr(reward, name, None):
        return value
    if isinstance(reward, functools.partial) and (value := getattr(reward.func, name, None)):
        return functools.partial(value, *reward.args, **reward.keywords) if callable(value) else value
    return None


def _score_many(many: Callable, submitted: Mapping) -> list:
    """The scores by a reward that scores many at once; its failure is a failure for each completion."""
    if not submitted:
        return []
    records, completions = zip(*submitted.values(), strict=True)
    try:
        values = list(many([copy.deepcopy(record) for record in records], list(completions)))
        if len(values) != len(submitted):
            raise ValueError(f"gave {len(values)} scores for {len(submitted)} completions")
    except Exception as error:
        return [error] * len(submitted)
    return [_checked(value) for value in values]


def _checked(value: Any) -> float | None | Exception:
    try:
        return value if isinstance(value, Exception) else number(value)
    except Exception as error:
        return error


def _interrupt(thread: threading.Thread) -> None:
    """Raises _Stop in a thread, at its next step of Python."""
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), ctypes.py_object(_Stop))
