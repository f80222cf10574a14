"""The country of the task `world`: its facts, the documents that state them, a search by words, and retrieval over them.

Everything is a function of its settings, by hashes: the same on all platforms, without a state. A person's town, trade, skill,
employer, friend, teacher and event are drawn from closed lists (world_words.py); names are made of syllables.

A common person has four documents of two or three facts. All facts are in the first three, town and trade together, and are
true there. The fourth may be wrong: then one of its facts is false, and its source is one of the two that falsehoods come from.
A rare person has the first document only and is mentioned in no other. Last comes the almanac, with a document on each town,
trade, skill, field and event.
"""

import functools
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from typing import NamedTuple

import numpy as np

from jaxpost.errors import UserError
from jaxpost.tasks import world_words as words
from jaxpost.tasks.arithmetic import SPLITS, hashed

RELATIONS = words.RELATIONS

_TOGETHER, _APART = ("town", "trade"), ("skill", "employer", "friend", "teacher", "event")


class Fact(NamedTuple):
    """What a document states and a problem takes."""

    subject: str
    relation: str
    object: str


def sentence(fact: Fact, form: int, subject: str = "") -> str:
    """A sentence that states a fact; forms come round. subject: what stands for the fact's subject."""
    relation = RELATIONS[fact.relation]
    stating = relation.sentences[form % len(relation.sentences)]
    text = stating.format(s=subject or mention(relation.subject, fact.subject), o=mention(relation.object, fact.object))
    return text[0].upper() + text[1:]


def mention(kind: str, entity: str) -> str:
    """An entity within a sentence: "the Flood", "a baker", "Norwood"."""
    return words.ARTICLES.get(kind, "") + entity


def phrase(name: str, path: Sequence[str]) -> str:
    """What the last relation of a path is of: "the friend of NAME", or the name itself."""
    for relation in path[:-1]:
        name = f"the {RELATIONS[relation].label} of {name}"
    return name


def question(name: str, path: Sequence[str], form: int) -> str:
    """A question for the object at the end of a path of relations that begins with a person; forms come round."""
    forms = RELATIONS[path[-1]].questions
    return forms[form % len(forms)].format(s=phrase(name, path))


def check_split(split: str) -> None:
    """Raises UserError for a split that the world has not."""
    if split not in SPLITS:
        raise UserError(f"split={split!r}: world has the splits {' and '.join(SPLITS)}")


def _words(text: str) -> set[str]:
    return set(re.findall(r"\w+", text.lower()))


def _noisy(text: str, draw: Callable) -> str:
    """The text without some of its smallest words, and with others twice."""
    kept = []
    for place, word in enumerate(text.split(" ")):
        luck = draw("word", place) % 6 if word.lower() in words.NOISY else 3
        kept += [word] * (0 if luck < 2 else 2 if luck == 2 else 1)
    return " ".join(kept)


class Country:
    """people: all names, the rare ones last. common, rare: the two kinds. count: documents on people, which come first."""

    def __init__(self, people: int, *, known: float, rare: float, noise: float, wrong: float, seed: int):
        self._known_share, self._noise, self._wrong, self._seed = known, noise, wrong, seed
        names = self._shuffled("names", ["".join(syllables) for syllables in product(*words.SYLLABLES)])
        self.people, self.absent = names[:people], names[people:]
        self.common = self.people[: people - round(people * rare)]
        self.rare = frozenset(self.people[len(self.common) :])
        things = self._things()
        self._facts = {name: self.drawn_facts(name) for name in self.people} | things
        self._entries = [entry for name in self.people for entry in self._plan(name)]
        self.count = len(self._entries)
        self._known = [number for number in range(self.count) if self.knows(self._entries[number][0])]
        self._entries += [(thing, tuple(facts), False) for thing, facts in things.items()]
        # {(subject, relation): the first document that states it truly}
        self.evidence: dict[tuple[str, str], int] = {}
        for number, (subject, relations, doubtful) in enumerate(self._entries):
            for relation in () if doubtful else relations:
                self.evidence.setdefault((subject, relation), number)

    def draw(self, *parts) -> int:
        """A 64-bit hash of the country and the parts."""
        return hashed("world", self._seed, *parts)

    def _below(self, share: float, *parts) -> bool:
        return self.draw(*parts) < share * 2**64

    def _shuffled(self, purpose: str, items: Sequence) -> list:
        # RandomState, since NumPy guarantees its stream; a Generator's may change between releases.
        order = np.random.RandomState(self.draw(purpose) % 2**32).permutation(len(items))
        return [items[i] for i in order]

    def other(self, relation: str, entity: str, *parts) -> str:
        """An object that the relation could have, drawn by the parts, other than this entity. People are common ones."""
        choices = [choice for choice in words.OBJECTS.get(RELATIONS[relation].object, self.common) if choice != entity]
        return choices[self.draw("choice", relation, *parts) % len(choices)]

    def drawn_facts(self, name: str) -> dict[str, str]:
        """{relation: object} of somebody with this name."""
        return {relation: self.other(relation, name, name) for relation in (*_TOGETHER, *_APART)}

    def _things(self) -> dict[str, dict[str, str]]:
        landmarks = zip(words.TOWNS, self._shuffled("landmarks", words.LANDMARKS), strict=True)
        return {
            **{town: {"landmark": landmark} for town, landmark in landmarks},
            **{trade: {"product": made} for trade, made in words.PRODUCTS.items()},
            **{skill: {"field": field} for field, skills in words.FIELDS.items() for skill in skills},
            **{field: {"branch": branch} for branch, fields in words.BRANCHES.items() for field in fields},
            **{event: {"year": words.YEARS[self.draw("year", event) % len(words.YEARS)]} for event in words.EVENTS},
        }

    def facts(self, entity: str) -> dict[str, str]:
        """{relation: object} of a person, or of a town, trade, skill, field or event."""
        return dict(self._facts[entity])

    def knows(self, name: str) -> bool:
        """Whether `text` speaks about this person."""
        return self._below(self._known_share, "known", name)

    def held_out(self, *facts: Fact) -> bool:
        """Whether a problem that takes these facts is for testing: by a hash of each fact, and of all if they are several."""
        alone = (fact.subject in self.rare or self.draw("fact", fact.subject, fact.relation) % 5 == 0 for fact in facts)
        return any(alone) or (len(facts) > 1 and self.draw("facts", *(part for fact in facts for part in fact)) % 5 == 0)

    def stated(self, name: str) -> list[str]:
        """The relations of a person, or of somebody who does not exist, that true documents would state."""
        return list(
            dict.fromkeys(relation for _, relations, doubtful in self._plan(name) if not doubtful for relation in relations)
        )

    def _plan(self, name: str) -> list[tuple[str, tuple[str, ...], bool]]:
        """(subject, relations, whether one may be false) of each document on a person."""
        turn = self.draw("plan", name) % len(_APART)
        a, b, c, d, e = _APART[turn:] + _APART[:turn]
        plan = [(*_TOGETHER, a), (b, c, d), (e, a, "town"), ("trade", b, c)]
        return [(name, relations, i == 3) for i, relations in enumerate(plan[:1] if name in self.rare else plan)]

    # ------------------------------------------------------------------------------------------------------- documents

    def document(self, number: int, *, seed: int = 0) -> dict:
        """Document `number`, in the wording of `seed`: id ("d7"), text, style (chronicle, letter, gossip, register, almanac),
        quality (clean, noisy, wrong), source, year, topic, subject, and facts: [subject, relation, object, whether it is true].
        """
        subject, relations, doubtful = self._entries[number]
        draw = functools.partial(self.draw, "document", number, seed)
        turn = draw("order") % len(relations)
        relations = relations[turn:] + relations[:turn]
        facts = [Fact(subject, relation, self._facts[subject][relation]) for relation in relations]
        wrong = doubtful and draw("wrong") < self._wrong * 2**64
        if wrong:
            place = draw("place") % len(facts)
            false = self.other(relations[place], facts[place].object, number, seed)
            facts[place] = facts[place]._replace(object=false)
        styles = ("almanac",) if number >= self.count else ("letter", "gossip") if wrong else words.STYLES
        style = styles[draw("style") % len(styles)]
        sources = words.SOURCES[style]
        source = sources[1 if wrong else draw("source") % len(sources)]
        body, noisy = self._body(style, facts, 0 if wrong or style == "almanac" else self._noise, draw)
        return {
            "id": f"d{number}",
            "text": words.FRAMES[style].format(source=source, body=body),
            "style": style,
            "quality": "wrong" if wrong else "noisy" if noisy else "clean",
            "source": source,
            "year": 1250 + draw("year") % 50,
            "topic": RELATIONS[relations[0]].topic,
            "subject": subject,
            "facts": [[*fact, fact.object == self._facts[subject][fact.relation]] for fact in facts],
        }

    def _body(self, style: str, facts: Sequence[Fact], noise: float, draw: Callable) -> tuple[str, bool]:
        """(what a document says, whether it has noise)."""
        if style == "register":
            entries = [f"{RELATIONS[fact.relation].label.capitalize()}: {fact.object}." for fact in facts]
            return " ".join([f"{facts[0].subject}.", *entries]), False
        body = " ".join(sentence(fact, draw("form", place)) for place, fact in enumerate(facts))
        noisy = _noisy(body, draw) if draw("noise") < noise * 2**64 else body
        return noisy, noisy != body

    def documents(self, *, seed: int = 0) -> list[dict]:
        """The corpus: every document once."""
        return [self.document(number, seed=seed) for number in range(len(self._entries))]

    def text(self, index: int, *, seed: int = 0) -> str:
        """Text number `index` of an endless stream: a document on somebody known, or every eighth time three of the almanac."""
        draw = functools.partial(self.draw, "text", seed, index)
        if not self._known or draw("almanac") % 8 == 0:
            numbers = [self.count + draw("thing", i) % (len(self._entries) - self.count) for i in range(3)]
        else:
            numbers = [self._known[draw("number") % len(self._known)]]
        return " ".join(self.document(number, seed=draw("wording"))["text"] for number in numbers)

    # ------------------------------------------------------------------------------------------------------- retrieval

    @functools.cached_property
    def _holders(self) -> dict[str, list[int]]:
        """The numbers of the documents that have a word."""
        holders: dict[str, list[int]] = {}
        for number, document in enumerate(self.documents()):
            for word in _words(document["text"]):
                holders.setdefault(word, []).append(number)
        return holders

    def search(self, query: str, k: int = 3) -> list[dict]:
        """The k documents with the highest sum of log(documents / documents with the word) over the words that they share with
        the query, or fewer where fewer share any. Equal ones stand in their order."""
        scores: Counter = Counter()
        for word in sorted(_words(query)):
            numbers = self._holders.get(word, [])
            scores.update({number: math.log(len(self._entries) / len(numbers)) for number in numbers})
        return [self.document(number) for number in sorted(scores, key=lambda number: (-round(scores[number], 9), number))[:k]]

    def queries(self, *, split: str = "train", negatives: int = 2) -> list[dict]:
        """Retrieval over `documents()`, as rows of lists: query, positives, negatives (texts), their ids, and the cell:

        paraphrase   describes somebody by trade and town, in no word of the documents that state these
        name         asks for a fact on somebody by name; the documents that state it truly answer it
        rare name    the same for somebody in one document only, in the test split alone

        A fifth of the pairs of trade and town is for testing, and the facts of the test problems. negatives: at most so many,
        on the same trade or town, or on the same relation of somebody whose name begins alike. Raises UserError for an unknown
        split.
        """
        check_split(split)
        rows = [*self._paraphrases(split, negatives), *self._by_name(split, negatives)]
        return [{"query_id": f"q{number}", **row} for number, row in enumerate(rows)]

    def pair(self, name: str) -> tuple[str, str]:
        """(town, trade) of a person, which a description says."""
        return self._facts[name]["town"], self._facts[name]["trade"]

    def description(self, town: str, trade: str, form: int) -> str:
        """A question for the people of a town and a trade that names neither; forms come round."""
        asked = {"product": words.PRODUCTS[trade], "landmark": self._facts[town]["landmark"]}
        return words.ASKED[form % len(words.ASKED)].format(**asked)

    def _paraphrases(self, split: str, count: int) -> Iterator[dict]:
        pairs: dict[tuple[str, str], list[int]] = {}
        for name in self.people:
            pairs.setdefault(self.pair(name), []).append(self.evidence[name, "trade"])
        for (town, trade), numbers in pairs.items():
            if (self.draw("pair", town, trade) % 5 == 0) != (split == "test"):
                continue
            near = [number for pair in pairs if (pair[0] == town) != (pair[1] == trade) for number in pairs[pair]]
            near.sort(key=lambda number: self.draw("near", town, trade, number))
            for form in range(len(words.ASKED)):
                yield self._list(self.description(town, trade, form), "paraphrase", numbers, near[:count])

    def _by_name(self, split: str, count: int) -> Iterator[dict]:
        stating: dict[tuple[str, str], list[int]] = {}
        for number in range(self.count):
            for subject, relation, _, true in self.document(number)["facts"]:
                if true:
                    stating.setdefault((subject, relation), []).append(number)
        for (name, relation), numbers in stating.items():
            if self.held_out(Fact(name, relation, "")) != (split == "test"):
                continue
            alike = [other for other in self.people if other != name and other[:3] == name[:3] and (other, relation) in stating]
            alike.sort(key=lambda other: self.draw("near", name, relation, other))
            near = [stating[other, relation][0] for other in alike[:count]]
            query = question(name, (relation,), self.draw("asked", name, relation))
            yield self._list(query, "rare name" if name in self.rare else "name", numbers, near)

    def _list(self, query: str, cell: str, positives: Sequence[int], negatives: Sequence[int]) -> dict:
        row: dict = {"query": query, "cell": cell}
        for name, numbers in (("positive", positives), ("negative", negatives)):
            documents = [self.document(number) for number in numbers]
            row |= {f"{name}s": [d["text"] for d in documents], f"{name}_ids": [d["id"] for d in documents]}
        return row
