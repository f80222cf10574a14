"""Countdown: write an expression for a target from a list of numbers, each used exactly once.

    task=dict(name="countdown", sizes=(3,), largest=20)

`brief=True` writes a problem as `17,1,9=136`, for models that have never read a sentence; `tasks.countdown.tokenizer` has a
token for each character of it.

Problems are endless and have many answers: a completion is right if its expression has the target's value. The reward never
executes what it reads. It parses numbers, + - * / and parentheses itself, computes with exact fractions, and returns False for
anything else: a number that is missing or used twice, a sign before a number, a division by zero, text after the expression.
"Exactly once" is the rule that most language models are trained with; the television game lets numbers be left out.

A problem is made backwards: numbers are drawn and joined at random until one value is left, the target. So each problem has a
solution in which every intermediate value is a positive whole number; `conversation` shows it. A hash of the sorted numbers and
the target decides whether a problem is for training or testing (about one in ten). A cell of the results' table is a count of
numbers.
"""

import itertools
import re
from collections.abc import Sequence
from fractions import Fraction
from types import SimpleNamespace

from jaxpost import tokenizer as tokenizers
from jaxpost.errors import UserError
from jaxpost.tasks.arithmetic import SPLITS, hashed

HIGHEST = 999  # target

_MOST = 1000  # characters of an expression
_STEP = re.compile(r"\s*(?:([0-9]{1,9})|([-+*/()]))")
_SPELLED = str.maketrans("×÷−", "*/-")
_BINDS = {"+": 1, "-": 1, "*": 2, "/": 2}
_APPLY = {"+": lambda a, b: a + b, "-": lambda a, b: a - b, "*": lambda a, b: a * b, "/": lambda a, b: a / b}
_ATOM = 3  # binds closer than any operator


def make(*, sizes: Sequence[int] = (3, 4), largest: int = 99, brief: bool = False) -> SimpleNamespace:
    """The task with problems of `sizes` numbers (2 to 6, all equally often), drawn from 1 to `largest`; brief: as numbers
    alone, and demonstrations as expressions alone.

    Raises UserError for sizes or a largest number (10 to 999) out of range.
    """
    if not sizes or len(set(sizes)) != len(sizes) or not all(size in range(2, 7) for size in sizes):
        raise UserError(f"task countdown, sizes={tuple(sizes)}: give different numbers from 2 to 6")
    if not 10 <= largest <= HIGHEST:
        raise UserError(f"task countdown, largest={largest}: give 10 to {HIGHEST}")

    def record(index, *, split="train", seed=0):
        """Problem number `index` of an endless stream: a dict with prompt, numbers, target, answer (one of the solutions) and
        cell (how many numbers). Raises UserError for an unknown split."""
        if split not in SPLITS:
            raise UserError(f"split={split!r}: countdown has the splits {' and '.join(SPLITS)}")
        return written(_drawn(sizes[hashed("size", seed, split, index) % len(sizes)], largest, split, seed, index))

    def written(problem):
        listed = ",".join(map(str, problem["numbers"]))
        return {**problem, "prompt": f"{listed}={problem['target']}"} if brief else problem

    def conversation(index, *, seed=0):
        """A solution of training problem `index`, as `messages`; the other columns are those of its record."""
        columns = record(index, seed=seed)
        turns = {"user": columns.pop("prompt"), "assistant": demonstration(index, seed=seed)}
        return {"messages": [{"role": role, "content": text} for role, text in turns.items()], **columns}

    def demonstration(index, *, seed=0):
        """The solution of training problem `index`, in <answer> tags or, if brief, without."""
        answer = record(index, seed=seed)["answer"]
        return answer if brief else f"<answer>{answer}</answer>"

    def test_records(per_cell, *, seed=0):
        """`per_cell` different test problems of each size, or fewer if there are hardly more, in an order fixed by `seed`. A
        larger `per_cell` extends each size's list."""
        if per_cell < 1:
            raise UserError(f"per_cell={per_cell}: at least one test problem a cell is needed")
        return [written(problem) for size in sizes for problem in _different(size, largest, seed, per_cell)]

    functions = {"record": record, "test_records": test_records, "reward": reward, "extract": extract}
    return SimpleNamespace(conversation=conversation, demonstration=demonstration, **functions)


def tokenizer():
    """One token for each character of a brief problem and of an expression, and the four special ones: 22 ids."""
    return tokenizers.characters("0123456789+-*/(),=")


def reward(record, completion) -> bool:
    """Whether the completion's expression equals the record's `target` and uses each of its `numbers` once.

    Only "= " and the target may follow it. Never raises.
    """
    expression, equals, claimed = (extract(completion) or "").partition("=")
    if equals and claimed != str(record["target"]):
        return False
    result = value(expression, record["numbers"])
    return result is not None and result == record["target"]


def extract(completion: str) -> str | None:
    """The text of the last <answer>...</answer>, or the whole completion, without white space; None if empty or too long."""
    before, closed, _ = completion.rpartition("</answer>")
    _, opened, inside = before.rpartition("<answer>")
    text = inside if closed and opened else completion
    return "".join(text.translate(_SPELLED).split()) or None if len(text) <= _MOST else None


def value(expression: str, numbers: Sequence[int]) -> Fraction | None:
    """The value of an expression of exactly these whole numbers, each used once; None if invalid or it divides by zero."""
    steps = _steps(expression)
    if steps is None or sorted(step for step in steps if isinstance(step, int)) != sorted(numbers):
        return None
    values, waiting, after_value = [], [], False
    try:
        for step in (*steps, None):  # None: the end, which closes everything
            if isinstance(step, int) or step == "(":
                if after_value:
                    return None
                (values if isinstance(step, int) else waiting).append(Fraction(step) if isinstance(step, int) else step)
                after_value = isinstance(step, int)
                continue
            if not after_value:
                return None
            while waiting and waiting[-1] != "(" and _BINDS[waiting[-1]] >= _BINDS.get(step, 0):
                b, a = values.pop(), values.pop()
                values.append(_APPLY[waiting.pop()](a, b))
            if step == ")":
                if not waiting:
                    return None
                waiting.pop()
            elif step is not None:
                waiting.append(step)
                after_value = False
    except ZeroDivisionError:
        return None
    return values[0] if not waiting else None


def _steps(expression: str) -> list[int | str] | None:
    """The numbers and signs of an expression; None if it has anything else or is too long."""
    place, steps, text = 0, [], expression.translate(_SPELLED).rstrip()
    if len(text) > _MOST:
        return None
    while place < len(text):
        if (match := _STEP.match(text, place)) is None:
            return None
        steps.append(int(match[1]) if match[1] else match[2])
        place = match.end()
    return steps


def _drawn(size: int, largest: int, split: str, seed: int, index: int) -> dict:
    for draw in itertools.count():
        parts = (size, largest, split, seed, index, draw)
        numbers = [1 + hashed("number", *parts, place) % largest for place in range(size)]
        target, solution = _joined(numbers, parts)
        held = "test" if hashed("countdown", *sorted(numbers), target) % 10 == 0 else "train"
        if target <= HIGHEST and held == split:
            break
    listed = f"{', '.join(map(str, numbers[:-1]))} and {numbers[-1]}"
    prompt = (
        f"Make {target} from the numbers {listed}. Use each exactly once, with + - * / and parentheses. "
        "Put the expression between <answer> and </answer>."
    )
    return {"prompt": prompt, "numbers": numbers, "target": target, "answer": solution, "cell": str(size)}


def _different(size: int, largest: int, seed: int, count: int) -> list[dict]:
    problems = {}
    for index in range(20 * count):  # bounded: the last of few possible problems may take forever to draw
        problem = _drawn(size, largest, "test", seed, index)
        problems.setdefault((*sorted(problem["numbers"]), problem["target"]), problem)
        if len(problems) == count:
            break
    return list(problems.values())


def _joined(numbers: Sequence[int], parts: tuple) -> tuple[int, str]:
    """(value, expression): the numbers joined two by two at random; every intermediate value is a positive whole number."""
    left = [(number, str(number), _ATOM) for number in numbers]
    for turn in itertools.count():
        if len(left) == 1:
            return left[0][0], left[0][1]
        a = left.pop(hashed("first", *parts, turn) % len(left))
        b = left.pop(hashed("second", *parts, turn) % len(left))
        a, b = max(a, b), min(a, b)
        signs = ["+", "*"] + ["-"] * (a[0] > b[0]) + ["/"] * (b[0] > 1 and a[0] % b[0] == 0)
        sign = signs[hashed("sign", *parts, turn) % len(signs)]
        binds = _BINDS[sign]
        texts = (f"({x[1]})" if x[2] < limit else x[1] for x, limit in ((a, binds), (b, binds + (sign in "-/"))))
        left.append((int(_APPLY[sign](Fraction(a[0]), b[0])), sign.join(texts), binds))
