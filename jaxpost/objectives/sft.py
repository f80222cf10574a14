"""Supervised objectives: maximise the likelihood of demonstrated tokens.

    grad = sum over tokens of  weight * d log p(token)

The functions differ in that weight alone. Each loss is a sum over the learned tokens, divided by their number in the global
batch: a long example counts by its length, however the batch is split.
"""

import jax
import jax.numpy as jnp

from jaxpost.metrics import masked_mean
from jaxpost.objectives.logprobs import token_scores
from jaxpost.types import Term


def _token_metrics(scores: dict, mask: jax.Array) -> dict:
    return {
        "entropy": masked_mean(scores["entropy"], mask),
        "mean_token_accuracy": masked_mean(scores["correct"], mask),
    }


def nll(forward, params, batch, key):
    """Negative log-likelihood, the usual SFT loss:  L = - sum_t m_t log p_t / sum_t m_t.

    Reads tokens, mask [B,S]. Nats a token. Source: maximum likelihood; the global denominator as in "Tulu 3: Pushing Frontiers
    in Open Language Model Post-Training".
    """
    mask = batch["mask"]
    scores = token_scores(forward(params, batch), batch)
    loss = Term(-jnp.sum(scores["logps"]), jnp.sum(mask.astype(jnp.float32)))
    return {"nll": loss}, _token_metrics(scores, mask)


def dft(forward, params, batch, key):
    """Dynamic fine-tuning:  L = - sum_t m_t sg(p_t) log p_t / sum_t m_t,  whose gradient is that of -p_t.

    It differs from nll in weighing each token by its own probability, without gradient (sg). That cancels the 1/p_t in the
    gradient of log p_t. Also reports nll. Source: "On the Generalization of
    SFT: A Reinforcement Learning Perspective with Reward Rectification".
    """
    mask = batch["mask"]
    scores = token_scores(forward(params, batch), batch)
    weighted = jax.lax.stop_gradient(jnp.exp(scores["logps"])) * scores["logps"]
    loss = Term(-jnp.sum(jnp.where(mask, weighted, 0.0)), jnp.sum(mask.astype(jnp.float32)))
    return {"dft": loss}, {"nll": masked_mean(-scores["logps"], mask), **_token_metrics(scores, mask)}
