"""Fine-tuning an adapter around a Hugging Face checkpoint on a file of one's own.

    python -m jaxpost.train --config=configs/lora.py --workdir=/tmp/lora --config.model=FOLDER --config.data=FILE.jsonl

`:rslora` or `:dora` after the file name chooses another kind of adapter; --config.adapter.base=nf4 keeps the frozen weights in
four bits (int8: eight). The learning rate is ten times full fine-tuning's.
"""

from jaxpost import recipe


def get_config(arg: str = "lora"):
    return recipe.make(
        adapter={"name": f"lora.{arg}", "rank": 16, "alpha": 32.0, "base": ""},
        held_out=0.02,
        too_long="truncate",
        window=512,
        batch_size=8,
        epochs=1,
        optimizer={"lr": 2e-4, "schedule": "cosine", "warmup": 0.03},
        log_every=10,
        eval_every=100,
        save_every=100,
    )
