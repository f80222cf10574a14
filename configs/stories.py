"""GRPO on a real, small model: a TinyStories checkpoint learns to use three given words again and to come to an end.

    python -m jaxpost.train --config=configs/stories.py --workdir=/tmp/stories --config.model=FOLDER

FOLDER is a base model of children's stories, such as one of 260 thousand weights with a vocabulary of 512. It has no chat
format: a story begins and ends with the beginning-of-text token, which the template says. The reward counts the words and the
full stop; `eval/accuracy` is the share of held-out problems with all of them. The KL to the start keeps the stories stories,
and so does it that attention alone is trained: with all weights the same is learned at a greater KL. Many microbatches, for
attention over few rows stays in a CPU's cache: little more than half the time. About a quarter of an hour on two cores.
"""

from jaxpost import recipe


def get_config(arg: str = ""):
    return recipe.make(
        objective={"name": "policy_gradient.grpo", "beta": 0.05},
        trainable="attention",
        source="rollouts",
        task={"name": "stories"},
        reward={"shaped": "task", "satisfied": {"name": "task.satisfied", "weight": 0.5}},
        template="{{ bos_token }}{% for m in messages %}{{ m.content }}{{ bos_token if m.role == 'assistant' }}{% endfor %}",
        rollouts={"group": 16, "prompt_window": 48, "new": 96, "temperature": 1.0},
        batch_size=256,
        microbatches=32,
        steps=200,
        optimizer={"lr": 1.5e-3, "schedule": "linear", "warmup": 10, "end": 0.1, "b2": 0.98},
        best="eval/accuracy",
        highest=True,
        eval_rows=128,
        eval_per_cell=256,
        log_every=5,
        eval_every=50,
        save_every=50,
    )
