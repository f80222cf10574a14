"""A stage's figures on their way from the device to the files and the screen.

A step's metrics are taken without waiting for them and written, under the step's own number, while the next step runs. Time is
counted here too, because only here is it known when a step ended: `seconds` is training time, with the step's compilation and
without evaluation and saving, and continues through restarts.
"""

import io
import json
import shutil
import sys
import time
from collections import Counter
from typing import Any

import jax
import numpy as np
import tqdm
from etils import epath

from jaxpost import metrics, optim, sharding
from jaxpost.errors import UserError
from jaxpost.reporting import table, writers
from jaxpost.reporting.progress import Progress, model_flops, peak_flops


class Log:
    """The figures of one stage.

    plan: plan.Plan; names: the stages up to this one; meta: the checkpoint's num_tokens, seconds and spent, what the source's
    batches took; step: the steps that are done, to which the files are cut back; budgets: the training `seconds` and the
    `num_tokens` after which the stage ends.
    Every process has a Log; only the first writes.
    """

    def __init__(self, plan: Any, workdir: epath.Path, names: list[str], meta: dict, step: int, budgets: dict[str, float]):
        self.plan, self.workdir = plan, workdir
        self.num_tokens, self.seconds, self.budgets = meta["num_tokens"], meta["seconds"], budgets
        self.drawn_tokens, self.spent = self.num_tokens, Counter(meta.get("spent", {}))
        self.writer = None
        if jax.process_index() == 0:
            # A new stage keeps no row, not even of step 0.
            writers.cut_back(workdir, names, plan.name, step or -1)
            self.writer = writers.MetricWriter(workdir, json.loads(plan.settings.to_json()), names)
        self.progress = Progress(plan.name, plan.steps, step, quiet=self.writer is None, budget=budgets["seconds"])
        self.schedule = optim.schedule(plan.settings.optimizer, plan.steps)
        self.peak, self.pending, self.wait, self.mark = peak_flops(), None, 0.0, None
        self.since = Counter()  # seconds, steps and work since the last row that was written

    @property
    def counts(self) -> dict[str, Any]:
        """What a checkpoint records of the stage so far: num_tokens, seconds and spent. Call `flush` before."""
        return {"num_tokens": self.num_tokens, "seconds": self.seconds, "spent": dict(self.spent)}

    @property
    def drawn(self) -> dict[str, Any]:
        """The counts with the latest step's tokens, for the budgets of tokens."""
        return {**self.counts, "num_tokens": self.drawn_tokens}

    def clock(self) -> None:
        """Starts timing a step, where no step came right before."""
        self.mark = self.mark or time.perf_counter()
        self.began = time.perf_counter()

    def waited(self) -> None:
        """Records the wait for the batch: the time since `clock`."""
        self.wait = time.perf_counter() - self.began

    def step(self, at: int, batch: dict, measured: dict) -> None:
        """Takes a step's metrics without waiting for them, and settles the step before."""
        self.settle(keep_mark=True)
        self.pending = (at, batch, measured, self.wait)
        self.spent.update(self.plan.source.spent)
        # num_tokens is known only a step later.
        if self.plan.settings.tokens or self.budgets["num_tokens"] < float("inf"):
            # Several processes may share rows, so there the step's own count is needed, which waits for it.
            alone = jax.process_count() == 1
            self.drawn_tokens += int(np.sum(batch["segments"] > 0) if alone else measured["num_tokens"])
        every = self.plan.settings.completions
        rows = self.plan.source.rows if every and at % every == 0 else []
        if rows and self.writer:
            self.writer.completions(self.plan.name, at, rows)
            if sys.stderr.isatty():
                width = shutil.get_terminal_size().columns
                tqdm.tqdm.write(table.shown(self.plan.source.samples[:8], width, colour=True), file=sys.stderr)

    def used_up(self) -> bool:
        """Whether a budget is used up: of time by the first process's clock, since all processes must take the same steps; of
        tokens with the latest step's.
        """
        if self.drawn_tokens >= self.budgets["num_tokens"]:
            return True
        return self.budgets["seconds"] < float("inf") and sharding.agree(self.seconds) >= self.budgets["seconds"]

    def settle(self, keep_mark: bool = False) -> None:
        """Waits for the pending step's figures and writes them if `log_every` says so.

        keep_mark: whether the next step's time starts here. Raises UserError after too many skipped updates in a row.
        """
        if self.pending is not None:
            at, batch, measured, wait = self.pending
            self.pending = None
            values = metrics.values(measured)
            now = time.perf_counter()
            seconds, self.mark = now - self.mark, now
            self.seconds += seconds
            self.num_tokens += int(values["num_tokens"])
            self._count(values, seconds, wait)
            self._guard(at, batch, values)
            self.progress.advance()
            every = self.plan.settings.log_every
            if every and (at % every == 0 or at in (1, self.plan.steps)):
                self._write(at, values)
        if not keep_mark:
            self.mark = None

    def _count(self, values: dict, seconds: float, wait: float) -> None:
        arch = getattr(self.plan.spec.transformer, "arch", None)  # of other models the work is not known
        work = (values["num_tokens"], values.pop("num_trained"), values.pop("num_pairs"))
        flops = arch and model_flops(arch, *work, frozen=max(0.0, 1 - self.plan.trained / arch.parameters())) or 0.0
        self.since.update({"seconds": seconds, "wait": wait, "steps": 1, "tokens": work[0], "flops": flops})

    def _write(self, at: int, values: dict) -> None:
        # Averaged over the steps since the last row: a part of a single step may pass while the step before is settled.
        since, self.since = self.since, Counter()
        # The schedule counts updates, so updates skipped before this step do not count; whether this one was does not matter.
        updates_missed = int(values["skipped"]) - int(values["skipped_in_a_row"] > 0)
        values |= {
            "num_tokens": self.num_tokens,
            "learning_rate": float(self.schedule(at - 1 - updates_missed)),
            "step_time": since["seconds"] / since["steps"],
            "wait_time": since["wait"] / since["steps"],
            "tokens_per_second": since["tokens"] / since["seconds"],
        }
        if since["flops"]:
            values["mfu"] = since["flops"] / since["seconds"] / self.peak
        if self.writer:
            self.writer.write(self.plan.name, at, values)
        self.progress.show(at, values, self.seconds)

    def _guard(self, at: int, batch: dict, values: dict) -> None:
        if values["skipped_in_a_row"] < self.plan.settings.max_skipped:
            return
        path = self.workdir / f"nonfinite-{self.plan.name}-{at}-process{jax.process_index()}.npz"
        content = io.BytesIO()
        np.savez(content, **batch)
        path.write_bytes(content.getvalue())
        raise UserError(
            f"{self.plan.name} step {at}: {int(values['skipped_in_a_row'])} updates in a row were not finite and were left out "
            f"(loss {values['loss']}, gradient norm {values['grad_norm']}). The batch is in {path}; lower the learning rate, "
            "or look at the data."
        )

    def evaluated(self, step: int, values: dict, samples: list[dict]) -> None:
        """Writes an evaluation and its samples."""
        if self.writer and values:
            self.writer.write(self.plan.name, step, values)
        if self.writer and samples:
            self.writer.samples(self.plan.name, step, samples + self.plan.source.samples)
        self.progress.show(step, values, self.seconds)

    def flush(self) -> None:
        """Writes everything up to here to the files. Time from here to the next step does not count as training."""
        self.settle()
        if self.writer:
            self.writer.flush()

    def close(self) -> None:
        """Closes files and bar."""
        self.progress.close()
        if self.writer:
            self.writer.close()
