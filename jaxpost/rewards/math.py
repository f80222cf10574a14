r"""Right or wrong: what a completion gives as its answer, against record["answer"].

    exact      the same text, but for case, white space, quotes and a final full stop
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
from jaxpost.rewards import answers, isolated

# What math-verify would read as another thing, so that it is compared as text: a ratio or a time as a quotient, a base as an
# index, a date as two quotients, a range as a difference, a hexadecimal number as a product, words by the numbers among them.
_AS_TEXT = re.compile(
    r"[0-9] ?: ?[0-9]|[0-9]_|[0-9]/[0-9]+/[0-9]|^\s*[0-9.,]+ ?[-\u2013] ?[0-9.,]+\s*$|[0-9][A-F]\b|0[xX][0-9]|[-+*/]\s*$|[%+]\s*\+|\.\."
    r"|(?<![\\A-Za-z])(?!(?:pi|sin|cos|tan|cot|sec|csc|log|ln|lg|exp|sqrt|arcsin|arccos|arctan)\b)(?:[A-Za-z]{3,}|(?:or|to|of|in|at|by|no)\b)"
    r"|[^\x00-\x7f]"
)
_INLINE = re.compile(r"\$([^$\n]{1,400})\$|\\\(([^\n]{1,400}?)\\\)")
# What may stand behind a number, and what makes a formula none.
_UNIT = re.compile(r"\\(?:text|mathrm|mbox) ?\{(?![^{}]*\b(?:or|and|to|not|more|less|least|most|than|mod)\b)[^{}]{0,60}\}(?:\^\{?[0-9]\}?)?\W*$")
_UNKNOWN = re.compile(
    r"[<>=≈≡:;,_]|\\(?:le|leq|ge|geq|lt|gt|ne|neq|in|not|to|pm|mp|sim|text|mathrm|mbox|langle|[lc]?dots)(?![A-Za-z])|(?:Rightarrow|implies)"
    r"|(?<![\\A-Za-z])(?!e\^)[A-Za-z]"
)
_WORDED = re.compile(r"\\(?:text\w*|math\w+|mbox|operatorname) ?\{[^{}]{0,200}\}|\\(?:begin|end) ?\{[^{}]{0,40}\}")
_SIGNS = {"π": r"\pi ", "∞": r"\infty ", "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ", "×": r"\times ", "·": r"\cdot ", "÷": r"\div "}
_SIGNS |= {"⌊": r"\lfloor ", "⌋": r"\rfloor ", "⌈": r"\lceil ", "⌉": r"\rceil ", "−": "-", "°": r"^\circ ", "±": r"\pm "}
_SIGNS |= {"∪": r"\cup ", "∩": r"\cap ", "∅": r"\emptyset ", "θ": r"\theta ", "α": r"\alpha ", "β": r"\beta ", "φ": r"\phi "}
_RAISED = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺", "0123456789-+")
_ROOT = re.compile(r"(?:√|(?<![\\A-Za-z])sqrt) ?(\([^()]{1,60}\)|\{[^{}]{1,60}\}|[0-9]{1,30}|[A-Za-z])")
_FUNCTION = re.compile(r"(?<![\\A-Za-z])(pi|sin|cos|tan|cot|log|ln|exp)(?![A-Za-z])")
_RECURRING = re.compile(
    r"([0-9]{1,30})\.([0-9]{0,30}?)(?:\\(?:overline|bar|dot) ?\{([0-9]{1,30})\}|\(([0-9]{1,30})\)|([0-9]{1,9}?)\5{1,30}(?:\.\.\.|…|\\l?dots))"
)
_LEAD = re.compile(r"(?:\s*(?:[A-Za-z]{2,}\b|a\b)(?<!pi)(?<!sqrt)(?<!log)(?<!ln)(?<!sin)(?<!cos)(?<!tan)){0,20}\s*")
_FORMULA = re.compile(r"(?:(?!(?<![\\A-Za-z])(?!pi\b|sqrt\b|log\b|ln\b|sin\b|cos\b|tan\b)[A-Za-z]{3,}).){1,400}", re.DOTALL)


def exact(record: dict, completion: str) -> bool:
    """Whether the completion's answer is record["answer"]: as text, but for case, white space, quotes and a final full stop.

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
    return isolated.call("jaxpost.rewards.math:_same", args=texts, seconds=seconds, package="math_verify")


verify.in_process = True  # it has a process of its own
verify.ready = lambda **_: isolated.warm(module="jaxpost.rewards.math", package="math_verify")


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


def _normal(text: str) -> str:
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

    answer = _latex(answer)
    # As mathematics first: in x^2 - 1 as text it would find a 1. Its own timers are off: a loop in C does not hear them.
    for text in (answer,) if "$" in answer else (f"${answer}$", answer):
        if expressions := parse(text, parsing_timeout=None):
            return expressions
    return []


def _latex(text: str) -> str:
    """A text's signs, roots and recurring decimals as LaTeX that math-verify reads."""
    text = _RECURRING.sub(_recurring, text)
    text = re.sub("[⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺]+", lambda match: f"^{{{match[0].translate(_RAISED)}}}", text)
    text = _ROOT.sub(lambda match: rf"\sqrt{{{match[1].strip('{}')}}}", text)
    return _FUNCTION.sub(r"\\\1 ", "".join(_SIGNS.get(char, char) for char in text))


def _recurring(match: re.Match) -> str:
    """0.1(6) as a quotient."""
    whole, once, again = match[1], match[2], match[3] or match[4] or match[5]
    below = (10 ** len(again) - 1) * 10 ** len(once)
    return rf"\frac{{{int(whole + once + again) - int(whole + once)}}}{{{below}}}"


def _spoken(text: str, whole: bool) -> str:
    """The mathematics of a sentence: what it sets off last, or else all of it, or what follows its first words."""
    if formulas := _formulas(text):
        return formulas[-1]
    if not whole:
        text = formula[0] if (formula := _FORMULA.match(text, _LEAD.match(text).end())) else ""
    return text.strip().partition("\n")[0].rstrip(" .,;:!*")


def _formulas(text: str) -> list[str]:
    return ["".join(groups) for groups in _INLINE.findall(text)]


def _evaluates(formula: str) -> bool:
    """Whether a formula may be a number: no relation, unknown or word is in it, but for a name before = and a unit at the end."""
    if re.search(r"\\not|[!<>=]=", formula):
        return False
    _, _, formula = formula.rpartition("=") if not re.search("[0-9][^=]*=", formula) else ("", "", "=")
    formula = _latex(_UNIT.sub("", formula.strip("$ \n")))
    return not (_AS_TEXT.search(formula) or _UNKNOWN.search(formula))


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
    if _AS_TEXT.search(_latex(_WORDED.sub(" ", " ".join(_formulas(wanted)) or wanted).strip("$ \n"))):
        return False
    formula = part.text if part.kind in ("box", "line", "tag") else _spoken(sentence, whole=right is not None)
    if right is not None and (not _evaluates(formula) or answers.value(formula, alone=True) is not None):
        return False  # words around a number deny or change it
    return bool(equal(_read(answer), _parsed(formula), timeout_seconds=None))
