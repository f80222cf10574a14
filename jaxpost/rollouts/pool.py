"""Worker processes that score completions, each killed when a reward in it takes too long.

A thread cannot stop a reward that loops in C (a regular expression, a power of large numbers), and `os._exit`, a crash or a
changed random state affects a whole process. So rewards run in workers (worker.py). These are new interpreters: jax's threads
do not survive a fork, and multiprocessing would run the user's script again. A worker that dies or exceeds a completion's time
limit is killed with its process group. That completion is a failure, and the worker's other completions go to the next one.
Records are sent as pickles, so each completion is scored with its own copy.

There is one pool a process. One thread starts the workers, since on Linux a worker dies with the thread that started it, and
communicates with all of them. Workers are started one after the other while completions wait, and kept for the next batch.
"""

import atexit
import collections
import contextlib
import functools
import hashlib
import io
import json
import os
import pickle
import queue
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import cloudpickle
import jax

from jaxpost.errors import UserError
from jaxpost.rollouts.worker import LOADED, Failure

START = 120.0  # seconds for a worker's imports, on a busy machine
GROW = 0.05  # seconds that a completion waits before another worker is started
CHUNK, BATCH = 64, 0.02  # completions that a worker is sent at a time: this many at most, for about this many seconds
PACE = 0.02  # seconds a completion, assumed for a new worker
LARGEST = 2**26  # bytes of a reward's pickle at most, since every worker has a copy
_ANSWER = 2**16  # bytes of a worker's answer at most
_CHILD = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from jaxpost.rollouts.worker import serve; "
_CHILD += "serve(int(sys.argv[2]), int(sys.argv[3]))"
# One hash seed: sets have the same order in every worker. One thread for linear algebra: workers share the cores.
_QUIET = {"JAX_PLATFORMS": "cpu", "PYTHONHASHSEED": "0", "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}


class Payload(NamedTuple):
    """Rewards for a worker: their pickles by name, files of modules outside sys.path, modification times of their modules'
    files, and their memory limit in GiB."""

    digest: str
    pickles: dict[str, bytes]
    files: dict[str, str]
    versions: dict[str, int]
    memory: float


class Job(NamedTuple):
    """A completion to score with one reward of a payload, or with the name "" a payload to load.

    answer: called with the score, in the pool's thread. closed: set when nobody waits for it any more.
    """

    payload: Payload
    name: str
    record: bytes
    completion: str
    seconds: float
    answer: Callable[[Any], None]
    closed: threading.Event
    since: float


def _load(payload: Payload, answer: Callable[[Any], None]) -> Job:
    """The job of loading a payload."""
    return Job(payload, "", b"", "", START, answer, threading.Event(), time.monotonic())


class _Held(Exception):
    """A reward holds an object that cannot leave this process."""


class _Pickler(cloudpickle.Pickler):
    def persistent_id(self, thing: Any) -> None:
        """Refuses device arrays."""
        if isinstance(thing, jax.Array):
            raise _Held("it holds arrays of jax, which stay on this process's device")


def pickled(reward: Callable) -> bytes:
    """A reward as a pickle: by name if it can be imported, else by value. Raises UserError if it cannot be sent."""
    content = io.BytesIO()
    try:
        _Pickler(content).dump(reward)
    except Exception as error:
        raise UserError(str(error) if isinstance(error, _Held) else f"it cannot be pickled ({error})") from error
    if content.tell() > LARGEST:
        raise UserError(f"it holds {content.tell() >> 20} MiB, and each worker would need a copy")
    return content.getvalue()


def payload(pickles: Mapping[str, bytes], rewards: Mapping[str, Callable], memory: float) -> Payload:
    """The payload of rewards, {name: pickle} and {name: function}, with a memory limit in GiB."""
    files = {}
    for name, module in list(sys.modules.items()):
        path = getattr(module, "__file__", None)
        if path and name == f"{Path(path).stem}_{zlib.crc32(path.encode()):08x}":  # as resolve.py names them
            files[name] = path
    modules = {getattr(getattr(reward, "func", reward), "__module__", None) for reward in rewards.values()}
    paths = {name: getattr(sys.modules.get(name), "__file__", None) for name in modules if name and name != "__main__"}
    versions = {k: os.stat(path).st_mtime_ns for k, path in {**paths, **files}.items() if path and os.path.exists(path)}
    parts = repr((sorted(pickles.items()), sorted(files.items()), sorted(versions.items()), memory))
    return Payload(hashlib.sha256(parts.encode()).hexdigest(), dict(pickles), files, versions, memory)


class _Worker:
    """A process, and the jobs that it has not answered yet, in order."""

    def __init__(self):
        self.link, other = socket.socketpair()
        path = json.dumps([entry or os.getcwd() for entry in sys.path])
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-c", _CHILD, path, str(other.fileno()), str(os.getpid())],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=[other.fileno()],
            env=os.environ | _QUIET,
            start_new_session=True,  # the parent handles an interrupt from the terminal
        )
        other.close()
        self.link.setblocking(False)
        self.jobs: collections.deque[Job] = collections.deque()
        self.loaded, self.versions = {}, {}
        self.outgoing, self.incoming, self.deadline = b"", b"", 0.0
        self.sent, self.count, self.pace = 0.0, 0, PACE  # of the last jobs: time, number, seconds each

    def send(self, jobs: list[Job]) -> None:
        """Sends jobs of a payload that it has loaded, or the loading of one."""
        first = jobs[0].payload
        if jobs[0].name:
            self._write("judge", first.digest, [(job.name, job.record, job.completion) for job in jobs])
        else:
            self._write("load", first.digest, {"files": first.files, "pickles": first.pickles, "memory": first.memory})
            self.loaded[first.digest] = True
            self.versions |= first.versions
            while len(self.loaded) > LOADED:
                self.loaded.pop(next(iter(self.loaded)))
        self.jobs.extend(jobs)
        self.sent, self.count = time.monotonic(), len(jobs)
        self.deadline = self.sent + jobs[0].seconds
        self.write()

    def _write(self, *message: Any) -> None:
        content = pickle.dumps(message, pickle.HIGHEST_PROTOCOL)
        self.outgoing += len(content).to_bytes(8, "big") + content

    def write(self) -> None:
        """Sends as much as possible without waiting."""
        try:
            while self.outgoing:
                self.outgoing = self.outgoing[self.link.send(self.outgoing) :]
        except BlockingIOError:
            pass
        except OSError:  # `read` reports how it ended
            self.outgoing = b""

    def read(self) -> str:
        """Handles the answers that have arrived. Returns the process's error, or ""."""
        try:
            while content := self.link.recv(2**16):
                self.incoming += content
                *lines, self.incoming = self.incoming.split(b"\n")
                for line in lines:
                    self._answered(json.loads(line))
                if len(self.incoming) > _ANSWER:
                    raise ValueError
        except BlockingIOError:
            return ""
        except ValueError:
            return "something was written among its scores"
        except OSError:
            pass
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout=1)
        return f"ended its process ({self.process.returncode}), as a crash, os._exit or too much memory does"

    def _answered(self, line: Any) -> None:
        """Handles one answer. Raises ValueError if it does not fit the first job."""
        name = self.jobs[0].name if self.jobs else None
        kinds = ("value", "user", "error") if name else ("errors",)
        if name is None or not isinstance(line, dict) or len(line) != 1 or not line.keys() <= set(kinds):
            raise ValueError(line)
        job, now = self.jobs.popleft(), time.monotonic()
        self.deadline = now + (self.jobs[0].seconds if self.jobs else 0)
        if not name:
            job.answer(line["errors"])
            return
        elif "value" in line:
            job.answer(line["value"])
        else:
            job.answer(UserError(line["user"]) if "user" in line else Failure(line["error"]))
        if not self.jobs:
            self.pace = (now - self.sent) / self.count

    def kill(self) -> None:
        """Ends the process and its children at once."""
        with contextlib.suppress(OSError):
            os.killpg(self.process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout=5)
        self.link.close()


class Pool:
    """The workers, and the jobs that wait for one."""

    def __init__(self):
        self.lock, self.waiting, self.most = threading.Lock(), collections.deque(), 1
        self.workers: list[_Worker] = []
        self.selector, self.grown, self.ended, self.thread = selectors.DefaultSelector(), 0.0, False, None
        self.awake, self.wake = socket.socketpair()
        self.wake.setblocking(False)
        self.process = os.getpid()

    def submit(self, jobs: list[Job], most: int) -> None:
        """Queues jobs, for at most `most` workers, or more if an earlier call allowed more."""
        with self.lock:
            self.waiting.extend(jobs)
            self.most = max(self.most, most)
            if self.thread is None:
                self.selector.register(self.awake, selectors.EVENT_READ)
                self.thread = threading.Thread(target=self._run, daemon=True, name="jaxpost workers")
                self.thread.start()
        self.nudge()

    def load(self, payload: Payload, most: int) -> dict[str, str]:
        """Loads a payload in a worker and waits for it. Returns {name: error} of rewards that cannot be loaded there."""
        answer = queue.SimpleQueue()
        self.submit([_load(payload, answer.put)], most)
        return answer.get()

    def nudge(self) -> None:
        """Wakes the thread."""
        with contextlib.suppress(BlockingIOError):
            self.wake.send(b".")

    def close(self) -> None:
        """Ends all workers, for good."""
        self.ended = True
        for worker in list(self.workers) if os.getpid() == self.process else ():
            worker.kill()

    def _run(self) -> None:
        while not self.ended:
            try:
                self._turn(time.monotonic())
            except Exception as error:  # answer every job, whatever happened
                for worker in list(self.workers):
                    self._lost(worker, Failure(f"RuntimeError: the connection to the worker failed ({error})"))
                while self.waiting:
                    self._failed(self.waiting.popleft(), Failure(f"RuntimeError: no worker can be started ({error})"))

    def _turn(self, now: float) -> None:
        """Assigns waiting jobs, reads answers, kills overdue workers."""
        with self.lock:
            self.waiting = collections.deque(job for job in self.waiting if not job.closed.is_set())
        for worker in list(self.workers):
            if worker.jobs and worker.jobs[0].closed.is_set():
                self._lost(worker, Failure("RuntimeError: closed"))
        self._assign(now)
        for worker in self.workers:
            self.selector.modify(worker.link, selectors.EVENT_READ | selectors.EVENT_WRITE * bool(worker.outgoing), worker)
        ends = [worker.deadline for worker in self.workers if worker.jobs]
        ends += [self._grows()] if self._grows() else []
        for key, _ in self.selector.select(max(0.0, min(ends) - now) if ends else None):
            if key.data is None:
                self.awake.recv(2**12)
        for worker in list(self.workers):
            self._read(worker)

    def _read(self, worker: _Worker) -> None:
        loading = bool(worker.jobs) and not worker.jobs[0].name
        worker.write()
        if trouble := worker.read():
            self._lost(worker, Failure(f"RuntimeError: {trouble}"))
        elif worker.jobs and time.monotonic() > worker.deadline:
            self._lost(worker, Failure(f"TimeoutError: took more than {worker.jobs[0].seconds:g} s"))
        elif loading and not worker.jobs:
            self.grown = time.monotonic()

    def _lost(self, worker: _Worker, error: Failure) -> None:
        """Kills a worker. Its current completion is a failure; the others wait for the next worker."""
        self.workers.remove(worker)
        self.selector.unregister(worker.link)
        worker.kill()
        # If it was loading a payload, an earlier reward may be the cause: only a worker without others decides.
        if worker.jobs and (worker.jobs[0].name or len(worker.loaded) == 1):
            job = worker.jobs.popleft()
            self._failed(job, error)
            if not job.name:  # it would end the next worker too
                dependent = [other for other in self.waiting if other.payload.digest == job.payload.digest]
                for other in dependent:
                    self.waiting.remove(other)
                    self._failed(other, error)
        with self.lock:
            self.waiting.extendleft(reversed(worker.jobs))

    @staticmethod
    def _failed(job: Job, error: Failure) -> None:
        job.answer(error if job.name else dict.fromkeys(job.payload.pickles, str(error)))

    def _able(self) -> list[_Worker]:
        """The workers that have loaded the payload of the first waiting job."""
        return [worker for worker in self.workers if self.waiting[0].payload.digest in worker.loaded]

    def _grows(self) -> float:
        """The time from which another worker may load the first waiting job's payload; 0: never."""
        if not self.waiting or any(worker.jobs and not worker.jobs[0].name for worker in self.workers):
            return 0.0
        able = self._able()
        if len(able) == len(self.workers) >= self.most or all(w.jobs for w in self.workers) and len(self.workers) >= self.most:
            return 0.0
        return max(self.waiting[0].since, self.grown) + GROW if able and self.waiting[0].name else 1e-9

    def _assign(self, now: float) -> None:
        """Gives waiting jobs to idle workers. If there are too few, starts another, or has one load the payload; jobs go to the
        first that is ready."""
        while self.waiting:
            first, idle = self.waiting[0], [worker for worker in self.workers if not worker.jobs]
            for worker in idle:
                if any(worker.versions.get(k, v) != v for k, v in first.payload.versions.items()):
                    self._lost(worker, Failure("RuntimeError: closed"))  # it holds an older version of a module
            idle = [worker for worker in idle if worker in self.workers]
            if able := [worker for worker in idle if worker in self._able()]:
                with self.lock:
                    jobs = self._chunk(able[0].pace)
                able[0].send(jobs)
                continue
            if not self._grows() or self._grows() > now:
                return
            if not idle:
                idle = [_Worker()]
                self.workers += idle
                self.selector.register(idle[0].link, selectors.EVENT_READ, idle[0])
            idle[0].send([_load(first.payload, lambda result: None) if first.name else self.waiting.popleft()])

    def _chunk(self, pace: float) -> list[Job]:
        """The next jobs, all of one payload; a load is alone. pace: expected seconds of each."""
        jobs = [self.waiting.popleft()]
        count = min(CHUNK, int(BATCH / max(pace, 1e-6)), -(-(len(self.waiting) + 1) // self.most))
        while self.waiting and len(jobs) < count and jobs[0].name and self.waiting[0].name:
            if self.waiting[0].payload.digest != jobs[0].payload.digest:
                break
            jobs.append(self.waiting.popleft())
        return jobs


@functools.cache
def shared() -> Pool:
    """The pool of this process."""
    pool = Pool()
    atexit.register(pool.close)
    return pool


os.register_at_fork(after_in_child=shared.cache_clear)  # a fork does not have the pool's thread
