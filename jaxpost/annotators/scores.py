"""What a frozen model says of a data set, token by token: functions (forward, params, batch) -> columns.

    python -m jaxpost.annotate --config=RECIPE --workdir=W --what=ref_logps
    python -m jaxpost.annotate --config=RECIPE --out=FOLDER --what='{"name": "topk", "k": 64}' --config.model=TEACHER

A column is [B,S] or [B,S,...], each place about the token there, and is kept where the batch's mask is: what is said of a
document as a whole stands at every token of it that is learned. `jaxpost.annotate` writes columns once for a data set; a stage
that names their folder (`annotations`) has them in its batches.
"""

import jax
import jax.numpy as jnp

from jaxpost import sharding
from jaxpost.errors import UserError
from jaxpost.models.heads import logits
from jaxpost.objectives import documents, logprobs, reward_model
from jaxpost.types import Head


def ref_logps(forward, params, batch):
    """ref_logps [B,S] float32: each learned token's log-probability, nats. What DPO and its kin read of their reference, which
    a stage makes of the weights that it starts from if nothing else gives it.
    """
    return {"ref_logps": logprobs.token_scores(forward(params, batch), batch)["logps"]}


def logps(forward, params, batch):
    """logps and entropy [B,S] float32, nats: ref_logps under a name of its own, and how undecided the model was there."""
    scores = logprobs.token_scores(forward(params, batch), batch)
    return {"logps": scores["logps"], "entropy": scores["entropy"]}


def perplexity(forward, params, batch):
    """perplexity [B,S] float32: exp of the mean negative log-probability of the document's learned tokens."""
    scores = logprobs.token_scores(forward(params, batch), batch)["logps"]
    mean = documents.sums(scores, batch) / jnp.maximum(documents.lengths(batch), 1.0)
    return {"perplexity": documents.over_tokens(jnp.exp(-mean), batch)}


def reward(forward, params, batch):
    """reward [B,S] float32: what a reward model's scalar head makes of each document, at the end of its completion.

    Raises UserError for a model without such a head.
    """
    if "reward_head" not in params:
        raise UserError("annotator reward: the model has no reward head; give the workdir of a reward model.")
    rewards = documents.last(reward_model.token_rewards(params, forward(params, batch)), batch)
    return {"reward": documents.over_tokens(rewards, batch)}


def topk(forward, params, batch, *, k: int = 64, temperature: float = 1.0):
    """teacher_tokens [B,S,k] int32 and teacher_logps [B,S,k] float32: the k tokens that the model finds likeliest at each
    place, likeliest first, and their log-probabilities, in nats, over the whole vocabulary at the temperature.
    """
    out = forward(params, batch)
    if not 0 < k <= out.head.weight.shape[0]:
        raise UserError(f"annotator topk: k={k}; give 1 to {out.head.weight.shape[0]}, the size of the vocabulary.")
    found = _in_chunks(_before(out.hidden), out.head, k, temperature)
    return {"teacher_tokens": found[1].astype(jnp.int32), "teacher_logps": found[0]}


def hidden(forward, params, batch):
    """teacher_hidden [B,S,D] float32: the final hidden state that predicts the token at each place; D numbers a token."""
    return {"teacher_hidden": _before(forward(params, batch).hidden).astype(jnp.float32)}


def _before(x: jax.Array) -> jax.Array:
    """[B,S,D], at each place the state before it: a column is about the token at its own place, which that one predicts."""
    return jnp.roll(x, 1, axis=1)


def _in_chunks(states: jax.Array, head: Head, k: int, temperature: float) -> tuple[jax.Array, jax.Array]:
    """(log-probabilities, ids) [B,S,k] of the likeliest tokens, a few places at a time: never [B,S,V]."""
    rows, length, width = states.shape
    size = max(1, min(length, logprobs.CHUNK * sharding.batch_ways() // (rows * head.weight.shape[0])))
    padded = jnp.pad(states, ((0, 0), (0, -length % size), (0, 0)))

    def likeliest(part):
        scores = logits(part.reshape(-1, width), head).astype(jnp.float32) / temperature
        values, ids = jax.lax.top_k(scores, k)
        values = values - jax.nn.logsumexp(scores, axis=-1, keepdims=True)
        return values.reshape(rows, size, k), ids.reshape(rows, size, k)

    parts = padded.reshape(rows, -1, size, width).swapaxes(0, 1)
    return tuple(x.swapaxes(0, 1).reshape(rows, -1, k)[:, :length] for x in jax.lax.map(likeliest, parts))
