"""A trained reward model as a reward.

    dict(name="model.score", folder="WORKDIR")       the workdir of a run with an objective of reward_model

Prompt and completion are rendered with the template that the model was trained with and its own tokenizer. The score is its
head at the token that ends the completion. It runs on this process's devices; `score.many` scores a batch at once.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from jaxpost import sharding
from jaxpost.data import chat
from jaxpost.data.formats import Conversation
from jaxpost.errors import UserError
from jaxpost.models import heads, loading, prefix

ROWS = 8  # completions at a time, for each device
_BUCKET = 64  # lengths are padded to a multiple of this, so that few programs are compiled


def score(record: dict, completion: str, *, folder: str) -> float:
    """The score of a completion of record["prompt"] (a user's message or a list of turns) by the reward model in a workdir.

    Raises UserError where the folder has no reward model or tokenizer, and for a record without a prompt; ValueError for a text
    longer than the model's positions.
    """
    (value,) = _many([record], [completion], folder=folder)
    if isinstance(value, Exception):
        raise value
    return value


def _many(records: Sequence[dict], completions: Sequence[str], *, folder: str) -> list[float | Exception]:
    """`score` of each completion, in batches; the error in place of a missing score."""
    model, params, tokenizer, mesh = _opened(folder)
    most = prefix.max_positions(model, params)
    examples = [_encoded(r, c, tokenizer, folder) for r, c in zip(records, completions, strict=True)]
    lengths = [len(e["tokens"]) for e in examples]
    scores: list = [ValueError(f"prompt and completion have {n} tokens, the reward model takes {most}") for n in lengths]
    # Sorted by length, so that batches have little padding.
    order = sorted((i for i, n in enumerate(lengths) if n <= most), key=lengths.__getitem__)
    rows = ROWS * mesh.size
    for part in (order[i : i + rows] for i in range(0, len(order), rows)):
        length = min(lengths[part[-1]] + -lengths[part[-1]] % _BUCKET, most)
        batch = {k: np.zeros((rows, length), np.int32) for k in ("tokens", "segments", "positions")}
        batch["mask"] = np.zeros((rows, length), bool)
        last = np.zeros(rows, np.int32)
        for row, i in enumerate(part):
            batch["tokens"][row, : lengths[i]], batch["segments"][row, : lengths[i]] = examples[i]["tokens"], 1
            batch["positions"][row, : lengths[i]] = np.arange(lengths[i])
            batch["mask"][row, : lengths[i]] = examples[i]["mask"]
            last[row] = np.flatnonzero(examples[i]["mask"])[-1]
        with sharding.use(mesh):
            rewards = np.asarray(_rewards(model, params, sharding.distribute(batch, mesh, rows)))
        for row, i in enumerate(part):
            scores[i] = float(rewards[row, last[row]])
    return scores


score.many = _many
score.ready = lambda *, folder: _opened(folder)


@functools.lru_cache(maxsize=4)
def _opened(folder: str) -> tuple:
    """(transformer, weights, tokenizer, mesh) of a reward model, kept in memory. Raises UserError for another model."""
    # Each process scores its own completions: a mesh over all processes would need all of them at once.
    mesh = sharding.make_mesh(devices=jax.local_devices())
    spec, params = loading.open_model(folder, mesh)
    if "reward_head" not in params:
        raise UserError(f"rewards.model.score: {folder} has no reward head; give the workdir of a reward model.")
    if spec.tokenizer is None:
        raise UserError(f"rewards.model.score: {folder} has no tokenizer, so it cannot read text.")
    return spec.transformer, params, spec.tokenizer, mesh


def _encoded(record: dict, completion: str, tokenizer: Any, folder: str) -> dict[str, np.ndarray]:
    prompt = record.get("prompt")
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if not turns or not isinstance(turns, list):
        raise UserError(f"record with the keys {', '.join(record)}: no text or turns under `prompt` for the model in {folder}.")
    turns = [*turns, {"role": "assistant", "content": completion}]
    return chat.encode(Conversation(turns, "a completion for the reward model"), tokenizer, train_on="last")


@functools.partial(jax.jit, static_argnums=0)
def _rewards(model: Any, params: Any, batch: dict) -> jax.Array:
    return heads.scalar(model.forward(params, batch).hidden, params["reward_head"]["kernel"])
