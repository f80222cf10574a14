"""Qwen3-30B-A3B, a mixture, on rows of 8,192 tokens: all weights on a v6e of 64 chips, an adapter on a v6e of 8.

    python -m jaxpost.train --config=configs/tpu/qwen3_30b_a3b.py --workdir=gs://BUCKET/RUN --config.data=FILE --distributed
    python -m jaxpost.fit --config=configs/tpu/qwen3_30b_a3b.py

`:lora` after the file name trains an adapter. Its attention alone is adapted; the experts stay as they are.
"""

from jaxpost import recipe

MACHINES = {
    "": {"topology": "v6e:8x8", "mesh": {"fsdp": -1}, "batch_size": 64, "optimizer": {"lr": 1e-5, "b2": 0.95}},
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
        model="Qwen/Qwen3-30B-A3B-Base",
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
