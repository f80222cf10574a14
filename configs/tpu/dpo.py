"""DPO at real sizes: the models and settings of sft.py, beside this file, with pairs of answers in rows of 4,096 tokens.

    python -m jaxpost.train --config=configs/tpu/dpo.py:qwen3_8b --workdir=gs://BUCKET/RUN --config.data=FILE --distributed
    python -m jaxpost.fit --config=configs/tpu/dpo.py:qwen3_8b

The argument is a line of MACHINES, which is one of sft.py's too. Start from a tuned model by --config.model=FOLDER: the names
that sft.py has are of base models. What the reference says is a column, written down before the first step, so that no second
model takes memory while the first one learns. A row holds one pair or several. --config.shared_prefix=true computes a prompt
once for both answers, but by XLA's attention, since splash knows no branches: it pays where prompts are most of a pair.
"""

from pathlib import Path

from jaxpost import recipe

MACHINES = {
    "llama31_8b": {"topology": "v5p:2x2x4", "mesh": {"data": 4, "fsdp": 4}, "batch_size": 32},
    "llama31_8b,lora": {"topology": "v5e:2x4", "mesh": {"data": 1, "fsdp": 8}, "batch_size": 8},
    "qwen3_1_7b": {"topology": "v4:2x2x1", "mesh": {"data": 1, "fsdp": 4}, "batch_size": 16},
    "qwen3_1_7b,lora": {"topology": "v5e:2x2", "mesh": {"data": 1, "fsdp": 4}, "batch_size": 8},
    "qwen3_8b": {"topology": "v6e:2x4", "mesh": {"data": 1, "fsdp": 8}, "batch_size": 16},
    "qwen3_8b,lora": {"topology": "v5e:2x4", "mesh": {"data": 1, "fsdp": 8}, "batch_size": 8},
}


def get_config(arg: str = ""):
    machine, lora = recipe.chosen(MACHINES, arg), arg.endswith(",lora")
    return recipe.opened(
        f"{Path(__file__).with_name('sft.py')}:{arg}",
        objective={"name": "preference.sigmoid"},
        window=4096,
        epochs=1,
        optimizer={"lr": 5e-6 if lora else 5e-7, "b2": 0.999, "schedule": "linear", "warmup": 0.1, "end": 0.0},
        **machine,
    )
