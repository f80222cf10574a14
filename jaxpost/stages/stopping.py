"""A run that is asked to stop: by SIGTERM (a scheduler), or by Ctrl-C.

Within the loop the step under way is finished and saved first. Outside of it (reading data and weights, compiling, between two
stages) there is nothing to save, and the run ends at once; what was being written appears whole or not at all.
"""

import contextlib
import signal
import sys
import threading
from collections.abc import Iterator

import jax


class StopRequest:
    """Set by SIGTERM, or by Ctrl-C (a second one stops at once). Outside of the loop (`in_loop`) it ends the run by itself.

    With several processes jax's own handler speaks for all of them, so none is installed here.
    """

    def __init__(self):
        self.asked, self.status, self.before = False, 0, {}
        self.in_loop = False  # whether somebody looks at `asked`, who has something to save first

    def __enter__(self):
        # Handlers belong to the main thread; a caller's other thread does without.
        if jax.process_count() == 1 and threading.current_thread() is threading.main_thread():
            self.before = {s: signal.signal(s, self._ask) for s in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    @contextlib.contextmanager
    def saving(self, where: str) -> Iterator[None]:
        """Surrounds work that looks at `asked` and saves by itself; ends the process after it where it was asked to stop."""
        self.in_loop = True
        yield
        self.in_loop = False
        if self.asked:
            leave(where, self)

    def _ask(self, number, _):
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        # Who asks by SIGTERM wants it to end well; after Ctrl-C a shell must not go on to what was to come next.
        self.asked, self.status = True, 130 if number == signal.SIGINT else 0
        if not self.in_loop:
            leave("outside of the loop", self)


def leave(where: str, stop: StopRequest) -> None:
    """Ends the process, with the status that a request calls for, and says where the run stopped."""
    print(f"\nstopped {where}, all saved; the same command continues.", file=sys.stderr)
    raise SystemExit(stop.status)
