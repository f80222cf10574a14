"""VLM2Vec: Training Vision-Language Models for Massive Multimodal Embedding Tasks.

    L = -log exp(q.p / t) / sum_p' exp(q.p' / t)    q the embedding of an instruction and a query, p' the targets of the batch

Claim: the instruction in front of a query tells which target is wanted, and a batch made of sub-batches, each of one data set,
gives better embeddings than the same rows mixed, since targets of the same data set are harder negatives. The nearest relative
is DPR, which has neither.

A query states two facts on somebody of `world`. The instruction wants somebody else of the same town, trade, skill, employer or
event: five data sets over the same queries. A target states one fact. The figure is the share of queries whose closest of 1000
sentences, in a country that this training never saw, states the wanted fact of somebody else. Without the instruction that is
one of two, so half is the most: that claim checks that the instruction is used. Seeds vary the order of the rows, which are the
same. Targets with the wanted fact are no negatives, of which sub-batches have more. Left out: images, LoRA, mined negatives.
"""

from types import SimpleNamespace

import numpy as np

from jaxpost import recipe
from jaxpost.data.nearest import nearest
from jaxpost.studies import Claim, Study
from jaxpost.tasks import world
from jaxpost.tasks.world_country import Fact, sentence

STUDY = Study(
    arms=("vlm2vec", "mixed", "uninstructed"),
    metric="eval/wanted/first",
    claims=(Claim("vlm2vec", over="mixed", margin=0.02), Claim("vlm2vec", over="uninstructed", margin=0.1)),
    family="objective",
    equal="steps",
    tune={"optimizer.lr": (5e-4, 1e-3, 2e-3)},
)
KINDS = {"town": "home", "trade": "trade", "skill": "skill", "employer": "employer", "event": "adventure"}
BATCH, STEPS = 32, 120


def instruction(kind: str) -> str:
    return f"Find the same {KINDS[kind]}: "


def text(country, name: str, kinds, seed: int) -> str:
    """Sentences that state some facts on somebody."""
    facts = country.facts(name)
    return " ".join(sentence(Fact(name, kind, facts[kind]), seed + place) for place, kind in enumerate(kinds))


def drawn(country, kind: str, index: int) -> list[tuple[str, list[str]]]:
    """[(name, kinds of facts)] of a query, and of a target that states the same fact of this kind."""
    random = np.random.default_rng([index, list(KINDS).index(kind)])
    first, *people = (str(name) for name in random.permutation(country.people))
    target = next(name for name in people if country.facts(name)[kind] == country.facts(first)[kind])
    others = [one for one in KINDS if one != kind]
    asked = random.permutation([kind, random.choice(others)])
    return [(first, [str(one) for one in asked]), (target, [kind])]


def make(*, instructed: bool = True, people: int = 200):
    """Lists for training: a query of two facts, and a target that states the wanted one of somebody else."""
    countries = [world.make(people=people, country=number) for number in (0, *range(2, 9))]

    def conversation(index, *, seed=0):
        country = countries[index // len(KINDS) % len(countries)]
        kind = list(KINDS)[index % len(KINDS)]
        query, target = drawn(country, kind, index)
        wanted = f"{kind} {country.facts(query[0])[kind]}"
        row = {"kind": kind, "query_id": wanted, "positive_ids": [wanted], "instruction": instruction(kind) * instructed}
        texts = [text(country, *one, index + place) for place, one in enumerate((query, target))]
        return {"query": texts[0], "positives": texts[1:], **row}

    unasked = {"record": lambda index, *, split="train", seed=0: {}, "test_records": lambda count: [], "reward": len}
    return SimpleNamespace(conversation=conversation, **unasked)


def sub_batches(rows, columns, key, *, size: int):
    """The rows in an order in which each `size` of them are of one kind; both rows and sub-batches are shuffled."""
    random = np.random.default_rng(key)
    kinds = np.array([row["kind"] for row in rows])
    groups = [random.permutation(np.flatnonzero(kinds == kind)) for kind in sorted(set(kinds))]
    pieces = [group[at : at + size] for group in groups for at in range(0, len(group), size)]
    whole = [piece for piece in pieces if len(piece) == size]
    return np.concatenate([*(whole[i] for i in random.permutation(len(whole))), *(p for p in pieces if len(p) < size)])


def first(model, *, per_cell: int = 100, people: int = 200, instructed: bool = True, rows: int = 64):
    """first: the share of queries whose closest sentence states the wanted fact; and that of each kind."""
    country = world.make(people=people, country=1)
    texts, facts = [], []
    for i, name in enumerate(country.people):
        for kind in KINDS:
            texts.append(text(country, name, [kind], i))
            facts.append((name, kind, country.facts(name)[kind]))
    passages = model.embed(texts, rows=rows)
    means = []
    for kind in KINDS:
        queries = [drawn(country, kind, i)[0] for i in range(per_cell)]
        asked = [instruction(kind) * instructed + text(country, *query, i) for i, query in enumerate(queries)]
        right = []
        for (name, _), order in zip(queries, nearest(model.embed(asked, rows=rows), passages, 12)[1], strict=True):
            best = next(i for i in order if facts[i][0] != name)
            right.append(facts[best][1:] == (kind, country.facts(name)[kind]))
        means.append(np.mean(right))
        yield kind, float(means[-1])
    yield "first", float(np.mean(means))


def get_config(arg="vlm2vec"):
    return recipe.make(
        model="recipe:configs/tiny.py",
        task={"name": __file__, "examples": BATCH * STEPS, "instructed": arg != "uninstructed"},
        order={"name": f"{__file__}:sub_batches", "size": 1 if arg == "mixed" else 16},
        objective={"name": "contrastive.info_nce", "temperature": 0.05},
        evals={"wanted": {"name": f"{__file__}:first", "instructed": arg != "uninstructed"}},
        packing=False,
        window=48,
        batch_size=BATCH,
        steps=STEPS,
        log_every=10,
        optimizer={"lr": 1e-3, "schedule": "cosine", "warmup": 10, "b2": 0.98},
    )
