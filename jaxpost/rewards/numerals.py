r"""From a text to numbers, words and signs: the lower half of the grammar that rewards/answers.py opens with.

`items` tokenises a text, normalising all spellings of a minus, a digit or a space, and then joins the tokens of one number:
fractions, powers of ten, percentages and scales. Other powers and fractions of unknowns have the value None.
"""

import re
import unicodedata
from fractions import Fraction
from typing import NamedTuple

from jaxpost.rewards.vocabulary import MANY_PARTS, OF_MONEY, PARTS, SCALES, is_unit, unknown

_MOST = 500  # characters of a number
_DEEP = 3  # fractions within fractions

# ---------------------------------------------------------------------------------------------------------------- Tokens

_SPELLED = dict.fromkeys(map(ord, "\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a\u202f\u3000"), "\u00a0")
_SPELLED |= dict.fromkeys(map(ord, "\u2010\u2011\u2012\u2013\u2212\ufe63"), "-")
_SPELLED |= dict.fromkeys(map(ord, "\u200b\u200c\u200d\u2060\u2061\u2062\u2063\ufeff\u00ad"))
_SPELLED |= dict.fromkeys(map(ord, "·∙⋅✕✖÷"), "×") | dict.fromkeys(map(ord, "—―"), "\n") | dict.fromkeys(map(ord, "≈≃≅"), "=")
_SPELLED |= str.maketrans({"⁄": "/", "\u2215": "/", "\u2236": ":", "∼": "~", "’": "'", "٫": ".", "٬": ","})
_X = re.compile(r"(?<=[0-9)}])\s{0,3}[xX]\s{0,3}(?=[0-9(\\]|\$\s?\.?[0-9])")
_DASH = re.compile(r"(?<=[0-9])[—―](?=\$?[0-9])")
_RAISED = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺", "0123456789-+")
_LOWERED = str.maketrans("₀₁₂₃₄₅₆₇₈₉", "0123456789")
_ODD = re.compile(r"[⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺]+|[₀₁₂₃₄₅₆₇₈₉]+|[^\x00-\x7f]")

_SEPARATOR = r",\\!|\{,\}|[,'~\u00a0]|\\[,;:! ]|\\thinspace "
_REST = r"(?:\.[0-9]++)?(?:[eE][-+]?[0-9]{1,3}(?!\w))?"


def _tokenizer(separator: str) -> re.Pattern:
    number = (
        rf"(?:[0-9]{{1,3}}(?P<sep>{separator})[0-9]{{3}}(?:(?P=sep)[0-9]{{3}})*+(?![0-9])|[0-9]++){_REST}|(?<![0-9])\.[0-9]++"
    )
    currency = r"(?:\b(?:USD?|EUR|GBP|CAD|AUD|INR|CHF|JPY|RMB|HK|NZ|[ACRS]))?\\?[$€£¥₹]"
    currency += r"|\b(?:USD|EUR|GBP|CAD|AUD|INR|CHF|JPY|RMB|Rs\.?)(?=\s?[-+]?[0-9.])"
    currency += r"|\\(?:euro|pounds|textdollar|texteuro|yen)(?![A-Za-z])"
    looks = r"\\(?:text)?color ?\{[^{}\n]{0,40}\}"  # and its argument, which is no text
    looks += r"|\\(?:begin|end) ?\{(?:align|aligned|equation|gather|gathered|split|center|document)\*?\}"
    command = r"\\begin ?\{[^{}\n]{0,40}\}|\\(?:[A-Za-z]++|[^A-Za-z])"
    return re.compile(
        rf"(?P<number>{number})|(?P<currency>{currency})|(?P<tag><<[^<>\n]{{0,200}}>>|</?[A-Za-z_]++>|{looks})"
        rf"|(?P<command>{command})|(?P<word>[AaPp]\.[Mm]\b\.?|[^\W\d_][^\W_]*+(?:'[^\W_]++)*+(?:(?<=\w\w)-[0-9][^\W_]*+)*+)|(?P<break>\n)"
        r"|(?P<gap>[^\S\n]++)|(?P<dots>\.\.+|…)|(?P<arrow>[-=]{1,3}>)|(?P<relation>[!<>]=|=/=|=<)|(?P<sign>.)",
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
_LOOKS |= {"bigg", "Bigg", "biggl", "biggr", "underline", "emph", "boldsymbol", "bm", "mathtt", "ensuremath", "textstyle"}
_LOOKS |= {"large", "Large", "huge", "Huge", "small", "num", "unit", "si", "limits", "mathop", "mathord", "middle", "tt", "it"}
_KINDS = {"number": "n", "word": "w", "break": "\n", "dots": "…", "arrow": "→", "relation": "<"}
_WORDS = {"plus": "+", "minus": "-", "negative": "-", "times": "×", "equals": "="}


def _table(**kinds: str) -> dict[str, str]:
    """{word: the sign of its kind}."""
    names = {"product": "×", "equal": "=", "relation": "<", "unit": "w", "stop": "\n", "opens": "(", "closes": ")"}
    names |= {"arrow": "→", "dots": "…"}
    return {word: names.get(kind, kind) for kind, words in kinds.items() for word in words.split()}


_COMMANDS = {"over": "/", "%": "%", "\\": "\n"} | _table(
    product="times cdot ast div",
    equal="approx simeq",
    relation="le leq leqslant lt ge geq geqslant gt ne neq not pm mp in sim",
    unit="circ degree Omega ohm & #",
    stop="therefore",
    frac="frac dfrac tfrac cfrac sfrac nicefrac",
    opens="{ lbrace",
    closes="} rbrace",
    arrow="Rightarrow rightarrow Longrightarrow longrightarrow implies to mapsto",
    dots="ldots dots cdots dotsc",
)
_SIGNS = _table(
    product="* ×",
    equal="≡",
    relation="< > ≤ ≥ ≠ ±",
    unit="° ¢ ″ ′",
    stop="∴ ?",
    opens="[",
    closes="]",
    arrow="→ ⇒ ⟶ ⟹ ↦",
    c="‰ ‱ ⌊ ⌈ ⟨",
)


class _Token(NamedTuple):
    kind: str  # n a number, w a word, c a command that is none of the rest, frac, or the sign itself
    text: str
    gap: bool  # whether white space stands before it
    money: bool = False  # whether a currency does


def _plain(match: re.Match) -> str:
    """A character outside of ASCII in LaTeX or ASCII."""
    char = match[0]
    if char[0] in "⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺":
        return f"^{{{char.translate(_RAISED)}}}"
    if char[0] in "₀₁₂₃₄₅₆₇₈₉":
        return f"_{{{char.translate(_LOWERED)}}}"
    if ord(char) in _SPELLED:
        return char
    if "FRACTION" in unicodedata.name(char, ""):
        above, slash, below = unicodedata.normalize("NFKC", char).partition("⁄")
        return rf"\frac{{{above}}}{{{below}}}" if slash and below else char
    if (digit := unicodedata.decimal(char, None)) is not None:
        return str(digit)
    return chr(ord(char) - 0xFEE0) if 0xFF01 <= ord(char) <= 0xFF5E else char


def _tokens(text: str, wide: bool) -> list[_Token]:
    text = _X.sub("×", _ODD.sub(_plain, _DASH.sub("-", text)).translate(_SPELLED))
    tokens, gap, money = [], False, False
    for match in (_WIDE if wide else _CLOSE).finditer(text):
        kind, spelled = match.lastgroup, match[0]
        if (
            kind in ("gap", "currency", "tag")
            or spelled in '"`“”'
            or (kind == "sign" and unicodedata.category(spelled) == "Sc")
        ):
            gap |= kind == "gap"
            if spelled == "$" and tokens and not gap and tokens[-1].kind == "w":
                tokens[-1] = tokens[-1]._replace(money=True)  # $5 k$ is a formula
                continue
            money |= kind == "currency" or kind == "sign"
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
            kind = _WORDS.get(spelled.casefold()) or _KINDS.get(kind) or _SIGNS.get(spelled) or _sign(spelled)
        tokens.append(_Token(kind, spelled, gap, money))
        gap, money = False, money and kind in "+-{("
    return tokens


def _sign(char: str) -> str:
    """The kind of a sign in no table: c for unknown mathematics, which makes no number; else itself, which is ignored."""
    return "c" if unicodedata.category(char) in ("Sm", "Mn", "Lm") and char not in "+<=>|~" else char


# --------------------------------------------------------------------------------------------------------------- Numbers

_ORDINALS = {"st", "nd", "rd", "th"}
_PARTS = PARTS | {"quarter": 4}


class Item(NamedTuple):
    """A number, a word or a sign of a text."""

    kind: str  # as of a token
    gap: bool
    text: str = ""  # of a number: whole, decimal or fraction; of a word: itself
    value: Fraction | None = None
    percentage: bool = False
    money: bool = False


def _decimal(spelled: str) -> Fraction | None:
    digits = re.sub(r"[^0-9.eE+-]", "", spelled)
    return Fraction(digits) if len(digits) <= _MOST else None


def _group(tokens: list[_Token], at: int) -> tuple[list[_Token], int]:
    """(the tokens in the braces at a place, the place after them); without braces one token, with its sign."""
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
    """The tokens, with fractions, powers of ten, percentages, scales and exponents of units joined."""
    items, at = [], 0
    while at < len(tokens):
        (kind, text, gap, money), at = tokens[at], at + 1
        last, low = items[-1] if items else Item("", False), text.casefold()
        if kind == "n":
            items.append(Item("n", gap, "whole" if text.isdigit() else "decimal", _decimal(text), money=money))
            _divide(items)
        elif kind == "frac":
            begin, ((value, unit), at) = at, _fraction(tokens, at, depth)
            if unit and last.kind == "n":
                items.append(Item("w", True, "unit"))
            elif value is None and all(token.kind != "n" for token in tokens[begin:at]):
                items.append(Item("c", gap))  # x/y
            else:
                items.append(Item("n", gap, "fraction", value))
            _mix(items)
        elif kind == "^":
            group, at = _group(tokens, at)
            if last.kind == "n":
                _raise(items, group)
            elif last.kind in (")", "c"):
                items.append(Item("c", False))
        elif kind == "_" and last.kind in ("w", "c"):
            _, at = _group(tokens, at)
        elif (length := _scale(items, tokens, at - 1)) > 0:
            at += length - 1
        elif last.kind == "n" and not gap and low in _ORDINALS:
            items[-1] = last._replace(text="ordinal")
        elif kind == "/" and last.kind in ("n", "w") and at < len(tokens) and tokens[at].kind == "w":
            items.append(Item("w", True, tokens[at].text))
            at += 1
        elif kind == "<" and low == r"\not":
            items.append(Item(kind, gap, text))
            at += at < len(tokens) and tokens[at].kind == "="
        elif kind not in "{}":
            items.append(Item(kind, gap, text))
            if kind == ")":
                _enclose(items, divided=at < len(tokens) and tokens[at].kind == "/")
    return items


def _scale(items: list[Item], tokens: list[_Token], at: int) -> int:
    """Applies a percentage, a scale or a fraction's name to the number at the end; returns how many tokens that takes."""
    last = items[-1] if items else Item("", False)
    places = [place for place in range(at, min(at + 8, len(tokens))) if tokens[place].kind not in "{}" or place == at]
    texts = [tokens[place].text.casefold() for place in places]
    hyphen = last.kind == "-" and len(items) > 1 and not last.gap and not tokens[at].gap and items[-2].kind == "n"
    if hyphen and (texts[0] in SCALES or texts[0] in MANY_PARTS):  # 5-million
        items.pop()
        last = items[-1]
    if last.kind != "n" or last.value is None:
        return 0
    one, low = last.value == 1, texts[0]
    if low in ("%", r"\%", "percent", "pct") or texts[:2] == ["per", "cent"]:
        items[-1] = last._replace(percentage=True)
        return places[low == "per"] - at + 1
    factor = SCALES.get(low, 0) or (OF_MONEY.get(low, 0) if last.money and _alone(tokens, at) else 0)
    if factor or low in MANY_PARTS or (low in PARTS and one):
        factor = factor or Fraction(1, MANY_PARTS.get(low) or PARTS[low])
        items[-1] = last._replace(value=last.value * factor, text="scaled", money=False)
        return 1
    if low == "and" and texts[1:2] in (["a"], ["an"], ["one"]) and texts[2:3] and (below := _PARTS.get(texts[2])):
        whole = last.text == "whole" and not last.percentage
        items[-1] = last._replace(value=last.value + Fraction(1, below) if whole else None, text="mixed")
        return places[2] - at + 1
    if low == "over" and last.text == "whole" and len(places) > 1 and tokens[places[1]].kind == "n":
        items.append(Item("/", True, "/"))
        return 1
    return 0


def _alone(tokens: list[_Token], at: int) -> bool:
    """Whether a letter after a sum of money belongs to no unit or formula, as it does in $5 m^2$."""
    return not tokens[at].money and (at + 1 == len(tokens) or not _goes_on(tokens[at + 1]))


def _goes_on(token: _Token) -> bool:
    return token.kind in ("^", "/", "_", "'", "=") or (token.kind == "w" and len(token.text) == 1 and token.text != "a")


def _enclose(items: list[Item], divided: bool) -> None:
    """Makes one number of (-5) at the end, unless it belongs to what stands before it. divided: a / follows."""
    count = 4 if len(items) > 3 and items[-3].kind in ("+", "-") else 3
    opened, number = items[-count] if len(items) >= count else Item("", False), items[-2] if len(items) > 1 else None
    before = items[-count - 1] if len(items) > count else Item("", True)
    belongs = before.kind in ("n", "c", ")") or (before.kind == "w" and not (divided and opened.gap))
    if opened.text != "(" or number.kind != "n" or number.value is None or belongs:
        return
    value = -number.value if items[-3].kind == "-" else number.value
    items[-count:] = [number._replace(gap=opened.gap, value=value, text="decimal" if count == 4 else number.text)]
    _divide(items)


def _divide(items: list[Item]) -> None:
    """Makes one number of 3/4 or 3/-4 at the end."""
    if len(items) > 3 and items[-2].kind in ("+", "-") and items[-3].kind == "/" and not items[-1].gap:
        value = items[-1].value
        items[-2:] = [items[-1]._replace(value=value if items[-2].kind == "+" or value is None else -value)]
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


def _fraction(tokens: list[_Token], at: int, depth: int) -> tuple[tuple[Fraction | None, bool], int]:
    r"""((the value of the arguments of \frac, whether they are words of a unit), the place after them)."""
    parts, digits, unit = [], "", True
    while len(parts) < 2 and at < len(tokens):
        if digits or (tokens[at].kind == "n" and tokens[at].text.isdigit()):
            digits = digits or tokens[at].text
            parts.append(Fraction(digits[0]))
            digits, at, unit = digits[1:], at + (len(digits) == 1), False
            continue
        group, at = _group(tokens, at)
        unit &= bool(group) and all(t.kind in "w^n×{}" and (t.kind != "w" or is_unit(t.text)) for t in group)
        parts.append(_single(_items(group, depth + 1)) if depth < _DEEP else None)
    if digits:  # \frac123 is 1/2 followed by a 3: ambiguous
        return (None, False), at + 1
    above, below = parts if len(parts) == 2 else (None, None)
    value = above / below if above is not None and below else None
    return (value, value is None and unit and len(parts) == 2), at


def _single(items: list[Item]) -> Fraction | None:
    """The number that the items are, apart from signs, parentheses and a unit."""
    kinds = "".join(item.kind for item in items if item.kind not in "()")
    if any(item.kind == "w" and unknown(item.text, item.gap, "") for item in items) or not re.fullmatch("[-+]*nw*", kinds):
        return None
    value = next(item.value for item in items if item.kind == "n")
    return value if value is None or kinds.count("-") % 2 == 0 else -value


def _raise(items: list[Item], group: list[_Token]) -> None:
    """Applies an exponent to the number at the end. Only powers of ten have a value; ° is a unit, th makes an ordinal."""
    kinds = "".join(t.kind for t in group if t.kind not in "{}")
    if kinds and set(kinds) == {"w"}:
        if any(t.text in _ORDINALS for t in group):
            items[-1] = items[-1]._replace(text="ordinal")
            return
        if all(t.text in (r"\circ", r"\degree", "°", "o") for t in group if t.kind == "w"):
            items.append(Item("w", True, "degrees"))
            return
    value, exponent = None, next((t.text for t in group if t.kind == "n"), "")
    if kinds in ("n", "-n", "+n") and exponent.isdigit() and len(exponent) <= 3 and items[-1][2:4] == ("whole", 10):
        value = Fraction(10) ** (-int(exponent) if kinds[0] == "-" else int(exponent))
        if len(items) > 2 and items[-2].kind == "×" and items[-3].kind == "n" and items[-3].text in ("whole", "decimal"):
            factor = items[-3]
            items[-3:] = [factor._replace(value=factor.value and factor.value * value, text="power")]
            return
    items[-1] = items[-1]._replace(value=value, text="power")
