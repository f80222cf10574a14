"""The structures that sides.py builds from a text's items: sides, chains of equalities, and groups of chains."""

from fractions import Fraction
from typing import NamedTuple


class Number(NamedTuple):
    """An exact number, and whether it is written as a percentage."""

    value: Fraction
    percentage: bool

    def equals(self, other: "Number") -> bool:
        """Whether two numbers are equal. A percentage equals the number before its sign and a hundredth of it."""
        if self.percentage == other.percentage:
            return self.value == other.value
        of_hundred, plain = (self, other) if self.percentage else (other, self)
        return plain.value in (of_hundred.value, of_hundred.value / 100)


class Side:
    """The part of a chain between two equality signs."""

    def __init__(self):
        self.number: Number | None = None
        self.count = self.words = 0  # numbers; words after the last
        self.word = ""
        self.bad = self.unknown = self.operator = self.comma = self.part = False
        self.denied = self.adjunct = self.bound = self.foreign = self.month = False
        self.lead: list[str] = []

    @property
    def value(self) -> Number | None:
        return self.number if self.count == 1 and not self.bad else None

    @property
    def computes(self) -> bool:
        """Whether it is an expression to compute, such as 3 * 24 and 10% of the pages."""
        return self.count > 0 and not self.unknown and (self.part or self.bad or self.count > 1)


class Ahead:
    """What the words and signs before the next number say about it."""

    def __init__(self):
        self.words: list[str] = []
        self.denied = self.bound = self.foreign = self.whole = self.month = False
        self.sign = 1


class Group:
    """A list of chains, and its place in the text."""

    def __init__(self, sides: list[Side], clause: int, sentence: int):
        self.values: list[Number | None] = []
        self.clause, self.sentence, self.lead = clause, sentence, sides[0].lead
        self.equation = len(sides) > 1
        self.adjunct, self.computes = sides[0].adjunct and not self.equation, False

    @property
    def number(self) -> Number | None:
        first = self.values[0]
        return first if first is not None and all(x is not None and first.equals(x) for x in self.values) else None


def chained(sides: list[Side]) -> Number | None:
    """The number of a chain of equalities: that of its last side."""
    if any(s.unknown for s in sides[:-1]):
        return None
    plain = [s.value for s in sides if s.value and not (s.words or s.lead or s.part or s.value.percentage)]
    if any(not _close(a.value, b.value) for a, b in zip(plain, plain[1:], strict=False)):
        return None  # 5 = 6
    value = sides[-1].value
    if len(sides) == 2 and value is None and not any(s.unknown or s.foreign for s in sides):
        return sides[0].value  # 72 = 48 + 24
    return value


def _close(a: Fraction, b: Fraction) -> bool:
    """Whether two numbers are equal but for the rounding of one: 2/3 and 0.67."""
    return a == b or any(abs(a - b) <= Fraction(1, 2 * 10**places) for places in map(_places, (a, b)) if places is not None)


def _places(number: Fraction) -> int | None:
    return next((places for places in range(13) if (number * 10**places).denominator == 1), None)
