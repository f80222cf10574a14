"""Arithmetic: a task without a download, which a small model learns in minutes.

A problem is a user's message such as "12+34", and the assistant answers "46". There are nine kinds, the cells of one table:
three operators by one, two or three digits in both operands. The table fixes each cell's share of the training mix and of the
headline accuracy. Two-digit sums and differences have most of it: a small model learns them in two minutes, but not in one.
Three digits would take several times as long, and products of longer numbers are out of its reach. Their shares are small, so
that some cells stay unsolved.

The task serves three purposes. `conversation` gives demonstrations for supervised training, a set share of them with one digit
of the answer wrong. A model that imitates them is wrong that often when sampled, whatever its greedy answer. Reinforcement can
repair this, since `reward` checks the answer. `record` gives problems for rollouts and `test_records` for evaluation.

A hash of the problem itself decides whether it is for training or testing, so that no choice of seeds, indices or stages can
leak one into the other; a+b and b+a are on the same side. About one in ten is for testing: nine, ten and eight problems of the
one-digit cells. A held-out one-digit product can hardly be inferred from the others.

Everything is a function of its arguments: draws are hashes of (seed, index), and the test set is shuffled by a generator that
NumPy has frozen. There is no state, and results are the same on all platforms and releases.
"""

import hashlib
import itertools
from bisect import bisect_right

import numpy as np

from jaxpost import tokenizer as tokenizers
from jaxpost.errors import UserError

# (operator, digits of both operands) -> share of the training mix.
CELLS = {
    ("+", 1): 0.05,
    ("-", 1): 0.05,
    ("x", 1): 0.05,
    ("+", 2): 0.35,
    ("-", 2): 0.35,
    ("x", 2): 0.01,
    ("+", 3): 0.065,
    ("-", 3): 0.065,
    ("x", 3): 0.01,
}

SPLITS = ("train", "test")

_KINDS = tuple(CELLS)
_BOUNDS = tuple(itertools.accumulate(CELLS.values()))[:-1]


def hashed(*parts):
    """A 64-bit hash of the parts' text, the same on every machine."""
    text = " ".join(str(part) for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=8).digest(), "big")


def _uniform(*parts):
    return hashed(*parts) / 2**64


def _operands(digits):
    """(lowest operand, how many operands) of a cell."""
    return (0, 10) if digits == 1 else (10 ** (digits - 1), 9 * 10 ** (digits - 1))


def _split(a, operator, b):
    first, second = (b, a) if operator != "-" and b < a else (a, b)
    return "test" if hashed("problem", first, operator, second) % 10 == 0 else "train"


def _record(a, operator, b, digits):
    answer = a + b if operator == "+" else a - b if operator == "-" else a * b
    return {
        "prompt": f"{a}{operator}{b}",
        "answer": str(answer),
        "cell": f"{operator}{digits}",
        "operator": operator,
        "digits": digits,
        "a": a,
        "b": b,
    }


def record(index, *, split="train", seed=0):
    """Problem number `index` of an endless stream: a dict with prompt, answer, cell ("+2"), operator, digits, a and b.

    The cell is drawn by its share, so that the split does not change the mix; then operands are drawn until their hash is in
    `split`. Problems may repeat. Raises UserError for an unknown split.
    """
    if split not in SPLITS:
        raise UserError(f"split={split!r}: arithmetic has the splits {' and '.join(SPLITS)}")
    operator, digits = _KINDS[bisect_right(_BOUNDS, _uniform("cell", seed, split, index))]
    low, count = _operands(digits)
    for draw in itertools.count():
        a, b = (low + hashed(name, seed, split, index, draw) % count for name in "ab")
        if _split(a, operator, b) == split:
            return _record(a, operator, b, digits)


def _corrupt(answer, *parts):
    """`answer` with one digit replaced by another: a different number in its usual spelling."""
    places = [place for place, letter in enumerate(answer) if letter.isdigit()]
    place = places[hashed("place", *parts) % len(places)]
    # A leading zero ("046", "-0") is no usual spelling: the model could tell it from other mistakes.
    zero_allowed = place != places[0] or answer == answer[place]
    choices = [digit for digit in "0123456789" if digit != answer[place] and (digit != "0" or zero_allowed)]
    return answer[:place] + choices[hashed("digit", *parts) % len(choices)] + answer[place + 1 :]


def conversation(index, *, seed=0, corrupt=0.4):
    """The demonstration for training record `index`: its record's columns without the prompt, plus `messages` and `corrupted`.

    With probability `corrupt` the assistant's message is the answer with one digit wrong; `answer` stays the right one. The
    draw depends on the index and not on the problem, so a problem's right answer is its most frequent. Raises UserError if
    `corrupt` is not in 0..1.
    """
    if not 0 <= corrupt <= 1:
        raise UserError(f"corrupt={corrupt}: give a probability, between 0 and 1")
    columns = record(index, seed=seed)
    prompt, reply = columns.pop("prompt"), columns["answer"]
    corrupted = _uniform("corrupt", seed, index) < corrupt
    if corrupted:
        reply = _corrupt(reply, seed, index)
    messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": reply}]
    return {"messages": messages, "corrupted": corrupted, **columns}


def demonstration(index, *, seed=0):
    """The right answer to training record `index`."""
    return record(index, seed=seed)["answer"]


def test_records(per_cell, *, seed=0):
    """`per_cell` distinct test problems of each cell, or all of a smaller one (the one-digit cells have nine, ten and eight).

    Each has a `weight`, its cell's share over the number of its problems, so that a weighted mean is one over the mix. `seed`
    fixes the order, and a larger `per_cell` extends each cell's list. Raises UserError if it is below 1.
    """
    if per_cell < 1:
        raise UserError(f"per_cell={per_cell}: at least one test problem a cell is needed")
    cells = {kind: list(itertools.islice(_test_problems(*kind, seed), per_cell)) for kind in _KINDS}
    return [{**problem, "weight": CELLS[kind] / len(problems)} for kind, problems in cells.items() for problem in problems]


def _test_problems(operator, digits, seed):
    low, count = _operands(digits)
    # RandomState, since NumPy guarantees its stream; a Generator's may change between releases.
    shuffled = np.random.RandomState(hashed("test", seed, operator, digits) % 2**32).permutation(count * count)
    for a, b in ((low + int(number) // count, low + int(number) % count) for number in shuffled):
        if _split(a, operator, b) == "test":
            yield _record(a, operator, b, digits)


# Its name looks like a test to pytest when a test file imports it.
test_records.__test__ = False


def reward(record, completion) -> bool:
    """Whether `completion` (a string, white space around it ignored) is the record's answer and nothing else.

    Raises UserError if the record has no answer to compare with.
    """
    answer = record.get("answer")
    if answer is None:
        raise UserError(f"record {record}: has no answer, so its completions cannot be checked; add an `answer` column")
    return completion.strip() == answer


def tokenizer():
    """One token for each character of a problem, and the four special ones: 17 ids."""
    return tokenizers.characters("0123456789+-x")
