r"""A text's formula as LaTeX for math-verify, where math-verify reads it correctly.

math-verify takes a number out of words ("at least 5"), reads a ratio as a quotient and drops signs that it does not know. So a
text that is no formula never reaches it: `in_words` tells such a text, `evaluates` one that may be a number.
"""

import re

_FUNCTIONS = "pi|sin|cos|tan|cot|sec|csc|log|ln|lg|exp|sqrt|arcsin|arccos|arctan"
_NO_FORMULA = re.compile(
    r"[0-9] ?: ?[0-9]|[0-9]/[0-9]+/[0-9]"  # a ratio or a time, a date
    r"|^\s*[0-9.,]+ ?[-\u2013] ?[0-9.,]+\s*$|\.\."  # a range
    r"|[0-9]_|[0-9][A-F]\b|0[xX][0-9]"  # a number with its base
    r"|[-+*/]\s*$"  # 5+
    rf"|(?<![\\A-Za-z])(?!(?:{_FUNCTIONS})\b)(?:[A-Za-z]{{3,}}|(?:or|to|of|in|at|by|no)\b)"
    r"|[^\x00-\x7f]"
)
_WORDED = re.compile(r"\\(?:text\w*|math\w+|mbox|operatorname) ?\{[^{}]{0,200}\}|\\(?:begin|end) ?\{[^{}]{0,40}\}")
_INLINE = re.compile(r"\$([^$\n]{1,400})\$|\\\(([^\n]{1,400}?)\\\)")

# What may stand behind a number, and what makes a formula none.
_UNIT = re.compile(
    r"\\(?:text|mathrm|mbox) ?\{(?![^{}]{0,60}\b(?:or|and|to|not|more|less|least|most|than|mod)\b)[^{}]{0,60}\}"
    r"(?:\^\{?[0-9]\}?)?[^\w{}]{0,9}$"
)
_UNKNOWN = re.compile(
    r"[<>=≈≡:;,_]|\\(?:le|leq|ge|geq|lt|gt|ne|neq|in|not|to|pm|mp|sim|text|mathrm|mbox|langle|[lc]?dots|implies)(?![A-Za-z])"
    r"|(?<![\\A-Za-z])(?!e\^)[A-Za-z]|\\Rightarrow"
)

_SIGNS = {"π": r"\pi ", "∞": r"\infty ", "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ", "×": r"\times ", "·": r"\cdot "}
_SIGNS |= {"⌊": r"\lfloor ", "⌋": r"\rfloor ", "⌈": r"\lceil ", "⌉": r"\rceil ", "−": "-", "°": r"^\circ ", "±": r"\pm "}
_SIGNS |= {"∪": r"\cup ", "∩": r"\cap ", "∅": r"\emptyset ", "θ": r"\theta ", "α": r"\alpha ", "β": r"\beta ", "÷": r"\div "}
_RAISED = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺", "0123456789-+")
_ROOT = re.compile(r"(?:√|(?<![\\A-Za-z])sqrt) ?(\([^()]{1,60}\)|\{[^{}]{1,60}\}|[0-9]{1,30}|[A-Za-z])")
_FUNCTION = re.compile(r"(?<![\\A-Za-z])(pi|sin|cos|tan|cot|log|ln|exp)(?![A-Za-z])")
_AGAIN = r"\\(?:overline|bar|dot) ?\{([0-9]{1,30})\}|\(([0-9]{1,30})\)|([0-9]{1,9}?)\5{1,30}(?:\.\.\.|…|\\l?dots)"
_RECURRING = re.compile(rf"([0-9]{{1,30}})\.([0-9]{{0,30}}?)(?:{_AGAIN})")

_LEAD = re.compile(rf"(?:\s*(?!(?:{_FUNCTIONS})\b)(?:[A-Za-z]{{2,}}|a)\b){{0,20}}\s*")
_FORMULA = re.compile(rf"(?:(?!(?<![\\A-Za-z])(?!(?:{_FUNCTIONS})\b)[A-Za-z]{{3,}}).){{1,400}}", re.DOTALL)


def in_words(answer: str) -> bool:
    """Whether an answer is no formula, so that only its words can be compared. Of $...$ in it, only that part counts."""
    formula = " ".join(_formulas(answer)) or answer
    return bool(_NO_FORMULA.search(latex(_WORDED.sub(" ", formula).strip("$ \n"))))


def evaluates(formula: str) -> bool:
    """Whether a formula may be a number: without relations, unknowns and words, but for `name =` before it and a unit after."""
    name, _, formula = formula.rpartition("=")
    if re.search(r"[0-9<>!=]|\\not", name):
        return False
    formula = latex(_UNIT.sub("", formula.strip("$ \n")))
    return not (_NO_FORMULA.search(formula) or _UNKNOWN.search(formula))


def spoken(text: str, *, whole: bool) -> str:
    """The formula of a sentence: its last $...$; else all of it if `whole`, or what follows its first words."""
    if formulas := _formulas(text):
        return formulas[-1]
    if not whole:
        text = formula[0] if (formula := _FORMULA.match(text, _LEAD.match(text).end())) else ""
    return text.strip().partition("\n")[0].rstrip(" .,;:!*")


def latex(text: str) -> str:
    """A text with its signs, roots and recurring decimals as LaTeX that math-verify reads."""
    text = _RECURRING.sub(_recurring, text)
    text = re.sub("[⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺]+", lambda match: f"^{{{match[0].translate(_RAISED)}}}", text)
    text = _ROOT.sub(lambda match: rf"\sqrt{{{match[1].strip('{}')}}}", text)
    return _FUNCTION.sub(r"\\\1 ", "".join(_SIGNS.get(char, char) for char in text))


def _formulas(text: str) -> list[str]:
    return ["".join(groups) for groups in _INLINE.findall(text)]


def _recurring(match: re.Match) -> str:
    """0.1(6) as a quotient."""
    whole, once, again = match[1], match[2], match[3] or match[4] or match[5]
    below = (10 ** len(again) - 1) * 10 ** len(once)
    return rf"\frac{{{int(whole + once + again) - int(whole + once)}}}{{{below}}}"
