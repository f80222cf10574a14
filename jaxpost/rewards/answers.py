r"""Finds a completion's answer and its number: one grammar for rewards, extraction and majority votes.

**The marked answer** (`marked`). Only text after the last </think> is read, and none after a \boxed{ that never closes. The
last mark of the first three kinds is the answer, whatever it holds; the fourth counts where there is none of them:

    \boxed{72}, \fbox{72}          the text in the outermost braces
    <answer>72</answer>            the text between the tags
    #### 72                        the rest of the line. A line without a digit is a heading: "#### Final Answer" marks the
                                   next line, other headings mark nothing; nor do "#### Step 2" and, if more lines follow,
                                   "#### 2. Words"
    the answer is 72, answer: 72   the text after it, unless that only comments on the answer (correct, found by ...)

**The number** (`value`) is an exact fraction. Braces, $, \(, \text and other LaTeX for layout are ignored, and so are the marks
of a chat template (<|im_end|>).

    answer   = clause { (". " | ", " | because | so | but | when ...) clause }
    group    = chain { ("," | ";" | "or" | "and") chain }      a number only if all of its chains are the same one
                                                               (without a mark "and" parts two equations)
    chain    = side { ("=" | "≈" | "->" | "is") side }         the number of its last side that has digits, if no side before
                                                               has an unknown (2x = 10), and not of 5 = 6
    side     = [words] quantity [unit]                         any other side is none: 3 * 24, 2:5, 3-5, 3 to 5, 10% of 50,
                                                               1010_2, 5 squared, twice 5, 5 divided by 6, log 5, 12 pi, 5!
    quantity = { "-" | "+" } [currency] unsigned [scale] ["%" | "percent"]
    unsigned = decimal | decimal "/" ["-"] decimal | fraction | integer fraction | integer "and a half" | "10" "^" integer |
               decimal "×" "10" "^" integer | "(" quantity ")"
    fraction = "\frac" argument argument | "½" ...             arguments in braces (quantities), or one digit
    decimal  = digits ["." digits] ["e" integer] | "." digits  not before dots: 0.333...
    digits   = "1234567" | "1,234,567", with one separator: a comma, an apostrophe, a no-break or thin space, ~ \, \; or, in
               what is marked, a space
    scale    = hundred ... trillion, dozen, lakh, crore, bn; of money K, M, B, T too; halves, thirds ... thousandths
    unit     = words, with exponents and digits of their own (m^2, CO2, km/h, °C, \frac{km}{h}). A letter, or three at most that
               touch the number, must be a unit's (5 m, 5cm); others are unknowns (5x, 5xy, 5 n), digits (1F) or names (3D)

Which group is the answer:

    a box, a record   the only one. Text after `because` and remarks in parentheses do not count
    ####, answer is   the first of the sentence that is no time or place (in 5 days, at 5). If words precede it (she has) or a
                      verb links it to another number, the last equation of the sentence; else no number
    <answer>, a text  the last, except a time after it (72 pages after 5 days)
    without a mark

In a record only "about", or a name and an equality, may precede the number: May 5, (B) 5 and at least 5 have none. A negated
number (not 5) is no answer. No numbers are: bounds (less than 5, at least 5, 5 or more, 5+, x > 5), dates, decimal commas (1,5
is a list of two), number words, hexadecimal numbers, two quantities (2 hours 30 minutes), ordinals outside of a mark, more than
500 digits, and exponents of more than three. Of a text without a mark the last 4,000 characters are read. A percentage is the
number before its sign; `percentage` marks it. The upper half of the grammar is in sides.py and chains.py, the lower in
numerals.py, its words in vocabulary.py.
"""

import re
from typing import NamedTuple

from jaxpost.rewards import sides
from jaxpost.rewards.chains import Number
from jaxpost.rewards.numerals import items

_LONGEST = 4_000  # characters that are searched for a number: the last of a text, or the first after a mark


class Marked(NamedTuple):
    """The part of a text that is its answer, and the kind of its mark."""

    text: str
    kind: str  # box, line, tag, words, or none without a mark

    @property
    def takes(self) -> str:
        """Which group of the text is its answer."""
        return {"box": "only", "line": "first", "words": "first"}.get(self.kind, "last")


# ------------------------------------------------------------------------------------------------------------ Which part

_TURNS = re.compile(r"<[|｜][^<>\n]{1,40}[|｜]>|<end_of_turn>|</s>|<eos>")  # marks of templates
_BRACES = re.compile(r"\\(?:boxed|fbox)[ ]*\{|\\[\\{}]|[{}]")
_TAG = re.compile(r"<(/?)answer>")
_WORDS = re.compile(r"\banswer(?:\s++is\b|\s*+[:=])([\s*:]*+)(?:[\s$*:]|\\[\[(])*+", re.IGNORECASE)
_SENTENCE = re.compile(r"(?:\.\.\.\s?(?=[0-9])|[^\n.!?]|[.!?](?!\s)){0,300}+.?")
_SPEAKS = re.compile(
    r"(?:(?:indeed|also|therefore|thus|then|definitely|really)\s+)?(?:correct|right|wrong|incorrect|valid|reasonable|not|found|"
    r"obtained|computed|calculated|determined|derived|reached|given\s+by|got|checked|verified|consistent)\b",
    re.IGNORECASE,
)
_HEADING = re.compile(r"\W*(?:step|part|case|question|problem|example|method|section|note|stage|phase|option|approach)\b", re.I)
_NUMBERED = re.compile(r"\s*\d+[.)]\s+\W*[^\W\d]")
_OF_ANSWER = re.compile(r"answer|result|solution|conclusion", re.IGNORECASE)


def marked(text: str, *, digits: bool = False) -> Marked:
    """The part of a text that it marks as its answer, or all of it; see the module's docstring.

    digits: "the answer is ..." marks no answer if a sentence without a digit follows.
    """
    _, _, spoken = _TURNS.sub("\n", text).rpartition("</think>")
    text = spoken if spoken.strip() else _TURNS.sub("\n", text)
    boxes, unclosed = _boxes(text)
    if unclosed is not None:
        text = text[:unclosed]
    last = max(filter(None, (boxes, _tagged(text), _headed(text))), default=None)
    if last is not None:
        box, _ = _boxes(last[1])
        return Marked(*(box or last)[1:])
    for match in reversed(list(_WORDS.finditer(text))):
        sentence = _SENTENCE.match(text, match.end())[0]
        if not _SPEAKS.match(sentence) and (not digits or any(c.isnumeric() for c in sentence)):
            return Marked(text[match.end(1) : match.end()] + sentence if digits else text[match.end(1) :], "words")
    return Marked(text, "none")


def _boxes(text: str) -> tuple[tuple[int, str, str] | None, int | None]:
    r"""(the end and content of the last \boxed{} that closes, the place of the first after it that does not)."""
    last, opened = None, []
    for match in _BRACES.finditer(text):
        if match[0] == "}":
            if opened and (begin := opened.pop())[1]:
                last = (match.end(), text[begin[1] : match.start()], "box")
        elif match[0] == "{" or match[0][1] in "bf":
            opened.append((match.start(), match.end() if match[0] != "{" else 0))
    end = last[0] if last else 0
    return last, next((place for place, box in opened if box and place >= end), None)


def _tagged(text: str) -> tuple[int, str, str] | None:
    begin = last = None
    for match in _TAG.finditer(text):
        if not match[1]:
            begin = match.end()
        elif begin is not None:
            last, begin = (match.end(), text[begin : match.start()], "tag"), None
    return last


def _headed(text: str) -> tuple[int, str, str] | None:
    """The last line after #### that gives an answer, or is the heading of one."""
    end = len(text.rstrip())
    while (place := text.rfind("####", 0, end)) >= 0:
        line, _, rest = text[place + 4 : end].strip(" \t#*").partition("\n")
        if not rest.strip():
            return place, line, "line"
        if not any(c.isnumeric() for c in line):
            if _OF_ANSWER.search(line):
                following = rest.strip().partition("\n")[0]
                return place, following, "tag" if following[:1].isalpha() else "line"
        elif not _HEADING.match(line) and not _NUMBERED.match(line):
            return place, line, "line"
        end = place
    return None


# ------------------------------------------------------------------------------------------------------------- Its number


def value(text: str, *, alone: bool = False) -> Number | None:
    """The number that a text gives as its answer; None if it gives none or several.

    alone: all of the text, or of the part that it marks, is the answer, as in a record.
    """
    part = marked(text, digits=True)
    gold = alone and part.kind != "words"
    takes, strict = "only" if gold else part.takes, alone or part.kind != "none"
    if takes == "only" and len(part.text) > _LONGEST:
        return None
    text = part.text[-_LONGEST:] if takes == "last" else part.text[:_LONGEST]
    return sides.read(items(text, wide=strict), takes=takes, strict=strict, gold=gold)


def spelled(number: Number) -> str:
    """The canonical spelling of a number's value, without a percentage sign: 18, -0.5, 1/3."""
    above, below = number.value.as_integer_ratio()
    twos = fives = 0
    while below % 2 == 0:
        below, twos = below // 2, twos + 1
    while below % 5 == 0:
        below, fives = below // 5, fives + 1
    if below != 1:
        return f"{above}/{number.value.denominator}"
    places = max(twos, fives)
    digits = str(abs(above) * 2 ** (places - twos) * 5 ** (places - fives)).zfill(places + 1)
    return "-" * (above < 0) + (f"{digits[:-places]}.{digits[-places:]}" if places else digits)
