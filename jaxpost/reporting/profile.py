"""A trace of a few steps that shows where their time goes: `--config.profile=3`.

The trace leaves out compilation and the next step, which allocates memory. It has the host's threads and the devices'
operations on one time axis, with a named span for each step.
"""

import sys
import tempfile
from pathlib import Path

import jax
from etils import epath

SKIPPED = 2  # steps of this process before the trace: the one that compiles, and the one after it


class Profile:
    """The trace of one stage's steps; with steps=0 it only names the steps, for other profilers.

    at: the steps that were done before this process. folder: where the trace is written after its last step.
    """

    def __init__(self, steps: int, folder: epath.Path, at: int):
        self.folder, self.first = folder, at + SKIPPED + 1
        self.last = self.first + steps - 1
        self.local = None

    def step(self, number: int, state):
        """The context of a step; state: the previous step's, which is awaited where the trace begins or ends."""
        if self.first <= self.last and number == self.first:
            jax.block_until_ready(state)
            self.local = tempfile.TemporaryDirectory()
            jax.profiler.start_trace(self.local.name)
        elif number > self.last:
            self.close(state)
        return jax.profiler.StepTraceAnnotation("train", step_num=number)

    def close(self, state) -> None:
        """Ends a running trace, writes it, and prints how to open it."""
        if self.local is None:
            return
        jax.block_until_ready(state)
        jax.profiler.stop_trace()
        with self.local as local:
            # The profiler only writes to local disks.
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
