"""KTO: a Hugging Face checkpoint on single answers, each with a label that says whether it is a good one.

    python -m jaxpost.train --config=configs/kto.py --workdir=/tmp/kto --config.model=FOLDER --config.data=FILE.jsonl

`:bco` or `:apo_zero` after the file name takes another loss of objectives/unpaired.py. Beside each answer stands another row's,
to this row's prompt: how likely those become is KTO's baseline, so a row holds both. Where good and bad answers are not equally
many, weigh them: --config.objective.undesirable=1.5 (the paper wants desirable n_d / (undesirable n_u) between 1 and 4/3).
"""

from jaxpost import recipe


def get_config(arg: str = "kto"):
    return recipe.make(
        objective={"name": f"unpaired.{arg}"},
        held_out=0.05,
        too_long="truncate",
        window=1024,
        batch_size=8,
        epochs=1,
        optimizer={"lr": 1e-6, "schedule": "linear", "warmup": 0.1, "end": 0.0},
        log_every=10,
        eval_every=100,
        save_every=100,
    )
