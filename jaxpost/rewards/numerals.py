r"""From a text to numbers, words and signs: the lower half of the grammar that rewards/answers.py opens with.

`items` cuts a text into tokens, which makes one of all spellings of a minus, a digit or a space, and then puts together what is
one number: fractions, powers of ten, percentages and scales. What an exponent raises, other than a ten, is no number: its value
is None, and so is that of a fraction of unknowns.
"""

import re
import unicodedata
from fractions import Fraction
from typing import NamedTuple

_MOST = 500  # characters of a number
_DEEP = 3  # fractions within fractions

# ---------------------------------------------------------------------------------------------------------------- Tokens

_SPELLED = dict.fromkeys(map(ord, "\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a\u202f\u3000"), "\u00a0")
_SPELLED |= dict.fromkeys(map(ord, "\u2010\u2011\u2012\u2013\u2212\ufe63"), "-")
_SPELLED |= dict.fromkeys(map(ord, "\u200b\u200c\u200d\u2060\u2061\u2062\u2063\ufeff\u00ad"))
_SPELLED |= dict.fromkeys(map(ord, "·∙⋅✕✖÷"), "×") | dict.fromkeys(map(ord, "—―"), "\n")
_SPELLED |= str.maketrans({"⁄": "/", "\u2215": "/", "≈": "=", "’": "'", "٫": ".", "٬": ","})
_X = re.compile(r"(?<=[0-9)}])\s{0,3}[xX]\s{0,3}(?=[0-9(\\$])")
_RAISED = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺", "0123456789-+")
_ODD = re.compile(r"[⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺]+|[^\x00-\x7f]")

_SEPARATOR = r",\\!|\{,\}|[,'~\u00a0]|\\[,;:! ]|\\thinspace "
_REST = r"(?:\.[0-9]++)?(?:[eE][-+]?[0-9]{1,3}(?!\w))?"


def _tokenizer(separator: str) -> re.Pattern:
    number = (
        rf"(?:[0-9]{{1,3}}(?P<sep>{separator})[0-9]{{3}}(?:(?P=sep)[0-9]{{3}})*+(?![0-9])|[0-9]++){_REST}|(?<![0-9])\.[0-9]++"
    )
    currency = r"(?:\b(?:USD?|EUR|GBP|CAD|AUD|INR|CHF|JPY|RMB|HK|NZ|[ACRS]))?\\?[$€£¥₹]"
    currency += r"|\b(?:USD|EUR|GBP|CAD|AUD|INR|CHF|JPY|RMB|Rs\.?)(?=\s?[-+]?[0-9.])"
    command = r"\\(?:[A-Za-z]++|[^A-Za-z])"
    return re.compile(
        rf"(?P<number>{number})|(?P<currency>{currency})|(?P<tag><<[^<>\n]{{0,200}}>>|</?[A-Za-z]++>)|(?P<command>{command})"
        r"|(?P<word>[^\W\d_]\w*+(?:'\w++)*+(?:-[0-9]\w*+)*+)|(?P<break>\n)|(?P<gap>[^\S\n]++)|(?P<dots>\.\.+|…|[-=]{1,3}>)"
        r"|(?P<sign>.)",
        re.DOTALL,
    )


_CLOSE, _WIDE = _tokenizer(_SEPARATOR), _tokenizer(_SEPARATOR + "|[ ]")
_LOOKS = {
    "text",
    "textbf",
    "textit",
    "textrm",
    "textsf",
    "texttt",
    "mathrm",
    "mathbf",
    "mathit",
    "mathsf",
    "mbox",
    "hbox",
    "rm",
    "bf",
    "operatorname",
}
_LOOKS |= {"boxed", "fbox", "displaystyle", "left", "right", "big", "Big", "bigl", "bigr", "Bigl", "Bigr"}
_GAPS = {"quad", "qquad", "thinspace", "enspace", "space", ",", ";", ":", "!", "[", "]", "(", ")"} | {" "}
_KINDS = {"number": "n", "word": "w", "break": "\n", "dots": "\n"}
_WORDS = {"plus": "+", "minus": "-", "negative": "-", "times": "×", "equals": "="}


def _table(**kinds: str) -> dict[str, str]:
    """From each of the words of a kind to the kind's sign."""
    names = {"product": "×", "equal": "=", "relation": "<", "unit": "w", "stop": "\n", "opens": "(", "closes": ")"}
    return {word: names.get(kind, kind) for kind, words in kinds.items() for word in words.split()}


_COMMANDS = {"over": "/", "%": "%", "\\": "\n"} | _table(
    product="times cdot ast div",
    equal="approx simeq",
    relation="le leq lt ge geq gt ne neq pm mp in sim",
    unit="circ degree euro pounds & #",
    stop="Rightarrow implies to ldots dots therefore",
    frac="frac dfrac tfrac cfrac sfrac nicefrac",
    opens="{ lbrace",
    closes="} rbrace",
)
_SIGNS = _table(product="* ×", equal="≡", relation="< > ≤ ≥ ≠ ±", unit="° ¢ ″ ′", stop="→ ⇒ ∴ ?", opens="[", closes="]", c="√")


class _Token(NamedTuple):
    kind: str  # n a number, w a word, c a command that is none of the rest, frac, or the sign itself
    text: str
    gap: bool  # whether white space stands before it


def _plain(match: re.Match) -> str:
    """A character outside of ASCII as LaTeX or ASCII would have it."""
    char = match[0]
    if char[0] in "⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺":
        return f"^{{{char.translate(_RAISED)}}}"
    if ord(char) in _SPELLED:
        return char
    if "FRACTION" in unicodedata.name(char, ""):
        above, slash, below = unicodedata.normalize("NFKC", char).partition("⁄")
        return rf"\frac{{{above}}}{{{below}}}" if slash and below else char
    if (digit := unicodedata.decimal(char, None)) is not None:
        return str(digit)
    return chr(ord(char) - 0xFEE0) if 0xFF01 <= ord(char) <= 0xFF5E else char


def _tokens(text: str, wide: bool) -> list[_Token]:
    text = _X.sub("×", _ODD.sub(_plain, text).translate(_SPELLED))
    tokens, gap = [], False
    for match in (_WIDE if wide else _CLOSE).finditer(text):
        kind, spelled = match.lastgroup, match[0]
        if kind in ("gap", "currency", "tag") or spelled in '$"`“”':
            gap |= kind == "gap"
            continue
        if kind == "command":
            name = spelled[1:]
            if name in _LOOKS or name in _GAPS:
                gap |= name in _GAPS
                continue
            kind = _COMMANDS.get(name, "c")
        elif kind == "sign" and spelled == "~":
            gap = True
            continue
        else:
            kind = _WORDS.get(spelled.casefold()) or _KINDS.get(kind) or _SIGNS.get(spelled, spelled)
        tokens.append(_Token(kind, spelled, gap))
        gap = False
    return tokens


# --------------------------------------------------------------------------------------------------------------- Numbers

_SCALES = {"hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_ORDINALS = {"st", "nd", "rd", "th"}


class Item(NamedTuple):
    """A number, a word or a sign of a text."""

    kind: str  # as of a token
    gap: bool
    text: str = ""  # of a number: whole, decimal or fraction; of a word: itself
    value: Fraction | None = None
    percentage: bool = False


def _decimal(spelled: str) -> Fraction | None:
    digits = re.sub(r"[^0-9.eE+-]", "", spelled)
    return Fraction(digits) if len(digits) <= _MOST else None


def _group(tokens: list[_Token], at: int) -> tuple[list[_Token], int]:
    """What the braces at a place hold, and the place after them; or one token, with its sign, where there are none."""
    if at < len(tokens) and tokens[at].kind == "{":
        depth, end = 1, at + 1
        while end < len(tokens) and depth and end - at < _MOST:
            depth += {"{": 1, "}": -1}.get(tokens[end].kind, 0)
            end += 1
        return tokens[at + 1 : end - 1], end
    end = at + 1 + (at < len(tokens) and tokens[at].kind in "+-")
    return tokens[at:end], end


def items(text: str, *, wide: bool) -> list[Item]:
    """A text's numbers, words and signs. wide: a space may separate thousands."""
    return _items(_tokens(text, wide))


def _items(tokens: list[_Token], depth: int = 0) -> list[Item]:
    """The tokens with fractions, powers of ten, percentages, scales and the exponents of units put together."""
    items, at = [], 0
    while at < len(tokens):
        (kind, text, gap), at = tokens[at], at + 1
        last, low = items[-1] if items else Item("", False), text.casefold()
        if kind == "n":
            items.append(Item("n", gap, "whole" if text.isdigit() else "decimal", _decimal(text)))
            _divide(items)
        elif kind == "frac":
            value, at = _fraction(tokens, at, depth)
            items.append(Item("n", gap, "fraction", value))
            _mix(items)
        elif kind == "^":
            group, at = _group(tokens, at)
            if last.kind == "n":
                _raise(items, group)
            elif last.kind in (")", "c"):
                items.append(Item("c", False))
        elif last.kind == "n" and (kind == "%" or low in ("percent", "pct")):
            items[-1] = last._replace(percentage=True)
        elif last.kind == "n" and low in _SCALES and last.value is not None:
            items[-1] = last._replace(value=last.value * _SCALES[low], text="decimal")
        elif last.kind == "n" and not gap and low in _ORDINALS:
            items[-1] = last._replace(text="ordinal")
        elif kind == "_" and last.kind == "w":
            _, at = _group(tokens, at)
        elif kind == "/" and last.kind in ("n", "w") and at < len(tokens) and tokens[at].kind == "w":
            items.append(Item("w", True, tokens[at].text))
            at += 1
        elif kind not in "{}":
            items.append(Item(kind, gap, text))
    return items


def _divide(items: list[Item]) -> None:
    """Makes one number of 3/4 at the end."""
    if len(items) < 3 or items[-2].kind != "/":
        return
    above, _, below = items[-3:]
    if above.kind == "n" and above.text in ("whole", "decimal") and not above.percentage:
        value = above.value / below.value if above.value is not None and below.value else None
        proper = above.text == below.text == "whole"
        items[-3:] = [Item("n", above.gap, "fraction" if proper else "quotient", value)]
        _mix(items)


def _mix(items: list[Item]) -> None:
    """Makes one number of 1 1/2 at the end."""
    if len(items) < 2 or (items[-2].kind, items[-2].text, items[-1].text) != ("n", "whole", "fraction"):
        return
    whole, part = items[-2:]
    if whole.value is not None and not whole.percentage and part.value is not None and 0 < part.value < 1:
        items[-2:] = [Item("n", whole.gap, "mixed", whole.value + part.value)]


def _fraction(tokens: list[_Token], at: int, depth: int) -> tuple[Fraction | None, int]:
    r"""(the value of the arguments of \frac, the place after them)."""
    parts, digits = [], ""
    while len(parts) < 2 and at < len(tokens):
        if digits or (tokens[at].kind == "n" and tokens[at].text.isdigit()):
            digits = digits or tokens[at].text
            parts.append(Fraction(digits[0]))
            digits, at = digits[1:], at + (len(digits) == 1)
            continue
        group, at = _group(tokens, at)
        parts.append(_single(_items(group, depth + 1)) if depth < _DEEP else None)
    if digits:  # \frac123 is 1/2 and then a 3, which nobody means
        return None, at + 1
    above, below = parts if len(parts) == 2 else (None, None)
    return above / below if above is not None and below else None, at


def _single(items: list[Item]) -> Fraction | None:
    """The number that items are, but for signs, parentheses and a unit."""
    kinds = "".join(item.kind for item in items if item.kind not in "()")
    if not re.fullmatch("[-+]*nw*", kinds):
        return None
    value = next(item.value for item in items if item.kind == "n")
    return value if value is None or kinds.count("-") % 2 == 0 else -value


def _raise(items: list[Item], group: list[_Token]) -> None:
    """Applies an exponent to the number at the end: to a ten, with its factor; a circle is a unit, th makes an ordinal."""
    kinds = "".join(t.kind for t in group if t.kind not in "{}")
    if kinds and set(kinds) == {"w"}:
        if any(t.text in _ORDINALS for t in group):
            items[-1] = items[-1]._replace(text="ordinal")
        return
    value, exponent = None, next((t.text for t in group if t.kind == "n"), "")
    if kinds in ("n", "-n", "+n") and exponent.isdigit() and len(exponent) <= 3 and items[-1][2:4] == ("whole", 10):
        value = Fraction(10) ** (-int(exponent) if kinds[0] == "-" else int(exponent))
        if len(items) > 2 and items[-2].kind == "×" and items[-3].kind == "n" and items[-3].text in ("whole", "decimal"):
            factor = items[-3]
            items[-3:] = [factor._replace(value=factor.value and factor.value * value, text="power")]
            return
    items[-1] = items[-1]._replace(value=value, text="power")
