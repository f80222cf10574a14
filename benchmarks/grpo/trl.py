"""Reinforcement learning by TRL's GRPOTrainer with its defaults, but for the KL to a reference; it asks transformers for the
completions.
"""

import os


def reward(text: str) -> float:
    """What every competitor rewards: the share of sevens."""
    return text.count("7") / max(len(text), 1)


def run(job: dict, clock, cache: str | None = None) -> dict:
    """Trains on completions of the job's prompts, in their order; cache: transformers' kind, if not the default."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import numpy as np
    from datasets import Dataset
    from sft import trl
    from trl import GRPOConfig, GRPOTrainer

    prompts = np.load(job["rows"]).reshape(-1, job["prompt"]).tolist()
    parts = trl.parts(job, clock)
    tokenizer = parts["processing_class"]
    texts = [" ".join(tokenizer.convert_ids_to_tokens(ids)) for ids in prompts]
    assert tokenizer(texts)["input_ids"] == prompts, "TRL reads other tokens as the prompts"

    def rewards(completions, **_):
        return [reward(text) for text in completions]

    options = trl.options(job, job["prompts"] * job["group"], 0)
    del options["max_length"]
    config = GRPOConfig(
        **options,
        num_generations=job["group"],
        max_completion_length=job["new"],
        beta=job["beta"],
        shuffle_dataset=False,
        cache_implementation=cache,
    )
    data = Dataset.from_dict({"prompt": texts})
    trainer = GRPOTrainer(reward_funcs=rewards, args=config, train_dataset=data, **parts)
    trainer.train()
    rows = [row for row in trainer.state.log_history if "kl" in row]
    lengths = [row[f"completions/{what}_length"] for row in rows for what in ("min", "max")]
    count = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    return {"proof": proof(lengths, rows[0]["loss"], rows[0]["kl"], count)}


def proof(lengths: list, loss: float, kl: float, count: int) -> dict[str, float]:
    """What is equal where the work is: completions' shortest and longest length over the run; loss and KL of the first step,
    both 0 where weights are those that sampled and those of the reference; and how many parameters learn.
    """
    return {"shortest": min(lengths), "longest": max(lengths), "first loss": loss, "first KL": kl, "learned": count}
