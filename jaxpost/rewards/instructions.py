"""Verifiable instructions: one function a constraint, and `follows`, which checks a completion against a record's list.

    {"prompt": "...", "constraints": [{"kind": "includes", "words": ["fox", "moon"]}, {"kind": "full_stop"}]}

A kind is a function of this file, and a reward by itself too: dict(name="instructions.words", at_most=50). Words and letters
are compared without case. A word is a run of letters and digits, with apostrophes or hyphens inside. Counts are from at_least
to at_most. An empty completion only satisfies counts whose at_least is 0.

    words, sentences, paragraphs, lines, characters    how many (at_least, at_most)
    includes, excludes, in_order (words)               all of these words or phrases; none of them; all in this order
    keyword (word), letter (letter)                    how often it is there
    capital_words                                      how many words in capitals alone
    numbers                                            how many numbers in digits
    starts_with, ends_with (text)                      the first and the last words
    full_stop, question                                the last character
    no_commas, lower_case, upper_case, title_case      of the whole completion; words that have letters
    ascii                                              no letter with an accent, no other script
    bullets, numbered, headings, highlights            how many points (* or -), points 1. 2. 3. in order, lines with #, *words*
    placeholders                                       how many [like this]
    title                                              a <<title>>
    postscript (marker)                                a line after the first that begins with P.S.
    quoted                                             all within double quotes
    json_value (keys)                                  nothing but JSON, fenced or not; an object with these keys
    repeats_prompt                                     the prompt word for word, and then an answer
    alternatives (count, separator)                    so many different answers with ****** between them
    paragraph_starts (paragraph, word)                 the first word of the n-th paragraph
    choice (options)                                   one of these phrases, and no other of them
    no_repeats                                         no sentence twice
"""

import functools
import inspect
import json
import math
import re
from collections.abc import Callable, Sequence

from jaxpost.config.resolve import bind, nearest
from jaxpost.errors import UserError

_WORD = re.compile(r"[^\W_]+(?:['’\-][^\W_]+)*")
_FENCE = re.compile(r"\s*```(?:json)?[^\S\n]*\n(.*)```\s*", re.DOTALL | re.IGNORECASE)


def follows(record: dict, completion: str, *, strict: bool = False) -> float:
    """The share of record["constraints"] that a completion satisfies; strict: 1 if it satisfies all, else 0.

    Raises UserError for a record without constraints, an unknown kind and a wrong or missing argument.
    """
    constraints = record.get("constraints")
    if not isinstance(constraints, Sequence) or isinstance(constraints, str) or not constraints:
        raise UserError(
            f"record with the keys {', '.join(record)}: it has no list of constraints, such as [{{'kind': 'full_stop'}}]."
        )
    kept = [_holds(constraint, record, completion) for constraint in constraints]
    return float(all(kept)) if strict else sum(kept) / len(kept)


@functools.cache
def _kinds() -> dict[str, Callable]:
    """The constraints of this file. A record is data: it may name these and nothing else."""
    functions = {k: v for k, v in globals().items() if inspect.isfunction(v) and v.__module__ == __name__ and v is not follows}
    return {name: function for name, function in functions.items() if not name.startswith("_")}


def _holds(constraint: dict, record: dict, completion: str) -> bool:
    kind = constraint.get("kind") if isinstance(constraint, dict) else None
    if not isinstance(kind, str) or kind not in _kinds():
        raise UserError(f"record's constraint {constraint!r}: unknown kind.{nearest(str(kind), _kinds())}")
    # Some data sets list the arguments of all kinds, null where they do not belong to this one.
    options = {k: v for k, v in constraint.items() if k != "kind" and v is not None}
    bound = bind(_kinds()[kind], options, f"a record's constraint {kind}")
    try:
        return bound(record, completion)
    except (TypeError, AttributeError) as error:
        raise UserError(f"record's constraint {constraint!r}: an argument of another kind than it takes ({error}).") from error


def _within(count: int, at_least: int, at_most: float) -> bool:
    if at_least > at_most:
        raise UserError(f"a constraint of at_least {at_least} and at_most {at_most}: no count is within.")
    return at_least <= count <= at_most


def _words(text: str) -> list[str]:
    return [word.casefold() for word in _WORD.findall(text)]


def _paragraphs(text: str) -> list[str]:
    return [part.strip() for part in re.split(r"\n[^\S\n]*\n", text) if part.strip()]


def _sentences(text: str) -> list[str]:
    return [part.strip() for part in re.split(r"(?<=[.!?…])[\"'”’)\]]*+\s++|\n++", text) if _WORD.search(part)]


@functools.lru_cache(maxsize=1024)
def _phrase(phrase: str) -> re.Pattern:
    if not phrase.strip():
        raise UserError("a constraint's word is empty.")
    return re.compile(r"(?<!\w)" + r"\s+".join(map(re.escape, phrase.split())) + r"(?!\w)", re.IGNORECASE)


def _all(words: Sequence[str]) -> Sequence[str]:
    """The words of a constraint. Refuses a string, which would be read as its letters."""
    if isinstance(words, str) or not words:
        raise UserError(f"a constraint's words {words!r}: give a list of them.")
    return words


def words(record: dict, completion: str, *, at_least: int = 0, at_most: float = math.inf) -> bool:
    """Whether the number of words is within bounds."""
    return _within(len(_words(completion)), at_least, at_most)


def sentences(record: dict, completion: str, *, at_least: int = 0, at_most: float = math.inf) -> bool:
    """Whether the number of sentences is within bounds. A sentence ends in . ! ? or … before white space, or with its line."""
    return _within(len(_sentences(completion)), at_least, at_most)


def paragraphs(record: dict, completion: str, *, at_least: int = 0, at_most: float = math.inf) -> bool:
    """Whether the number of paragraphs, separated by empty lines, is within bounds."""
    return _within(len(_paragraphs(completion)), at_least, at_most)


def lines(record: dict, completion: str, *, at_least: int = 0, at_most: float = math.inf) -> bool:
    """Whether the number of lines that are not empty is within bounds."""
    return _within(sum(bool(line.strip()) for line in completion.splitlines()), at_least, at_most)


def characters(record: dict, completion: str, *, at_least: int = 0, at_most: float = math.inf) -> bool:
    """Whether the number of characters, with white space, is within bounds."""
    return _within(len(completion), at_least, at_most)


def includes(record: dict, completion: str, *, words: Sequence[str]) -> bool:
    """Whether each of these words or phrases occurs, as a whole."""
    return all(_phrase(word).search(completion) for word in _all(words))


def excludes(record: dict, completion: str, *, words: Sequence[str]) -> bool:
    """Whether none of these words or phrases occurs."""
    return bool(_words(completion)) and not any(_phrase(word).search(completion) for word in _all(words))


def in_order(record: dict, completion: str, *, words: Sequence[str]) -> bool:
    """Whether these words or phrases occur in this order."""
    place = 0
    for word in _all(words):
        if (match := _phrase(word).search(completion, place)) is None:
            return False
        place = match.end()
    return True


def keyword(record: dict, completion: str, *, word: str, at_least: int = 1, at_most: float = math.inf) -> bool:
    """Whether the number of occurrences of the word or phrase is within bounds."""
    return _within(len(_phrase(word).findall(completion)), at_least, at_most)


def letter(record: dict, completion: str, *, letter: str, at_least: int = 1, at_most: float = math.inf) -> bool:
    """Whether the number of occurrences of the letter is within bounds."""
    if len(letter) != 1:
        raise UserError(f"a constraint's letter {letter!r}: give one character.")
    return _within(completion.casefold().count(letter.casefold()), at_least, at_most)


def capital_words(record: dict, completion: str, *, at_least: int = 1, at_most: float = math.inf) -> bool:
    """Whether the number of words of two or more capitals is within bounds."""
    return _within(sum(w.isupper() and len(w) > 1 for w in _WORD.findall(completion)), at_least, at_most)


def numbers(record: dict, completion: str, *, at_least: int = 1, at_most: float = math.inf) -> bool:
    """Whether the number of numbers in digits is within bounds."""
    return _within(len(re.findall(r"\d++(?:[.,]\d++)*+", completion)), at_least, at_most)


def starts_with(record: dict, completion: str, *, text: str) -> bool:
    """Whether the completion begins with the text, ignoring white space."""
    return completion.lstrip().casefold().startswith(text.casefold())


def ends_with(record: dict, completion: str, *, text: str) -> bool:
    """Whether the completion ends with the text, ignoring white space."""
    return completion.rstrip().casefold().endswith(text.casefold())


def full_stop(record: dict, completion: str) -> bool:
    """Whether the completion ends in a full stop, not in an ellipsis."""
    text = completion.rstrip()
    return text.endswith(".") and not text.endswith("..") and bool(_words(text))


def question(record: dict, completion: str) -> bool:
    """Whether the completion ends in a question mark."""
    return completion.rstrip().endswith("?")


def no_commas(record: dict, completion: str) -> bool:
    """Whether there is text, and no comma in it."""
    return bool(_words(completion)) and "," not in completion


def lower_case(record: dict, completion: str) -> bool:
    """Whether there are letters, and no capital one."""
    return completion.islower()


def upper_case(record: dict, completion: str) -> bool:
    """Whether there are letters, and only capital ones."""
    return completion.isupper()


def title_case(record: dict, completion: str) -> bool:
    """Whether every word that begins with a letter begins with a capital one."""
    firsts = [word[0] for word in _WORD.findall(completion) if word[0].isalpha()]
    return bool(firsts) and all(first == first.upper() for first in firsts)


def ascii(record: dict, completion: str) -> bool:
    """Whether there are letters, and only ASCII ones. Other characters may be outside of ASCII, such as a long dash."""
    letters = [c for c in completion if c.isalpha()]
    return bool(letters) and all(map(str.isascii, letters))


def bullets(record: dict, completion: str, *, at_least: int = 1, at_most: float = math.inf) -> bool:
    """Whether the number of lines that begin with "* ", "- " or "• " is within bounds."""
    return _within(len(re.findall(r"^[^\S\n]*+[*\-•][^\S\n]+\S", completion, re.MULTILINE)), at_least, at_most)


def numbered(record: dict, completion: str, *, at_least: int = 1, at_most: float = math.inf) -> bool:
    """Whether the number of lines that begin with "1. ", "2. ", ... (or "1) ", ...) in this order is within bounds."""
    points = re.findall(r"^[^\S\n]*+([0-9]{1,6})[.)][^\S\n]+\S", completion, re.MULTILINE)
    return _within(len(points), at_least, at_most) and [int(x) for x in points] == list(range(1, len(points) + 1))


def headings(record: dict, completion: str, *, at_least: int = 1, at_most: float = math.inf) -> bool:
    """Whether the number of headings, lines that begin with # to ######, is within bounds."""
    return _within(len(re.findall(r"^#{1,6}[^\S\n]+\S", completion, re.MULTILINE)), at_least, at_most)


def highlights(record: dict, completion: str, *, at_least: int = 1, at_most: float = math.inf) -> bool:
    """Whether the number of parts *like this* or **like this**, each within a line, is within bounds."""
    return _within(len(re.findall(r"(\*{1,2})(?=[^\s*])[^*\n]++\1", completion)), at_least, at_most)


def placeholders(record: dict, completion: str, *, at_least: int = 1, at_most: float = math.inf) -> bool:
    """Whether the number of placeholders [like this] is within bounds."""
    return _within(len(re.findall(r"\[[^\[\]\n]++\]", completion)), at_least, at_most)


def title(record: dict, completion: str) -> bool:
    """Whether there is a title in double angle brackets, <<like this>>, within a line."""
    return re.search(r"<<[^\S\n]*+[^<>\s][^<>\n]*+>>", completion) is not None


def postscript(record: dict, completion: str, *, marker: str = "P.S.") -> bool:
    """Whether a line after the first begins with the marker and has more text."""
    later = [line.strip() for line in completion.strip().split("\n")[1:]]
    return any(line.casefold().startswith(marker.casefold()) and len(line) > len(marker) for line in later)


def quoted(record: dict, completion: str) -> bool:
    """Whether the completion is in double quotes, straight or curly."""
    text = completion.strip()
    return len(text) > 2 and (text[0], text[-1]) in (('"', '"'), ("“", "”"))


def json_value(record: dict, completion: str, *, keys: Sequence[str] = ()) -> bool:
    """Whether the completion is one JSON value, fenced or not; with `keys`, an object that has them."""
    fenced = _FENCE.fullmatch(completion)
    try:
        value = json.loads(fenced[1] if fenced else completion, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        return False
    return not keys or (isinstance(value, dict) and all(key in value for key in _all(keys)))


def _no_constant(name: str):
    raise ValueError(f"{name} is no JSON")


def repeats_prompt(record: dict, completion: str) -> bool:
    """Whether the completion repeats the record's prompt word for word and then continues."""
    if not isinstance(prompt := record.get("prompt"), str):
        raise UserError(f"record with the keys {', '.join(record)}: there is no text under `prompt` to be repeated.")
    before, after = " ".join(prompt.split()), " ".join(completion.split())
    return after.startswith(before) and len(after) > len(before)


def alternatives(record: dict, completion: str, *, count: int = 2, separator: str = "******") -> bool:
    """Whether there are `count` different answers with the separator between them."""
    if not separator:
        raise UserError("a constraint's separator is empty.")
    parts = [part.strip() for part in completion.split(separator)]
    return len(parts) == count and all(parts) and len(set(parts)) == count


def paragraph_starts(record: dict, completion: str, *, paragraph: int, word: str) -> bool:
    """Whether the n-th paragraph, counted from 1, begins with the word."""
    parts = _paragraphs(completion)
    return 1 <= paragraph <= len(parts) and _phrase(word).match(parts[paragraph - 1]) is not None


def choice(record: dict, completion: str, *, options: Sequence[str]) -> bool:
    """Whether exactly one of these phrases occurs."""
    return sum(_phrase(option).search(completion) is not None for option in _all(options)) == 1


def no_repeats(record: dict, completion: str) -> bool:
    """Whether there are sentences, and none occurs twice."""
    texts = [" ".join(_words(sentence)) for sentence in _sentences(completion)]
    return bool(texts) and len(set(texts)) == len(texts)
