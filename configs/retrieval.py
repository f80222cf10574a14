"""An embedding model of a Hugging Face checkpoint, from lists: a query, passages that answer it, and perhaps some that do not.

    python -m jaxpost.train --config=configs/retrieval.py --workdir=/tmp/lists --config.model=FOLDER --config.data=FILE.jsonl

A row is {"query": ..., "positives": [...], "negatives": [...]}. Each query is told from the passages of all rows of a batch, so
a larger batch_size is a harder task; with more microbatches it costs no memory. `:listwise`, `:distilled` or another loss of
objectives/contrastive.py after the file name takes that one; its keywords are settings (--config.objective.pooling=mean).
"""

from jaxpost import recipe


def get_config(arg: str = "info_nce"):
    return recipe.make(
        objective={"name": f"contrastive.{arg}"},
        held_out=0.05,
        too_long="truncate",
        window=512,
        batch_size=32,
        microbatches=4,
        epochs=1,
        optimizer={"lr": 2e-5, "schedule": "cosine", "warmup": 0.1},
        log_every=10,
        eval_every=100,
        save_every=100,
    )
