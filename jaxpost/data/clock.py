"""A time limit for a call, in any thread, at the cost of a dictionary entry.

A chat template may loop forever. One watching thread, alive only during such calls, raises an exception in a thread that is
over its time. The exception arrives between two steps of Python; a single step in C (a huge product) ends first.
"""

import ctypes
import threading
import time
from collections.abc import Callable
from typing import Any

TICK = 0.2  # seconds between two checks
_lock = threading.Lock()
_running: dict[int, list] = {}  # thread -> [deadline, whether an exception was sent]
_watching: list[threading.Thread] = []


class _Over(BaseException):
    """The time is over. No subclass of Exception, so that the call's own handlers do not catch it."""


def within(seconds: float, call: Callable[[], Any]) -> Any:
    """The result of call(). Raises TimeoutError if it takes longer. Nested calls are not supported."""
    try:
        return _watched(seconds, call)
    except _Over:
        raise TimeoutError(f"took longer than {seconds:g} seconds") from None


def _watched(seconds: float, call: Callable[[], Any]) -> Any:
    me = threading.get_ident()
    with _lock:
        _running[me] = [time.monotonic() + seconds, False]
        if not (_watching and _watching[0].is_alive()):  # it is dead after a fork
            _watching[:] = [threading.Thread(target=_watch, daemon=True, name="jaxpost clock")]
            _watching[0].start()
    try:
        return call()
    finally:
        with _lock:
            if _running.pop(me)[1]:
                _send(me, None)  # withdraws an exception that has not arrived yet


def _watch() -> None:
    while True:
        time.sleep(TICK)
        with _lock:
            for thread, entry in _running.items():
                if time.monotonic() > entry[0]:
                    entry[1] = True
                    _send(thread, _Over)
            if not _running:
                _watching.clear()
                return


def _send(thread: int, exception: type | None) -> None:
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), exception and ctypes.py_object(exception))
