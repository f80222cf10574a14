"""Languages: translation between English and three invented languages.

    task=dict(name="languages", source="english", target=("velan", "torik"), words=60, clauses=1)

A sentence has a meaning: one or two clauses, each with a verb, its tense, a subject, and maybe an object and an adverb. Each
language has one sentence for a meaning, and a sentence has one meaning, so a translation has one right answer in all
directions. Velan has the verb in the middle, Torik at the end and Miru at the beginning. Roots have the vowels a, e, o and the
marks of plural, object and tense i, u, so no word has two readings.

Miru has few resources: little of `text` is in it. But two of three of its roots are Torik's. `lexicon` draws other roots for
the same grammars: languages that a model has not seen, to be learned from what a prompt gives (`given`, `shots`).

A hash of the meaning decides whether a sentence is for training or testing in all languages: a test sentence is in no text, no
demonstration and no example of a prompt, nor a part of one. A cell of the results' table is a pair of languages.
"""

import collections
import functools
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType, SimpleNamespace

from jaxpost import tokenizer as tokenizers
from jaxpost.errors import UserError
from jaxpost.tasks import streams
from jaxpost.tasks.arithmetic import hashed

_WORDS = {
    "being": "farmer baker king queen girl boy doctor teacher sailor hunter singer judge dog cat bird horse cow goat bear owl",
    "thing": "tree flower apple stone river mountain door road garden boat bridge book lamp table chair hat coat ring coin "
    "cup plate bell drum wheel letter cloud hill wall",
    "adjective": "red blue green white black old young small big strong weak kind proud quiet loud warm cold clean rich new",
    "transitive": "follow help like love want need paint visit open close move pull lift count greet fear guard remember "
    "admire collect repair praise",
    "intransitive": "walk work wait rest laugh shout jump smile listen arrive return climb play dream",
    "adverb": "here there outside inside slowly quickly gently again often always alone together",
    "link": "and but because while",
}
CONCEPTS = {kind: tuple(words.split()) for kind, words in _WORDS.items()}  # 120 in all

# How a language makes a sentence: the order of S, V and O; where adverbs and adjectives stand; whether an adjective has the
# plural mark of its noun; marks ("-x" after a word, "x-" before it, "x" a word before it); consonants and shape of its roots
# (C a consonant, V a vowel); the language that two of three roots come from.
_FIELDS = "order adverb adjective agrees plural object past future consonants shape parent"
Grammar = collections.namedtuple("Grammar", _FIELDS, defaults=("",))
LANGUAGES = {
    "velan": Grammar("SVO", "last", "after", False, "-li", "-nu", "-vi", "-su", "szlvfmn", "CVCV"),
    "torik": Grammar("SOV", "first", "before", False, "mi-", "-ku", "-hu", "-ti", "ptkhmnr", "CVCVC"),
    "miru": Grammar("VSO", "after the verb", "after", True, "-bi", "u", "di", "gu", "ptkhmnr", "CVCVC", "torik"),
}
NAMES = ("english", *LANGUAGES)
# Percent of the documents of `text` that are in a language or in two.
SHARES = {"english": 10, "velan": 15, "torik": 15, "miru": 3, "english velan": 26, "english torik": 26, "english miru": 5}


def make(
    *,
    source: str | Sequence[str] = "english",
    target: str | Sequence[str] = tuple(LANGUAGES),
    words: int = 60,
    clauses: int = 1,
    given: str | Sequence[str] = (),
    shots: int = 0,
    lexicon: int = 0,
) -> SimpleNamespace:
    """The task of translating from each of `source` to each of `target`, all pairs equally often.

    words: how many of the 120 concepts occur, from 24. clauses: 1 or 2 in a sentence. given: what is in a prompt, "grammar"
    (the languages' rules), "words" (a dictionary of the sentence) or both. shots: translated examples in a prompt. lexicon:
    which roots the invented languages have. Raises UserError for values out of range.
    """
    source, target, given = ((value,) if isinstance(value, str) else tuple(value) for value in (source, target, given))
    _check(source=source, target=target, words=words, clauses=clauses, given=given, shots=shots, lexicon=lexicon)
    pairs = [(a, b) for a in source for b in target if a != b]
    drawn = functools.partial(_drawn, _chosen(words))

    def problem(pair, split, seed, index):
        meaning = drawn(clauses, split, "problem", split, seed, index)
        others = (drawn(clauses, "train", "shot", split, seed, index, number) for number in itertools.count())
        examples = itertools.islice((other for other in others if other != meaning), shots)
        return _record(meaning, pair, examples, given, lexicon)

    def text(index, *, seed=0):
        """Document number `index` of an endless corpus of training sentences and words, as SHARES divides it."""
        return _document(drawn, _chosen(words), clauses, lexicon, seed, index)

    functions = streams.of_cells("languages", pairs, problem, cell="pair", same=lambda record: record["sentence"])
    return SimpleNamespace(**functions, reward=reward, share=share, text=text)


def reward(record, completion) -> bool:
    """Whether a completion is the record's answer and nothing else, white space aside."""
    return completion.split() == record["answer"].split()


def share(record, completion) -> float:
    """The share of places, of the answer or of a longer completion, that have the right word: 0 to 1."""
    words, answer = completion.split(), record["answer"].split()
    return sum(a == b for a, b in zip(words, answer, strict=False)) / max(len(words), len(answer))


@functools.cache
def dictionary(language: str, *, lexicon: int = 0) -> Mapping[str, str]:
    """{concept (an English word): its root in a language}, of all 120 concepts. Raises UserError for an unknown language."""
    if language not in NAMES:
        raise UserError(f"task languages: no dictionary of {language!r}; there is {', '.join(NAMES)}")
    concepts = [concept for kind in CONCEPTS.values() for concept in kind]
    if language == "english":
        return MappingProxyType(dict(zip(concepts, concepts, strict=True)))
    rules = LANGUAGES[language]
    parent = dictionary(rules.parent, lexicon=lexicon) if rules.parent else {}
    roots = {concept: root for concept, root in parent.items() if hashed("kept", lexicon, concept) % 3}

    def spelled(concept, draw):
        numbers = (hashed("root", lexicon, language, concept, draw, place) for place in range(len(rules.shape)))
        letters = ({"C": rules.consonants, "V": "aeo"}[sound] for sound in rules.shape)
        return "".join(choice[number % len(choice)] for choice, number in zip(letters, numbers, strict=True))

    for concept in (concept for concept in concepts if concept not in roots):
        roots[concept] = next(x for x in (spelled(concept, draw) for draw in itertools.count()) if x not in roots.values())
    return MappingProxyType({concept: roots[concept] for concept in concepts})


def grammar(language: str) -> str:
    """The rules of an invented language in one line. Raises UserError for any other language."""
    if language not in LANGUAGES:
        raise UserError(f"task languages: no grammar of {language!r}; there is {', '.join(LANGUAGES)}")
    rules = LANGUAGES[language]
    order = " ".join({"S": "subject", "V": "verb", "O": "object"}[place] for place in rules.order)
    marks = f"plural {rules.plural}{', the adjective too' * rules.agrees}; object {rules.object}; past {rules.past}"
    return f"{language}: {order}; adjective {rules.adjective} the noun; adverb {rules.adverb}; {marks}; future {rules.future}"


def sentence(meaning: Sequence[Mapping], language: str, *, lexicon: int = 0) -> str:
    """The one sentence of a language for a meaning: clauses with link, tense, verb, adverb, subject and object (a noun, its
    adjective, whether it is plural). What a clause lacks is "" or, as an object, None.
    """
    if language == "english":
        return " ".join(map(_english, meaning))
    return " ".join(_invented(clause, LANGUAGES[language], dictionary(language, lexicon=lexicon)) for clause in meaning)


@functools.cache
def tokenizer():
    """1,024 tokens, learned from the corpus of all words and from grammars."""
    return tokenizers.learned([*map(make(words=120, clauses=2).text, range(1_500)), *map(grammar, list(LANGUAGES) * 30)], 1_024)


def _check(*, source, target, given, **numbers):
    for key, names, known in (("source", source, NAMES), ("target", target, NAMES), ("given", given, ("grammar", "words"))):
        if unknown := [name for name in names if name not in known] or [name for name in names if names.count(name) > 1]:
            raise UserError(f"task languages, {key}: {unknown[0]!r} is unknown or named twice; there is {', '.join(known)}")
    if not any(a != b for a in source for b in target):
        raise UserError(f"task languages, source={source}, target={target}: no pair of two languages; name another target")
    for key, number in numbers.items():
        least, most = {"words": (24, 120), "clauses": (1, 2), "shots": (0, 100), "lexicon": (0, 2**31)}[key]
        if not least <= number <= most:
            raise UserError(f"task languages, {key}={number!r}: give a number from {least} to {most}")


def _chosen(words: int) -> dict[str, tuple[str, ...]]:
    """The first `words` concepts by kind, of each kind in proportion."""
    places = {c: (i + 0.5) / len(concepts) for concepts in CONCEPTS.values() for i, c in enumerate(concepts)}
    chosen = sorted(places, key=places.get)[:words]
    return {kind: tuple(concept for concept in concepts if concept in chosen) for kind, concepts in CONCEPTS.items()}


def _drawn(concepts: Mapping, clauses: int, split: str, *parts) -> list[dict]:
    for draw in itertools.count():
        meaning = [_clause(concepts, place, functools.partial(hashed, *parts, draw, place)) for place in range(clauses)]
        sentences = [sentence(meaning, "english"), *(_english({**clause, "link": ""}) for clause in meaning)]
        held = [hashed("languages", text) % 10 == 0 for text in sentences]
        if held[0] if split == "test" else not any(held):
            return meaning


def _clause(concepts: Mapping, place: int, draw: Callable) -> dict:
    def one(kind, *role):
        return concepts[kind][draw(kind, *role) % len(concepts[kind])]

    def phrase(role):
        kind = "being" if role == "subject" or draw("kind") % 2 else "thing"
        adjective = one("adjective", role) if draw("adjective", role, "?") % 2 else ""
        return {"noun": one(kind, role), "adjective": adjective, "plural": draw("plural", role) % 2 == 1}

    transitive = draw("transitive?") % 3 > 0
    return {
        "link": one("link") if place else "",
        "tense": ("present", "past", "future")[draw("tense") % 3],
        "verb": one("transitive" if transitive else "intransitive"),
        "adverb": one("adverb") if draw("adverb?") % 3 == 0 else "",
        "subject": phrase("subject"),
        "object": phrase("object") if transitive else None,
    }


def _english(clause: Mapping) -> str:
    def phrase(part):
        return " ".join(filter(None, ("the", part["adjective"], part["noun"] + "s" * part["plural"])))

    verb, tense = clause["verb"], clause["tense"]
    if tense == "past":
        verb += "d" if verb.endswith("e") else "ed"
    elif tense == "future":
        verb = f"will {verb}"
    elif not clause["subject"]["plural"]:
        verb += "s"
    target = clause["object"] and phrase(clause["object"])
    return " ".join(filter(None, (clause["link"], phrase(clause["subject"]), verb, target, clause["adverb"])))


def _invented(clause: Mapping, rules: tuple, roots: Mapping) -> str:
    def phrase(part, mark):
        noun, adjective = roots[part["noun"]], roots.get(part["adjective"], "")
        if part["plural"]:
            noun = _marked(noun, rules.plural)
            adjective = _marked(adjective, rules.plural) if adjective and rules.agrees else adjective
        both = [_marked(noun, mark), adjective]
        return " ".join(filter(None, both if rules.adjective == "after" else reversed(both)))

    mark, adverb = {"present": "", "past": rules.past, "future": rules.future}[clause["tense"]], roots.get(clause["adverb"], "")
    places = {"S": phrase(clause["subject"], ""), "V": _marked(roots[clause["verb"]], mark)}
    places["O"] = phrase(clause["object"], rules.object) if clause["object"] else ""
    if rules.adverb == "after the verb":
        places["V"] = f"{places['V']} {adverb}"
    words = " ".join(places[place] for place in rules.order)
    words = {"first": f"{adverb} {words}", "last": f"{words} {adverb}"}.get(rules.adverb, words)
    return " ".join(f"{roots.get(clause['link'], '')} {words}".split())


def _marked(word: str, mark: str) -> str:
    if mark.startswith("-"):
        return word + mark[1:]
    return mark[:-1] + word if mark.endswith("-") else f"{mark} {word}".strip()


def _record(meaning: list[dict], pair: tuple[str, str], examples: Iterable, given: Sequence[str], lexicon: int) -> dict:
    asked, answer = (sentence(meaning, language, lexicon=lexicon) for language in pair)
    lines = [grammar(language) for language in pair if "grammar" in given and language in LANGUAGES]
    if "words" in given:
        parts = [part for clause in meaning for part in (clause, clause["subject"], clause["object"] or {})]
        used = {part.get(key, "") for part in parts for key in ("link", "verb", "adverb", "noun", "adjective")}
        lines.append(_entries(sorted(used - {""}), pair, lexicon))
    for example in examples:
        lines += [f"{language}: {sentence(example, language, lexicon=lexicon)}" for language in pair]
    prompt = "\n".join([*lines, f"{pair[0]}: {asked}", f"{pair[1]}:"])
    columns = {"source": pair[0], "target": pair[1], "sentence": asked, "meaning": meaning}
    return {"prompt": prompt, "answer": answer, "cell": "-".join(pair), **columns}


def _entries(concepts: Sequence[str], pair: tuple[str, str], lexicon: int) -> str:
    source, target = (dictionary(language, lexicon=lexicon) for language in pair)
    return f"{pair[0]} = {pair[1]}: " + ", ".join(f"{source[concept]} = {target[concept]}" for concept in concepts)


def _document(drawn: Callable, concepts: Mapping, clauses: int, lexicon: int, seed: int, index: int) -> str:
    draw = functools.partial(hashed, "languages", "text", seed, index)
    documents = [names for names, percent in SHARES.items() for _ in range(percent)]
    languages = documents[draw("names") % 100].split()[:: -1 if draw("turned") % 2 else 1]
    if len(languages) == 2 and draw("words?") % 4 == 0:
        every = [concept for kind in concepts.values() for concept in kind]
        return _entries(list(dict.fromkeys(every[draw("word", i) % len(every)] for i in range(10))), languages, lexicon)
    counts = [1 + draw("clauses", place) % clauses for place in range(6 - clauses - len(languages))]
    meanings = (drawn(count, "train", "text", seed, index, place) for place, count in enumerate(counts))
    return "\n".join(f"{name}: {sentence(m, name, lexicon=lexicon)}" for m in meanings for name in languages)
