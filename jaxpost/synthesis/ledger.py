"""What a synthesis has made so far: rows, what was dropped and why, and how far it is. Written in parts, each with all that a
later run goes on from, so a killed one loses what came after its last part and repeats nothing.
"""

import copy
import json
import sys
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxpost.data.readers import Record
from jaxpost.errors import UserError
from jaxpost.recipe import plain
from jaxpost.storage.artefacts import Artefact
from jaxpost.synthesis import rows
from jaxpost.synthesis.endpoint import Answer
from jaxpost.synthesis.pool import Pool

SECONDS = 20.0  # between parts: what a kill costs
IDLE = 100  # prompts without a new row, and a pass over all records without one, after which a synthesis with a budget ends
START = {"draws": 0, "asked": 0, "rows": 0, "tokens": 0, "failures": 0, "last": 0, "seconds": 0.0}


class Draw(NamedTuple):
    """A record to be asked: its messages, None where they are left out; repeat: how often it was asked before, and how many
    equal records come before it; key: uint32 [2], of what its prompt draws.
    """

    number: int
    record: Record
    asked: list[dict] | None
    repeat: tuple[int, int]
    key: np.ndarray


class Ledger:
    """The rows and the counts of a synthesis (stages.synthesis.Synthesis); what is committed is written.

    progress: draws that are done, prompts asked, rows kept, tokens of completions, failures of functions, the draw of the last
    row, and seconds.
    """

    def __init__(self, plan: Any, artefact: Artefact, progress: dict[str, float]):
        self.plan, self.artefact, self.progress = plan, artefact, dict(progress)
        self.budget, self.group = plan.settings.budget, plan.settings.rollouts.group
        self.budgeted = any(plain(self.budget).values())
        files = sorted(artefact.folder.glob("part-*.jsonl")) if artefact.folder.exists() else []
        kept = [json.loads(line) for file in files for line in file.read_text().split("\n") if line]
        self.pool = Pool([record.row for record in plan.records], kept)
        self.tally = rows.Tally(artefact.parts[-1]["progress"].get("dropped") if artefact.parts else None)
        self.lines: list[str] = []  # of rows that are not committed
        self.committed: list[str] = []  # of rows that are not written
        self.state: dict = {}  # what is written with them
        self.mark, self.written = time.monotonic(), progress["seconds"]

    def take(self, draw: Draw, answers: Sequence[Answer]) -> None:
        """Takes the answers to a draw, up to the row that the budget ends with."""
        self._at(draw)
        self.progress["asked"] += 1
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
        functions, place = self.plan.functions, draw.record.place
        try:
            made = rows.parsed(functions.parser, text, draw.record.row, draw.asked)
            if isinstance(made, str):
                self.tally.add(made, place, text)
            for row in () if isinstance(made, str) else made:
                if self._is_full():
                    return
                if reason := rows.refused(functions.filters, row, self.pool):
                    self.tally.add(reason, place, row)
                else:
                    self.pool.add(row)
                    self.lines.append(json.dumps(row, ensure_ascii=False) + "\n")
                    self.progress |= {"rows": self.progress["rows"] + 1, "last": draw.number + 1}
        except UserError:
            raise
        except Exception as error:  # of somebody's function
            self.progress["failures"] += 1
            self.tally.add(f"the parser or a filter failed with {type(error).__name__}", place, text)
            completions = self.progress["asked"] * self.group
            limit = self.plan.settings.rollouts.failures
            rows.check_failures(self.progress["failures"], completions, limit, place, error)

    def leave_out(self, draw: Draw) -> None:
        """Counts a record that cannot be asked."""
        self._at(draw)
        self.tally.add("cannot be asked", draw.record.place, draw.record.row)

    def _is_full(self) -> bool:
        return 0 < self.budget.rows <= self.progress["rows"]

    def prompts_left(self) -> int:
        """How many prompts the budget has completions for."""
        return self.budget.completions // self.group - self.progress["asked"] if self.budget.completions else sys.maxsize

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
        self.mark, self.committed, self.lines = now, self.committed + self.lines, []
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
        """What was made, in a line."""
        asked = self.progress["asked"]
        kept = f"{self.progress['rows']:,} rows kept of {asked * self.group:,} completions of {asked:,} prompts"
        return f"{self.plan.name}: {kept}"
