"""A worker process, which judges completions by rewards: what runs in it, and how a reward's value is read.

It gets pickles, each after its length in 8 bytes. It answers a line of JSON for each set of rewards that it has loaded and each
completion that it has judged. `pool.py` starts it, keeps its clock and kills it. It has no input, its output goes nowhere, and
jax in it knows the CPU alone. On Linux it dies with the process that started it; elsewhere within a second, unless a reward is
in a loop in C: then when that ends.

On Linux a reward may allocate so much memory (the private data of the process, RLIMIT_DATA, since address space that a library
reserves costs nothing) and gets a MemoryError past that, which is a failure like any other. Where the machine itself runs out,
the kernel ends a worker before it ends the training. Elsewhere there is no limit: no system but Linux has one that holds.
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

LOADED = 16  # sets of rewards that a worker holds; the oldest makes room for the next
_DIES_WITH_PARENT = 1  # PR_SET_PDEATHSIG


class Failure(Exception):
    """What a reward raised, as text: "KeyError: 'column'"."""


def described(error: BaseException) -> str:
    """An exception's kind and the first line of its message, even where the message itself raises."""
    if isinstance(error, Failure):
        return str(error)
    try:
        return f"{type(error).__name__}: {first_line(error)}"
    except BaseException:
        return f"{type(error).__name__}, whose message cannot be read"


def number(value: Any) -> float | None:
    """A reward's value as a float, or None where the reward does not apply. Numbers are Python's, and scalars with a dtype, as
    NumPy, jax, ml_dtypes and torch make them. Raises TypeError, ValueError or OverflowError for what is no finite number.
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
    """Finds modules that were loaded from a file outside of sys.path, under the names that they have in the other process."""

    def __init__(self):
        self.paths: dict[str, str] = {}

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        """The spec of a module of this name, whose folder is searched for what it imports."""
        if name not in self.paths:
            return None
        if (folder := str(Path(self.paths[name]).parent)) not in sys.path:
            sys.path.append(folder)
        return importlib.util.spec_from_file_location(name, self.paths[name])


def serve(descriptor: int, parent: int) -> None:
    """Judges what comes through a socket until its other end is closed. parent: the number of the process that holds it."""
    if sys.platform == "linux":
        _first_to_go()
        ctypes.CDLL(None).prctl(_DIES_WITH_PARENT, signal.SIGKILL)
    else:
        threading.Thread(target=_watch, args=(parent,), daemon=True).start()
    if os.getppid() != parent:
        return
    own, link, rewards, files = os.getpid(), socket.socket(fileno=descriptor), {}, _Files()
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
                answer = _judged(loaded[name], record, completion)
                if os.getpid() != own:
                    os._exit(0)  # a fork that the reward made and forgot
                link.sendall(json.dumps(answer).encode() + b"\n")


def _first_to_go() -> None:
    """Has the kernel end this process before its parent where memory runs out."""
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")


def _limit(memory: float) -> None:
    """Lets this process allocate so many GiB, or without limit where it is 0."""
    if sys.platform != "linux":
        return
    import resource

    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    wanted = int(memory * 2**30) if memory else hard
    resource.setrlimit(resource.RLIMIT_DATA, (wanted if hard == resource.RLIM_INFINITY else min(wanted, hard), hard))


def _exactly(messages: Any, count: int) -> bytes:
    if len(content := messages.read(count)) < count:
        raise EOFError
    return content


def _loaded(content: bytes) -> Callable | BaseException:
    try:
        return pickle.loads(content)
    except BaseException as error:
        return error


def _judged(reward: Callable | BaseException, record: bytes, completion: str) -> Mapping:
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
