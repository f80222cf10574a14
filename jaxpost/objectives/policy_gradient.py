"""Policy-gradient objectives: make sampled tokens likelier by how much better than expected they turned out.

    grad = sum over tokens of  stable_mask * advantage / reference_policy * d policy

The rollout source supplies the advantage and the behaviour policy's log-probabilities as columns; a function here chooses the
other parts. See `jaxpost.rollouts.advantages` for the advantages.
"""

import jax
import jax.numpy as jnp

from jaxpost.metrics import Mean, masked_max, masked_mean
from jaxpost.objectives.logprobs import token_scores
from jaxpost.types import Term


def _documents(batch) -> jax.Array:
    """How many completions the batch holds, padding rows left out."""
    return jnp.sum(((batch["positions"] == 0) & (batch["segments"] > 0)).astype(jnp.float32))


def _rollout_metrics(batch, scores) -> dict:
    """What every policy-gradient method reports; `rewards`, `group_std` and `truncated` are columns of the rollout source."""
    mask = batch["mask"]
    drift = jnp.abs(scores["logps"] - batch["old_logps"])
    metrics = {
        "entropy": masked_mean(scores["entropy"], mask),
        "sampling/sampling_logp_difference/mean": masked_mean(drift, mask),
        "sampling/sampling_logp_difference/max": masked_max(drift, mask),
        "completions/mean_length": Mean(jnp.sum(mask.astype(jnp.float32)), _documents(batch)),
    }
    if "rewards" in batch:
        real = batch["segments"][:, 0] > 0
        metrics |= {
            "reward": masked_mean(batch["rewards"], real),
            "reward_std": masked_mean(batch["group_std"], real),
            "frac_reward_zero_std": masked_mean(batch["group_std"] == 0, real),
            "completions/clipped_ratio": masked_mean(batch["truncated"], real),
        }
    return metrics


def reinforce(forward, params, batch, key):
    """The plain policy gradient:  L = - sum_i A_i sum_t m_it log p_it / (number of completions).

    With A the leave-one-out advantage its expectation is the exact gradient of the expected return. No ratio and no clipping:
    use each rollout for one step. Reads tokens, mask, positions, segments, advantages, old_logps [B,S] and the scalar
    temperature. Source: "Simple Statistical Gradient-Following Algorithms for Connectionist Reinforcement Learning"; the
    baseline from "Buy 4 REINFORCE Samples, Get a Baseline for Free!".
    """
    scores = token_scores(forward(params, batch), batch)
    advantages = jax.lax.stop_gradient(batch["advantages"])
    loss = Term(-jnp.sum(jnp.where(batch["mask"], advantages * scores["logps"], 0.0)), _documents(batch))
    return {"policy": loss}, _rollout_metrics(batch, scores)
