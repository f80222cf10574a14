r"""Right or wrong: a completion's answer compared with record["answer"].

    exact      the same text, but for case, white space, quotes, LaTeX's fonts and a final full stop
    numeric    the same number, as an exact fraction
    verify     the same mathematics, as the package math-verify sees it (extra [rewards]), in a process that is killed

rewards/answers.py says which part of a completion is its answer, and which text is a number. record["answer"] is read the same
way, so it may be a whole solution of GSM8K; without a mark all of it is the answer. A percentage equals the number before its
sign and a hundredth of it: 50% equals 50 and 0.5.
"""

import functools
import re
import unicodedata

from jaxpost.errors import UserError
from jaxpost.rewards import answers, formulas, sandbox


def exact(record: dict, completion: str) -> bool:
    """Whether the completion's answer is record["answer"] as text, ignoring case, white space, quotes, fonts and full stop.

    Raises UserError for a record without an answer.
    """
    return _normal(answers.marked(completion).text) == _normal(answers.marked(_answer(record)).text)


def numeric(record: dict, completion: str) -> bool:
    """Whether the completion's answer is the number in record["answer"], exactly.

    Raises UserError for a record without an answer, and ValueError for one whose answer is no single number.
    """
    _check(record)
    number = answers.value(completion)
    return number is not None and number.equals(_right(_answer(record)))


def _check(record: dict) -> None:
    """Raises the errors of `numeric` that concern the record alone."""
    if _right(_answer(record)) is None:
        raise ValueError(
            f"the record's answer {_answer(record)[:60]!r} is no single number; rewards.math.verify compares mathematics, "
            "rewards.math.exact texts."
        )


numeric.check = _check


def verify(record: dict, completion: str, *, seconds: float = 5.0) -> bool:
    """Whether the completion's answer equals record["answer"] mathematically, as math-verify decides within `seconds`.

    record["answer"] is a number, LaTeX with or without dollars, or a solution that marks one. Two numbers are compared as in
    `numeric`. A ratio, a time, a date, a range, a number with its base and words are compared as in `exact`, ignoring spaces
    and braces. Raises UserError for a record without an answer and where math-verify is not installed, TimeoutError when the
    time runs out, and RuntimeError for a record's answer that it cannot read.
    """
    texts = [_answer(record), completion]
    return sandbox.call("jaxpost.rewards.math:_same", args=texts, seconds=seconds, package="math_verify")


verify.in_process = True  # it runs in its own child process
verify.ready = lambda **_: sandbox.warm(module="jaxpost.rewards.math", package="math_verify")


def extract(text: str) -> str | None:
    """The number that `numeric` reads as a text's answer, in one canonical spelling; None if there is none."""
    number = answers.value(text)
    return None if number is None else answers.spelled(number)


def _answer(record: dict) -> str:
    if record.get("answer") is None:
        raise UserError(f"record with the keys {', '.join(record)}: it has no answer to compare with; add an `answer` column.")
    return str(record["answer"])


@functools.lru_cache(maxsize=1024)
def _right(answer: str) -> answers.Number | None:
    return answers.value(answer, alone=True)


# LaTeX fonts of words and letters, innermost first. \mathbb and \mathcal have a meaning and stay.
_FONT = re.compile(r"\\(?:text(?:bf|it|rm|sf|tt|sc|normal|up)?|math(?:rm|bf|it|sf|tt)|mbox|emph) ?\{([^{}]*)\}")


def _normal(text: str) -> str:
    for _ in range(3):
        text = _FONT.sub(r"\1", text)
    text = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    return text.strip("\"'`*$ ").removesuffix(".").strip("\"'`*$ ")


@functools.lru_cache(maxsize=1024)
def _read(answer: str) -> list:
    answer = answers.marked(answer).text
    if expressions := _parsed(answer):
        return expressions
    raise ValueError(f"math-verify cannot read the record's answer {answer[:60]!r}")


def _parsed(answer: str) -> list:
    from math_verify import parse

    answer = formulas.latex(answer)
    # As mathematics first: in x^2 - 1 as text it would find a 1. Its own timers are off: they cannot stop a loop in C.
    for text in (answer,) if "$" in answer else (f"${answer}$", answer):
        if expressions := parse(text, parsing_timeout=None):
            return expressions
    return []


def _bare(text: str) -> str:
    return re.sub(r"[\s{}]", "", _normal(text).replace("\\left", "").replace("\\right", ""))


def _same(answer: str, completion: str) -> bool:
    """Runs in the child."""
    from math_verify import verify as equal

    number, right = answers.value(completion), _right(answer)
    if number is not None and right is not None:
        return number.equals(right)
    part, gold = answers.marked(completion), answers.marked(answer).text
    sentence = answers.marked(completion, digits=True).text if part.kind == "words" else part.text
    if _bare(gold) and _bare(gold) in (_bare(part.text), _bare(sentence)):
        return True
    if formulas.in_words(gold):
        return False
    formula = part.text if part.kind in ("box", "line", "tag") else formulas.spoken(sentence, whole=right is not None)
    if right is not None and (not formulas.evaluates(formula) or answers.value(formula, alone=True) is not None):
        return False  # words around a number deny or change it
    return bool(equal(_read(answer), _parsed(formula), timeout_seconds=None))
