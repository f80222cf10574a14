"""Combination lock: a code of digits that a letter each stands for, and no reward but for the whole code.

    task=dict(name="lock", depths=(1, 2, 3, 4))

A problem is letters, such as `gcab`, and the answer the digit of each, `7120`. Which digit a letter has is the lock's secret,
the same in all problems: a permutation of ten. So a random answer to a problem of depth n is right once in 10^n, and a policy
that reward alone teaches finds the short codes first. A demonstration shows a whole code; a share of them, `corrupt`, has one
wrong digit.

With lock=None each problem is of a lock of its own. A model that learns from such demonstrations knows what a code looks like,
and no digit. A hash of the letters decides whether a problem is for training or testing (one in ten). A cell of the results'
table is a depth.
"""

import itertools
from collections.abc import Sequence
from types import SimpleNamespace

from jaxpost import tokenizer as tokenizers
from jaxpost.errors import UserError
from jaxpost.tasks.arithmetic import SPLITS, hashed

LETTERS = "abcdefghij"
DEEPEST = 8


def make(*, depths: Sequence[int] = (1, 2, 3, 4), corrupt: float = 0.0, lock: int | None = 0) -> SimpleNamespace:
    """The task with codes of `depths` digits (1 to 8, all equally often). corrupt: the share of demonstrations with a wrong
    digit; lock: the seed of its secret, None for another at each problem.

    Raises UserError for depths or a share out of range.
    """
    if not depths or len(set(depths)) != len(depths) or not all(depth in range(1, DEEPEST + 1) for depth in depths):
        raise UserError(f"task lock, depths={tuple(depths)}: give different numbers from 1 to {DEEPEST}")
    if not 0 <= corrupt <= 1:
        raise UserError(f"task lock, corrupt={corrupt}: give a share, from 0 to 1")

    def record(index, *, split="train", seed=0):
        """Problem number `index` of an endless stream: a dict with prompt, answer and cell (its depth). Problems may repeat.
        Raises UserError for an unknown split."""
        if split not in SPLITS:
            raise UserError(f"split={split!r}: lock has the splits {' and '.join(SPLITS)}")
        return _drawn(depths[hashed("depth", seed, split, index) % len(depths)], lock, split, seed, index)

    def demonstration(index, *, seed=0):
        """The code of training problem `index`, or one with a wrong digit."""
        answer = record(index, seed=seed)["answer"]
        if hashed("corrupt", seed, index) / 2**64 >= corrupt:
            return answer
        place, further = hashed("place", seed, index) % len(answer), 1 + hashed("digit", seed, index) % 9
        return answer[:place] + str((int(answer[place]) + further) % 10) + answer[place + 1 :]

    def conversation(index, *, seed=0):
        """The demonstration of training problem `index`, as `messages`; the other columns are those of its record."""
        columns = record(index, seed=seed)
        turns = {"user": columns.pop("prompt"), "assistant": demonstration(index, seed=seed)}
        return {"messages": [{"role": role, "content": text} for role, text in turns.items()], **columns}

    def test_records(per_cell, *, seed=0):
        """`per_cell` different test problems of each depth, or fewer if there are hardly more, in an order fixed by `seed`. A
        larger `per_cell` extends each depth's list."""
        if per_cell < 1:
            raise UserError(f"per_cell={per_cell}: at least one test problem a cell is needed")
        return [problem for depth in depths for problem in _different(depth, lock, seed, per_cell)]

    functions = {"record": record, "test_records": test_records, "reward": reward}
    return SimpleNamespace(conversation=conversation, demonstration=demonstration, **functions)


def reward(record, completion) -> bool:
    """Whether the completion is the record's code, and nothing else."""
    return completion.strip() == record["answer"]


def tokenizer():
    """One token for each letter and digit, and the four special ones: 24 ids."""
    return tokenizers.characters(LETTERS + "0123456789")


def digits(lock: int) -> dict[str, str]:
    """letter -> its digit, the lock's secret."""
    order = sorted(range(10), key=lambda digit: hashed("lock", lock, digit))
    return {letter: str(digit) for letter, digit in zip(LETTERS, order, strict=True)}


def _drawn(depth, lock, split, *parts):
    """The problem of a depth that `parts` name."""
    for draw in itertools.count():
        letters = "".join(LETTERS[hashed("letter", split, *parts, draw, place) % 10] for place in range(depth))
        if ("test" if hashed("problem", letters) % 10 == 0 else "train") == split:
            secret = digits(hashed("own", split, *parts) if lock is None else lock)
            return {"prompt": letters, "answer": "".join(secret[letter] for letter in letters), "cell": depth}


def _different(depth, lock, seed, count):
    """Test problems of a depth, each once."""
    seen: dict[str, dict] = {}
    for index in range(20 * count):
        problem = _drawn(depth, lock, "test", seed, "listed", depth, index)
        seen.setdefault(problem["prompt"], problem)
        if len(seen) == count:
            break
    return list(seen.values())
