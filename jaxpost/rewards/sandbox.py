"""A function in a process of its own, under a clock that it cannot stop.

What a model writes may send an algebra system round for ever, or fill the memory, and neither an exception nor a timer in this
process would reach a loop in C. So such a function runs in a child, which waits for calls and is killed when one takes too
long; the next call starts another. Calls from several threads have a child each, so that none waits for a neighbour's.

A child is a new interpreter, not a fork (jax's threads do not survive one) and not multiprocessing's, which would run the
user's script again. It gets a function's name and plain arguments as a line of JSON, and answers with one. It limits its own
memory, and refuses to write files, start programs or open connections from Python. That is a railing and no jail: code that a
model wrote is not to be run here. And it dies by an alarm of its own soon after the clock, in case its parent was killed.
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

START = 120.0  # seconds that the imports may take, on a busy machine
MEMORY = 4 * 2**30  # bytes of address space
_CHILD = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from jaxpost.rewards.sandbox import _serve; _serve()"
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
# What Python tells of itself before it does it; the child's audit hook refuses these.
_REFUSED = ("socket.connect", "socket.bind", "subprocess.", "os.system", "os.exec", "os.posix_spawn", "os.fork", "os.kill")
_REFUSED += ("os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate", "shutil.")
_idle: list["_Child"] = []


def call(function: str, *, args: list, seconds: float, package: str = "") -> Any:
    """What `module:function` gives for the arguments, in a child, within so many seconds; arguments and result are JSON.

    package: imported there before the clock starts, as the function's module is. Raises UserError for a package that is not
    installed, TimeoutError where the time ran out, and RuntimeError with what the function raised, or how its process died.
    """
    _need(package)
    child = _taken()
    try:
        child.load(function.partition(":")[0], package)
        found = child.ask([function, args, seconds], seconds)
    except BaseException:  # that of a thread which is told to stop, too
        child.kill()
        raise
    _idle.append(child)
    if "error" in found:
        raise RuntimeError(found["error"])
    return found["value"]


def warm(*, module: str, package: str = "") -> None:
    """Has a child ready that holds the module and the package. Raises UserError for a package that is not installed."""
    _need(package)
    child = _taken()
    child.load(module, package)
    _idle.append(child)


def close() -> None:
    """Ends the children that wait for calls."""
    while _idle:
        _idle.pop().kill()


atexit.register(close)


@functools.cache
def _need(package: str) -> None:
    if package and importlib.util.find_spec(package) is None:
        raise UserError(f"the package {package} is not installed; pip install 'jaxpost[rewards]'.")


def _taken() -> "_Child":
    try:
        return _idle.pop()
    except IndexError:
        return _Child()


class _Child:
    """An interpreter that finds modules where this one does, and answers calls."""

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
            start_new_session=True,  # an interrupt from the terminal is its parent's to deal with
        )
        os.set_blocking(self.process.stdin.fileno(), False)  # a child that does not read must not keep its parent

    def load(self, *modules: str) -> None:
        """Imports what it has not yet. Raises RuntimeError with what an import raised."""
        if new := [m for m in modules if m and m not in self.loaded]:
            found = self.ask(["", [[entry or os.getcwd() for entry in sys.path], new], START], START)
            if "error" in found:
                raise RuntimeError(found["error"])
            self.loaded.update(new)

    def ask(self, message: list, seconds: float) -> dict:
        """The answer to a message. Raises TimeoutError, and RuntimeError where the process is gone."""
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
        """Waits until a pipe can be written or read. Raises TimeoutError at the end of the time."""
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
    """The child's environment variables, beside this process's own."""
    # One thread for linear algebra: its buffers count as memory. One hash seed: sets have one order in every child.
    quiet = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0", "JAX_PLATFORMS": "cpu"}
    if not os.access(os.environ.get("MPLCONFIGDIR", ""), os.W_OK):  # else it is the user's own
        quiet["MPLCONFIGDIR"] = tempfile.gettempdir()  # a folder that is there: matplotlib may make none in the child
    return quiet


def _refuse(event: str, args: tuple) -> None:
    mode, flags = args[1:3] if event == "open" else ("", 0)
    writes = (isinstance(mode, str) and set(mode) & set("wax+")) or (isinstance(flags, int) and flags & _WRITES)
    writes = writes and args[0] != os.devnull
    if writes or event.startswith(_REFUSED):
        raise PermissionError(f"{event} is refused to a function that reads a model's words")


def _serve() -> None:
    """The child: one line in, one line out, until there are no more."""
    answers = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)  # what a function prints does not get between the answers
    with contextlib.suppress(ImportError, ValueError, OSError):  # where the system has no such limit
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    tempfile.gettempdir()  # looked for by writing a probe, which could not be written any more
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
