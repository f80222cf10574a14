"""Llama-3.1-70B on rows of 8,192 tokens: all weights on a v5p of 128 chips, an adapter on a v6e of 32.

    python -m jaxpost.train --config=configs/tpu/llama31_70b.py --workdir=gs://BUCKET/RUN --config.data=FILE --distributed
    python -m jaxpost.fit --config=configs/tpu/llama31_70b.py

`:lora` after the file name trains an adapter.
"""

from jaxpost import recipe

MACHINES = {
    "": {"topology": "v5p:4x4x8", "mesh": {"data": 4, "fsdp": 32}, "batch_size": 128, "optimizer": {"lr": 1e-5, "b2": 0.95}},
    "lora": {
        "topology": "v6e:4x8",
        "mesh": {"fsdp": -1},
        "batch_size": 32,
        "adapter": {"name": "lora", "rank": 16, "alpha": 32.0},
        "optimizer": {"lr": 2e-4, "b2": 0.95},
    },
}


def get_config(arg: str = ""):
    return recipe.make(
        model="meta-llama/Llama-3.1-70B",
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
