"""Towards a Unified View of Large Language Model Post-Training.

    L = L_RL of a prompt's completions where one of them is right, L_SFT of the prompt's demonstration where none is

Claim: with the same prompts, demonstrations and number of tokens, imitating only where every completion fails beats
reinforcement alone and imitation alone. Its nearest relative is `given="share"` (UFT), which shows the beginning of each
demonstration in place of all of a few.

Countdown with two and three numbers, 512 problems with a solution each, for a model that was trained on two numbers alone. It
hardly ever solves one of three, so reinforcement finds little there. Both terms are as the paper's code has them: Dr. GRPO
without a clip, and the mean of -log p over demonstrations. Left out: the entropy bonus, and gates above 0.
"""

from types import SimpleNamespace

from jaxpost import recipe
from jaxpost.studies import Claim, Study
from jaxpost.tasks import countdown

STUDY = Study(
    arms=("hpt", "grpo", "sft"),
    metric="eval/accuracy",
    claims=(Claim("hpt", over=("grpo", "sft"), margin=0.03),),
    family="objective",
    tune={"optimizer.lr": (1e-4, 3e-4, 1e-3)},
)
PROBLEMS = 512


def make(**keys):
    """Countdown whose training problems are the same for every seed, so that arms and seeds share them."""
    task = countdown.make(brief=True, sizes=(2, 3), largest=20, **keys)
    fixed = {"record": lambda index, *, split="train", seed=0: task.record(index, split=split)}
    fixed["demonstration"] = lambda index, *, seed=0: task.demonstration(index)
    return SimpleNamespace(**{**vars(task), **fixed})


def get_config(arg="hpt"):
    shared = {"tokenizer": "tasks.countdown.tokenizer", "remat": "dots", "eval_rows": 400, "eval_per_cell": 400}
    sampled = {"prompt_window": 14, "new": 12}
    if arg == "start":  # pretraining, on other problems
        task = {"name": "countdown", "brief": True, "sizes": (2,), "largest": 20, "examples": 20000}
        data = {"task": task, "split_seed": 1, "window": 64, "batch_size": 16, "steps": 400, "objective": "sft.nll"}
        model = recipe.opened("configs/quickstart.py").model.to_dict()
        return recipe.make(model=model, rollouts=sampled, optimizer={"lr": 1e-3, "warmup": 50}, **data, **shared)
    shared |= {"model": f"recipe:{__file__}:start", "tokens": 200_000, "steps": 100_000}
    shared["optimizer"] = {"lr": 3e-4, "schedule": "constant", "warmup": 5}
    if arg == "sft":
        task = {"name": __file__, "examples": PROBLEMS}
        return recipe.make(task=task, objective="sft.nll", window=64, batch_size=8, rollouts=sampled, **shared)
    task = {"name": __file__, "problems": PROBLEMS}
    rl = {"name": "policy_gradient.dr_grpo", "longest": 12, "low": 1e9, "high": 1e9}
    steps = ""
    if arg == "hpt":
        rl = {"name": "policy_gradient.variant", "of": rl, "added_terms": {"sft": 1.0}}
        steps = ("exchange", "annotate", "advantages")
    rollouts = {**sampled, "group": 8, "steps": steps}
    return recipe.make(task=task, source="rollouts", objective=rl, rollouts=rollouts, batch_size=64, **shared)
