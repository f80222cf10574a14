"""Supervised fine-tuning by jaxpost: the very loop of `python -m jaxpost.train`, its loader and its log included.

`prepare` is what the competitors share. Rows are texts of random words, and what a competitor is given is the batches that our
loader makes of them, in its order.
"""

import contextlib
import json
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import jaxpost
from jaxpost import recipe, sharding
from jaxpost.models import loading
from jaxpost.reporting import writers
from jaxpost.reporting.progress import model_flops
from jaxpost.stages.plan import plan_stage
from jaxpost.storage import checkpoint

ROWS, LENGTH = 8, 128


def settings(job: dict, **changes):
    """The recipe: rows of one text each, every token learned, the optimizer that all share; with `changes`."""
    optimizer = {"lr": job["lr"], "schedule": "constant", "warmup": 0, "clip": 1.0, "b1": 0.9, "b2": 0.999, "eps": 1e-8}
    texts = {"data": job["texts"], "window": LENGTH, "packing": False, "batch_size": ROWS}
    rows = {**(texts if changes.get("source") != "rollouts" else {}), "remat": "dots", **changes}
    return recipe.make(model=job["model"], optimizer=optimizer, steps=job["steps"], log_every=1, **rows)


def prepare(job: dict, folder: Path) -> dict:
    """The job with its data: job["texts"] for our loader, and job["rows"], the file of its batches [steps,B,S] int32."""
    job = {**job, "lr": 1e-4, "texts": str(folder / "texts.jsonl"), "rows": str(folder / "rows.npy")}
    job["tokens_per_step"] = ROWS * LENGTH
    vocab = loading.describe(job["model"]).transformer.arch.vocab
    # The loader ends a text with the end-of-text token.
    ids = np.random.default_rng(0).integers(3, vocab, (job["steps"] * ROWS, LENGTH - 1))
    texts = [json.dumps({"text": " ".join(f"w{i}" for i in row)}) for row in ids]
    Path(job["texts"]).write_text("\n".join(texts) + "\n")
    batches = drawn(settings(job), job["steps"])
    assert all(b["mask"][:, 1:].all() and (b["segments"] == 1).all() for b in batches)
    np.save(job["rows"], np.stack([b["tokens"] for b in batches]))
    return job


def drawn(config, steps: int) -> list[dict]:
    """The first batches of a recipe, whole, as our loader makes them."""
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    with sharding.use(mesh):
        source = plan_stage("train", recipe.stages(config)[0][1], mesh).source
        return [source() for _ in range(steps)]


class _Over(Exception):
    """The last step is over: competitors save nothing, so neither does this one."""


def run(job: dict, clock) -> dict:
    """Trains; returns what the roofline's figure needs."""
    train(settings(job), job, clock)
    return roofline(job, ROWS * LENGTH, ROWS * (LENGTH - 1), ROWS * LENGTH * (LENGTH + 1) / 2)


def train(config, job: dict, clock) -> None:
    """Trains as a recipe says; a step is over when its row is in the metrics' file."""
    write, workdir = writers.MetricWriter.write, Path(job["result"]).parent / "run"

    def written(self, stage, step, values):
        write(self, stage, step, values)
        clock.tick(values["loss"], values["grad_norm"])

    def over(*_):
        raise _Over

    writers.MetricWriter.write, checkpoint.Checkpoints.save = written, over
    with contextlib.suppress(_Over):
        jaxpost.train(config, str(workdir))


def roofline(job: dict, tokens: float, trained: float, pairs: float) -> dict:
    """What a step's mathematics needs (see `model_flops`), and what a plain product gives."""
    arch = loading.describe(job["model"]).transformer.arch
    return {"flops": model_flops(arch, tokens, trained, pairs), "matmul": matmul()}


def matmul(size: int = 2048, times: int = 15) -> float:
    """FLOP/s of a large plain product in float32, the median of a few, measured now."""
    x = jnp.full((size, size), 1 / size, jnp.float32)
    product, took = jax.jit(lambda x: x @ x), []
    for _ in range(times + 1):
        start = time.perf_counter()
        x = product(x).block_until_ready()
        took.append(time.perf_counter() - start)
    return 2 * size**3 / float(np.median(took[1:]))
