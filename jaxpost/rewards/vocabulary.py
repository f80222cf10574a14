"""The English words that change the meaning of a number beside them; every other word is a unit or ignored."""

import re


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Words that multiply or divide the number before them.
SCALES = {"hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
SCALES |= {"lakh": 10**5, "lac": 10**5, "crore": 10**7, "dozen": 12}
SCALES |= {f"{word}s": factor for word, factor in SCALES.items()} | {"tens": 10}
SCALES |= {"mn": 10**6, "mln": 10**6, "bn": 10**9, "bln": 10**9, "tn": 10**12, "trn": 10**12}
OF_MONEY = {"k": 10**3, "m": 10**6, "b": 10**9, "t": 10**12, "cr": 10**7}  # after $5 alone
PARTS = {"half": 2, "third": 3, "fourth": 4, "fifth": 5, "sixth": 6, "seventh": 7, "eighth": 8, "ninth": 9, "tenth": 10}
PARTS |= {"hundredth": 100, "thousandth": 1000, "millionth": 10**6}
MANY_PARTS = {"halves": 2} | {f"{word}s": below for word, below in PARTS.items()}  # a quarter is a coin as well
UNREAD = _words("mil mio mrd gross myriad pi phi tau factorial choose mod modulo doubled halved tripled minimum maximum zero")
UNREAD |= _words("sqrt cbrt log ln lg sin cos tan cot csc arcsin arccos arctan exp floor ceil ceiling gcd lcm")
POWERS = _words("squared cubed")  # of a number; "72 meters squared" is a unit
MONTHS = _words("January February March April May June July August September October November December")
MONTHS |= _words("Jan Feb Mar Apr Jun Jul Aug Sep Sept Oct Nov Dec")

# Words that change the number after them, maybe with some of OF in between.
TAKES = _words("twice thrice double triple quadruple half third quarter root square cube log ln lg sqrt cbrt sin cos tan cot")
TAKES |= _words("csc arcsin arccos arctan exp abs floor ceil ceiling gcd lcm reciprocal inverse factorial")
OF = _words("of the a an as many much that number this those these his her their its")
WHOLE = _words("the his her their its those these my our your all")  # 72 of the 100 pages

# Words that deny or bound the number after them.
NOT = _words("not never neither nor cannot without except instead unlike")
STILL = _words("equal to exactly quite only have has be just more than less really actually or least most at between")
BEYOND = _words("under below above over nearly almost between exceeding exceeds beyond")
MORE = _words("more less fewer greater higher lower larger smaller above below over under up beyond older younger so")
MORE |= _words("longer shorter later earlier")

# Words between two numbers that do not make one: 3 to 5, 3 vs 5, 1 in 5.
BETWEEN = _words("to through thru till until vs versus v")
RATIO = _words("of in by per")
IS = _words("is are was were be equals equal makes gives becomes totals")
HAS = _words("have has had get gets got makes made take takes took need needs needed cost costs pay pays paid earn earns read")
HAS |= _words("reads eat eats ate buy buys bought sell sells sold give gives gave leave leaves left use uses used own owns")
WHY = _words("because since as")
SO = _words("so therefore thus hence")
ASIDE = _words("but where while whereas if when")
TIMES = _words("second seconds minute minutes hour hours day days week weeks month months year years")
ADJUNCT = _words("after before within during since per every each")
AROUND = _words("in at on by for with from") | ADJUNCT  # before a number that is not a marked sentence's answer
FILLERS = _words("a an the that about approximately approx exactly roughly around only just simply therefore thus indeed equal")
FILLERS |= _words("to be then so also")
# Words that keep two quantities apart: 72 pages of 5.
APART = _words("of in from out for per at by with than after to on is are was were the a as more less if so then left")

# Letters and short words that are units: of one letter where it touches the number, and where it does not.
TOUCHING, LETTERS = frozenset("mgshlLJNVW"), frozenset("mgshlLJNVWACFKtd")
SHORT = _words("mm cm dm km in ft yd mi ml cl dl kl mg kg lb lbs oz ms ns us hr hrs min mins sec secs am pm hz khz mhz ghz kw")
SHORT |= _words("mw gw kwh wh pa kpa kj kn kv ma mv kb mb gb tb kbs mbs gbs bit pt pts px kph mph rpm fps bps mol rad deg cal")
SHORT |= _words("yrs yr wk wks mo day ha cc sq usd eur gbp inr yen won rs pct men pcs cts ths rds")


def denies(word: str) -> bool:
    """Whether a word, in small letters, denies what follows it."""
    return word in NOT or word.endswith(("n't", "n’t"))


def is_unit(word: str) -> bool:
    """Whether a word of a formula is a unit and no unknown."""
    return word in LETTERS if len(word) == 1 else word.casefold() in SHORT or len(word) > 3


_XYZ = re.compile(r"[xyz]{2,}", re.IGNORECASE)
_REST = re.compile(r"r[0-9]+", re.IGNORECASE)
_GREEK = re.compile(r"[α-ωΑ-ΨϕϵΠΘ]")
_EASTERN = re.compile(r"[百千万億亿兆백천만억조]")


def unknown(word: str, apart: bool, following: str) -> bool:
    """Whether a word after a number is no unit: an unknown, a digit of a base, an unsupported scale.

    apart: it does not touch the number. following: the kind of the next item.
    """
    if (
        _XYZ.fullmatch(word)
        or _REST.fullmatch(word)
        or _EASTERN.match(word)
        or (_GREEK.match(word) and not word.startswith("μ"))
    ):
        return True
    if not apart and any(map(str.isdigit, word)):
        return True
    if len(word) == 1 and word.isascii():
        article = word in "aI" and apart and following == "w"
        return not article and word not in (LETTERS if apart else TOUCHING)
    return not apart and len(word) < 4 and word.isascii() and word.casefold() not in SHORT
