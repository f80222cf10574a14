"""A file of prompts, for reinforcement learning with the user's own reward.

    --config.data=prompts.jsonl --config.reward=mine.py:reward               with an RL recipe such as configs/grpo.py
    task=dict(name="prompts", data="prompts.jsonl", test="more.jsonl")       the same as a task

A row has a `prompt` (a text or a list of messages), or `messages`, without the answer at their end. All columns of the row are
the reward's record; `columns="prompt=problem,answer=solution"` renames columns. `data` is any file that data/readers.py reads,
or several with commas between them.

Without `test`, `held_out` of the prompts are kept for testing: a share below 1, or a number of different prompts. A hash of the
prompt chooses them, so that no order and no seed can bring one into training. With `test`, training rows whose prompt is in it
are left out. Training goes through all rows in a shuffled order, once each, then again in another order.
"""

import functools
import json
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import numpy as np

from jaxpost.data import mixture, readers
from jaxpost.errors import UserError
from jaxpost.tasks.arithmetic import SPLITS, hashed


def make(*, data: str, test: str = "", columns: Any = "", held_out: float = 0.1) -> SimpleNamespace:
    """The task over the rows of `data`; see above for the keywords.

    Raises UserError for a row without a prompt, and if nothing is left to train or test on.
    """
    names = mixture.pairs(columns, "task.columns")
    placed, placed_tests = _records(data, names), _records(test, names) if test else []
    rows, tests = ([row for row, _ in part] for part in (placed, placed_tests))
    order = sorted({_hash(row) for row in rows})
    count = int(held_out) if held_out >= 1 else round(held_out * len(order))
    kept = {_hash(row) for row in tests} or set(order[: max(count, 1)])
    parts = {"train": [row for row in rows if _hash(row) not in kept]}
    parts["test"] = tests or [row for row in rows if _hash(row) in kept]
    for name, part in parts.items():
        if not part:
            raise UserError(f"task prompts: of {data} no row is left for the {name} split; give more rows, or other files")

    def record(index: int, *, split: str = "train", seed: int = 0) -> dict:
        """Row number `index` of a split, in an order by `seed` that differs in each pass over the rows."""
        if split not in parts:
            raise UserError(f"split={split!r}: prompts has the splits {' and '.join(SPLITS)}")
        again, place = divmod(index, len(parts[split]))
        return dict(parts[split][_order(len(parts[split]), split, seed, again)[place]])

    def demonstration(index: int, *, seed: int = 0) -> str:
        """The answer in training row `index`: the assistant's last turn in its `messages`, or its `completion`.

        Raises UserError for a row without one.
        """
        row = record(index, seed=seed)
        turns = row["messages"] if isinstance(row.get("messages"), list) else [{}]
        last = turns[-1] if turns and isinstance(turns[-1], dict) else {}
        answer = last.get("content") if last.get("role") == "assistant" else row.get("completion")
        if not isinstance(answer, str):
            raise UserError(f"task prompts: row {index} has no answer to show; end its messages with one, or give a completion")
        return answer

    def test_records(per_cell: int, *, seed: int = 0) -> list[dict]:
        """`per_cell` test prompts, or all if there are fewer, in an order fixed by `seed`. A larger one extends the list."""
        if per_cell < 1:
            raise UserError(f"per_cell={per_cell}: at least one test prompt is needed")
        return [record(index, split="test", seed=seed) for index in range(min(per_cell, len(parts["test"])))]

    def placed_records() -> list[tuple[dict, str]]:
        """Every row of every file, with its place: file and row."""
        return [*placed, *placed_tests]

    functions = {"record": record, "test_records": test_records, "placed_records": placed_records}
    return SimpleNamespace(demonstration=demonstration, **functions)


def _records(paths: str, names: Mapping[str, str]) -> list[tuple[dict, str]]:
    records = readers.read([path.strip() for path in paths.split(",")])
    return [(_parsed(row, names, place), place) for row, place in records]


def _parsed(row: Mapping, names: Mapping[str, str], place: str) -> dict:
    """A row with its prompt under `prompt`. Raises UserError for a row without one."""
    if missing := [old for old in names.values() if old not in row]:
        raise UserError(f"{place}: has no column {missing[0]!r}, which columns names; its columns are {', '.join(row)}")
    row = {**row, **{new: row[old] for new, old in names.items()}}
    prompt = row.get("prompt")
    if prompt is None and isinstance(row.get("messages"), list):
        prompt = row["messages"]
        if prompt and isinstance(prompt[-1], dict) and prompt[-1].get("role") == "assistant":
            prompt = prompt[:-1]
    turns = isinstance(prompt, list) and all(
        isinstance(turn, dict) and isinstance(turn.get("role"), str) and isinstance(turn.get("content"), str) for turn in prompt
    )
    if not prompt or not (isinstance(prompt, str) or turns):
        raise UserError(
            f"{place}: has no prompt; give a text or a list of messages under `prompt`, or `messages`. Its columns are "
            f"{', '.join(row)}; task.columns=prompt=NAME takes another."
        )
    return {**row, "prompt": prompt}


def _hash(row: Mapping) -> int:
    prompt = row["prompt"]
    text = prompt if isinstance(prompt, str) else json.dumps([[turn["role"], turn["content"]] for turn in prompt])
    return hashed("prompts", " ".join(text.split()))


@functools.lru_cache(maxsize=4)
def _order(count: int, split: str, seed: int, again: int) -> list[int]:
    # RandomState, since NumPy guarantees its stream; a Generator's may change between releases.
    return np.random.RandomState(hashed("prompts", split, seed, again) % 2**32).permutation(count).tolist()
