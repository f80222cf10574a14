"""The base model that studies start from: a million weights, trained on the playgrounds in a few minutes.

    python -m jaxpost.train --config=configs/tiny.py --workdir=runs/tiny

`model="recipe:configs/tiny.py"` trains it on first use and keeps it in the cache. Two of three documents are plain texts of
`instructions`, `world`, `languages` and `scenes`; every third is a problem with its answer, as a chat. So it reads the chat
format and solves a part of each playground's problems. `:text` has plain texts alone, and has never seen a chat. `:half` takes
half of the steps.

This file is its task too: problems of the four playgrounds, one cell of the results' table each.
"""

import functools
from types import SimpleNamespace

from jaxpost import recipe
from jaxpost import tokenizer as tokenizers
from jaxpost.tasks import instructions, languages, scenes, world
from jaxpost.tasks.arithmetic import hashed

MODEL = {
    "model_type": "llama",
    "vocab_size": 2048,
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
    "initializer_range": 0.04,
}
STEPS = 1600
# Percent of the documents that are problems with their answers.
CHATS = {"": 33, "text": 0, "half": 33}


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
    """2,048 tokens, learned from texts and problems of the four playgrounds."""
    texts = []
    for task in playgrounds().values():
        texts += [task.text(index) for index in range(2000)]
        texts += [turn["content"] for index in range(500) for turn in task.conversation(index)["messages"]]
    return tokenizers.learned(texts, MODEL["vocab_size"])


def make(*, chats: int = 33) -> SimpleNamespace:
    """The task: problems of all playgrounds; of its demonstrations so many percent are problems, the others texts."""

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


def get_config(arg: str = ""):
    return recipe.make(
        model=MODEL,
        tokenizer=f"{__file__}:tokenizer",
        remat="dots",
        task={"name": __file__, "examples": 50_000, "chats": recipe.chosen(CHATS, arg)},
        train_on="all",
        too_long="drop",
        held_out=0.005,
        window=128,
        batch_size=16,
        steps=STEPS // 2 if arg == "half" else STEPS,
        log_every=50,
        eval_every=400,
        eval_per_cell=50,
        eval_rows=200,
        rollouts={"prompt_window": 96, "new": 32},
        optimizer={"lr": 2e-3, "warmup": 50, "b2": 0.98, "end": 0.05},
    )
