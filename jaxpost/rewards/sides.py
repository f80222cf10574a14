"""From numbers, words and signs to the number that a text gives: the upper half of the grammar that answers.py opens with.

`read` goes through the items once. It gathers the sides of an equation into a chain, chains into a group (a list), and takes
the group that the text's mark asks for.
"""

from jaxpost.rewards import vocabulary as v
from jaxpost.rewards.chains import Ahead, Group, Number, Side, chained
from jaxpost.rewards.numerals import Item

_REMARK = 60  # items that a remark in parentheses may have
_NUMBERS = {"whole", "decimal", "fraction", "quotient", "mixed", "power"}
_NOTHING = Item("\n", True)
_BREAKS = ("\n", "!", ";", "→")


def read(parts: list[Item], *, takes: str, strict: bool = True, gold: bool = False) -> Number | None:
    """The number that the items give; None if they give none or several.

    takes: only, first or last, of the groups. strict: a comma after a number makes a list. gold: no word may lead to it.
    """
    groups = _Reader(parts, takes, strict, gold).groups
    if not groups or (takes == "only" and len(groups) > 1):
        return None
    if takes == "last":
        clause = [g for g in groups if g.clause == groups[-1].clause]
        return next((g for g in reversed(clause) if not g.adjunct), groups[-1]).number
    sentence = [g for g in groups if g.sentence == groups[0].sentence and not g.adjunct] or groups
    first, direct = sentence[0], set(sentence[0].lead) <= v.FILLERS
    if first.equation and direct:
        return first.number
    others = [g for g in sentence[1:] if g.clause == first.clause and (not direct or v.HAS & set(g.lead))]
    if (not direct or others) and (equations := [g for g in sentence if g.equation]):
        return equations[-1].number
    return first.number if all(g.number == first.number for g in others) else None


class _Reader:
    """Reads items from left to right into groups of chains."""

    def __init__(self, parts: list[Item], takes: str, strict: bool, gold: bool):
        self.items, self.takes, self.strict, self.gold = parts, takes, strict, gold
        self.groups: list[Group] = []
        self.sides, self.ahead, self.joined, self.depth = [Side()], Ahead(), False, 0
        self.clause = self.sentence = self.call = 0  # call: how deep in parentheses the arguments of a function are
        self.lines = any(i.kind == "\n" for i in parts)
        at = 0
        while at < len(parts):
            at = self._item(at) or at + 1
        self._end()

    @property
    def side(self) -> Side:
        return self.sides[-1]

    def _at(self, at: int) -> Item:
        return self.items[at] if 0 <= at < len(self.items) else _NOTHING

    def _end(self, joined: bool = False) -> None:
        """Ends a chain. joined: the next one is in its group."""
        self.side.foreign = self.ahead.foreign
        self.side.bad |= self.side.comma and self._named()  # (5, x)
        sides = [s for s in self.sides if s.count]
        earlier = bool(self.groups) and self.groups[-1].sentence == self.sentence
        dropped = any(s.denied or (s.bound and earlier and self.takes == "last") for s in sides[-1:])
        if sides and not dropped:
            if not (self.joined and self.groups):
                self.groups.append(Group(sides, self.clause, self.sentence))
            self.groups[-1].values.append(chained(sides))
            self.groups[-1].computes = sides[-1].computes
        if sides:
            self.joined = joined
        self.sides, self.ahead = [Side()], Ahead()

    def _break(self, sentence: bool = False) -> None:
        """Ends a clause, or a sentence."""
        self._end()
        self.clause, self.sentence, self.call = self.clause + 1, self.sentence + sentence, 0

    def _item(self, at: int) -> int | None:
        """Reads one item; returns the place after those that it skipped."""
        item, side, before, next_ = self.items[at], self.side, self._at(at - 1), self._at(at + 1)
        term, glued = next_.kind in ("n", "+", "-", "(", "c"), not item.gap and not next_.gap
        after = side.count and not side.words  # right after a number
        kind = item.kind
        if kind == "n":
            self._number(item, next_)
        elif kind == "w":
            return self._word(at)
        elif kind == "c":
            self.ahead.foreign = True
            side.bad |= bool(after)
        elif kind == "<":
            if before.kind != "\n" or self.strict or not next_.gap:  # not a quotation's
                self.ahead.bound = True
                side.bad = side.unknown = True
        elif self.call and kind in ("=", ",", ";"):  # P(X = 5), C(5, 2)
            side.operator, self.ahead.foreign = True, True
        elif kind == "=":
            self._equals()
        elif kind == "→":
            self._concludes()
        elif kind in ("+", "-", "×", "/"):
            self._operator(at, term)
        elif kind == "…":
            self._dots(bool(after), before, next_)
        elif kind in (".", ":") and after and next_.kind == "n" and (glued or (kind == ":" and item.gap and next_.gap)):
            side.operator = True
        elif kind == "_" and after and next_.kind in ("n", "w", "(") and not next_.gap:
            side.bad = side.operator = True
        elif kind in (",", ";"):
            self._comma(bool(after) and not side.adjunct and (self.strict or self.depth > 0 or glued or self._lists(at)))
        elif kind == "." and next_.gap and self.gold and not side.count:
            pass  # B. 5
        elif kind == "!" and after and not item.gap and (self.takes == "only" or next_.kind in ("=", "×", "/", "+")):
            side.bad = True
        elif kind == ":" or (kind == "." and next_.gap) or (kind in ("\n", "!") and self.takes != "only"):
            self._break(kind != ":")
        elif kind == "|":
            side.bad |= bool(after) and not item.gap
            self.ahead.foreign |= self.takes == "only" or (not next_.gap and next_.kind in ("n", "-"))
        elif kind == "(":
            return self._open(at)
        elif kind == ")":
            if not self.depth and side.count and self.takes != "only":
                self._break()
            self.depth = max(0, self.depth - 1)
            self.call *= self.depth >= self.call
        return None

    def _number(self, item: Item, next_: Item) -> None:
        side, ahead = self.side, self.ahead
        if (item.text == "ordinal" and self.takes == "last") or ahead.whole:
            self.ahead = Ahead()
            return
        if side.count and not side.operator and (side.words or side.comma):
            compound = side.words == 1 and not side.comma and side.word not in v.APART | v.HAS
            side.bad |= compound
            self.ahead = Ahead()
            self._end(joined=compound or (side.comma and not side.words))
            side = self.side
        leads = [word for word in ahead.words if word not in v.FILLERS]
        if side.count:
            side.bad = True
        else:
            side.bad |= ahead.foreign or ahead.bound or (self.gold and bool(leads))
            side.bound, side.denied, side.lead = ahead.bound, ahead.denied, ahead.words
            side.month = ahead.month
            side.adjunct = self._is_adjunct(leads, next_)
            side.number = None if item.value is None else Number(ahead.sign * item.value, item.percentage)
            side.unknown |= item.text == "fraction" and item.value is None
        side.count, side.words, side.operator = side.count + 1, 0, False
        self.ahead = Ahead()

    def _is_adjunct(self, leads: list[str], next_: Item) -> bool:
        """Whether a number is a time or a place of what the sentence is about: after 5 days."""
        if not leads:
            return False
        if self.takes == "last":
            return leads[-1] in v.ADJUNCT or (leads[-1] in v.AROUND and next_.text.casefold() in v.TIMES)
        return leads[-1] in v.AROUND

    def _word(self, at: int) -> int | None:
        item, side, ahead, next_ = self.items[at], self.side, self.ahead, self._at(at + 1)
        before, word, following = self._at(at - 1), self.items[at].text.casefold(), next_.text.casefold()
        after = side.count and not side.words
        if before.kind == "n" and v.unknown(item.text, item.gap, next_.kind):
            side.bad = side.unknown = True
        if word in ("or", "and") or word in v.BETWEEN | v.RATIO or (word == "less" and after):
            if self._joins(at, word, following):
                return None
        elif word in v.IS and (side.computes or not side.count):
            self._equals()
            self.ahead.denied = ahead.denied and (word == "equal" or v.denies(before.text.casefold()))  # can't be 5
            self.ahead.bound = ahead.bound and word == "equal"
            return None
        elif word in v.WHY | v.SO | v.ASIDE or word == "which":
            if word != "as" or (before.kind == next_.kind == "n"):
                return self._turns(at, word)
        elif after and (word in v.UNREAD or word in v.POWERS or (self.gold and word.replace(".", "") in ("am", "pm"))):
            side.bad = True
            side.operator |= next_.kind == "n"
        elif word in ("divided", "multiplied", "raised") and side.count and following in ("by", "to"):
            side.bad = side.operator = True
        elif word == "zero" and side.count and before.text.casefold() == "below":
            side.bad = True
        self._warns(item, before, next_)
        if item.text in v.MONTHS and "n" in (before.kind, next_.kind):  # May 5, 5 May
            side.bad |= before.kind == "n"
            ahead.month = ahead.foreign = ahead.foreign or before.kind != "n"
        side.words, side.word = side.words + 1, word
        label = self.gold and (self.depth > 0 or item.text == "A")  # (A) 5
        ahead.words.append("(" if label else word)
        ahead.sign = 1
        return None

    def _warns(self, item: Item, before: Item, next_: Item) -> None:
        """Notes what a word says about the number after it or before it: less than 5, 5 at least."""
        side, ahead, word = self.side, self.ahead, item.text.casefold()
        if v.denies(word) or (word == "than" and before.text == "rather"):
            ahead.denied = True
        elif word == "than":
            compares = side.count and side.words and before.text.casefold() in v.MORE
            side.operator |= bool(compares)  # 5 more than 67
            ahead.bound |= not compares
        elif word in ("least", "most") and before.text.casefold() == "at":
            if side.count and next_.kind != "n":
                side.bad = side.unknown = True
            ahead.bound = True
        elif (word in v.BEYOND or (word == "to" and before.text.casefold() == "up")) and next_.kind in ("n", "+", "-"):
            ahead.bound = True
        elif word in v.TAKES and (next_.kind in ("n", "(") or next_.text.casefold() in v.OF) and not side.count:
            ahead.foreign = True
        elif word not in v.OF:
            ahead.denied &= word in v.STILL
            ahead.foreign &= self.takes == "only"

    def _joins(self, at: int, word: str, following: str) -> bool:
        """Reads a word that may join two numbers; returns whether the word is done."""
        side, next_ = self.side, self._at(at + 1)
        if word in ("or", "and"):
            if side.count and side.words < 3 and following in v.MORE and not (word == "and" and following == "so"):
                side.bad = side.unknown = True  # 5 or more
                return False
            if side.count or word == "and":  # more than or equal to 5
                joins = not side.words or self.takes != "last"
                computes = next_.kind == "n" and self._at(at + 2).kind in ("=", "+", "-", "×", "/")
                again = computes and self.takes == "last" and any(s.count for s in self.sides[:-1])
                self._comma(side.count > 0 and joins and not again)  # 2 * 3 = 6 and 6 + 1 = 7
            return True
        if not side.count:
            return False
        number = side.number
        if word == "of" and number is not None and (number.percentage or number.value.denominator > 1):
            side.part = True
        letter = len(following) == 1 and following not in "ai" and next_.kind == "w"
        if word == "of" and (letter or next_.text in v.MONTHS):
            side.bad = side.unknown = True
        if word == "to" and following == "the" and self._at(at + 2).text == "power":
            side.bad = side.operator = True
        equals = any(s.count for s in self.sides[:-1])
        if word == "in" and (equals or self._at(at + 2).text.casefold() in v.TIMES):
            return False
        bad, direct = side.bad, side.words == 0 or (word == "of" and side.words == 1 and not self.ahead.denied)
        if next_.kind in ("n", "+", "-") and (direct or (word in v.BETWEEN and side.words == 1)):
            side.bad = side.operator = True
        elif word == "of" and (not side.words or side.word == "out") and following in v.WHOLE:
            self.ahead.whole, side.operator = not side.part, side.part
        stands = self.takes == "first" or (self.takes == "last" and equals)
        if word == "of" and direct and side.word != "out" and stands and not side.part:
            self.ahead.whole, side.bad, side.operator = True, bad, False  # 6 of 7
        return False

    def _turns(self, at: int, word: str) -> int | None:
        """Reads a word that opens another clause. A clause after `because` or `which` explains an earlier answer."""
        side, group = self.side, self.groups[-1] if self.groups else None
        counted = any(s.count for s in self.sides)
        if word == "which":
            if counted and side.computes:
                side.comma = False
                self._equals()
                return None
            if not counted and group and group.clause == self.clause - 1 and group.computes and group.number is None:
                self.groups.pop()
                return None
        if word in v.SO:
            if any(s.unknown for s in self.sides):
                self._concludes()
            else:
                self._break()
            return None
        self._break()
        if word in v.WHY:
            return self._passed(at) if counted else None
        if word == "which" and self._at(at - 1).kind == "," and self._at(at + 1).text.casefold() in v.IS and (counted or group):
            end = self._passed(at, comma=True)
            return None if any(item.kind == "=" for item in self.items[at:end]) else end
        return None

    def _passed(self, at: int, comma: bool = False) -> int:
        """The end of a sentence, or of a clause."""
        while at < len(self.items) and not self._stops(at) and not (comma and self.items[at].kind == ","):
            at += 1
        return at

    def _stops(self, at: int) -> bool:
        kind = self.items[at].kind
        return kind in _BREAKS or (kind == "." and self._at(at + 1).gap) or kind == "."

    def _comma(self, joins: bool) -> None:
        """Reads a separator of list members."""
        side = self.side
        if not side.count and not (self._named() and (self.depth or self.takes == "only")):
            side.words = 0
            self.ahead = Ahead()
        elif joins or not side.count:
            side.bad |= not side.count  # (x, 5)
            side.count = max(side.count, 1)
            side.comma, side.words, self.ahead = True, 0, Ahead()
            self.ahead.denied = side.denied  # not 5 or 6
        else:
            self._break()

    def _named(self) -> bool:
        """Whether an unknown follows the last number or precedes the first."""
        side = self.side
        return self.ahead.foreign or (len(side.word) == 1 and side.words == 1 and side.word not in "ai")

    def _lists(self, at: int) -> bool:
        """Whether a comma after a number of an unmarked text is a list's: x = 5, y = 6."""
        next_, then = self._at(at + 1), self._at(at + 2).kind
        named = next_.kind == "w" and len(next_.text) == 1 and then == "="
        member = named or (next_.kind == "n" and then not in ("=", "+", "-", "×", "/"))
        return self.side.month or (member and not v.AROUND & set(self.side.lead))

    def _equals(self) -> None:
        side = self.side
        if side.comma:
            self._end(joined=side.words == 1 and len(side.word) == 1)
        self.side.foreign = self.ahead.foreign
        self.sides.append(Side())
        self.ahead = Ahead()

    def _concludes(self) -> None:
        """Reads an arrow: an equality between numbers, or the step from an equation with an unknown to its solution."""
        if any(s.unknown for s in self.sides):
            self.sides, self.ahead = [Side()], Ahead()
        elif self.side.comma:
            self._break()
        else:
            self._equals()

    def _dots(self, after: bool, before: Item, next_: Item) -> None:
        if after and (before.text == "decimal" or self.takes == "only" or next_.kind == "n"):
            self.side.bad = self.side.unknown = self.side.operator = True
        else:
            self._break(True)

    def _operator(self, at: int, term: bool) -> None:
        item, side, before, next_ = self.items[at], self.side, self._at(at - 1), self._at(at + 1)
        even, after = item.gap == next_.gap, side.count and not side.words
        if not term:
            glued = not item.gap and not next_.gap and item.kind == "-"
            letter = next_.kind == "w" and len(next_.text) == 1
            letter = letter and (glued or v.unknown(next_.text, True, self._at(at + 2).kind))
            if after and (letter or (item.kind == "+" and before.kind == "n")):
                side.bad = side.unknown = True  # 5 + x, 5+
            return
        if side.count and not side.comma and (not side.words or (side.words < 4 and even)):
            side.operator = True
        elif item.kind in "+-" and (item.text not in "+-" or not self._dash(item, before, even)):
            bullet = before.kind == "\n" and next_.gap and self.lines and self.takes == "last"
            self.ahead.sign *= -1 if item.kind == "-" and not bullet else 1
        elif before.kind == ")" or (before.kind == "w" and even and (len(before.text) == 1 or item.kind == "/")):
            self.ahead.foreign = side.unknown = True

    def _dash(self, item: Item, before: Item, even: bool) -> bool:
        """Whether a possible sign is a dash between words or after an unknown."""
        says = before.text.casefold() in v.IS | v.FILLERS
        return before.kind == "w" and even and ((item.gap and not says) or len(before.text) == 1)

    def _open(self, at: int) -> int | None:
        """An opening parenthesis: a remark after a number is skipped."""
        side, item, before = self.side, self.items[at], self._at(at - 1)
        if side.count and item.gap and not side.operator and not side.comma and side.words < 3 and side.word not in v.IS:
            depth = 0
            for end in range(at, min(at + _REMARK, len(self.items))):
                depth += {"(": 1, ")": -1}.get(self.items[end].kind, 0)
                if not depth:
                    inside = {i.text.casefold() for i in self.items[at:end] if i.kind in "nw"}
                    if self.takes != "only" or (any(len(w) > 1 for w in inside - _NUMBERS) and not v.UNREAD & inside):
                        return end + 1
                    break
        self.depth += 1
        if before.kind == "w" and not item.gap:
            self.ahead.foreign, self.call = True, self.call or self.depth
        return None
