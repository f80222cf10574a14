r"""What a completion's answer is, and which number it spells: one grammar for rewards, extraction and majority votes.

**The marked answer** (`marked`). What stands after the last </think> is read alone, and nothing from a \boxed{ on that never
closes. A mark is one of these, and the last of the first three decides, whatever it holds; the fourth has a say where there is
none of them:

    \boxed{72}, \fbox{72}          what is in the outermost braces
    <answer>72</answer>            what is between the tags
    #### 72                        the rest of the line. A line without a digit is a heading: of an answer ("#### Final
                                   Answer"), which the next line gives, or of anything else, which is no mark; so is
                                   "#### Step 2" and, where more lines follow, "#### 2. Words"
    the answer is 72, answer: 72   what follows, unless it speaks of the answer (correct, found by ...) and does not give it

**The number** (`value`) is an exact fraction. Braces, $, \(, \text and other LaTeX of looks count as nothing.

    answer   = group                 a box holds one group; #### and "answer is" count their first group, <answer> and a text
                                     without a mark their last. A remark in parentheses after a number is none of it
    group    = chain { ("," | ";" | "or" | "and") chain }      a number only if all of its chains are the same one
    chain    = side { ("=" | "≈") side }                       the number of the last side that has digits
    side     = [words] quantity [unit]                         any other side (3 * 24, 2:5, 3-5, 1010_2, x > 5) is no number;
                                                               to the left of an "=" it may be one of numbers, not of unknowns
    quantity = { "-" | "+" } [currency] unsigned [scale] ["%" | "percent"]
    unsigned = decimal | decimal "/" decimal | fraction | integer fraction | decimal "×" "10" "^" integer | "10" "^" integer
    fraction = "\frac" argument argument | "½" ...             arguments in braces (quantities), or one digit
    decimal  = digits ["." digits] ["e" integer] | "." digits
    digits   = "1234567" | "1,234,567", with one separator: a comma, an apostrophe, a no-break or thin space, ~ \, \; or, in
               what is marked, a space
    scale    = "hundred" | "thousand" | "million" | "billion" | "trillion"
    unit     = words, with exponents and digits of their own (m^2, CO2, km/h, °C); but no letter x, y, z, n, k, M or π that
               touches the number

No number: a decimal comma (1,5 is a list of two), number words, hexadecimal numbers, two quantities (2 hours 30 minutes), a
square root, powers but those of ten, an ordinal outside of a mark, and what takes more than 500 digits or an exponent of more
than three. Of a text without a mark the last 4,000 characters are read. A percentage is the number before its sign;
`percentage` says that it is one.
"""

import re
from fractions import Fraction
from typing import NamedTuple

from jaxpost.rewards.numerals import Item, items

_LONGEST = 4_000  # characters of a text that are read for its number: its last, or the first after a mark


class Number(NamedTuple):
    """An exact number, and whether it is spelled as a percentage."""

    value: Fraction
    percentage: bool

    def equals(self, other: "Number") -> bool:
        """Whether two numbers are equal; a percentage is so to the number before its sign, and to a hundredth of it."""
        if self.percentage == other.percentage:
            return self.value == other.value
        of_hundred, plain = (self, other) if self.percentage else (other, self)
        return plain.value in (of_hundred.value, of_hundred.value / 100)


class Marked(NamedTuple):
    """The part of a text that is its answer, and by which mark."""

    text: str
    kind: str  # box, line, tag, words, or none where the text marks nothing

    @property
    def takes(self) -> str:
        """Which group of the text is its answer."""
        return {"box": "only", "line": "first", "words": "first"}.get(self.kind, "last")


# ------------------------------------------------------------------------------------------------------------ Which part

_BRACES = re.compile(r"\\(?:boxed|fbox)[ ]*\{|\\[\\{}]|[{}]")
_TAG = re.compile(r"<(/?)answer>")
_WORDS = re.compile(r"\banswer(?:\s++is\b|\s*+[:=])([\s*:]*+)(?:[\s$*:]|\\[\[(])*+", re.IGNORECASE)
_SENTENCE = re.compile(r"(?:[^\n.!?]|[.!?](?!\s)){0,300}+.?")
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

    digits: "the answer is ..." marks no answer where a sentence without a digit follows.
    """
    _, _, spoken = text.rpartition("</think>")
    text = spoken if spoken.strip() else text
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
            return Marked(sentence if digits else text[match.end(1) :], "words")
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


# ------------------------------------------------------------------------------------------------- Sides, chains, groups

# What touches a number and is no unit; what joins two quantities without making them one.
_UNKNOWN = set("xyznkMBKabcpqrei") | {"π"}
_AND = {"or", "and"}
_APART = {
    "of",
    "in",
    "from",
    "out",
    "for",
    "per",
    "at",
    "by",
    "with",
    "than",
    "after",
    "to",
    "on",
    "is",
    "are",
    "was",
    "were",
    "the",
    "a",
    "as",
    "more",
    "less",
    "if",
    "so",
    "then",
}
_IS = {"is", "are", "be", "equals", "was", "were", "to", "so", "therefore", "has", "have"}


class _Side:
    """What stands between two equality signs."""

    def __init__(self):
        self.number: Number | None = None
        self.count = self.words = 0  # numbers; words after the last
        self.word = ""
        self.bad = self.unknown = self.operator = self.foreign = self.comma = False
        self.sign = 1


class _Groups:
    """Reads items from left to right into groups of chains."""

    def __init__(self, parts: list[Item], takes: str, strict: bool):
        self.items, self.takes, self.strict = parts, takes, strict
        self.groups: list[list[Number | None]] = []
        self.sides, self.joined, self.depth = [_Side()], False, 0
        self.lines = any(i.kind == "\n" for i in parts)
        at = 0
        while at < len(parts):
            at = self._item(at) or at + 1
        self._end()

    def _end(self, joined: bool = False) -> None:
        """Ends a chain; the next one is of its group or not."""
        sides = [s for s in self.sides if s.count]
        if sides:
            values = [s.number if s.count == 1 and not s.bad else None for s in sides]
            value = None if any(s.unknown for s in sides[:-1]) else values[-1]
            if len(values) == 2 and value is None and not any(s.unknown or s.foreign for s in sides):
                value = values[0]  # 72 = 48 + 24
            self.groups += [] if self.joined and self.groups else [[]]
            self.groups[-1].append(value)
            self.joined = joined
        self.sides = [_Side()]

    def _item(self, at: int) -> int | None:
        """Takes one item; gives the place after a remark that it skipped."""
        item, side = self.items[at], self.sides[-1]
        next_ = self.items[at + 1] if at + 1 < len(self.items) else Item("", True)
        before = self.items[at - 1] if at else Item("\n", True)
        term, glued = next_.kind in ("n", "+", "-", "(", "c"), not item.gap and not next_.gap
        after = side.count and not side.words  # right after a number
        kind = item.kind
        if kind == "n":
            self._number(item)
        elif kind == "w":
            self._word(item, before)
        elif kind == "c":
            side.foreign = True
            side.bad |= bool(after)
        elif kind == "<":
            if before.kind != "\n" or self.takes != "last":
                side.bad, side.foreign, side.unknown = True, True, True
        elif kind == "=":
            self._equals()
        elif kind in ("+", "-", "×", "/"):
            self._operator(item, before, next_, term)
        elif kind in (".", ":") and after and next_.kind == "n" and (glued or (kind == ":" and item.gap and next_.gap)):
            side.operator = True
        elif kind == "_" and after and not next_.gap:
            side.bad = side.operator = True
        elif kind in (",", ";"):
            self._comma(bool(after) and (self.strict or self.depth > 0 or glued))
        elif kind == ":" or (kind == "." and next_.gap) or (kind in ("\n", "!") and self.takes != "only"):
            self._end()
        elif kind in ("!", "|") and self.takes == "only":
            side.bad = side.foreign = True
        elif kind == "(":
            return self._open(at, before)
        elif kind == ")":
            if not self.depth and side.count and self.takes != "only":
                self._end()
            self.depth = max(0, self.depth - 1)
        return None

    def _number(self, item: Item) -> None:
        if item.text == "ordinal" and self.takes == "last":
            return
        side = self.sides[-1]
        if side.count and not side.operator and (side.words or side.comma):
            compound = side.words == 1 and not side.comma and side.word not in _APART
            sign = side.sign
            self._end(joined=compound or (side.comma and not side.words))
            side = self.sides[-1]
            side.sign = sign
        if side.count:
            side.bad = True
        else:
            side.bad |= side.foreign
            side.number = None if item.value is None else Number(side.sign * item.value, item.percentage)
            side.unknown |= item.text == "fraction" and item.value is None
        side.count, side.words, side.operator, side.foreign, side.sign = side.count + 1, 0, False, False, 1

    def _word(self, item: Item, before: Item) -> None:
        side, word = self.sides[-1], item.text
        if before.kind == "n" and (
            word in ("x", "y", "z", "k") or (not item.gap and (word in _UNKNOWN or any(map(str.isdigit, word))))
        ):
            side.bad = side.unknown = True
        if word.casefold() in _AND:
            self._comma(side.count > 0 and (not side.words or self.takes != "last"))
            return
        side.words, side.word, side.sign = side.words + 1, word.casefold(), 1
        side.foreign &= self.takes == "only"

    def _comma(self, joins: bool) -> None:
        """What may separate the members of a list."""
        side = self.sides[-1]
        if not side.count:
            side.words = 0
        elif joins:
            side.comma, side.words = True, 0
        else:
            self._end()

    def _equals(self) -> None:
        side = self.sides[-1]
        if side.comma:
            self._end(joined=side.words == 1 and len(side.word) == 1)
        self.sides.append(_Side())

    def _operator(self, item: Item, before: Item, next_: Item, term: bool) -> None:
        side, even = self.sides[-1], item.gap == next_.gap
        if not term:
            return
        if side.count and not side.comma and (not side.words or (side.words < 4 and even)):
            side.operator = True
        elif item.kind in "+-" and not (before.kind == "w" and even and (item.gap or len(before.text) == 1)):
            bullet = before.kind == "\n" and next_.gap and self.lines and self.takes == "last"
            side.sign *= -1 if item.kind == "-" and not bullet else 1
        elif before.kind == ")" or (before.kind == "w" and even and len(before.text) == 1):
            side.foreign = side.unknown = True

    def _open(self, at: int, before: Item) -> int | None:
        """An opening parenthesis: a remark after a number is skipped, where words may be."""
        side, item = self.sides[-1], self.items[at]
        remark = side.count and item.gap and not side.operator and not side.comma and side.words < 3 and side.word not in _IS
        if remark and self.takes != "only":
            depth = 0
            for end in range(at, min(at + 60, len(self.items))):
                depth += {"(": 1, ")": -1}.get(self.items[end].kind, 0)
                if not depth:
                    return end + 1
        self.depth += 1
        side.foreign |= before.kind == "w" and not item.gap
        return None


def _read(parts: list[Item], takes: str, strict: bool = True) -> Number | None:
    groups = _Groups(parts, takes, strict).groups
    if not groups or (takes == "only" and len(groups) > 1):
        return None
    group = groups[-1 if takes == "last" else 0]
    return group[0] if group.count(group[0]) == len(group) else None


def value(text: str, *, alone: bool = False) -> Number | None:
    """The number that a text gives as its answer; None where it gives none, or what is no single number.

    alone: a text that marks nothing is the answer and nothing else, as a record's is.
    """
    part = marked(text, digits=True)
    alone = alone and part.kind == "none"
    takes, strict = "only" if alone else part.takes, alone or part.kind != "none"
    if takes == "only" and len(part.text) > _LONGEST:
        return None
    text = part.text[-_LONGEST:] if takes == "last" else part.text[:_LONGEST]
    return _read(items(text, wide=strict), takes, strict)


def spelled(number: Number) -> str:
    """The one spelling of a number's value before a sign of percentage: 18, -0.5, 1/3."""
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
