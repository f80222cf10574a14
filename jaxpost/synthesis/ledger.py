"""The rows of a synthesis, what it dropped and why, and how far it is. They are written in parts, each with all that a later
run goes on from. So a run that is killed loses what came after its last part, and repeats nothing.
"""

import copy
import json
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import tqdm

from jaxpost.data.readers import Record
from jaxpost.errors import UserError
from jaxpost.recipe import plain
from jaxpost.storage.artefacts import Artefact
from jaxpost.synthesis import calls
from jaxpost.synthesis.endpoint import Answer
from jaxpost.synthesis.pool import Pool

REASONS = 40  # different ones that are counted apart
OTHERS = "other reasons"
SECONDS = 20.0  # between parts: what a kill costs
SHOWN = 160  # letters of a completion or row that was dropped
IDLE = 100  # prompts without a new row, and a pass over all records without one, after which a synthesis with a budget ends
START = {"draws": 0, "prompts": 0, "rows": 0, "tokens": 0, "failures": 0, "last": 0, "seconds": 0.0}


class Tally:
    """What was dropped: {reason: [how often, where first, what first]}, in the order of their first time."""

    def __init__(self, dropped: Mapping[str, Sequence] | None = None):
        self.dropped = {reason: list(entry) for reason, entry in (dropped or {}).items()}

    def add(self, reason: str, place: str, what: Any) -> None:
        """Counts something that was dropped: a completion's text, a row, or a record."""
        reason = reason[:SHOWN]
        reason = reason if reason in self.dropped or len(self.dropped) < REASONS else OTHERS
        shown = what if isinstance(what, str) else json.dumps(what, ensure_ascii=False, default=str)
        entry = self.dropped.setdefault(reason, [0, place, shown[:SHOWN]])
        entry[0] += 1

    def lines(self) -> list[str]:
        """A line for each reason, the most frequent first."""
        counted = sorted(self.dropped.items(), key=lambda item: -item[1][0])
        return [f"{count:,} dropped: {reason} (first {place}: {what!r})" for reason, (count, place, what) in counted]


class Draw(NamedTuple):
    """A record to be asked: its messages, None where they are left out; repeat: how often it was asked before, and how many
    equal records come before it; key: uint32 [2], of what its prompt draws.
    """

    number: int
    record: Record
    messages: list[dict] | None
    repeat: tuple[int, int]
    key: np.ndarray


class Ledger:
    """The rows and the counts of a synthesis (stages.synthesis.Synthesis); what is committed is written.

    progress: draws that are done, prompts that were asked, rows kept, tokens of completions, failures of functions, the draw of
    the last row, and seconds.
    """

    def __init__(self, plan: Any, artefact: Artefact, progress: dict[str, float]):
        self.plan, self.artefact, self.progress = plan, artefact, dict(progress)
        self.budget, self.group = plan.settings.budget, plan.settings.rollouts.group
        self.budgeted = any(plain(self.budget).values())
        files = sorted(artefact.folder.glob("part-*.jsonl")) if artefact.folder.exists() else []
        rows = [json.loads(line) for file in files for line in file.read_text().split("\n") if line]
        self.pool = Pool([record.row for record in plan.records], rows)
        self.tally = Tally(artefact.parts[-1]["progress"].get("dropped") if artefact.parts else None)
        self.lines: list[str] = []  # of rows that are not committed
        self.committed: list[str] = []  # of rows that are not written
        self.state: dict = {}  # what is written with them
        self.mark, self.written = time.monotonic(), progress["seconds"]
        shown = {"total": self.budget.rows or None, "initial": progress["rows"], "disable": jax.process_index() > 0 or None}
        self.bar = tqdm.tqdm(desc=plan.name, unit=" rows", **shown)

    def take(self, draw: Draw, answers: Sequence[Answer]) -> None:
        """Takes the answers to a draw, up to the row that the budget ends with."""
        self._at(draw)
        self.progress["prompts"] += 1
        for answer in answers:
            if answer.tokens is None and not answer.fault and self.budget.tokens:
                raise UserError("config.budget.tokens: the endpoint does not say how many tokens an answer has (usage).")
            self.progress["tokens"] += answer.tokens or 0
            if answer.fault:
                self.tally.add(answer.fault, draw.record.place, answer.text)
            else:
                self._keep(draw, answer.text)

    def _at(self, draw: Draw) -> None:
        self.progress["draws"] = draw.number + 1
        self.pool.key = draw.key

    def _keep(self, draw: Draw, text: str) -> None:
        place = draw.record.place
        try:
            rows = calls.parsed(self.plan.functions.parser, text, draw.record.row, draw.messages)
            if isinstance(rows, str):
                self.tally.add(rows, place, text)
            for row in () if isinstance(rows, str) else rows:
                if self._is_full():
                    return
                if reason := calls.refused(self.plan.functions.filters, row, self.pool):
                    self.tally.add(reason, place, row)
                else:
                    self.pool.add(row)
                    self.bar.update()
                    self.lines.append(json.dumps(row, ensure_ascii=False) + "\n")
                    self.progress |= {"rows": self.progress["rows"] + 1, "last": draw.number + 1}
        except UserError:
            raise
        except Exception as error:  # of somebody's function
            self.progress["failures"] += 1
            self.tally.add(f"the parser or a filter failed with {type(error).__name__}", place, text)
            completions = self.progress["prompts"] * self.group
            limit = self.plan.settings.rollouts.failures
            calls.check_failures(self.progress["failures"], completions, limit, place, error)

    def leave_out(self, draw: Draw) -> None:
        """Counts a record that cannot be asked."""
        self._at(draw)
        self.tally.add("cannot be asked", draw.record.place, draw.record.row)

    def _is_full(self) -> bool:
        return 0 < self.budget.rows <= self.progress["rows"]

    def prompts_left(self) -> int:
        """How many prompts the budget has completions for."""
        return self.budget.completions // self.group - self.progress["prompts"] if self.budget.completions else sys.maxsize

    def ended(self) -> bool:
        """Whether the budget is used up, or nothing new comes; without one, whether every record was asked."""
        p, count = self.progress, len(self.plan.records)
        if not self.budgeted:
            return p["draws"] >= count
        used_up = self._is_full() or not self.prompts_left() or 0 < self.budget.tokens <= p["tokens"]
        return used_up or p["draws"] - p["last"] >= max(count, IDLE)

    def commit(self) -> None:
        """Makes all that was taken part of what is written: from here a later run goes on."""
        now = time.monotonic()
        self.progress["seconds"] += now - self.mark
        self.committed += self.lines
        self.mark, self.lines = now, []
        self.state = {**self.progress, "dropped": copy.deepcopy(self.tally.dropped)}

    def write_if_due(self) -> None:
        """Writes a part where the last one is long enough ago."""
        if self.state and self.state["seconds"] - self.written >= SECONDS:
            self.write()

    def write(self) -> None:
        """Writes what is committed as a part; without rows it has another name, since a file of rows is never empty."""
        if self.state and jax.process_index() == 0:
            self.artefact.add(".jsonl" if self.committed else ".none", "".join(self.committed).encode(), **self.state)
        self.written, self.committed, self.state = self.state.get("seconds", self.written), [], {}

    def line(self) -> str:
        """The counts, in a line."""
        rows, prompts = self.progress["rows"], self.progress["prompts"]
        return f"{self.plan.name}: {rows:,} rows kept of {prompts * self.group:,} completions of {prompts:,} prompts"
