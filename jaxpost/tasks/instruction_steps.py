"""The steps of the playground `instructions`, their wordings, and the sixty tasks that are made of them.

A step is an operation on a list of letters, digits or words. `STEPS` has the 24 of them, `WORDINGS` four phrases of each, and
`CATEGORIES` the tasks: each step by itself, and grids of two and three steps.
"""

import itertools
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from string import ascii_lowercase
from typing import NamedTuple

GROUPS = {
    "animal": ["bear", "cat", "cow", "dog", "fish", "goat", "hen", "horse", "mouse", "owl", "pig", "wolf"],
    "fruit": ["apple", "banana", "cherry", "fig", "grape", "guava", "kiwi", "lemon", "mango", "melon", "papaya", "pear"],
    "colour": ["black", "blue", "brown", "gold", "green", "grey", "pink", "purple", "red", "silver", "white", "yellow"],
}
GROUP = {word: group for group, words in GROUPS.items() for word in words}
NUMERALS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
ITEMS = {"letters": list(ascii_lowercase), "digits": list("0123456789"), "words": list(GROUP)}

_WORDINGS = """
copy: copy the {items} | repeat the {items} as they are | write the same {items} again | leave the {items} unchanged
reverse: reverse the {items} | write the {items} backwards | turn the order of the {items} around
    | go from the last of the {items} to the first
sort: sort the {items} | put the {items} in ascending order | arrange the {items} from the lowest to the highest
    | write the {items} so that they rise
descend: sort the {items} downwards | put the {items} in descending order | arrange the {items} from the highest to the lowest
    | write the {items} so that they fall
rotate: move the first {item} to the end | put the {item} in front behind the others
    | shift the {items} one place to the left | rotate the {items} by one
swap: swap the first and the last {item} | exchange the {items} at the two ends | let the outer {items} trade places
    | switch the {item} in front with the one at the back
vowels: keep the vowels | drop every consonant | take only the vowels | leave out the consonants
odd: keep the odd digits | drop every even digit | take only the odd digits | leave out the even digits
large: keep the digits above 4 | drop every digit below 5 | take only digits of 5 or more | leave out the digits 0 to 4
animals: keep the animals | drop every fruit and colour | take only the animals | leave out the fruits and colours
distinct: keep each {item} once | drop every repeat | take only the first of equal {items} | leave out the repeats
alternate: keep one {item}, skip one, keep one | drop every second {item} | take only the {items} at odd places
    | leave out the {items} at even places
next: replace each letter by the next | move every letter on by one | change all letters to their successors
    | write what comes after each letter
upper: replace each letter by its capital | make every letter large | change all letters to capitals
    | write the letters in capitals
increase: replace each digit by one more | make every digit larger by one | change all digits by adding one
    | write each digit plus one
spell: replace each digit by its name | spell every digit | change all digits to words | write the digits as words
initial: replace each word by its initial | shorten every word to one letter | change all words to their first letters
    | write the letters that the words begin with
group: replace each word by animal, fruit or colour | call every word an animal, a fruit or a colour
    | change all words to their groups | write the group of each word
count: count the {items} | write how many {items} there are | give the number of {items} | say how long the list of {items} is
first: find the first {item} | write only the {item} in front | give the {item} that comes first | say how the {items} begin
last: find the last {item} | write only the {item} at the back | give the {item} that comes last | say how the {items} end
most: find the most frequent {item} | write only the commonest {item} | give the {item} that occurs most often
    | say of which {item} there are most
parity: find out whether the number of {items} is odd or even | write odd or even for the number of {items}
    | give the parity of the number of {items} | say odd or even for how many {items} there are
compare: find out by yes or no whether the first {item} is lower than the last
    | write yes if the {items} end higher than they begin, else no
    | give yes if the last {item} is higher than the first, else no | say yes or no for a first {item} below the last
"""
WORDINGS = {
    name: tuple(phrase.strip() for phrase in phrases.split("|"))
    for name, phrases in (entry.split(": ", 1) for entry in _WORDINGS.strip().replace("\n    ", " ").splitlines())
}
_JOINED = (("", ", then "), ("first ", ". Then "), ("", ". After that, "), ("", " and "))  # steps, by wording


class Step(NamedTuple):
    """An operation on a list of items. Where it is the first of a task, the input is drawn for it."""

    takes: Sequence[str]  # kinds of lists
    apply: Callable[[list[str]], list[str]]  # [] where the operation is undefined
    gives: str = ""  # the kind of the result, or the same kind
    half: Collection[str] = ()  # the input has about as many of these items as of others
    repeats: bool = False  # the input has repeated items


def _selected(kind, kept):
    return Step([kind], lambda x: [item for item in x if item in kept], half=kept)


def _mapped(kind, change, gives=""):
    return Step([kind], lambda x: [change(item) for item in x], gives)


def _most(items):
    (item, count), (_, second) = (Counter(items).most_common(2) + [("", 0)])[:2]
    return [item] if count > second else []


_ANY = list(ITEMS)
STEPS = {
    "copy": Step(_ANY, list),
    "reverse": Step(_ANY, lambda x: x[::-1]),
    "sort": Step(_ANY, sorted),
    "descend": Step(_ANY, lambda x: sorted(x, reverse=True)),
    "rotate": Step(_ANY, lambda x: [*x[1:], x[0]]),
    "swap": Step(_ANY, lambda x: [x[-1], *x[1:-1], x[0]]),
    "vowels": _selected("letters", "aeiou"),
    "odd": _selected("digits", "13579"),
    "large": _selected("digits", "56789"),
    "animals": _selected("words", GROUPS["animal"]),
    "distinct": Step(_ANY, lambda x: list(dict.fromkeys(x)), repeats=True),
    "alternate": Step(_ANY, lambda x: x[::2]),
    "next": _mapped("letters", lambda x: ascii_lowercase[(ord(x) - ord("a") + 1) % 26]),
    "upper": _mapped("letters", str.upper),
    "increase": _mapped("digits", lambda x: str(int(x) + 1)),
    "spell": _mapped("digits", lambda x: NUMERALS[int(x)], "words"),
    "initial": _mapped("words", lambda x: x[0], "letters"),
    "group": _mapped("words", GROUP.get),
    "count": Step(_ANY, lambda x: [str(len(x))]),
    "first": Step(_ANY, lambda x: x[:1]),
    "last": Step(_ANY, lambda x: x[-1:]),
    "most": Step(_ANY, _most, repeats=True),
    "parity": Step(_ANY, lambda x: [("even", "odd")[len(x) % 2]]),
    "compare": Step(["letters", "digits"], lambda x: ["yes" if x[0] < x[-1] else "no"]),
}
_SINGLE = list(STEPS)
_GRIDS = {
    "order": itertools.product(_SINGLE[:6]),
    "select": itertools.product(_SINGLE[6:12]),
    "map": itertools.product(_SINGLE[12:18]),
    "aggregate": itertools.product(_SINGLE[18:]),
    "select_order": itertools.product(("vowels", "odd", "animals", "distinct"), ("reverse", "sort", "rotate")),
    "select_aggregate": itertools.product(("vowels", "odd", "animals", "large"), ("count", "first", "last")),
    "map_order": itertools.product(("next", "spell", "initial"), ("reverse", "sort")),
    "select_map_order": (
        (*pair, last)
        for pair in (("vowels", "upper"), ("odd", "spell"), ("animals", "initial"))
        for last in ("reverse", "sort")
    ),
}
_STEPS_OF = {category: {"_".join(steps): steps for steps in grid} for category, grid in _GRIDS.items()}
CATEGORIES = {category: tuple(grid) for category, grid in _STEPS_OF.items()}  # category -> names of tasks
TASKS = {name: steps for grid in _STEPS_OF.values() for name, steps in grid.items()}  # name of a task -> names of its steps


def definition(name: str, kind: str, wording: int) -> str:
    """What a task does, in words, for a kind of items; wording: 0 to 3."""
    phrases = []
    for step in TASKS[name]:
        phrases.append(WORDINGS[step][wording].format(items=kind, item=kind.removesuffix("s")))
        kind = STEPS[step].gives or kind
    opening, between = _JOINED[wording]
    text = (opening if len(phrases) > 1 else "") + between.join(phrases)
    return f"{text[0].upper()}{text[1:]}."


def applied(steps: Sequence[str], items: Sequence[str]) -> list[str]:
    """What the steps make of the items, or [] where one of them is undefined."""
    result = list(items)
    for step in steps:
        result = STEPS[step].apply(result) if result else []
    return result


def fact(number: int) -> str:
    """A sentence that is true of an item; number: draws the sentence and the item."""
    form, number = number % 8, number // 8
    word, place, digit = ITEMS["words"][number % len(GROUP)], number % 26, number % 10
    letter, group = ascii_lowercase[place], GROUP[word]
    return (
        f"{word} is {'an' if group == 'animal' else 'a'} {group}.",
        f"{word} begins with {word[0]}.",
        f"{letter} is a {'vowel' if letter in STEPS['vowels'].half else 'consonant'}.",
        f"after {letter} comes {ascii_lowercase[(place + 1) % 26]}.",
        f"the capital letter of {letter} is {letter.upper()}.",
        f"{digit} is spelled {NUMERALS[digit]}.",
        f"{digit} is {'odd' if digit % 2 else 'even'}.",
        f"{digit} plus one is {digit + 1}.",
    )[form]
