"""Qwen3-1.7B on rows of 8,192 tokens: all weights on a v4-8 (four chips), an adapter on a v5e of 4.

    python -m jaxpost.train --config=configs/tpu/qwen3_1_7b.py --workdir=gs://BUCKET/RUN --config.data=FILE --distributed
    python -m jaxpost.fit --config=configs/tpu/qwen3_1_7b.py

`:lora` after the file name trains an adapter.
"""

from jaxpost import recipe

MACHINES = {
    "": {"topology": "v4:2x2x1", "mesh": {"fsdp": -1}, "batch_size": 16, "optimizer": {"lr": 1e-5, "b2": 0.95}},
    "lora": {
        "topology": "v5e:2x2",
        "mesh": {"fsdp": -1},
        "batch_size": 8,
        "adapter": {"name": "lora", "rank": 16, "alpha": 32.0},
        "optimizer": {"lr": 2e-4, "b2": 0.95},
    },
}


def get_config(arg: str = ""):
    return recipe.make(
        model="Qwen/Qwen3-1.7B-Base",
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
