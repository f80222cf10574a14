"""GSM8K: grade-school word problems with worked solutions ("Training Verifiers to Solve Math Word Problems").

    task=dict(name="gsm8k", data="train.jsonl", test="test.jsonl")
    task=dict(name="gsm8k", data="tfds:gsm8k/train", test="tfds:gsm8k/test")

A row has a `question`, and an `answer`: a solution that ends in a line such as "#### 18". Any file that data/readers.py reads
will do, and so will other problems of the same form. Where no `test` is named, about one row in ten is held out, chosen by a
hash of its question, so that no order and no seed can bring it into training; where one is, training rows with a question of it
are left out.

The solutions carry marks such as <<48/2=24>>, by which their authors' calculator was called. Nobody calls it here: they are
taken out, so that a demonstration is what a person would write. Its last line stays as it is, and the prompt asks for it.

Training goes through all rows, each once, in an order of its own, and then through all again in another.
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
    """The task over the rows of `data`, tested on those of `test`, each a path or several (see data/readers.py); where `test`
    is empty, on a tenth of data.

    Raises UserError where a row has no question or no answer after ####, and where nothing is left to train or to test on.
    """
    rows = _records(data)
    if test:
        held = _records(test)
        seen = {_same(found["question"]) for found in held}
        parts = {"train": [found for found in rows if _same(found["question"]) not in seen], "test": held}
    else:
        split = [SPLITS[hashed("gsm8k", _same(found["question"])) % 10 == 0] for found in rows]
        parts = {name: [found for found, own in zip(rows, split, strict=True) if own == name] for name in SPLITS}
    for name, found in parts.items():
        if not found:
            raise UserError(f"task gsm8k: of {data} no row is left for the {name} split; give more rows, or other files")

    def record(index, *, split="train", seed=0):
        """Row number `index` of a split in the order of `seed`, again from the beginning, in another order, after the last."""
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
        """`per_cell` test problems, or all if there are fewer, in an order fixed by `seed`; more of them extend the list."""
        if per_cell < 1:
            raise UserError(f"per_cell={per_cell}: at least one test problem is needed")
        return [record(index, split="test", seed=seed) for index in range(min(per_cell, len(parts["test"])))]

    asked = {"record": record, "test_records": test_records, "reward": math.numeric, "extract": extract}
    return SimpleNamespace(conversation=conversation, demonstration=demonstration, **asked)


def extract(completion: str) -> str | None:
    """What a completion gives as its answer: the one spelling of its number, else the text that it marks; None if there is
    none. Answers that are spelled differently and equal have one vote between them."""
    if (number := math.extract(completion)) is not None:
        return number
    part = answers.marked(completion, digits=True)
    return (" ".join(part.text.casefold().split()) or None) if part.kind != "none" else None


def parsed(row: Mapping, place: str) -> dict:
    """prompt, question, answer (the number after ####, as the row spells it) and solution (without calculator marks) of a row.

    Raises UserError, with place, where the row has none of them.
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
    return [parsed(found.row, found.place) for found in readers.read(path)]


def _same(question: str) -> str:
    return " ".join(question.casefold().split())


@functools.lru_cache(maxsize=4)
def _order(count: int, split: str, seed: int, again: int) -> list[int]:
    """The order of the rows of a split, the `again`-th time."""
    # RandomState, since NumPy promises its stream for good; a Generator's may change between releases.
    return np.random.RandomState(hashed("gsm8k", split, seed, again) % 2**32).permutation(count).tolist()
