"""Completions judged by several rewards on the host while the device makes the next ones, and contained.

A reward is a function of the user's, called on what a model wrote, so it will one day raise, hang, end its process, or give
something that is no number. None of that may stop a run, and none may pass unseen. Such a failure is scored as configured and
told with its message; where a reward fails more often than the limit allows, the run stops, since it would be learning from
failures. What the user has to put right (a UserError: a package or a column that is missing) is not contained: `results` raises
it.

**Where a reward runs.** In a worker process (pool.py), which is killed when a completion takes more than its seconds. Three
kinds stay in threads of this process: one that judges many completions at once (`many`), one that says so by an attribute
`in_process = True`, because it needs the device or has a process of its own, and one that cannot be sent, of which a line on
stderr tells. With workers=0 all of them do. Each completion is judged by a copy of its record of its own.

**The clock of a thread.** A thread cannot be killed, so one whose reward takes too long is given up: its verdict no longer
counts, another thread takes its place, and it is sent an exception again and again until it ends. That stops a loop in Python;
a loop in C goes on. A thread that is sent an exception may be anywhere, so it must hold nothing that others need: threads talk
by queues alone, and who speaks for a job, its thread or the clock, is decided by one atomic operation.
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
LARGEST = float(np.finfo(np.float32).max)  # a total beyond it is none that could be learned from


class Score(NamedTuple):
    """What the rewards make of a completion: the weighted sum (nan where no reward that has a weight applies), what each gave
    (None: not applicable), and what went wrong.
    """

    total: float
    each: dict[str, float | None]
    failures: list[str]


class _Stop(BaseException):
    """Sent to a thread that is given up; no `except Exception` of a reward's keeps it."""


class _Job:
    def __init__(self, key: int, name: str, reward: Callable, record: dict, completion: str):
        self.key, self.name, self.reward, self.record, self.completion = key, name, reward, record, completion
        self.decided: dict[str, str] = {}
        self.thread, self.started = None, math.inf

    def decide(self, who: str) -> bool:
        """Whether it is `who` that speaks for the job; the first who asks."""
        return self.decided.setdefault("by", who) == who


class Scorer:
    """Judges completions by rewards: {name: (function, weight)}; of weight 0 a reward only counts.

    seconds: that a reward may take for one completion. failed: what a failure scores, before its weight. limit: the share of a
    reward's verdicts in one `results` that may be failures, though one always may, unless the limit is 0. workers: processes at
    most, of this and all other Scorers together; memory: GiB that each of them may allocate, on Linux, where 0 is no limit;
    threads: for rewards that are judged in this process.

    A reward is (record, completion) -> a number, or None where it does not apply. It may carry three attributes, functions
    with its own keywords: `ready()`, called here at once, so that what is missing is found early; `many(records, completions)`
    -> one number, None or exception for each, which is called in its stead, once a `results` and without a clock; and
    `check(record)`, which raises for a record that no completion could be judged by (see `check_record`).
    Raises UserError for what is no reward, as a function that returns nothing.
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
        self._many = {name: many for name, (reward, _) in self.rewards.items() if (many := _carried(reward, "many"))}
        for reward, _ in self.rewards.values():
            if ready := _carried(reward, "ready"):
                ready()
        self._jobs, self._verdicts, self._closed = queue.SimpleQueue(), queue.SimpleQueue(), threading.Event()
        self._running: dict[int, _Job] = {}
        self._submitted: dict[int, tuple[dict, str]] = {}
        alone = {name: reward for name, (reward, _) in self.rewards.items() if name not in self._many}
        self._workers, self._payload = workers, _sent(alone, workers, memory)
        self._threads = threads if alone.keys() - (self._payload.pickles if self._payload else ()) else 0
        for _ in range(self._threads):
            self._start(self._work)
        if self._threads:
            self._start(self._watch)

    def submit(self, key: int, record: dict, completion: str) -> None:
        """Has a completion judged, from now on; `key` is its own among those of the next `results`."""
        if key in self._submitted:
            raise ValueError(f"a completion with the key {key} is being judged already")
        self._submitted[key] = (record, completion)
        jobs, sent = [], self._payload.pickles if self._payload else ()
        content = _record(record) if sent else b""
        for name, (reward, _) in self.rewards.items():
            if name in sent and isinstance(content, bytes):
                answer = functools.partial(self._hear, key, name)
                jobs.append(
                    pool.Job(self._payload, name, content, completion, self.seconds, answer, self._closed, time.monotonic())
                )
            elif name in sent:
                self._verdicts.put((key, name, content))
            elif name not in self._many:
                self._jobs.put(_Job(key, name, reward, record, completion))
        if jobs:
            pool.shared().submit(jobs, self._workers)

    def _hear(self, key: int, name: str, verdict: Any) -> None:
        self._verdicts.put((key, name, verdict))

    def results(self) -> dict[int, Score]:
        """The scores of all that were submitted since the last call, by their keys; waits for them.

        Raises UserError where a reward did, and where one failed more often than the limit allows.
        """
        submitted, self._submitted = self._submitted, {}
        verdicts: dict[tuple[int, str], Any] = {}
        for _ in range(len(submitted) * (len(self.rewards) - len(self._many))):
            key, name, verdict = self._verdicts.get()
            verdicts[key, name] = verdict
        for name, many in self._many.items():
            verdicts |= {(key, name): verdict for key, verdict in zip(submitted, _together(many, submitted), strict=True)}
        return self._scores(submitted, verdicts)

    def close(self) -> None:
        """Ends what judges. What has been submitted and not asked for is dropped."""
        self._closed.set()
        if self._payload and self._submitted:
            pool.shared().nudge()
        for job in list(self._running.values()):
            job.decide("clock")
            _interrupt(job.thread)
        for _ in range(self._threads):
            self._jobs.put(None)

    def _scores(self, submitted: Mapping, verdicts: Mapping) -> dict[int, Score]:
        scores, failures = {}, {name: [] for name in self.rewards}
        for key, (_, completion) in submitted.items():
            each, messages, total, applies = {}, [], 0.0, False
            for name, (_, weight) in self.rewards.items():
                verdict = verdicts[key, name]
                if isinstance(verdict, UserError):
                    raise verdict
                if weight and isinstance(verdict, float) and not abs(total + weight * verdict) <= LARGEST:
                    verdict = OverflowError(f"{verdict:g} with the weight {weight:g} makes a total beyond the largest float32")
                if isinstance(verdict, Exception):
                    messages.append(f"reward {name}: {described(verdict)}; the completion begins {completion[:60]!r}")
                    failures[name].append(messages[-1])
                    verdict = self.failed
                each[name] = verdict
                total += 0.0 if verdict is None else weight * verdict
                applies |= bool(weight) and verdict is not None
            scores[key] = Score(total if applies else math.nan, each, messages)
        self._stop_past_limit(failures, len(submitted))
        if submitted and all(math.isnan(score.total) for score in scores.values()):
            silent = ", ".join(name for name, (_, weight) in self.rewards.items() if weight)
            if silent:
                message = f"reward {silent}: None for each of {len(submitted)} completions, so that there is nothing to learn "
                tqdm.tqdm.write(f"{message}from them. A reward that applies returns a number.", file=sys.stderr)
        return scores

    def _stop_past_limit(self, failures: Mapping[str, list[str]], count: int) -> None:
        """Tells of the failures of each reward. Raises UserError where one has more than the limit allows."""
        for name, messages in failures.items():
            if messages:
                summary = f"reward {name} failed on {len(messages)} of {count} completions, scored {self.failed:g}"
                tqdm.tqdm.write(f"{summary}: {messages[0]}", file=sys.stderr)
            if len(messages) > self.limit * count and (len(messages) > 1 or not self.limit):
                raise UserError(
                    f"reward {name} failed on {len(messages)} of {count} completions, which is more than the limit "
                    f"{self.limit:g} allows. Mend it, or allow more.\n  " + "\n  ".join(messages[:3])
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
                    verdict = number(job.reward(copy.deepcopy(job.record), job.completion))
                except _Stop:
                    return
                except BaseException as error:  # SystemExit too: it would end the thread and nothing else
                    verdict = error if isinstance(error, UserError) else Failure(described(error))
                if not job.decide("thread"):
                    while True:  # the exception is on its way; were the thread gone, another might get it with its number
                        time.sleep(0.01)
                del self._running[me]
                self._verdicts.put((job.key, job.name, verdict))
        except _Stop:
            pass

    def _watch(self) -> None:
        """The clock: gives up threads whose time is over, and ends them if it can."""
        given_up: list[threading.Thread] = []
        while not self._closed.wait(min(0.1, self.seconds / 4)):
            given_up = [thread for thread in given_up if thread.is_alive()]
            for thread in given_up:
                _interrupt(thread)
            for me, job in list(self._running.items()):
                if time.monotonic() - job.started <= self.seconds or not job.decide("clock"):
                    continue
                del self._running[me]
                _interrupt(job.thread)
                given_up.append(job.thread)
                self._start(self._work)
                self._verdicts.put((job.key, job.name, TimeoutError(f"took more than {self.seconds:g} s")))


def check_record(rewards: Mapping[str, tuple[Callable, float]], record: Mapping, place: str) -> None:
    """Raises UserError, with the record's place, where a reward says that it can judge nothing by this record."""
    for name, (reward, _) in rewards.items():
        if check := _carried(reward, "check"):
            try:
                check(record)
            except Exception as error:
                raise UserError(f"{place}: reward {name}: {first_line(error)}") from error


def judged(
    rewards: Mapping[str, tuple[Callable, float]], records: Sequence[dict], completions: Sequence[str], **options
) -> list[Score]:
    """The scores of completions, each of its record; options are the Scorer's, and so are the errors."""
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
    """Whether it is a function by `def` that only ever returns None."""
    function = inspect.unwrap(reward.func if isinstance(reward, functools.partial) else reward)
    code = getattr(function, "__code__", None)
    if (
        code is None
        or code.co_name == "<lambda>"
        or code.co_flags & (inspect.CO_GENERATOR | inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR)
    ):
        return False
    steps = [step for step in dis.get_instructions(code) if step.opname != "RETURN_GENERATOR"]
    returns = []  # what puts each value there; a `return` that is jumped to has several
    for before, step in zip([None, *steps], steps, strict=False):
        if step.opname.startswith("RETURN_"):
            returns.append(step if step.opname == "RETURN_CONST" or step.is_jump_target else before)
    return bool(returns) and all(step.opname in ("LOAD_CONST", "RETURN_CONST") and step.argval is None for step in returns)


_PAYLOADS: list[tuple[Mapping[str, Callable], float, pool.Payload | None]] = []  # of the latest rewards that were sent
_WARNED: set[str] = set()


def _sent(rewards: Mapping[str, Callable], workers: int, memory: float) -> pool.Payload | None:
    """What workers get of rewards, and have loaded by now; None where all of them stay in this process."""
    rewards = {name: reward for name, reward in rewards.items() if not _carried(reward, "in_process")}
    if not workers or not rewards:
        return None
    for known, limit, payload in _PAYLOADS:
        same = known.keys() == rewards.keys() and limit == memory
        if same and all(known[name] is reward for name, reward in rewards.items()):
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
    """A record as workers get it."""
    try:
        return cloudpickle.dumps(record)
    except Exception as error:
        return Failure(
            f"{described(error)}: the record cannot be sent to a worker; config.rollouts.reward_workers=0 needs not to"
        )


def _carried(reward: Callable, name: str) -> Any:
    """What a reward carries as an attribute; a function is bound to the keywords that the reward itself is bound to."""
    if carried := getattr(reward, name, None):
        return carried
    if isinstance(reward, functools.partial) and (carried := getattr(reward.func, name, None)):
        return functools.partial(carried, *reward.args, **reward.keywords) if callable(carried) else carried
    return None


def _together(many: Callable, submitted: Mapping) -> list:
    """A verdict for each, of a reward that judges many at once; its own failure is every completion's."""
    if not submitted:
        return []
    records, completions = zip(*submitted.values(), strict=True)
    try:
        values = list(many([copy.deepcopy(record) for record in records], list(completions)))
        if len(values) != len(submitted):
            raise ValueError(f"gave {len(values)} verdicts on {len(submitted)} completions")
    except Exception as error:
        return [error] * len(submitted)
    return [_verdict(value) for value in values]


def _verdict(value: Any) -> float | None | Exception:
    try:
        return value if isinstance(value, Exception) else number(value)
    except Exception as error:
        return error


def _interrupt(thread: threading.Thread) -> None:
    """Raises _Stop in a thread, the next time that it runs Python."""
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), ctypes.py_object(_Stop))
