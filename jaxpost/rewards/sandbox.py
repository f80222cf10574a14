"""Calls a function in a child process, with a time limit that it cannot escape.

What a model writes may send an algebra system into an endless loop, or fill the memory. Neither an exception nor a timer in
this process would stop a loop in C. So the function runs in a child, which waits for calls and is killed when one takes too
long; the next call starts another. Calls from several threads have a child each, so that none waits for another.

A child is a new interpreter: jax's threads do not survive a fork, and multiprocessing would run the user's script again. It
gets a function's name and plain arguments as a line of JSON, and answers with one. It limits its own memory, and refuses to
write files, start programs or open connections from Python. That prevents accidents, not attacks: do not run code that a model
wrote here. If its parent is killed, an alarm ends the child soon after the time limit.
"""

import atexit
import contextlib
import functools
import importlib
import importlib.util
import json
import math
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from typing import Any

from jaxpost.errors import UserError

START = 120.0  # seconds for the imports, on a busy machine
MEMORY = 4 * 2**30  # bytes of address space
_CHILD = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from jaxpost.rewards.sandbox import _serve; _serve()"
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
# Python's audit events that the child refuses.
_REFUSED = ("socket.connect", "socket.bind", "subprocess.", "os.system", "os.exec", "os.posix_spawn", "os.fork", "os.kill")
_REFUSED += ("os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate", "shutil.")
_idle: list["_Child"] = []


def call(function: str, *, args: list, seconds: float, package: str = "") -> Any:
    """The result of `module:function` for the arguments, computed in a child; arguments and result are JSON.

    seconds: the time limit, without the imports of the function's module and of `package`. Raises UserError for a package that
    is not installed, TimeoutError when the time runs out, and RuntimeError with what the function raised, or how its process
    died.
    """
    _need(package)
    child = _idle_or_new()
    try:
        child.load(function.partition(":")[0], package)
        answer = child.ask([function, args, seconds], seconds)
    except BaseException:  # also the exception that stops a thread
        child.kill()
        raise
    _idle.append(child)
    if "error" in answer:
        raise RuntimeError(answer["error"])
    return answer["value"]


def warm(*, module: str, package: str = "") -> None:
    """Starts a child with the module and the package imported. Raises UserError for a package that is not installed."""
    _need(package)
    child = _idle_or_new()
    child.load(module, package)
    _idle.append(child)


def close() -> None:
    """Ends the idle children."""
    while _idle:
        _idle.pop().kill()


atexit.register(close)


@functools.cache
def _need(package: str) -> None:
    if package and importlib.util.find_spec(package) is None:
        raise UserError(f"the package {package} is not installed; pip install 'jaxpost[rewards]'.")


def _idle_or_new() -> "_Child":
    try:
        return _idle.pop()
    except IndexError:
        return _Child()


class _Child:
    """An interpreter with this one's sys.path that answers calls."""

    def __init__(self):
        self.loaded: set[str] = set()
        path = json.dumps([entry or os.getcwd() for entry in sys.path])
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-B", "-c", _CHILD, path],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            env=os.environ | _environment(),
            start_new_session=True,  # the parent handles an interrupt from the terminal
        )
        os.set_blocking(self.process.stdin.fileno(), False)  # a child that does not read must not block its parent

    def load(self, *modules: str) -> None:
        """Imports new modules. Raises RuntimeError with what an import raised."""
        if new := [m for m in modules if m and m not in self.loaded]:
            answer = self.ask(["", [[entry or os.getcwd() for entry in sys.path], new], START], START)
            if "error" in answer:
                raise RuntimeError(answer["error"])
            self.loaded.update(new)

    def ask(self, message: list, seconds: float) -> dict:
        """The answer to a message. Raises TimeoutError, and RuntimeError if the process has died."""
        end = time.monotonic() + seconds
        what = message[0] or f"import {', '.join(message[1][1])}"
        left, answer = memoryview(json.dumps(message).encode() + b"\n"), b""
        try:
            while left:
                self._wait(self.process.stdin, select.POLLOUT, what, seconds, end)
                with contextlib.suppress(BlockingIOError):
                    left = left[os.write(self.process.stdin.fileno(), left) :]
            while not answer.endswith(b"\n"):
                self._wait(self.process.stdout, select.POLLIN, what, seconds, end)
                if not (part := os.read(self.process.stdout.fileno(), 2**16)):
                    raise BrokenPipeError
                answer += part
        except BrokenPipeError:
            raise RuntimeError(f"{what} ended its process ({self.process.wait()}), as too much memory does") from None
        return json.loads(answer)

    @staticmethod
    def _wait(pipe, event: int, what: str, seconds: float, end: float) -> None:
        """Waits until a pipe can be written or read. Raises TimeoutError at `end`."""
        ready = select.poll()
        ready.register(pipe, event)
        if not ready.poll(max(0.0, end - time.monotonic()) * 1000):
            raise TimeoutError(f"{what} took more than {seconds:g} s and was stopped")

    def kill(self) -> None:
        """Ends the process at once."""
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            with contextlib.suppress(OSError):
                pipe.close()


def _environment() -> dict[str, str]:
    """The child's environment variables, besides this process's."""
    # One thread for linear algebra: its buffers count as memory. One hash seed: sets have the same order in every child.
    quiet = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0", "JAX_PLATFORMS": "cpu"}
    if not os.access(os.environ.get("MPLCONFIGDIR", ""), os.W_OK):
        quiet["MPLCONFIGDIR"] = tempfile.gettempdir()  # matplotlib may not make a folder in the child
    return quiet


def _refuse(event: str, args: tuple) -> None:
    mode, flags = args[1:3] if event == "open" else ("", 0)
    writes = (isinstance(mode, str) and set(mode) & set("wax+")) or (isinstance(flags, int) and flags & _WRITES)
    writes = writes and args[0] != os.devnull
    if writes or event.startswith(_REFUSED):
        raise PermissionError(f"{event} is refused to a function that reads a model's text")


def _serve() -> None:
    """The child's loop: one line in, one line out, until there are no more."""
    answers = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)  # keeps what a function prints out of the answers
    with contextlib.suppress(ImportError, ValueError, OSError):  # systems without this limit
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    tempfile.gettempdir()  # it writes a probe file, which the audit hook would refuse
    sys.addaudithook(_refuse)
    for line in sys.stdin.buffer:
        name, args, seconds = json.loads(line)
        signal.alarm(math.ceil(seconds) + 1)
        try:
            answer = json.dumps({"value": _run(name, args)})
        except BaseException as error:
            answer = json.dumps({"error": f"{type(error).__name__}: {str(error)[:300]}"})
        signal.alarm(0)
        answers.write(answer.encode() + b"\n")


def _run(name: str, args: list) -> Any:
    if name:
        module, _, function = name.partition(":")
        return getattr(importlib.import_module(module), function)(*args)
    sys.path[:], modules = args
    for module in modules:
        importlib.import_module(module)
    return None
