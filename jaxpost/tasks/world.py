"""World: an invented country whose facts are known, with its documents, its questions and a search over the documents.

    task=dict(name="world", people=100, hops=(1, 2), known=0.8)

A person has a town, a trade, a skill, an employer, a friend, a teacher and an event; a town has a landmark, a trade a product,
a skill a field and that a branch, an event a year. Documents state these facts in several wordings, styles and qualities
(world_country.py). `text` is an endless stream of them to pretrain on. The cells of the results' table are kinds of problems:

EXAMPLES

A hash holds out a fifth of all facts: no training problem takes one of them, neither as a question nor as a part of two hops, a
statement or a description, so only documents tell them. Of the problems that take several facts, another fifth is held out.
`text` is silent about the people who are not `known`; documents speak of them too. A rare person is in one document and in no
training problem.

More people are harder to know by heart, and two hops are harder than one. With documents in front of the question (`context`) a
problem needs no knowledge.
"""

import functools
import itertools
import re
from collections.abc import Callable, Sequence
from types import SimpleNamespace

from jaxpost import tokenizer as tokenizers
from jaxpost.errors import UserError
from jaxpost.tasks import world_words as words
from jaxpost.tasks.world_country import RELATIONS, Country, Fact, check_split, phrase, question, sentence

CELLS = ("one hop", "two hops", "statement", "description", "unanswerable")
KINDS = ("question", *CELLS[2:])
TOKENS = 1280  # of the tokenizer

_ONE = [name for name, relation in RELATIONS.items() if relation.subject == "person"]
# Chains of relations that begin with a person, by their length.
PATHS = {
    1: [(name,) for name in _ONE],
    2: [(a, b) for a in _ONE for b, relation in RELATIONS.items() if relation.subject == RELATIONS[a].object],
}


def make(
    *,
    people: int = 100,
    hops: Sequence[int] = (1, 2),
    kinds: Sequence[str] = KINDS,
    context: int = 0,
    known: float = 0.8,
    rare: float = 0.1,
    noise: float = 0.1,
    wrong: float = 0.2,
    country: int = 0,
) -> SimpleNamespace:
    """The task over a country of so many people (20 to 1,000).

    hops: how many facts a question or statement takes, 1 and 2. kinds: of problems. context: documents in front of a question,
    those that answer it among them; 0 for none. known: the share of people in `text`. rare: the share who are in one document
    only. noise: the share of documents that lose and repeat small words. wrong: the share of common people with a document that
    has a false fact. country: the seed of it all. Raises UserError for what is out of range.
    """
    shares = {"known": known, "rare": rare, "noise": noise, "wrong": wrong}
    for name, share in shares.items():
        if not 0 <= share <= (0.5 if name == "rare" else 1):
            raise UserError(f"task world, {name}={share}: give a share from 0 to {'0.5' if name == 'rare' else '1'}")
    if not 20 <= people <= 1000:
        raise UserError(f"task world, people={people}: give 20 to 1000")
    if not hops or not set(hops) <= set(PATHS):
        raise UserError(f"task world, hops={tuple(hops)}: give 1, 2 or both")
    if not kinds or not set(kinds) <= set(KINDS):
        raise UserError(f"task world, kinds={tuple(kinds)}: give some of {', '.join(KINDS)}")
    if context and not 2 <= context <= 8:
        raise UserError(f"task world, context={context}: give 0, or 2 to 8 documents, since two hops may need two")
    land = Country(people, **shares, seed=country)
    problems = Problems(land, sorted(set(hops)), kinds, context)
    own = ("record", "test_records", "conversation", "demonstration", "dialogue", "trace")
    of_country = ("facts", "knows", "document", "documents", "text", "search", "queries")
    functions = {name: getattr(problems, name) for name in own} | {name: getattr(land, name) for name in of_country}
    return SimpleNamespace(people=land.people, rare=land.rare, reward=reward, **functions)


def reward(record, completion) -> bool:
    """Whether `completion` is the record's answer. An article before it, a full stop after it and capitals do not matter.

    Raises UserError if the record has no answer to compare with.
    """
    answer = record.get("answer")
    if answer is None:
        raise UserError(f"record {record}: has no answer, so its completions cannot be checked; add an `answer` column")
    return re.sub(r"^(the|an?) ", "", completion.strip().removesuffix(".").lower()) == answer.lower()


@functools.cache
def tokenizer():
    """1,280 tokens, in which the words of all closed lists are one each, and names of many countries a few syllables."""
    texts = [word for kind, entities in words.OBJECTS.items() if kind != "year" for word in entities] * 200
    for country in range(40):
        task = make(country=country)
        texts += [task.text(index) for index in range(150)]
        texts += [turn["content"] for index in range(50) for turn in task.conversation(index)["messages"]]
    return tokenizers.learned(texts, TOKENS)


class Problems:
    """Problems about a country, by kind and hops; see `make`."""

    def __init__(self, country: Country, hops: Sequence[int], kinds: Sequence[str], context: int):
        self._country, self._hops, self._context = country, hops, context
        questions = [CELLS[length - 1] for length in hops] if "question" in kinds else []
        self.cells = questions + [kind for kind in KINDS[1:] if kind in kinds]
        pairs = [country.pair(name) for name in country.people]
        # Those whom a description fits and nobody else.
        self._described = [name for name in country.common if pairs.count(country.pair(name)) == 1]

    def record(self, index: int, *, split: str = "train", seed: int = 0) -> dict:
        """Problem number `index` of an endless stream: a dict with prompt, answer, cell, subject (a name), path (the relations
        from the subject to the answer), facts (that the problem takes), evidence (ids of documents that state them) and known
        (whether `text` has them). All cells come equally often, and problems may repeat. Raises UserError for an unknown split.
        """
        check_split(split)
        return self._drawn(self.cells[self._country.draw("cell", split, seed, index) % len(self.cells)], split, seed, index)

    def test_records(self, per_cell: int, *, seed: int = 0) -> list[dict]:
        """`per_cell` test problems of each cell with different prompts, or fewer if there are hardly more, in an order fixed by
        `seed`. A larger `per_cell` extends each cell's list. Raises UserError if it is below 1."""
        if per_cell < 1:
            raise UserError(f"per_cell={per_cell}: at least one test problem a cell is needed")
        return [record for cell in self.cells for record in self._different(cell, per_cell, seed)]

    def conversation(self, index: int, *, seed: int = 0) -> dict:
        """Training problem `index` and its answer, as `messages`; the other columns are those of its record."""
        columns = self.record(index, seed=seed)
        turns = {"user": columns.pop("prompt"), "assistant": columns["answer"]}
        return {"messages": [{"role": role, "content": text} for role, text in turns.items()], **columns}

    def demonstration(self, index: int, *, seed: int = 0) -> str:
        """The answer to training problem `index`."""
        return self.record(index, seed=seed)["answer"]

    def dialogue(self, index: int, *, seed: int = 0) -> dict:
        """A conversation of one to three turns about one person, whom only the first names, as `messages`; subject and facts.
        Answers are sentences. Facts that are held out for testing are not asked."""
        country = self._country
        draw = functools.partial(country.draw, "dialogue", seed, index)
        for turn in itertools.count():
            name = country.common[draw("name", turn) % len(country.common)]
            facts = [fact for fact in map(self._fact, itertools.repeat(name), _ONE) if not country.held_out(fact)]
            if facts:
                break
        facts = sorted(facts, key=lambda fact: draw("order", fact.relation))[:3]
        asked = [
            question(name, (facts[0].relation,), draw("form")),
            *(f"And the {RELATIONS[f.relation].label}?" for f in facts[1:]),
        ]
        messages = []
        for place, (text, fact) in enumerate(zip(asked, facts, strict=True)):
            messages.append({"role": "user", "content": text})
            messages.append({"role": "assistant", "content": sentence(fact, draw("answer", place))})
        return {"messages": messages, "subject": name, "facts": [list(fact) for fact in facts]}

    def trace(self, index: int, *, seed: int = 0) -> dict:
        """The beginning of a sentence that its object completes, to trace where a model keeps a fact: prompt, answer and other
        (objects; one word each, a name or a word of a closed list), the places [start, end) of subject and relation in the
        prompt, and the fact. Of common people that are `known`, or of all where nobody is."""
        country = self._country
        draw = functools.partial(country.draw, "trace", seed, index)
        people = [name for name in country.common if country.knows(name)] or country.common
        fact = self._fact(people[draw("name") % len(people)], _ONE[draw("relation") % len(_ONE)])
        prompt = sentence(fact, 0).removesuffix(f" {fact.object}.")
        spans = {}
        for part, text in (("subject_at", fact.subject), ("relation_at", RELATIONS[fact.relation].label)):
            spans[part] = [prompt.index(text), prompt.index(text) + len(text)]
        other = country.other(fact.relation, fact.object, "trace", seed, index)
        return {"prompt": prompt, "answer": fact.object, "other": other, **spans, "fact": list(fact)}

    def _fact(self, subject: str, relation: str) -> Fact:
        return Fact(subject, relation, self._country.facts(subject)[relation])

    def _follow(self, name: str, path: Sequence[str]) -> list[Fact]:
        facts = [self._fact(name, path[0])]
        for relation in path[1:]:
            facts.append(self._fact(facts[-1].object, relation))
        return facts

    def _drawn(self, cell: str, split: str, seed: int, index: int) -> dict:
        for turn in itertools.count():
            parts = (cell, split, seed, index, turn)
            draw = functools.partial(self._country.draw, "problem", *parts)
            problem = self._description(draw) if cell == "description" else self._on_a_path(cell, draw)
            facts = problem["facts"] or [Fact(problem["subject"], "".join(problem["path"]), "")]
            if self._country.held_out(*facts) == (split == "test"):
                return self._completed({**problem, "cell": cell}, draw)

    def _description(self, draw: Callable) -> dict:
        name = self._described[draw("name") % len(self._described)]
        prompt = self._country.description(*self._country.pair(name), draw("form"))
        facts = [self._fact(name, relation) for relation in ("town", "trade")]
        return {"prompt": prompt, "answer": name, "subject": name, "path": [], "facts": facts}

    def _on_a_path(self, cell: str, draw: Callable) -> dict:
        """A question, a statement, or a question about nobody."""
        country, exists = self._country, cell != "unanswerable"
        hops = CELLS.index(cell) + 1 if cell in CELLS[:2] else self._hops[draw("hops") % len(self._hops)]
        names = country.people if exists else country.absent
        name = names[draw("name") % len(names)]
        paths = [path for path in PATHS[hops] if path[0] in country.stated(name)]
        path = paths[draw("path") % len(paths)]
        facts = self._follow(name, path) if exists else []
        prompt, answer = question(name, path, draw("form")), facts[-1].object if facts else "unknown"
        if cell == "statement":
            truth = ("false", "true")[draw("truth") % 2]
            claimed = answer if truth == "true" else country.other(path[-1], answer, draw("claimed"))
            subject = phrase(name, path) if len(path) > 1 else ""
            prompt = f"True or false? {sentence(facts[-1]._replace(object=claimed), draw('form'), subject)}"
            answer = truth
        return {"prompt": prompt, "answer": answer, "subject": name, "path": list(path), "facts": facts}

    def _completed(self, problem: dict, draw: Callable) -> dict:
        """The record of a problem, with documents before its prompt where the settings want some."""
        country, facts = self._country, problem["facts"]
        numbers = list(dict.fromkeys(country.evidence[fact.subject, fact.relation] for fact in facts))
        known = bool(facts) and all(country.knows(fact.subject) for fact in facts if fact.relation in _ONE)
        details = {"facts": [list(fact) for fact in facts], "evidence": [f"d{number}" for number in numbers], "known": known}
        if not self._context:
            return {**problem, **details}
        about = {problem["subject"], *(fact.subject for fact in facts)}
        for place in itertools.count():
            if len(numbers) == self._context:
                break
            other = draw("other", place) % country.count
            numbers += [other] * (other not in numbers and country.document(other)["subject"] not in about)
        numbers.sort(key=lambda number: draw("place", number))
        texts = [country.document(number)["text"] for number in numbers]
        return {**problem, **details, "prompt": "\n".join([*texts, problem["prompt"]])}

    def _different(self, cell: str, count: int, seed: int) -> list[dict]:
        different: dict[str, dict] = {}
        for index in range(20 * count):  # bounded: the last of few possible problems may take forever to draw
            record = self._drawn(cell, "test", seed, index)
            different.setdefault(record["prompt"].rpartition("\n")[2], record)
            if len(different) == count:
                break
        return list(different.values())
