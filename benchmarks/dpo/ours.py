"""Preference optimisation by jaxpost: the loop, loader and log of fine-tuning's benchmark, a pair a row.

    python benchmarks/side_by_side.py --workload=dpo            a prompt of 64 tokens, answers of 64
    python benchmarks/side_by_side.py --workload=dpo:shared     the same pairs, our rows with the prompt once
    python benchmarks/side_by_side.py --workload=dpo:prefix     so too, a prompt of 96 tokens and answers of 32
    python benchmarks/side_by_side.py --workload=dpo --rounds=1 --steps=47 --peer=trl_exact=PYTHON    whole curves compared

The reference is the model as it starts, and what it says is written down before the first step. Chosen answers lean to the
first half of the vocabulary and rejected ones to the second, so that there is something to learn.
"""

import json
from pathlib import Path

import numpy as np
from sft import ours

from jaxpost.models import loading

PAIRS = 4
# Tokens of the prompt and of an answer; whether our rows have the former once.
SHAPES = {"": (64, 64, False), "shared": (64, 64, True), "prefix": (96, 32, True)}
LEAN = 0.7


def settings(job: dict, shared: bool):
    """The recipe: DPO, a row for each pair, no longer than that."""
    prompt, answer, _ = SHAPES[job["argument"]]
    # A prompt that is shared gives its last token to both answers, as what their first ones are predicted from.
    window = prompt - 1 + 2 * (1 + answer) if shared else 2 * (prompt + answer)
    objective = {"name": "preference.sigmoid", "beta": job["beta"]}
    return ours.settings(job, objective=objective, shared_prefix=shared, window=window, batch_size=PAIRS)


def prepare(job: dict, folder: Path) -> dict:
    """The job with its data: job["texts"] for our loader, and job["rows"], a file of what it makes of them, in its order:
    prompt [steps,B,P], chosen and rejected [steps,B,A] int32.
    """
    prompt, answer, _ = SHAPES[job["argument"]]
    job = {**job, "lr": 1e-4, "beta": 0.1, "texts": str(folder / "pairs.jsonl"), "rows": str(folder / "rows.npz")}
    job["tokens_per_step"] = PAIRS * 2 * (prompt + answer)
    vocab = loading.describe(job["model"]).transformer.arch.vocab
    random = np.random.default_rng(0)

    def words(count: int, lean: float) -> str:
        upper = random.random(count) > lean
        ids = np.where(upper, random.integers(vocab // 2, vocab, count), random.integers(3, vocab // 2, count))
        return " ".join(f"w{i}" for i in ids)

    # The template opens each turn with a token, the answer's being the first that is learned of it, and ends that with one.
    sizes = {"prompt": (prompt - 1, 0.5), "chosen": (answer - 2, LEAN), "rejected": (answer - 2, 1 - LEAN)}
    rows = [{name: words(*size) for name, size in sizes.items()} for _ in range(job["steps"] * PAIRS)]
    Path(job["texts"]).write_text("".join(json.dumps(row) + "\n" for row in rows))
    batches = ours.drawn(settings(job, False), job["steps"])
    tokens, mask = (np.stack([b[name] for b in batches]).reshape(-1, PAIRS, 2, prompt + answer) for name in ("tokens", "mask"))
    assert mask[..., prompt:].all() and not mask[..., :prompt].any()
    chosen, rejected = tokens[:, :, 0], tokens[:, :, 1]
    np.savez(job["rows"], prompt=chosen[..., :prompt], chosen=chosen[..., prompt:], rejected=rejected[..., prompt:])
    return job


def run(job: dict, clock) -> dict:
    """Trains; returns what the roofline's figure needs: where the prompt is shared its tokens count once."""
    prompt, answer, shared = SHAPES[job["argument"]]
    ours.train(settings(job, shared), job, clock)
    first, rest = prompt * (prompt + 1) / 2, sum(range(prompt + 1, prompt + answer + 1))
    copies = 1 if shared else 2
    return ours.roofline(job, PAIRS * (copies * prompt + 2 * answer), PAIRS * 2 * answer, PAIRS * (copies * first + 2 * rest))
