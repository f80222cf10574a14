"""Supervised fine-tuning at real sizes: a model, a TPU slice that holds it, rows of 8,192 tokens.

    python -m jaxpost.train --config=configs/tpu/sft.py:qwen3_8b --workdir=gs://BUCKET/RUN --config.data=FILE --distributed
    python -m jaxpost.fit --config=configs/tpu/sft.py:qwen3_8b

The argument is a line of MACHINES: all weights of a model or, with `,lora`, an adapter. Of the mixture (30b_a3b) the adapter
changes attention alone; the experts stay as they are. On a torus of three axes (v4, v5p) fsdp is kept to two of them, since the
compiler gathers over three by summing padded arrays.

What other methods do with the same models begins here, and says only what is its own: dpo.py.
"""

from jaxpost import recipe

MODELS = {
    "gemma3_12b": "google/gemma-3-12b-pt",
    "llama31_8b": "meta-llama/Llama-3.1-8B",
    "llama31_70b": "meta-llama/Llama-3.1-70B",
    "qwen3_1_7b": "Qwen/Qwen3-1.7B-Base",
    "qwen3_8b": "Qwen/Qwen3-8B-Base",
    "qwen3_30b_a3b": "Qwen/Qwen3-30B-A3B-Base",
    "qwen3_32b": "Qwen/Qwen3-32B",
}
MACHINES = {
    "gemma3_12b": {"topology": "v5p:2x2x4", "mesh": {"data": 4, "fsdp": 4}, "batch_size": 16},
    "gemma3_12b,lora": {"topology": "v6e:2x4", "mesh": {"fsdp": -1}, "batch_size": 8},
    "llama31_8b": {"topology": "v5p:4x4x4", "mesh": {"data": 4, "fsdp": 16}, "batch_size": 64},
    "llama31_8b,v6e": {"topology": "v6e:16x16", "mesh": {"data": 16, "fsdp": 16}, "batch_size": 256},
    "llama31_8b,lora": {"topology": "v5e:2x4", "mesh": {"fsdp": -1}, "batch_size": 8},
    "llama31_70b": {"topology": "v5p:4x4x8", "mesh": {"data": 4, "fsdp": 32}, "batch_size": 128},
    "llama31_70b,lora": {"topology": "v6e:4x8", "mesh": {"fsdp": -1}, "batch_size": 32},
    "qwen3_1_7b": {"topology": "v4:2x2x1", "mesh": {"fsdp": -1}, "batch_size": 16},
    "qwen3_1_7b,lora": {"topology": "v5e:2x2", "mesh": {"fsdp": -1}, "batch_size": 8},
    "qwen3_8b": {"topology": "v6e:2x4", "mesh": {"fsdp": -1}, "batch_size": 16},
    "qwen3_8b,lora": {"topology": "v5e:2x4", "mesh": {"fsdp": -1}, "batch_size": 8},
    "qwen3_30b_a3b": {"topology": "v6e:8x8", "mesh": {"fsdp": -1}, "batch_size": 64},
    "qwen3_30b_a3b,lora": {"topology": "v6e:2x4", "mesh": {"fsdp": -1}, "batch_size": 8},
    "qwen3_32b": {"topology": "v6e:8x8", "mesh": {"fsdp": -1}, "batch_size": 64},
    "qwen3_32b,lora": {"topology": "v6e:4x4", "mesh": {"fsdp": -1}, "batch_size": 16},
}


def get_config(arg: str = ""):
    machine, lora = recipe.chosen(MACHINES, arg), arg.endswith(",lora")
    return recipe.make(
        model=MODELS[arg.partition(",")[0]],
        adapter={"name": "lora", "rank": 16, "alpha": 32.0} if lora else {},
        optimizer={"lr": 2e-4 if lora else 1e-5, "b2": 0.95},
        dtype="bfloat16",
        remat="full",
        window=8192,
        too_long="truncate",
        held_out=0.02,
        epochs=2,
        log_every=10,
        eval_every=200,
        save_every=200,
        **machine,
    )
