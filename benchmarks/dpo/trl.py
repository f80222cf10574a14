"""Preference optimisation by TRL's DPOTrainer, which writes down beforehand what the reference says, as ours does."""

import os


def run(job: dict, clock, precompute: bool = True) -> None:
    """Trains on the job's pairs, in their order, saving and reporting nothing."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import numpy as np
    from datasets import Dataset
    from sft import trl
    from trl import DPOConfig, DPOTrainer

    columns = {name: x.reshape(-1, x.shape[-1]).tolist() for name, x in np.load(job["rows"]).items()}
    count, length = len(columns["prompt"]), len(columns["prompt"][0]) + len(columns["chosen"][0])
    parts = trl.parts(job, clock)

    def text(ids: list) -> str:
        return " ".join(parts["processing_class"].convert_ids_to_tokens(ids))

    # It takes text and tokenises prompt and answer as one.
    data = {name: [text(ids) + " " * (name == "prompt") for ids in rows] for name, rows in columns.items()}
    options = trl.options(job, count // job["steps"], length)
    config = DPOConfig(**options, beta=job["beta"], precompute_ref_log_probs=precompute)
    trainer = DPOTrainer(args=config, train_dataset=Dataset.from_dict(data), **parts)
    for name, rows in columns.items():
        assert trainer.train_dataset[f"{name}_ids"][:] == rows, f"TRL reads other tokens as the {name}"
    trainer.train()
