"""A call that may not take longer than so many seconds, in any thread, for the cost of a dictionary entry.

A template from elsewhere may loop for ever. One watching thread, there only while such calls are, raises an exception in the
thread that is over its time. It arrives between two steps of Python; a single step in C (a huge product)
ends first.
"""

import ctypes
import threading
import time
from collections.abc import Callable
from typing import Any

TICK = 0.2  # seconds between two looks
_lock = threading.Lock()
_running: dict[int, list] = {}  # thread -> [when its time is over, whether an exception was sent]
_watching: list[threading.Thread] = []


class _Over(BaseException):
    """The time is over. No Exception, so that nothing on the way takes it for a mistake of its own."""


def within(seconds: float, call: Callable[[], Any]) -> Any:
    """What call() gives. Raises TimeoutError where it takes longer. Calls within such a call are not supported."""
    try:
        return _watched(seconds, call)
    except _Over:
        raise TimeoutError(f"took longer than {seconds:g} seconds") from None


def _watched(seconds: float, call: Callable[[], Any]) -> Any:
    me = threading.get_ident()
    with _lock:
        _running[me] = [time.monotonic() + seconds, False]
        if not (_watching and _watching[0].is_alive()):  # after a fork it is not
            _watching[:] = [threading.Thread(target=_watch, daemon=True, name="jaxpost clock")]
            _watching[0].start()
    try:
        return call()
    finally:
        with _lock:
            if _running.pop(me)[1]:
                _send(me, None)  # takes back an exception that has not arrived yet


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
