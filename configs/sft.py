"""Supervised fine-tuning of a Hugging Face checkpoint on a file of one's own.

    python -m jaxpost.train --config=configs/sft.py --workdir=/tmp/sft --config.model=FOLDER --config.data=FILE.jsonl

The file's rows may be messages, prompt and completion, Alpaca, or text. `:dft` after the file name chooses dynamic fine-tuning.
"""

from jaxpost import recipe


def get_config(arg: str = "nll"):
    return recipe.make(
        objective={"name": f"sft.{arg}"},
        held_out=0.02,
        too_long="truncate",
        window=512,
        batch_size=8,
        epochs=1,
        optimizer={"lr": 2e-5, "schedule": "cosine", "warmup": 0.03},
        log_every=10,
        eval_every=100,
        save_every=100,
    )
