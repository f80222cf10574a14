"""Annotators: functions (forward, params, batch) -> {column: [B,S,...]}, computed by a frozen model for tokens or documents.

    python -m jaxpost.annotate --config=RECIPE --workdir=W --what=ref_logps
    python -m jaxpost.annotate --config=RECIPE --out=FOLDER --what='{"name": "topk", "k": 64}' --config.model=TEACHER

Each place of a column is about the token there; values in the batch's mask are kept. A number of a whole document has the same
value at all of its tokens; `@annotator(per="document")` stores it once. stages/annotations.py says when annotators run,
and with which weights.
"""

import functools

import jax
import jax.numpy as jnp

from jaxpost.declare import annotator
from jaxpost.errors import UserError
from jaxpost.models.heads import vocab
from jaxpost.objectives import documents, logprobs, reward_model


def ref_logps(forward, params, batch):
    """ref_logps [B,S] float32: each learned token's log-probability, nats. DPO and others read the reference's."""
    return {"ref_logps": logprobs.token_scores(forward(params, batch), batch)["logps"]}


def scored_logps(forward, params, batch):
    """scored_logps [B,S] float32, nats: the trainer's log-probabilities at the sampling weights, for `rollouts.correction`."""
    return {"scored_logps": logprobs.token_scores(forward(params, batch), batch)["logps"]}


def logps(forward, params, batch):
    """logps and entropy [B,S] float32, nats: each learned token's log-probability, and the entropy of the prediction."""
    scores = logprobs.token_scores(forward(params, batch), batch)
    return {"logps": scores["logps"], "entropy": scores["entropy"]}


@annotator(per="document")
def perplexity(forward, params, batch):
    """perplexity [B,S] float32: exp of the mean negative log-probability of the document's learned tokens."""
    scores = logprobs.token_scores(forward(params, batch), batch)["logps"]
    mean = documents.sums(scores, batch) / jnp.maximum(documents.lengths(batch), 1.0)
    return {"perplexity": documents.over_tokens(jnp.exp(-mean), batch)}


@annotator(per="document")
def reward(forward, params, batch):
    """reward [B,S] float32: a reward model's scalar head on each document, at the last token of its completion.

    Raises UserError for a model without such a head.
    """
    if "reward_head" not in params:
        raise UserError("annotator reward: the model has no reward head; give the workdir of a reward model.")
    rewards = documents.last(reward_model.token_rewards(params, forward(params, batch)), batch)
    return {"reward": documents.over_tokens(rewards, batch)}


@annotator(per="document")
def embedding(forward, params, batch, *, pooling: str = "mean", prompt: bool = False):
    """embedding [B,S,D] float32: the mean of the final hidden states at the document's learned tokens, or that at the last.

    pooling: as in `documents.pooled`. prompt: whether the mean counts the document's other tokens too, as embedding models do.
    """
    tokens = batch["segments"] > 0 if prompt else batch["mask"]
    hidden = forward(params, batch).hidden
    vectors = documents.pooled(hidden, batch, pooling=pooling, latent=params.get("latent"), tokens=tokens)
    return {"embedding": jnp.take_along_axis(vectors, batch["segments"][..., None], axis=1)}


def topk(forward, params, batch, *, k: int = 64, temperature: float = 1.0):
    """teacher_tokens [B,S,k] int32 and teacher_logps [B,S,k] float32: the k likeliest tokens at each place, likeliest first,
    and their log-probabilities, in nats, over the whole vocabulary at the temperature.

    Raises UserError for a k that is not between 1 and the vocabulary's size.
    """
    out = forward(params, batch)
    if not 0 < k <= vocab(out.head):
        raise UserError(f"annotator topk: k={k}; give 1 to {vocab(out.head)}, the size of the vocabulary.")
    columns = {"temperature": jnp.full(batch["mask"].shape, temperature, jnp.float32)}
    top = logprobs.at_tokens(_likeliest(k), out, columns=columns, mask=batch["mask"])
    return {"teacher_tokens": top["tokens"].astype(jnp.int32), "teacher_logps": top["logps"]}


@functools.cache
def _likeliest(k: int):
    """The function of `logprobs.over_head` for the k likeliest tokens; one object a k, since it is cached by identity."""

    def fn(logits, columns):
        scores = logits / columns["temperature"][:, None]
        values, tokens = jax.lax.top_k(scores, k)
        return {"logps": values - jax.nn.logsumexp(scores, axis=-1, keepdims=True), "tokens": tokens}

    return fn


def hidden(forward, params, batch):
    """teacher_hidden [B,S,D] float32: the final hidden state that predicts the token at each place; D numbers a token."""
    return {"teacher_hidden": jnp.roll(forward(params, batch).hidden, 1, axis=1).astype(jnp.float32)}
