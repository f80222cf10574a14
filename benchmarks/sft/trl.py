"""Supervised fine-tuning by TRL's SFTTrainer, with "wrapped" packing: rows as long as the window stay as they are."""

import os
from pathlib import Path


def options(job: dict, batch: int, length: int) -> dict:
    """What any of TRL's trainers is told: the optimizer that all share, the rows in their order, nothing saved or reported."""
    import torch

    return {
        "output_dir": str(Path(job["result"]).parent / "out"),
        "use_cpu": not torch.cuda.is_available(),
        "bf16": False,
        "per_device_train_batch_size": batch,
        "max_steps": job["steps"],
        "max_length": length,
        "train_sampling_strategy": "sequential",
        "gradient_checkpointing": False,
        "dataloader_pin_memory": False,
        "learning_rate": job["lr"],
        "lr_scheduler_type": "constant",
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "optim": "adamw_torch",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }


def parts(job: dict, clock) -> dict:
    """What any of them is given: the model, its tokenizer, and a callback that ticks."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

    class Told(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **_):
            if "loss" in logs:
                clock.tick(logs["loss"], logs["grad_norm"])

    return {
        "model": AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32, attn_implementation="sdpa"),
        "processing_class": AutoTokenizer.from_pretrained(job["model"]),
        "callbacks": [Told()],
    }


def run(job: dict, clock) -> None:
    """Trains on the job's rows, in their order, saving and reporting nothing."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import numpy as np
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    rows = np.load(job["rows"])
    _, batch, length = rows.shape
    config = SFTConfig(**options(job, batch, length), packing=True, packing_strategy="wrapped")
    data = Dataset.from_dict({"input_ids": rows.reshape(-1, length).tolist()})
    SFTTrainer(args=config, train_dataset=data, **parts(job, clock)).train()
