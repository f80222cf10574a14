"""Reward models: a scalar head on the hidden states, trained on comparisons, ratings, labels or steps.

The head is one more leaf of the parameters, params["reward_head"]["kernel"] [D,1], which these objectives declare (`leaves`).
It starts at zero, so every reward is 0 at first. A document's reward is the head at the last token of its completion, the stop
token: rewards(hidden)[last]. The hidden state at a token depends on it, unlike the one that predicts it.

A trained model scores by `token_rewards`. Losses are means over pairs, documents or steps of the global batch.
"""

import jax
import jax.numpy as jnp

from jaxpost.declare import Column, objective
from jaxpost.metrics import Max, Min, masked_mean
from jaxpost.models import heads
from jaxpost.objectives import documents
from jaxpost.types import Batch, Output, Params, Term

# Leaves beside the model's: path -> (axis letters, first value). D is the model's width.
LEAVES = {"reward_head/kernel": ("D1", 0.0)}
LABELS, MARGINS = {"labels": Column("BS", "float32")}, {"margins": Column("BS", "float32")}


def token_rewards(params: Params, output: Output) -> jax.Array:
    """[B,S] float32: the scalar head at each token's hidden state."""
    return heads.scalar(output.hidden, params["reward_head"]["kernel"])


def _document_rewards(forward, params, batch: Batch) -> jax.Array:
    return documents.last(token_rewards(params, forward(params, batch)), batch)


def _reward_metrics(rewards: jax.Array, real: jax.Array) -> dict:
    """TRL's metrics of the rewards."""
    return {
        "mean_reward": masked_mean(rewards, real),
        "min_reward": Min(jnp.min(jnp.where(real, rewards, jnp.inf))),
        "max_reward": Max(jnp.max(jnp.where(real, rewards, -jnp.inf))),
    }


def _compared(forward, params, batch: Batch, margins: jax.Array | float, centring: float) -> tuple[dict, dict]:
    rewards, lengths = _document_rewards(forward, params, batch), documents.lengths(batch)
    (chosen, rejected), (n, m) = documents.sides(rewards), documents.sides(lengths)
    real = (n > 0) & (m > 0)
    pairs = jnp.sum(real.astype(jnp.float32))
    terms = {"preference": Term(jnp.sum(jnp.where(real, jax.nn.softplus(margins - chosen + rejected), 0.0)), pairs)}
    if centring:
        terms["centring"] = Term(jnp.sum(jnp.where(real, (chosen + rejected) ** 2, 0.0)), pairs, centring)
    metrics = {"accuracy": masked_mean(chosen > rejected, real), "margin": masked_mean(chosen - rejected, real)}
    return terms, metrics | _reward_metrics(rewards, documents.of_pairs(real))


@objective(rows="pairs", leaves=LEAVES)
def bradley_terry(forward, params, batch, key, *, centring: float = 0.0):
    """Comparisons:  L = -log s(R_c - R_r) + centring (R_c + R_r)^2.

    Pairs are laid out as for preference.sigmoid: two consecutive documents of a row, the chosen first. centring keeps rewards
    near 0, since comparisons do not fix their mean ("Helping or Herding? Reward Model Ensembles Mitigate but do not Eliminate
    Reward Hacking"; 0.01 there). log 2 at the first step. Source: "Training language models to follow instructions with human
    feedback".
    """
    return _compared(forward, params, batch, 0.0, centring)


@objective(rows="pairs", columns=MARGINS, leaves=LEAVES)
def offset(forward, params, batch, key, *, centring: float = 0.0):
    """Comparisons with a margin:  L = -log s(R_c - R_r - m) + centring (R_c + R_r)^2,  m the column `margins` [B,S].

    It differs from bradley_terry in a margin for each pair, which the data gives. Source: "Llama 2: Open Foundation and
    Fine-Tuned Chat Models".
    """
    margins, _ = documents.sides(documents.constants(batch["margins"], batch))
    return _compared(forward, params, batch, margins, centring)


def _labelled(forward, params, batch: Batch, loss) -> tuple[dict, dict]:
    rewards, real = _document_rewards(forward, params, batch), documents.lengths(batch) > 0
    labels = documents.constants(batch["labels"], batch)
    total = jnp.sum(jnp.where(real, loss(rewards, labels), 0.0))
    return {"reward": Term(total, jnp.sum(real.astype(jnp.float32)))}, _reward_metrics(rewards, real)


@objective(rows="scored", columns=LABELS, leaves=LEAVES)
def regression(forward, params, batch, key):
    """Ratings:  L = (R - y)^2,  y the column `labels` [B,S], constant over a completion.

    Source: "HelpSteer2: Open-source dataset for training top-performing reward models".
    """
    return _labelled(forward, params, batch, lambda rewards, labels: (rewards - labels) ** 2)


@objective(rows="labelled", columns=LABELS, leaves=LEAVES)
def logistic(forward, params, batch, key):
    """Good or bad:  L = -y log s(R) - (1 - y) log s(-R),  y the column `labels` [B,S], 0 to 1.

    It differs from regression in a reward that is the log-odds of being good. log 2 at the first step. Source: "Training
    Verifiers to Solve Math Word Problems".
    """
    return _labelled(forward, params, batch, _cross_entropy)


def _cross_entropy(rewards: jax.Array, labels: jax.Array) -> jax.Array:
    return labels * jax.nn.softplus(-rewards) + (1 - labels) * jax.nn.softplus(rewards)


@objective(rows="steps", columns=LABELS, leaves=LEAVES)
def process(forward, params, batch, key):
    """Steps of a solution:  L = -y_t log s(R_t) - (1 - y_t) log s(-R_t)  at the token t that ends each step.

    labels [B,S]: at such a token whether the step is right (0 to 1), -1 at all others; only learned tokens count. It differs
    from logistic in labelling every step, not only the end. Source: "Let's Verify Step by Step".
    """
    rewards, labels = token_rewards(params, forward(params, batch)), batch["labels"]
    ends = batch["mask"] & (labels >= 0)
    loss = Term(jnp.sum(jnp.where(ends, _cross_entropy(rewards, labels), 0.0)), jnp.sum(ends.astype(jnp.float32)))
    return {"reward": loss}, {"accuracy": masked_mean((rewards > 0) == (labels > 0.5), ends), **_reward_metrics(rewards, ends)}
