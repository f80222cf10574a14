"""A reward model: a Hugging Face checkpoint with a scalar head, learned from pairs of answers.

    python -m jaxpost.train --config=configs/reward_model.py --workdir=/tmp/rm --config.model=FOLDER --config.data=FILE.jsonl

`:offset` after the file name reads the pairs' margins too. `:logistic` learns from single answers with a label, true or false,
`:regression` from answers with a `score`, `:process` from solutions whose steps have a label each (README.md has the columns).
See objectives/reward_model.py. What it makes of other data: python -m jaxpost.annotate --what=reward.
"""

from jaxpost import recipe


def get_config(arg: str = "bradley_terry"):
    return recipe.make(
        objective={"name": f"reward_model.{arg}"},
        held_out=0.05,
        too_long="truncate",
        window=1024,
        batch_size=8,
        epochs=1,
        optimizer={"lr": 1e-5, "schedule": "linear", "warmup": 0.05, "end": 0.0},
        log_every=10,
        eval_every=100,
        save_every=100,
    )
