"""Towards a Unified View of Large Language Model Post-Training.

    L = L_RL of a prompt's completions where one of them is right, L_SFT of the prompt's demonstration where none is

Claim: with the same problems, demonstrations and number of tokens, imitating where every completion fails and reinforcing
elsewhere beats reinforcement alone and imitation alone, sampled and greedy. Its nearest relative is `given="share"` (UFT),
which shows the beginning of each demonstration in place of all of a few.

A combination lock of 2 to 5 letters, and 1,024 problems with a demonstration each, half of which have a wrong digit. All arms
start from a model that knows what a code looks like and has imitated these demonstrations for 50 steps, so that chance opens
the short codes, and `grpo` is imitation before reinforcement. A model that imitates is wrong as often as its demonstrations
when it is sampled. Both terms are as the paper's code has them: Dr. GRPO without a clip, and the mean of -log p over
demonstrations. There the first is a sum over the completions of a microbatch; 1/8 for the second stands for eight of them.
Left out: the entropy bonus, gates above 0, and an arm that mixes both without a gate.
"""

from jaxpost import recipe
from jaxpost.studies import Claim, Study

STUDY = Study(
    arms=("hpt", "grpo", "sft"),
    metric="eval/accuracy",
    claims=(
        Claim("hpt", over=("grpo", "sft"), margin=0.1),
        Claim("hpt", over=("grpo", "sft"), metric="eval/accuracy_greedy", margin=0.05),
    ),
    family="objective",
    tune={"optimizer.lr": (3e-4, 6e-4, 1e-3, 2e-3)},
)
PROBLEMS = 1024
MODEL = {
    "model_type": "llama",
    "vocab_size": 32,
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
    "initializer_range": 0.08,
}


def get_config(arg="hpt"):
    shared = {"tokenizer": "tasks.lock.tokenizer", "eval_rows": 400, "eval_per_cell": 100}
    sampled = {"prompt_window": 8, "new": 6}
    task = {"name": "lock", "depths": (2, 3, 4, 5), "corrupt": 0.5}
    if arg == "start":
        data = {"objective": "sft.nll", "window": 64, "batch_size": 16}
        return recipe.make(
            stages=("codes", "first"),
            model=MODEL,
            rollouts=sampled,
            codes={"task": {**task, "lock": None, "examples": 20000}, "steps": 400, "optimizer": {"lr": 3e-3, "warmup": 50}},
            first={
                "task": {**task, "examples": PROBLEMS},
                "steps": 50,
                "optimizer": {"lr": 1e-3, "schedule": "constant", "warmup": 0},
            },
            **data,
            **shared,
        )
    shared |= {"model": f"recipe:{__file__}:start", "tokens": 400_000, "steps": 1000}
    shared["optimizer"] = {"lr": 1e-3, "schedule": "constant", "warmup": 5}
    if arg == "sft":
        data = {"task": {**task, "examples": PROBLEMS}, "objective": "sft.nll", "window": 64, "batch_size": 16}
        return recipe.make(rollouts=sampled, **data, **shared)
    rl = {"name": "policy_gradient.dr_grpo", "longest": 6, "low": 1e9, "high": 1e9}
    steps = ""
    if arg == "hpt":
        rl = {"name": "policy_gradient.variant", "of": rl, "added_terms": {"sft": 1 / 8}}
        steps = ("exchange", "annotate", "advantages")
    rollouts = {**sampled, "group": 8, "steps": steps}
    task = {**task, "problems": PROBLEMS}
    return recipe.make(task=task, source="rollouts", objective=rl, rollouts=rollouts, batch_size=128, **shared)
