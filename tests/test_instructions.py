"""Each constraint on completions that follow it and on ones that nearly do."""

import re

import pytest

from jaxpost.errors import UserError
from jaxpost.rewards import instructions

# kind -> (its arguments, completions that follow it, completions that do not).
CASES = {
    "words": ({"at_least": 2, "at_most": 3}, ["two words", "it's well-known, too"], ["one", "one two three four", "", "— !"]),
    "sentences": ({"at_least": 2, "at_most": 2}, ["One. Two!", 'He "no." She', "a\nb"], ["One, 1.5 two.", "A. B. C."]),
    "paragraphs": ({"at_least": 2, "at_most": 2}, ["a\n\nb", "a\n \n\nb\n\n"], ["a\nb", "a\n\nb\n\nc"]),
    "lines": ({"at_least": 2, "at_most": 2}, ["a\nb", "a\n\n\nb\n"], ["a", "a\nb\nc"]),
    "characters": ({"at_least": 2, "at_most": 3}, ["ab", "a b"], ["a", "abcd"]),
    "includes": (
        {"words": ["fox", "red moon"]},
        ["A Fox, a red\nmoon.", "RED MOON fox"],
        ["foxes and a red moon", "fox, red, moon", "", "redmoon fox"],
    ),
    "excludes": ({"words": ["fox", "red moon"]}, ["foxes, moon", "red. Moon"], ["a FOX", "the red  moon", ""]),
    "in_order": ({"words": ["one", "two"]}, ["one, then two", "two one two"], ["two one", "onetwo", "one"]),
    "keyword": ({"word": "fox", "at_least": 2, "at_most": 2}, ["fox, Fox"], ["fox", "fox fox fox", "fox foxes"]),
    "letter": ({"letter": "E", "at_least": 2, "at_most": 2}, ["eve", "E, e"], ["e", "eee"]),
    "capital_words": ({"at_least": 1, "at_most": 2}, ["a LOUD word", "TWO WORDS"], ["I am A", "Loud", "ONE TWO THREE"]),
    "numbers": ({"at_least": 2, "at_most": 2}, ["1 and 2", "1,000.5 of 3"], ["12", "1 2 3", "one"]),
    "starts_with": ({"text": "Once upon"}, ["Once upon a", " once upon"], ["At once upon", "Once", ""]),
    "ends_with": ({"text": "the end."}, ["It is the end.", "The End. \n"], ["the end", "the end. Or", ""]),
    "full_stop": ({}, ["The end.", "1. "], ["The end", "The end...", "The end?", "", "."]),
    "question": ({}, ["Why?", "Why? \n"], ["Why", "Why? Because.", ""]),
    "no_commas": ({}, ["one two"], ["one, two", "", "..."]),
    "lower_case": ({}, ["all small 1.", "é"], ["Not all", "123", ""]),
    "upper_case": ({}, ["ALL BIG 1.", "É"], ["NOT ALl", "123", ""]),
    "title_case": ({}, ["The Old Man", "The 39 Steps"], ["The old Man", "39", ""]),
    "ascii": ({}, ["plain — text"], ["café", "привет", "", "123"]),
    "bullets": ({"at_least": 2, "at_most": 2}, ["* a\n* b", "of:\n- a\n  - b\n"], ["- a", "*a\n*b", "a - b\n- c", "- \n- "]),
    "numbered": ({"at_least": 2}, ["1. a\n2. b", "x\n1) a\ny\n2) b"], ["1. a", "1. a\n3. b", "2. a\n1. b", "1 a\n2 b"]),
    "headings": ({"at_least": 2}, ["# A\n## B", "x\n# A\ny\n###### B"], ["# A", "#A\n#B", "A # B\n# C", "####### A\n# B"]),
    "highlights": ({"at_least": 2}, ["*a* and **b c**", "*a**b*"], ["*a*", "* a * b * c", "**a**", "*a\nb* *c"]),
    "placeholders": ({"at_least": 2}, ["[name], [your address]"], ["[name]", "[]", "[a\nb] [c]", "a] [b"]),
    "title": ({}, ["<<A Title>>\ntext", "x <<a b>>"], ["<A Title>", "<<>>", "<< >>", "<<a\nb>>", "<<a>"]),
    "postscript": ({}, ["Dear you\n\nP.S. more", "a\np.s.: b\nc"], ["P.S. more", "a P.S. b", "a\nP.S.", "a\nPS more"]),
    "quoted": ({}, ['"All of it."', " “this”\n"], ['"Part" of it', '"', '""', "'single'", "none"]),
    "json_value": (
        {"keys": ["a"]},
        ['{"a": 1}', ' {"b": [], "a": null}\n', '```json\n{"a": 1}\n```', '```\n{"a": "```"}\n```\n'],
        ['{"b": 1}', '["a"]', "{'a': 1}", 'So: {"a": 1}', '{"a": NaN}', '```json\n{"a": 1}', "", "[" * 10**5, "1" * 10**5],
    ),
    "repeats_prompt": ({}, ["Say a\nthing. Thing"], ["Say a thing.", "Say: a thing. Thing", "thing", ""]),
    "alternatives": ({"count": 2}, ["one\n******\ntwo"], ["one", "one ****** one", "a******b******c", "******a", ""]),
    "paragraph_starts": ({"paragraph": 2, "word": "Then"}, ["a\n\nThen", "a\n\nthen, b\n\nc"], ["Then", "a\n\nThence"]),
    "choice": ({"options": ["yes", "no", "not sure"]}, ["Yes.", "not sure"], ["yes, no", "yesterday", "", "not  sure, no"]),
    "no_repeats": ({}, ["One. Two.", "a b\na c"], ["One. Two. ONE!", "", "a b\na  b"]),
}  # fmt: skip
RECORD = {"prompt": "Say a  thing.", "answer": "1"}


def test_every_kind_has_its_cases_and_its_line_in_the_table():
    assert set(CASES) == set(instructions._kinds()) and len(CASES) >= 20
    told = set(re.findall(r"\w+", " ".join(re.findall(r"^    ([a-z_, ]+)", instructions.__doc__, re.MULTILINE))))
    assert set(CASES) <= told, set(CASES) - told


@pytest.mark.parametrize("kind", CASES)
def test_a_constraint_holds_where_it_should(kind):
    arguments, good, bad = CASES[kind]
    function = getattr(instructions, kind)
    assert [text for text in good if function(RECORD, text, **arguments) is not True] == []
    assert [text for text in bad if function(RECORD, text, **arguments) is not False] == []
    for texts, kept in ((good, 1.0), (bad, 0.0)):
        record = {**RECORD, "constraints": [{"kind": kind, **arguments, "unused": None}]}
        assert {instructions.follows(record, text) for text in texts} == {kept}


def test_follows_is_the_share_and_strict_is_all_or_nothing():
    record = {"constraints": [{"kind": "includes", "words": ["fox"]}, {"kind": "full_stop"}, {"kind": "words", "at_most": 2}]}
    assert instructions.follows(record, "A fox.") == instructions.follows(record, "A fox.", strict=True) == 1.0
    assert instructions.follows(record, "A fox") == 2 / 3 and instructions.follows(record, "A fox", strict=True) == 0.0
    assert instructions.follows(record, "One two three") == 0.0


@pytest.mark.parametrize(
    ("constraint", "message"),
    [
        ({"kind": "full_stopp"}, "Did you mean 'full_stop'"),
        ({"kind": "follows"}, "unknown kind"),
        ({"kind": "bind"}, "unknown kind"),  # a function that this file only uses
        ({"kind": "_within"}, "unknown kind"),
        ({"kind": "os.system"}, "unknown kind"),
        ({"kind": ["words"]}, "unknown kind"),
        ({"words": 3}, "unknown kind"),
        ("full_stop", "unknown kind"),
        ({"kind": "words", "at_mots": 3}, "Did you mean 'at_most'"),
        ({"kind": "words", "at_most": "3"}, "it takes a number"),
        ({"kind": "words", "at_least": 3, "at_most": 2}, "no count is within"),
        ({"kind": "includes"}, "needs words"),
        ({"kind": "includes", "words": "fox"}, "it takes a list of texts"),
        ({"kind": "includes", "words": []}, "give a list"),
        ({"kind": "includes", "words": [" "]}, "is empty"),
        ({"kind": "starts_with", "text": 3}, "it takes a text"),
        ({"kind": "letter", "letter": "ab"}, "one character"),
        ({"kind": "alternatives", "separator": ""}, "separator is empty"),
    ],
)
def test_a_constraint_that_means_nothing_is_the_users_to_mend(constraint, message):
    with pytest.raises(UserError, match=message):
        instructions.follows({"constraints": [constraint]}, "a text")


@pytest.mark.parametrize("record", [{"prompt": "a"}, {"constraints": []}, {"constraints": "full_stop"}, {"constraints": None}])
def test_a_record_without_constraints_is_refused(record):
    with pytest.raises(UserError, match="no list of constraints"):
        instructions.follows(record, "a text")


def test_a_prompt_that_is_no_text_cannot_be_repeated():
    with pytest.raises(UserError, match="no text under `prompt`"):
        instructions.repeats_prompt({"prompt": [{"role": "user", "content": "a"}]}, "a")
