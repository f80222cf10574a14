"""What a frozen model says of a data set, token by token: functions (forward, params, batch) -> columns.

    python -m jaxpost.annotate --config=RECIPE --workdir=W --what=ref_logps
    python -m jaxpost.annotate --config=RECIPE --out=FOLDER --what='{"name": "topk", "k": 64}' --config.model=TEACHER

A column is [B,S] or [B,S,...], each place about the token there, and is kept where the batch's mask is: what is said of a
document as a whole stands at every token of it that is learned. `jaxpost.annotate` writes columns once for a data set; a stage
that names their folder (`annotations`) has them in its batches.
"""

import functools

import jax
import jax.numpy as jnp

from jaxpost.errors import UserError
from jaxpost.objectives import documents, logprobs, reward_model


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
    columns = {"temperature": jnp.full(batch["mask"].shape, temperature, jnp.float32)}
    found = logprobs.at_tokens(_likeliest(k), out, columns=columns, mask=batch["mask"])
    return {"teacher_tokens": found["tokens"].astype(jnp.int32), "teacher_logps": found["logps"]}


@functools.cache
def _likeliest(k: int):
    """What `logprobs.over_head` takes for the k likeliest tokens; one object for each k, since it is known by identity."""

    def fn(logits, columns):
        scores = logits / columns["temperature"][:, None]
        values, tokens = jax.lax.top_k(scores, k)
        return {"logps": values - jax.nn.logsumexp(scores, axis=-1, keepdims=True), "tokens": tokens}

    return fn


def hidden(forward, params, batch):
    """teacher_hidden [B,S,D] float32: the final hidden state that predicts the token at each place; D numbers a token."""
    return {"teacher_hidden": jnp.roll(forward(params, batch).hidden, 1, axis=1).astype(jnp.float32)}
