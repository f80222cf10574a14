r"""Right or wrong: what a completion gives as its answer, against record["answer"].

    exact      the same text, but for case, white space, quotes and a final full stop
    numeric    the same number, as an exact fraction
    verify     the same mathematics, as the package math-verify sees it (extra [rewards]); in a process that is killed in time

**Which part of a completion is its answer.** A completion may mark it. Of these marks the first kind that is there decides, by
its last occurrence, even where what follows is no answer:

    \boxed{72}                     what is in the braces, which must close
    #### 72                        the rest of the line
    <answer>72</answer>            what is between the tags
    the answer is 72, answer: 72   what follows

Without a mark the answer is the whole completion, in which `numeric` takes the last number; so it does in braces and between
tags, and after the other two marks it takes the first. record["answer"] is read the same way, so that a whole solution of
GSM8K may stand there. `extract` shows what was found.

**Which text is a number.** Digits, with thousands separated by commas (1,234,567) or not; a sign, unless it stands between two
terms (12-5 ends in 5); a currency; decimals; an exponent of up to three digits; a fraction (3/4, \frac{3}{4}, 1 1/2). A
percentage is equal to the number before its sign and to a hundredth of it: 50% to 50 and to 0.5. What takes more than 500
characters is no number.
"""

import functools
import re
import unicodedata
from fractions import Fraction

from jaxpost.errors import UserError
from jaxpost.rewards import isolated

_DIGITS = r"(?:[0-9]{1,3}(?:,[0-9]{3})++(?![0-9])|[0-9]++)(?:\.[0-9]++)?|(?<![0-9])\.[0-9]++"
_NUMBER = re.compile(
    r"(?:(?<![\w.)\]}])[-+])?(?:[$€£¥₹][-+]?)?"
    rf"(?:[0-9]++ [0-9]++/[0-9]++|(?:{_DIGITS})(?:[eE][-+]?[0-9]++(?!\w))?(?: ?/ ?(?:{_DIGITS}))?)(?: ?%)?"
)
_MOST = 500
_FRACTION = re.compile(r"([0-9]?)\\[dtc]?frac *(?:\{ *([-+]?[0-9.]++) *\} *\{ *([0-9.]++) *\}|([0-9])([0-9]))")
_SAYS = re.compile(r"\banswer(?:\s++is\b|\s*+[:=])\**+:?", re.IGNORECASE)
_PLAIN = {"−": "-", "–": "-", "\\%": "%", "\\$": "$", "{,}": ",", "\\,": "", "\\!": "", "\\left": "", "\\right": ""}


def exact(record: dict, completion: str) -> bool:
    """Whether the completion's answer is record["answer"]: as text, but for case, white space, quotes and a final full stop.

    Raises UserError for a record without an answer.
    """
    return _normal(_marked(completion)[0]) == _normal(_marked(_answer(record))[0])


def numeric(record: dict, completion: str) -> bool:
    """Whether the completion's answer is the number in record["answer"], exactly; see the module's docstring.

    Raises UserError for a record without an answer, and ValueError for one whose answer has no number.
    """
    right = _value(extract(_answer(record)))
    if right is None:
        raise ValueError(f"the record's answer {_answer(record)[:60]!r} has no number; rewards.math.exact compares texts.")
    given = _value(extract(completion))
    if given is None:
        return False
    (a, of_hundred), (b, right_of_hundred) = given, right
    if of_hundred == right_of_hundred:
        return a == b
    return a == b or (a / 100 == b if of_hundred else a == b / 100)


def verify(record: dict, completion: str, *, seconds: float = 5.0) -> bool:
    """Whether the completion's answer is mathematically that of record["answer"] (a number, LaTeX with or without its dollars,
    or a solution that marks one), as math-verify finds within `seconds`.

    Raises UserError for a record without an answer and where math-verify is not installed, TimeoutError where the time ran out,
    and RuntimeError for an answer of the record's that it cannot read.
    """
    answers = [_answer(record), completion]
    return isolated.call("jaxpost.rewards.math:_same", args=answers, seconds=seconds, package="math_verify")


verify.in_process = True  # it has a process of its own
verify.ready = lambda **_: isolated.warm(module="jaxpost.rewards.math", package="math_verify")


def extract(text: str) -> str | None:
    """The number that `numeric` takes for a text's answer, as it is spelled there; None where there is none."""
    region, first = _marked(text)
    for old, new in _PLAIN.items():
        region = region.replace(old, new)
    region = _FRACTION.sub(lambda m: f"{m[1] and m[1] + ' '}{m[2] or m[4]}/{m[3] or m[5]}", region)
    found = None
    for match in _NUMBER.finditer(region):
        found = match[0].strip()
        if first:
            break
    return found


def _marked(text: str) -> tuple[str, bool]:
    """(the part of a text that it marks as its answer, or all of it; whether the answer is what that part begins with)."""
    if (boxed := _in_braces(text)) is not None:
        return boxed, False
    if (place := text.rfind("####")) >= 0:
        return text[place + 4 :].strip().partition("\n")[0], True
    end = text.rfind("</answer>")
    if end >= 0 and (begin := text.rfind("<answer>", 0, end)) >= 0:
        return text[begin + len("<answer>") : end], False
    said = max((match.end() for match in _SAYS.finditer(text)), default=None)
    return (text, False) if said is None else (text[said:], True)


def _in_braces(text: str) -> str | None:
    r"""What is in the last \boxed{...} that closes."""
    place = text.rfind("\\boxed{")
    depth, begin = 0, place + len("\\boxed{")
    for brace in re.finditer(r"[{}]", text[begin:] if place >= 0 else ""):
        if brace[0] == "}" and depth == 0:
            return text[begin : begin + brace.start()]
        depth += 1 if brace[0] == "{" else -1
    return None


def _answer(record: dict) -> str:
    if record.get("answer") is None:
        raise UserError(f"record with the keys {', '.join(record)}: it has no answer to compare with; add an `answer` column.")
    return str(record["answer"])


def _normal(text: str) -> str:
    text = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    return text.strip("\"'`*$ ").removesuffix(".").strip("\"'`*$ ")


def _value(number: str | None) -> tuple[Fraction, bool] | None:
    """(the number that a match of _NUMBER spells, whether it is a percentage), or None."""
    if number is None or len(number) > _MOST or re.search("[eE][-+]?[0-9]{4}", number):
        return None
    spelled = re.sub(r"[$€£¥₹,]", "", number)
    negative, spelled = "-" in spelled[:2], spelled.lstrip("+-")
    percentage, spelled = spelled.endswith("%"), spelled.rstrip("% ")
    above, _, below = spelled.partition("/")
    whole, _, above = above.strip().rpartition(" ")
    try:
        value = Fraction(whole or 0) + Fraction(above) / Fraction(below.strip() or 1)
    except (ValueError, ZeroDivisionError):
        return None
    return -value if negative else value, percentage


@functools.lru_cache(maxsize=1024)
def _read(answer: str) -> list:
    from math_verify import parse

    # As mathematics first: in x^2 - 1 as text it would find a 1. Its own timers are off: a loop in C does not hear them.
    answer = _marked(answer)[0]
    for text in (answer,) if "$" in answer else (f"${answer}$", answer):
        if found := parse(text, parsing_timeout=None):
            return found
    raise ValueError(f"math-verify cannot read the record's answer {answer[:60]!r}")


def _same(answer: str, completion: str) -> bool:
    """Runs in the child."""
    from math_verify import parse
    from math_verify import verify as equal

    return bool(equal(_read(answer), parse(completion, parsing_timeout=None), timeout_seconds=None))
