"""The base model that studies start from: a million weights, trained on the playgrounds in a few minutes.

    python -m jaxpost.train --config=configs/tiny.py --workdir=runs/tiny

`model="recipe:configs/tiny.py"` trains it on first use and keeps it in the cache. Every third document is a problem with its
answer as a chat, so it reads the chat format and solves a part of each playground's problems. `:text` has plain texts alone,
and has never seen a chat. `:half` takes half of the steps.
"""

from jaxpost import recipe

STEPS = 1100
VARIANTS = {"": {}, "half": {"steps": STEPS // 2}, "text": {"task": {"name": "playgrounds", "examples": 50_000, "chats": 0}}}
MODEL = {
    "model_type": "llama",
    "vocab_size": 2048,
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
    "initializer_range": 0.04,
}


def get_config(arg: str = ""):
    base = {
        "task": {"name": "playgrounds", "examples": 50_000},
        "steps": STEPS,
        "model": MODEL,
        "tokenizer": "tasks.playgrounds.tokenizer",
        "remat": "dots",
        "train_on": "all",
        "too_long": "drop",
        "held_out": 0.005,
        "window": 128,
        "batch_size": 16,
        "log_every": 50,
        "eval_per_cell": 50,
        "eval_rows": 200,
        "rollouts": {"prompt_window": 96, "new": 32},
        "optimizer": {"lr": 2e-3, "warmup": 50, "b2": 0.98, "end": 0.05},
    }
    return recipe.make(**{**base, **recipe.chosen(VARIANTS, arg)})
