"""The real command line, which kills itself at a moment of its own: `python tests/killed.py <moment> <number> <flags>`.

generation    when the second segment of the rollouts with this number has been looked at, what had ended being in a file
scoring       when all of the rollouts with this number are there, and their rewards are asked for
update        when the step with this number, of the stage `reinforce`, is under way
"""

import os
import runpy
import signal
import sys

from jaxpost.reporting import log
from jaxpost.rollouts import scores, source


def kill() -> None:
    """As the machine would: nothing is closed, nothing is said."""
    os.kill(os.getpid(), signal.SIGKILL)


def arm(moment: str, number: int) -> None:
    """Sets the trap."""
    source.SECONDS = 0.0
    if moment == "generation":
        stream = source.stream

        def looked(*args, step, **kw):
            for turn, ended in enumerate(stream(*args, step=step, **kw)):
                yield ended
                if step == number and turn == 1:
                    kill()

        source.stream = looked
    if moment == "scoring":
        gathered, calls = scores.gathered, []

        def asked(scorer, count):
            calls.append(count)
            return kill() if len(calls) > number else gathered(scorer, count)

        scores.gathered = asked
    if moment == "update":
        took = log.Log.step

        def taken(self, at, *rest):
            took(self, at, *rest)
            if at == number and self.plan.name == "reinforce":
                kill()

        log.Log.step = taken


if __name__ == "__main__":
    arm(sys.argv[1], int(sys.argv[2]))
    sys.argv = [sys.argv[0], *sys.argv[3:]]
    runpy.run_module("jaxpost.train", run_name="__main__")
