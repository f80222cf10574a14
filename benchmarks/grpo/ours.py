"""Reinforcement learning by jaxpost: the very loop of `python -m jaxpost.train`, completions being its batches.

    python benchmarks/side_by_side.py --workload=grpo            2 prompts a step, 8 completions of each; a row a completion
    python benchmarks/side_by_side.py --workload=grpo:shared     the same, a row a prompt with its completions as branches

Losses cannot show that the work is equal, as each competitor draws other completions. What shows it instead: every completion
has all its tokens, the loss and the KL of the first step are 0, and as many parameters learn.

The model never says what would end a completion, so nobody has to be told to go on, and nobody pays for it. A row of the log
comes when the next step is under way, completions and all: the first is that much late, and the last that much early.
"""

import json
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
from grpo import trl
from sft import ours

from jaxpost.models import loading
from jaxpost.reporting.progress import model_flops

MODEL = {"endless": True}
PROMPTS, GROUP, PROMPT, NEW = 2, 8, 64, 64


def prepare(job: dict, folder: Path) -> dict:
    """The job with its prompts: job["rows"], a file of ids [steps,B,P] int32."""
    job = {**job, "lr": 1e-5, "beta": 0.04, "texts": "", "rows": str(folder / "rows.npy")}
    job |= {"prompts": PROMPTS, "group": GROUP, "prompt": PROMPT, "new": NEW}
    job["tokens_per_step"] = PROMPTS * GROUP * (PROMPT + NEW)
    arch = loading.describe(job["model"]).transformer.arch
    rows = np.random.default_rng(0).integers(3, arch.vocab, (job["steps"], PROMPTS, PROMPT), np.int32)
    rows[..., 0] = 1  # what the chat's template, and Tunix, begin with
    np.save(job["rows"], rows)
    return job


def problems(rows: np.ndarray) -> SimpleNamespace:
    """The prompts [N,P] as a task, which is never tested: the others are not either."""

    def record(index, *, split="train", seed=0):
        return {"prompt": " ".join(f"w{i}" for i in rows[index % len(rows), 1:])}

    def reward(record, completion):
        return trl.reward(completion)

    return SimpleNamespace(record=record, test_records=lambda per_cell: [], reward=reward)


def settings(job: dict, shared: bool):
    """The recipe: TRL's conventions, a step a batch of rollouts."""
    rollouts = {"group": GROUP, "prompt_window": PROMPT, "new": NEW, "temperature": 1.0}
    task = problems(np.load(job["rows"]).reshape(-1, PROMPT))
    rest = {"task": task, "rollouts": rollouts, "source": "rollouts", "shared_prefix": shared}
    objective = {"name": "policy_gradient.trl", "beta": job["beta"]}
    return ours.settings(job, objective=objective, batch_size=PROMPTS if shared else PROMPTS * GROUP, **rest)


class Compilations:
    """When this process compiled programs, or found them compiled."""

    def __init__(self):
        self.when = []
        jax.monitoring.register_event_duration_secs_listener(self._told)

    def _told(self, event, seconds, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            self.when.append(time.time())

    def until(self, *times: float) -> list[int]:
        """How many until each of these times."""
        return [sum(t <= time for t in self.when) for time in times]


def run(job: dict, clock) -> dict:
    """Trains; returns the proof, the programs compiled until the second step began and until the last was over, and what the
    roofline's figure needs.
    """
    compilations, shared = Compilations(), job["argument"] == "shared"
    ours.train(settings(job, shared), job, clock)
    rows = [json.loads(line) for line in (Path(job["result"]).parent / "run" / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if "kl" in row]
    lengths = [row[f"completions/{what}_length"] for row in rows for what in ("min", "max")]
    count = loading.describe(job["model"]).transformer.arch.parameters()
    found = {"proof": trl.proof(lengths, rows[0]["loss"], rows[0]["kl"], count)}
    return {**found, "compiled": compilations.until(clock.ends[0], clock.ends[-1]), **work(job, shared)}


def work(job: dict, shared: bool) -> dict:
    """What a step's mathematics needs: to learn from the completions, to ask the reference about them, and to make them."""
    learned, new = passed(job, PROMPTS if shared else PROMPTS * GROUP), made(job)
    return {**new, "flops": (3 + 1) * learned + new["flops"]}


def made(job: dict) -> dict:
    """What making a step's completions needs, a prompt counting once."""
    return {"flops": passed(job, PROMPTS), "matmul": ours.matmul()}


def passed(job: dict, prompts: int) -> float:
    """FLOPs of a forward pass over so many prompts and all completions behind them."""
    own, rest = PROMPTS * GROUP, sum(range(PROMPT + 1, PROMPT + NEW + 1))
    pairs = prompts * PROMPT * (PROMPT + 1) / 2 + own * rest
    arch = loading.describe(job["model"]).transformer.arch
    return model_flops(arch, prompts * PROMPT + own * NEW, own * NEW, pairs) / 3
