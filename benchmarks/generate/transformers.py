"""Completions by transformers' own generate, with the static cache."""

import os


def run(job: dict, clock, cache: str | None = "static") -> dict:
    """Completes the job's prompts, those of a step in a call; cache: transformers' kind."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import numpy as np
    import torch
    from transformers import AutoModelForCausalLM

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32, attn_implementation="sdpa")
    model, lengths = model.to(device).eval(), []
    torch.manual_seed(0)
    options = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "cache_implementation": cache}
    for rows in np.load(job["rows"]):
        ids = torch.from_numpy(rows.astype(np.int64)).to(device)
        given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "num_return_sequences": job["group"]}
        with torch.inference_mode():
            made = model.generate(**given, **options, max_new_tokens=job["new"])[:, job["prompt"] :].cpu().numpy()
        stops = made == model.config.eos_token_id
        lengths += np.where(stops.any(1), stops.argmax(1) + 1, made.shape[1]).tolist()
        clock.tick()
    return {"proof": {"shortest": min(lengths), "longest": max(lengths), "completions a call": len(made)}}
