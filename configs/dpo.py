"""Preference optimisation of a Hugging Face checkpoint on pairs of answers, a chosen one and a rejected one.

    python -m jaxpost.train --config=configs/dpo.py --workdir=/tmp/dpo --config.model=FOLDER --config.data=FILE.jsonl

`:simpo`, `:ipo` or another loss of objectives/preference.py after the file name takes that one in place of DPO's `sigmoid`; its
keywords are settings (--config.objective.beta=0.2). A row is a pair or several, so the window holds both answers to a prompt,
and the prompt twice, or with --config.shared_prefix=true once. What the reference says is written down before the first step.
"""

from jaxpost import recipe


def get_config(arg: str = "sigmoid"):
    return recipe.make(
        objective={"name": f"preference.{arg}"},
        held_out=0.05,
        too_long="truncate",
        window=1024,
        batch_size=8,
        epochs=1,
        # A tenth of fine-tuning's, or less: the loss has no floor, and the policy drifts from what it was.
        optimizer={"lr": 1e-6, "schedule": "linear", "warmup": 0.1, "end": 0.0},
        log_every=10,
        eval_every=100,
        save_every=100,
    )
