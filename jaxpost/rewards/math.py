r"""Right or wrong: what a completion gives as its answer, against record["answer"].

    exact      the same text, but for case, white space, quotes, LaTeX's fonts and a final full stop
    numeric    the same number, as an exact fraction
    verify     the same mathematics, as the package math-verify sees it (extra [rewards]), in a process that is killed

Which part of a completion is its answer, and which text is a number, stands in rewards/answers.py. record["answer"] is read
the same way, so that a whole solution of GSM8K may stand there; without a mark it is nothing but the answer. A percentage is
equal to the number before its sign and to a hundredth of it: 50% to 50 and to 0.5.
"""

import functools
import re
import unicodedata

from jaxpost.errors import UserError
from jaxpost.rewards import answers, formulas, sandbox


def exact(record: dict, completion: str) -> bool:
    """Whether the completion's answer is record["answer"]: as text, but for case, white space, quotes, fonts and a final full
    stop.

    Raises UserError for a record without an answer.
    """
    return _normal(answers.marked(completion).text) == _normal(answers.marked(_answer(record)).text)


def numeric(record: dict, completion: str) -> bool:
    """Whether the completion's answer is the number in record["answer"], exactly.

    Raises UserError for a record without an answer, and ValueError for one whose answer is no single number.
    """
    _check(record)
    given = answers.value(completion)
    return given is not None and given.equals(_right(_answer(record)))


def _check(record: dict) -> None:
    """Raises what `numeric` raises for a record, which needs no completion."""
    if _right(_answer(record)) is None:
        raise ValueError(
            f"the record's answer {_answer(record)[:60]!r} is no single number; rewards.math.verify compares mathematics, "
            "rewards.math.exact texts."
        )


numeric.check = _check


def verify(record: dict, completion: str, *, seconds: float = 5.0) -> bool:
    """Whether the completion's answer is mathematically that of record["answer"] (a number, LaTeX with or without its dollars,
    or a solution that marks one), as math-verify finds within `seconds`. Two numbers are compared as `numeric` does; a ratio, a
    time, a date, a range, a number with its base and what is said in words as `exact` does, but for spaces and braces.

    Raises UserError for a record without an answer and where math-verify is not installed, TimeoutError where the time ran out,
    and RuntimeError for an answer of the record's that it cannot read.
    """
    texts = [_answer(record), completion]
    return sandbox.call("jaxpost.rewards.math:_same", args=texts, seconds=seconds, package="math_verify")


verify.in_process = True  # it has a process of its own
verify.ready = lambda **_: sandbox.warm(module="jaxpost.rewards.math", package="math_verify")


def extract(text: str) -> str | None:
    """The number that `numeric` takes for a text's answer, in the one spelling of its value; None where there is none."""
    number = answers.value(text)
    return None if number is None else answers.spelled(number)


def _answer(record: dict) -> str:
    if record.get("answer") is None:
        raise UserError(f"record with the keys {', '.join(record)}: it has no answer to compare with; add an `answer` column.")
    return str(record["answer"])


@functools.lru_cache(maxsize=1024)
def _right(answer: str) -> answers.Number | None:
    return answers.value(answer, alone=True)


# LaTeX that sets words or letters in a font, innermost first; \mathbb and \mathcal mean something.
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
    # As mathematics first: in x^2 - 1 as text it would find a 1. Its own timers are off: a loop in C does not hear them.
    for text in (answer,) if "$" in answer else (f"${answer}$", answer):
        if expressions := parse(text, parsing_timeout=None):
            return expressions
    return []


def _bare(text: str) -> str:
    return re.sub(r"[\s{}]", "", _normal(text).replace("\\left", "").replace("\\right", ""))


def _same(answer: str, completion: str) -> bool:
    """Runs in the child."""
    from math_verify import verify as equal

    given, right = answers.value(completion), _right(answer)
    if given is not None and right is not None:
        return given.equals(right)
    part, wanted = answers.marked(completion), answers.marked(answer).text
    sentence = answers.marked(completion, digits=True).text if part.kind == "words" else part.text
    if _bare(wanted) and _bare(wanted) in (_bare(part.text), _bare(sentence)):
        return True
    if formulas.in_words(wanted):
        return False
    formula = part.text if part.kind in ("box", "line", "tag") else formulas.spoken(sentence, whole=right is not None)
    if right is not None and (not formulas.evaluates(formula) or answers.value(formula, alone=True) is not None):
        return False  # words around a number deny or change it
    return bool(equal(_read(answer), _parsed(formula), timeout_seconds=None))
