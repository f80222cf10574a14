"""Online DPO: preference pairs made a moment ago, the best and the worst of a prompt's completions by the current weights.

    python -m jaxpost.train --config=configs/online_dpo.py --workdir=/tmp/online --config.model=FOLDER

`:ipo` or another loss of objectives/preference.py after the file name takes that one. What judges is the task's reward (GSM8K,
if no other task is named) or --config.reward, a trained reward model for one: '{"name": "model.score", "folder": "FOLDER"}'. A
row is a pair behind its prompt; where all completions of a prompt are judged the same nothing is learned of it. Source: "Direct
Language Model Alignment from Online AI Feedback".
"""

from pathlib import Path

from jaxpost import recipe


def get_config(arg: str = "sigmoid"):
    return recipe.opened(
        str(Path(__file__).with_name("grpo.py")),
        objective={"name": f"preference.{arg}"},
        rollouts={"group": 4, "minibatches": 1},
        batch_size=16,
        shared_prefix=True,
        optimizer={"lr": 5e-7},
    )
