"""Playgrounds: problems and texts of four playgrounds together, which the base model of studies learns from (configs/tiny.py).

    task=dict(name="playgrounds", chats=33)

A problem is one of `instructions`, `world`, `languages` or `scenes`, each equally often and as easy as a small model needs it;
which one is its cell in the results' table. The demonstrations are plain texts of these tasks and, for every third, a problem
with its answer. A test problem of a playground is in no text and no demonstration of it.
"""

import functools
from types import SimpleNamespace

from jaxpost import tokenizer as tokenizers
from jaxpost.errors import UserError
from jaxpost.tasks import instructions, languages, scenes, world
from jaxpost.tasks.arithmetic import hashed

TOKENS = 2048  # of the tokenizer


@functools.cache
def playgrounds() -> dict[str, SimpleNamespace]:
    """The four tasks, as easy as the model needs them."""
    return {
        "instructions": instructions.make(length=(3, 5)),
        "world": world.make(people=60, hops=(1,)),
        "languages": languages.make(words=40),
        "scenes": scenes.make(kinds=("caption", "count", "colour", "relation"), objects=(2, 3)),
    }


@functools.cache
def tokenizer():
    """2,048 tokens, learned from texts and problems of the four playgrounds. Names are spelled in syllables: those of one
    country would be tokens of their own, by which a model could tell names that nobody has.
    """
    texts = []
    for name, task in playgrounds().items():
        tasks = [task] if name != "world" else [world.make(people=60, hops=(1,), country=country) for country in range(20)]
        for one in tasks:
            texts += [one.text(index) for index in range(1000 // len(tasks))]
            texts += [turn["content"] for index in range(250 // len(tasks)) for turn in one.conversation(index)["messages"]]
    return tokenizers.learned(texts, TOKENS)


def make(*, chats: int = 33) -> SimpleNamespace:
    """The task: problems of all playgrounds; of its demonstrations so many percent are problems, the others texts.

    Raises UserError for what is no percentage.
    """
    if isinstance(chats, bool) or not isinstance(chats, int) or not 0 <= chats <= 100:
        raise UserError(f"task playgrounds, chats={chats!r}: give a percentage, 0 to 100")

    def drawn(*parts):
        names = list(playgrounds())
        name = names[hashed("playground", *parts) % len(names)]
        return name, playgrounds()[name]

    def record(index, *, split="train", seed=0):
        """Problem number `index` of an endless stream, with its `playground`, which is its cell."""
        name, task = drawn("problem", index, split, seed)
        return {**task.record(index, split=split, seed=seed), "playground": name, "cell": name}

    def conversation(index, *, seed=0):
        """Document number `index`: a text, or a problem and its answer as messages."""
        _, task = drawn("document", index, seed)
        if hashed("chat", index, seed) % 100 < chats:
            return {"messages": task.conversation(index, seed=seed)["messages"]}
        return {"text": task.text(index, seed=seed)}

    def test_records(per_cell, *, seed=0):
        """`per_cell` test problems of each playground, of as many of its own cells as there are."""
        return [
            {**problem, "playground": name, "cell": name}
            for name, task in playgrounds().items()
            for problem in _spread(task, per_cell, seed)
        ]

    return SimpleNamespace(record=record, conversation=conversation, test_records=test_records, reward=reward)


def _spread(task, count: int, seed: int) -> list[dict]:
    """`count` test problems, the first of each cell before the second of any."""
    by_cell: dict = {}
    for problem in task.test_records(count, seed=seed):
        by_cell.setdefault(problem["cell"], []).append(problem)
    rounds = [cell[place] for place in range(count) for cell in by_cell.values() if place < len(cell)]
    return rounds[:count]


def reward(record, completion) -> bool:
    """Whether the completion solves the problem, by its playground's reward."""
    return playgrounds()[record["playground"]].reward(record, completion)
