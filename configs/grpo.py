"""Reinforcement learning of a Hugging Face checkpoint on a task whose answers can be checked; GSM8K, if no other is named.

    python -m jaxpost.train --config=configs/grpo.py --workdir=/tmp/grpo --config.model=FOLDER

`:dapo`, `:gspo`, `:rloo` or another line of PRESETS after the file name takes that method; objectives/policy_gradient.py has a
table of what each is made of, and its keywords are settings (--config.objective.beta=0.01). `trl`, `verl` and `tulu` are those
frameworks' defaults. Prompts of your own are --config.data=FILE.jsonl with --config.reward=FILE.py:reward (tasks/prompts.py),
a file of GSM8K's form is --config.task.data=FILE.jsonl, another task --config.task.name=FILE.py. --config.reward names what
judges in place of the task's own or beside it. --config.shared_prefix=true computes each prompt once for its group;
batch_size then counts prompts.
"""

from jaxpost import recipe

NEW = 512  # the most tokens of a completion

# What each method asks of rollouts, where that is more than four steps a batch or other than one.
PRESETS = {
    "reinforce": {},
    "rloo": {"minibatches": 1},
    "grpo": {"minibatches": 4},
    "dr_grpo": {"minibatches": 4},
    "dapo": {"minibatches": 4, "group": 16, "resample": 3, "drop_level": True, "overlong": NEW // 4},
    "gspo": {"minibatches": 4},
    "cispo": {"minibatches": 4},
    "sapo": {"minibatches": 4},
    "gmpo": {"minibatches": 4},
    "reinforce_pp": {"minibatches": 4, "group": 1},
    "trl": {},
    "verl": {"minibatches": 4},
    "tulu": {"minibatches": 1, "group": 16, "drop_level": True},
}


def get_config(arg: str = "grpo"):
    rollouts = {"group": 8, "prompt_window": 256, "new": NEW, "temperature": 1.0, **recipe.chosen(PRESETS, arg)}
    return recipe.make(
        objective={"name": f"policy_gradient.{arg}", **({"longest": NEW} if arg == "dr_grpo" else {})},
        source="rollouts",
        task=recipe.GSM8K,
        too_long="drop",
        rollouts=rollouts,
        batch_size=64,
        steps=400,
        optimizer={"lr": 1e-6, "schedule": "constant", "warmup": 10},
        best="eval/reward",
        highest=True,
        eval_per_cell=200,
        log_every=1,
        eval_every=40,
        save_every=40,
    )
