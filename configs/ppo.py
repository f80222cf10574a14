"""PPO: reinforcement learning with a critic, a head in the same tree; GSM8K, if no other task is named.

    python -m jaxpost.train --config=configs/ppo.py --workdir=/tmp/ppo --config.model=FOLDER

The settings are configs/grpo.py's but for what a critic changes: prompts are completed once, since it and not their siblings
says what was to be expected, each batch is learned from four times over, and the KL to the start is part of the reward.
"""

from pathlib import Path

from jaxpost import recipe


def get_config(arg: str = ""):
    return recipe.opened(
        str(Path(__file__).with_name("grpo.py")),
        objective={"name": "policy_gradient.ppo"},
        rollouts={"group": 1, "minibatches": 4, "epochs": 4},
        optimizer={"lr": 3e-6},
    )
