"""Completions judged by several rewards, in threads of the host while the device makes the next ones, and contained.

A reward is a function of the user's, called on what a model wrote, so it will one day raise, hang, or give something that is no
number. None of that may stop a run, and none may pass unseen. Such a failure is scored as configured and told with its message;
where a reward fails more often than the limit allows, the run stops, since it would be learning from failures. What the user
has to put right (a UserError: a package or a column that is missing) is not contained: `results` raises it.

**The clock.** A reward has so many seconds for a completion. A thread cannot be killed, so one whose reward takes longer is
given up: its verdict no longer counts, another thread takes its place, and it is sent an exception again and again until it
ends. That stops a loop in Python; a loop in C goes on, which is why `math.verify` has a process of its own.

A thread that is sent an exception may be anywhere, so it must hold nothing that others need. Threads talk by queues alone, and
who speaks for a job, its thread or the clock, is decided by one atomic operation.
"""

import ctypes
import functools
import math
import numbers
import queue
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import tqdm

from jaxpost.errors import UserError, first_line


class Score(NamedTuple):
    """What the rewards make of a completion: the weighted sum, what each gave (None: not applicable), and what went wrong."""

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
    reward's verdicts in one `results` that may be failures, though one always may, unless the limit is 0. workers: threads.

    A reward is (record, completion) -> a number, or None where it does not apply. It may carry two attributes, functions with
    its own keywords: `ready()`, called here at once, so that what is missing is found early; and `many(records, completions)`
    -> one number, None or exception for each, which is called in its stead, once a `results` and without a clock.
    Raises UserError for what is no reward.
    """

    def __init__(
        self,
        rewards: Mapping[str, tuple[Callable, float]],
        *,
        seconds: float = 10.0,
        failed: float = 0.0,
        limit: float = 0.1,
        workers: int = 4,
    ):
        _check(rewards, seconds, failed, limit, workers)
        self.rewards, self.seconds, self.failed, self.limit = dict(rewards), seconds, failed, limit
        self._many = {name: many for name, (reward, _) in self.rewards.items() if (many := _carried(reward, "many"))}
        for reward, _ in self.rewards.values():
            if ready := _carried(reward, "ready"):
                ready()
        self._jobs, self._said, self._closed = queue.SimpleQueue(), queue.SimpleQueue(), threading.Event()
        self._running: dict[int, _Job] = {}
        self._asked: dict[int, tuple[dict, str]] = {}
        self._workers = workers
        for _ in range(workers):
            self._start(self._work)
        self._start(self._watch)

    def submit(self, key: int, record: dict, completion: str) -> None:
        """Has a completion judged, from now on; `key` is its own among those of the next `results`."""
        if key in self._asked:
            raise ValueError(f"a completion with the key {key} is being judged already")
        self._asked[key] = (record, completion)
        for name, (reward, _) in self.rewards.items():
            if name not in self._many:
                self._jobs.put(_Job(key, name, reward, record, completion))

    def results(self) -> dict[int, Score]:
        """The scores of all that were submitted since the last call, by their keys; waits for them.

        Raises UserError where a reward did, and where one failed more often than the limit allows.
        """
        asked, self._asked = self._asked, {}
        said: dict[tuple[int, str], Any] = {}
        for _ in range(len(asked) * (len(self.rewards) - len(self._many))):
            job, verdict = self._said.get()
            said[job.key, job.name] = verdict
        for name, many in self._many.items():
            said |= {(key, name): verdict for key, verdict in zip(asked, _together(many, asked), strict=True)}
        return self._scores(asked, said)

    def close(self) -> None:
        """Ends the threads. What has been submitted and not asked for is dropped."""
        self._closed.set()
        for job in list(self._running.values()):
            job.decide("clock")
            _interrupt(job.thread)
        for _ in range(self._workers):
            self._jobs.put(None)

    def _scores(self, asked: Mapping, said: Mapping) -> dict[int, Score]:
        scores, failures = {}, {name: [] for name in self.rewards}
        for key, (_, completion) in asked.items():
            each, told, total = {}, [], 0.0
            for name, (_, weight) in self.rewards.items():
                verdict = said[key, name]
                if isinstance(verdict, UserError):
                    raise verdict
                if isinstance(verdict, Exception):
                    told.append(f"reward {name}: {_told(verdict)}; the completion begins {completion[:60]!r}")
                    failures[name].append(told[-1])
                    verdict = self.failed
                each[name] = verdict
                total += 0.0 if verdict is None else weight * verdict
            scores[key] = Score(total, each, told)
        for name, found in failures.items():
            if found:
                told = f"reward {name} failed on {len(found)} of {len(asked)} completions, scored {self.failed:g}: {found[0]}"
                tqdm.tqdm.write(told, file=sys.stderr)
            if len(found) > self.limit * len(asked) and (len(found) > 1 or not self.limit):
                raise UserError(
                    f"reward {name} failed on {len(found)} of {len(asked)} completions, which is more than the limit "
                    f"{self.limit:g} allows. Mend it, or allow more.\n  " + "\n  ".join(found[:3])
                )
        return scores

    def _start(self, what: Callable) -> None:
        threading.Thread(target=what, daemon=True, name="jaxpost reward").start()

    def _work(self) -> None:
        me = threading.get_ident()
        try:
            while (job := self._jobs.get()) is not None and not self._closed.is_set():
                job.thread, job.started = threading.current_thread(), time.monotonic()
                self._running[me] = job
                try:
                    verdict = _number(job.reward(job.record, job.completion))
                except _Stop:
                    return
                except BaseException as error:  # SystemExit too: it would end the thread and nothing else
                    verdict = error if isinstance(error, Exception) else RuntimeError(_told(error))
                if not job.decide("thread"):
                    while True:  # the exception is on its way; were the thread gone, another might get it with its number
                        time.sleep(0.01)
                del self._running[me]
                self._said.put((job, verdict))
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
                self._said.put((job, TimeoutError(f"took more than {self.seconds:g} s")))


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


def _check(rewards: Mapping, seconds: float, failed: float, limit: float, workers: int) -> None:
    if not rewards:
        raise UserError("there is no reward to judge completions by; name one at least.")
    for name, entry in rewards.items():
        if not isinstance(entry, Sequence) or len(entry) != 2 or not callable(entry[0]) or not math.isfinite(entry[1]):
            raise UserError(f"reward {name}: {entry!r}; give a function and its weight, a finite number.")
    if not (seconds > 0 and 0 <= limit <= 1 and workers >= 1 and math.isfinite(failed)):
        raise UserError(
            f"scoring: seconds={seconds} must be positive, limit={limit} a share, workers={workers} 1 at least, and "
            f"failed={failed} a finite number."
        )


def _carried(reward: Callable, name: str) -> Callable | None:
    """A function that a reward carries as an attribute, bound to the keywords that the reward itself is bound to."""
    if found := getattr(reward, name, None):
        return found
    if isinstance(reward, functools.partial) and (found := getattr(reward.func, name, None)):
        return functools.partial(found, *reward.args, **reward.keywords)
    return None


def _together(many: Callable, asked: Mapping) -> list:
    """A verdict for each, of a reward that judges many at once; its own failure is every completion's."""
    if not asked:
        return []
    records, completions = zip(*asked.values(), strict=True)
    try:
        found = list(many(list(records), list(completions)))
        if len(found) != len(asked):
            raise ValueError(f"gave {len(found)} verdicts on {len(asked)} completions")
    except Exception as error:
        return [error] * len(asked)
    return [_verdict(value) for value in found]


def _verdict(value: Any) -> float | None | Exception:
    try:
        return value if isinstance(value, Exception) else _number(value)
    except Exception as error:
        return error


def _number(value: Any) -> float | None:
    """A reward's value as a float, or None. Raises TypeError, ValueError or OverflowError for what is no finite number."""
    if value is None:
        return None
    scalar = isinstance(value, np.ndarray | np.generic) or hasattr(value, "__array__")
    if scalar and np.ndim(value) == 0 and np.asarray(value).dtype.kind in "biuf":
        value = np.asarray(value).item()
    if not isinstance(value, numbers.Real):
        raise TypeError(f"gave {repr(value)[:60]}, which is no number")
    if not math.isfinite(found := float(value)):
        raise ValueError(f"gave {found}")
    return found


def _told(error: BaseException) -> str:
    return f"{type(error).__name__}: {first_line(error)}"


def _interrupt(thread: threading.Thread) -> None:
    """Raises _Stop in a thread, the next time that it runs Python."""
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), ctypes.py_object(_Stop))
