"""Masked language modelling of an encoder, or of a decoder as one, on texts of one's own.

    python -m jaxpost.train --config=configs/mlm.py --workdir=/tmp/mlm --config.model=FOLDER --config.data=FILE.jsonl

The folder is BERT's or ModernBERT's, or a decoder's whose tokenizer has a mask token. `:modernbert` after the file name hides
30% of the tokens, each behind the mask token, in place of BERT's 15%.
"""

from jaxpost import recipe

NOISE = {
    "bert": {"share": 0.15, "replaced": 0.8, "random": 0.1},
    "modernbert": {"share": 0.3, "replaced": 1.0, "random": 0.0},
}


def get_config(arg: str = "bert"):
    return recipe.make(
        objective={"name": "masked.mlm", **recipe.chosen(NOISE, arg)},
        held_out=0.02,
        too_long="split",
        window=512,
        batch_size=8,
        epochs=1,
        optimizer={"lr": 5e-5, "schedule": "linear", "warmup": 0.1, "weight_decay": 0.01},
        log_every=10,
        eval_every=100,
        save_every=100,
    )
