"""A trace of a few steps, for finding out where their time goes: `--config.profile=3`.

Compilation and the first steps after it, in which memory is taken for the first time, are not in it. The trace has the host's
threads and the devices' operations on one axis of time, with each step as a span of its own name.
"""

import sys
import tempfile
from pathlib import Path

import jax
from etils import epath

SKIPPED = 2  # steps of this process before the trace: the one that compiles, and the one after it


class Profile:
    """The trace of one stage's steps; with steps=0 it does nothing but name them, for whatever else may be looking.

    at: the steps that were done before this process. folder: where the trace goes when the last of its steps is over.
    """

    def __init__(self, steps: int, folder: epath.Path, at: int):
        self.folder, self.first = folder, at + SKIPPED + 1
        self.last = self.first + steps - 1
        self.local = None

    def step(self, number: int, state):
        """The context of a step; state: that of the step before, which is waited for where the trace begins or ends."""
        if self.first <= self.last and number == self.first:
            jax.block_until_ready(state)
            self.local = tempfile.TemporaryDirectory()
            jax.profiler.start_trace(self.local.name)
        elif number > self.last:
            self.close(state)
        return jax.profiler.StepTraceAnnotation("train", step_num=number)

    def close(self, state) -> None:
        """Ends the trace where one is being taken, writes it, and says how to look at it."""
        if self.local is None:
            return
        jax.block_until_ready(state)
        jax.profiler.stop_trace()
        with self.local as local:
            # The profiler writes to local disks only.
            for file in (f for f in Path(local).rglob("*") if f.is_file()):
                target = self.folder / file.relative_to(local)
                target.parent.mkdir(parents=True, exist_ok=True)
                epath.Path(file).copy(target, overwrite=True)
        self.local = None
        if jax.process_index() == 0:
            print(
                f"profile: {self.folder}; open its *.trace.json.gz at ui.perfetto.dev, or `pip install xprof` and `xprof "
                f"--logdir={self.folder}`",
                file=sys.stderr,
            )
