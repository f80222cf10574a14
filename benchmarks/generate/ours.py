"""Completions by jaxpost's sampler: 2 prompts of 64 tokens, 8 completions of 64 of each, at temperature 1 in float32.

    python benchmarks/side_by_side.py --workload=generate

A step is a call with other prompts. Tokens a second are the new ones. The model never says what would end a completion.
"""

from pathlib import Path

import jax
import numpy as np
from grpo import ours as grpo

from jaxpost import sharding
from jaxpost.data import chat
from jaxpost.models import loading
from jaxpost.sampling.decode import complete, ready

MODEL = grpo.MODEL


def prepare(job: dict, folder: Path) -> dict:
    """The job with its prompts, as for learning from the completions."""
    job = grpo.prepare(job, folder)
    return {**job, "tokens_per_step": job["prompts"] * job["group"] * job["new"]}


def run(job: dict, clock) -> dict:
    """Completes the prompts, those of a step in a call; returns the proof, the programs compiled until the second call was over
    and until the last, and what the roofline's figure needs.
    """
    compilations, mesh = grpo.Compilations(), sharding.make_mesh(devices=jax.devices()[:1])
    found = loading.describe(job["model"])
    params, lengths = ready(found.transformer, loading.weights(found, mesh), mesh), []
    options = {"prompt_window": job["prompt"], "new": job["new"], "group": job["group"], "stop": chat.stop_ids(found.tokenizer)}
    for i, rows in enumerate(np.load(job["rows"])):
        made = complete(found.transformer, params, list(rows), mesh=mesh, step=i, **options)
        lengths += made.lengths.tolist()
        clock.tick()
    proof = {"shortest": min(lengths), "longest": max(lengths), "completions a call": len(made.lengths)}
    return {"proof": proof, "compiled": compilations.until(clock.ends[1], clock.ends[-1]), **grpo.made(job)}
