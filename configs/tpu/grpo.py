"""GRPO at real sizes: GSM8K by the settings of configs/grpo.py, with the models of sft.py, beside this file.

    python -m jaxpost.train --config=configs/tpu/grpo.py:qwen3_1_7b --workdir=gs://BUCKET/RUN --distributed
    python -m jaxpost.fit --config=configs/tpu/grpo.py:qwen3_1_7b

The argument is a line of MACHINES: all weights of a model or, with `,lora`, an adapter. Decoding reads every weight for every
token, of which `tensor` leaves a device its part and fsdp all: so the larger models are split by tensor here and not in sft.py.
What a mesh must hold besides the training's state are those weights in bfloat16, the start's where there is a KL to it, and a
cache for `slots` completions at a time, which others take over as they end. jaxpost.fit counts all of it.
"""

from pathlib import Path

from jaxpost import recipe

HERE = Path(__file__).parent
# The chat format is the tuned model's; Qwen's base models have one.
TUNED = {"llama31_8b": "meta-llama/Llama-3.1-8B-Instruct"}
WIDE = {"data": 1, "fsdp": 2, "tensor": 4}
MACHINES = {
    "llama31_8b": {"topology": "v5p:2x2x4", "mesh": {"data": 1, "fsdp": 4, "tensor": 4}, "microbatches": 2},
    "llama31_8b,lora": {"topology": "v5e:2x4", "mesh": WIDE, "microbatches": 8},
    "qwen3_1_7b": {"topology": "v4:2x2x1", "mesh": {"data": 1, "fsdp": 4}, "microbatches": 2},
    "qwen3_1_7b,lora": {"topology": "v5e:2x4", "mesh": {"data": 1, "fsdp": 8}, "microbatches": 2},
    "qwen3_8b": {"topology": "v6e:2x4", "mesh": WIDE, "microbatches": 4},
    "qwen3_8b,lora": {"topology": "v5e:2x4", "mesh": WIDE, "microbatches": 8},
}


def get_config(arg: str = ""):
    machine, lora, name = recipe.chosen(MACHINES, arg), arg.endswith(",lora"), arg.partition(",")[0]
    model = recipe.opened(f"{HERE / 'sft.py'}:{arg}").to_dict()
    return recipe.opened(
        str(HERE.parent / "grpo.py"),
        **{key: model[key] for key in ("adapter", "dtype", "remat")},
        model=TUNED.get(name, model["model"]),
        rollouts={"prompt_window": 512, "new": 1024, "slots": 128},
        optimizer={"lr": 1e-5 if lora else 1e-6, "b2": 0.95},
        **machine,
    )
