"""Llama-3.1-8B on rows of 8,192 tokens: all weights on a v5p of 64 chips, an adapter on a v5e of 8.

    python -m jaxpost.train --config=configs/tpu/llama31_8b.py --workdir=gs://BUCKET/RUN --config.data=FILE --distributed
    python -m jaxpost.fit --config=configs/tpu/llama31_8b.py

`:lora` after the file name trains an adapter, `:v6e` all weights on a v6e of 256. On a torus of three axes fsdp is kept to two
of them, since the compiler gathers over three by summing padded arrays.
"""

from jaxpost import recipe

MACHINES = {
    "": {"topology": "v5p:4x4x4", "mesh": {"data": 4, "fsdp": 16}, "batch_size": 64, "optimizer": {"lr": 1e-5, "b2": 0.95}},
    "v6e": {
        "topology": "v6e:16x16",
        "mesh": {"data": 16, "fsdp": 16},
        "batch_size": 256,
        "optimizer": {"lr": 1e-5, "b2": 0.95},
    },
    "lora": {
        "topology": "v5e:2x4",
        "mesh": {"fsdp": -1},
        "batch_size": 8,
        "adapter": {"name": "lora", "rank": 16, "alpha": 32.0},
        "optimizer": {"lr": 2e-4, "b2": 0.95},
    },
}


def get_config(arg: str = ""):
    return recipe.make(
        model="meta-llama/Llama-3.1-8B",
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
