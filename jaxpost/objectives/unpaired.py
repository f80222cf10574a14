"""Preference losses over single answers: each is good or bad by itself, without a comparison within a prompt.

s_i is the log-ratio log policy / reference of document i's completion, summed over tokens. The column `labels` [B,S], constant
over a completion, is 1 for a desirable answer, 0 for an undesirable one, and -1 for an answer to another prompt, which has no
loss and measures how far the policy has moved (kto's baseline). All read tokens, segments, mask, labels and `ref_logps` [B,S].
Losses are means over the labelled documents of the global batch. Log-probabilities are in nats.
"""

import jax
import jax.numpy as jnp

from jaxpost.declare import Column, objective
from jaxpost.metrics import Difference, masked_mean
from jaxpost.objectives import documents
from jaxpost.objectives.logprobs import REFERENCE, token_scores
from jaxpost.types import Batch, Term

COLUMNS = {"labels": Column("BS", "float32"), **REFERENCE}


def _ratios(forward, params, batch: Batch, learned: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, dict]:
    """(log-ratios, log-probabilities, labels) [B,N] of the documents with a token in `learned`, and the tokens' scores.

    Labels of other documents are -1.
    """
    batch = batch | {"mask": learned}
    scores = token_scores(forward(params, batch), batch)
    logps = documents.sums(scores["logps"], batch)
    labels = jnp.where(documents.lengths(batch) > 0, documents.constants(batch["labels"], batch), -1.0)
    return logps - documents.sums(jax.lax.stop_gradient(batch["ref_logps"]), batch), logps, labels, scores


def _labelled(forward, params, batch: Batch, beta: float, loss) -> tuple[dict, dict]:
    """Terms and metrics of loss(log-ratios, labels) [B,N] over the labelled documents."""
    learned = batch["mask"] & (batch["labels"] >= 0)
    ratios, logps, labels, scores = _ratios(forward, params, batch, learned)
    real, good, bad = labels >= 0, labels == 1, labels == 0
    chosen, rejected = (masked_mean(beta * ratios, side) for side in (good, bad))
    metrics = {
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/margins": Difference(chosen, rejected),
        "logps/chosen": masked_mean(logps, good),
        "logps/rejected": masked_mean(logps, bad),
        "entropy": masked_mean(scores["entropy"], learned),
    }
    total = jnp.sum(jnp.where(real, loss(ratios, good), 0.0))
    return {"unpaired": Term(total, jnp.sum(real.astype(jnp.float32)))}, metrics


def _baseline(forward, params, batch, key):
    """The mean log-ratio of answers to other prompts over the whole batch, at least 0."""
    ratios, _, _, _ = _ratios(forward, params, batch, batch["mask"] & (batch["labels"] == -1))
    mismatched = documents.lengths(batch | {"mask": batch["mask"] & (batch["labels"] == -1)}) > 0
    mean = jnp.sum(jnp.where(mismatched, ratios, 0.0)) / jnp.maximum(jnp.sum(mismatched), 1)
    return {"kl_baseline": jnp.maximum(mean, 0.0)}


@objective(rows="mismatched", columns=COLUMNS, prepare=_baseline)
def kto(forward, params, batch, key, *, beta: float = 0.1, desirable: float = 1.0, undesirable: float = 1.0):
    """KTO:  L = w_d (1 - s(beta (s_i - z))) for a desirable answer, w_u (1 - s(beta (z - s_i))) for an undesirable one.

    z = max(0, mean of s over the documents labelled -1), over the global batch, without gradient; 0 if there are none. It
    differs from sigmoid in needing no pairs. desirable, undesirable: w_d and w_u; the paper keeps w_d n_d / (w_u n_u) between 1
    and 4/3. 1/2 at the first step. Source: "KTO: Model Alignment as Prospect Theoretic Optimization".
    """
    z = batch["kl_baseline"]

    def loss(ratios, good):
        return jnp.where(
            good, desirable * jax.nn.sigmoid(beta * (z - ratios)), undesirable * jax.nn.sigmoid(beta * (ratios - z))
        )

    terms, metrics = _labelled(forward, params, batch, beta, loss)
    return terms, metrics | {"kl": masked_mean(z, jnp.ones((), bool))}


@objective(rows="labelled", columns=COLUMNS)
def apo_zero(forward, params, batch, key, *, beta: float = 0.1, desirable: float = 1.0, undesirable: float = 1.0):
    """APO-zero by single answers:  L = w_d (1 - s(beta s_i)) for a desirable one, w_u s(beta s_i) for an undesirable one.

    It differs from kto in having no baseline, so it needs no documents labelled -1. Source: "Anchored Preference Optimization
    and Contrastive Revisions: Addressing Underspecification in Alignment".
    """

    def loss(ratios, good):
        return jnp.where(good, desirable * jax.nn.sigmoid(-beta * ratios), undesirable * jax.nn.sigmoid(beta * ratios))

    return _labelled(forward, params, batch, beta, loss)


def _shift(forward, params, batch, key):
    """The midpoint of the mean log-ratios of desirable and undesirable answers over the whole batch."""
    ratios, _, labels, _ = _ratios(forward, params, batch, batch["mask"] & (batch["labels"] >= 0))
    means = [jnp.sum(jnp.where(labels == k, ratios, 0.0)) / jnp.maximum(jnp.sum(labels == k), 1) for k in (0, 1)]
    return {"shift": (means[0] + means[1]) / 2}


@objective(rows="labelled", columns=COLUMNS, prepare=_shift)
def bco(forward, params, batch, key, *, beta: float = 0.1):
    """BCO:  L = -log s(beta s_i - d) for a desirable answer, -log s(d - beta s_i) for an undesirable one.

    d = beta times the midpoint of the two labels' mean log-ratios, over the global batch, where the paper keeps a running mean.
    It differs from kto in a logistic loss and in the place of the boundary. log 2 at the first step. Source: "Binary Classifier
    Optimization for Large Language Model Alignment".
    """
    d = batch["shift"]

    def loss(ratios, good):
        margin = beta * (ratios - d)
        return jax.nn.softplus(jnp.where(good, -margin, margin))

    return _labelled(forward, params, batch, beta, loss)
