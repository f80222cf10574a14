"""Maybe Only 0.5% Data is Needed: A Preliminary Exploration of Low Training Data Instruction Tuning.

    s_1 at random;  s_{k+1} = argmax_x min_{j <= k} |e(x) - e(s_j)|   over the rows of the target's cluster

Claim: a core set of 0.5% of the data, chosen by K-centre greedy from the rows near the target task, teaches that task more than
as many of these rows drawn at random, and more than all of them do in as many steps. Its nearest relative is
`coreset.clusters`, which takes rows near the centres in place of those that cover the region.

The data are demonstrations of `instructions`, sixty tasks in eight categories, whose answers are written in four formats. The
target is the category `select_aggregate`, a fifth of them. As in collections of real tasks some kinds are frequent and some
rare: a fourth, a sixteenth and a sixty-fourth as many rows have the second, third and fourth format; test problems have all
alike. The base has read the tasks' single steps, and in chats the first format alone. Embeddings are means of its hidden
states, which cost the core set a pass over the data. The target's category stands for its cluster, which the paper finds by
k-means. Left out: the single wording that the paper takes for all rows of a task.
"""

from types import SimpleNamespace

import numpy as np

from jaxpost import recipe
from jaxpost.data.transforms import coreset, select
from jaxpost.studies import Claim, Study
from jaxpost.tasks import instructions
from jaxpost.tasks.arithmetic import hashed

STUDY = Study(
    arms=("core", "random", "related"),
    metric="eval/target/accuracy",
    claims=(Claim("core", over=("random", "related"), margin=0.02),),
    family="data",
    equal="steps",
    tune={"sft.optimizer.lr": (3e-4, 1e-3, 2e-3)},
)
TARGET = "select_aggregate"
FORMATS = ("plain", "tags", "sentence", "json")
ROWS, KEPT = 8000, 40


def make(*, tasks=()):
    """Instructions in four formats: demonstrations with shares of 1, 1/4, 1/16 and 1/64, test problems with all alike."""
    each = [instructions.make(length=(3, 5), tasks=tasks, format=name) for name in FORMATS]
    shares = np.cumsum([0.25**n for n in range(len(each))])

    def conversation(index, *, seed=0):
        drawn = hashed("format", seed, index) / 2**64 * shares[-1]
        return each[int(np.searchsorted(shares, drawn, side="right"))].conversation(index, seed=seed)

    mixed = instructions.make(length=(3, 5), tasks=tasks, format=FORMATS)
    return SimpleNamespace(**{**vars(mixed), "conversation": conversation})


def core(rows, columns, key, *, column: str, keep: int):
    """K-centre greedy among the target's rows -> [keep] indices."""
    region = np.flatnonzero([row["category"] == TARGET for row in rows])
    vectors = {column: np.asarray(columns[column])[region]}
    return region[coreset.k_centre([rows[i] for i in region], vectors, key, column=column, keep=keep)]


def random(rows, columns, key, *, keep: int | float):
    """So many of the target's rows at random, or such a share -> [keep] indices."""
    region = np.flatnonzero([row["category"] == TARGET for row in rows])
    return np.sort(np.random.default_rng(key).choice(region, select.count(keep, len(region)), replace=False))


def get_config(arg="core"):
    task = {"name": __file__, "examples": ROWS}
    chosen = {
        "core": {"name": f"{__file__}:core", "column": "embedding", "keep": KEPT},
        "random": {"name": f"{__file__}:random", "keep": KEPT},
        "related": {"name": f"{__file__}:random", "keep": 1.0},
    }
    tested = {"name": "accuracy", "task": {"name": __file__, "tasks": TARGET}, "per_cell": 60, "new": 24}
    stages = {
        "chosen": {"do": "select", "task": task, "with": recipe.chosen(chosen, arg)},
        "sft": {"data": "@chosen", "window": 128, "batch_size": 8, "steps": 60, "optimizer": {"lr": 1e-3, "warmup": 10}},
        "figures": {"do": "evaluate", "evals": {"target": tested}},
    }
    if arg == "core":
        stages["chosen"]["annotations"] = "@near"
        near = {"do": "annotate", "task": task, "too_long": "truncate", "with": {"name": "embedding", "prompt": True}}
        stages = {"near": near, **stages}
    return recipe.make(stages=tuple(stages), model="recipe:configs/tiny.py", **stages)
