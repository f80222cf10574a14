"""The whole way in minutes on a laptop: SFT from scratch on arithmetic, then REINFORCE, with a control for the time.

    python -m jaxpost.train --config=configs/quickstart.py --workdir=/tmp/quickstart

40% of the demonstrations have a wrong digit, as human ones may. Imitation learns the errors with the rest, so sampled answers
stay wrong though greedy ones are right; a verifier's reward repairs that. `control` continues SFT for as long as REINFORCE
took.
"""

from jaxpost import recipe

MODEL = {
    "model_type": "llama",
    "vocab_size": 32,
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "tie_word_embeddings": True,
    "rope_theta": 10000.0,
}


def get_config(arg: str = ""):
    return recipe.make(
        stages=("sft", "reinforce", "control"),
        model=MODEL,
        tokenizer="tasks.arithmetic.tokenizer",
        task={"name": "arithmetic", "examples": 40000, "corrupt": 0.4},
        window=128,
        rollouts={"group": 8, "prompt_window": 12, "new": 8, "temperature": 1.0},
        best="eval/accuracy",
        highest=True,
        eval_rows=150,
        sft={
            "objective": {"name": "sft.nll"},
            "held_out": 0.01,
            "batch_size": 16,
            "epochs": 8,
            "optimizer": {"lr": 2e-3, "schedule": "cosine", "warmup": 100, "end": 0.1},
            "eval_every": 500,
            "log_every": 50,
        },
        reinforce={
            "source": "rollouts",
            "objective": {"name": "policy_gradient.reinforce"},
            "batch_size": 256,
            "steps": 300,
            "optimizer": {"lr": 3e-4, "schedule": "constant", "warmup": 10},
            "eval_every": 100,
            "log_every": 10,
        },
        control={
            "start": "sft",
            "time_of": "reinforce",
            "objective": {"name": "sft.nll"},
            "held_out": 0.01,
            "batch_size": 16,
            "steps": 100000,
            "optimizer": {"lr": 3e-4, "schedule": "constant", "warmup": 10},
            "log_every": 50,
        },
    )
