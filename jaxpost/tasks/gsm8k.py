"""GSM8K: grade-school word problems with worked solutions ("Training Verifiers to Solve Math Word Problems").

    task=dict(name="gsm8k", data="train.jsonl", test="test.jsonl")
    task=dict(name="gsm8k", data="tfds:gsm8k/train", test="tfds:gsm8k/test")

A row has a `question` and an `answer`, a solution that ends in a line such as "#### 18". Other problems of this form, in any
file that data/readers.py reads, work too. Without `test` a hash of the question holds out about one row in ten, so that no
order and no seed can bring it into training. With `test`, training rows whose question is in it are left out.

The solutions have calculator marks such as <<48/2=24>>. These are removed, so that a demonstration reads as a person would
write it. Its last line stays, and the prompt asks for it.

Training goes through all rows in a shuffled order, once each, then again in another order.
"""

import functools
import re
from collections.abc import Mapping
from types import SimpleNamespace

import numpy as np

from jaxpost.data import readers
from jaxpost.errors import UserError
from jaxpost.rewards import answers, math
from jaxpost.tasks.arithmetic import SPLITS, hashed

INSTRUCTION = "Think step by step. End with a line that has only the answer: #### <number>"

_CALCULATOR = re.compile(r"<<[^<>]*>>")


def make(*, data, test="") -> SimpleNamespace:
    """The task over the rows of `data`, tested on those of `test`, or on a tenth of `data` if that is empty.

    Each is one or several paths (see data/readers.py). Raises UserError if a row has no question or no answer after ####, and
    if nothing is left to train or test on.
    """
    rows = _records(data)
    if test:
        held = _records(test)
        test_questions = {_same(row["question"]) for row in held}
        parts = {"train": [row for row in rows if _same(row["question"]) not in test_questions], "test": held}
    else:
        splits = [SPLITS[hashed("gsm8k", _same(row["question"])) % 10 == 0] for row in rows]
        parts = {name: [row for row, split in zip(rows, splits, strict=True) if split == name] for name in SPLITS}
    for name, part in parts.items():
        if not part:
            raise UserError(f"task gsm8k: of {data} no row is left for the {name} split; give more rows, or other files")

    def record(index, *, split="train", seed=0):
        """Row number `index` of a split, in an order by `seed` that differs in each pass over the rows."""
        if split not in parts:
            raise UserError(f"split={split!r}: gsm8k has the splits {' and '.join(SPLITS)}")
        again, place = divmod(index, len(parts[split]))
        return dict(parts[split][_order(len(parts[split]), split, seed, again)[place]])

    def conversation(index, *, seed=0):
        """The worked solution of training row `index`, as `messages`; the other columns are those of its record."""
        columns = record(index, seed=seed)
        turns = {"user": columns.pop("prompt"), "assistant": columns.pop("solution")}
        return {"messages": [{"role": role, "content": text} for role, text in turns.items()], **columns}

    def demonstration(index, *, seed=0):
        """The worked solution of training row `index`."""
        return record(index, seed=seed)["solution"]

    def test_records(per_cell, *, seed=0):
        """`per_cell` test problems, or all if there are fewer, in an order fixed by `seed`. A larger one extends the list."""
        if per_cell < 1:
            raise UserError(f"per_cell={per_cell}: at least one test problem is needed")
        return [record(index, split="test", seed=seed) for index in range(min(per_cell, len(parts["test"])))]

    functions = {"record": record, "test_records": test_records, "reward": math.numeric, "extract": extract}
    return SimpleNamespace(conversation=conversation, demonstration=demonstration, **functions)


def extract(completion: str) -> str | None:
    """A completion's answer: its number in canonical spelling, else the text that it marks; None if there is none.

    Equal numbers in different spellings count as the same vote.
    """
    if (number := math.extract(completion)) is not None:
        return number
    part = answers.marked(completion, digits=True)
    return (" ".join(part.text.casefold().split()) or None) if part.kind != "none" else None


def parsed(row: Mapping, place: str) -> dict:
    """prompt, question, answer (the number after ####, as the row spells it) and solution (without calculator marks) of a row.

    Raises UserError, with place, if the row lacks one of them.
    """
    question, worked = row.get("question"), row.get("answer")
    if not isinstance(question, str) or not isinstance(worked, str):
        raise UserError(f"{place}: has no texts `question` and `answer`; its keys are {', '.join(row)}")
    solution = _CALCULATOR.sub("", worked).strip()
    answer = solution.rpartition("####")[2].strip()
    if "####" not in solution or answers.value(answer, alone=True) is None:
        raise UserError(f"{place}: its answer does not end in #### and a single number; it ends in {worked[-40:]!r}")
    question = question.strip()
    return {"prompt": f"{question}\n{INSTRUCTION}", "question": question, "answer": answer, "solution": solution}


def _records(path) -> list[dict]:
    return [parsed(record.row, record.place) for record in readers.read(path)]


def _same(question: str) -> str:
    return " ".join(question.casefold().split())


@functools.lru_cache(maxsize=4)
def _order(count: int, split: str, seed: int, again: int) -> list[int]:
    """The order of the rows of a split in pass number `again`."""
    # RandomState, since NumPy guarantees its stream; a Generator's may change between releases.
    return np.random.RandomState(hashed("gsm8k", split, seed, again) % 2**32).permutation(count).tolist()
