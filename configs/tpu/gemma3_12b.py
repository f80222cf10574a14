"""Gemma 3 12B (text) on rows of 8,192 tokens: all weights on a v5p of 16 chips, an adapter on a v6e of 8.

    python -m jaxpost.train --config=configs/tpu/gemma3_12b.py --workdir=gs://BUCKET/RUN --config.data=FILE --distributed
    python -m jaxpost.fit --config=configs/tpu/gemma3_12b.py

`:lora` after the file name trains an adapter.
"""

from jaxpost import recipe

MACHINES = {
    "": {"topology": "v5p:2x2x4", "mesh": {"data": 4, "fsdp": 4}, "batch_size": 16, "optimizer": {"lr": 1e-5, "b2": 0.95}},
    "lora": {
        "topology": "v6e:2x4",
        "mesh": {"fsdp": -1},
        "batch_size": 8,
        "adapter": {"name": "lora", "rank": 16, "alpha": 32.0},
        "optimizer": {"lr": 2e-4, "b2": 0.95},
    },
}


def get_config(arg: str = ""):
    return recipe.make(
        model="google/gemma-3-12b-pt",
        dtype="bfloat16",
        remat="full",
        window=8192,
        too_long="truncate",
        held_out=0.02,
        epochs=2,
        log_every=10,
        eval_every=200,
        save_every=200,
        **MACHINES[arg],
    )
