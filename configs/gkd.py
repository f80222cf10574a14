"""On-policy distillation (GKD): the student writes, and a teacher with the same tokenizer says what it would have written.

    python -m jaxpost.train --config=configs/gkd.py --workdir=/tmp/gkd --config.model=FOLDER --config.objective.teacher=TEACHER

`:forward_kl` or `:reverse_kl` after the file name takes that divergence in place of the generalised Jensen-Shannon. All data is
the student's own, so it learns to recover from what it says itself; for a teacher's or the data's texts begin with
configs/distill.py. Prompts are those of a task (GSM8K, if no other is named), whose reward is only a figure here. Source:
"On-Policy Distillation of Language Models: Learning from Self-Generated Mistakes".
"""

from pathlib import Path

from jaxpost import recipe


def get_config(arg: str = "jensen_shannon"):
    return recipe.opened(
        str(Path(__file__).with_name("grpo.py")),
        objective={"name": f"distill.{arg}", "teacher": ""},
        rollouts={"group": 1, "minibatches": 1},
        batch_size=32,
        optimizer={"lr": 1e-5},
    )
