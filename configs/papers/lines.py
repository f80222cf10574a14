"""LiNeS: Post-training Layer Scaling Prevents Forgetting and Enhances Model Merging.

    theta_l = theta_0 + (alpha + (1 - alpha) l / (L - 1)) (theta_tuned - theta_0)_l    of layer l; alpha outside of layers

Claim: of a model that was tuned on one task, scaling the changes by depth keeps more of all tasks together than scaling them
alike, since shallow layers serve all tasks. Its nearest relative is task arithmetic with one model, the baseline here, whose
strength of 1 is the tuned model itself.

The base knows four playgrounds a little. The tuned model has learned one of them, translation, and forgotten others. The figure
is the accuracy over all four, each with the same weight. Both arms try the same values of alpha on the tuning seed. Left out:
the merge of several tuned models, where alpha is computed.
"""

from jaxpost import recipe
from jaxpost.merging import arithmetic
from jaxpost.studies import Claim, Study

STUDY = Study(
    arms=("lines", "uniform"),
    metric="eval/all/accuracy_greedy",
    claims=(Claim("lines", over="uniform", margin=0.01),),
    family="merging",
    tune={"merged.with.alpha": (0.1, 0.3, 0.5, 0.7, 0.9, 1.0)},
)
BASE = "recipe:configs/tiny.py"
SAMPLED = {"prompt_window": 96, "new": 40}


def lines(params, *others, alpha: float = 0.5):
    """The paper's merge: the changes' strength grows with depth, from alpha to 1."""
    return arithmetic.task_arithmetic(params, *others, strength=[alpha, 1.0])


def uniform(params, *others, alpha: float = 0.5):
    """The same strength in all layers."""
    return arithmetic.task_arithmetic(params, *others, strength=alpha)


def get_config(arg="lines"):
    arm, _, seed = arg.partition("-")
    if arm == "tuned":
        task = {"name": "languages", "words": 40, "examples": 8000}
        trained = {"window": 96, "batch_size": 16, "steps": 250, "optimizer": {"lr": 2e-3, "warmup": 20}}
        return recipe.make(model=BASE, task=task, objective="sft.nll", seed=int(seed), rollouts=SAMPLED, **trained)
    tested = {"name": "accuracy", "task": "playgrounds", "per_cell": 60, "new": SAMPLED["new"]}
    return recipe.make(
        stages=("merged", "figures"),
        merged={
            "do": "merge",
            "with": {"name": f"{__file__}:{arm}", "alpha": 0.5},
            "of": (BASE, f"recipe:{__file__}:tuned-{{seed}}"),
        },
        figures={"do": "evaluate", "evals": {"all": tested}},
    )
