"""The program of a worker process, which scores completions with rewards.

It gets pickles, each after its length in 8 bytes, and answers a line of JSON for each set of rewards that it has loaded and
each completion that it has scored. `pool.py` starts it, enforces its time limits and kills it. It has no input, its output is
discarded, and its jax only uses the CPU. On Linux it dies with the process that started it; elsewhere within a second, or when
a reward's loop in C ends.

On Linux the process's private data is limited (RLIMIT_DATA, since address space that a library reserves costs nothing): beyond
it a reward gets a MemoryError, a failure like any other. If the machine runs out of memory, the kernel kills a worker before
the training. Other systems have no limit that works.
"""

import contextlib
import ctypes
import decimal
import importlib.abc
import importlib.util
import json
import math
import numbers
import os
import pickle
import reprlib
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jaxpost.errors import UserError, first_line

LOADED = 16  # sets of rewards that a worker keeps; the oldest is dropped
_DIES_WITH_PARENT = 1  # PR_SET_PDEATHSIG


class Failure(Exception):
    """A reward's exception as text: "KeyError: 'column'"."""


def described(error: BaseException) -> str:
    """An exception's type and the first line of its message, even if formatting the message raises."""
    if isinstance(error, Failure):
        return str(error)
    try:
        return f"{type(error).__name__}: {first_line(error)}"
    except BaseException:
        return f"{type(error).__name__}, whose message cannot be read"


def number(value: Any) -> float | None:
    """A reward's value as a float, or None where the reward does not apply.

    Accepts Python's numbers and scalars with a dtype (NumPy, jax, ml_dtypes, torch). Raises TypeError, ValueError or
    OverflowError for anything but a finite number.
    """
    if value is None:
        return None
    kind = getattr(getattr(value, "dtype", None), "kind", "f")  # torch's dtypes have none
    scalar = hasattr(value, "dtype") and tuple(getattr(value, "shape", (1,))) == () and kind in "biufV"
    scalar = scalar and "complex" not in str(value.dtype)
    if not scalar and not isinstance(value, numbers.Real | decimal.Decimal):
        raise TypeError(f"gave {reprlib.repr(value)}, which is no number")
    if not math.isfinite(result := float(value)):
        raise ValueError(f"gave {result}")
    return result


class _Files(importlib.abc.MetaPathFinder):
    """Finds modules from files outside of sys.path, under their names in the other process."""

    def __init__(self):
        self.paths: dict[str, str] = {}

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        """The spec of a module; adds its folder to sys.path for its imports."""
        if name not in self.paths:
            return None
        if (folder := str(Path(self.paths[name]).parent)) not in sys.path:
            sys.path.append(folder)
        return importlib.util.spec_from_file_location(name, self.paths[name])


def serve(descriptor: int, parent: int) -> None:
    """Scores completions from a socket until its other end is closed. parent: the id of the process that holds it."""
    if sys.platform == "linux":
        _prefer_to_kill()
        ctypes.CDLL(None).prctl(_DIES_WITH_PARENT, signal.SIGKILL)
    else:
        threading.Thread(target=_watch, args=(parent,), daemon=True).start()
    if os.getppid() != parent:
        return
    process, link, rewards, files = os.getpid(), socket.socket(fileno=descriptor), {}, _Files()
    sys.meta_path.append(files)
    with contextlib.suppress(EOFError, OSError), link.makefile("rb") as messages:
        while True:
            kind, payload, body = pickle.loads(_exactly(messages, int.from_bytes(_exactly(messages, 8), "big")))
            if kind == "load":
                _limit(body["memory"])
                files.paths.update(body["files"])
                rewards[payload] = body["memory"], {name: _loaded(content) for name, content in body["pickles"].items()}
                while len(rewards) > LOADED:
                    rewards.pop(next(iter(rewards)))
                errors = {k: described(x) for k, x in rewards[payload][1].items() if isinstance(x, BaseException)}
                link.sendall(json.dumps({"errors": errors}).encode() + b"\n")
                continue
            memory, loaded = rewards[payload]
            _limit(memory)
            for name, record, completion in body:
                answer = _scored(loaded[name], record, completion)
                if os.getpid() != process:
                    os._exit(0)  # a fork that the reward made
                link.sendall(json.dumps(answer).encode() + b"\n")


def _prefer_to_kill() -> None:
    """Tells the kernel to kill this process before its parent when memory runs out."""
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")


def _limit(memory: float) -> None:
    """Limits this process's memory, in GiB; 0 is no limit."""
    if sys.platform != "linux":
        return
    import resource

    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    limit = int(memory * 2**30) if memory else hard
    resource.setrlimit(resource.RLIMIT_DATA, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))


def _exactly(messages: Any, count: int) -> bytes:
    if len(content := messages.read(count)) < count:
        raise EOFError
    return content


def _loaded(content: bytes) -> Callable | BaseException:
    try:
        return pickle.loads(content)
    except BaseException as error:
        return error


def _scored(reward: Callable | BaseException, record: bytes, completion: str) -> Mapping:
    try:
        if isinstance(reward, BaseException):
            raise reward
        return {"value": number(reward(pickle.loads(record), completion))}
    except UserError as error:
        return {"user": described(error).removeprefix("UserError: ")}
    except BaseException as error:
        return {"error": described(error)}


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    os.killpg(os.getpid(), signal.SIGKILL)
