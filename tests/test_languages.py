"""Invented languages: a sentence has one reading, a translation one right answer, and no test sentence is seen before."""

import collections
import hashlib
import itertools
import json
import re
import textwrap
from pathlib import Path

import pytest

from jaxpost import tokenizer as tokenizers
from jaxpost.config.resolve import bind
from jaxpost.data import chat
from jaxpost.errors import UserError
from jaxpost.tasks import languages
from jaxpost.tasks.arithmetic import hashed

CONCEPTS = languages.CONCEPTS
KIND = {concept: kind for kind, concepts in CONCEPTS.items() for concept in concepts}
PAIRS = [f"{a}-{b}" for a in ("english", "velan", "torik", "miru") for b in ("english", "velan", "torik", "miru") if a != b]

# The languages once more: a word, and a clause as a pattern over n(oun), o(bject), a(djective), v(erb) and d (adverb).
WORD = {"velan": r"(\w*?)(li)?(nu)?(vi|su)?", "torik": r"(mi)?(\w*?)(ku)?(hu|ti)?", "miru": r"(\w*?)(bi)?"}
CLAUSE = {"velan": "(na?)(v)(oa?)?(d)?", "torik": "(d)?(a?n)(a?o)?(v)", "miru": "(v)(d)?(na?)(oa?)?"}


def every(**keys):
    names = tuple(languages.NAMES)
    return languages.make(source=names, target=names, **keys)


def read(text, language, lexicon=0):
    """The meaning of a sentence, by the table above."""
    if language == "english":
        return read_english(text)
    concept = {root: concept for concept, root in languages.dictionary(language, lexicon=lexicon).items()}
    words, mark = [], {}
    for token in text.split():
        if token in ("u", "di", "gu"):  # miru's words before a noun or a verb
            mark = {"u": {"object": True}, "di": {"tense": "past"}, "gu": {"tense": "future"}}[token]
            continue
        groups = re.fullmatch(WORD[language], token).groups()
        if language == "torik":
            plural, root, *rest = groups
        else:
            root, plural, *rest = groups
        tense = {"vi": "past", "hu": "past", "su": "future", "ti": "future"}.get(rest[1]) if rest else None
        word = {"concept": concept[root], "plural": bool(plural), "object": bool(rest and rest[0]), "tense": tense or "present"}
        words.append(word | mark)
        mark = {}
    meaning = [{"link": "", "words": []}]
    for word in words:
        if KIND[word["concept"]] == "link":
            meaning.append({"link": word["concept"], "words": []})
        else:
            meaning[-1]["words"].append(word)
    return [{"link": clause["link"], **read_clause(clause["words"], language)} for clause in meaning]


def read_clause(words, language):
    letters = {"adjective": "a", "transitive": "v", "intransitive": "v", "adverb": "d"}
    pattern = "".join(letters.get(KIND[word["concept"]], "o" if word["object"] else "n") for word in words)
    match = re.fullmatch(CLAUSE[language], pattern)
    assert match, (pattern, language)
    parts = {"adverb": "", "object": None}
    for number in range(1, 5):
        group, these = match[number], words[slice(*match.span(number))]
        if group == "v":
            parts |= {"verb": these[0]["concept"], "tense": these[0]["tense"]}
        elif group == "d":
            parts["adverb"] = these[0]["concept"]
        elif group:
            noun = next(word for word, letter in zip(these, group, strict=True) if letter in "no")
            adjective = next((word for word, letter in zip(these, group, strict=True) if letter == "a"), None)
            if adjective:  # the plural is on the noun, and in miru on its adjective too
                assert adjective["plural"] == (noun["plural"] and language == "miru")
            part = {"noun": noun["concept"], "adjective": adjective["concept"] if adjective else "", "plural": noun["plural"]}
            parts["object" if "o" in group else "subject"] = part
    return parts


def read_english(text):
    kinds = {kind: "|".join(concepts) for kind, concepts in CONCEPTS.items()}
    phrase = rf"the (?:({kinds['adjective']}) )?({kinds['being']}|{kinds['thing']})(s?)"
    verb = rf"(will )?({kinds['transitive']}|{kinds['intransitive']})(s|ed|d)?"
    whole = rf"{phrase} {verb}(?: {phrase})?(?: ({kinds['adverb']}))?"
    parts = re.split(rf" ({kinds['link']}) ", text)
    meaning = []
    for link, clause in zip(["", *parts[1::2]], parts[::2], strict=True):
        adjective, noun, plural, will, stem, end, adjective2, noun2, plural2, adverb = re.fullmatch(whole, clause).groups()
        tense = "future" if will else "past" if end in ("d", "ed") else "present"
        assert (end == "s") == (tense == "present" and not plural) and not (will and end)
        subject = {"noun": noun, "adjective": adjective or "", "plural": bool(plural)}
        target = {"noun": noun2, "adjective": adjective2 or "", "plural": bool(plural2)} if noun2 else None
        clause = {"link": link, "tense": tense, "verb": stem, "adverb": adverb or "", "subject": subject, "object": target}
        meaning.append(clause)
    return meaning


def in_test(meaning):
    return hashed("languages", languages.sentence(meaning, "english")) % 10 == 0


def test_there_are_120_concepts_and_a_word_has_one_reading():
    assert len(KIND) == sum(map(len, CONCEPTS.values())) == 120
    for lexicon, language in itertools.product((0, 7), languages.LANGUAGES):
        roots = languages.dictionary(language, lexicon=lexicon)
        assert roots.keys() == KIND.keys() and len(set(roots.values())) == 120
        assert not any(set(root) & set("iu") for root in roots.values()), "these letters are those of marks"


@pytest.mark.parametrize("clauses, lexicon", [(1, 0), (2, 0), (2, 5)])
def test_both_sentences_of_a_problem_have_its_meaning(clauses, lexicon):
    task = every(words=120, clauses=clauses, lexicon=lexicon)
    cells = collections.Counter()
    for index in range(600):
        record = task.record(index, split=("train", "test")[index % 2])
        assert len(record["meaning"]) == clauses
        assert read(record["sentence"], record["source"], lexicon) == record["meaning"]
        assert read(record["answer"], record["target"], lexicon) == record["meaning"]
        assert record["prompt"] == f"{record['source']}: {record['sentence']}\n{record['target']}:"
        cells[record["cell"]] += 1
    assert set(cells) == set(PAIRS) and min(cells.values()) > 25


def test_meanings_have_every_part():
    clauses = [clause for index in range(900) for clause in languages.make(clauses=2).record(index)["meaning"]]
    assert {clause["tense"] for clause in clauses} == {"past", "present", "future"}
    objects = sum(clause["object"] is not None for clause in clauses) / len(clauses)
    adverbs = sum(clause["adverb"] != "" for clause in clauses) / len(clauses)
    plurals = sum(clause["subject"]["plural"] for clause in clauses) / len(clauses)
    assert abs(objects - 2 / 3) < 0.05 and abs(adverbs - 1 / 3) < 0.05 and abs(plurals - 1 / 2) < 0.05
    kinds = {KIND[clause["object"]["noun"]] for clause in clauses if clause["object"]}
    assert kinds == {"being", "thing"} == kinds | {KIND[clause["subject"]["noun"]] for clause in clauses}


def test_two_of_three_roots_of_miru_are_toriks():
    for lexicon in range(3):
        torik, miru = (languages.dictionary(name, lexicon=lexicon) for name in ("torik", "miru"))
        assert 64 <= sum(miru[concept] == torik[concept] for concept in KIND) <= 96
        assert not {*languages.dictionary("velan", lexicon=lexicon).values()} & {*torik.values(), *miru.values()}


def test_no_test_sentence_is_trained_on_in_any_language_or_prompt():
    task = every(words=30, shots=2, clauses=1)
    test = task.test_records(100)
    assert all(in_test(record["meaning"]) for record in test)
    for index in range(400):
        for split in ("train", "test"):
            record = task.record(index, split=split)
            assert in_test(record["meaning"]) == (split == "test")
            *lines, asked, begun = record["prompt"].splitlines()
            assert len(lines) == 4 and (asked, begun) == (f"{record['source']}: {record['sentence']}", f"{record['target']}:")
            for line in lines:
                language, _, text = line.partition(": ")
                assert not in_test(read(text, language)) and text not in (record["sentence"], record["answer"])
    longer = every(words=30, clauses=2)
    texts = [task.text(index) for index in range(200)] + [longer.text(index) for index in range(200)]
    for language, text in (line.split(": ") for lines in texts for line in lines.splitlines() if " = " not in line):
        meaning = read(text, language)
        assert not any(in_test(part) for part in (meaning, *([{**clause, "link": ""}] for clause in meaning)))
    longer = [longer.record(index)["meaning"] for index in range(400)]
    assert not any(in_test([{**clause, "link": ""}]) for meaning in longer for clause in meaning)


def test_test_problems_are_different_and_extended():
    task = every()
    few, many = task.test_records(3), task.test_records(8)
    for cell in PAIRS:
        own = [record for record in many if record["cell"] == cell]
        assert len({record["sentence"] for record in own}) == len(own) == 8
        assert own[:3] == [record for record in few if record["cell"] == cell]
    assert task.test_records(3, seed=1) != few
    with pytest.raises(UserError, match="per_cell=0"):
        task.test_records(0)


def test_text_is_divided_as_its_table_says_and_a_line_says_what_its_neighbour_says():
    assert sum(languages.SHARES.values()) == 100
    task, kinds = languages.make(clauses=2), collections.Counter()
    words = {name: languages.dictionary(name) for name in languages.NAMES}
    for index in range(3_000):
        lines = task.text(index).splitlines()
        if " = " in lines[0]:
            (line,) = lines
            names, _, entries = line.partition(": ")
            a, b = names.split(" = ")
            entries = dict(entry.split(" = ") for entry in entries.split(", "))
            assert len(entries) > 5 and entries.items() <= {words[a][c]: words[b][c] for c in KIND}.items()
            names = {a, b}
        else:
            pairs = [line.split(": ") for line in lines]
            names = {name for name, _ in pairs}
            assert len(lines) == {1: 3, 2: 4}[len(names)]
            if len(names) == 2:
                for (a, first), (b, second) in (pairs[:2], pairs[2:]):
                    assert read(first, a) == read(second, b)
        kinds[" ".join(sorted(names, key=languages.NAMES.index))] += 1
    for names, percent in languages.SHARES.items():
        share = percent / 100
        assert abs(kinds[names] / 3_000 - share) < 4 * (share * (1 - share) / 3_000) ** 0.5


def test_only_the_translation_earns_the_reward():
    for index in range(100):
        task = every(clauses=1 + index % 2)
        record, made = task.record(index), task.conversation(index)
        assert task.demonstration(index) == record["answer"] == made["messages"][1]["content"]
        assert made["messages"][0]["content"] == record["prompt"] and "prompt" not in made
        assert task.reward(record, record["answer"]) is True and task.reward(record, f" {record['answer']}\n") is True
        words = record["answer"].split()
        wrong = ["", record["sentence"], " ".join(words[:-1]), " ".join([*words, words[0]]), " ".join(words[1:] + words[:1])]
        assert not any(task.reward(record, text) for text in wrong if text.split() != words)
        assert task.reward(record, record["answer"].upper()) is False
    record = {"answer": "sona meli sonavi"}
    shares = {"": 0, "sona": 1 / 3, "sona meli sonavi": 1, "meli sona sonavi": 1 / 3, "sona meli sonavi so so so": 1 / 2}
    assert {text: languages.share(record, text) for text in shares} == shares


def test_difficulty_and_help_are_in_the_problem():
    used = {}
    for words in (24, 60, 120):
        dictionary = languages.dictionary("velan")
        task = languages.make(target="velan", words=words, given="words")
        entries = [task.record(i)["prompt"].splitlines()[0] for i in range(800)]
        pairs = [entry.split(" = ") for line in entries for entry in line.removeprefix("english = velan: ").split(", ")]
        assert all(dictionary[english] == velan for english, velan in pairs)
        used[words] = {english for english, _ in pairs}
    # A link occurs between two clauses only.
    assert {words: len(found | {*CONCEPTS["link"]}) - 4 for words, found in used.items()} == {24: 23, 60: 58, 120: 116}
    assert used[24] < used[60] < used[120]
    task = languages.make(source="torik", target="miru", given=("grammar", "words"), shots=1, lexicon=3)
    lines = task.record(0)["prompt"].splitlines()
    assert lines[:2] == [languages.grammar("torik"), languages.grammar("miru")] and lines[2].startswith("torik = miru: ")
    assert [line.split(": ")[0].rstrip(":") for line in lines[3:]] == ["torik", "miru"] * 2
    assert read(lines[4].removeprefix("miru: "), "miru", 3) == read(lines[3].removeprefix("torik: "), "torik", 3)
    assert languages.grammar("miru") == (
        "miru: verb subject object; adjective after the noun; adverb after the verb; plural -bi, the adjective too; object u; "
        "past di; future gu"
    )


def test_what_is_drawn_stays_the_same():
    task = every(words=80, clauses=2, given=("grammar", "words"), shots=1)
    drawn = [[task.record(i), task.text(i), task.record(i, split="test", seed=1)] for i in range(20)] + task.test_records(2)
    assert json.loads(json.dumps(drawn)) == drawn
    assert hashlib.sha256(json.dumps(drawn).encode()).hexdigest()[:16] == "6e3e9ae53664c289"


def test_the_tokenizer_knows_the_words_and_problems_fit_a_small_window():
    tokenizer, task = languages.tokenizer(), every(words=120)
    assert len(tokenizer) <= 1_024
    for index in range(50):
        ids = tokenizers.encode(tokenizer, task.text(index))
        assert 20 <= len(ids) <= 120 and tokenizer.decode(ids) == task.text(index)
        record = task.record(index)
        assert len(chat.encode_prompt(record["prompt"], tokenizer, None)) < 40
        assert len(tokenizers.encode(tokenizer, record["answer"])) < 25


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"source": "latin"}, "task languages, source: 'latin' is unknown or named twice; there is english, velan"),
        ({"target": ("miru", "miru")}, "target: 'miru' is unknown or named twice"),
        ({"source": "miru", "target": "miru"}, "no pair of two languages"),
        ({"target": ()}, "no pair of two languages"),
        ({"given": "hints"}, "given: 'hints' is unknown"),
        ({"words": 20}, "words=20: give a number from 24 to 120"),
        ({"clauses": 3}, "clauses=3: give a number from 1 to 2"),
        ({"shots": -1}, "shots=-1: give"),
        ({"lexicon": -1}, "lexicon=-1: give"),
    ],
)
def test_keys_that_cannot_be_are_refused(keys, message):
    with pytest.raises(UserError, match=message):
        bind(languages.make, keys, "task languages")()


def test_an_unknown_split_is_refused():
    with pytest.raises(UserError, match="split='dev': languages has the splits train and test"):
        languages.make().record(0, split="dev")


def test_the_page_shows_real_samples():
    page = (Path(__file__).parent.parent / "docs" / "playgrounds.md").read_text()
    task = every(clauses=2)
    shown = [f"{r['prompt']} {r['answer']}" for r in (task.record(0), task.record(1))]
    helped = languages.make(source="english", target="miru", given=("grammar", "words"), shots=1).record(0)
    shown += [f"{helped['prompt']} {helped['answer']}", task.text(0), task.text(1)]
    for text in shown:
        assert textwrap.indent(text, "    ") in page
