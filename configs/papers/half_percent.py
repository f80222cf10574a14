"""Maybe Only 0.5% Data is Needed: A Preliminary Exploration of Low Training Data Instruction Tuning.

    s_1 at random;  s_{k+1} = argmax_x min_{j <= k} |e(x) - e(s_j)|   over the rows of the target's cluster

Claim: a core set of 0.5% of the data, chosen by K-centre greedy from the rows near the target task, teaches that task more than
as many rows drawn at random, and more than all data does in as many steps. Its nearest relative is `coreset.clusters`, which
takes rows near the centres in place of those that cover the region.

The data are 12,000 demonstrations of `instructions`, with five tasks of ten in four wordings; the target is `select_aggregate`. As
in collections of real tasks some are frequent and some rare: the n-th of the target's tasks has 1/n as many rows. Embeddings are
means of the base model's hidden states. Left out: the single wording that the paper takes for all rows of a task.
"""

import numpy as np

from jaxpost import recipe
from jaxpost.data.transforms import coreset
from jaxpost.studies import Claim, Study
from jaxpost.tasks import instructions

STUDY = Study(
    arms=("core", "random", "all"),
    metric="eval/accuracy_greedy",
    claims=(Claim("core", over=("random", "all"), margin=0.03),),
    family="data",
    tune={"sft.optimizer.lr": (3e-4, 1e-3, 2e-3)},
)
TARGET = "select_aggregate"
ROWS, KEPT = 12_000, 60


def skewed(rows, columns, key):
    """Rows [K] of which the target's tasks have shares of 1, 1/2, 1/3, ..., those of other tasks all."""
    place = {name: n for n, name in enumerate(instructions.categories()[TARGET])}
    shares = np.array([1 / (1 + place.get(row["task"], 0)) for row in rows])
    return np.flatnonzero(np.random.default_rng(key).random(len(rows)) < shares)


def core(rows, columns, key, *, column: str, keep: int):
    """K-centre greedy among the target's rows -> [keep] indices."""
    region = np.flatnonzero([row["category"] == TARGET for row in rows])
    vectors = {column: np.asarray(columns[column])[region]}
    return region[coreset.k_centre([rows[i] for i in region], vectors, key, column=column, keep=keep)]


def drawn(rows, columns, key, *, column: str, keep: int):
    """As many of the target's rows at random -> [keep] indices."""
    region = np.flatnonzero([row["category"] == TARGET for row in rows])
    return np.sort(np.random.default_rng(key).choice(region, keep, replace=False))


def get_config(arg="core"):
    chosen = recipe.chosen({"core": "core", "random": "drawn", "all": ""}, arg)
    trained = {"objective": "sft.nll", "window": 128, "batch_size": 8, "steps": 100}
    trained |= {"data": "@chosen" if chosen else "@pool", "optimizer": {"lr": 1e-3, "warmup": 10}}
    stages = {"pool": {"do": "select", "task": {"name": "instructions", "length": (3, 5), "examples": ROWS}, "with": f"{__file__}:skewed"}}
    if chosen:
        stages["near"] = {"do": "annotate", "data": "@pool", "with": {"name": "embedding", "prompt": True}}
        select = {"name": f"{__file__}:{chosen}", "column": "embedding", "keep": KEPT}
        stages["chosen"] = {"do": "select", "data": "@pool", "annotations": "@near", "with": select}
    tested = {"name": "accuracy", "task": {"name": "instructions", "tasks": TARGET, "length": (3, 5)}, "per_cell": 30, "new": 16}
    stages |= {"sft": trained, "figures": {"do": "evaluate", "evals": {"target": tested}}}
    return recipe.make(stages=tuple(stages), model="recipe:configs/tiny.py", too_long="truncate", **stages)
