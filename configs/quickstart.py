"""The whole way in minutes on a laptop: SFT from scratch on arithmetic, then DPO, then GRPO.

    python -m jaxpost.train --config=configs/quickstart.py --workdir=runs/quickstart

30% of the demonstrations have a wrong digit, as human ones may. SFT learns the errors too: the model's greedy answers are right
more often than its samples. A verifier repairs that. `drawn` has it judge the model's own answers, and `dpo` learns from pairs
of a right and a wrong one. `grpo` has it judge answers as they come, and draws other problems where a problem's answers were
all right or all wrong. configs/papers/equal_time.py compares both with SFT that goes on for the same time.
"""

from jaxpost import recipe

MODEL = {
    "model_type": "llama",
    "vocab_size": 32,
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
    "initializer_range": 0.06,  # wide: from scratch and this narrow, attention must find its digits within a few hundred steps
}


def get_config(arg: str = ""):
    sft = {"held_out": 0.01, "batch_size": 16, "steps": 1200, "eval_every": 200, "log_every": 50}
    often = {"eval_every": 25, "log_every": 25}
    gentle = {"schedule": "linear", "warmup": 10, "b2": 0.98, "end": 0.1}
    return recipe.make(
        stages=("sft", "drawn", "dpo", "grpo"),
        model=MODEL,
        tokenizer="tasks.arithmetic.tokenizer",
        remat="dots",  # on a CPU, reading less memory in the backward pass is worth a little more arithmetic
        task={"name": "arithmetic", "examples": 40000, "corrupt": 0.3},
        window=64,
        rollouts={"group": 8, "prompt_window": 9, "new": 8, "temperature": 1.0},
        best="eval/reward",
        highest=True,
        eval_rows=209,
        eval_per_cell=100,
        sft={"objective": {"name": "sft.nll"}, **sft, "optimizer": {"lr": 1e-3, "warmup": 50, "b2": 0.98, "end": 0.05}},
        drawn={"do": "generate", "rows": "pairs", "task": {"name": "arithmetic", "examples": 4000}},
        dpo={
            "data": "@drawn",
            "objective": {"name": "preference.sigmoid", "beta": 0.3},
            "batch_size": 32,
            "steps": 100,
            "optimizer": {"lr": 1e-4, **gentle},
            **often,
        },
        grpo={
            "source": "rollouts",
            "objective": {"name": "policy_gradient.grpo", "beta": 0.0},
            "rollouts": {"resample": 3},
            "batch_size": 256,
            "steps": 80,
            "optimizer": {"lr": 2e-4, **gentle},
            **often,
        },
    )
